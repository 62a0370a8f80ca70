"""`dla bench gpu`: everything that needs a GPU, stage by stage, in one command of under nine minutes.

A stage is a command of its own: one that hangs or breaks the device is stopped at its limit and does not take the
others along. After each stage gpu_<card>.json has the results so far; what a stage prints is beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dla.errors import UserError

from ..common.tuned import gpu_slug
from .report import environment, write_json
from .stages import CheckFailed, Skipped, Stages

DLA = (sys.executable, "-m", "megatron_dla.cli")
SMOKE = (*DLA, "smoke", "--device", "cuda")
KERNELS = (
    *DLA,
    "bench",
    "kernels",
    "--device",
    "cuda",
    "--dims",
    "128",
    "--capacities",
    "30",
    "15",
    "--budget",
    "0.15",
)
LEAST = 10.0  # seconds that must be left for a stage to be started


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        argv: the command; {out} and {seed} are filled in.
        limit: seconds after which it is stopped.
        needs: a program that must be installed; without it the stage is skipped.
        wrong: a line of the output that starts with this means failure, whatever the exit code.
    """

    name: str
    argv: tuple[str, ...]
    limit: float
    needs: str = ""
    wrong: str = ""


# in the order of what is wanted most, since the total limit cuts the end
STAGES = (
    Stage("correctness", (*SMOKE, "--kernels-only", "--seed", "{seed}", "--out", "{out}"), 170.0),
    Stage("step", (*DLA, "bench", "ledger", "dla_mamba2_780m", "--counts-only", "--measure", "--out", "{out}"), 100.0),
    Stage("kernels", (*KERNELS, "--lengths", "8192", "16384", "32768", "--seed", "{seed}", "--out", "{out}"), 150.0),
    Stage("decode", (*KERNELS, "--decode-only", "--seed", "{seed}", "--out", "{out}"), 60.0),
    Stage("generation", (sys.executable, "-m", "megatron_dla.kernels.bench.generation", "--out", "{out}"), 60.0),
    Stage(
        "racecheck",
        ("compute-sanitizer", "--tool", "racecheck", sys.executable, "-m", "megatron_dla.kernels.bench.race"),
        90.0, needs="compute-sanitizer", wrong="========= ERROR",
    ),
    Stage("tune", (*KERNELS, "--tune", "--lengths", "16384"), 90.0),
)  # fmt: skip


def chosen(names: list[str] | None, stages: tuple[Stage, ...] = STAGES) -> list[Stage]:
    """The stages of these names in the table's order. Raises UserError for one that does not exist."""
    known = [stage.name for stage in stages]
    for name in names or []:
        if name not in known:
            raise UserError(f"--stages {name}: want some of {' '.join(known)}")
    return [stage for stage in stages if names is None or stage.name in names]


def run_stage(stage: Stage, out: Path, seed: int, seconds: float) -> list[str]:
    """Run a stage for at most `seconds`; what it prints goes to {name}.txt in `out`.

    Returns:
        The last lines of the output.

    Raises:
        Skipped: a program is missing. CheckFailed: it failed, or was stopped.
    """
    if stage.needs and shutil.which(stage.needs) is None:
        raise Skipped(f"{stage.needs} is not installed")
    argv = [part.format(out=out, seed=seed) for part in stage.argv]
    log = out / f"{stage.name}.txt"
    with log.open("w") as sink:
        sink.write(f"$ {' '.join(argv)}\n")
        sink.flush()
        process = subprocess.Popen(
            argv, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except BaseException as error:  # the whole group: a compiler that it started as well
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise CheckFailed(f"stopped after {seconds:.0f} s; {log} has what it printed") from error
            raise
    lines = log.read_text(errors="replace").splitlines()
    wrong = [line for line in lines if stage.wrong and line.startswith(stage.wrong)]
    if code or wrong:
        raise CheckFailed(f"{wrong[0] if wrong else f'exit code {code}'}; see {log}")
    return lines[-3:]


def bench_gpu(args: argparse.Namespace, stages: tuple[Stage, ...] = STAGES) -> int:
    """Exit code 0, or 1 where a stage failed or was stopped. Raises UserError for a request that cannot be run."""
    wanted = chosen(args.stages, stages)
    if not 0 < args.limit < 1e6:
        raise UserError(f"--limit {args.limit:g}: want seconds, more than 0")
    if args.seed is not None and not 0 <= args.seed < 2**31:
        raise UserError(f"--seed {args.seed}: want a number in [0, 2^31)")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {str(args.out)!r} is a file: give a directory")
    if not torch.cuda.is_available():
        raise UserError("gpu: no CUDA device on this machine: on a CPU use `dla smoke` and `dla bench kernels`")
    return run_stages(wanted, environment(torch.device("cuda")), args)


def run_stages(wanted: list[Stage], facts: dict[str, Any], args: argparse.Namespace) -> int:
    """Run them under the total limit and write {out}/gpu_<card>.json after each; 0 if none failed."""
    seed = int(time.time()) % 2**31 if args.seed is None else args.seed
    args.out.mkdir(parents=True, exist_ok=True)
    out, path = args.out.resolve(), args.out / f"gpu_{gpu_slug(facts.get('gpu', 'none'))}.json"
    begin, results = time.monotonic(), Stages(total=len(wanted))
    print(f"{facts.get('gpu', 'no GPU')}, torch {facts['torch']}; seed {seed}; results in {path}", flush=True)
    for stage in wanted:
        left = args.limit - (time.monotonic() - begin)

        def run(stage: Stage = stage, left: float = left) -> None:
            if left < LEAST:
                raise Skipped(f"{left:.0f} s are left of --limit {args.limit:g}")
            for line in run_stage(stage, out, seed, min(stage.limit, left)):
                results.say(line)

        results.say(f"{left:.0f} s left, at most {stage.limit:.0f} s for this stage")
        results.run(stage.name, run)
        write_json(path, {**facts, "seed": seed, "wall_s": round(time.monotonic() - begin, 1),
                          "stages": results.as_dicts()})  # fmt: skip
    return 0 if results.summary() else 1
