"""`dla train` of a config with a `delta_mem` section: check everything a user can get wrong, then train the adapter."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_dla.adapters.files import Fingerprint, fingerprint
from megatron_dla.config import LETTERS, ModelSection, check_context_parallel, check_tensor_parallel
from megatron_dla.config.adapter import AdapterRunConfig
from megatron_dla.config.checks import attention_head_dim, layer_letters
from megatron_dla.data_prep.index import TOKENIZER_NAME, ShardIndex
from megatron_dla.errors import ConfigError, DataError
from megatron_dla.files import file_sha256
from megatron_dla.hf.backbones import BackboneInfo, BackboneWeights, read_backbone
from megatron_dla.training.control import RunControl
from megatron_dla.training.run import run_directory, write_command


def check_adapter_run(
    config: AdapterRunConfig, world_size: int, read: bool = True
) -> tuple[ModelSection, BackboneInfo, Fingerprint]:
    """Everything a start would trip over.

    Args:
        read: the episodes too, which takes a while where there are many; a rank does so anyway.

    Raises:
        UserError: one message with the key, the value and the fix.
    """
    if not config.backbone.dir:
        raise ConfigError("backbone.dir is not set: give the Hugging Face directory of the frozen model")
    _check_ranges(config)
    section, info = read_backbone(config.backbone.dir)
    BackboneWeights(config.backbone.dir, section, info.vocab_size)
    memory_layer_numbers(config, section)
    _check_layout(config, section, world_size)
    _check_batch(config, world_size)
    episodes = config.episodes
    if bool(episodes.train) == bool(episodes.documents):
        raise ConfigError("episodes.train and episodes.documents: set one of the two")
    for key in ("train", "valid"):
        path = getattr(episodes, key)
        if path and not Path(path).is_file():
            raise ConfigError(f"episodes.{key} = {path!r}: no such file")
    if config.training.eval_every and not episodes.valid:
        raise ConfigError("training.eval_every needs episodes.valid: give held-out episodes, or set it to 0")
    if episodes.documents:
        _check_documents(config)
    length = row_length(config)
    if length > info.max_length:
        raise ConfigError(
            f"a row of {length} tokens (episodes.row_length or write_length + read_length) is longer than the "
            f"backbone's {info.max_length}: shorten the segments"
        )
    if read:
        parallel = config.parallel
        make_batches(config)(0, world_size // (parallel.tensor_model_parallel_size * parallel.context_parallel_size))
    return section, info, fingerprint(config.backbone.dir)


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


def _check_documents(config: AdapterRunConfig) -> None:
    """The shards must hold this backbone's tokens."""
    index = ShardIndex.load(config.episodes.documents)
    path = Path(config.backbone.dir) / TOKENIZER_NAME
    if not path.is_file() or file_sha256(path) != index.tokenizer_sha256:
        raise DataError(
            f"vocabulary mismatch: episodes.documents = {config.episodes.documents!r} was not tokenised with the "
            f"tokenizer.model of {config.backbone.dir!r}: build the shards with that one"
        )


