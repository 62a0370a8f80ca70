"""Cross-checks of a config: every error names the key, the value and the values that would do."""

from __future__ import annotations

import math

from megatron_dla.config.pattern import LETTERS, describe_letters
from megatron_dla.config.schema import ModelSection, ParallelSection, RunConfig
from megatron_dla.errors import ConfigError

TP = "parallel.tensor_model_parallel_size"


def _divisors(n: int, at_most: int = 1024) -> str:
    return ", ".join(str(d) for d in range(1, min(n, at_most) + 1) if n % d == 0)


def _positive(section: object, name: str, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        if value <= 0:
            raise ConfigError(f"{name}.{key} = {value}: must be positive")


def layer_letters(model: ModelSection) -> str:
    """The pattern, repeated to one letter a layer."""
    return (model.pattern * math.ceil(model.num_layers / max(1, len(model.pattern))))[: model.num_layers]


def softmax_layers(model: ModelSection) -> int:
    """Number of layers with softmax attention, with or without rotary positions."""
    return sum(LETTERS[letter].softmax for letter in layer_letters(model))


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
    """Sizes that do not fit together, whatever the layout."""
    _positive(
        model, "model", "hidden_size", "num_layers", "num_heads", "num_groups", "key_dim", "value_dim", "conv_kernel",
        "ffn_hidden_size", "attention_heads", "attention_groups", "vocab_multiple", "norm_eps", "init_std",
        "rope_theta",
    )  # fmt: skip
    if not model.pattern or set(model.pattern) - LETTERS.keys():
        raise ConfigError(f"model.pattern = {model.pattern!r}: use the letters {describe_letters()}")
    if model.num_heads % model.num_groups:
        raise ConfigError(
            f"model.num_groups = {model.num_groups} does not divide model.num_heads = {model.num_heads}: "
            f"use one of {_divisors(model.num_heads)}"
        )
    if model.capacity < 2:
        raise ConfigError(f"model.capacity = {model.capacity}: a merge needs at least 2 slots")
    if not 0 <= model.tau <= 3:
        raise ConfigError(f"model.tau = {model.tau}: the information score lies in [0, 2] (paper: 0.6)")
    if model.tau_mode == "learned" and model.merge != "density":
        raise ConfigError("model.tau_mode = learned needs model.merge = density (the gradient follows that rule)")
    if softmax_layers(model):
        check_attention(model)
    if not 0 < model.dt_min <= model.dt_max or not 0 < model.a_min <= model.a_max:
        raise ConfigError("model.dt_min/dt_max and a_min/a_max must be positive ranges")


def check_attention(model: ModelSection) -> None:
    """Sizes and positions of the softmax layers."""
    if model.attention_heads % model.attention_groups:
        raise ConfigError(
            f"model.attention_groups = {model.attention_groups} does not divide "
            f"model.attention_heads = {model.attention_heads}: use one of {_divisors(model.attention_heads)}"
        )
    if model.attention_head_dim < 0:
        raise ConfigError(f"model.attention_head_dim = {model.attention_head_dim}: must not be negative")
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
    _positive(model, "model", "rope_factor", "rope_low_freq_factor", "rope_original_length")
    if model.rope_high_freq_factor <= model.rope_low_freq_factor:
        raise ConfigError(
            f"model.rope_high_freq_factor = {model.rope_high_freq_factor}: must be above "
            f"model.rope_low_freq_factor = {model.rope_low_freq_factor}"
        )


def check_tensor_parallel(model: ModelSection, tensor: int, sequence: bool, seq_len: int) -> None:
    """What the tensor-parallel size must divide."""
    if tensor < 1:
        raise ConfigError(f"{TP} = {tensor}: must be at least 1")
    sizes, groups = head_counts(model)
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
    """Whether a tensor-parallel size cuts every size, and every number of groups or several ranks share one."""
    return all(n % tensor == 0 for n in sizes.values()) and all(
        n % tensor == 0 or tensor % n == 0 for n in groups.values()
    )


def check_tau_gate(config: RunConfig) -> None:
    """The annealed soft gate's keys."""
    training = config.training
    if training.tau_gate == "annealed" and config.model.tau_mode != "learned":
        raise ConfigError("training.tau_gate = annealed needs model.tau_mode = learned (a fixed tau has no gradient)")
    if not 0 < training.tau_anneal_share < 1:
        raise ConfigError(
            f"training.tau_anneal_share = {training.tau_anneal_share}: must be between 0 and 1 (the end is hard)"
        )
    if not 0 < training.tau_temperature_end <= training.tau_temperature_start:
        raise ConfigError(
            f"training.tau_temperature_end = {training.tau_temperature_end}: must be positive and at most "
            f"tau_temperature_start = {training.tau_temperature_start}"
        )


def check_context_parallel(
    model: ModelSection, parallel: ParallelSection, seq_len: int, world_size: int | None = None
) -> None:
    """What the context-parallel size must divide; sizes that are named also divide `world_size` processes, if given."""
    size, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if size < 1:
        raise ConfigError(f"parallel.context_parallel_size = {size}: must be at least 1")
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
    """What handing the slot memory from rank to rank cannot do."""
    if model.tau_mode != "fixed":
        raise ConfigError(
            f"parallel.cp_scheme = chain with model.tau_mode = {model.tau_mode}: a threshold's gradient does not cross "
            "a memory that was handed on; use parallel.cp_scheme=heads or model.tau_mode=fixed"
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
    """What DeepSpeed cannot do in bf16 with scalars that stay fp32."""
    reasons = {
        0: "without ZeRO DeepSpeed neither keeps fp32 master weights nor accumulates fp32 gradients of a bf16 model",
        3: "DeepSpeed cuts all parameters up as one dtype, and the recurrence's scalars (A_log, ...) must stay fp32",
    }
    if bf16 and zero_stage in reasons:
        raise ConfigError(
            f"training.zero_stage = {zero_stage} in bf16: {reasons[zero_stage]}; use training.zero_stage 1 or 2 "
            "(or training.precision=fp32)"
        )


def check_config(config: RunConfig, world_size: int) -> None:
    """Everything that would make a real start fail, before anything is started or written.

    Raises:
        ConfigError: the key, the value and the fix.
    """
    if world_size < 1:
        raise ConfigError(f"{world_size} processes: a run needs at least 1 (--nproc 1)")
    name = config.run.name
    if not name or len(name) > 100 or name in (".", "..") or "/" in name:
        raise ConfigError(f"run.name = {name[:120]!r}: a directory name of 1 to 100 characters, without a slash")
    if not 0 <= config.run.seed < 2**31:
        raise ConfigError(f"run.seed = {config.run.seed}: must be in [0, 2^31)")
    training, optimizer, parallel = config.training, config.optimizer, config.parallel
    check_model(config.model)
    _positive(config.data, "data", "seq_len", "num_streams")
    check_tensor_parallel(
        config.model, parallel.tensor_model_parallel_size, parallel.sequence_parallel, config.data.seq_len
    )
    check_context_parallel(config.model, parallel, config.data.seq_len, world_size)
    ranks, name = parallel.tensor_model_parallel_size, TP
    if parallel.context_parallel_size > 1:
        ranks, name = (
            ranks * parallel.context_parallel_size,
            f"{TP} x parallel.context_parallel_size",
        )
    if world_size % ranks:
        raise ConfigError(
            f"{name} = {ranks} does not divide the {world_size} processes of this run: "
            f"start a multiple of {ranks} (dla run --nproc {ranks} ...)"
        )
    data_parallel = world_size // ranks
    _positive(training, "training", "steps", "global_batch_size", "micro_batch_size", "log_every")
    rows = training.micro_batch_size * data_parallel
    if training.global_batch_size % rows:
        raise ConfigError(
            f"training.global_batch_size = {training.global_batch_size} is not a multiple of micro_batch_size x "
            f"data-parallel size = {training.micro_batch_size} x {data_parallel} = {rows}: "
            f"use a multiple of {rows}, or another micro_batch_size"
        )
    if config.data.num_streams % data_parallel:
        raise ConfigError(
            f"data.num_streams = {config.data.num_streams} is not a multiple of the data-parallel size "
            f"{data_parallel}: use a multiple of {data_parallel}"
        )
    if training.global_batch_size % config.data.num_streams:
        raise ConfigError(
            f"training.global_batch_size = {training.global_batch_size} is not a multiple of "
            f"data.num_streams = {config.data.num_streams}: use one of {_divisors(training.global_batch_size)}"
        )
    if training.zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"training.zero_stage = {training.zero_stage}: must be 0, 1, 2 or 3")
    check_tau_gate(config)
    if training.offload_optimizer and training.zero_stage == 0:
        raise ConfigError(
            "training.offload_optimizer = true with training.zero_stage = 0: DeepSpeed offloads only an optimizer that "
            "ZeRO has cut up; use training.zero_stage 1, 2 or 3"
        )
    _positive(optimizer, "optimizer", "lr", "eps")
    if not 0 <= optimizer.min_lr_ratio <= 1:
        raise ConfigError(f"optimizer.min_lr_ratio = {optimizer.min_lr_ratio}: a share of lr, in [0, 1]")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, key) < 1:
            raise ConfigError(f"optimizer.{key} = {getattr(optimizer, key)}: must be in [0, 1)")
    for key in ("warmup_steps", "weight_decay", "clip_grad", "tau_lr_ratio"):
        if getattr(optimizer, key) < 0:
            raise ConfigError(f"optimizer.{key} = {getattr(optimizer, key)}: must not be negative")
    for key in ("eval_every", "eval_rows", "save_every", "keep_checkpoints"):
        if getattr(training, key) < 0:
            raise ConfigError(f"training.{key} = {getattr(training, key)}: must not be negative")
    if config.debug.check_replicas < 0:
        raise ConfigError(f"debug.check_replicas = {config.debug.check_replicas}: must not be negative")
    if not config.data.dir:
        raise ConfigError("data.dir is empty: name the directory that `dla data shards` wrote")
