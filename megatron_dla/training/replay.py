"""Run a recorded batch again on the weights of the last checkpoint before it, and say where its numbers go wrong."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dla.checkpoint.find import step_directories
from megatron_dla.checkpoint.integrity import newest_whole, read_marker
from megatron_dla.checkpoint.manager import agreed_faults, check_same_model, load_weights
from megatron_dla.errors import DataError, UserError
from megatron_dla.files import parse_json
from megatron_dla.parallel.groups import initialize_model_parallel, process_groups
from megatron_dla.parallel.tags import get_tag
from megatron_dla.training.anomalies import RECORDS
from megatron_dla.training.device import Device
from megatron_dla.training.task import Runtime, Task


@dataclass
class Trace:
    """The first module, and the first parameter, whose output or gradient is not finite on this rank; "": none."""

    module: str = ""
    parameter: str = ""

    def watch(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            module.register_forward_hook(lambda _, inputs, out, name=name or "model": self._output(name, out))
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p, name=name: self._gradient(name, p))

    def _output(self, name: str, output: Any) -> None:
        if not self.module and not all(bool(x.isfinite().all()) for x in _tensors(output)):
            self.module = name

    def _gradient(self, name: str, parameter: Tensor) -> None:
        if not self.parameter and parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            self.parameter = name


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class PlainEngine:
    """What `train_step` needs of an engine, without an optimizer: gradients stay in the parameters."""

    def __init__(self, model: nn.Module, micro_batches: int) -> None:
        self.module, self.micro_batches = model, micro_batches

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        (loss / self.micro_batches).backward()

    def step(self) -> None:
        pass


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """DataError where a record is not what `Records` writes."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise DataError(f"{str(path)!r} is damaged ({error!r}): remove the line that is") from error


def find_record(run_dir: Path, step: int | None) -> dict[str, Any]:
    """The record of `step`, or the last one. Raises DataError where there is none."""
    path = run_dir / RECORDS
    with _naming(path):
        records = [_checked(parse_json(line)) for line in (path.read_bytes() if path.exists() else b"").splitlines()]
        found = [record for record in records if step is None or record["step"] == step]
        steps = ", ".join(str(record["step"]) for record in records[-8:])
    if not found:
        what = f"step {step}" if step is not None else "any step"
        raise DataError(
            f"{str(path)!r} has no record of {what} to replay: {f'use one of {steps}' if steps else 'none'}"
        )
    return found[-1]


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """Raises TypeError, KeyError or ValueError where `Records.write` did not write it."""
    types = {"step": int, "kind": str, "batch": int, "data": dict, "loss": float | None, "grad_norm": float | None}
    for name, kind in types.items():
        if not isinstance(record[name], kind):
            raise TypeError(f"{name} = {record[name]!r}")
    if record["step"] < 1:
        raise ValueError(f"step = {record['step']}")
    return record


def replay(task: Task, run_dir: Path, device: Device, step: int | None) -> int:
    """Print loss, gradient norms and what is not finite first (a collective); writes nothing. Returns the exit code."""
    record, config = find_record(run_dir, step), task.config
    parallel = config.parallel
    initialize_model_parallel(parallel.tensor_model_parallel_size, config.run.seed, parallel.context_parallel_size)
    groups = process_groups()
    runtime = Runtime(groups, device.current(), device.dtype)
    model = task.build(runtime)
    before = [path for path in step_directories(run_dir) if int(path.name.removeprefix("step_")) < record["step"]]
    newest, _ = newest_whole(before, True, agreed_faults)
    if newest is not None:
        check_same_model(newest, task.layout())
        load_weights(newest, model, groups.tp)
    with _naming(run_dir / RECORDS):
        task.load_state_dict(dict(record["data"]))
    training = config.training
    engine = PlainEngine(model, training.global_batch_size // (training.micro_batch_size * groups.dp.size()))
    trace = Trace()
    trace.watch(model)
    result = task.train_step(engine, record["step"] - 1, None)
    start = f"the weights of step {read_marker(newest)['step']}" if newest else "the initial weights"
    runtime.print(f"step {record['step']} ({record['kind']}), batch {record['batch']}, on {start}")
    runtime.print(f"loss {result.loss!r} (recorded: {_shown(record['loss'])})")
    norms = gradient_norms(model, groups)
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    runtime.print(f"gradient norm {total:.6g} (recorded: {_shown(record['grad_norm'])})")
    for name, norm in norms.items():
        runtime.print(f"  {name:<32} {norm:.6g}")
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (trace.module, trace.parameter))
    for what, number in (("output", 0), ("gradient", 1)):
        first = [f"{names[number]} (rank {rank})" for rank, names in enumerate(found) if names[number]]
        runtime.print(f"first {what} that is not finite: {', '.join(first) or 'none'}")
    return 0


def _shown(value: float | None) -> str:
    return "not finite" if value is None else repr(value)


@torch.no_grad()
def gradient_norms(model: nn.Module, groups: Any) -> dict[str, float]:
    """Of each layer, and of each other part, over all ranks (a collective)."""
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    for name, p in model.named_parameters():
        if p.requires_grad:
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(gradient, group=groups.dp_cp)
            square = (gradient.double() / groups.dp_cp.size()).square().sum()
            if get_tag(p).kind == "sharded":
                dist.all_reduce(square, group=groups.tp)
            layer = re.search(r"layers\.\d+", name)
            squares[layer[0] if layer else name.rsplit(".", 1)[0]] += square.cpu()
    return {name: square.sqrt().item() for name, square in squares.items()}
