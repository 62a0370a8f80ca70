"""`dla preflight`: checks the nodes of a job before the training. Runs as one process on every node.

1. Every node checks its GPUs, disks and versions and writes preflight/ATTEMPT/HOST.json.
2. When all reports exist, or after the timeout, the healthy nodes start one rank per GPU (one without GPUs): a matmul
   on its own, then an all-reduce over all ranks. preflight/ATTEMPT/group/rankR.json has the last stage of each rank.
3. Every node evaluates all reports (`verdict.judge`); the first one to finish appends the bad nodes to
   runs/NAME/bad_nodes.

The nodes communicate through files in the run directory, which also detects a node that does not share it. This module
needs the standard library only; torch is imported in the ranks of step 2.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megatron_dla.environment import environment_number
from megatron_dla.errors import BAD_INPUT, UserError
from megatron_dla.files import create_json, parse_json, write_json
from megatron_dla.launch.health import NodeReport, check_node
from megatron_dla.launch.verdict import STAGES, Limits, RankReport, Verdict, judge, own_problems
from megatron_dla.training.fence import attempt_id, node_name

BAD_NODES = "bad_nodes"
FOUND_BAD = 3  # exit code
POLL_S = 0.1
LONGEST_S = 7 * 86400  # of --timeout
FIX = "unset it"  # outside Slurm; in a job Slurm or the batch script sets it


def _wait_for(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _job_hosts() -> list[str]:
    """The nodes of this Slurm step; empty outside Slurm or if scontrol fails."""
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if not nodes or not shutil.which("scontrol"):
        return []
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else []


def _check_options(args: argparse.Namespace) -> None:
    """UserError for a value that no node could be judged by; a NaN is one, too."""
    for name, good, wanted in (
        ("--nodes", args.nodes >= 1, "at least 1"),
        ("--gpus", args.gpus >= 0, "at least 0"),
        ("--timeout", 0 < args.timeout <= LONGEST_S, f"more than 0, and at most {LONGEST_S}"),
        ("--port", 0 <= args.port <= 65535, "0 to 65535"),
        ("--min-disk-gb", 0 <= args.min_disk_gb < math.inf, "at least 0"),
        ("--checkpoint-gb", 0 <= args.checkpoint_gb < math.inf, "at least 0"),
        ("--slow", args.slow >= 1, "at least 1"),
        ("--clock-skew", args.clock_skew >= 0, "at least 0"),
    ):
        if not good:
            raise UserError(f"{name} {getattr(args, name[2:].replace('-', '_'))}: want {wanted}")


class Preflight:
    """Preflight of this node. `args`: parsed by `add_preflight_arguments`."""

    def __init__(self, args: argparse.Namespace) -> None:
        _check_options(args)
        job = environment_number("SLURM_JOB_ID", 0, FIX)
        restarts = environment_number("SLURM_RESTART_COUNT", 0, FIX)
        self.order = environment_number("SLURM_NODEID", 0, FIX)
        named = environment_number("MASTER_PORT", 10000 + job % 10000, f"{FIX}, or pass --port", 1, 65535)
        self.port = args.port or named
        if "DLA_ATTEMPT" not in os.environ and "SLURM_JOB_ID" in os.environ:
            os.environ["DLA_ATTEMPT"] = f"{job}.{restarts}"
        if args.nodes > 1 and "DLA_ATTEMPT" not in os.environ:
            raise UserError(f"--nodes {args.nodes} outside Slurm: set DLA_ATTEMPT to the same name on all nodes")
        self.args, self.run_dir = args, args.run_dir
        self.limits = Limits(args.slow, args.clock_skew, args.min_disk_gb, args.checkpoint_gb)
        self.folder = self.run_dir / "preflight" / attempt_id()
        self.hosts = [host for host in args.hosts.split(",") if host] if args.hosts else _job_hosts()
        self.host = node_name()

    def run(self) -> int:
        """Exit code: 0 if all nodes are good, 3 if not."""
        address = os.environ.get("MASTER_ADDR") if self.order == 0 else None
        report = NodeReport(self.host, self.order, address or platform.node(), time.time())
        check_node(report, self.run_dir, self.args.tmp, self.args.gpus)
        for problem in own_problems(report, self.args.gpus, self.limits):
            print(f"{self.host}: {problem}", flush=True)
        try:
            (self.folder / "group").mkdir(parents=True, exist_ok=True)
            write_json(self.folder / f"{self.host}.json", asdict(report), fsync=False)
        except OSError as error:  # the other nodes report it as missing
            print(f"bad node {self.host}: cannot write its report: {error}", flush=True)
            return FOUND_BAD
        _wait_for(lambda: len(self._reports()) >= self.args.nodes, self.args.timeout if self.args.nodes > 1 else 0)
        members = self._agree_on_members()
        ranks = self._check_together(members) if members else []
        verdict = judge(
            self._reports(), ranks, nodes=self.args.nodes, hosts=self.hosts, gpus=self.args.gpus, limits=self.limits
        )
        self._announce(verdict, ranks, report)
        return 0 if verdict.good else FOUND_BAD

    def _reports(self) -> list[NodeReport]:
        reports = [NodeReport.from_json(parse_json(path.read_bytes())) for path in self.folder.glob("[!.]*.json")]
        return sorted(reports, key=lambda r: (r.order, r.host))

    def _agree_on_members(self) -> list[NodeReport]:
        """The nodes of the group check, as the first node past the wait for reports wrote them."""
        if self.args.node_only:
            return []
        healthy = [r for r in self._reports() if not own_problems(r, self.args.gpus, self.limits)]
        path = self.folder / "group" / "members.json"
        create_json(path, {"members": [asdict(report) for report in healthy]})
        return [NodeReport.from_json(values) for values in parse_json(path.read_bytes())["members"]]

    def _check_together(self, members: list[NodeReport]) -> list[RankReport]:
        """Run this node's ranks of the group check, if it is a member, and wait for the ranks of the other nodes."""
        per_node = max(1, self.args.gpus)
        world, folder = per_node * len(members), self.folder / "group"
        deadline = time.monotonic() + self.args.timeout
        mine = next((n for n, member in enumerate(members) if member.host == self.host), None)
        if mine is not None:
            ranks = range(mine * per_node, (mine + 1) * per_node)
            self._run_ranks(ranks, world, members[0].address, deadline)
        paths = [folder / f"rank{rank}.json" for rank in range(world)]

        def read() -> dict[int, RankReport]:
            return {n: RankReport(**parse_json(path.read_bytes())) for n, path in enumerate(paths) if path.exists()}

        def all_ended() -> bool:
            found = read().values()
            return len(found) == world and all(r.error or r.stage == STAGES[-1] for r in found)

        _wait_for(all_ended, max(0.0, deadline - time.monotonic()) + 5)
        silent = {n: RankReport(n, members[n // per_node].host) for n in range(world)}
        return list((silent | read()).values())

    def _run_ranks(self, ranks: range, world: int, address: str, deadline: float) -> None:
        """One process per GPU; those that have not ended by the deadline are killed."""
        children = []
        for local, rank in enumerate(ranks):
            gpu = str(local) if self.args.gpus else "cpu"
            path = self.folder / "group" / f"rank{rank}.json"
            names = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": address, "MASTER_PORT": self.port}
            env = os.environ | {name: str(value) for name, value in names.items()}
            module = "megatron_dla.launch.group_check"
            command = [sys.executable, "-m", module, str(path), str(self.args.timeout), gpu]
            children.append((path, subprocess.Popen(command, env=env)))
        for path, child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
                continue
            except subprocess.TimeoutExpired:
                child.kill()
            if path.exists():
                values = parse_json(path.read_bytes())
                values["error"] = values["error"] or f"not finished within {self.args.timeout:g} s"
                write_json(path, values, fsync=False)

    def _announce(self, verdict: Verdict, ranks: list[RankReport], report: NodeReport) -> None:
        """Print and record the verdict, on the first node that has it; all nodes reach the same one."""
        if not create_json(self.folder / "group" / "verdict.json", asdict(verdict)):
            return
        for skipped in report.left_out:
            print(f"skipped: {skipped}")
        for name, times in (
            ("matmul", [r.matmul_ms for r in ranks if r.matmul_ms is not None]),
            ("all-reduce", [r.all_reduce_ms for r in ranks if r.all_reduce_ms is not None]),
        ):
            if times:
                print(f"{name}: {min(times):.2f} to {max(times):.2f} ms on {len(times)} rank(s)")
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for host, reasons in verdict.bad.items():
            print(f"bad node {host}: {'; '.join(reasons)}")
            with (self.run_dir / BAD_NODES).open("a") as file:
                file.write(f"{host}  # {'; '.join(reasons)}, {when}\n")
        for reason in verdict.unnamed:
            print(f"failed: {reason}")
        if verdict.good:
            print(f"preflight: {self.args.nodes} node(s) good")
        sys.stdout.flush()


def add_preflight_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Limits()
    for name, kind, default, text in (
        ("--nodes", int, 1, "number of nodes that run this command"),
        ("--gpus", int, 0, "GPUs required on each node; 0: CPU nodes"),
        ("--timeout", float, 60, "s to wait for all reports, and again for the group check"),
        ("--port", int, 0, "port of the group check; 0: MASTER_PORT"),
        ("--min-disk-gb", float, defaults.free_gb, "required free space on each disk, in GB"),
        ("--checkpoint-gb", float, 0.0, "size of a checkpoint, for which the run directory needs room, in GB"),
        ("--slow", float, defaults.slow, "a GPU is bad if its matmul takes more than this times the median"),
        ("--clock-skew", float, defaults.skew_s, "largest difference of a node's clock from the median, in s"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"{text} (default {default})")
    parser.add_argument("--run-dir", type=Path, required=True, help="runs/NAME, on a file system shared by all nodes")
    hosts = "comma-separated names of the nodes (default: from scontrol in a Slurm step)"
    parser.add_argument("--hosts", default="", help=hosts)
    parser.add_argument("--node-only", action="store_true", help="skip the matmul and the all-reduce")
    temporary = Path(tempfile.gettempdir())
    parser.add_argument(
        "--tmp", type=Path, default=temporary, help="directory on a local disk (default: TMPDIR or /tmp)"
    )


def preflight(args: argparse.Namespace) -> int:
    """Exit codes: 0 all nodes are good, 3 some are not (listed in bad_nodes if they can be identified), 2 bad usage."""
    return Preflight(args).run()


def add_preflight_parser(subparsers) -> None:
    parser = subparsers.add_parser("preflight", help="check the nodes of a job before training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_preflight_arguments(parser)
    parser.set_defaults(func=preflight)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_dla.launch.preflight")
    add_preflight_arguments(parser)
    try:
        return preflight(parser.parse_args(argv))
    except UserError as error:
        print(f"dla preflight: {error}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
