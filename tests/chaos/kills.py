"""Seeded kills of training runs. Each is resumed, and must equal an undisturbed run bit for bit.

    python -m tests.chaos.kills [--kills 50] [--seed N] [--minutes M] [--layouts tp2 zero3] [--forked]

A rank, all ranks or the launcher get SIGKILL, a third of the times while a checkpoint is being saved. After each kill
no process may be left, and what is saved and logged must be what the undisturbed run saved and logged; after the last
one the run is finished, and no file may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_dla.checkpoint.find import complete_checkpoints
from megatron_dla.files import load_tensors
from megatron_dla.training.fence import process_start
from tests.chaos import starts
from tests.support import tiny

LAYOUTS: dict[str, dict[str, dict[str, int]]] = {
    "tp2": {"parallel": {"tensor_model_parallel_size": 2}, "training": {"zero_stage": 0}},
    "dp2": {"training": {"zero_stage": 0}},
    "zero1": {"training": {"zero_stage": 1}},
    "zero3": {"training": {"zero_stage": 3}},
}
SAVE_EVERY = 2
LIMIT_S = 300  # of a start, an end and a step: a busy machine
SAME = ("step", "loss", "grad_norm", "lr", "tokens", "data_crc32", "epoch")
MARK = "DLA_CHAOS_RUN"


@dataclass
class Kill:
    """SIGKILL for `target` ("rank", "ranks", "launcher") at `step`, or in the first save after it, `delay` s later."""

    target: str
    step: int
    saving: bool
    delay: float


def plan(rng: random.Random, count: int, length: int) -> list[Kill]:
    """Kills of a run of `length` steps, in the order of their steps; a third of them, rounded up, in saves."""
    steps = sorted(rng.sample(range(1, length - SAVE_EVERY - 1), count))
    saving = [number < -(-count // 3) for number in range(count)]
    targets = [("rank", "ranks", "launcher")[number % 3] for number in range(count)]
    rng.shuffle(saving)
    rng.shuffle(targets)
    return [Kill(t, n, s, rng.uniform(0, 0.02 if s else 0.1)) for t, n, s in zip(targets, steps, saving, strict=True)]


def processes(mark: str) -> set[int]:
    """Processes whose environment, or whose session's leader's, holds the mark."""
    found, sessions = set(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if state in "ZX":
                continue
            sessions[int(folder.name)] = int(session)
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except OSError:  # has just ended
            continue
    return found | {pid for pid, session in sessions.items() if session in found}


class Run:
    """One run of a layout in `folder`, with a temporary directory of its own."""

    def __init__(self, folder: Path, name: str, data: Path, layout: str, options: argparse.Namespace) -> None:
        self.dir, self.tmp, self.log = folder / name, folder / f"{name}.tmp", folder / f"{name}.log"
        self.tmp.mkdir()
        self.start_process = starts.start_forked if options.forked else starts.start_real
        sections: dict[str, dict[str, Any]] = {k: dict(v) for k, v in LAYOUTS[layout].items()}
        sections |= {"run": {"name": name}, "model": {"num_layers": 1}}
        sections.setdefault("training", {}).update(
            steps=options.steps,
            save_every=SAVE_EVERY,
            keep_checkpoints=0 if name == "straight" else 3,
            global_batch_size=4,
        )
        self.config = folder / f"{name}.yaml"
        values = tiny.config_dict(data, folder, **sections)
        values["data"]["seq_len"] = 32
        self.config.write_text(yaml.safe_dump(values))
        self.mark = f"{os.getpid()}.{folder.name}.{name}"

    def start(self) -> None:
        self.log.write_text("")
        env = {"TMPDIR": str(self.tmp), "OMP_NUM_THREADS": "1", MARK: self.mark}
        env["TORCHINDUCTOR_CACHE_DIR"] = str(self.tmp.parent / "cache")  # of all runs of a user, in TMPDIR by default
        self.process = self.start_process([str(self.config), "--nproc", "2"], self.log, env)

    def finish(self) -> None:
        self.start()
        code = self.process.wait(LIMIT_S)
        assert code == 0, f"exit code {code}:\n{self.log.read_text()[-3000:]}"

    def until(self, step: int) -> None:
        """Wait until this attempt has printed a step, at least `step`."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            steps = re.findall(r"^step +(\d+)/.*\n", self.log.read_text(), flags=re.MULTILINE)
            if steps and int(steps[-1]) >= step:
                return
            assert self.process.poll() is None, f"ended by itself:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"no step {step}:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.002)

    def partials(self) -> list[Path]:
        return list((self.dir / "checkpoints").glob("*.partial"))

    def kill(self, kill: Kill, rng: random.Random) -> bool:
        """Start and kill; returns whether that cut a save short."""
        self.start()
        self.until(kill.step)
        deadline = time.monotonic() + LIMIT_S
        while kill.saving and not self.partials():
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.001)
        time.sleep(kill.delay)
        attempt = json.loads((self.dir / "attempt").read_text())["attempt"]
        ranks = [json.loads(path.read_text())["pid"] for path in (self.dir / "ranks" / attempt).glob("rank*.json")]
        assert len(ranks) == 2, ranks
        victims = {"rank": [rng.choice(ranks)], "ranks": ranks, "launcher": [self.process.pid]}[kill.target]
        if kill.target == "launcher":  # so that only the end of the launcher can end them
            for pid in ranks:
                os.kill(pid, signal.SIGSTOP)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        code = self.process.wait(LIMIT_S)
        assert code == (-signal.SIGKILL if kill.target == "launcher" else 1), f"exit code {code}"
        deadline = time.monotonic() + 30
        while orphans := processes(self.mark) | {pid for pid in ranks if process_start(pid) is not None}:
            assert time.monotonic() < deadline, f"left running: {orphans}"
            time.sleep(0.02)
        return bool(self.partials())

    def metrics(self) -> dict[int, dict[str, Any]]:
        """Step -> what the run logged, without times; a kill may cut the last line short."""
        *whole, rest = (self.dir / "metrics.jsonl").read_text().split("\n")
        found = [json.loads(line) for line in whole]
        assert len({m["step"] for m in found}) == len(found), "a step is logged twice"
        return {m["step"]: {key: m.get(key) for key in SAME} for m in found}


