"""`dla train`: check everything a user can get wrong, prepare the run directory, train."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megatron_dla.checkpoint.manager import check_same_model, complete_checkpoints
from megatron_dla.checkpoint.weights import CheckpointLayout
from megatron_dla.config import (
    LETTERS,
    AdapterRunConfig,
    RunConfig,
    check_config,
    check_precision,
    dump_config,
    layer_letters,
)
from megatron_dla.data_prep.index import TOKENIZER_NAME, ShardIndex
from megatron_dla.data_prep.tokenizer import Tokenizer
from megatron_dla.errors import CheckpointError, ConfigError, DataError, UserError
from megatron_dla.kernels.dla import beyond_kernels, kernels_missing
from megatron_dla.model.counts import count_parameters, flops_per_token
from megatron_dla.model.gpt import padded_vocab
from megatron_dla.training.control import RunControl
from megatron_dla.training.plan import make_plan, render

PACKAGES = ("torch", "megatron-core", "deepspeed", "triton", "webdataset", "sentencepiece", "transformers", "numpy")
ASSUMED_VOCABULARY = 32_000  # the paper's, for plans made where there is no data


def resolve_device(config: RunConfig) -> tuple[str, bool]:
    """(device, bf16?) of a run.

    Raises:
        ConfigError: CUDA or bf16 is asked for where it is not there.
    """
    device = config.training.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "training.device = cuda, but torch finds no CUDA device here: use training.device=cpu or auto"
        )
    precision = config.training.precision
    bf16 = precision == "bf16" or (precision == "auto" and device == "cuda")
    return device, bf16


def run_directory(config: RunConfig | AdapterRunConfig) -> Path:
    return Path(config.run.dir) / config.run.name


def planned_device(config: RunConfig) -> tuple[str, bool]:
    """(device, bf16?) that a config asks for, whether this machine has it or not."""
    if config.training.device != "cuda" or torch.cuda.is_available():
        return resolve_device(config)
    return "cuda", config.training.precision != "fp32"


def check_run(config: RunConfig, world_size: int, device: tuple[str, bool] | None = None) -> ShardIndex:
    """Everything a start would trip over: config, device, shards, tokenizer, an older run in the same directory.

    Args:
        device: of `planned_device`, for a run on another machine.

    Raises:
        UserError: one message with the key, the value and the fix.
    """
    check_config(config, world_size)
    check_precision(config.training.zero_stage, (device or resolve_device(config))[1])
    index = ShardIndex.load(config.data.dir)
    tokenizer = Tokenizer(config.data.dir)
    if tokenizer.sha256 != index.tokenizer_sha256:
        raise DataError(
            f"vocabulary mismatch: {config.data.dir}/{TOKENIZER_NAME} ({tokenizer.sha256[:12]}) is not the tokenizer "
            f"that the shards were made with ({index.tokenizer_sha256[:12]}): build the shards again"
        )
    for shard in index.split("train") + (index.split("val") if config.training.eval_every else []):
        path = Path(config.data.dir) / shard.path
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            state = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
            raise DataError(f"shard {str(path)!r} {state}: copy it again, or rebuild with dla data shards --overwrite")
    shards = len(index.split("train"))
    if config.data.num_streams > shards:
        raise ConfigError(
            f"data.num_streams = {config.data.num_streams} is more than the {shards} train shards: use at most "
            f"{shards}, or build more shards (dla data shards --min-train-shards {config.data.num_streams})"
        )
    run_dir = run_directory(config)
    if found := complete_checkpoints(run_dir):
        if not config.training.resume:
            raise CheckpointError(
                f"{str(run_dir)!r} already holds checkpoints: choose another run.name, or training.resume=true"
            )
        vocab = padded_vocab(index.vocab_size, config.model.vocab_multiple)
        tensor = config.parallel.tensor_model_parallel_size
        layout = CheckpointLayout(config.model, vocab, index.tokenizer_sha256, tensor, config.data.seq_len, 0, {})
        check_same_model(found[-1][1], layout)
    return index


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_state() -> str | None:
    here = Path(__file__).resolve().parent
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return result.stdout.strip() or None if result.returncode == 0 else None


def describe_run(config: RunConfig, world_size: int) -> None:
    """Write config.yaml, command.json and the tokenizer: what the run is, beside what it does."""
    run_dir = run_directory(config)
    write_command(config, run_dir, world_size)
    (run_dir / TOKENIZER_NAME).write_bytes((Path(config.data.dir) / TOKENIZER_NAME).read_bytes())


def write_command(config: RunConfig | AdapterRunConfig, run_dir: Path, world_size: int) -> None:
    """config.yaml (resolved) and command.json of a run."""
    dump_config(config, run_dir / "config.yaml")
    command = {
        "argv": sys.argv,
        "world_size": world_size,
        "host": platform.node(),
        "cpu_count": os.cpu_count(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": versions(),
        "git": git_state(),
    }
    (run_dir / "command.json").write_text(json.dumps(command, indent=1))


def describe(config: RunConfig, index: ShardIndex | None, world_size: int) -> str:
    """What a start would do, in a few lines; without an index (no data here) of a vocabulary that is assumed."""
    training, tensor, context = (
        config.training,
        config.parallel.tensor_model_parallel_size,
        config.parallel.context_parallel_size,
    )
    data = world_size // (tensor * context)
    device, bf16 = planned_device(config)
    vocab = _vocabulary(config, index)
    tokens = training.steps * training.global_batch_size * config.data.seq_len
    held = index.totals("train").tokens if index else 0
    epochs = f"{tokens / held:.2f} epochs of {held:,}" if index else f"no data here, {vocab:,} vocabulary rows assumed"
    accumulation = training.global_batch_size // (training.micro_batch_size * data)
    return "\n".join(
        [
            f"run          {run_directory(config)}",
            f"model        {count_parameters(config.model, vocab):,} parameters, "
            f"{flops_per_token(config.model, vocab, config.data.seq_len):.3g} FLOP a token (forward and backward)",
            f"layout       {world_size} processes = tensor {tensor}"
            f"{f' x context {context}' if context > 1 else ''} x data {data}"
            f"{', sequence parallel' if config.parallel.sequence_parallel else ''}, ZeRO-{training.zero_stage}, "
            f"{device}, {'bf16' if bf16 else 'fp32'}",
            f"batch        {training.global_batch_size} rows of {config.data.seq_len} tokens, "
            f"{accumulation} micro-batch(es) of {training.micro_batch_size}",
            f"length       {training.steps} steps, {tokens:,} tokens = {epochs}",
        ]
    )


def kernel_warning(config: RunConfig, device: str, *, here: bool) -> str:
    """A line where a run on GPUs would do without the Triton kernels, which `backend="auto"` does silently ('' else).

    Args:
        here: the run starts on this machine, so its triton counts, too.
    """
    model = config.model
    if device != "cuda" or all(LETTERS[letter].softmax for letter in layer_letters(model)):
        return ""
    reason = beyond_kernels(model.key_dim, model.value_dim, model.capacity)
    reason = f"they do not take model.{reason}" if reason else kernels_missing() if here else ""
    return (
        f"warning      DLA layers will run on the slower torch path, not the Triton kernels: {reason}" if reason else ""
    )


def _vocabulary(config: RunConfig, index: ShardIndex | None) -> int:
    return padded_vocab(index.vocab_size if index else ASSUMED_VOCABULARY, config.model.vocab_multiple)


def plan_run(config: RunConfig, world_size: int) -> int:
    """Print what a run would do and need; then raise what its start would trip over, if anything."""
    device = planned_device(config)
    check_config(config, world_size)
    check_precision(config.training.zero_stage, device[1])
    try:
        index = ShardIndex.load(config.data.dir)
    except UserError:
        index = None
    print(describe(config, index, world_size))
    print(render(make_plan(config, world_size, _vocabulary(config, index), device[1])), flush=True)
    if text := kernel_warning(config, device[0], here=False):
        print(text)
    if device[0] == "cuda" and not torch.cuda.is_available():
        print("note         no CUDA device on this machine: the plan is for one that has them")
    check_run(config, world_size, device)
    return 0


def train(config: RunConfig, *, dry_run: bool = False, world_size: int | None = None) -> int:
    """Check and train; returns the exit code. `world_size` defaults to torchrun's."""
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if dry_run:
        return plan_run(config, world_size)
    control = RunControl(run_directory(config), int(os.environ.get("RANK", "0")))
    with control.recorded():
        return _train(config, world_size, control)


def _train(config: RunConfig, world_size: int, control: RunControl) -> int:
    index = check_run(config, world_size)
    device, bf16 = resolve_device(config)
    control.run_dir.mkdir(parents=True, exist_ok=True)
    control.open_records()  # before anything that may hang
    from megatron_dla.parallel.groups import initialize_distributed, on_main
    from megatron_dla.training.loop import Trainer

    initialize_distributed(device)
    is_main = control.rank == 0
    if on_main(lambda: control.already_done(config.training.steps)):
        if is_main:
            print(f"{control.run_dir} is done: raise training.steps = {config.training.steps} to go on", flush=True)
        return 0
    if is_main:
        print(describe(config, index, world_size), flush=True)
        if text := kernel_warning(config, device, here=True):
            print(text, flush=True)
    trainer = Trainer(config, control.run_dir, device, bf16, control)
    if is_main:
        describe_run(config, world_size)  # only now: a refused resume leaves an earlier run as it was
    code = trainer.run()
    control.record_exit(code, f"stopped after the checkpoint of step {trainer.step}")
    return code
