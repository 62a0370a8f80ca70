"""The predicted time of a launch and of a torch operation on a GPU; see `constants.py` for what it is made of.

A launch takes the longest of: its HBM traffic, its L2 traffic, and the busiest processor. A processor runs its share of
the programs as many at a time as registers and shared memory allow; it takes the longest of their matrix products,
arithmetic, special functions and L1 traffic, and of the time that programs alone take one round after another.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_dla.gpus import Gpu

from .constants import (
    BOUNDARY_EVERY,
    BYTES_A_CLOCK,
    FULL,
    LAUNCH,
    MATRIX_SHARE,
    MEMORY_SHARE,
    MERGED_FROM_BEFORE,
    PARTLY,
    STOPS_AFTER,
    SYNC,
    TILES_OF_A_SLOT,
    Assumptions,
    Latencies,
)  # fmt: skip
from .record import Event, Launch, known_values, nbytes
from .ttir import Function, mark_pipelined, parse
from .walk import Cost, Pointer, Walk

PROGRAMS = 48  # of a grid that are walked; all of a grid that has no more
OVER_SEGMENTS = ("capacity_kernel",)  # kernels with a loop over the boundaries of a segment, not of a tile
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of a processor: CUDA C programming guide, compute capability 8.0 - 10.0


@dataclass(frozen=True)
class Predicted:
    """Of one launch: seconds, and what they come from.

    Attributes:
        flops: matrix products of the whole grid. memory: bytes from and to HBM. waves: rounds of programs over the GPU.
        limit: what takes the time ("memory", "cache", "work", "latency").
    """

    seconds: float
    flops: float
    memory: float
    waves: float
    resident: int
    steps: float
    clock: float
    assumed: float
    limit: str


_parsed: dict[str, Function] = {}
_costs: dict[Any, Cost] = {}


def _function(launch: Launch) -> Function:
    key = launch.compiled.hash
    if key not in _parsed:
        _parsed[key] = parse(launch.compiled.asm["ttir"])
        mark_pipelined(_parsed[key], launch.compiled.asm["ttgir"])
    return _parsed[key]


def _sampled(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Programs spread over the grid; steps of the golden ratio, so that no period of the grid is met."""
    total = math.prod(grid)
    picked = (
        range(total) if total <= PROGRAMS else [int(total * ((i + 0.5) * 0.6180339887 % 1)) for i in range(PROGRAMS)]
    )
    return [(i % grid[0], i // grid[0] % grid[1], i // (grid[0] * grid[1])) for i in picked]


def assumptions_of(launch: Launch) -> Assumptions:
    """How long loops are whose length the data decides: by the boundaries of a tile of tokens."""
    tokens = next((launch.arguments[name] for name in ("BT", "TILE", "BLOCK") if name in launch.arguments), 64)
    if launch.kernel.__name__ in OVER_SEGMENTS:
        tokens = launch.arguments["T"] // launch.grid[0]
    stop = STOPS_AFTER.get(launch.kernel.__name__)
    rounds, opened, merged = 1 + tokens / BOUNDARY_EVERY, 0, 0
    if {"moves", "T"} <= launch.arguments.keys():
        block = launch.arguments["T"] / len(launch.arguments["blocks"])
        opened = round(block / BOUNDARY_EVERY)
        nearest = min(MERGED_FROM_BEFORE, key=lambda size: abs(size - block))
        merged = round(block / BOUNDARY_EVERY * MERGED_FROM_BEFORE[nearest])
    first_rows, first_blocks = _beginnings(launch)
    if launch.kernel.__name__ in TILES_OF_A_SLOT:  # lengths with that mean, without memory
        rounds = 1 / -math.expm1(-tokens / BOUNDARY_EVERY)
    held, past = None, None
    if (near := launch.arguments.get("NEAR")) is not None:  # chunks without a boundary, if lengths have no memory
        passed = math.exp(-tokens / BOUNDARY_EVERY)
        held, past = passed**near, (1 - passed**near) / (1 - passed)
    return Assumptions(
        rounds=rounds,
        until=None if stop is None else 1 + stop * BOUNDARY_EVERY / tokens,
        equal=launch.kernel.__name__ in FULL,
        opened=opened,
        merged=merged,
        partly=PARTLY.get(launch.kernel.__name__, ()),
        held=held,
        past=past,
        first_rows=first_rows,
        first_blocks=first_blocks,
    )


def _beginnings(launch: Launch) -> tuple[frozenset[int], frozenset[int]]:
    """Rows and blocks that documents begin with, for kernels over blocks of documents."""
    table = known_values(launch.arguments["blocks"]) if "blocks" in launch.arguments else None
    if table is None:
        return frozenset(), frozenset()
    rows, last = table[:, 2].tolist(), table[:, 3].tolist()  # see `BlockLayout`
    first = [b for b in range(len(rows)) if b == 0 or last[b - 1]]
    return frozenset(rows[b] for b in first), frozenset(first)


def cost_of(launch: Launch, gpu: Gpu, latency: Latencies) -> Cost:
    """The average program of a launch."""
    function, given = _function(launch), launch.arguments
    numbers = {n: x for n, x in given.items() if isinstance(x, int)}
    key = (launch.compiled.hash, launch.grid, tuple(sorted(numbers.items())), gpu.name, latency)
    if key in _costs:
        return _costs[key]
    values = {n: Pointer(n, 0) if isinstance(x, Tensor) else x for n, x in given.items()}
    tables = {
        n: t.flatten().tolist()
        for n, x in given.items()
        if isinstance(x, Tensor)
        for t in [known_values(x)]
        if t is not None
    }
    assumed = assumptions_of(launch)
    large = frozenset(n for n, x in given.items() if isinstance(x, Tensor) and nbytes(x) > gpu.l2 / 8)
    average, programs = Cost(), _sampled(launch.grid)
    for program in programs:
        meta = launch.compiled.metadata
        walk = Walk(
            function, values, tables, program, launch.grid, meta.num_warps, assumed, gpu.flops_a_clock, latency, large,
        )  # fmt: skip
        average.add(walk.cost, 1 / len(programs))
    _costs[key] = average
    return average


def resident(launch: Launch, gpu: Gpu) -> int:
    """Programs that a processor holds at the same time."""
    threads = 32 * launch.report.warps
    by_registers = REGISTERS // (threads * 8 * math.ceil(launch.report.registers / 8))
    by_shared = gpu.shared // (launch.report.shared + 1024)
    return max(1, min(by_registers, by_shared, THREADS // threads, BLOCKS))


def memory_bytes(launch: Launch, cost: Cost) -> float:
    """HBM traffic: what the programs ask for, but no tensor more than once in a launch and direction, as one
    argument or several."""
    moved = 0.0
    for asked in (cost.loads, cost.stores):
        sizes: dict[int, float] = defaultdict(float)
        limits: dict[int, float] = {}
        for name, size in asked.items():
            tensor = launch.arguments.get(name)
            sizes[id(tensor)] += size * launch.programs
            limits[id(tensor)] = nbytes(tensor) if isinstance(tensor, Tensor) else math.inf
        moved += sum(min(size, limits[key]) for key, size in sizes.items())
    return moved


def predict_launch(launch: Launch, gpu: Gpu, latency: Latencies | None = None) -> Predicted:
    """Of a compiled launch."""
    latency = latency or Latencies()
    cost, programs = cost_of(launch, gpu, latency), launch.programs
    held = resident(launch, gpu)
    share = math.ceil(programs / gpu.processors) if programs < 4 * gpu.processors else programs / gpu.processors
    lanes = 128
    work = max(cost.tensor, cost.alu / lanes, cost.special / (lanes / 8), cost.issued / latency.l1_bytes)
    rounds = max(1.0, math.ceil(share / held) if share < 4 * held else share / held)
    moved = memory_bytes(launch, cost)
    asked = sum(cost.loads.values()) + sum(cost.stores.values())
    limits = {
        "memory": moved / min(gpu.memory * MEMORY_SHARE, gpu.processors * gpu.clock * BYTES_A_CLOCK),
        "cache": asked * programs / gpu.cache,
        "work": share * work / gpu.clock,
        "latency": rounds * cost.clock / gpu.clock,
    }
    limit = max(limits, key=lambda name: limits[name])
    return Predicted(
        LAUNCH + limits[limit], sum(cost.flops.values()) * programs, moved, programs / gpu.processors / held, held,
        cost.steps, cost.clock, cost.assumed, limit,
    )  # fmt: skip


def predict(event: Event, gpu: Gpu) -> float:
    """Seconds of any event on the GPU."""
    if event.kind == "triton":
        return predict_launch(event.launch, gpu).seconds
    if event.kind == "sync":
        return SYNC
    if not event.launches:
        return 0.0
    return LAUNCH + max(event.flops / (gpu.dense * MATRIX_SHARE), event.bytes / (gpu.memory * MEMORY_SHARE))
