"""What runs on the ranks of the training tests."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import unittest.mock
from pathlib import Path
from typing import Any

import torch

from megatron_dla import compat
from tests.support.workers import lay_out

compat.install()

from megatron_dla.checkpoint import manager  # noqa: E402
from megatron_dla.checkpoint.writer import Files  # noqa: E402
from megatron_dla.config import AdapterRunConfig, from_dict, load_config  # noqa: E402
from megatron_dla.config.load import fill, to_dict  # noqa: E402
from megatron_dla.data import TokenLoader  # noqa: E402
from megatron_dla.errors import FenceError  # noqa: E402
from megatron_dla.files import free_bytes  # noqa: E402
from megatron_dla.metrics.sinks import read_metrics  # noqa: E402
from megatron_dla.model.gpt import build_model, packed_sequence  # noqa: E402
from megatron_dla.tasks.run import check_run, run_directory  # noqa: E402
from megatron_dla.training.engine import parameter_groups  # noqa: E402
from megatron_dla.training.replay import replay  # noqa: E402
from megatron_dla.training.schedule import lr_factor  # noqa: E402
from megatron_dla.training.step import StepResult  # noqa: E402
from megatron_dla.training.trainer import Trainer  # noqa: E402

SUMS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")


def make_trainer(values: dict[str, Any]) -> Trainer:
    """The real trainer; the pool's groups are switched to the config's layout first."""
    config = fill(AdapterRunConfig, values) if "delta_mem" in values else from_dict(values)
    lay_out(config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size)
    task, device = check_run(config, torch.distributed.get_world_size())
    run_dir = run_directory(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(task, run_dir, device)


def train(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs to the end; returns the metrics."""
    trainer = make_trainer(values)
    assert trainer.run() == 0
    torch.distributed.barrier()
    return read_metrics(trainer.run_dir / "metrics.jsonl")


def train_file(directory: Path, path: str) -> list[dict[str, Any]]:
    """The same with a config file, from the directory that its paths start at."""
    with contextlib.chdir(directory):
        return train(to_dict(load_config(path)))


def plain_training(values: dict[str, Any]) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The same run without DeepSpeed, ZeRO or parallelism: torch's AdamW over whole batches.

    Returns losses, gradient norms and the final parameters.
    """
    config = from_dict(values)
    lay_out(1)
    index_vocab = TokenLoader(
        config.data.dir, "train", seq_len=config.data.seq_len, num_streams=config.data.num_streams,
        global_batch_size=config.training.global_batch_size, micro_batch_size=config.training.global_batch_size,
        seed=config.run.seed,
    )  # fmt: skip
    from megatron_dla.shard_index import ShardIndex

    model = build_model(
        config.model, config.parallel.__class__(), vocab_size=ShardIndex.load(config.data.dir).vocab_size,
        seq_len=config.data.seq_len, seed=config.run.seed,
    )  # fmt: skip
    o = config.optimizer
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: lr_factor(s, o, config.training.steps))
    losses, norms = [], []
    for _ in range(config.training.steps):
        (batch,) = index_vocab.next_step()
        packed = packed_sequence(batch.cu_seqlens, config.data.seq_len)
        token_losses = model(batch.tokens, None, None, labels=batch.labels, packed_seq_params=packed)
        loss = (token_losses * batch.loss_mask).sum() / batch.loss_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad).item())
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()}


def scalar_dtypes(values: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """After bf16 training: {parameter: (dtype, moved away from its start)} of one mixer's scalars."""
    trainer = make_trainer(values)
    mixer = trainer.task.mixers[0]
    before = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    assert trainer.run() == 0
    return {name: (str(p.dtype), not torch.equal(p, before[name])) for name, p in mixer.named_parameters()}


