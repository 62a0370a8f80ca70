#!/usr/bin/env python3
"""DLA_PYTHON of the launcher tests: replaces torchrun with its ranks, and preflight; runs the real Python otherwise.

One process per node simulates all ranks of the node, without torch, with the files of the trainer: checkpoints with
their marker, stop, halt, done, heartbeat, attempt, records of exits. Options, in the environment:

STUB_STEPS     length of the run (40)           STUB_SECONDS   of a step (0.05)
STUB_SAVE      steps between checkpoints (10)   STUB_DEAF      ignores `stop`
STUB_AFTER     remaining steps of an attempt that resumes from a checkpoint
STUB_TERM      after TERM, ends once the batch script has logged its own TERM, or after this many seconds (0)
STUB_CRASH     STEP:NODE:CODE[:always]; without "always" only in the first attempt. CODE -9: killed
STUB_BAD       node that fails preflight: its rank (or all) [:always], otherwise only in the first attempt
STUB_HALT      create `halt` during `preflight` or the `report` of a failure
STUB_REPORT    seconds that the report of a failure takes (0); it creates the file `reporting` at its start
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

ENV = os.environ


def write(path: Path, text: str) -> None:
    """Atomically, as the trainer does: the other processes read these files at any time."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    os.replace(part, path)


def as_rank(options: argparse.Namespace, command: list[str]) -> int:
    keys = dict(text.split("=", 1) for text in command if "=" in text)
    for key in ("run.dir", "run.name"):  # quoted YAML: a name like 007 is not a number
        assert keys[key][0] == keys[key][-1] == "'", command
        keys[key] = keys[key][1:-1].replace("''", "'")
    run, attempt, node = Path(keys["run.dir"]) / keys["run.name"], ENV["DLA_ATTEMPT"], options.node_rank
    host = ENV["SLURMD_NODENAME"]
    checkpoints = run / "checkpoints"
    step = max((int(p.parent.name[5:]) for p in checkpoints.glob("step_*/complete.json")), default=0)
    print(
        f"start node={node} host={host} attempt={attempt} step={step} nnodes={options.nnodes} "
        f"nproc={options.nproc_per_node} master={options.master_addr}:{options.master_port} "
        f"gpus={ENV.get('CUDA_VISIBLE_DEVICES')} cache={os.path.isdir(ENV['TRITON_CACHE_DIR'])}",
        flush=True,
    )
    if node == 0:
        write(run / "attempt", attempt)
        if not asked_to_stop(run):
            (run / "stop").unlink(missing_ok=True)
    at, who, code, *always = (ENV.get("STUB_CRASH") or "-1:0:0").split(":")

    def save() -> None:
        if node == 0 and not (checkpoints / f"step_{step}" / "complete.json").exists():
            if (run / "attempt").read_text() != attempt:
                print(f"attempt {attempt} was taken over: it publishes nothing", flush=True)
                sys.exit(2)
            (checkpoints / f"step_{step}").mkdir(parents=True, exist_ok=True)
            write(checkpoints / f"step_{step}" / "complete.json", json.dumps({"step": step}))

    steps = int(ENV.get("STUB_STEPS", "40"))
    if step and "STUB_AFTER" in ENV:
        steps = step + int(ENV["STUB_AFTER"])
    while step < steps:
        time.sleep(float(ENV.get("STUB_SECONDS", "0.05")))
        step += 1
        if node == 0:
            write(run / "heartbeat.json", json.dumps({"step": step, "time": time.time(), "attempt": attempt}))
        if step == int(at) and (always or attempt.endswith(".0")):
            while node != int(who) or (node and reached(run) < step):
                time.sleep(0.01)  # as in a collective of the trainer, the other ranks cannot continue
            return crash(run, attempt, node * options.nproc_per_node, host, int(code))
        if step % int(ENV.get("STUB_SAVE", "10")) == 0:
            save()
        if not ENV.get("STUB_DEAF") and (asked_to_stop(run) or (run / "halt").exists()):
            save()
            together = (
                run / f"saved-{attempt}"
            )  # as the trainer's barrier: no rank exits before the checkpoint is complete
            if node == 0:
                together.touch()
            while not together.exists():
                time.sleep(0.02)
            print(f"  time      : 2026-01-01_00:00:00\n  host      : {host}\n  rank      : {node} (local_rank: 0)\n"
                  "  exitcode  : 75 (pid: 1)\n", flush=True)  # fmt: skip
            return 1  # torchrun's, whatever the rank's was
    save()
    if node == 0:
        write(run / "done", json.dumps({"step": step}))
    return 0


