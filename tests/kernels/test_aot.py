"""Every kernel compiles for sm_80, sm_90 and sm_100 without a new spill and within the memory of a multiprocessor."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dla.config import LETTERS, AdapterRunConfig, layer_letters, load_config
from megatron_dla.kernels.aot import cli, spills
from megatron_dla.kernels.aot import compile as aot
from megatron_dla.kernels.aot import dla as aot_dla
from megatron_dla.kernels.aot.cli import defined
from megatron_dla.kernels.dla import beyond_kernels
from megatron_dla.model.counts import recurrent_states
from tests.support import shipped

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process: interpreted kernels and compiled ones cannot live in one."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    variables["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=variables, cwd=ROOT)
    print(done.stdout, done.stderr)
    return done


@pytest.mark.parametrize("arch", [pytest.param(arch, marks=[pytest.mark.long] * (arch > 80)) for arch in aot.ARCHS])
def test_planted_faults_are_found(arch: int) -> None:
    done = run("-m", "tests.support.aot_toys", str(arch))
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


def test_a_reduction_under_a_predicate_is_found() -> None:
    """Lines of the partition's repair kernel as it was miscompiled (Triton 3.6.0, its ptxas 12.8, sm_90)."""
    sass = """
        /*84f0*/              @!P5 SEL R46, R139, RZ, !P4 ;
        /*8500*/              @!P0 REDUX.SUM.S32 UR39, R46 ;
        /*bcc0*/                   REDUX.SUM.S32 UR32, R39 ;
    """
    (found,) = aot.predicated_reductions(sass)
    assert "@!P0 REDUX.SUM.S32 UR39" in found
    assert aot.failures([aot.Report("k", 90, redux_hits=1)]) and not aot.failures([aot.Report("k", 90)])


def test_a_spill_passes_up_to_its_known_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spills, "KNOWN", {triton.__version__: {(80, "k", "a"): (8, 16)}})

    def problems(stores: int, loads: int, arch: int = 80, name: str = "k", users: tuple[str, ...] = ("b", "a")) -> int:
        return len(aot.Report(name, arch, spill_stores=stores, spill_loads=loads, users=list(users)).problems)

    assert problems(8, 16) == problems(4, 16) == problems(0, 0) == 0
    assert problems(9, 16) == problems(8, 17) == 1
    assert problems(8, 16, arch=90) == problems(8, 16, name="other") == problems(8, 16, users=("b",)) == 1
    monkeypatch.setattr(spills, "KNOWN", {"0.0.0": {(80, "k", "a"): (8, 16)}})
    assert problems(8, 16) == 1


def test_the_pinned_triton_has_no_known_spill() -> None:
    paths = sorted(ROOT.glob("constraints-*.txt"))
    assert [path.name for path in paths] == ["constraints-cpu.txt", "constraints-cuda.txt"]
    for path in paths:
        (pinned,) = re.findall(r"^triton==(\S+)$", path.read_text(), re.MULTILINE)
        assert pinned not in spills.KNOWN


def test_known_spills_name_what_is_compiled() -> None:
    for known in spills.KNOWN.values():
        for arch, kernel, config in known:
            assert config in aot_dla.names(arch) and kernel.endswith("_kernel")


def test_merge_keeps_one_report_a_kernel() -> None:
    a, b = aot.Report("k", 90, key="1", users=["a"]), aot.Report("k", 90, key="1", users=["b"])
    other = aot.Report("k", 80, key="1", users=["a"])
    merged = aot.merge([[a, other], [b]])
    assert [(r.arch, r.users) for r in merged] == [(90, ["a", "b"]), (80, ["a"])]
    assert "a +1" in aot.table(merged) and aot.failures(merged) == []


def test_a_process_that_interprets_is_refused() -> None:
    done = run("-m", "megatron_dla.kernels.aot", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr


def test_kernels_fit(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """One configuration for one architecture; `make aot` (.ci/run) compiles all for all."""
    command = ["--quick", "--arch", "90", "--config", "gdn-fp32-64", "--json", str(tmp_path / "reports")]
    done = run("-m", "megatron_dla.kernels.aot", *command)
    if cache := getattr(pytestconfig, "cache", None):  # none with -p no:cacheprovider
        table = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("["))
        cache.mkdir("aot").joinpath("sm_90.txt").write_text(table)  # shown at the session's end
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    compiled = {one["name"] for one in json.loads((tmp_path / "reports").read_text())}
    assert len(compiled) > 10 and compiled <= defined()


def test_a_kernel_that_no_configuration_launches_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    found = sorted(defined())
    assert len(found) > 20
    monkeypatch.setattr(cli, "compile_all", lambda *_, **__: [aot.Report(name, 90) for name in found[1:]])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["--arch", "90"]) == 1 and f"{found[0]}: no configuration" in capsys.readouterr().out
    assert cli.main(["--arch", "90", "--config", "gdn"]) == 0


def test_every_shipped_gpu_config_is_compiled_as_its_ranks_run_it() -> None:
    configs = {one.name: one for one in aot_dla.shipped()}
    for path in shipped.RUNS:
        run_config = load_config(path)
        if isinstance(run_config, AdapterRunConfig):  # softmax layers only
            continue
        model = run_config.model
        (letter,) = set(layer_letters(model))
        capacity = recurrent_states(model, letter)
        shares = {name: one for name, one in configs.items() if name.startswith(f"{path.stem}-tp")}
        whole = aot_dla.Config(
            path.stem, aot_dla.BF16, model.key_dim, model.value_dim, model.backbone == "gdn", capacity,
            model.num_heads, model.num_groups, learned=model.tau_mode == "learned",
        )  # fmt: skip
        if run_config.training.device == "cuda" and LETTERS[letter].states:
            assert aot_dla.kernels_of(whole) in {aot_dla.kernels_of(one) for one in configs.values()}, path
        else:
            assert not shares, path
        for name, one in shares.items():
            tensor = int(name.rpartition("-tp")[2])
            sizes = (model.num_heads // tensor, max(1, model.num_groups // tensor), model.key_dim, model.value_dim)
            assert (one.heads, one.groups, one.key_dim, one.value_dim) == sizes
            assert (one.capacity, one.delta) == (capacity, model.backbone == "gdn")
            assert set(one.archs) == set(aot.ARCHS)
            assert beyond_kernels(model.key_dim, model.value_dim, capacity) == ""
    tp1 = [aot_dla.kernels_of(one) for name, one in configs.items() if name.endswith("-tp1")]
    assert len(tp1) == len(set(tp1))  # no shape twice
    assert {"dla_mamba2_780m-tp1", "dla_mamba2_780m-tp2", "dla_gdn_1b3-tp1", "dla_gdn_1b3-tp8"} <= set(configs)
