"""`dla preflight`: planted faults are blamed on their node; a real all-reduce of two nodes, one of which hangs."""

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
from megatron_dla.launch.health import Disk, Gpu, NodeReport, look_at_gpus, try_disk
from megatron_dla.launch.verdict import STAGES, Limits, RankReport, Verdict, judge

HOSTS = ["n1", "n2", "n3", "n4"]
VERSIONS = {"torch": "2.13.0", "driver": "580.1"}


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
    "change, reason",
    [
        (None, "no report"),
        ({"gpus": [gpu(0)]}, "1 of 2 GPUs"),
        ({"gpus": [], "gpu_error": "nvidia-smi does not answer"}, "nvidia-smi does not answer"),
        ({"gpus": [gpu(0), gpu(1, processes=[4711])]}, "GPU 1 is busy: 4 MB held by process 4711"),
        ({"gpus": [gpu(0, memory_used_mb=30000.0), gpu(1)]}, "GPU 0 is busy: 30000 MB held by nobody that shows"),
        ({"gpus": [gpu(0), gpu(1, ecc_errors=2.0)]}, "GPU 1 has 2 uncorrected memory errors"),
        ({"disks": [Disk("/runs", 100.0, "Permission denied"), Disk("/tmp", 50.0)]}, "/runs: Permission denied"),
        ({"disks": [Disk("/runs", 100.0), Disk("/tmp", 0.4)]}, "/tmp has 0.4 GB left, 5 are wanted"),
        ({"versions": VERSIONS | {"torch": "2.11.0"}}, "torch 2.11.0, but 2.13.0 on 3 other(s)"),
        ({"versions": {"torch": "2.13.0"}}, "driver none, but 580.1 on 3 other(s)"),
    ],
    ids=["missing", "gpu missing", "no smi", "busy", "memory", "ecc", "unwritable", "full", "version", "no driver"],
)
def test_a_bad_node_is_named_with_the_reason(change, reason) -> None:
    found = verdict({2: change})
    assert list(found.bad) == ["n3"] and not found.unnamed and not found.good
    assert found.bad["n3"] == [text for text in found.bad["n3"] if text.startswith(reason)], found


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({5: {"matmul_ms": 2.3}}, "rank 5 (GPU 1) takes 2.3 ms for a matmul, 1.3 ms is the median"),
        ({4: {"clock": 1009.0}, 5: {"clock": 1009.1}}, "its clock differs by +9.1 s"),
        ({4: {"clock": 990.0}, 5: {"clock": 990.0}}, "its clock differs by -10.0 s"),
        ({5: {"versions": {"NCCL": "2.26"}}} | {n: {"versions": {"NCCL": "2.27"}} for n in (0, 1, 2, 3, 4, 6, 7)},
         "NCCL 2.26, but 2.27 on 7 other(s)"),
        ({n: {"stage": "matmul" if n == 5 else "all-reduce"} for n in range(8)},
         "rank 5 (GPU 1) came no further than: matmul"),
        ({n: {"stage": "started", "error": "CUDA error"} if n == 4 else {"stage": "rendezvous"} for n in range(8)},
         "rank 4 (GPU 0) came no further than: started (CUDA error)"),
        ({n: {"stage": STAGES[0] if n == 5 else "all-reduce"} for n in range(8)}, "rank 5 (GPU 1) came no further"),
    ],
    ids=["slow", "clock ahead", "clock behind", "NCCL", "hangs", "fails", "never started"],
)  # fmt: skip
def test_who_is_out_of_line_in_the_group_check(changes, reason) -> None:
    found = verdict(ranks=changes)
    assert list(found.bad) == ["n3"] and not found.unnamed
    assert len(found.bad["n3"]) == 1 and found.bad["n3"][0].startswith(reason), found


