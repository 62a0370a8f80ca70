"""Every kernel compiles for sm_80, sm_90 and sm_100 without spilling and within the memory of a multiprocessor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dla.kernels.common import aot
from megatron_dla.kernels.dla.attention import BACKENDS

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process: interpreted kernels and compiled ones cannot live in one."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    variables["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=variables, cwd=ROOT)
    print(done.stdout, done.stderr)
    return done


@pytest.mark.parametrize("arch", aot.ARCHS)
def test_planted_faults_are_found(arch: int) -> None:
    done = run(str(Path(__file__).with_name("aot_toys.py")), str(arch))
    assert done.returncode == 0
    reports = json.loads(done.stdout.splitlines()[-1])
    found: dict[str, list[dict]] = {}
    for one in reports:
        found.setdefault(one["name"], []).append(one)
    assert [len(found[name]) for name in ("good", "spills", "too_much_shared", "does_not_compile")] == [2, 1, 1, 1]
    assert all(not one["problems"] and 0 < one["registers"] <= 255 for one in found["good"])
    mma = {80: "mma", 90: "wgmma", 100: "tcgen05"}[arch]
    assert any(one["mma"].startswith(mma) for one in found["good"])
    assert found["spills"][0]["spill_stores"] > 100 and "spills" in found["spills"][0]["problems"][0]
    assert found["too_much_shared"][0]["shared"] > aot.SHARED_LIMIT[arch]
    assert "shared memory" in " ".join(found["too_much_shared"][0]["problems"])
    assert "Error" in found["does_not_compile"][0]["error"]
    assert found["transposed"][0]["trans_hits"] == (1 if arch == 90 else 0)
    assert not found["computed_transposed"][0]["problems"]


def test_merge_keeps_one_report_a_kernel() -> None:
    a, b = aot.Report("k", 90, key="1", users=["a"]), aot.Report("k", 90, key="1", users=["b"])
    other = aot.Report("k", 80, key="1", users=["a"])
    merged = aot.merge([[a, other], [b]])
    assert [(r.arch, r.users) for r in merged] == [(90, ["a", "b"]), (80, ["a"])]
    assert "a +1" in aot.table(merged) and aot.failures(merged) == []


def test_a_process_that_interprets_is_refused() -> None:
    done = run("-m", "megatron_dla.kernels.common.aot", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr


@pytest.mark.skipif("triton" not in BACKENDS, reason="no triton backend yet")
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_dla_kernels_fit(arch: int, pytestconfig: pytest.Config) -> None:
    done = run("-m", "megatron_dla.kernels.common.aot", "--arch", str(arch))
    assert pytestconfig.cache is not None
    table = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("["))
    pytestconfig.cache.mkdir("aot").joinpath(f"sm_{arch}.txt").write_text(table)  # shown at the session's end
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
