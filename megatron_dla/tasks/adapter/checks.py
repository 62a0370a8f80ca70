"""Checks of an adapter run's config against its backbone, without the data."""

from __future__ import annotations

from megatron_dla.config import LETTERS, AdapterRunConfig, ModelSection, check_context_parallel, check_tensor_parallel
from megatron_dla.config.checks import layer_letters
from megatron_dla.errors import ConfigError


def check_adapter_config(config: AdapterRunConfig, section: ModelSection, world_size: int) -> None:
    """Check everything but the data.

    Args:
        section: of the backbone.

    Raises:
        ConfigError: the key, the value and the fix.
    """
    _check_ranges(config)
    memory_layer_numbers(config, section)
    _check_layout(config, section, world_size)
    _check_batch(config, world_size)
    episodes = config.episodes
    if bool(episodes.train) == bool(episodes.documents):
        raise ConfigError("episodes.train and episodes.documents: set one of the two")
    if config.training.eval_every and not episodes.valid:
        raise ConfigError("training.eval_every needs episodes.valid: give held-out episodes, or set it to 0")


def _check_ranges(config: AdapterRunConfig) -> None:
    least = {
        "episodes": {"num_streams": 1, "write_length": 2, "read_length": 2, "recent_messages": 1, "row_length": 0},
        "training": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1, "gate_weight": 0, "log_every": 1,
                     "eval_every": 0, "save_every": 0, "keep_checkpoints": 0},
        "optimizer": {"warmup_steps": 0, "lr": 0, "weight_decay": 0, "clip_grad": 0},
    }  # fmt: skip
    for section, keys in least.items():
        for key, low in keys.items():
            if (value := getattr(getattr(config, section), key)) < low:
                raise ConfigError(f"{section}.{key} = {value}: must be at least {low}")
    steps, warmup = config.training.steps, config.optimizer.warmup_steps
    if warmup >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps = {warmup} leaves no step of training.steps = {steps} at the full learning rate: "
            f"use about {max(0, steps // 10)}"
        )
    if not 0 <= config.training.gate_target <= 1:
        raise ConfigError(f"training.gate_target = {config.training.gate_target}: want a mean gate, in [0, 1]")


def memory_layer_numbers(config: AdapterRunConfig, section: ModelSection) -> list[int]:
    """Layers that will carry a memory, from 0.

    Raises:
        ConfigError: `delta_mem.layers_to_transform` names one that does not exist.
    """
    softmax = [i for i, letter in enumerate(layer_letters(section)) if LETTERS[letter].softmax]
    if wrong := sorted(set(config.delta_mem.layers_to_transform or ()) - set(softmax)):
        raise ConfigError(
            f"delta_mem.layers_to_transform: {wrong[0]} is not an attention layer of the backbone, which has 0 to "
            f"{softmax[-1]}"
        )
    if not (chosen := [i for i in softmax if config.delta_mem.carries(i)]):
        raise ConfigError(
            f"delta_mem.layers_to_transform = {config.delta_mem.layers_to_transform}: no layer would carry a memory; "
            "leave it out"
        )
    return chosen


def row_length(config: AdapterRunConfig) -> int:
    """Tokens of a row: as asked for, or of one episode, rounded up for the sequence- and context-parallel cuts."""
    episodes, parallel = config.episodes, config.parallel
    length = episodes.row_length or episodes.write_length + episodes.read_length
    tensor = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    multiple = parallel.context_parallel_size * tensor
    return -(-length // multiple) * multiple


def _check_layout(config: AdapterRunConfig, section: ModelSection, world_size: int) -> None:
    parallel, training = config.parallel, config.training
    length = row_length(config)
    check_tensor_parallel(section, parallel.tensor_model_parallel_size, parallel.sequence_parallel, length)
    check_context_parallel(section, parallel, length)
    if parallel.cp_scheme != "heads":
        raise ConfigError("parallel.cp_scheme = 'chain' is for DLA layers: use 'heads' under an adapter")
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    if world_size < 1 or world_size % ranks:
        raise ConfigError(
            f"{world_size} processes: want a multiple of parallel.tensor_model_parallel_size x "
            f"parallel.context_parallel_size = {ranks}, at least 1"
        )
    if training.zero_stage not in (0, 1, 2):
        raise ConfigError(f"training.zero_stage = {training.zero_stage}: use 0, 1 or 2 (the adapter is a few MB)")
    if training.offload_optimizer and not training.zero_stage:
        raise ConfigError("training.offload_optimizer needs training.zero_stage 1 or 2")


def _check_batch(config: AdapterRunConfig, world_size: int) -> None:
    training, parallel = config.training, config.parallel
    data = world_size // (parallel.tensor_model_parallel_size * parallel.context_parallel_size)
    unit = training.micro_batch_size * data
    if training.steps < 1 or training.micro_batch_size < 1 or training.global_batch_size % unit:
        raise ConfigError(
            f"training.global_batch_size = {training.global_batch_size} is not a multiple of micro_batch_size x data "
            f"ranks = {training.micro_batch_size} x {data}: use a multiple of {unit} (steps at least 1)"
        )
