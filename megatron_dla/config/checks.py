"""Checks of a config beyond the range of single keys; every error names the key, its value and valid values."""

from __future__ import annotations

import math

from megatron_dla.config.load import check_ranges
from megatron_dla.config.pattern import LETTERS, describe_letters
from megatron_dla.config.schema import (
    DataSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RunConfig,
    RunSection,
    TauSection,
    TrainingSection,
)
from megatron_dla.errors import ConfigError

TP = "parallel.tensor_model_parallel_size"


def _divisors(n: int, at_most: int = 1024) -> str:
    return ", ".join(str(d) for d in range(1, min(n, at_most) + 1) if n % d == 0)


def layer_letters(model: ModelSection) -> str:
    """The pattern repeated to `num_layers` letters."""
    return (model.pattern * math.ceil(model.num_layers / max(1, len(model.pattern))))[: model.num_layers]


def softmax_layers(model: ModelSection) -> int:
    """Number of layers with softmax attention, with or without rotary positions."""
    return sum(LETTERS[letter].softmax for letter in layer_letters(model))


def opens_slots(model: ModelSection) -> bool:
    """Whether a layer of the model keeps slots."""
    return any(LETTERS[letter].slots for letter in layer_letters(model))


def head_counts(model: ModelSection, softmax_only: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """Key -> value of the numbers of heads, and of key groups, of the pattern's mixers."""
    found = layer_letters(model)
    mixers = [x for letter, x in LETTERS.items() if letter in found and (x.softmax or not softmax_only)]
    heads = {mixer.heads: getattr(model, mixer.heads) for mixer in mixers}
    return heads, {mixer.groups: getattr(model, mixer.groups) for mixer in mixers}


def attention_head_dim(model: ModelSection) -> int:
    """Channels of one softmax head."""
    return model.attention_head_dim or max(1, model.hidden_size // model.attention_heads)


def check_model(model: ModelSection) -> None:
    """Ranges, and divisibility that does not depend on the parallel layout."""
    check_ranges(model, "model")
    if not model.pattern or set(model.pattern) - LETTERS.keys():
        raise ConfigError(f"model.pattern = {model.pattern!r}: use the letters {describe_letters()}")
    if model.num_heads % model.num_groups:
        raise ConfigError(
            f"model.num_groups = {model.num_groups} does not divide model.num_heads = {model.num_heads}: "
            f"use one of {_divisors(model.num_heads)}"
        )
    if model.tau_mode != "fixed" and model.boundary != "information":
        raise ConfigError(
            f"model.boundary = {model.boundary} with model.tau_mode = {model.tau_mode}: no score is held against tau; "
            "use model.tau_mode=fixed or model.boundary=information"
        )
    if model.tau_mode == "learned" and model.merge != "density":
        raise ConfigError("model.tau_mode = learned needs model.merge = density (the gradient follows that rule)")
    if model.tau_mode == "learned" and model.slot_weights == "content":
        raise ConfigError(
            "model.tau_mode = learned with model.slot_weights = content: the gradient of the threshold does not follow "
            "weights that depend on what a slot holds; use model.slot_weights=recency or model.tau_mode=calibrated"
        )
    if softmax_layers(model):
        check_attention(model)
    for low, high in (("dt_min", "dt_max"), ("a_min", "a_max")):
        if getattr(model, low) > getattr(model, high):
            raise ConfigError(
                f"model.{low} = {getattr(model, low)}: must be at most model.{high} = {getattr(model, high)}"
            )


def check_attention(model: ModelSection) -> None:
    """Head sizes and RoPE of the softmax layers."""
    if model.attention_heads % model.attention_groups:
        raise ConfigError(
            f"model.attention_groups = {model.attention_groups} does not divide "
            f"model.attention_heads = {model.attention_heads}: use one of {_divisors(model.attention_heads)}"
        )
    if not model.attention_head_dim and model.hidden_size % model.attention_heads:
        raise ConfigError(
            f"model.attention_heads = {model.attention_heads} does not divide model.hidden_size = {model.hidden_size}: "
            f"use one of {_divisors(model.hidden_size)}, or set model.attention_head_dim"
        )
    if attention_head_dim(model) % 2:
        key = "attention_head_dim" if model.attention_head_dim else "attention_heads"
        raise ConfigError(
            f"model.{key} = {getattr(model, key)} gives an odd head size ({attention_head_dim(model)}): rotary "
            "positions need an even one"
        )
    if model.rope_high_freq_factor <= model.rope_low_freq_factor:
        raise ConfigError(
            f"model.rope_high_freq_factor = {model.rope_high_freq_factor}: must be above "
            f"model.rope_low_freq_factor = {model.rope_low_freq_factor}"
        )


def check_tensor_parallel(model: ModelSection, tensor: int, sequence: bool, seq_len: int) -> None:
    """Divisibility by the tensor-parallel size."""
    if tensor < 1:
        raise ConfigError(f"{TP} = {tensor}: must be at least 1")
    sizes, groups = head_counts(model)
    if model.ffn_hidden_size:
        sizes["ffn_hidden_size"] = model.ffn_hidden_size
    valid = [n for n in range(1, min(sizes.values()) + 1) if _shares(n, sizes | {"": model.vocab_multiple}, groups)]
    fix = f"use {TP} in {{{', '.join(map(str, valid))}}}"
    for key, value in sizes.items():
        if value % tensor:
            raise ConfigError(f"model.{key} = {value} is not divisible by {TP} = {tensor}: {fix}")
    for key, value in groups.items():
        if value % tensor and tensor % value:
            raise ConfigError(
                f"model.{key} = {value} and {TP} = {tensor}: one must divide the other (whole groups a "
                f"rank, or one group for several ranks): {fix}"
            )
    if softmax_layers(model) and 2 * model.attention_groups * attention_head_dim(model) % tensor:
        raise ConfigError(
            f"model.attention_head_dim = {attention_head_dim(model)}: keys and values of {model.attention_groups} "
            f"groups do not divide over {TP} = {tensor}: {fix}"
        )
    if model.vocab_multiple % tensor:
        raise ConfigError(
            f"model.vocab_multiple = {model.vocab_multiple} must be a multiple of {TP} = {tensor}: {fix} "
            "(of an imported model it is the whole vocabulary)"
        )
    if sequence and tensor == 1:
        raise ConfigError(f"parallel.sequence_parallel = true needs {TP} > 1 (it shares one layer's activations)")
    if sequence and seq_len % tensor:
        raise ConfigError(
            f"data.seq_len = {seq_len} must be a multiple of {TP} = {tensor} with parallel.sequence_parallel"
        )


def _shares(tensor: int, sizes: dict[str, int], groups: dict[str, int]) -> bool:
    """Whether a tensor-parallel size divides all sizes, and divides or is a multiple of all numbers of groups."""
    return all(n % tensor == 0 for n in sizes.values()) and all(
        n % tensor == 0 or tensor % n == 0 for n in groups.values()
    )


def check_tau(tau: TauSection, model: ModelSection, training: TrainingSection) -> None:
    """The annealed soft gate, and the calibration."""
    if model.tau_mode == "calibrated" and training.zero_stage == 3:
        raise ConfigError(
            "training.zero_stage = 3 with model.tau_mode = calibrated: no rank holds the thresholds that it sets; use "
            "training.zero_stage 1 or 2"
        )
    if model.tau_mode == "calibrated" and tau.calibration_steps >= training.steps:
        raise ConfigError(
            f"tau.calibration_steps = {tau.calibration_steps}: must be below training.steps = {training.steps}: "
            f"the run has to go on with the thresholds found; use about {max(1, training.steps // 10)}"
        )
    if tau.gate == "annealed" and model.tau_mode != "learned":
        raise ConfigError("tau.gate = annealed needs model.tau_mode = learned (a fixed tau has no gradient)")
    if tau.gate == "annealed" and not opens_slots(model):
        raise ConfigError(
            f"tau.gate = annealed with model.pattern = {model.pattern}: no layer opens slots; use tau.gate=hard"
        )
    if tau.temperature_end > tau.temperature_start:
        raise ConfigError(
            f"tau.temperature_end = {tau.temperature_end}: must be at most tau.temperature_start = "
            f"{tau.temperature_start}"
        )


def check_context_parallel(
    model: ModelSection, parallel: ParallelSection, seq_len: int, world_size: int | None = None
) -> None:
    """Divisibility by the context-parallel size; suggested sizes also divide `world_size` processes, if given."""
    size, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if size == 1:
        return
    pieces = size * (tensor if parallel.sequence_parallel else 1)
    if seq_len % pieces:
        raise ConfigError(
            f"data.seq_len = {seq_len} is not divisible by parallel.context_parallel_size"
            f"{f' x {TP} (parallel.sequence_parallel)' if parallel.sequence_parallel else ''} = {pieces}: use a "
            f"multiple of {pieces}"
        )
    chain = parallel.cp_scheme == "chain"
    if chain:
        check_chain(model, size, seq_len)
    heads, groups = head_counts(model, softmax_only=chain)
    groups = {key: max(1, n // tensor) for key, n in groups.items()}
    if not heads:
        return
    if not _fits(size, tensor, heads, groups):
        ranks, least = (world_size or 0) // tensor, tensor if parallel.sequence_parallel else 1
        largest = math.gcd(*heads.values()) // tensor
        sizes = (n for n in range(1, largest + 1) if ranks % n == 0 and seq_len % (n * least) == 0)
        valid = [n for n in sizes if _fits(n, tensor, heads, groups)]
        named = ", ".join(f"model.{key} = {getattr(model, key)}" for key in (*heads, *groups))
        raise ConfigError(
            f"parallel.context_parallel_size = {size} with {TP} = {tensor}: heads must be divisible by "
            f"their product {size * tensor}, and a tensor-parallel rank's q/k groups must divide the size or be its "
            f"multiple ({named}): use parallel.context_parallel_size in {{{', '.join(map(str, valid))}}}"
        )


def check_chain(model: ModelSection, size: int, seq_len: int) -> None:
    """Limits of the chain, which sends the slot memory from rank to rank."""
    if model.tau_mode == "learned" and opens_slots(model):
        raise ConfigError(
            f"parallel.cp_scheme = chain with model.tau_mode = {model.tau_mode}: the threshold has no gradient through "
            "a slot memory that another rank sent; use parallel.cp_scheme=heads or model.tau_mode=fixed"
        )
    if model.slot_weights == "content" and opens_slots(model):
        raise ConfigError(
            "parallel.cp_scheme = chain with model.slot_weights = content: the keys of slots are not sent from rank to "
            "rank; use parallel.cp_scheme=heads or model.slot_weights=recency"
        )
    if seq_len // size < model.conv_kernel - 1:
        raise ConfigError(
            f"data.seq_len = {seq_len} over parallel.context_parallel_size = {size} gives {seq_len // size} tokens a "
            f"rank, fewer than the convolution looks back (model.conv_kernel - 1 = {model.conv_kernel - 1})"
        )


def _fits(size: int, tensor: int, heads: dict[str, int], groups: dict[str, int]) -> bool:
    return all(n % (tensor * size) == 0 for n in heads.values()) and all(
        n % size == 0 or size % n == 0 for n in groups.values()
    )


def check_precision(zero_stage: int, bf16: bool) -> None:
    """ZeRO stages that do not work in bf16 with parameters that stay fp32."""
    reasons = {
        0: "without ZeRO DeepSpeed neither keeps fp32 master weights nor accumulates fp32 gradients of a bf16 model",
        3: "DeepSpeed shards all parameters in one dtype, and the recurrence's scalars (A_log, ...) must stay fp32",
    }
    if bf16 and zero_stage in reasons:
        raise ConfigError(
            f"training.zero_stage = {zero_stage} in bf16: {reasons[zero_stage]}; use training.zero_stage 1 or 2 "
            "(or training.precision=fp32)"
        )


def check_run_section(run: RunSection) -> None:
    """The name becomes a directory."""
    name = run.name
    if (
        not 1 <= len(name.encode(errors="replace")) <= 200
        or name in (".", "..")
        or "/" in name
        or not name.isprintable()
    ):
        raise ConfigError(
            f"run.name = {name[:120]!r}: a directory name of 1 to 200 bytes, without a slash or control characters"
        )
    if not run.dir.isprintable():
        raise ConfigError(f"run.dir = {run.dir[:120]!r}: a path without control characters")


def check_parallel(model: ModelSection, parallel: ParallelSection, seq_len: int, world_size: int) -> None:
    """The layout against the model, the row length and the number of processes."""
    if world_size < 1:
        raise ConfigError(f"{world_size} processes: a run needs at least 1 (--nproc 1)")
    check_tensor_parallel(model, parallel.tensor_model_parallel_size, parallel.sequence_parallel, seq_len)
    check_context_parallel(model, parallel, seq_len, world_size)
    ranks = parallel.model_parallel_size
    if world_size % ranks:
        name = f"{TP} x parallel.context_parallel_size" if parallel.context_parallel_size > 1 else TP
        raise ConfigError(
            f"{name} = {ranks} does not divide the {world_size} processes of this run: "
            f"start a multiple of {ranks} (dla run --nproc {ranks} ...)"
        )


def check_optimizer(optimizer: OptimizerSection, steps: int) -> None:
    """The warm-up must end before the run does."""
    if optimizer.warmup_steps >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps = {optimizer.warmup_steps} leaves no step of training.steps = {steps} at the full "
            f"learning rate: use about {steps // 10}"
        )


def check_training(training: TrainingSection, data_parallel: int) -> None:
    """The batch against the data-parallel size, and offloading."""
    rows = training.micro_batch_size * data_parallel
    if training.global_batch_size % rows:
        raise ConfigError(
            f"training.global_batch_size = {training.global_batch_size} is not a multiple of micro_batch_size x "
            f"data-parallel size = {training.micro_batch_size} x {data_parallel} = {rows}: "
            f"use a multiple of {rows}, or another micro_batch_size"
        )
    if training.patience and not training.eval_every:
        raise ConfigError(
            f"training.patience = {training.patience} with training.eval_every = 0: nothing is validated; set "
            "training.eval_every"
        )
    if training.offload_optimizer and training.zero_stage == 0:
        raise ConfigError(
            "training.offload_optimizer = true with training.zero_stage = 0: DeepSpeed offloads only an optimizer that "
            "ZeRO has sharded; use training.zero_stage 1, 2 or 3"
        )


def check_data(data: DataSection, global_batch_size: int, data_parallel: int) -> None:
    """The number of streams against the batch and the data-parallel size."""
    if data.num_streams % data_parallel:
        raise ConfigError(
            f"data.num_streams = {data.num_streams} is not a multiple of the data-parallel size "
            f"{data_parallel}: use a multiple of {data_parallel}"
        )
    if global_batch_size % data.num_streams:
        raise ConfigError(
            f"training.global_batch_size = {global_batch_size} is not a multiple of data.num_streams = "
            f"{data.num_streams}: use one of {_divisors(global_batch_size)}"
        )
    check_sources(data)


def check_sources(data: DataSection) -> None:
    """One directory, or a mixture whose weights name its sources."""
    if data.dir and data.sources:
        raise ConfigError(
            f"data.dir = {data.dir!r} and data.sources = {', '.join(data.sources)}: set one of the two "
            "(data.sources for a mixture)"
        )
    if not data.dir and not data.sources:
        raise ConfigError("data.dir is empty: give the directory that `dla data shards` wrote, or data.sources")
    if not data.sources:
        if data.stages:
            raise ConfigError("data.stages is set, but there are no data.sources to mix: give them, or remove it")
        return
    for name, source in data.sources.items():
        if not source.dir:
            raise ConfigError(f"data.sources.{name}.dir is empty: give the directory that `dla data shards` wrote")
    weights = {"data.sources: weight": {name: source.weight for name, source in data.sources.items()}}
    for i, stage in enumerate(data.stages):
        key, before = f"data.stages[{i}]", data.stages[i - 1].from_tokens if i else 0
        if stage.from_tokens <= before:
            raise ConfigError(
                f"{key}.from_tokens = {stage.from_tokens}: must be above that of the stage before it, {before}"
            )
        if unknown := sorted(stage.weights.keys() - data.sources.keys()):
            raise ConfigError(f"{key}.weights has {unknown[0]!r}: data.sources has only {', '.join(data.sources)}")
        weights[f"{key}.weights"] = stage.weights
    for key, values in weights.items():
        if not any(values.values()):
            raise ConfigError(f"{key} = {values}: give at least one source a weight above 0")


def check_config(config: RunConfig, world_size: int) -> None:
    """Check everything in a pretraining config that needs neither files nor devices.

    Raises:
        ConfigError: the key, the value and the fix.
    """
    check_ranges(config)
    check_run_section(config.run)
    check_model(config.model)
    check_parallel(config.model, config.parallel, config.data.seq_len, world_size)
    data_parallel = world_size // config.parallel.model_parallel_size
    check_training(config.training, data_parallel)
    check_tau(config.tau, config.model, config.training)
    check_data(config.data, config.training.global_batch_size, data_parallel)
