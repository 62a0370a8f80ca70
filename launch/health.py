"""Collects the state of one node before a run: GPUs, versions and disks. Standard library only, about a second."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GPU_FIELDS = (
    "index", "uuid", "name", "driver_version", "memory.used", "utilization.gpu",
    "ecc.errors.uncorrected.volatile.total",
)  # fmt: skip
PACKAGES = ("megatron-dla", "torch", "megatron-core", "deepspeed", "triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
PROBE_BYTES = 1 << 20
QUERY_TIMEOUT_S = 20  # nvidia-smi hangs on a broken driver


@dataclass
class Gpu:
    """One GPU of the allocation; None where the driver does not report a value."""

    index: int
    uuid: str
    name: str
    driver: str
    memory_used_mb: float | None
    utilization: float | None  # percent, over the last second
    ecc_errors: float | None  # uncorrected, since the driver was loaded
    processes: list[int] = field(default_factory=list)


@dataclass
class Disk:
    """A directory that a run writes to. `error`: why a test file could not be written and read back, or empty."""

    path: str
    free_gb: float
    error: str = ""


@dataclass
class NodeReport:
    """preflight/ATTEMPT/HOST.json. `order`: index of the node in the job. `left_out`: checks that were skipped."""

    host: str
    order: int
    address: str
    time: float
    gpus: list[Gpu] = field(default_factory=list)
    gpu_error: str = ""
    disks: list[Disk] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: dict) -> NodeReport:
        """Inverse of `dataclasses.asdict`.

        Raises:
            TypeError: not the file of a NodeReport.
        """
        gpus, disks = [Gpu(**g) for g in values["gpus"]], [Disk(**d) for d in values["disks"]]
        return cls(**(values | {"gpus": gpus, "disks": disks}))


def _nvidia_smi(*arguments: str) -> list[list[str]]:
    command = ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"nvidia-smi exited with {done.returncode}: {(done.stdout + done.stderr).strip()[:200]}")
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A], [Not Supported]
        return None


def query_gpus() -> list[Gpu]:
    """The GPUs in CUDA_VISIBLE_DEVICES, or all if it is not set.

    Raises:
        RuntimeError, OSError, subprocess.TimeoutExpired: nvidia-smi fails, is not installed or hangs.
    """
    gpus = []
    for row in _nvidia_smi(f"--query-gpu={','.join(GPU_FIELDS)}"):
        index, unique, name, driver, memory, utilization, ecc = row
        gpus.append(Gpu(int(index), unique, name, driver, _number(memory), _number(utilization), _number(ecc)))
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        gpus = [g for g in gpus if str(g.index) in names or any(g.uuid.startswith(n) for n in names if n[:1].isalpha())]
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    for pid, unique in _nvidia_smi("--query-compute-apps=pid,gpu_uuid"):
        if unique in by_uuid:
            by_uuid[unique].processes.append(int(pid))
    return gpus


def check_disk(path: Path) -> Disk:
    """Write, sync, read back and delete a file of 1 MiB."""
    probe, data = path / f".preflight-{uuid.uuid4().hex}", os.urandom(PROBE_BYTES)
    free = 0.0
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free / 1e9
        with probe.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        error = "" if probe.read_bytes() == data else "the file read back differs from the file written"
    except OSError as failure:
        error = failure.strerror or str(failure)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return Disk(str(path), round(free, 1), error)


def check_node(report: NodeReport, run_dir: Path, temporary: Path, gpus_wanted: int) -> NodeReport:
    """Fill in the disks, versions and GPUs of a report and return it."""
    report.disks = [check_disk(run_dir), check_disk(temporary)]
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            report.versions[package] = version(package)
    if not gpus_wanted:
        report.left_out.append("GPUs: the run uses none")
        return report
    try:
        report.gpus = query_gpus()
    except FileNotFoundError:
        report.gpu_error = "nvidia-smi is not installed"
    except subprocess.TimeoutExpired:
        report.gpu_error = f"nvidia-smi does not respond within {QUERY_TIMEOUT_S} s"
    except (RuntimeError, OSError, ValueError) as error:
        report.gpu_error = str(error)
    if report.gpus:
        report.versions["driver"] = report.gpus[0].driver
    return report
