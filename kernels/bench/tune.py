"""`dla bench kernels --tune`: tries the registered launch configurations and writes the fastest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common import tuned
from ..dla import decode_step, dla_attention, partition
from .inputs import TAU, Inputs, Problem, make_inputs
from .methods import first_line
from .report import write_json
from .sweep import Sweep

GAIN = 0.02  # a configuration replaces the default only if it is this much faster: less is noise
AGREEMENT = 0.01  # relative RMS against the default's results; a wrong configuration is off by far more


def operations(sweep: Sweep, p: Problem, x: Inputs) -> dict[str, Callable[[], list[Tensor]]]:
    """Operation -> a call that runs it and gives its results. The partition is fixed for all but the first."""
    rule: dict[str, Any] = {"tau": TAU, "capacity": p.capacity}
    with torch.no_grad():
        part = partition(x.k, x.v, x.g, x.beta, backend=sweep.backend, **rule)
        _, cache = dla_attention(*x.arguments(), backend=sweep.backend, return_cache=True, **rule)
        assert cache is not None
    one = x.rows(0, 1)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [dla_attention(*x.arguments(), partition=part, backend=sweep.backend, **rule)[0]]

    def backward() -> list[Tensor]:
        x.require_grad()
        out, _ = dla_attention(*x.arguments(), partition=part, backend=sweep.backend, **rule)
        grads = torch.autograd.grad(out, x.leaves(), x.dout)
        x.require_grad(False)
        return [out.detach(), *grads]

    def decide() -> list[Tensor]:
        return [partition(x.k, x.v, x.g, x.beta, backend=sweep.backend, **rule).start.float()]

    def decode() -> list[Tensor]:
        work = cache.clone()
        q, k, v, g, lam, beta = one.arguments()
        return [decode_step(q, k, v, g, lam, work, beta, **rule)[0]]

    return {"partition": decide, "forward": forward, "backward": backward, "decode": decode}


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest relative RMS difference; NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        d = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
        worst = max(worst, d if d == d else float("inf"))
    return worst


def tune_kernel(sweep: Sweep, kernel: str, call: Callable[[], list[Tensor]]) -> dict[str, Any]:
    """The fastest configuration of one kernel, every candidate checked numerically, with what was tried."""
    tunable = tuned.KERNELS[kernel]
    with tuned.forced(kernel, tunable.default):
        wanted = [x.clone() for x in call()]
        base = sweep.watch.measure(call).ms
    best, best_ms, refused = tunable.default, base, []
    for config in tunable.candidates:
        try:
            with tuned.forced(kernel, config):
                off = difference(call(), wanted)
                if off > AGREEMENT:
                    refused.append({"config": config, "reason": f"results differ by {off:.1e}"})
                    continue
                ms = sweep.watch.measure(call).ms
        except Exception as error:  # too much shared memory, a compiler error: not for this GPU
            refused.append({"config": config, "reason": first_line(error)})
            continue
        if ms < min(best_ms, (1 - GAIN) * base):
            best, best_ms = config, ms
    return {"config": best, "default_ms": base, "ms": best_ms, "refused": refused}


def tune(sweep: Sweep, facts: dict[str, Any]) -> int:
    """Sweep all registered kernels at every head dim and capacity, one after the other; write the GPU's file."""
    if not tuned.KERNELS:
        print(f"nothing to tune: no kernel of the backend {sweep.backend!r} registers launch configurations")
        return 1
    entries: list[dict[str, Any]] = []
    for backbone in sweep.backbones:
        for dim in sweep.dims:
            for capacity in sweep.capacities:
                p = Problem(backbone, max(sweep.lengths), dim, capacity, sweep.heads)
                x = make_inputs(p, sweep.seed, dtype=sweep.dtype, device=sweep.device)
                entries += _tune_shape(sweep, p, operations(sweep, p, x))
    path = tuned.tuned_path(tuned.gpu_slug(facts["gpu"]))
    before = json.loads(path.read_text())["entries"] if path.is_file() else []
    keys = {_key(e) for e in entries}
    kept = [e for e in before if _key(e) not in keys]
    write_json(path, {**facts, "tokens": max(sweep.lengths), "entries": sorted(kept + _merge(entries), key=_key)})
    tuned.reload()
    print(f"wrote {path}: {len(entries)} measured, {len(kept)} kept")
    return 0


def _tune_shape(sweep: Sweep, p: Problem, calls: dict[str, Callable[[], list[Tensor]]]) -> list[dict[str, Any]]:
    made = []
    with contextlib.ExitStack() as stack:  # a kernel keeps its winner while the next one is tuned
        for kernel, tunable in sorted(tuned.KERNELS.items()):
            found = tune_kernel(sweep, kernel, calls[tunable.operation])
            stack.enter_context(tuned.forced(kernel, found["config"]))
            shape = {"dtype": tuned.dtype_name(sweep.dtype), "dk": p.dim, "dv": p.dim, "capacity": p.capacity}
            made.append({"kernel": kernel, **shape, "backbone": p.backbone, **found})
            gain = found["default_ms"] / found["ms"]
            print(
                f"{p.backbone} D={p.dim} K={p.capacity} {kernel}: {found['config']} {gain:.2f}x the default", flush=True
            )
    return made


def _key(entry: dict[str, Any]) -> tuple:
    return tuple(entry[name] for name in ("kernel", "dtype", "dk", "dv", "capacity"))


def _merge(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a shape: where both backbones run a kernel, the one that gains more decides."""
    best: dict[tuple, dict[str, Any]] = {}
    for entry in entries:
        other = best.get(_key(entry))
        if other is None or entry["default_ms"] - entry["ms"] > other["default_ms"] - other["ms"]:
            best[_key(entry)] = entry
    return list(best.values())
