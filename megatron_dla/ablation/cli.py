"""`dla ablate CONFIG` and `dla ablate report CONFIG`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from megatron_dla.errors import UserError
from megatron_dla.files import check_out


def add_ablate_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add `dla ablate`; `args.func(args)` returns the exit code and may raise UserError."""
    text = "train recipes of a δ-mem adapter, and compare what their memory gives with what they cost"
    parser = subparsers.add_parser(
        "ablate", help=text, description=f"{text.capitalize()}. One that was stopped goes on where it was."
    )
    parser.add_argument(
        "words", nargs="+", metavar="[report] CONFIG",
        help="its YAML file or shipped name; with `report`: write the report of the recipes that have ended",
    )  # fmt: skip
    parser.add_argument("--task", default="0/1", metavar="I/N", help="run the recipes of task I of N")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the report (default: the ablation's directory)")
    parser.set_defaults(func=_ablate)


def _ablate(args: argparse.Namespace) -> int:
    from megatron_dla.ablation.plan import load_ablation
    from megatron_dla.ablation.report import collect, table_text, write_report
    from megatron_dla.ablation.run import AblationRunner
    from megatron_dla.study.variants import split_task, split_words

    report_only, path = split_words("ablate", args.words)
    part = split_task(args.task, report=report_only, out=args.out)
    check_out(args.out)
    ablation = load_ablation(path)
    again = f"dla ablate {shlex.quote(path)}" + ("" if part == (0, 1) else f" --task {args.task}")
    if not report_only and (code := AblationRunner(ablation, part).run()):
        print(f"stopped; `{again}` goes on")
        return code
    if not report_only and part != (0, 1):
        return 0
    results = collect(ablation)
    if not results["recipes"]:
        raise UserError(f"{str(ablation.root)!r}: no recipe has ended yet; run `{again}` first")
    print(f"\n{table_text(results)}\n")
    for file in write_report(results, args.out or ablation.root):
        print(f"wrote {file}")
    return 0
