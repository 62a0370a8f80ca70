"""Arguments of `dla report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_report_parser(subparsers: Any) -> None:
    """Add the command to an argparse subparsers object; `args.func(args)` returns the exit code."""
    text = "write one HTML file about a run: curves, speed, data mix, time line with faults, config and versions"
    parser = subparsers.add_parser(
        "report", help="write a run's curves, events and config as one HTML file", description=text
    )
    parser.add_argument("run_dir", type=Path, help="runs/NAME, also of a run that goes on")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: report.html in the run)")
    parser.set_defaults(func=_report)


def _report(args: argparse.Namespace) -> int:
    from megatron_dla.report.page import write_page

    print(write_page(args.run_dir, args.out))
    return 0
