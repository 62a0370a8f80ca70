"""`dla eval capacity`: arguments, table, JSON and picture."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dla.errors import UserError
from megatron_dla.evaluation.cli import check_counts
from megatron_dla.files import check_out

if TYPE_CHECKING:
    from megatron_dla.adapters.config import DeltaMemConfig

JSON_NAME, PICTURE_NAME = "capacity.json", "capacity.png"


def add_eval_capacity_parser(subparsers: Any) -> None:
    """Add `eval capacity` to an argparse subparsers object; `func(args)` gives the exit code."""
    text = (
        "Train the memory of one δ-mem layer alone to recall facts, and measure what it holds: right answers over the "
        "number of facts, for several ranks, beside a matrix that holds one value for each of r orthogonal keys."
    )
    parser = subparsers.add_parser("eval capacity", help="how many facts a δ-mem state holds", description=text)
    parser.add_argument(
        "--states", nargs="+", default=["8", "16", "32", "4x8"], metavar="[N]xR",
        help="rank of the state, or number and rank of several (default: 8 16 32 4x8)",
    )  # fmt: skip
    parser.add_argument("--facts", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="default: 1 2 4 ... 64")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="other keys of delta_mem, such as beta_bias=-3"
    )
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of 32 rows (default: 3000)")
    parser.add_argument("--episodes", type=int, default=200, help="asked at each number of facts (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and facts (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write capacity.json and capacity.png")
    parser.set_defaults(func=_capacity)


def _states(texts: list[str], pairs: list[str]) -> dict[str, DeltaMemConfig]:
    """{as given: config}. Raises UserError."""
    from megatron_dla.adapters.config import DeltaMemConfig
    from megatron_dla.config.load import fill, parse_override

    settings = {".".join(keys): value for keys, value in map(parse_override, pairs)}
    found = {}
    for text in texts:
        match = re.fullmatch(r"(?:(\d{1,3})x)?(\d{1,3})", text)
        if match is None:
            raise UserError(f"--states {text}: write a rank, or NxR for N states of rank R, such as 4x8")
        given = {"num_states": int(match[1] or 1), "rank": int(match[2])}
        if twice := sorted(given.keys() & settings.keys()):
            raise UserError(f"--set {twice[0]}: is given by --states")
        # it starts with a correction of the reads' own size: there is no base that it could disturb
        start = {"output_init": "random", "output_gain": 1.0, "target_modules": ["o_proj"]}
        found[text] = fill(DeltaMemConfig, start | settings | given, "delta_mem")
        if found[text].write != "token" or found[text].target_modules != ("o_proj",):
            raise UserError("--set: delta_mem.write is token and delta_mem.target_modules o_proj here")
    return found


def _capacity(args: argparse.Namespace) -> int:
    check_counts(args, {"steps": 1, "episodes": 2, "seed": 0, "threads": 1})
    from megatron_dla.evaluation.capacity import KEYS, VALUES, Training, exact, measure, train

    check_out(args.out)
    for facts in args.facts:
        if not 1 <= facts <= KEYS:
            raise UserError(f"--facts {facts}: use 1 to {KEYS}")
    facts, states = sorted(set(args.facts)), _states(args.states, args.set)
    import torch

    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "facts": facts, "values": VALUES, "steps": args.steps, "episodes": args.episodes, "seed": args.seed,
        "set": args.set, "states": {},
    }  # fmt: skip
    for number, (name, config) in enumerate(states.items()):
        started = time.monotonic()
        model = train(config, facts[-1], Training(steps=args.steps), args.seed, _Progress(name, number, args))
        right = {n: measure(model, n, args.episodes, args.seed) for n in facts}
        keys = config.num_states * config.rank
        results["states"][name] = {
            "numbers": keys * config.rank, "seconds": time.monotonic() - started,
            "exact": [exact(keys, n) for n in facts], "right": [right[n].to_dict() for n in facts],
        }  # fmt: skip
        row = ", ".join(f"{n}: {right[n].text()} ({exact(keys, n):.3f})" for n in facts)
        print(f"state {name}, right answers by number of facts (exact for {keys} keys): {row}", flush=True)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / JSON_NAME).write_text(json.dumps(results, indent=1) + "\n")
        print(args.out / JSON_NAME)
        print(draw(results, args.out / PICTURE_NAME))
    return 0


class _Progress:
    """A line to stderr every tenth of the steps of one state, with the time left for all."""

    started = 0.0

    def __init__(self, name: str, number: int, args: argparse.Namespace) -> None:
        self.name, self.before, self.steps = name, number * args.steps, args.steps
        self.total = len(args.states) * args.steps
        _Progress.started = _Progress.started if number else time.monotonic()

    def __call__(self, step: int, loss: float) -> None:
        if step % max(1, self.steps // 10) == 0 or step == self.steps:
            done = self.before + step
            left = (time.monotonic() - _Progress.started) / done * (self.total - done)
            line = f"state {self.name}: step {step}/{self.steps} | loss {loss:.3f} | eta {left:.0f}s"
            print(line, file=sys.stderr, flush=True)


def draw(results: dict[str, Any], path: Path) -> Path:
    """Right answers over the number of facts, a line and a dashed reference for each state."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.5, 4.2), constrained_layout=True)
    for number, (name, state) in enumerate(results["states"].items()):
        color, right = f"C{number}", state["right"]
        errors = [[r["mean"] - r["low"] for r in right], [r["high"] - r["mean"] for r in right]]
        states, _, rank = name.rpartition("x")
        label = f"{states + ' of ' if states else ''}rank {rank} ({state['numbers']:,} numbers)"
        ax.errorbar(results["facts"], [r["mean"] for r in right], errors, color=color, marker="o", label=label)
        ax.plot(results["facts"], state["exact"], color=color, linestyle="--", linewidth=1)
    ax.axhline(1 / results["values"], color="gray", linestyle=":", linewidth=1, label="chance")
    ax.set_xscale("log", base=2)
    ax.set_xticks(results["facts"], [str(n) for n in results["facts"]])
    ax.set(xlabel="facts told (dashed: r orthogonal keys exactly, the others guessed)", ylabel="right answers")
    ax.set_ylim(0, 1.03)
    ax.legend(fontsize=8, title="state")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
