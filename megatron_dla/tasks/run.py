"""`dla train`: check everything a user can get wrong, prepare the run directory, train."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megatron_dla.checkpoint.find import step_directories
from megatron_dla.checkpoint.integrity import find_faults, newest_whole
from megatron_dla.checkpoint.manager import check_same_model
from megatron_dla.config import AdapterRunConfig, RunConfig, dump_config
from megatron_dla.environment import environment_number, shown
from megatron_dla.errors import CheckpointError, ConfigError
from megatron_dla.metrics.trackers import check_packages
from megatron_dla.parallel.groups import FIX, launched_place
from megatron_dla.processes import end_with_parent, usable_cpus
from megatron_dla.tasks import make_task
from megatron_dla.training.control import RunControl
from megatron_dla.training.device import Device, resolve_device
from megatron_dla.training.plan import checkpoint_bytes, checkpoints_kept, render_disk
from megatron_dla.training.task import Task

PACKAGES = ("torch", "megatron-core", "deepspeed", "triton", "sentencepiece", "transformers", "numpy")
Config = RunConfig | AdapterRunConfig


def run_directory(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name


def check_run(config: Config, world_size: int) -> tuple[Task, Device]:
    """Check everything that could stop a run when it starts on this machine.

    Raises:
        UserError: one message with the key, the value and the fix.
    """
    task = make_task(config)
    device = resolve_device(config.training)
    task.check_config(world_size, device)
    task.check_data(world_size)
    check_packages(config.logging)
    _check_run_directory(task)
    return task, device


def _check_directory(run_dir: Path) -> None:
    """ConfigError where no start can make the run directory; who may write there is not known of another machine."""
    for path in (run_dir, *run_dir.parents):
        try:
            path.lstat()
            if path.is_dir():
                return
            reason = f"{str(path)!r} is not a directory"
        except (FileNotFoundError, NotADirectoryError):
            continue  # made by the start, or a file above it is found next
        except (OSError, ValueError) as error:  # a symlink loop, a name that is too long, a null character
            reason = getattr(error, "strerror", None) or str(error)
        where = f"run.dir = {shown(str(run_dir.parent))}, run.name = {shown(run_dir.name)}"
        raise ConfigError(f"{where}: the run directory cannot be made ({reason}): choose another run.dir or run.name")


def _check_run_directory(task: Task) -> None:
    """ConfigError, see `_check_directory`; CheckpointError where it holds checkpoints that this run cannot resume."""
    run_dir = run_directory(task.config)
    _check_directory(run_dir)
    if steps := step_directories(run_dir):
        if not task.config.training.resume:
            raise CheckpointError(
                f"{str(run_dir)!r} already holds checkpoints: choose another run.name, or training.resume=true"
            )
        fall_back = task.config.checkpoint.damaged == "fallback"
        newest, _ = newest_whole(steps, fall_back, partial(find_faults, content=False))  # the start reads it all
        if newest is not None:
            check_same_model(newest, task.layout())


def describe(task: Task, world_size: int, device: Device) -> str:
    """What a run would do, in a few lines."""
    config = task.config
    training, parallel = config.training, config.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    data = world_size // parallel.model_parallel_size
    accumulation = training.global_batch_size // (training.micro_batch_size * data)
    layout = f"tensor {tensor}{f' x context {context}' if context > 1 else ''} x data {data}"
    lines = {
        "run": run_directory(config),
        **task.describe(device),
        "layout": f"{world_size} processes = {layout}{', sequence parallel' if parallel.sequence_parallel else ''}, "
        f"ZeRO-{training.zero_stage}, {device}",
        "batch": f"{training.global_batch_size} rows of {task.seq_len} tokens, {accumulation} micro-batch(es) of "
        f"{training.micro_batch_size}",
        "length": f"{training.steps} steps, {training.steps * training.global_batch_size * task.seq_len:,} tokens",
    }
    if (warmup := config.optimizer.warmup_steps) >= training.steps:
        lines["note"] = (
            f"optimizer.warmup_steps = {warmup}: training.steps = {training.steps} end before the full learning rate"
        )
    one = checkpoint_bytes(config, task.trained_parameters, device.bf16)
    disk = render_disk(one, checkpoints_kept(config), run_directory(config))
    return "\n".join((*(f"{title:<12} {text}" for title, text in lines.items()), disk))


def checkpoint_gb(config: Config) -> float:
    """Planned size of a checkpoint, on the devices that the config names."""
    task, device = make_task(config), resolve_device(config.training, planned=True)
    return checkpoint_bytes(config, task.trained_parameters, device.bf16) / 1e9


def _crowding() -> str:
    """A line that says so where the ranks of this machine have more threads than it has CPUs."""
    ranks, threads, cpus = (
        environment_number("LOCAL_WORLD_SIZE", 1, FIX, least=1),
        torch.get_num_threads(),
        usable_cpus(),
    )
    if ranks * threads <= cpus:
        return ""
    return (
        f"\nnote         {ranks} ranks x {threads} threads share {cpus} CPUs, which can be several times slower: "
        f"set OMP_NUM_THREADS={max(1, cpus // ranks)}"
    )


def _plan(config: Config, world_size: int) -> int:
    """Print what a run would do and need; then raise what would stop it, if anything."""
    _check_directory(run_directory(config))  # whose disk the plan describes
    task = make_task(config)
    device = resolve_device(config.training, planned=True)
    task.check_config(world_size, device)
    print(describe(task, world_size, device))
    if text := task.plan(world_size, device):
        print(text)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("note         no CUDA device on this machine: the plan is for one that has them")
    sys.stdout.flush()
    task.check_data(world_size)
    check_packages(config.logging)
    _check_run_directory(task)
    return 0


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_state() -> str | None:
    """`git describe` of the checkout; None where the package is installed from a wheel or there is no git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return result.stdout.strip() or None if result.returncode == 0 else None


