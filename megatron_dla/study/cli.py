"""`dla study CONFIG` and `dla study report CONFIG`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from megatron_dla.errors import UserError
from megatron_dla.files import check_out


def add_study_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add `dla study`; `args.func(args)` returns the exit code and may raise UserError."""
    text = "train arms x learning rates x seeds of one config on the same data, and compare them"
    parser = subparsers.add_parser(
        "study", help=text, description=f"{text.capitalize()}. A study that was stopped goes on where it was."
    )
    parser.add_argument(
        "words", nargs="+", metavar="[report] CONFIG",
        help="the study's YAML file or shipped name; with `report`: write the report of the cells that have ended, or, "
        "of a study.json, write its page and pictures again",
    )  # fmt: skip
    parser.add_argument(
        "--task", default="0/1", metavar="I/N",
        help="run the arms of task I of N (a Slurm array: 0/N to N-1/N)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the report (default: the study's directory)")
    parser.set_defaults(func=_study)


def _study(args: argparse.Namespace) -> int:
    from megatron_dla.study.plan import load_study
    from megatron_dla.study.report import redraw, write_report
    from megatron_dla.study.results import collect
    from megatron_dla.study.results_synthetic import collect_synthetic
    from megatron_dla.study.run import StudyRunner
    from megatron_dla.study.run_synthetic import SyntheticRunner
    from megatron_dla.study.variants import split_task, split_words

    report_only, path = split_words("study", args.words)
    part = split_task(args.task, report=report_only, out=args.out)
    check_out(args.out)
    if report_only and path.endswith(".json"):
        for file in redraw(Path(path), args.out or Path(path).parent):
            print(f"wrote {file}")
        return 0
    study = load_study(path)
    again = f"dla study {shlex.quote(path)}" + ("" if part == (0, 1) else f" --task {args.task}")
    runners: list[StudyRunner | SyntheticRunner] = [StudyRunner(study, part)]
    runners += [SyntheticRunner(study.synthetic, part)] if study.synthetic else []
    for runner in [] if report_only else runners:
        if code := runner.run():
            print(f"stopped; `{again}` goes on")
            return code
    results = {**collect(study), "synthetic": collect_synthetic(study.synthetic)}
    if report_only and not (results["cells"]["done"] or results["synthetic"]):
        raise UserError(f"{str(study.root)!r}: no cell has ended yet; run `{again}` first")
    if report_only or part == (0, 1):
        for file in write_report(results, args.out or study.root, again):
            print(f"wrote {file}")
    return 0