def test_what_no_node_is_to_blame_for_is_not_good_either() -> None:
    stuck = verdict(ranks={n: {"stage": "all-reduce", "error": "timed out"} for n in range(8)})
    assert not stuck.good and not stuck.bad and "timed out" in stuck.unnamed[0]
    # nobody reaches the first node: the others are no worse than it
    stuck = verdict(ranks={n: {"stage": "rendezvous" if n > 1 else "all-reduce"} for n in range(8)})
    assert not stuck.good and not stuck.bad and "3 node(s) came no further than: rendezvous" in stuck.unnamed[0]
    missing = verdict({3: None}, hosts=[])
    assert not missing.good and not missing.bad and missing.unnamed == ["1 of 4 nodes left no report"]


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
    """A stand-in prints what nvidia-smi prints; the real one is asked where there is a GPU (next test)."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = look_at_gpus()
    assert (first.name, first.driver, first.ecc_errors, first.processes) == ("NVIDIA H200", "580.65", None, [])
    assert second.processes == [4711] and second.memory_used_mb == 1.0
    for visible, indices in (("1", [1]), ("GPU-a", [0]), ("", []), ("0,1", [0, 1])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [g.index for g in look_at_gpus()] == indices
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVML mismatch; exit 18\n")
    with pytest.raises(RuntimeError, match="exits with 18: NVML mismatch"):
        look_at_gpus()


@pytest.mark.gpu
def test_the_real_nvidia_smi() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert len(look_at_gpus()) == torch.cuda.device_count()


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    disk = try_disk(tmp_path / "new")
    assert disk.error == "" and disk.free_gb > 0 and not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    assert try_disk(tmp_path / "file").error == "File exists"
    assert try_disk(tmp_path / "file" / "below").error == "Not a directory"


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
    nodes = [run_node(tmp_path, host, n, "--port", port) for n, host in enumerate("ab")]
    outputs = [process.communicate(timeout=100)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], outputs
    printed = "".join(outputs)  # one of them prints the verdict
    assert printed.count("2 node(s) good") == 1 and printed.count("on 2 rank(s)") == 2
    group = tmp_path / "preflight" / "31.0" / "group"
    ranks = [json.loads((group / f"rank{n}.json").read_text()) for n in (0, 1)]
    assert [(r["host"], r["stage"]) for r in ranks] == [("a", "finished"), ("b", "finished")]
    assert all(r["matmul_ms"] > 0 and r["all_reduce_ms"] > 0 for r in ranks)
    assert not (tmp_path / "bad_nodes").exists()


def test_a_node_that_hangs_is_named_and_not_those_who_wait_for_it(tmp_path: Path) -> None:
    port, limit = free_port(), 12.0
    began = time.monotonic()
    nodes = [run_node(tmp_path, host, n, "--port", port, "--timeout", str(limit)) for n, host in enumerate("ab")]
    hung = tmp_path / "preflight" / "31.0" / "group" / "rank1.json"
    while not hung.exists():
        assert time.monotonic() < began + limit
        time.sleep(0.005)
    os.kill(json.loads(hung.read_text())["pid"], signal.SIGSTOP)
    outputs = [process.communicate(timeout=60)[0] for process in nodes]
    assert time.monotonic() - began < limit + 15
    assert [process.returncode for process in nodes] == [3, 3], outputs
    (line,) = (tmp_path / "bad_nodes").read_text().splitlines()
    assert line.startswith("b  # rank 1 came no further than: ") and "no end within 12 s" in line
    printed = "".join(outputs)
    assert printed.count("bad node b:") == 1 and "bad node a" not in printed


def test_a_node_without_a_report_is_named_by_the_others(tmp_path: Path) -> None:
    process = run_node(tmp_path, "a", 0, "--node-only", "--timeout", "0.5")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 3 and "bad node b: no report" in output
    assert (tmp_path / "bad_nodes").read_text().startswith("b  # no report")


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    process = run_node(tmp_path / "file", "a", 0, "--node-only")
    assert "bad node a: no report can be written" in process.communicate(timeout=60)[0]
    assert process.returncode == 3


def test_bad_usage(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("DLA_ATTEMPT", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for arguments, word in ((["--nodes", "0"], "--nodes"), (["--nodes", "2"], "DLA_ATTEMPT")):
        assert main(["preflight", "--run-dir", str(tmp_path), *arguments]) == 2
        assert word in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
