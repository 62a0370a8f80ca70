"""Checks of an adapter's config; every error names the key, its value and valid values."""

from __future__ import annotations

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.config.adapter import AdapterRunConfig, EpisodeSection
from megatron_dla.config.checks import (
    check_optimizer,
    check_parallel,
    check_run_section,
    check_training,
    layer_letters,
)
from megatron_dla.config.load import check_ranges
from megatron_dla.config.pattern import LETTERS
from megatron_dla.config.schema import ModelSection, TrainingSection
from megatron_dla.errors import ConfigError


def memory_layers(memory: DeltaMemConfig, backbone: ModelSection) -> list[int]:
    """Layers of the backbone that carry a memory, from 0.

    Raises:
        ConfigError: `delta_mem.layers_to_transform` has one that does not exist, or none at all.
    """
    softmax = [i for i, letter in enumerate(layer_letters(backbone)) if LETTERS[letter].softmax]
    chosen = memory.layers_to_transform
    if wrong := sorted(set(chosen or ()) - set(softmax)):
        raise ConfigError(
            f"delta_mem.layers_to_transform = {list(chosen or ())}: the backbone has no attention layer {wrong[0]}, "
            f"only 0 to {softmax[-1]}"
        )
    if not (layers := [i for i in softmax if memory.carries(i)]):
        raise ConfigError("delta_mem.layers_to_transform = []: no layer would carry a memory; leave it out")
    return layers


def row_length(config: AdapterRunConfig) -> int:
    """Tokens a row: as configured, or of one episode, rounded up to what sequence and context parallelism divide."""
    episodes, parallel = config.episodes, config.parallel
    length = episodes.row_length or episodes.write_length + episodes.read_length
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    multiple = parallel.context_parallel_size * shards
    return -(-length // multiple) * multiple


def check_episodes(episodes: EpisodeSection, training: TrainingSection) -> None:
    """Which data there is to train and validate on."""
    if bool(episodes.train) == bool(episodes.documents):
        raise ConfigError(
            f"episodes.train = {episodes.train!r}, episodes.documents = {episodes.documents!r}: set one of the two"
        )
    if training.eval_every and not episodes.valid:
        raise ConfigError(
            f"training.eval_every = {training.eval_every} needs episodes.valid: give held-out episodes, or set it to 0"
        )
    if training.eval_rows:
        raise ConfigError(
            f"training.eval_rows = {training.eval_rows}: an adapter is validated on all of episodes.valid, set it to 0"
        )


def check_adapter_config(config: AdapterRunConfig, backbone: ModelSection, world_size: int) -> None:
    """Check everything in an adapter's config that needs no files beyond the backbone's model section.

    Raises:
        ConfigError: the key, the value and the fix.
    """
    check_ranges(config)
    check_run_section(config.run)
    memory_layers(config.delta_mem, backbone)
    check_parallel(backbone, config.parallel, row_length(config), world_size)
    if config.parallel.cp_scheme != "heads":
        raise ConfigError("parallel.cp_scheme = 'chain' is for DLA layers: use 'heads' under an adapter")
    check_training(config.training, world_size // config.parallel.model_parallel_size)
    if config.training.zero_stage > 2:
        raise ConfigError(
            f"training.zero_stage = {config.training.zero_stage}: use 0, 1 or 2 (the adapter is a few MB)"
        )
    check_optimizer(config.optimizer, config.training.steps)
    check_episodes(config.episodes, config.training)
    if config.distillation.weight and config.episodes.documents:
        raise ConfigError(
            f"distillation.weight = {config.distillation.weight}: is for episodes.train, which may hold ordinary text; "
            "leave it out with episodes.documents"
        )
