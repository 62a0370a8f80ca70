"""A real, temporary Slurm cluster (munged, slurmctld, one slurmd per node) in its own namespaces: see cluster.sh.

with Cluster(nodes=3) as cluster:
    job = cluster.submit("job.sbatch", "--time=5")
    assert job.wait() == "COMPLETED"

Needs root and the Debian packages that `make test-slurm` installs.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "ip", "unshare", "nsenter")
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "OUT_OF_MEMORY"}
GPUS, GPU_TYPE = 8, "h100"
STALLED_S = 300.0  # without any activity; an import of torch alone may take a minute on a busy machine
LIMIT_S = 1200.0  # in all, for activity that never ends

# cred_expire=5 is the smallest value that Slurm accepts (below, it uses 120 s): a requeued job starts only after it.
# The timeouts are long, for a busy machine: a test that loses a node marks it as down.
# Accounting is off, as on clusters without slurmdbd; the nodes declare more CPUs and memory than the machine has.
CONF = """
ClusterName=lab
SlurmctldHost=ctl(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={dir}/munge/socket,cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/slurmd-%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
DefMemPerCPU=100
ReturnToService=1
SlurmdTimeout=120
SlurmctldTimeout=120
MessageTimeout=60
TCPTimeout=20
KillWait=10
BatchStartTimeout=300
MinJobAge=3600
JobRequeue={requeue}
GresTypes=gpu
"""


def missing() -> list[str]:
    """Why no cluster can run here; empty if one can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    reasons = [f"{name} is not installed" for name in PROGRAMS if shutil.which(name, path=path) is None]
    return reasons + (["not root"] if os.geteuid() else [])


def until(
    what: str, condition: Callable[[], Any], stalled: float = STALLED_S, activity: Callable[[], Any] = lambda: None
) -> Any:
    """Poll until `condition()` is true; returns its value.

    Raises TimeoutError after `stalled` s without a change of `activity()`: a busy machine may be slow, but not stuck.
    """
    begin = since = time.monotonic()
    last = activity()
    while not (value := condition()):
        now = time.monotonic()
        if (current := activity()) != last:
            last, since = current, now
        if now - since > stalled or now - begin > LIMIT_S:
            raise TimeoutError(f"waited {now - begin:.0f} s for {what}, the last {now - since:.0f} s without activity")
        time.sleep(0.1)
    return value


class Job:
    """One job of a cluster."""

    def __init__(self, cluster: Cluster, number: str) -> None:
        self.cluster, self.number = cluster, number

    def info(self) -> dict[str, str]:
        """The fields of `scontrol show job`; empty if the controller does not respond."""
        text = self.cluster.run("scontrol", "-o", "show", "job", self.number, check=False).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    @property
    def state(self) -> str:
        return self.info().get("JobState", "")

    def log_bytes(self) -> int:
        """Size of the job's logs, to see that it is alive."""
        return sum(p.stat().st_size for p in self.log_path.parent.rglob("*.log"))

    def wait(self, stalled: float = STALLED_S, states: Iterable[str] = frozenset(FINAL)) -> str:
        """Until the job is in one of `states`; returns it. (`sbatch --wait` polls too rarely.)"""
        wanted = set(states)
        try:
            return until(f"job {self.number}", lambda: (s := self.state) in wanted and s, stalled, self.log_bytes)
        except TimeoutError as error:
            raise TimeoutError(f"{error}, which is {self.state} and not {wanted}:\n{self.log()}") from None

    @cached_property
    def log_path(self) -> Path:
        return Path(until(f"job {self.number} to be known", lambda: self.info().get("StdOut")))

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.is_file() else ""

    def wait_log(self, pattern: str) -> re.Match[str]:
        try:
            return until(f"/{pattern}/ in the log", lambda: re.search(pattern, self.log()), activity=self.log_bytes)
        except TimeoutError as error:
            raise TimeoutError(f"{error} of job {self.number}:\n{self.log()}") from None


class Cluster:
    """`nodes` virtual nodes n1, n2, ...; partition `train` (default) holds all of them."""

    def __init__(self, nodes: int, requeue: bool = True) -> None:
        self.nodes, self.requeue = [f"n{i + 1}" for i in range(nodes)], requeue
        self.dir = Path(tempfile.mkdtemp(prefix="slurm-lab-"))
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Cluster:
        self._configure()
        death = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # noqa: E731  (PR_SET_PDEATHSIG)
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--uts", "--net", "--ipc", "--fork", "--kill-child", "--mount-proc",
             "bash", str(HERE / "cluster.sh"), "up", str(self.dir), str(len(self.nodes))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(self.dir / "log" / "up.err").open("w"), text=True,
            env=self.environment(), preexec_fn=death,
        )  # fmt: skip
        assert self.process.stdout is not None
        if (answer := self.process.stdout.readline().strip()) != "up":
            logs = [p.read_text(errors="replace")[-500:] for p in sorted((self.dir / "log").iterdir())]
            reason = answer or "\n".join(logs)
            self.__exit__()
            raise RuntimeError(f"the cluster did not start: {reason}")
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        self.init = children.split()[0]
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()  # PID 1 exits at the end of its input; the kernel kills the rest
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.dir, ignore_errors=True)

    def _configure(self) -> None:
        os.chmod(self.dir, 0o755)  # munged refuses directories that others may write to
        for name in ("munge", "state", "run", "log", "dev", "work", *(f"spool-{n}" for n in self.nodes)):
            (self.dir / name).mkdir(mode=0o755)
        (self.dir / "munge" / "key").write_bytes(os.urandom(128))
        (self.dir / "munge" / "key").chmod(0o600)
        hosts, conf = ["127.0.0.1 localhost", "10.77.0.254 ctl"], [CONF.format(dir=self.dir, requeue=int(self.requeue))]
        for i, node in enumerate(self.nodes, start=1):
            hosts += [f"10.77.0.{i} {node}", f"::ffff:10.77.0.{i} {node}"]  # torch looks up the mapped address
            conf.append(
                f"NodeName={node} NodeHostname={node} NodeAddr=10.77.0.{i} CPUs=16 RealMemory=64000 "
                f"Gres=gpu:{GPU_TYPE}:{GPUS} State=UNKNOWN"
            )
        conf.append("PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n")
        for i in range(GPUS):
            (self.dir / "dev" / f"nvidia{i}").symlink_to("/dev/null")  # Slurm requires a character device
        (self.dir / "hosts").write_text("\n".join(hosts) + "\n")
        (self.dir / "slurm.conf").write_text("\n".join(conf))
        (self.dir / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=n[1-{len(self.nodes)}] Name=gpu Type={GPU_TYPE} "
            f"File={self.dir}/dev/nvidia[0-{GPUS - 1}]\n"
        )

    def environment(self, **extra: object) -> dict[str, str]:
        """The environment of this process without the variables of an outer Slurm job."""
        foreign = ("SLURM", "SBATCH", "SQUEUE", "SALLOC", "SRUN", "SINFO")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        kept |= {"PATH": kept.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"}
        return kept | {"SLURM_CONF": str(self.dir / "slurm.conf")} | {k: str(v) for k, v in extra.items()}

    def run(
        self, *argv: object, check: bool = True, env: dict[str, Any] | None = None, timeout: float = LIMIT_S
    ) -> subprocess.CompletedProcess[str]:
        """A command on the controller's host, in the directory `work`."""
        # nsenter --mount changes the directory to /
        enter = ["nsenter", f"--target={self.init}", "--mount", "--uts", "--net", "--pid", "--ipc", "--"]
        command = [*enter, "env", f"--chdir={self.dir / 'work'}", *map(str, argv)]
        done = subprocess.run(
            command, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout,
            env=self.environment(**(env or {})),
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{list(map(str, argv))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def clear(self) -> None:
        """End all jobs, including those that are requeued."""

        def empty() -> bool:
            self.run("scancel", "--user=root", check=False)
            return not self.run("squeue", "--noheader").stdout.strip()

        until("all jobs to end", empty)

    def submit(self, script: Path | str, *options: object, args: Iterable[object] = (), env: Any = None) -> Job:
        printed = self.run("sbatch", "--parsable", *options, script, *args, env=env).stdout
        return Job(self, printed.strip().split(";")[0])

    def power_cut(self, node: str) -> None:
        """Kill every process of the node; mark it as down, as an operator would, instead of waiting for the timeout."""
        kill = 'for _ in 1 2 3 4 5; do p=$(ip netns pids "$0"); [ -z "$p" ] || kill -KILL $p; sleep 0.05; done'
        self.run("bash", "-c", kill, node, check=False)
        self._mark_down(node, "power")

    def kill_slurmd(self, node: str) -> None:
        """Kill the daemon, not the processes of its jobs; mark the node as down."""
        self.run("bash", "-c", f"kill -KILL $(cat {self.dir}/run/slurmd-{node}.pid)")
        self._mark_down(node, "slurmd")

    def _mark_down(self, node: str, reason: str) -> None:
        """Until `start_node`: with ReturnToService=1 a reply that the node sent before the kill does not revive it."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", f"Reason={reason}")
        until(f"{node} to be down", lambda: self.node_state(node).startswith("down"))

    def start_node(self, node: str) -> None:
        self.run("bash", HERE / "cluster.sh", "node", self.dir, node)
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait_node(node, "idle")

    def node_state(self, node: str) -> str:
        return self.run("sinfo", "--noheader", "--nodes", node, "--format=%T").stdout.strip()

    def wait_node(self, node: str, state: str) -> None:
        until(f"{node} to be {state}", lambda: self.node_state(node) == state)
