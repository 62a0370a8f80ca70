"""Read Triton's intermediate language (TTIR, after inlining) into a tree of operations.

TTIR is walked; what the compiler made of a loop is in TTGIR, the stage after it: see `mark_pipelined`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_LOCATION = re.compile(r"\s*loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
_RESULTS = re.compile(r"^(%[\w\-$.]+)(?::(\d+))?((?:, %[\w\-$.]+)*) = ")
_NAME = re.compile(r'^"?([a-z_]+\.[\w.]+)"?')
_VALUE = re.compile(r"%[\w\-$.]+(?:#\d+)?")
_TENSOR = re.compile(r"tensor<((?:\d+x)+)(?:!tt\.ptr<(\w+)>|(\w+))")
_LOOPS = ("scf.for", "scf.while")
_PRODUCTS = ("tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma")
_AHEAD = re.compile(r"async\w*copy_global_to_local")  # by cp.async or TMA
BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f8E4M3FN": 1}


@dataclass
class Op:
    """One operation.

    Attributes:
        results, operands: names of SSA values; text: the operation after its name, types included.
        regions: of a loop, branch or reduction; arguments: names that each region begins with.
        pipelined: of a loop, whether its loads are issued iterations ahead, see `mark_pipelined`.
    """

    name: str
    results: list[str]
    text: str
    operands: list[str] = field(default_factory=list)
    regions: list[list[Op]] = field(default_factory=list)
    arguments: list[list[str]] = field(default_factory=list)
    pipelined: bool = False


@dataclass
class Function:
    arguments: list[str]  # without the %
    body: list[Op]


def shapes(text: str) -> list[tuple[list[int], str]]:
    """The tensor types in a text: (shape, element), the element of what pointers point to."""
    return [([int(n) for n in m[1].split("x")[:-1]], m[2] or m[3]) for m in _TENSOR.finditer(text)]


def _operation(line: str) -> Op:
    results: list[str] = []
    if match := _RESULTS.match(line):
        name, count = match[1], int(match[2] or 1)
        results = [name] if not match[2] else [f"{name}#{i}" for i in range(count)]
        results += _VALUE.findall(match[3])
        line = line[match.end() :]
    match = _NAME.match(line)
    assert match is not None, line
    text = line[match.end() :]
    return Op(match[1], results, text, _VALUE.findall(text))


def _block(lines: list[str], at: int) -> tuple[list[Op], list[str], int]:
    """Operations up to the line that closes the block; that line's index."""
    ops: list[Op] = []
    arguments: list[str] = []
    while at < len(lines):
        line = lines[at]
        if line.startswith("}"):
            return ops, arguments, at
        if line.startswith("^bb"):
            arguments = _VALUE.findall(line)
            at += 1
            continue
        op = _operation(line)
        ops.append(op)
        at += 1
        while line.endswith("{"):
            region, names, at = _block(lines, at)
            op.regions.append(region)
            op.arguments.append(names)
            line = lines[at]
            op.text += line.lstrip("}) ") if not line.endswith("{") else ""
            at += 1
    return ops, arguments, at


def parse(text: str) -> Function:
    """The public function of a TTIR module."""
    lines = [_LOCATION.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("#loc", "module", "//"))]
    start = next(i for i, line in enumerate(lines) if line.startswith("tt.func public"))
    names = re.findall(r"%(\w+):", lines[start])
    body, _, _ = _block(lines, start + 1)
    return Function(names, body)


def inside(op: Op) -> Iterator[Op]:
    """The operation and those in its regions."""
    yield op
    for region in op.regions:
        for inner in region:
            yield from inside(inner)


def _loops(function: Function) -> list[Op]:
    """Innermost loops with a matrix product: Triton pipelines no others."""
    loops = []
    for op in (one for top in function.body for one in inside(top)):
        body = [one.name for one in inside(op)][1:]
        if op.name in _LOOPS and not set(body) & set(_LOOPS) and set(body) & set(_PRODUCTS):
            loops.append(op)
    return loops


def mark_pipelined(function: Function, compiled: str) -> None:
    """Mark the loops whose loads the compiler has moved iterations ahead: those with asynchronous copies in `compiled`
    (TTGIR), where the loops are in the same order.

    Where the compiler has dissolved some of them, all are marked if there is any such copy.
    """
    mine, theirs = _loops(function), _loops(parse(compiled))
    for i, loop in enumerate(mine):
        if len(mine) == len(theirs):
            loop.pipelined = any(_AHEAD.search(one.name) for one in inside(theirs[i]))
        else:
            loop.pipelined = _AHEAD.search(compiled) is not None