def memory_layer_numbers(config: AdapterRunConfig, section: ModelSection) -> list[int]:
    """Layers that will carry a memory, from 0.

    Raises:
        ConfigError: `delta_mem.layers_to_transform` names one that does not exist.
    """
    softmax = [i for i, letter in enumerate(layer_letters(section)) if LETTERS[letter].softmax]
    if wrong := sorted(set(config.delta_mem.layers_to_transform or ()) - set(softmax)):
        raise ConfigError(
            f"delta_mem.layers_to_transform: {wrong[0]} is no attention layer of the backbone; it has 0 to "
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
    multiple = parallel.context_parallel_size * (
        parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    )
    return -(-length // multiple) * multiple


def _check_layout(config: AdapterRunConfig, section: ModelSection, world_size: int) -> None:
    parallel, training = config.parallel, config.training
    length = row_length(config)
    check_tensor_parallel(section, parallel.tensor_model_parallel_size, parallel.sequence_parallel, length)
    check_context_parallel(section, parallel, length)
    if parallel.cp_scheme != "heads":
        raise ConfigError("parallel.cp_scheme = 'chain' is for DLA layers: use 'heads' under an adapter")
    if world_size % (parallel.tensor_model_parallel_size * parallel.context_parallel_size):
        raise ConfigError(
            f"{world_size} processes are not a multiple of parallel.tensor_model_parallel_size x "
            "parallel.context_parallel_size = "
            f"{parallel.tensor_model_parallel_size * parallel.context_parallel_size}"
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


def describe_adapter_run(config: AdapterRunConfig, section: ModelSection, info: BackboneInfo, world_size: int) -> str:
    """What a start would do."""
    layers = memory_layer_numbers(config, section)
    heads = section.attention_heads * attention_head_dim(section)
    trained = len(layers) * config.delta_mem.count_parameters(section.hidden_size, heads)
    parallel, training, memory = config.parallel, config.training, config.delta_mem
    data = world_size // (parallel.tensor_model_parallel_size * parallel.context_parallel_size)
    source = config.episodes.train or config.episodes.documents
    state = len(layers) * memory.num_states * memory.rank**2 * 4
    return "\n".join(
        [
            f"run          {Path(config.run.dir) / config.run.name}",
            f"backbone     {config.backbone.dir}: {info.architecture}, frozen",
            f"adapter      {trained:,} parameters in {len(layers)} layers, {memory.num_states} state(s) of "
            f"{memory.rank} x {memory.rank} each, writes by {memory.write}; {state:,} bytes of state a sequence",
            f"layout       {world_size} processes = tensor {parallel.tensor_model_parallel_size} x context "
            f"{parallel.context_parallel_size} x data {data}"
            f"{', sequence parallel' if parallel.sequence_parallel else ''}, ZeRO-{training.zero_stage}",
            f"episodes     {source}: write {config.episodes.write_length}, read {config.episodes.read_length}, rows of "
            f"{row_length(config)} tokens",
            f"length       {training.steps} steps of {training.global_batch_size} rows",
        ]
    )


def _device(config: AdapterRunConfig) -> tuple[str, bool]:
    device = config.training.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device = cuda, but torch finds no CUDA device here: use cpu or auto")
    precision = config.backbone.precision
    return device, precision == "bf16" or (precision == "auto" and device == "cuda")


def make_batches(config: AdapterRunConfig) -> Callable[[int, int], Any]:
    """(data rank, data size) -> the micro batches of that rank."""
    return partial(_batches, config)


def _batches(config: AdapterRunConfig, dp_rank: int, dp_size: int) -> Any:
    from megatron_dla.adapters.batches import DocumentBatches, EpisodeBatches
    from megatron_dla.data import TokenLoader

    training, episodes = config.training, config.episodes
    sizes: dict[str, Any] = {
        "global_batch_size": training.global_batch_size, "micro_batch_size": training.micro_batch_size,
    }  # fmt: skip
    if episodes.documents:
        loader = TokenLoader(
            episodes.documents, "train", seq_len=row_length(config), num_streams=episodes.num_streams,
            seed=config.run.seed, dp_rank=dp_rank, dp_size=dp_size, **sizes,
        )  # fmt: skip
        return DocumentBatches(loader)
    train, held_out = (_read(config, path) if path else [] for path in (episodes.train, episodes.valid))
    return EpisodeBatches(
        train, held_out, row_length=row_length(config), seed=config.run.seed, dp_rank=dp_rank, dp_size=dp_size, **sizes
    )


def _read(config: AdapterRunConfig, path: str) -> list[Any]:
    from megatron_dla.adapters.episodes import read_episodes
    from megatron_dla.adapters.load import load_tokenizer

    e = config.episodes
    return read_episodes(
        path, load_tokenizer(config.backbone.dir), write_length=e.write_length, read_length=e.read_length,
        recent_messages=e.recent_messages, numbered=config.delta_mem.write == "message",
    )  # fmt: skip


def train_adapter(config: AdapterRunConfig, *, dry_run: bool = False, world_size: int | None = None) -> int:
    """Check and train; returns the exit code. `world_size` defaults to torchrun's."""
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if dry_run:
        section, info, _ = check_adapter_run(config, world_size)
        print(describe_adapter_run(config, section, info, world_size))
        return 0
    control = RunControl(run_directory(config), int(os.environ.get("RANK", "0")))
    with control.recorded():
        return _train(config, world_size, control)


def _train(config: AdapterRunConfig, world_size: int, control: RunControl) -> int:
    section, info, base = check_adapter_run(config, world_size, read=False)
    device, bf16 = _device(config)
    control.run_dir.mkdir(parents=True, exist_ok=True)
    control.open_records()  # before anything that may hang
    from megatron_dla.parallel.groups import initialize_distributed, on_main
    from megatron_dla.training.adapter import AdapterTrainer

    initialize_distributed(device)
    is_main = control.rank == 0
    if on_main(lambda: control.already_done(config.training.steps)):
        if is_main:
            print(f"{control.run_dir} is done: raise training.steps = {config.training.steps} to go on", flush=True)
        return 0
    if is_main:
        print(describe_adapter_run(config, section, info, world_size), flush=True)
    trainer = AdapterTrainer(config, control.run_dir, device, bf16, make_batches(config), base, control)
    if is_main:
        write_command(config, control.run_dir, world_size)
    code = trainer.run()
    control.record_exit(code, f"stopped after the checkpoint of step {trainer.step}")
    return code
