"""Walk one program of a Triton kernel through its TTIR: matrix products, traffic, and a clock of its serial steps.

The clock is that of an in-order machine: an operation waits for its operands, occupies its unit for as long as its size
takes, and its result is there after the unit's latency. Scalars are computed where they are known (program ids,
arguments, tables that the host built); where a loop's length depends on the data, `Assumptions` says how long it is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .constants import Assumptions, Latencies
from .ttir import BYTES, Function, Op, inside, shapes

_INTEGER: dict[str, Callable[[int, int], Any]] = {
    "addi": lambda a, b: a + b, "subi": lambda a, b: a - b, "muli": lambda a, b: a * b,
    "divsi": lambda a, b: int(a / b) if b else None, "divui": lambda a, b: a // b if b else None,
    "remsi": lambda a, b: a - b * int(a / b) if b else None, "remui": lambda a, b: a % b if b else None,
    "minsi": min, "maxsi": max, "minui": min, "maxui": max, "shli": lambda a, b: a << b, "shrsi": lambda a, b: a >> b,
}  # fmt: skip
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "slt": lambda a, b: a < b, "sle": lambda a, b: a <= b, "sgt": lambda a, b: a > b, "sge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "ult": lambda a, b: a < b, "ule": lambda a, b: a <= b,
    "ugt": lambda a, b: a > b, "uge": lambda a, b: a >= b,
}  # fmt: skip
_FREE = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.make_range", "tt.get_program_id", "tt.reshape", "tt.trans",
         "arith.constant", "tt.get_num_programs", "tt.return", "tt.unsplat", "cf.")  # fmt: skip
_SPECIAL = ("math.", "arith.divf")  # the special function unit
_ROUNDS_TO_TRY = 1 << 40


@dataclass(frozen=True)
class Pointer:
    """Into the argument `root`, at element `offset` (None: not known)."""

    root: str
    offset: int | None


@dataclass
class Cost:
    """What one program does, on average over those that were walked.

    Attributes:
        flops: of matrix products, by operand type ("bf16", "tf32x3", ..). alu, special: elements. loads, stores: bytes
        by argument. clock: cycles of the program alone. steps: iterations of its outermost loops. assumed: loops whose
        length was assumed.
    """

    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tensor: float = 0.0
    alu: float = 0.0
    special: float = 0.0
    loads: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    stores: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    issued: float = 0.0
    clock: float = 0.0
    steps: float = 0.0
    assumed: float = 0.0

    def add(self, other: Cost, weight: float) -> None:
        for name in ("flops", "loads", "stores"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += weight * value
        for name in ("tensor", "alu", "special", "issued", "clock", "steps", "assumed"):
            setattr(self, name, getattr(self, name) + weight * getattr(other, name))


def _multiplies(op: Op) -> bool:
    return any(one.name == "tt.dot" for one in inside(op))


class Walk:
    """One program.

    Args:
        values: arguments by name, numbers, and tensors as `Pointer`s. tables: by name, what scalar loads may read.
        peak: bf16 FLOPs a cycle. large: tensors that do not stay in L2.
    """

    def __init__(
        self, function: Function, values: dict[str, Any], tables: dict[str, Any], program: tuple[int, int, int],
        grid: tuple[int, int, int], warps: int, assumptions: Assumptions, peak: float, latency: Latencies,
        large: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        self.tables, self.program, self.grid, self.assumptions = tables, program, grid, assumptions
        self.large = large
        self.one_warp = warps == 1
        self.lanes, self.peak, self.latency = 32 * min(4, warps), peak, latency
        self.cost, self.weight, self.now, self.depth, self.pipelined = Cost(), 1.0, 0.0, 0, False
        self.env: dict[str, Any] = {f"%{name}": values.get(name) for name in function.arguments}
        self.ready: dict[str, float] = {}
        self.varies: dict[str, int] = {}  # depth of the innermost loop that a value changes in
        self.from_memory: set[str] = set()
        self.supposed: set[str] = set()  # comparisons whose result is assumed
        self.carried: set[str] = set()  # depend on what an iteration hands to the next: cannot be loaded ahead
        self._run(function.body)
        self.cost.clock = self.now

    # ---- control flow

    def _run(self, ops: list[Op]) -> list[str]:
        """Operands of the block's terminator."""
        for op in ops:
            if op.name in ("scf.yield", "scf.condition"):
                return op.operands
            handler = {"scf.for": self._for, "scf.while": self._while, "scf.if": self._if}.get(op.name, self._simple)
            handler(op)
        return []

    def _bind(self, names: list[str], sources: list[str]) -> None:
        for name, source in zip(names, sources, strict=False):
            self.env[name] = self.env.get(source)
            self.ready[name] = self.ready.get(source, 0.0)
            self.varies[name] = self.varies.get(source, 0)
            if source in self.carried:
                self.carried.add(name)

    def _for(self, op: Op) -> None:
        variable, low, high, step = op.operands[:4]
        carried = op.operands[4:] if "iter_args" in op.text else []
        names, inits = carried[0::2], carried[1::2]
        lo, hi, by = (self.env.get(x) for x in (low, high, step))
        if hi is not None and lo is None:
            lo = 0
        if hi is None:
            hi = (lo or 0) + self._assume()
        lo, by = lo or 0, by or 1
        trips = max(0, math.ceil((hi - lo) / by))
        self._bind(names, inits)
        if self.depth == 0:
            self.cost.steps += self.weight * trips
        if trips <= 4:
            for i in range(math.ceil(trips)):
                self._iteration(op, variable, lo + i * by, names)
        else:
            self._repeat(trips, lambda i: self._iteration(op, variable, lo + by * i, names), names)
        self._bind(op.results, names)

    def _assume(self) -> float:
        self.cost.assumed += 1
        return self.assumptions.rounds

    def _iteration(self, loop: Op, variable: str | None, value: Any, names: list[str]) -> list[str]:
        """One pass of a loop's body, its last region; what it hands on goes to `names`."""
        self.depth += 1
        before = self.pipelined
        self.pipelined = loop.pipelined
        if variable is not None:
            self.env[variable], self.varies[variable] = value, self.depth
        for name in names:
            self.varies[name] = self.depth
        self.carried.update(names)
        handed = self._run(loop.regions[-1])
        self._bind(names, handed)
        self.pipelined = before
        self.depth -= 1
        return handed

    def _repeat(self, trips: float, iteration: Any, names: list[str]) -> None:
        """`trips` iterations from two: the first, and the middle one for the others."""

        def forget() -> None:
            for name in names:
                value = self.env.get(name)
                self.env[name] = Pointer(value.root, None) if isinstance(value, Pointer) else None

        iteration(0)
        forget()
        weight, start = self.weight, self.now
        self.weight *= trips - 1
        iteration(int(trips) // 2)
        self.weight = weight
        self.now = start + (self.now - start) * (trips - 1)
        forget()

    def _while(self, op: Op) -> None:
        names, inits = op.operands[0 : self._pairs(op) : 2], op.operands[1 : self._pairs(op) : 2]
        self._bind(names, inits)
        inner = op.arguments[1]
        if self._goes_on(op, inner) is False:
            self._bind(op.results, self._passed)
            return
        before = {name: self.env.get(name) for name in names}
        entered, counted = self.now, Cost()
        counted, self.cost = self.cost, counted
        self._bind(names, self._iteration(op, None, None, []))
        counted, self.cost = self.cost, counted
        after = {name: self.env.get(name) for name in names}
        known = self._goes_on(op, inner) is not None
        trips = self._length(op, names, before, after, inner, known)
        self.cost.add(counted, min(trips, 1.0))
        self.now = entered + (self.now - entered) * min(trips, 1.0)
        if self.depth == 0:
            self.cost.steps += self.weight * trips
        if trips > 1:
            weight, start = self.weight, self.now
            self.weight *= trips - 1
            self._goes_on(op, inner)
            self._iteration(op, None, None, [])
            self.weight = weight
            self.now = start + (self.now - start) * (trips - 1)
        for name in op.results:
            self.env[name], self.ready[name] = None, self.now
        for result, name in zip(op.results, names, strict=False):
            value = before[name]
            self.env[result] = Pointer(value.root, None) if isinstance(value, Pointer) else None

    def _pairs(self, op: Op) -> int:
        return 2 * op.text.split(" : ")[0].count("=")

    def _goes_on(self, op: Op, inner: list[str]) -> Any:
        """Run the condition; True, False or None (not known); the values go to the body's names."""
        condition, *passed = self._run(op.regions[0])
        self._bind(inner, passed)
        self._passed = passed
        return self.env.get(condition)

    def _length(self, op: Op, names: list[str], before: dict, after: dict, inner: list[str], known: bool) -> float:
        """Iterations of a while loop whose numbers change evenly; as assumed where its condition is not known."""
        steps = {n: after[n] - before[n] for n in names if isinstance(before[n], int) and isinstance(after[n], int)}
        moving = {n: d for n, d in steps.items() if d}
        if not moving and self.assumptions.past is not None and _multiplies(op):
            self.cost.assumed += 1
            return self.assumptions.past
        if not moving:
            return self._assume()
        saved = self.cost, self.now
        self.cost = Cost()

        def goes(i: int) -> bool:
            for name in names:
                self.env[name] = before[name] + i * steps[name] if name in steps else None
            return self._goes_on(op, inner) is not False

        low, high = 1, 2
        while goes(high) and high < _ROUNDS_TO_TRY:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if goes(middle) else (low, middle)
        trips: float = high if goes(low) else low
        self.cost, self.now = saved
        if trips >= _ROUNDS_TO_TRY:
            return self._assume()
        if not known and self.assumptions.until is not None:
            self.cost.assumed += 1
            trips = min(trips, self.assumptions.until)
        for name in names:
            self.env[name] = before[name] + int(trips // 2) * steps[name] if name in steps else after[name]
        return trips

    def _if(self, op: Op) -> None:
        condition = self.env.get(op.operands[0])
        if op.operands[0] in self.supposed and not condition and _multiplies(op):
            condition = None  # an assumption must not hide products
        if condition is None and self.assumptions.held is not None and _multiplies(op):
            self._seldom(op, self.assumptions.held)
            return
        if condition is None:  # the dearer branch
            costs = []
            for region in op.regions:
                trial, now = self.cost, self.now
                self.cost = Cost()
                self._run(region)
                costs.append(self.now - now)
                self.cost, self.now = trial, now
            chosen = costs.index(max(costs))
        else:
            chosen = 0 if condition else 1
        if chosen < len(op.regions):
            self._bind(op.results, self._run(op.regions[chosen]))
            if condition is None and len(op.regions) == 2:
                for name in op.results:
                    value = self.env.get(name)
                    self.env[name] = value if isinstance(value, Pointer) else None

    def _seldom(self, op: Op, share: float) -> None:
        """The first branch in that share of the cases, and the other one, if there is one, in the rest."""
        weight, start, took = self.weight, self.now, 0.0
        for region, part in zip(op.regions, (share, 1 - share), strict=False):
            self.weight, self.now = weight * part, start
            self._run(region)
            took += part * (self.now - start)
        self.weight, self.now = weight, start + took
        for name in op.results:
            self.env[name], self.ready[name] = None, self.now
        self.cost.assumed += 1

    # ---- operations

    def _simple(self, op: Op) -> None:
        name, short = op.name, op.name.split(".", 1)[1]
        types = shapes(op.text)
        elements = math.prod(types[-1][0]) if types else 1
        start = max([self.now, *(self.ready.get(x, 0.0) for x in op.operands)])
        busy, late = 0.0, 0.0
        if name == "tt.dot":
            busy, late = self._dot(op, types)
        elif name in ("tt.load", "tt.store") or name.startswith(("tt.atomic", "tt.descriptor")):
            busy, late = self._memory(op, types)
        elif name in ("tt.gather", "tt.reduce", "tt.scan"):
            busy, late = self._exchange(op, types)
        elif name == "gpu.barrier":
            busy = self.latency.barrier
        elif types and not name.startswith(_FREE):
            busy, late = self._elementwise(name, elements, types[-1][1])
        self.now = start + busy
        varies = max([self.varies.get(x, 0) for x in op.operands], default=0)
        carried = any(x in self.carried for x in op.operands)
        for result in op.results:
            self.ready[result], self.varies[result] = self.now + late, varies
            self.carried.update([result] if carried else [])
            self.env[result] = self._value(name, short, op, types)

    def _exchange(self, op: Op, types: list[tuple[list[int], str]]) -> tuple[float, float]:
        """Between threads: through shared memory, unless there is one warp."""
        elements, kind = (math.prod(types[-1][0]), types[-1][1]) if types else (1, "i32")
        if op.name == "tt.gather" and not self.one_warp:
            size = 2 * elements * BYTES.get(kind, 4)
            self.cost.issued += self.weight * size
            return size / self.latency.l1_bytes, self.latency.reduce
        self.cost.alu += self.weight * elements
        late = self.latency.reduce
        if self.one_warp and op.name == "tt.gather":
            late = self.latency.shuffle
        elif self.one_warp and op.name == "tt.reduce" and types and types[0] == ([32], "i32") and len(op.operands) == 1:
            late = self.latency.redux
        return elements / self.lanes, late

    def _elementwise(self, name: str, elements: int, kind: str) -> tuple[float, float]:
        if name.startswith(_SPECIAL):
            self.cost.special += self.weight * elements
            return 8 * elements / self.lanes, self.latency.alu
        share = 1.0 if kind.startswith(("f", "bf")) else self.latency.integer_share
        self.cost.alu += self.weight * share * elements
        return share * elements / self.lanes, self.latency.alu

    def _dot(self, op: Op, types: list[tuple[list[int], str]]) -> tuple[float, float]:
        (rows, inner), kind = types[0][0][-2:], types[0][1]
        columns = types[1][0][-1]
        flops = 2.0 * rows * inner * columns * math.prod(types[0][0][:-2])
        precision = "f32"
        if kind == "f32":
            found = [p for p in ("tf32x3", "tf32", "ieee") if f"inputPrecision = {p}" in op.text]
            precision = found[0] if found else "ieee"
        label = kind if kind != "f32" else precision
        self.cost.flops[label] += self.weight * flops
        clock = flops / (self.peak * self.latency.rate(label))
        self.cost.tensor += self.weight * clock
        staged = sum(x not in self.from_memory for x in op.operands[:2])  # computed: through shared memory first
        wait = self.latency.barrier if staged else 0.0
        return clock + wait, self.latency.dot

    def _memory(self, op: Op, types: list[tuple[list[int], str]]) -> tuple[float, float]:
        pointer = self.env.get(op.operands[0])
        root = pointer.root if isinstance(pointer, Pointer) else "?"
        shape, kind = types[0] if types else ([1], "i32")
        loaded = self.assumptions.share(root, self.env) if op.name == "tt.load" and types else 1.0
        size = loaded * math.prod(shape) * BYTES.get(kind, 4)
        once = self.varies.get(op.operands[0], 0) < self.depth  # the same lines in every iteration: they stay in L1
        fresh = self.weight if not once else min(self.weight, 1.0)
        stored = op.name == "tt.store"
        (self.cost.stores if stored else self.cost.loads)[root] += fresh * size
        self.cost.issued += self.weight * size
        busy = size / self.latency.l1_bytes
        if stored:
            return busy, 0.0
        hidden = self.pipelined and types and op.operands[0] not in self.carried
        far = self.latency.memory if root in self.large else self.latency.l2
        return busy, 0.0 if hidden else self.latency.l1 if once else far

    def _value(self, name: str, short: str, op: Op, types: list) -> Any:
        """What is known of a result: a number, or which argument a pointer goes into."""
        first = self.env.get(op.operands[0]) if op.operands else None
        if name in ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans") and isinstance(
            first, Pointer
        ):
            if name == "tt.addptr" and not types:
                step = self.env.get(op.operands[1])
                at = first.offset
                return Pointer(first.root, None if at is None or not isinstance(step, int) else at + step)
            return Pointer(first.root, None)
        if name == "tt.load":
            for result in op.results:
                self.from_memory.add(result)
            return None if types else self._read(first)
        if types:
            if name in ("tt.trans", "ttg.convert_layout") and op.operands[0] in self.from_memory:
                self.from_memory.update(op.results)
            return None
        if name == "arith.constant":
            value = op.text.split(":")[0].strip()
            return {"true": True, "false": False}.get(value, int(value) if value.lstrip("-").isdigit() else None)
        if name in ("tt.get_program_id", "tt.get_num_programs"):
            source = self.program if name == "tt.get_program_id" else self.grid
            return source["xyz".index(op.text.split(":")[0].strip())]
        return self._number(short, op)

    def _number(self, short: str, op: Op) -> Any:
        known: list[Any] = [self.env.get(x) for x in op.operands]
        if short in ("extsi", "extui", "trunci", "index_cast"):
            return known[0]
        if short == "select":
            return known[1] if known[0] is True else known[2] if known[0] is False else None
        if short in ("andi", "ori"):
            stop = short == "ori"
            if stop in known[:2]:
                return stop
        if len(known) >= 2 and all(isinstance(x, int) for x in known[:2]):
            if short in _INTEGER:
                return _INTEGER[short](*known[:2])
            if short == "cmpi":
                return _COMPARE[op.text.split(",")[0].strip()](*known[:2])
            if short == "andi":
                return bool(known[0] and known[1]) if isinstance(known[0], bool) else known[0] & known[1]
            if short == "ori":
                return known[0] | known[1]
        if short == "cmpi" and op.text.startswith(" eq,"):  # of numbers that the data decides: rarely so
            self.supposed.update(op.results)
            return self.assumptions.equal
        return None

    def _read(self, pointer: Any) -> Any:
        if not isinstance(pointer, Pointer):
            return None
        table = self.tables.get(pointer.root)
        if table is not None and pointer.offset is not None and 0 <= pointer.offset < len(table):
            return table[pointer.offset]
        return self.assumptions.loaded(pointer.root, pointer.offset, self.env)
