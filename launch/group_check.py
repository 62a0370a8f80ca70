"""One rank of preflight's group check: a matmul on its own, then an all-reduce over all ranks.

Started by `preflight` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. It writes each stage that it enters into
its report, so that a rank that hangs can be distinguished from the ranks that wait for it.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from megatron_dla.files import write_json
from megatron_dla.launch.verdict import RankReport
from megatron_dla.training.fence import node_name

MATRIX = {"cuda": 8192, "cpu": 512}  # rows of a square matmul: 1.1 TFLOP in bf16, 0.27 GFLOP in fp32
ALL_REDUCE = {"cuda": 64 << 20, "cpu": 1 << 20}  # bytes
REPEATS = 5


def check(path: Path, report: RankReport, timeout_s: float) -> None:
    """Run all stages. Raises whatever torch raises; the report on disk then has the stage."""

    def enter(stage: str) -> None:
        report.stage = stage
        write_json(path, asdict(report), fsync=False)

    enter("started")
    import torch
    import torch.distributed as dist

    kind = "cpu" if report.gpu is None else "cuda"
    device = torch.device(kind, report.gpu) if report.gpu is not None else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        report.versions = {"NCCL": ".".join(map(str, torch.cuda.nccl.version())), "CUDA": str(torch.version.cuda)}

    def best_ms(operation) -> float:
        times = []
        for _ in range(REPEATS + 1):  # the first is a warm-up
            begin = time.perf_counter()
            operation()
            if kind == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin)
        return 1e3 * min(times[1:])

    enter("matmul")
    a = torch.randn(MATRIX[kind], MATRIX[kind], device=device, dtype=torch.bfloat16 if kind == "cuda" else None)
    report.matmul_ms = best_ms(lambda: a @ a)
    enter("rendezvous")
    rank, world = report.rank, int(os.environ["WORLD_SIZE"])
    limit = timedelta(seconds=timeout_s)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=rank == 0, timeout=limit,
        wait_for_workers=False,  # or rank 0 would appear to hang while it waits for a late rank
    )  # fmt: skip
    enter("all-reduce")
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    numbers = torch.full((ALL_REDUCE[kind] // 4,), float(rank), device=device)
    dist.all_reduce(numbers)
    if (total := numbers[-1].item()) != world * (world - 1) / 2:
        raise RuntimeError(f"the all-reduce of the rank numbers is {total}, not {world * (world - 1) / 2}")
    report.all_reduce_ms = best_ms(lambda: dist.all_reduce(numbers))
    dist.barrier()
    report.clock = time.time()
    enter("finished")
    dist.barrier()  # rank 0 hosts the store
    dist.destroy_process_group()


def main() -> int:
    """Command line: file of the report, timeout in s, index of the GPU or "cpu"."""
    path, timeout_s, gpu = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    report = RankReport(int(os.environ["RANK"]), node_name(), None if gpu == "cpu" else int(gpu), pid=os.getpid())
    try:
        check(path, report, timeout_s)
    except Exception as error:  # any failure here is a failure of this node or its network
        report.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        write_json(path, asdict(report), fsync=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
