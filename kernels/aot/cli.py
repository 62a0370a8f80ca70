"""`python -m megatron_dla.kernels.aot`: compile the kernels of every operator for the GPUs asked for."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from pathlib import Path

from . import delta_mem, dla, fused
from .compile import ARCHS, compile_all, failures, table

KERNELS = Path(__file__).parents[1]


def exercise(name: str) -> None:
    """Every launch of one configuration, of whichever operator has it."""
    operator = next((x for x in (delta_mem, fused) if name.startswith(x.PREFIX)), dla)
    operator.exercise(name)


def defined() -> set[str]:
    """Names of all kernels in the sources of DLA and of its mixer."""
    paths = (path for operator in ("dla", "fused") for path in (KERNELS / operator).glob("triton_*.py"))
    return {name for path in paths for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}


def main(argv: list[str] | None = None) -> int:
    """Compile the kernels of DLA, its mixer's and δ-mem's; 0: all fit, 1: some do not, 2: cannot tell."""
    parser = argparse.ArgumentParser(prog="python -m megatron_dla.kernels.aot", description=main.__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--config", help="only the configurations whose name contains this")
    parser.add_argument(
        "--quick", action="store_true", help="of DLA, what the shipped configs launch and each other kernel once"
    )
    parser.add_argument("--json", type=Path, help="also write the reports here")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it", file=sys.stderr)
        return 2
    every = {arch: dla.names(arch, args.quick) + delta_mem.names(arch) + fused.names(arch) for arch in args.arch}
    names = [(arch, name) for arch in args.arch for name in every[arch] if (args.config or "") in name]
    if not names:
        print(f"no configuration contains {args.config!r}", file=sys.stderr)
        return 2
    reports = compile_all(names, exercise, args.jobs, say=lambda line: print(line, flush=True))
    print(table(reports))
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(r) for r in reports], indent=1))
    wrong = failures(reports)
    if not args.config:
        wrong += [f"{name}: no configuration launches it" for name in sorted(defined() - {r.name for r in reports})]
    spilling = [r for r in reports if any(r.known)]
    if spilling:
        print(f"\n{len(spilling)} kernels spill as spills.py says")
    print("\n".join([f"\n{len(wrong)} problems:", *wrong]) if wrong else f"\n{len(reports)} kernels fit")
    return 1 if wrong else 0
