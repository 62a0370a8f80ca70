"""`dla smoke`: arguments only; the stages are imported when the command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_smoke_parser(subparsers: Any) -> None:
    """Add `smoke` to an argparse subparsers object; `func(args)` gives the exit code."""
    text = (
        "Kernels against the float64 reference on new random inputs, a short training, export to Hugging Face and "
        "back, and generation. Stages that this machine cannot run are skipped. Exit code 0: nothing failed."
    )
    parser = subparsers.add_parser(
        "smoke", help="check that everything works on this machine (a few minutes)", description=text
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--out", type=Path, default=Path("runs/smoke"), metavar="DIR", help="default: runs/smoke")
    parser.add_argument("--seed", type=int, help="of the random inputs (default: the time; it is printed)")
    parser.add_argument("--kernels-only", action="store_true", help="leave training, export and generation out")
    parser.add_argument("--keep", action="store_true", help="keep the model and its data if all stages pass")
    parser.set_defaults(func=_smoke)


def _smoke(args: argparse.Namespace) -> int:
    from megatron_dla.smoke.run import smoke

    return smoke(args.device, args.out, seed=args.seed, keep=args.keep, kernels_only=args.kernels_only)