def asked_to_stop(run: Path) -> bool:
    """As `stop_mark` of the trainer's control files: a file from before the attempt does not count."""
    try:
        found = (run / "stop").stat()
    except FileNotFoundError:
        return False
    return f"{found.st_ino}.{found.st_mtime_ns // 10**9}.{found.st_mtime_ns % 10**9:09d}" != ENV["DLA_STALE_STOP"]


def reached(run: Path) -> int:
    """Rank 0's last step."""
    try:
        return int(json.loads((run / "heartbeat.json").read_text())["step"])
    except FileNotFoundError:
        return 0


def crash(run: Path, attempt: str, rank: int, host: str, code: int) -> int:
    print(f"rank {rank} crashes", flush=True)
    if code < 0:
        print(f"  time      : 2026-01-01_00:00:00\n  host      : {host}\n  rank      : {rank} (local_rank: 0)\n"
              f"  exitcode  : {code} (pid: 1)\n", flush=True)  # fmt: skip
        return 1
    folder = run / "exits" / attempt
    folder.mkdir(parents=True, exist_ok=True)
    record = {"rank": rank, "host": host, "exitcode": code, "message": "planted", "time": time.time()}
    write(folder / f"rank{rank}.json", json.dumps(record))
    return 1


def as_preflight(argv: list[str]) -> int:
    run, node, host = Path(argv[argv.index("--run-dir") + 1]), ENV["SLURM_NODEID"], ENV["SLURMD_NODENAME"]
    who, *always = (ENV.get("STUB_BAD") or "none").split(":")
    if ENV.get("STUB_HALT") == "preflight":
        (run / "halt").touch()
    refused = who in (node, "all") and (bool(always) or ENV["DLA_ATTEMPT"].endswith(".0"))
    if refused:
        with (run / "bad_nodes").open("a") as file:
            file.write(f"{host} # planted\n")
    (run / "preflight" / ENV["DLA_ATTEMPT"] / f"{host}.json").write_text(json.dumps({"good": not refused}))
    return 3 if refused else 0


def before_the_report(argv: list[str]) -> None:
    run = Path(argv[argv.index("--run-dir") + 1])
    (run / "reporting").touch()
    if ENV.get("STUB_HALT") == "report":
        (run / "halt").touch()
    time.sleep(float(ENV.get("STUB_REPORT", "0")))


def die(*_: object) -> None:
    end, log = time.monotonic() + float(ENV.get("STUB_TERM", "0")), Path(ENV["DLA_RUN_DIR"] + ".log")
    while time.monotonic() < end and not (log.exists() and "] terminated" in log.read_text(errors="replace")):
        time.sleep(0.1)
    sys.exit(143)


def main() -> int:
    argv = sys.argv[1:]
    module = argv[1] if argv[:1] == ["-m"] else ""
    if module == "megatron_dla.launch.failure":
        before_the_report(argv)
    if module == "megatron_dla.launch.preflight":
        return as_preflight(argv)
    if module != "torch.distributed.run":
        os.execv(ENV["STUB_REAL_PYTHON"], [ENV["STUB_REAL_PYTHON"], *argv])
    signal.signal(signal.SIGTERM, die)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--nnodes", "--node-rank", "--nproc-per-node", "--max-restarts", "--master-port"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--master-addr", required=True)
    parser.add_argument("--log-dir", required=True)
    rest = argv[2:]
    split = rest.index("-m")
    if rest[split : split + 3] != ["-m", "megatron_dla.cli", "train"]:
        raise SystemExit(f"not the trainer: {rest[split:]}")
    return as_rank(parser.parse_args(rest[:split]), rest[split + 3 :])


if __name__ == "__main__":
    sys.exit(main())
