"""Decides which nodes are bad: a pure function of the reports of the nodes and of the ranks of the group check."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field

from megatron_dla.launch.health import Disk, NodeReport

IDLE_MB = 1024  # the driver of an idle GPU uses up to some hundred MB
STAGES = ("waiting for its start", "started", "matmul", "rendezvous", "all-reduce", "finished")


@dataclass
class RankReport:
    """preflight/ATTEMPT/group/rankR.json: progress and timings of one rank of the group check.

    `stage`: the last of STAGES that it entered. `clock`: unix time, read at the same moment on all ranks.
    """

    rank: int
    host: str
    gpu: int | None = None
    stage: str = STAGES[0]
    error: str = ""
    matmul_ms: float | None = None
    all_reduce_ms: float | None = None
    clock: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    pid: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank}" + (f" (GPU {self.gpu})" if self.gpu is not None else "")


@dataclass(frozen=True)
class Limits:
    """slow: multiple of the median. skew_s: s from the median clock. free_gb: GB on each disk. checkpoint_gb: of one
    checkpoint, for which the run directory needs room."""

    slow: float = 1.5
    skew_s: float = 2.0
    free_gb: float = 5.0
    checkpoint_gb: float = 0.0


@dataclass
class Verdict:
    """bad: {host: reasons}. unnamed: failures that cannot be attributed to a node."""

    bad: dict[str, list[str]] = field(default_factory=dict)
    unnamed: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.bad and not self.unnamed

    def blame(self, host: str, reason: str) -> None:
        self.bad.setdefault(host, []).append(reason)


def _run_directory_problem(report: NodeReport, limits: Limits) -> str:
    disk = report.disks[0]
    if not disk.error and disk.free_gb < limits.checkpoint_gb:
        return f"{disk.path} has {disk.free_gb} GB free, a checkpoint needs {limits.checkpoint_gb:.1f}"
    return _disk_problem(disk, limits)


def _disk_problem(disk: Disk, limits: Limits) -> str:
    if disk.error:
        return f"{disk.path}: {disk.error}"
    return (
        "" if disk.free_gb >= limits.free_gb else f"{disk.path} has {disk.free_gb} GB free, {limits.free_gb:g} required"
    )


def _shared_problem(reports: list[NodeReport], limits: Limits) -> str:
    """What is wrong with the run directory on every node, which is the fault of none; "": nothing."""
    problems = [_run_directory_problem(report, limits) for report in reports]
    if not problems or not all(problems) or (len(reports) == 1 and reports[0].disks[0].error):
        return ""
    return problems[0]


def own_problems(report: NodeReport, gpus: int, limits: Limits) -> list[str]:
    """Problems of a node that do not depend on the other nodes."""
    disks = (_run_directory_problem(report, limits), *(_disk_problem(disk, limits) for disk in report.disks[1:]))
    problems = list(filter(None, disks))
    if gpus:
        if report.gpu_error:
            problems.append(report.gpu_error)
        elif len(report.gpus) < gpus:
            problems.append(f"{len(report.gpus)} of {gpus} GPUs")
    for gpu in report.gpus:
        if gpu.processes or (gpu.memory_used_mb or 0) > IDLE_MB:
            who = f"process {', '.join(map(str, gpu.processes))}" if gpu.processes else "no visible process"
            problems.append(f"GPU {gpu.index} is busy: {gpu.memory_used_mb or 0:.0f} MB used by {who}")
        if gpu.ecc_errors:
            problems.append(f"GPU {gpu.index} has {gpu.ecc_errors:.0f} uncorrected memory errors")
    return problems


def judge(
    reports: list[NodeReport], ranks: list[RankReport], *, nodes: int, hosts: list[str], gpus: int, limits: Limits
) -> Verdict:
    """Find the bad nodes.

    Args:
        reports: of the nodes that wrote one. ranks: of the group check, empty if it was skipped. nodes: number of nodes
            of the job. hosts: their names, if known. gpus: required on each node.
    """
    verdict = Verdict()
    reported = {report.host for report in reports}
    for host in (host for host in hosts if host not in reported):
        verdict.blame(host, "no report: it did not start, hangs, or does not share the run directory")
    if not hosts and len(reports) < nodes:
        verdict.unnamed.append(f"{nodes - len(reports)} of {nodes} nodes wrote no report")
    if shared := _shared_problem(reports, limits):
        verdict.unnamed.append(shared)
    for report in reports:
        for problem in own_problems(report, gpus, limits):
            if not (shared and problem == _run_directory_problem(report, limits)):
                verdict.blame(report.host, problem)
    _compare_versions([(r.host, r.versions) for r in sorted(reports, key=lambda r: r.order)], verdict)
    ranks = sorted(ranks, key=lambda r: r.rank)
    if ranks:
        _compare_versions([(r.host, r.versions) for r in ranks if r.versions], verdict)
        _compare_progress(ranks, verdict)
        _compare_clocks(ranks, limits, verdict)
        if gpus:  # timings of CPU nodes vary, because their cores are shared
            _compare_speed(ranks, limits, verdict)
    return verdict


def _compare_versions(found: list[tuple[str, dict[str, str]]], verdict: Verdict) -> None:
    """Blame nodes whose version is not the most common one (in a tie: not that of the first node)."""
    for name in sorted({key for _, versions in found for key in versions}):
        values = [(host, versions.get(name, "none")) for host, versions in found]
        usual, count = Counter(value for _, value in values).most_common(1)[0]
        for host, value in dict(values).items():
            if value != usual:
                verdict.blame(host, f"{name} {value}, but {usual} on {count} other(s)")


def _compare_progress(ranks: list[RankReport], verdict: Verdict) -> None:
    """Blame the nodes whose ranks stopped in the earliest stage; the other ranks only wait for them."""
    unfinished = [r for r in ranks if r.stage != STAGES[-1]]
    if not unfinished:
        return
    behind = min(STAGES.index(r.stage) for r in unfinished)
    late = {r.host for r in unfinished if STAGES.index(r.stage) == behind}
    if 2 * len(late) > len({r.host for r in ranks}):  # more than half of the nodes: no single node is the cause
        errors = "; ".join(dict.fromkeys(r.error for r in unfinished if r.error)) or "timed out"
        verdict.unnamed.append(f"{len(late)} node(s) stopped in stage {STAGES[behind]!r}: {errors}")
        return
    for rank in unfinished:
        if STAGES.index(rank.stage) == behind:
            error = f" ({rank.error})" if rank.error else ""
            verdict.blame(rank.host, f"{rank} stopped in stage {rank.stage!r}{error}")


def _compare_clocks(ranks: list[RankReport], limits: Limits, verdict: Verdict) -> None:
    clocks = [r.clock for r in ranks if r.clock is not None]
    if not clocks:
        return
    usual = statistics.median_low(clocks)
    worst: dict[str, float] = {}
    for rank in ranks:
        if rank.clock is not None and abs(rank.clock - usual) > limits.skew_s:
            worst[rank.host] = max(worst.get(rank.host, 0.0), rank.clock - usual, key=abs)
    for host, difference in worst.items():
        verdict.blame(host, f"its clock differs from the median by {difference:+.1f} s")


def _compare_speed(ranks: list[RankReport], limits: Limits, verdict: Verdict) -> None:
    """Blame nodes with a rank slower than `limits.slow` times the lower median (of two ranks: the faster one)."""
    times = [r.matmul_ms for r in ranks if r.matmul_ms is not None]
    if not times:
        return
    usual = statistics.median_low(times)
    for rank in ranks:
        if rank.matmul_ms is not None and rank.matmul_ms > limits.slow * usual:
            verdict.blame(rank.host, f"{rank}: a matmul takes {rank.matmul_ms:.1f} ms, the median is {usual:.1f} ms")