def _write_description(task: Task, run_dir: Path, world_size: int) -> None:
    """Write config.yaml (resolved), command.json and the task's own files."""
    dump_config(task.config, run_dir / "config.yaml")
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
    for path in task.files():
        (run_dir / path.name).write_bytes(path.read_bytes())


def replay_batch(config: Config, step: int | None) -> int:
    """`dla train --replay`: the recorded batch of `step` (None: the last) again; returns the exit code."""
    task, device = check_run(config, launched_place().world)
    from megatron_dla.parallel.groups import initialize_distributed
    from megatron_dla.training.replay import replay

    initialize_distributed(device.type)
    return replay(task, run_directory(config), device, step)


def train(config: Config, *, dry_run: bool = False, world_size: int | None = None) -> int:
    """Check and train, or only plan; returns the exit code. `world_size`, of a plan, defaults to torchrun's.

    Raises:
        UserError: one message with the key, the value and the fix.
    """
    if dry_run:
        return _plan(config, launched_place().world if world_size is None else world_size)
    place = launched_place()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # of torchrun or, by its process id, `dla run`
        end_with_parent(environment_number("DLA_LAUNCHED", os.getppid(), "unset it"))
    _check_directory(run_directory(config))  # also where errors are recorded
    control = RunControl(run_directory(config), place.rank)
    with control.recorded():
        return _train(config, place.world if world_size is None else world_size, control)


def _train(config: Config, world_size: int, control: RunControl) -> int:
    task, device = check_run(config, world_size)
    control.run_dir.mkdir(parents=True, exist_ok=True)
    control.open_records()  # before anything that may hang
    from megatron_dla.parallel.groups import initialize_distributed, on_main
    from megatron_dla.training.trainer import Trainer

    initialize_distributed(device.type)
    is_main = control.rank == 0
    if on_main(lambda: control.already_done(config.training.steps)):
        if is_main:
            steps = config.training.steps
            print(f"{control.run_dir} is done: raise training.steps = {steps} to train further", flush=True)
        return 0
    if is_main:
        print(describe(task, world_size, device) + _crowding(), flush=True)
    trainer = Trainer(task, control.run_dir, device, control)
    if is_main:
        # only now: where a resume is refused, the files of the older run stay as they are
        _write_description(task, control.run_dir, world_size)
    code = trainer.run()
    control.record_exit(code, f"stopped after the checkpoint of step {trainer.step}")
    return code