def summed_dtypes(values: dict[str, Any]) -> set[str]:
    """Dtypes that a run sends to be summed over ranks, single numbers left out."""
    found, real = set(), {name: getattr(torch.distributed, name) for name in SUMS}

    def traced(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.update(
                str(x.dtype) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.numel() > 8
            )
            return real[name](*args, **kwargs)

        return call

    trainer = make_trainer(values)
    try:
        for name in SUMS:
            setattr(torch.distributed, name, traced(name))
        assert trainer.run() == 0
    finally:
        for name, function in real.items():
            setattr(torch.distributed, name, function)
    return found


def anomalous(
    values: dict[str, Any], gradients: dict[int, int], losses: dict[int, tuple[int, float]]
) -> tuple[str, list[dict[str, Any]]]:
    """A run with wrong numbers in some steps; returns what it prints, its error included, and its metrics.

    Args:
        gradients: {step: rank whose gradient of one matrix is not a number}.
        losses: {step: (rank, factor on its losses)}.
    """
    trainer, rank = make_trainer(values), torch.distributed.get_rank()
    weight = next(p for name, p in trainer.engine.module.named_parameters() if name.endswith("proj.weight"))
    weight.register_hook(lambda g: g * float("nan") if gradients.get(trainer.step + 1) == rank else g)

    def scaled(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        where, factor = losses.get(trainer.step + 1, (-1, 1.0))
        return output * factor if where == rank and module.training else output

    trainer.engine.module.register_forward_hook(scaled)
    return printed_run(trainer)


def printed_run(trainer: Trainer) -> tuple[str, list[dict[str, Any]]]:
    """What a run prints, its FloatingPointError included, and its metrics."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            trainer.run()
        except FloatingPointError as error:
            print(error)
    torch.distributed.barrier()
    return printed.getvalue(), read_metrics(trainer.run_dir / "metrics.jsonl")


def spiky(values: dict[str, Any], batches: dict[int, float], left_out: set[int]) -> tuple[str, list[dict[str, Any]]]:
    """As `anomalous`; `batches`: {number in the data: factor on rank 0's losses}. left_out: from the start."""
    trainer = make_trainer(values)
    trainer.anomalies.left_out |= left_out

    def scaled(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        factor = batches.get(trainer.task.loader.steps - 1, 1.0)  # type: ignore[attr-defined]
        return output * factor if torch.distributed.get_rank() == 0 and module.training else output

    trainer.engine.module.register_forward_hook(scaled)
    return printed_run(trainer)


def replayed(values: dict[str, Any], step: int, broken: str) -> tuple[float, float, str]:
    """Loss, gradient norm and output of `--replay`. broken: end of the name of a module whose output is not finite."""
    config = from_dict(values)
    lay_out(config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size)
    task, device = check_run(config, torch.distributed.get_world_size())
    build = task.build

    def built(runtime: Any) -> Any:
        model = build(runtime)
        for name, module in model.named_modules():
            if broken and name.endswith(broken):
                module.register_forward_hook(lambda m, i, out: (out[0] * float("inf"), *out[1:]))
        return model

    task.build = built  # type: ignore[method-assign]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert replay(task, run_directory(config), device, step) == 0
    text = printed.getvalue()
    numbers = [float(x) for x in re.findall(r"^(?:loss|gradient norm) (\S+) ", text, re.MULTILINE)]
    return (*numbers, text) if numbers else (0.0, 0.0, text)  # type: ignore[return-value]


def without_updates(values: dict[str, Any], steps: set[int]) -> None:
    """A run that draws the rows of `steps` and moves its schedule on, and does nothing else there."""
    trainer = make_trainer(values)
    train_step = trainer.task.train_step

    def step(engine: Any, number: int, judge: Any) -> StepResult:
        if number + 1 not in steps:
            return train_step(engine, number, judge)
        trainer.task.next_batches()
        engine.lr_scheduler.step()
        return StepResult(1.0, 1.0, True)

    trainer.task.train_step = step  # type: ignore[method-assign]
    trainer.task.metrics = dict  # type: ignore[method-assign]
    assert trainer.run() == 0
    torch.distributed.barrier()


def on_a_full_disk(values: dict[str, Any], steps: list[int]) -> tuple[str, str, list[dict[str, Any]]]:
    """A run where the last rank's disk is full in the saves of `steps`: what it prints, its OSError, its metrics."""
    trainer, write, error = make_trainer(values), Files.write, ""

    def full(files: Files, directory: Path, *pace: Any) -> Any:
        records = write(files, directory, *pace)
        if int(directory.name.split(".")[0].removeprefix("step_")) in steps:
            raise OSError(errno.ENOSPC, "No space left on device", str(directory / next(iter(records))))
        return records

    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        Files.write = full  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            trainer.run()
    except OSError as caught:
        error = f"{caught.errno} {caught.filename} {caught.strerror}"
    finally:
        Files.write = write  # type: ignore[method-assign]
    torch.distributed.barrier()
    return printed.getvalue(), error, read_metrics(trainer.run_dir / "metrics.jsonl")


def on_small_disks(values: dict[str, Any], shares: dict[int, float]) -> tuple[str, list[str]]:
    """A run whose disk is filled before the saves of some steps, {step: share of a checkpoint that still fits}.

    A save in the background ends before its thread is known to the run, as it may where it fails at once.

    Returns what it prints, and the names of its checkpoints after each of these saves (waited for).
    """
    trainer, found = make_trainer(values), []
    save, filler, size = trainer._save, trainer.run_dir.parent / "filler", 0

    def on_a_full_disk(*args: Any, **options: Any) -> None:
        nonlocal size
        share = shares.get(trainer.step)
        if share is not None and torch.distributed.get_rank() == 0:
            fill_disk(filler, free_bytes(filler.parent) - int(share * size))
        torch.distributed.barrier()
        save(*args, **options)
        trainer.checkpoints.finish()
        steps = trainer.run_dir / "checkpoints"
        if share is not None:
            found.append(" ".join(sorted(path.name for path in steps.iterdir())))
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 0:
                filler.unlink()
        elif not size:
            size = sum(path.stat().st_size for path in (steps / f"step_{trainer.step}").rglob("*"))

    trainer._save = on_a_full_disk  # type: ignore[method-assign]
    start = manager.start_thread

    def ended(work: Any) -> Any:
        thread = start(work)
        thread.join()
        return thread

    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        unittest.mock.patch.object(manager, "start_thread", ended),
    ):
        assert trainer.run() == 0
    return printed.getvalue(), found


def fill_disk(path: Path, size: int) -> None:
    """A file of `size` bytes that takes them on the disk."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size))


def resumed_optimizer(values: dict[str, Any]) -> list[tuple[str, float, float]]:
    """After loading a checkpoint: (group, learning rate of the next step, weight decay)."""
    trainer = make_trainer(values)
    assert trainer.step > 0
    groups = trainer.engine.lr_scheduler.optimizer.param_groups
    return [(g["name"], g["lr"], g["weight_decay"]) for g in groups]


def resume_note(values: dict[str, Any]) -> str:
    """What the trainer prints when it finds a checkpoint."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert make_trainer(values).step > 0
    return printed.getvalue()


def disturbed(
    values: dict[str, Any], step: int, files: dict[str, str], blind: bool = False
) -> tuple[int | None, int, str]:
    """Trains; in `step` rank 0 writes files into the run directory. Returns (exit code, last step, FenceError).

    blind: what was written is not noticed before the moment that a checkpoint is published.
    """
    trainer = make_trainer(values)
    train_step = trainer._train_step
    if blind:
        trainer.control.check = lambda: None  # type: ignore[method-assign]

    def disturbed_step() -> StepResult | None:
        if trainer.step + 1 == step and torch.distributed.get_rank() == 0:
            for name, text in files.items():
                (trainer.run_dir / name).write_text(text)
            trainer.control._beaten = 0.0  # the next heartbeat is not left out
        return train_step()

    trainer._train_step = disturbed_step  # type: ignore[method-assign]
    try:
        return trainer.run(), trainer.step, ""
    except FenceError as error:
        return None, trainer.step, str(error)


def made_buffers(values: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Bytes of the host memory that was made after the first step, and what the saves asked for."""
    trainer = make_trainer(values)
    prepare, made, asked = trainer.checkpoints.prepare, [], []

    def prepared() -> None:
        prepare()
        assert trainer.checkpoints._preparing is not None
        trainer.checkpoints._preparing.join()
        made.extend(len(buffer._memory) for buffer in trainer.checkpoints._buffers.values())

    trainer.checkpoints.prepare = prepared
    for buffer in trainer.checkpoints._buffers.values():

        def room(like: Any, real: Any = buffer.room, sizes: Any = buffer.sizes) -> Any:
            asked.append(sum(sizes(like).values()))
            return real(like)

        buffer.room = room
    assert trainer.run() == 0
    return made, asked


def doings(values: dict[str, Any]) -> list[tuple[str, int]]:
    """What the run says that it does beside its steps."""
    trainer, found = make_trainer(values), []
    doing = trainer.control.doing

    def noted(what: str, step: int) -> Any:
        found.append((what, step))
        return doing(what, step)

    trainer.control.doing = noted
    assert trainer.run() == 0
    return found
