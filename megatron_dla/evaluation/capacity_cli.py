"""`dla eval capacity`: arguments, table, JSON and picture."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dla.errors import ConfigError, UserError
from megatron_dla.evaluation.cli import check_counts
from megatron_dla.files import check_out, write_json

if TYPE_CHECKING:
    from megatron_dla.adapters.config import DeltaMemConfig

JSON_NAME, PICTURE_NAME = "capacity.json", "capacity.png"
MOST_EPISODES = 100_000
FIXED = {
    "rank": "by --states", "num_states": "by --states", "memory": "here: online", "write": "here: token",
    "target_modules": "here: o_proj", "layers_to_transform": "here: there is one layer",
}  # fmt: skip


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
    parser.add_argument(
        "--facts", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], 
        help="default: 1 2 4 ... 64; it is trained on as many as the largest of them, and on fewer",
    )  # fmt: skip
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="other keys of delta_mem, such as beta_bias=-3"
    )
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of 32 rows (default: 3000)")
    parser.add_argument("--episodes", type=int, default=200, help="asked at each number of facts (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and facts (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write capacity.json and capacity.png")
    parser.set_defaults(func=_capacity)


def _settings(pairs: list[str]) -> dict[str, Any]:
    """Keys of delta_mem. Raises UserError."""
    from megatron_dla.config.load import parse_override

    found: dict[str, Any] = {}
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--set {pair}: write KEY=VALUE")
        (*_, key), value = parse_override(pair.removeprefix("delta_mem."))
        if key in FIXED or key in found:
            raise UserError(f"--set {pair}: {key} is given {'twice' if key in found else FIXED[key]}")
        found[key] = value
    return found


def _states(texts: list[str], settings: dict[str, Any]) -> dict[str, DeltaMemConfig]:
    """{R or NxR: config}. Raises UserError."""
    from megatron_dla.adapters.config import DeltaMemConfig
    from megatron_dla.config.load import fill

    found: dict[str, DeltaMemConfig] = {}
    for text in texts:
        match = re.fullmatch(r"(?:([0-9]{1,3})x)?([0-9]{1,3})", text)
        if match is None:
            raise UserError(f"--states {text}: write a rank, or NxR for N states of rank R, such as 4x8")
        states, rank = int(match[1] or 1), int(match[2])
        name = f"{rank}" if states == 1 else f"{states}x{rank}"
        if name in found:
            raise UserError(f"--states {text}: is given twice")
        # it starts with a correction of the reads' own size: there is no base that it could disturb
        start = {"output_init": "random", "output_gain": 1.0, "target_modules": ["o_proj"]}
        own = {"num_states": states, "rank": rank}
        try:
            fill(DeltaMemConfig, own, "delta_mem")
        except ConfigError as error:
            raise UserError(f"--states {text}: {error}") from error
        found[name] = fill(DeltaMemConfig, start | settings | own, "delta_mem")
    return found


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for invalid arguments."""
    from megatron_dla.evaluation.capacity import KEYS

    check_counts(args, {"steps": 1, "episodes": 2, "seed": 0, "threads": 1})
    for name, values, most in (("facts", args.facts, KEYS), ("episodes", [args.episodes], MOST_EPISODES)):
        if wrong := [value for value in values if not 1 <= value <= most]:
            raise UserError(f"--{name} {wrong[0]}: use 1 to {most}")
    check_out(args.out)


def _capacity(args: argparse.Namespace) -> int:
    _check(args)
    facts, states = sorted(set(args.facts)), _states(args.states, _settings(args.set))
    import torch

    from megatron_dla.evaluation.capacity import VALUES, Training, exact, measure, train
    from megatron_dla.machine import made_here
    from megatron_dla.tasks.run import versions

    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "facts": facts, "values": VALUES, "steps": args.steps, "episodes": args.episodes, "seed": args.seed,
        "versions": versions(), **made_here(), "states": {},
    }  # fmt: skip
    progress = _Progress(len(states) * args.steps)
    for name, config in states.items():
        started = time.monotonic()
        model = train(config, facts[-1], Training(steps=args.steps), args.seed, progress.of(name, args.steps))
        right = {n: measure(model, n, args.episodes, args.seed) for n in facts}
        limits = [exact(config.rank, n) for n in facts] if config.num_states == 1 else None
        results["states"][name] = {
            "config": asdict(config), "numbers": config.num_states * config.rank**2,
            "seconds": time.monotonic() - started, "right": [right[n].to_dict() for n in facts], "exact": limits,
        }  # fmt: skip
        rows = [f"{n}: {right[n].text()}" + (f" ({limits[i]:.3f})" if limits else "") for i, n in enumerate(facts)]
        about = f" ({config.rank} orthogonal keys exactly)" if limits else ""
        print(f"state {name}, right answers by number of facts{about}: {', '.join(rows)}", flush=True)
        if args.out is not None:  # what there is stays where a later state is stopped
            args.out.mkdir(parents=True, exist_ok=True)
            write_json(args.out / JSON_NAME, results, indent=1)
    if args.out is not None:
        print(args.out / JSON_NAME)
        print(draw(results, args.out / PICTURE_NAME))
    return 0


class _Progress:
    """Lines to stderr, every tenth of the steps of a state, with the time left for all. `total`: of all states."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()

    def of(self, name: str, steps: int) -> Callable[[int, float], None]:
        from megatron_dla.metrics.meters import clock

        def show(step: int, loss: float) -> None:
            self.done += 1
            if step % max(1, steps // 10) == 0 or step == steps:
                left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
                line = f"state {name}: step {step}/{steps} | loss {loss:.3f} | eta {clock(left)}"
                print(line, file=sys.stderr, flush=True)

        return show


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
        if state["exact"] is not None:
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
