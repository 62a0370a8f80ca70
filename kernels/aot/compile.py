"""Compile Triton kernels for real GPUs on a machine without one, and report what they need.

    with dry_run(90) as reports:       # every launch inside is compiled for sm_90; nothing is executed
        my_op(cpu_tensors).sum().backward()
    print(table(reports))

The Python wrappers run unmodified, so each kernel is compiled with the specialisation that a GPU would see. It works in
a process without TRITON_INTERPRET only. `python -m megatron_dla.kernels.aot --arch 90` compiles every operator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .spills import known_spills

ARCHS = (80, 90, 100)
# bytes of shared memory that a block may ask for, and columns of tensor memory of a multiprocessor
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY_LIMIT = 512
SLOW = 10.0  # seconds of compilation after which a kernel gets a line of progress


@dataclasses.dataclass
class Report:
    """What one compiled kernel needs. Spills in bytes a thread; `users` are the configurations that launch it."""

    name: str
    arch: int
    warps: int = 0
    stages: int = 0
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    tensor_memory: int = 0
    mma: str = ""
    trans_hits: int = 0
    redux_hits: int = 0
    seconds: float = 0.0
    error: str = ""
    key: str = ""
    users: list[str] = dataclasses.field(default_factory=list)

    @property
    def known(self) -> tuple[int, int]:
        """Bytes of spill stores and loads that this version of triton is known to need here."""
        return known_spills(self.arch, self.name, self.users) if self.spill_stores + self.spill_loads else (0, 0)

    @property
    def problems(self) -> list[str]:
        """Everything that keeps this kernel from running well; empty = fine."""
        limit = SHARED_LIMIT[self.arch]
        found = {
            self.error: bool(self.error),
            f"spills {self.spill_stores} / {self.spill_loads} bytes (known: {self.known[0]} / {self.known[1]})": (
                self.spill_stores > self.known[0] or self.spill_loads > self.known[1]
            ),
            f"needs {self.shared} bytes of shared memory, sm_{self.arch} has {limit}": self.shared > limit,
            f"needs {self.tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY_LIMIT}": (
                self.tensor_memory > TENSOR_MEMORY_LIMIT
            ),
            f"{self.trans_hits} transposed matmul results feed a wgmma (see `transposed_results`)": self.trans_hits > 0,
            f"{self.redux_hits} predicated integer reductions (see `predicated_reductions`)": self.redux_hits > 0,
        }
        return [text for text, true in found.items() if true]

    @property
    def ok(self) -> bool:
        return not self.problems


def transposed_results(ttgir: str) -> list[str]:
    """Lines of sm_90 TTGIR in which the transpose of a wgmma result goes to another wgmma.

    Triton 3.4 to 3.7.0 may store such a tile wrongly. Compute the transpose instead: for S = A B^T, take dot(B, A^T)
    and not trans(S); transposing tiles that were loaded is fine.
    """
    tainted: set[str] = set()
    hits = []
    for line in ttgir.splitlines():
        match = re.match(r"\s*(?:(%[\w#]+) = )?\"?([\w.]+)\"? (.*)", line)
        if match is None:
            continue
        result, op, rest = match.groups()
        operands = re.findall(r"%[\w#]+", rest.split(" : ")[0])
        if op == "tt.trans":
            from_result = re.search(r"#mma\d*> ->", rest) is not None
            if result and (from_result or operands[0] in tainted):
                tainted.add(result)
        elif op in ("ttg.local_alloc", "ttg.local_store") and operands and operands[0] in tainted:
            hits.append(line.strip())
        elif op == "ttng.warp_group_dot":
            hits += [line.strip()] if operands[0] in tainted else []
        elif result and op.startswith(("arith.", "math.", "tt.fp_to_fp", "ttg.convert_layout")):
            still = op != "ttg.convert_layout" or re.search(r"-> tensor<[^>]*#(linear|ttg\.dot_op)", rest)
            if still and any(x in tainted for x in operands):
                tainted.add(result)
    return hits


def predicated_reductions(sass: str) -> list[str]:
    """Instructions in which a warp's integer reduction runs under a per-thread predicate.

    Triton lowers an integer `tl.sum`, `tl.min` or `tl.max` over a warp to `redux.sync`. Where one stands in a short
    branch, the assembler of CUDA 12.8 turns the branch into predication and takes the predicate of another
    instruction; warps then disagree about a scalar that decides a branch with a barrier in it. Seen on an H200
    (Triton 3.6.0): wrong and varying results. Reduce outside of the branch, and select.
    """
    return [line.strip() for line in sass.splitlines() if re.search(r"@!?P\d\s+REDUX", line)]


def _disassemble(cubin: str) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "-sass", cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _spills(ptx: str, arch: int) -> tuple[int, int]:
    """Bytes of spill stores and loads, from the assembler's log."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target[1]}", str(source), "-o", str(Path(folder, "out"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return max(int(a) for a, _ in found), max(int(b) for _, b in found)


def _mma(ptx: str) -> str:
    for pattern in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if count := ptx.count(pattern):
            return f"{pattern.split('.')[0]} x{count}"
    return "-"


def report(kernel: Any, arch: int, seconds: float = 0.0) -> Report:
    """Read the resources of a compiled kernel from its binary."""
    from triton import knobs

    data, ptx = kernel.metadata, kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        redux = predicated_reductions(_disassemble(file.name)) if "redux.sync" in ptx else []
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage
    registers, stack = int(match[1]), int(match[2])
    # a spill lives on the stack, so the slow second run of the assembler is needed only where there is one
    stores, loads = _spills(ptx, arch) if stack else (0, 0)
    hits = transposed_results(kernel.asm["ttgir"]) if arch == 90 else []
    return Report(
        data.name, arch, data.num_warps, data.num_stages, registers, stores, loads, data.shared,
        getattr(data, "tmem_size", 0) or 0, _mma(ptx), len(hits), len(redux), seconds, key=kernel.hash,
    )  # fmt: skip


