"""The measured column: which kernel belongs to which component, and a real step on a CPU."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_dla.errors import UserError
from megatron_dla.kernels.bench.ledger import components
from megatron_dla.kernels.bench.ledger.measure import MARK, component_ms
from megatron_dla.kernels.bench.ledger.report import measured_conclusion, table
from megatron_dla.kernels.bench.ledger.run import bench_ledger
from megatron_dla.kernels.bench.ledger.summary import Row

ROOT = Path(__file__).resolve().parents[3]


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}


def test_a_kernel_belongs_to_the_mark_that_launched_it() -> None:
    marks = [event("user_annotation", MARK + name, ts, 10) for name, ts in (("MLP", 100), ("loss", 200), ("MLP", 300))]
    launches = [(1, 101), (2, 105), (3, 209), (4, 250), (5, 310)]  # the fourth between two marks, the fifth at an end
    calls = [event("cuda_driver" if n % 2 else "cuda_runtime", "launch", ts, 1, n) for n, ts in launches]
    kernels = [event("kernel", "k", 1000 * n, 1000 * n, n) for n, _ in launches]  # long after their launches
    other = [event("cpu_op", "aten::mm", 100, 10), event("user_annotation", "step", 0, 1000), {"ph": "M"}]
    found = component_ms({"traceEvents": [*kernels, *calls, *other, *reversed(marks)]})
    assert found == {"MLP": 1 + 2 + 5, "loss": 3, "outside the marks": 4}


def test_without_a_gpu_the_marks_themselves_are_summed() -> None:
    marks = [event("user_annotation", MARK + name, ts, dur) for name, ts, dur in (("a", 0, 500), ("b", 600, 250))]
    assert component_ms({"traceEvents": [*marks, event("user_annotation", "c", 0, 9)]}) == {"a": 0.5, "b": 0.25}


PROGRAM = """
import json, sys, torch
from pathlib import Path
from megatron_dla.kernels.bench.ledger.measure import measure
from megatron_dla.kernels.bench.ledger.run import ledger_config
torch.set_num_threads(1)
print("\\n" + json.dumps(measure(ledger_config(Path(sys.argv[1]), 128), torch.device("cpu"), repeats=1)))
"""


def test_a_real_step_on_a_cpu(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs" / "demo_cpu.yaml").read_text())
    config["parallel"]["tensor_model_parallel_size"] = 1
    config["model"] |= {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 64, "vocab_multiple": 64}
    config["training"] |= {"global_batch_size": 1, "micro_batch_size": 1}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run([sys.executable, "-c", PROGRAM, path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(done.stdout.splitlines()[-1])
    assert set(found["ms"]) <= set(components.COMPONENTS)
    wanted = {components.PROJECTIONS, components.CONVOLUTION, components.PARTITION, components.MLP, components.LOSS,
              components.OPTIMIZER}  # fmt: skip
    assert wanted <= {name for name, ms in found["ms"].items() if ms > 0}
    assert found["tokens_per_s"] == pytest.approx(128 / found["step_ms"] * 1e3)
    assert found["mfu"] is None and found["peak_bytes"] is None and found["device"] == "cpu"


def test_the_table_has_a_measured_column() -> None:
    measured = {"device": "NVIDIA X", "torch": "2", "step_ms": 8.0, "tokens_per_s": 1e3, "mfu": 0.25,
                "peak_bytes": 3 * 10**9, "ms": {"MLP": 4.25, "loss": 1.5}}  # fmt: skip
    row = Row(launches=1).as_dict()
    found = {"components": {"MLP": row, "loss": row}, "total": row, "quantities": {}, "measured": measured}
    lines = table(found).splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["4.25", "1.50", "5.75"]
    assert lines[-1] == measured_conclusion(measured) and "25.0%" in lines[-1] and "3.0 GB" in lines[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_measuring_needs_a_gpu(tmp_path: Path) -> None:
    args = argparse.Namespace(config=ROOT / "configs" / "dla_mamba2_780m.yaml", measure=True, tokens=None, gpu=None,
                              arch=None, counts_only=True, out=tmp_path)  # fmt: skip
    with pytest.raises(UserError, match="--measure"):
        bench_ledger(args)
    assert not list(tmp_path.iterdir())
