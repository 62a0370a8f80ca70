"""How much a save delays the step after it, and what it adds to the peak memory of the ranks.

    python -m tests.checkpoint.save_delay [--steps 34] [--every 8] [--width 480] [--background | --no-background]

Two ranks train a model of some 30M parameters (ZeRO-1), with saves and then without. The interval from a save's step to
the next one, which holds all of the save that training waits for, is compared with the two before it and the two after
it: within minutes, the speed of a shared machine drifts by more than a save takes. Memory is the peak of both ranks
together, sampled, with saves and without. Exit code 1 where the mean delay is 10 % of a step or more, or the extra
memory 1.2 times the state or more. The machine should be idle.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.support import tiny

DELAY, MEMORY = 0.10, 1.2


@dataclass
class Trained:
    """Attributes: ends: by step, when it ended. resident: (time, bytes of both ranks). state: bytes of a checkpoint."""

    ends: dict[int, float]
    resident: list[tuple[float, int]]
    state: int

    def peak(self, first: float, last: float) -> int:
        return max(size for at, size in self.resident if first <= at < last)


def config_of(folder: Path, options: argparse.Namespace, name: str, save_every: int) -> Path:
    heads: dict[str, Any] = dict.fromkeys(("num_heads", "num_groups", "attention_heads", "attention_groups"), 8)
    values = tiny.config_dict(
        folder / "data", folder, run={"name": name}, checkpoint={"background": options.background},
        model=heads | {"hidden_size": options.width, "num_layers": 8, "ffn_hidden_size": 4 * options.width,
                       "key_dim": 32, "value_dim": 64},
        training={"steps": options.steps, "save_every": save_every, "zero_stage": 1, "global_batch_size": 4,
                  "micro_batch_size": 2, "keep_checkpoints": 2},
    )  # fmt: skip
    values["data"]["seq_len"] = 512
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def train(folder: Path, options: argparse.Namespace, name: str, save_every: int) -> Trained:
    command = [sys.executable, "-m", "megatron_dla.cli", "run", "--nproc", "2"]
    command.append(str(config_of(folder, options, name, save_every)))
    resident = []
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while process.poll() is None:
            try:
                children = psutil.Process(process.pid).children(recursive=True)
                resident.append((time.time(), sum(child.memory_info().rss for child in children)))
            except psutil.Error:  # has just ended
                pass
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit((folder / "log").read_text()[-3000:])
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    records = [record for line in lines if "loss" in (record := json.loads(line))]
    newest = next((folder / name / "checkpoints").glob(f"step_{options.steps}"))
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return Trained({record["step"]: record["time"] for record in records}, resident, size)


def around(intervals: dict[int, float], n: int, every: int) -> float:
    """Mean of the intervals two before and two after interval n, of those that hold no save."""
    near = [k for k in (n - 2, n - 1, n + 1, n + 2) if k in intervals and k % every]
    return statistics.mean(intervals[k] for k in near)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=34)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--width", type=int, default=480)
    parser.add_argument("--background", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        tiny.build_data(Path(place))
        saving = train(Path(place), options, "saving", options.every)
        control = train(Path(place), options, "control", 0)  # saves at its end
    intervals = {n: saving.ends[n + 1] - at for n, at in saving.ends.items() if n > 1 and n + 1 in saving.ends}
    longer = {n: x - around(intervals, n, options.every) for n, x in intervals.items()}
    saved = {n: x for n, x in longer.items() if n % options.every == 0}
    scatter = statistics.stdev(x for n, x in longer.items() if n not in saved)
    step = statistics.median(intervals.values())
    delay, error = statistics.mean(saved.values()) / step, scatter / step / len(saved) ** 0.5

    # of all steps: the memory of the first save is made after the first one
    peaks = [run.peak(0, run.ends[options.steps]) for run in (saving, control)]
    extra = (peaks[0] - peaks[1]) / saving.state
    print(f"state {saving.state / 1e6:.0f} MB; a step takes {step:.2f} s; it differs from those around it by "
          f"{scatter:.2f} s (standard deviation)")  # fmt: skip
    print("after a save " + ", ".join(f"{x:+.2f} s" for x in saved.values())
          + f": {delay:.1%} in the mean, with a standard error of {error:.1%}")  # fmt: skip
    print(f"peak memory of both ranks: {peaks[0] / 1e6:.0f} MB, without saves {peaks[1] / 1e6:.0f} MB: "
          f"{extra:.2f} times the state more")  # fmt: skip
    return int(delay >= DELAY or extra >= MEMORY)


if __name__ == "__main__":
    raise SystemExit(main())
