"""What a run will need, estimated from its config: parameters, memory and traffic of each rank.

Parameter counts are exact. Memory and traffic are estimates from shapes: allocator, buckets and workspaces are not
included.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_dla.checkpoint.find import step_directories
from megatron_dla.config import (
    LETTERS,
    AdapterRunConfig,
    ModelSection,
    RunConfig,
    attention_head_dim,
    layer_letters,
)
from megatron_dla.model.counts import parameters_per_rank, recurrent_states
from megatron_dla.model.parameters import MIXER_PARAMETERS

CHUNK = 64  # tokens between two slot states of the torch path
# of the kernels (`kernels/dla/triton_launch.py`): bytes of an element -> tokens; blocks and bytes in memory at once
BLOCK, TILE, WINDOW_ROWS, WINDOW_BYTES = {2: 512, 4: 128}, {2: 64, 4: 32}, 64, 4 << 30


@dataclass(frozen=True)
class ResourcePlan:
    """Bytes are of one rank; traffic is what one rank sends in one optimizer step.

    Attributes:
        parameters: of one tensor-parallel rank, before ZeRO partitions them.
        memory: {what: bytes} on the device. host: bytes of offloaded optimizer state. traffic: {what: bytes}.
    """

    tensor: int
    context: int
    data: int
    parameters: int
    memory: dict[str, float]
    host: float
    traffic: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def make_plan(config: RunConfig, world_size: int, vocab_size: int, bf16: bool) -> ResourcePlan:
    """The plan of a config that `check_config` has accepted; `vocab_size` is the padded one."""
    tensor, context = config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    data = world_size // config.parallel.model_parallel_size
    parameters = parameters_per_rank(config.model, vocab_size, tensor)
    memory, host = _states(config, parameters, data * context, bf16)
    memory |= _activations(config, vocab_size, 2 if bf16 else 4)
    traffic = _traffic(config, parameters, data, 2 if bf16 else 4)
    return ResourcePlan(tensor, context, data, parameters, memory, host, traffic)


def checkpoint_bytes(config: RunConfig | AdapterRunConfig, parameters: int, bf16: bool) -> int:
    """Of one checkpoint with so many trained parameters."""
    optimizer = 12 if bf16 or config.training.zero_stage else 8  # as in `_states`
    return parameters * (optimizer + (2 if bf16 else 4))


def checkpoints_kept(config: RunConfig | AdapterRunConfig) -> int:
    """How many lie on the disk at most: those that are kept and the one being written."""
    training, kept = config.training, config.checkpoint
    last, every = training.steps, training.save_every
    saves = -(-last // every) if every else 1
    newest = training.keep_checkpoints or saves
    others = len(kept.permanent) + kept.keep_best + (last // kept.keep_every if kept.keep_every else 0)
    return min(newest + others, saves + len(kept.permanent)) + 1


def _states(config: RunConfig, parameters: int, replicas: int, bf16: bool) -> tuple[dict[str, float], float]:
    """Weights, gradients, optimizer; ZeRO partitions over data x context ranks."""
    stage, element = config.training.zero_stage, 2 if bf16 else 4
    cut = {name: replicas if stage >= least else 1 for name, least in (("weights", 3), ("grads", 2), ("optimizer", 1))}
    optimizer = parameters * (12 if bf16 or stage else 8) / cut["optimizer"]  # master weights and two moments, fp32
    offload = config.training.offload_optimizer
    memory = {
        "weights": parameters * element / cut["weights"],
        "gradients": parameters * 4 / cut["grads"] + (parameters * 2 if bf16 else 0),  # accumulated in fp32
        "optimizer": 0.0 if offload else optimizer,
    }
    return memory, optimizer if offload else 0.0


def mixer_widths(m: ModelSection, letter: str, tensor: int) -> tuple[int, int]:
    """Channels of a token after a recurrent mixer's projections on one tensor-parallel rank: (all, without the gate).

    Those without the gate go through the all-to-all of context parallelism.
    """
    table = MIXER_PARAMETERS[letter](m, tensor)
    widths = {name: n // tensor for name, n in table["in_proj.weight"].sections}
    width = sum(widths.values()) + (2 * m.key_dim if "qk_proj.weight" in table else 0)  # query, key of the one group
    return width, width - widths["gate"]


def _mixer_bytes(m: ModelSection, letter: str, tensor: int, selective: bool, element: int) -> float:
    """Kept for the backward pass by a layer's mixer for one token."""
    if LETTERS[letter].softmax:
        head = attention_head_dim(m)
        queries, keys = m.attention_heads * head // tensor, 2 * m.attention_groups * head // tensor
        return (2 * (queries + keys) + 2 * queries) * element  # also rotated; output and its projection's input
    projected, _ = mixer_widths(m, letter, tensor)
    inner, heads = m.num_heads * m.value_dim // tensor, m.num_heads // tensor
    if selective:
        return (projected + inner) * element
    fp32 = projected + heads * recurrent_states(m, letter)  # inputs of the recurrence
    return (projected + 2 * inner) * element + 4 * fp32