def compare(run: Run, straight: Run) -> int:
    """Compare what is saved and logged; returns the step of the newest checkpoint, 0 without one."""
    want = straight.metrics()
    for step, metrics in run.metrics().items():
        assert metrics == want[step], f"step {step} differs: {metrics}, undisturbed {want[step]}"
    found = complete_checkpoints(run.dir)
    for _, path in found:
        other = straight.dir / "checkpoints" / path.name
        files = sorted(p.relative_to(path) for p in path.rglob("*.safetensors"))
        assert files and files == sorted(p.relative_to(other) for p in other.rglob("*.safetensors")), path
        for name in files:
            (a, _), (b, _) = load_tensors(path / name), load_tensors(other / name)
            different = a.keys() ^ b.keys() or {k for k in a if not torch.equal(a[k], b[k])}
            assert not different, f"{path / name} differs from the undisturbed run's in {sorted(different)[:3]}"
        states = [json.loads((p / "data_state.json").read_text()) for p in (path, other)]
        assert states[0] == states[1], f"the data position of {path} differs"
    return found[-1][0] if found else 0


def leftovers(run: Run) -> list[str]:
    """Files that no run needs: temporary ones, parts of checkpoints, errors for a launcher."""
    whole = {path for _, path in complete_checkpoints(run.dir)}
    found = [path for path in (run.dir / "checkpoints").iterdir() if path not in whole]
    found += [path for path in run.dir.rglob("*") if path.name.endswith(".part") or ".launch" in path.parts]
    return [str(path) for path in (*found, *run.tmp.iterdir())]


def chain(folder: Path, data: Path, layout: str, rng: random.Random, count: int, options: argparse.Namespace) -> int:
    """Kill one run `count` times, then finish it; returns how many kills there were before the time limit."""
    folder.mkdir()
    straight, run = (Run(folder, name, data, layout, options) for name in ("straight", "killed"))
    straight.finish()
    done = 0
    for kill in plan(rng, count, options.steps):
        if time.monotonic() > options.deadline:
            break
        started = time.monotonic()
        cut = run.kill(kill, rng)
        newest = compare(run, straight)
        done += 1
        options.done += 1
        where = "cutting a save short" if cut else "after a save" if kill.saving else "in a step"
        print(
            f"[{options.done}/{options.kills}] seed {options.seed} {layout}: killed {kill.target} at step "
            f"{kill.step}, {where}; newest checkpoint {newest}, {time.monotonic() - started:.1f} s",
            flush=True,
        )
        options.cut += cut
    run.finish()
    assert compare(run, straight) == options.steps
    assert run.metrics().keys() == straight.metrics().keys()
    assert not (left := leftovers(run)), f"left behind: {left}"
    print(f"{layout}: equal to the undisturbed run after {done} kills; no process and no file left", flush=True)
    return done


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.kills", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="default: a new one")
    parser.add_argument("--minutes", type=float, default=27, help="start no kill after this time")
    parser.add_argument("--steps", type=int, default=40, help="of a run; at least four more than kills a layout")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--forked", action="store_true", help="fork the processes of a run instead of starting them")
    options = parser.parse_args(argv)
    options.deadline, options.done, options.cut = time.monotonic() + 60 * options.minutes, 0, 0
    if options.forked:
        starts.preload()
    rng, layouts = random.Random(options.seed), options.layouts
    print(f"seed {options.seed}: {options.kills} kills over {', '.join(layouts)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="dla-chaos-") as folder:
        data = tiny.build_data(Path(folder) / "corpus")
        for number, layout in enumerate(layouts):
            count = (options.kills + number) // len(layouts)
            if count:
                chain(Path(folder) / layout, data, layout, rng, count, options)
    print(
        f"{options.done} kills, {options.cut} of which cut a save short: all resumed bit for bit (seed {options.seed})"
    )
    if options.done < options.kills:
        print(f"only {options.done} of {options.kills} kills in {options.minutes:g} minutes: give more --minutes")
    return int(options.done < options.kills)


if __name__ == "__main__":
    sys.exit(main())
