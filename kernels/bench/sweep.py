"""The measurements of `dla bench kernels` on one device: every method at every shape, one record a measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..dla import Partition, SlotCache, decode_step, dla_attention, partition
from .account import Ceilings, Work, partition_bytes
from .inputs import TAU, Inputs, Problem, make_inputs, mean_live_slots
from .methods import Method, first_line, methods
from .timing import Stopwatch, Timing, peak_memory

Record = dict[str, Any]


@dataclass
class Sweep:
    """What to measure, on what.

    Attributes:
        limit_s: a method whose next length would take longer than this a call is left out from there on, and says so.
    """

    device: torch.device
    backend: str
    seed: int
    lengths: list[int]
    capacities: list[int]
    dims: list[int]
    backbones: list[str]
    heads: int
    ceilings: Ceilings
    watch: Stopwatch
    backward: bool = True
    limit_s: float = 20.0
    dtype: torch.dtype = torch.bfloat16
    records: list[Record] = field(default_factory=list)

    def shapes(self) -> Iterator[Problem]:
        for backbone in self.backbones:
            for dim in self.dims:
                for tokens in self.lengths:
                    for capacity in self.capacities:
                        yield Problem(backbone, tokens, dim, capacity, self.heads)


def run_sweep(sweep: Sweep, show: Callable[[Record, str], None]) -> list[Record]:
    """Measure every shape; `show(record, progress)` is called after each measurement."""
    shapes, begin = list(sweep.shapes()), time.monotonic()
    total = sum(p.tokens for p in shapes)
    done = 0
    history: dict[tuple, tuple[int, float]] = {}
    for n, problem in enumerate(shapes):
        spent = time.monotonic() - begin
        left = f"eta {_clock(spent / done * (total - done))}" if done else "eta ?"
        progress = f"[{n + 1}/{len(shapes)} {_clock(spent)} {left}]"
        for record in _measure_shape(sweep, problem, history):
            sweep.records.append(record)
            show(record, progress)
        done += problem.tokens
    return sweep.records


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _measure_shape(sweep: Sweep, p: Problem, history: dict[tuple, tuple[int, float]]) -> Iterator[Record]:
    base: Record = {"kind": "attention", **asdict(p)}
    try:
        inputs = make_inputs(p, sweep.seed, dtype=sweep.dtype, device=sweep.device)
    except torch.OutOfMemoryError as error:
        yield {**base, "method": "inputs", "error": first_line(error)}
        return
    facts: Record = {}
    for method in methods(sweep.backend):
        if p.backbone not in method.backbones:
            continue
        if not method.per_capacity and p.capacity != sweep.capacities[0]:
            continue  # it has no capacity: measured once a length
        if method.name == "sdpa" and p.backbone != sweep.backbones[0]:
            continue  # it does not depend on the backbone either
        key = (method.name, p.backbone, p.dim, p.capacity)
        record = {**base, "method": method.name}
        if not method.per_capacity:
            del record["capacity"]
        late = _too_long(history.get(key), p, sweep.limit_s)
        if late:
            yield {**record, "error": late}
            continue
        began = time.monotonic()
        if method.name == "dla":
            facts = _partition_record(sweep, p, inputs)
            record |= facts
        record |= _time_method(sweep, method, p, inputs, facts.get("live_slots", 1.0))
        if method.name == "dla" and "partition_ms" in record and "forward_ms" in record:
            record["partition_share"] = record["partition_ms"] / record["forward_ms"]
        slowest = max((record.get(name, 0.0) for name in ("forward_ms", "both_ms")), default=0.0)
        history[key] = (p.tokens, slowest / 1e3)
        record["wall_s"] = time.monotonic() - began
        yield record
        _release(sweep.device)


def _too_long(before: tuple[int, float] | None, p: Problem, limit_s: float) -> str | None:
    """A reason to leave a length out, from the time that the length before took (growing at least in proportion)."""
    if before is None or before[0] >= p.tokens:
        return None
    guess = before[1] * p.tokens / before[0]
    return f"left out: {guess:.0f} s a call at this rate (limit {limit_s:.0f} s)" if guess > limit_s else None


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _timing(record: Record, name: str, timing: Timing) -> None:
    record[f"{name}_ms"] = timing.ms
    record[f"{name}_spread_ms"] = [timing.low, timing.high]
    record[f"{name}_repeats"] = timing.repeats


def _partition_record(sweep: Sweep, p: Problem, x: Inputs) -> Record:
    """The partition pass alone, and what it found: boundary rate and slots in use."""

    found: Partition | None = None

    def decide() -> None:
        nonlocal found
        rule: dict[str, Any] = {"tau": TAU, "capacity": p.capacity, "backend": sweep.backend}
        found = partition(x.k, x.v, x.g, x.beta, **rule)

    record: Record = {}
    try:
        with torch.no_grad():
            _timing(record, "partition", sweep.watch.measure(decide))
            assert found is not None
            record["boundary_rate"] = float(found.start.float().mean())
            record["live_slots"] = mean_live_slots(found)
        record["partition_gbytes_s"] = partition_bytes(p, x.v.element_size()) / record["partition_ms"] / 1e6
    except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:
        record["error"] = f"partition: {first_line(error)}"
    return record


def _time_method(sweep: Sweep, method: Method, p: Problem, inputs: Inputs, live: float) -> Record:
    """Forward, forward and backward, memory, share of the floor; an error ends the row with its message."""
    record: Record = {}
    work = None if method.work is None else method.work(p, live, inputs.v.element_size())
    stage = "forward"
    try:
        call, _ = method.prepare(inputs.require_grad(False), p)
        with torch.no_grad():
            out = torch.empty(0)

            def forward() -> None:
                nonlocal out
                out = call()

            _timing(record, "forward", sweep.watch.measure(forward))
            if not bool(torch.isfinite(out).all()):
                return {"error": "forward: the output is not finite"}
            out = torch.empty(0)
            record["forward_peak_bytes"] = peak_memory(call, sweep.device)
        _shares(record, "forward", work, sweep.ceilings)
        if sweep.backward:
            stage = "backward"
            call, leaves = method.prepare(inputs.require_grad(), p)

            def both() -> None:
                torch.autograd.grad(call(), leaves, inputs.dout)

            _timing(record, "both", sweep.watch.measure(both))
            record["both_peak_bytes"] = peak_memory(both, sweep.device)
            _shares(record, "both", work, sweep.ceilings)
    except ImportError as error:
        record["error"] = f"left out: {first_line(error)}"
    except Exception as error:  # a baseline may refuse in any way it likes: that is a result, not our crash
        record["error"] = f"{stage}: {first_line(error)}"
    finally:
        inputs.require_grad(False)
    return record


def _shares(record: Record, name: str, work: Work | None, ceilings: Ceilings) -> None:
    if work is not None:
        flops, moved = (work.forward_flops, work.forward_bytes) if name == "forward" else (
            work.both_flops, work.both_bytes)  # fmt: skip
        record[f"{name}_floor_ms"] = ceilings.floor_ms(flops, moved)
        record[f"{name}_floor_share"] = record[f"{name}_floor_ms"] / record[f"{name}_ms"]


def run_decode(sweep: Sweep, contexts: Iterable[int], show: Callable[[Record, str], None], steps: int = 32) -> None:
    """ms a token and bytes of the cache after contexts of growing length (one sequence, read in segments)."""
    capacity, dim = sweep.capacities[-1], sweep.dims[-1]
    for backbone in sweep.backbones:
        base = Problem(backbone, steps, dim, capacity, sweep.heads)
        cache, read = None, 0
        for context in sorted(contexts):
            record: Record = {"kind": "decode", "method": "dla", **asdict(base), "context": context}
            del record["tokens"]
            try:
                cache, read = _read_context(sweep, base, cache, read, context)
                record |= _decode_times(sweep, base, cache)
            except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:
                record["error"] = first_line(error)
                cache, read = None, 0
            sweep.records.append(record)
            show(record, "[decode]")


@torch.no_grad()
def _read_context(
    sweep: Sweep, base: Problem, cache: SlotCache | None, read: int, context: int, segment: int = 1 << 15
):
    while read < context:
        tokens = min(segment, context - read)
        p = Problem(base.backbone, tokens, base.dim, base.capacity, base.heads)
        x = make_inputs(p, sweep.seed + read, dtype=sweep.dtype, device=sweep.device)
        rule: dict[str, Any] = {"tau": TAU, "capacity": base.capacity, "backend": sweep.backend}
        _, cache = dla_attention(*x.arguments(), cache=cache, return_cache=True, **rule)
        read += tokens
    assert cache is not None
    return cache, read


@torch.no_grad()
def _decode_times(sweep: Sweep, base: Problem, before: SlotCache) -> Record:
    """Steps on a copy of the cache: the context stays what the record says."""
    x = make_inputs(base, sweep.seed, dtype=sweep.dtype, device=sweep.device)
    tokens = [x.rows(t, t + 1) for t in range(base.tokens)]
    cache = before.clone()

    def steps() -> None:
        for y in tokens:
            q, k, v, g, lam, beta = y.arguments()
            decode_step(q, k, v, g, lam, cache, beta, tau=TAU, capacity=base.capacity)

    timing = sweep.watch.measure(steps)
    n = base.tokens
    one = Timing(timing.ms / n, timing.low / n, timing.high / n, timing.repeats)
    record: Record = {"cache_bytes": cache.nbytes, "live_slots": float(before.live.double().mean())}
    _timing(record, "token", one)
    moved = 2 * cache.states.nbytes  # every state is read and written once a token
    record["token_floor_ms"] = sweep.ceilings.floor_ms(0.0, moved)
    record["token_floor_share"] = record["token_floor_ms"] / one.ms
    return record