def _activations(config: RunConfig, vocab_size: int, element: int) -> dict[str, float]:
    """Kept for the backward pass of one micro-batch."""
    m, parallel, training = config.model, config.parallel, config.training
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    tokens, letters = training.micro_batch_size * config.data.seq_len / context, layer_letters(m)
    residual = m.hidden_size * element / (tensor if parallel.sequence_parallel else 1)
    mlp = 3 * m.ffn_hidden_size // tensor * element
    selective = training.recompute == "selective"
    blocks = 2 if m.ffn_hidden_size else 1
    layers = [2 * blocks * residual + mlp + _mixer_bytes(m, x, tensor, selective, element) for x in letters]
    kept = residual * m.num_layers + max(layers) if training.recompute == "full" else sum(layers)
    wide = 0 if training.device == "cuda" else 8  # the torch path keeps them, and their exponentials, in fp32
    return {
        "activations": tokens * kept,
        "logits": tokens * vocab_size / tensor * (element + wide),
        "slot states": _slot_states(config, element),
    }


def _slot_states(config: RunConfig, element: int) -> float:
    """Of one layer at a time with their gradients, as many as are in memory at once; and of all where they are kept."""
    m, parallel, training = config.model, config.parallel, config.training
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    heads = m.num_heads // tensor / (context if parallel.cp_scheme == "heads" else 1)
    tokens = training.micro_batch_size * config.data.seq_len / (context if parallel.cp_scheme == "chain" else 1)
    counts = [recurrent_states(m, letter) for letter in layer_letters(m)]
    state = heads * m.key_dim * m.value_dim
    if training.device != "cuda":
        return tokens / CHUNK * max(counts) * state * 4
    row, rows = max(counts) * state * element, tokens / BLOCK[element]
    window = min(rows * row, max(WINDOW_ROWS * row, WINDOW_BYTES))
    if not training.keep_states:
        return 2 * window
    deltas = [m.backbone == "gdn" and LETTERS[letter].states is not None for letter in layer_letters(m)]
    # of Gated DeltaNet also the inverses of tiles, in fp32, and the transitions of blocks
    delta = heads * (tokens * TILE[element] * 4 + rows * m.key_dim**2 * element)
    # recomputed layers keep theirs from the second forward pass on, one layer at a time
    every = sum if training.recompute == "none" else max
    return window + rows * every(counts) * state * element + every(deltas) * delta


def _traffic(config: RunConfig, parameters: int, data: int, element: int) -> dict[str, float]:
    m, parallel, training = config.model, config.parallel, config.training
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    letters, replicas = layer_letters(m), data * context
    micro_batches = training.global_batch_size // (training.micro_batch_size * data)
    tokens = training.micro_batch_size * config.data.seq_len / context
    passes = 3 if training.recompute == "full" else 2  # forward, backward, and forward again
    share = (tensor - 1) / tensor
    blocks = len(letters) * (2 if m.ffn_hidden_size else 1)  # mixers and MLPs
    traffic = {"tensor": micro_batches * passes * blocks * 2 * share * tokens * m.hidden_size * element}
    if context > 1:
        traffic["context"] = micro_batches * passes * context_bytes(config, element)
    moved = parameters * (replicas - 1) / replicas
    gradients = 1 if training.zero_stage < 2 else micro_batches  # stages 2 and 3 reduce every micro-batch
    gathers = {0: 1, 1: 1, 2: 1, 3: 2 * micro_batches}[training.zero_stage]
    traffic["data"] = moved * element * (gradients + gathers)
    return traffic


def context_bytes(config: RunConfig, element: int) -> float:
    """Sent by one rank in one forward pass of one micro-batch, over all layers."""
    return sum(_layer_context_bytes(config, letter, element) for letter in layer_letters(config.model))


def _layer_context_bytes(config: RunConfig, letter: str, element: int) -> float:
    m, parallel = config.model, config.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    batch = config.training.micro_batch_size
    tokens, share = batch * config.data.seq_len / context, (context - 1) / context
    if LETTERS[letter].softmax:
        units = 2 * m.attention_heads // tensor + 2 * max(m.attention_groups // tensor, context)
        return tokens * share * units * attention_head_dim(m) * element
    inner, groups = m.num_heads * m.value_dim // tensor, max(1, m.num_groups // tensor)
    if parallel.cp_scheme == "heads":
        repeated = max(groups, context) - groups  # groups that several ranks need
        moving = mixer_widths(m, letter, tensor)[1] + 2 * repeated * m.key_dim + inner
        return tokens * share * moving * element
    halo = (inner + 2 * groups * m.key_dim) * (m.conv_kernel - 1) * element
    states = m.num_heads // tensor * recurrent_states(m, letter) * m.key_dim * m.value_dim
    return batch * (states * 4 + halo)


def _size(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"


def render_disk(one: int, number: int, run_dir: Path) -> str:
    """A line about the disk of the run directory, and another one where so many checkpoints do not fit beside those
    that are there; free is what its nearest existing parent has."""
    there = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    free, more = shutil.disk_usage(there).free, max(1, number - len(step_directories(run_dir)))
    line = f"disk         about {_size(one)} a checkpoint, {_size(one * number)} for {number}; {_size(free)} free"
    return line if one * more <= free else f"{line}\nnote         the checkpoints do not fit on the disk of {there}"


def render(plan: ResourcePlan) -> str:
    """The lines that `--dry-run` prints."""
    lines = [f"a rank       {plan.parameters:,} parameters (tensor {plan.tensor})"]
    parts = ", ".join(f"{name} {_size(n)}" for name, n in plan.memory.items())
    lines.append(f"memory       about {_size(plan.total)} a rank: {parts}")
    if plan.host:
        lines.append(f"host memory  {_size(plan.host)} a rank: optimizer")
    parts = ", ".join(f"{name} {_size(n)}" for name, n in plan.traffic.items())
    lines.append(f"traffic      about {_size(sum(plan.traffic.values()))} sent by a rank each step: {parts}")
    return "\n".join(lines)