class _ZeroedEmpty(TorchFunctionMode):
    """`torch.empty` gives zeros: kernels do not run, and torch code may index with what they should have written."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        zeros = {torch.empty: torch.zeros, torch.empty_like: torch.zeros_like, torch.Tensor.new_empty: None}
        if func not in zeros:
            return func(*args, **(kwargs or {}))
        return (zeros[func] or torch.Tensor.new_zeros)(*args, **(kwargs or {}))


def stub_driver(arch: int) -> Any:
    """As much of a CUDA driver as triton's front end asks for; it cannot launch anything."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class StubDriver(DriverBase):
        @classmethod
        def is_active(cls) -> bool:
            return False

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise RuntimeError("a dry run measures nothing: these kernels must not be autotuned")

        def get_current_device(self) -> int:
            return arch  # one compilation cache per architecture

        def get_current_stream(self, device: int) -> int:
            return 0

    return StubDriver()


@contextlib.contextmanager
def dry_run(arch: int, zeroed: bool = True) -> Iterator[list[Report]]:
    """Inside, every kernel launch compiles for sm_`arch` and runs nothing; yields the reports, one a distinct kernel.

    Tensors stay on the CPU (or on `meta`); if `zeroed`, what kernels should have written is zero. A kernel that does
    not compile becomes a report with `error`, and execution continues after the launch.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("dry_run compiles: start the process without TRITON_INTERPRET")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    reports: list[Report] = []
    seen: set[Any] = set()
    stock, active = JITFunction.run, driver._active

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            kernel = stock(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # a compiler error of any kind is a finding, not a crash
            text = " ".join(str(error).split())
            if (self.__name__, text) not in seen:
                seen.add((self.__name__, text))
                reports.append(Report(self.__name__, arch, error=f"{type(error).__name__}: {text[:600]}", key=text))
            return None
        if kernel is not None and kernel.hash not in seen:
            seen.add(kernel.hash)
            one = report(kernel, arch, time.perf_counter() - begin)
            reports.append(one)
            if one.seconds > SLOW:
                text = "; ".join(one.problems) or "fits"
                print(f"sm_{arch} {one.name}: {one.seconds:.0f} s, {text}", file=sys.stderr, flush=True)
        return kernel

    driver.set_active(stub_driver(arch))
    JITFunction.run = run  # type: ignore[method-assign]
    try:
        with _ZeroedEmpty() if zeroed else contextlib.nullcontext():
            yield reports
    finally:
        JITFunction.run = stock  # type: ignore[method-assign]
        driver._active = active


def table(reports: list[Report]) -> str:
    """One line a kernel; "!" marks what `problems` lists, "~" a known spill."""
    rows: list[tuple[str, ...]] = [
        ("", "kernel", "arch", "warps", "stages", "regs", "spill", "shared", "tmem", "mma", "lint", "s", "used by")
    ]
    for r in sorted(reports, key=lambda r: (r.arch, r.name, r.key)):
        users = r.users[0] + (f" +{len(r.users) - 1}" if len(r.users) > 1 else "") if r.users else ""
        numbers = (r.warps, r.stages, r.registers, f"{r.spill_stores}/{r.spill_loads}", r.shared, r.tensor_memory)
        tail = (r.mma, r.trans_hits + r.redux_hits, f"{r.seconds:.1f}", users)
        mark = "!" if not r.ok else "~" if any(r.known) else ""
        rows.append((mark, r.name, f"sm_{r.arch}", *map(str, numbers), *map(str, tail)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def failures(reports: list[Report]) -> list[str]:
    """One line for each problem of each kernel."""
    return [
        f"{r.name} (sm_{r.arch}, {', '.join(r.users) or 'unnamed'}): {text}" for r in reports for text in r.problems
    ]


def merge(batches: list[list[Report]]) -> list[Report]:
    """One report a distinct kernel and architecture, with all its users."""
    merged: dict[tuple, Report] = {}
    for one in (r for batch in batches for r in batch):
        first = merged.setdefault((one.arch, one.name, one.key), one)
        if first is not one:
            first.users += [user for user in one.users if user not in first.users]
    return list(merged.values())


def compile_all(
    work: list[tuple[int, str]], exercise: Callable[[str], None], jobs: int, say: Callable[[str], None] = print
) -> list[Report]:
    """Dry-run `exercise(name)` for each (arch, name), in `jobs` processes; `exercise` must be importable."""
    batches, begin = [], time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for done, (arch, name, reports, seconds) in enumerate(pool.imap_unordered(_Worker(exercise), work), 1):
            batches.append(reports)
            elapsed = time.perf_counter() - begin
            say(f"[{elapsed:4.0f} s] {done}/{len(work)} sm_{arch} {name}: {len(reports)} kernels, {seconds:.0f} s")
    return merge(batches)


@dataclasses.dataclass
class _Worker:
    exercise: Callable[[str], None]

    def __call__(self, item: tuple[int, str]) -> tuple[int, str, list[Report], float]:
        arch, name = item
        torch.set_num_threads(1)
        begin = time.perf_counter()
        with dry_run(arch) as reports:
            try:
                self.exercise(name)
            except Exception as error:
                reports.append(Report("(wrapper)", arch, error=f"{type(error).__name__}: {error}", key=name))
        for one in reports:
            one.users = [name]
        return arch, name, reports, time.perf_counter() - begin
