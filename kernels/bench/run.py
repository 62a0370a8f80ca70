"""One run of `dla bench kernels`: checks the request, measures, prints, writes."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch

from megatron_dla.errors import UserError

from ..common.tuned import gpu_slug
from . import report, targets
from .account import measure_ceilings
from .methods import usable_backend
from .sweep import Record, Sweep, run_decode, run_sweep
from .timing import Stopwatch, seconds

LENGTHS = {"cuda": [2048 << i for i in range(7)], "cpu": [2048, 4096, 8192, 16384]}
CONTEXTS = {"cuda": [1 << n for n in (10, 12, 14, 16, 18, 20)], "cpu": [1 << n for n in (10, 12, 14)]}
DEFAULTS = {
    "cuda": {"capacities": [15, 30], "dims": [64, 128], "heads": 16, "budget": 0.5},
    "cpu": {"capacities": [30], "dims": [64], "heads": 16, "budget": 1.5},
}


def resolve_device(asked: str | None, option: str = "--device") -> torch.device:
    """The device to measure on. Raises UserError where CUDA is asked for and absent."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{option} cuda: no CUDA device on this machine: use {option} cpu")
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def device_memory(device: torch.device) -> int:
    """Bytes of memory that it has, or this machine, where it is a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_seed(seed: int) -> None:
    """Raises UserError for `--seed`."""
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed {seed}: want a number in [0, 2^31)")


def _numbers(args: argparse.Namespace, name: str, default: Any, least: int) -> Any:
    value = getattr(args, name)
    value = default if value is None else value
    for x in value if isinstance(value, list) else [value]:
        if x < least:
            raise UserError(f"--{name} {x}: want at least {least}")
    return sorted(set(value)) if isinstance(value, list) else value


def request(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What is asked for, with this device's defaults: fields of `Sweep`, and `budget_s`. Raises UserError."""
    default: dict[str, Any] = DEFAULTS[device.type]
    budget = seconds(default["budget"] if args.budget is None else args.budget)
    check_seed(args.seed)
    asked = {
        "lengths": _numbers(args, "lengths", LENGTHS[device.type], 2),
        "capacities": _numbers(args, "capacities", default["capacities"], 2),
        "dims": _numbers(args, "dims", default["dims"], 1),
        "heads": _numbers(args, "heads", default["heads"], 1),
        "seed": args.seed,
        "backbones": args.backbones,
        "budget_s": budget,
    }
    _check_size(asked, device)
    return asked


def _check_size(asked: dict[str, Any], device: torch.device) -> None:
    """UserError where the largest problem's inputs (q, k, v, dout and the slots' weights) fill the memory."""
    largest = {name: max(asked[name]) for name in ("lengths", "dims", "capacities")} | {"heads": asked["heads"]}
    wide = largest["heads"] * (4 * largest["dims"] * (2 if device.type == "cuda" else 4) + 4 * largest["capacities"])
    if largest["lengths"] * wide > (total := device_memory(device)):
        options = " ".join(f"--{name} {value}" for name, value in largest.items())
        raise UserError(
            f"{options}: the inputs alone take {largest['lengths'] * wide / 1e9:.4g} GB of {total / 1e9:.4g} GB of "
            "memory: lower them"
        )


def make_sweep(asked: dict[str, Any], device: torch.device, backend: str) -> Sweep:
    """The sweep of a `request`, ceilings measured."""
    cuda = device.type == "cuda"
    watch = Stopwatch(device, budget_s=asked.pop("budget_s"), least=3 if cuda else 2)
    return Sweep(
        device=device, backend=backend, watch=watch, ceilings=measure_ceilings(watch), backward=cuda,
        dtype=torch.bfloat16 if cuda else torch.float32, limit_s=20.0 if cuda else 60.0, **asked,
    )  # fmt: skip


def bench_kernels(args: argparse.Namespace) -> int:
    """Exit code 0, or 1 where a CPU target is missed. Raises UserError for a request that cannot be measured."""
    if args.tune and (args.device == "cpu" or not torch.cuda.is_available()):
        raise UserError(
            f"--tune --device {args.device or 'cpu'}: launch configurations are measured on a CUDA device only"
        )
    device = resolve_device(args.device)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {str(args.out)!r} is a file: give a directory")
    asked = request(args, device)
    if not args.tune:
        args.out.mkdir(parents=True, exist_ok=True)  # before minutes are spent: it may not be possible
    if device.type == "cpu":
        torch.set_num_threads(1)  # see Stopwatch
    backend, words = usable_backend(device)
    facts = report.environment(device)
    name = facts.get("gpu") or f"{facts['machine']}, {facts['threads']} threads"
    print(f"{name} | torch {facts['torch']} triton {facts['triton']} fla {facts['fla']} | DLA backend: {words}")
    sweep = make_sweep(asked, device, backend)
    print(f"measured here: {sweep.ceilings.tflops:.3g} TFLOP/s matrix product, {sweep.ceilings.tbytes:.3g} TB/s copy")
    if args.tune:
        from .tune import tune

        return tune(sweep, facts)
    return _measure(args, sweep, facts, name)


def _measure(args: argparse.Namespace, sweep: Sweep, facts: dict[str, Any], name: str) -> int:
    begin, device = time.monotonic(), sweep.device
    stem = f"{'decode' if args.decode_only else 'kernels'}_{gpu_slug(facts['gpu']) if device.type == 'cuda' else 'cpu'}"
    partial = args.out / f"{stem}.partial.json"  # what is left of a run that was stopped
    verdicts: list[tuple[bool, str]] = []

    def results() -> dict[str, Any]:
        return facts | {
            "wall_s": round(time.monotonic() - begin, 1),
            "config": {
                "backend": sweep.backend, "seed": sweep.seed, "lengths": sweep.lengths, "capacities": sweep.capacities,
                "dims": sweep.dims, "heads": sweep.heads, "backbones": sweep.backbones, "dtype": str(sweep.dtype),
            },
            "ceilings": sweep.ceilings.as_dict(), "targets": [{"passed": p, "text": t} for p, t in verdicts],
            "records": sweep.records,
        }  # fmt: skip

    def show(record: Record, progress: str) -> None:
        text = targets.recurrence_line(record) if record["kind"] == "recurrence" else report.table_line(record)
        print(f"{text}  {progress}", flush=True)
        report.write_json(partial, results())

    print(report.header())
    if not args.decode_only:
        run_sweep(sweep, show)
    contexts = [c for c in CONTEXTS[device.type] if args.decode_only or c <= 8 * max(sweep.lengths)]
    run_decode(sweep, contexts, show)
    if device.type == "cpu" and not args.decode_only:
        targets.look_again(sweep)
        sweep.records += targets.recurrence_records(sweep, show)
        verdicts = targets.check_targets(sweep.records, sweep.lengths)
    for passed, text in verdicts:
        print(f"{'PASS' if passed else 'FAIL'} {text}")
    path = report.write_json(args.out / f"{stem}.json", results())
    partial.unlink(missing_ok=True)
    print(f"wrote {path} ({time.monotonic() - begin:.0f} s)")
    title = f"{name}, torch {facts['torch']}, {facts['date'][:10]}, H = {sweep.heads}, B = 1"
    if args.decode_only:
        return 0
    plot = report.draw(args.out / f"{stem}.png", sweep.records, title)
    print(f"wrote {plot}" if plot else "plot left out: matplotlib is not installed")
    return 0 if all(passed for passed, _ in verdicts) else 1
