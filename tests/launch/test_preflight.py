"""`dla preflight`: injected faults are attributed to their node; a real all-reduce of two nodes, one of which hangs."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dla.cli import main
from megatron_dla.launch import preflight
from megatron_dla.launch.health import Disk, Gpu, NodeReport, check_disk, query_gpus
from megatron_dla.launch.verdict import STAGES, Limits, RankReport, Verdict, judge

HOSTS = ["n1", "n2", "n3", "n4"]
VERSIONS = {"torch": "2.13.0", "driver": "580.1"}
LIMIT_S = 300  # of a process that should end by itself; long, because the machine may be busy


def gpu(index: int, **values) -> Gpu:
    return dataclasses.replace(Gpu(index, f"GPU-{index}", "H200", "580.1", 4.0, 0.0, 0.0), **values)


def node(number: int, **values) -> NodeReport:
    report = NodeReport(
        HOSTS[number], number, HOSTS[number], 0.0, [gpu(0), gpu(1)],
        disks=[Disk("/runs", 100.0), Disk("/tmp", 50.0)], versions=VERSIONS,
    )  # fmt: skip
    return dataclasses.replace(report, **values)


def rank(number: int, **values) -> RankReport:
    report = RankReport(number, HOSTS[number // 2], number % 2, STAGES[-1], "", 1.0 + 0.1 * number, 2.0, 1000.0)
    return dataclasses.replace(report, **values)


def verdict(nodes: dict[int, dict] | None = None, ranks: dict[int, dict] | None = None, count: int = 4, **arguments):
    """Of healthy nodes and ranks with these changed; None removes a node."""
    reports = [node(n, **change) for n in range(count) if (change := (nodes or {}).get(n, {})) is not None]
    found = [rank(n, **(ranks or {}).get(n, {})) for n in range(2 * count)]
    wanted = {"nodes": count, "hosts": HOSTS[:count], "gpus": 2, "limits": Limits()} | arguments
    return judge(reports, found, **wanted)


def test_healthy_nodes_are_good() -> None:
    assert verdict() == Verdict({}, []) and verdict().good
    assert verdict(count=1).good


@pytest.mark.parametrize(
    "change, words",
    [
        (None, ["no report"]),
        ({"gpus": [gpu(0)]}, ["1 of 2 GPUs"]),
        ({"gpus": [], "gpu_error": "nvidia-smi exited with 9"}, ["nvidia-smi exited with 9"]),
        ({"gpus": [gpu(0), gpu(1, processes=[4711])]}, ["GPU 1", "4 MB", "4711"]),
        ({"gpus": [gpu(0, memory_used_mb=30000.0), gpu(1)]}, ["GPU 0", "30000 MB"]),
        ({"gpus": [gpu(0), gpu(1, ecc_errors=2.0)]}, ["GPU 1", "2 uncorrected"]),
        ({"disks": [Disk("/runs", 100.0, "Permission denied"), Disk("/tmp", 50.0)]}, ["/runs", "Permission denied"]),
        ({"disks": [Disk("/runs", 100.0), Disk("/tmp", 0.4)]}, ["/tmp", "0.4 GB", "5"]),
        ({"versions": VERSIONS | {"torch": "2.11.0"}}, ["torch 2.11.0", "2.13.0", "3"]),
        ({"versions": {"torch": "2.13.0"}}, ["driver none", "580.1", "3"]),
    ],
    ids=["missing", "gpu missing", "no smi", "busy", "memory", "ecc", "unwritable", "full", "version", "no driver"],
)
def test_a_bad_node_is_named_with_the_reason(change, words) -> None:
    found = verdict({2: change})
    assert list(found.bad) == ["n3"] and not found.unnamed and not found.good
    for reason in found.bad["n3"]:
        assert all(word in reason for word in words), found


@pytest.mark.parametrize(
    "changes, words",
    [
        ({5: {"matmul_ms": 2.3}}, ["rank 5 (GPU 1)", "2.3 ms", "1.3 ms"]),
        ({4: {"clock": 1009.0}, 5: {"clock": 1009.1}}, ["clock", "+9.1 s"]),
        ({4: {"clock": 990.0}, 5: {"clock": 990.0}}, ["clock", "-10.0 s"]),
        ({5: {"versions": {"NCCL": "2.26"}}} | {n: {"versions": {"NCCL": "2.27"}} for n in (0, 1, 2, 3, 4, 6, 7)},
         ["NCCL 2.26", "2.27", "7"]),
        ({n: {"stage": "matmul" if n == 5 else "all-reduce"} for n in range(8)}, ["rank 5 (GPU 1)", "'matmul'"]),
        ({n: {"stage": "started", "error": "CUDA error"} if n == 4 else {"stage": "rendezvous"} for n in range(8)},
         ["rank 4 (GPU 0)", "'started'", "CUDA error"]),
        ({n: {"stage": STAGES[0] if n == 5 else "all-reduce"} for n in range(8)}, ["rank 5 (GPU 1)", repr(STAGES[0])]),
    ],
    ids=["slow", "clock ahead", "clock behind", "NCCL", "hangs", "fails", "never started"],
)  # fmt: skip
def test_an_outlier_in_the_group_check_is_named(changes, words) -> None:
    found = verdict(ranks=changes)
    assert list(found.bad) == ["n3"] and not found.unnamed
    (reason,) = found.bad["n3"]
    assert all(word in reason for word in words), found


def test_failures_that_blame_no_node_are_not_good_either() -> None:
    stuck = verdict(ranks={n: {"stage": "all-reduce", "error": "timed out"} for n in range(8)})
    assert not stuck.good and not stuck.bad and "timed out" in stuck.unnamed[0]
    # no node reaches the first one: the others are no worse than it
    stuck = verdict(ranks={n: {"stage": "rendezvous" if n > 1 else "all-reduce"} for n in range(8)})
    assert not stuck.good and not stuck.bad and "3 node(s)" in stuck.unnamed[0] and "'rendezvous'" in stuck.unnamed[0]
    missing = verdict({3: None}, hosts=[])
    assert not missing.good and not missing.bad and len(missing.unnamed) == 1 and "1 of 4 nodes" in missing.unnamed[0]


FULL = {"disks": [Disk("/runs", 9.0), Disk("/tmp", 50.0)]}
BROKEN = {"disks": [Disk("/runs", 0.0, "Permission denied"), Disk("/tmp", 50.0)]}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("checkpoint_gb, full", [(8.9, False), (9.1, True)])
def test_a_shared_disk_without_room_for_a_checkpoint_blames_no_node(count, checkpoint_gb, full) -> None:
    limits = Limits(checkpoint_gb=checkpoint_gb)
    found = verdict(dict.fromkeys(range(count), FULL), count=count, limits=limits)
    assert not found.bad and found.good != full
    if full:
        (problem,) = found.unnamed
        assert all(word in problem for word in ("/runs", "9.0 GB", "9.1")), problem
        alone = verdict({2: FULL}, limits=limits)  # it does not see the disk that the others see
        assert list(alone.bad) == ["n3"] and not alone.unnamed


def test_a_run_directory_that_no_node_can_write_blames_none() -> None:
    found = verdict(dict.fromkeys(range(4), BROKEN))
    assert not found.bad and found.unnamed == ["/runs: Permission denied"]
    assert list(verdict({0: BROKEN}, count=1).bad) == ["n1"]  # it cannot be told whose fault it is


def test_of_two_nodes_the_slower_and_the_one_unlike_the_first_are_named() -> None:
    found = verdict({1: {"versions": {"torch": "2.11.0", "driver": "580.1"}}}, {3: {"matmul_ms": 2.0}}, count=2)
    assert list(found.bad) == ["n2"] and len(found.bad["n2"]) == 2


def test_cpu_nodes_are_not_judged_by_their_speed() -> None:
    assert verdict(ranks={5: {"matmul_ms": 9.0}}, gpus=0).good


SMI = """#!/bin/sh
case "$1" in
*query-gpu*) echo "0, GPU-a0, NVIDIA H200, 580.65, 1, 0, [N/A]"; echo "1, GPU-b1, NVIDIA H200, 580.65, 1, 0, 0" ;;
*compute-apps*) echo "4711, GPU-b1" ;;
esac
"""


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch) -> None:
    """A script prints what nvidia-smi prints; the next test runs the real one where there is a GPU."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = query_gpus()
    assert (first.name, first.driver, first.ecc_errors, first.processes) == ("NVIDIA H200", "580.65", None, [])
    assert second.processes == [4711] and second.memory_used_mb == 1.0
    for visible, indices in (("1", [1]), ("GPU-a", [0]), ("", []), ("0,1", [0, 1])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [g.index for g in query_gpus()] == indices
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVML mismatch; exit 18\n")
    with pytest.raises(RuntimeError, match="18: NVML mismatch"):
        query_gpus()


@pytest.mark.gpu
def test_the_real_nvidia_smi() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert len(query_gpus()) == torch.cuda.device_count()


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    disk = check_disk(tmp_path / "new")
    assert disk.error == "" and disk.free_gb > 0 and not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    assert check_disk(tmp_path / "file").error == "File exists"
    assert check_disk(tmp_path / "file" / "below").error == "Not a directory"


def run_node(run_dir: Path, host: str, order: int, *arguments: str, hosts: str = "a,b") -> subprocess.Popen:
    env = os.environ | {
        "SLURMD_NODENAME": host, "SLURM_NODEID": str(order), "DLA_ATTEMPT": "31.0", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-m", "megatron_dla.launch.preflight", "--run-dir", str(run_dir), "--nodes", "2"]
    command += ["--hosts", hosts, "--min-disk-gb", "0.01", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_nodes_reduce_together(tmp_path: Path) -> None:
    port = free_port()
    nodes = [run_node(tmp_path, host, n, "--port", port, "--timeout", str(LIMIT_S)) for n, host in enumerate("ab")]
    outputs = [process.communicate(timeout=LIMIT_S)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], outputs
    printed = "".join(outputs)
    assert printed.count("2 node(s) good") == 1 and printed.count("on 2 rank(s)") == 2  # one of them prints the verdict
    group = tmp_path / "preflight" / "31.0" / "group"
    ranks = [json.loads((group / f"rank{n}.json").read_text()) for n in (0, 1)]
    assert [(r["host"], r["stage"]) for r in ranks] == [("a", "finished"), ("b", "finished")]
    assert all(r["matmul_ms"] > 0 and r["all_reduce_ms"] > 0 for r in ranks)
    assert not (tmp_path / "bad_nodes").exists()


def test_a_node_that_hangs_is_named_and_not_those_who_wait_for_it(tmp_path: Path) -> None:
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    limit = f"{8 + 4 * (time.monotonic() - started):.0f}"  # the other rank must get past its import of torch by then
    port = free_port()
    nodes = [run_node(tmp_path, host, n, "--port", port, "--timeout", limit) for n, host in enumerate("ab")]
    hung = tmp_path / "preflight" / "31.0" / "group" / "rank1.json"
    while not hung.exists():
        assert [process.poll() for process in nodes] == [None, None]
        time.sleep(0.005)
    os.kill(json.loads(hung.read_text())["pid"], signal.SIGSTOP)
    outputs = [process.communicate(timeout=LIMIT_S)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [3, 3], outputs
    (line,) = (tmp_path / "bad_nodes").read_text().splitlines()
    assert line.startswith("b  # rank 1 ") and f" {limit} s" in line
    printed = "".join(outputs)
    assert printed.count("bad node b:") == 1 and "bad node a" not in printed


def test_a_node_without_a_report_is_named_by_the_others(tmp_path: Path) -> None:
    process = run_node(tmp_path, "a", 0, "--node-only", "--timeout", "0.5")
    output = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 3 and "bad node b: " in output
    assert (tmp_path / "bad_nodes").read_text().startswith("b  # no report")


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    process = run_node(tmp_path / "file", "a", 0, "--node-only")
    assert "bad node a: " in process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 3


def test_bad_usage(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("DLA_ATTEMPT", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for arguments, word in ((["--nodes", "0"], "--nodes"), (["--nodes", "2"], "DLA_ATTEMPT")):
        assert main(["preflight", "--run-dir", str(tmp_path), *arguments]) == 2
        assert word in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option, values",
    [
        ("--slow", ["nan", "-1", "0.5"]),
        ("--clock-skew", ["nan", "-1"]),
        ("--min-disk-gb", ["nan", "-1", "inf"]),
        ("--checkpoint-gb", ["nan", "-1", "inf"]),
        ("--timeout", ["nan", "inf", "0", "1e300"]),
        ("--port", ["-1", "99999"]),
        ("--gpus", ["-1"]),
    ],
)
def test_limits_that_judge_no_node_are_bad_usage(capsys, tmp_path: Path, option: str, values: list[str]) -> None:
    for value in values:
        assert main(["preflight", "--run-dir", str(tmp_path), option, value]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and f"{option} {value.replace('1e300', '1e+300')}" in error, error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["SLURM_NODEID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["abc", "-1", "", "9" * 5000])
@pytest.mark.parametrize("start", [lambda *x: main(["preflight", *x]), lambda *x: preflight.main(list(x))])
def test_numbers_of_the_environment(capsys, tmp_path: Path, monkeypatch, name: str, value: str, start) -> None:
    for other in ("SLURM_NODEID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "MASTER_PORT", "DLA_ATTEMPT"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    assert start("--run-dir", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and f"dla preflight: {name} = '{value[:40]}" in error and "unset it" in error
    assert len(error) < 300 and not list(tmp_path.iterdir()) and "DLA_ATTEMPT" not in os.environ
