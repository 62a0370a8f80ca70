"""`dla bench kernels` on a CPU at tiny sizes: what it writes, what it refuses, how it judges."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_dla.cli import main
from megatron_dla.kernels.bench import report, targets
from megatron_dla.kernels.bench.account import Ceilings, dla_work, softmax_work
from megatron_dla.kernels.bench.inputs import BACKBONES, TAU, Problem, make_inputs, mean_live_slots
from megatron_dla.kernels.bench.methods import methods
from megatron_dla.kernels.bench.sweep import Sweep, _too_long, run_sweep
from megatron_dla.kernels.bench.timing import Stopwatch
from megatron_dla.kernels.bench.tune import difference, tune_kernel
from megatron_dla.kernels.common import tuned
from megatron_dla.kernels.dla import partition

SMALL = Problem("mamba2", tokens=600, dim=16, capacity=4, heads=3)


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sweep(**changes) -> Sweep:
    cpu = torch.device("cpu")
    base = Sweep(
        device=cpu, backend="torch", seed=0, lengths=[64, 128], capacities=[3, 4], dims=[16], backbones=list(BACKBONES),
        heads=2, ceilings=Ceilings(0.1, 0.1), watch=Stopwatch(cpu, 0.01, least=1, most=2), dtype=torch.float32,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_inputs_have_realistic_boundaries_and_are_repeatable(backbone: str) -> None:
    p = replace(SMALL, backbone=backbone, tokens=2500, dim=64)
    x, again = (make_inputs(p, 5, dtype=torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(x.leaves(), again.leaves(), strict=True))
    part = partition(x.k, x.v, x.g, x.beta, tau=TAU, capacity=p.capacity)
    assert 1 / 50 < float(part.start.float().mean()) < 1 / 25
    assert not torch.equal(part.start[..., 0], part.start[..., 1])  # heads disagree
    assert x.q.shape[2] == (1 if backbone == "mamba2" else p.heads) and (x.beta is None) == (backbone == "mamba2")


def test_mean_live_slots_counts_what_is_alive() -> None:
    x = make_inputs(SMALL, 0, dtype=torch.float32)
    part = partition(x.k, x.v, x.g, tau=TAU, capacity=SMALL.capacity)
    t = torch.arange(SMALL.tokens)
    alive = (
        part.start.transpose(1, 2)[:, :, None]
        & (t <= t[:, None])
        & (part.death.transpose(1, 2)[:, :, None] > t[:, None])
    )
    assert mean_live_slots(part) == pytest.approx(float(alive.sum(-1).double().mean()))
    assert mean_live_slots(part) <= SMALL.capacity


def test_every_method_is_measured_or_says_why_not() -> None:
    shown: list[str] = []
    records = run_sweep(sweep(), lambda record, progress: shown.append(report.table_line(record) + progress))
    assert len(shown) == len(records)
    dla = [r for r in records if r["method"] == "dla"]
    assert len(dla) == 8 and all({"forward_ms", "both_ms", "partition_share", "live_slots"} <= set(r) for r in dla)
    assert {r["method"] for r in records if "both_ms" in r} >= {"dla", "sdpa"}
    for r in records:
        assert "both_ms" in r or r["error"], r


def test_a_method_that_raises_is_a_row_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(x, p):
        raise RuntimeError("this GPU is not for me\nmore")

    broken = [replace(m, prepare=refuse) if m.name == "sdpa" else m for m in methods("torch")]
    monkeypatch.setattr("megatron_dla.kernels.bench.sweep.methods", lambda backend: broken)
    records = run_sweep(sweep(lengths=[64], capacities=[3]), lambda record, progress: None)
    errors = [r["error"] for r in records if r["method"] == "sdpa"]
    assert errors == ["forward: RuntimeError: this GPU is not for me"]


def test_the_floor_grows_as_the_work_does() -> None:
    twice = replace(SMALL, tokens=2 * SMALL.tokens)
    assert dla_work(twice, 4.0, 2).forward_flops == 2 * dla_work(SMALL, 4.0, 2).forward_flops
    assert softmax_work(twice, 2).both_flops == 4 * softmax_work(SMALL, 2).both_flops
    assert dla_work(SMALL, 4.0, 2).forward_bytes < dla_work(SMALL, 4.0, 4).forward_bytes
    assert Ceilings(1.0, 1.0).floor_ms(2e9, 1e9) == pytest.approx(2.0)


def test_lengths_that_would_take_too_long_are_left_out() -> None:
    assert _too_long((1000, 15.0), replace(SMALL, tokens=2000), 20.0)
    assert _too_long((1000, 5.0), replace(SMALL, tokens=2000), 20.0) is None
    assert _too_long(None, SMALL, 20.0) is None


def _dla_row(tokens: int, us: float) -> dict:
    ms = us * tokens / 1e3
    row = {"kind": "attention", "method": "dla", "backbone": "gdn", "capacity": 4, "dim": 16, "tokens": tokens}
    return {**row, "forward_ms": ms, "forward_spread_ms": [ms, ms]}


@pytest.mark.parametrize("us,passed", [([100, 120], True), ([100, 130], False), ([130, 100], False)])
def test_flatness_is_judged_both_ways(us: list[float], passed: bool) -> None:
    rows = [_dla_row(2048, us[0]), _dla_row(4096, us[1])]
    assert [p for p, _ in targets.check_targets(rows, [2048, 4096])] == [passed]
    assert [p for p, _ in targets.check_targets(rows, [2048, 4096, 8192])] == [False]  # a length is missing


def test_a_disturbed_length_is_timed_again() -> None:
    s = sweep(lengths=[64, 128], capacities=[3], backbones=["mamba2"])
    run_sweep(s, lambda record, progress: None)
    row = next(r for r in s.records if r["method"] == "dla" and r["tokens"] == 128)
    before, row["forward_spread_ms"] = row["forward_repeats"], [1e6, 1e6]
    targets.look_again(s, rounds=1)
    assert row["forward_spread_ms"][0] < 1e6 and row["forward_repeats"] == before + 1


@pytest.mark.parametrize("speedup,passed", [(20.0, True), (19.9, False)])
def test_the_recurrence_target(speedup: float, passed: bool) -> None:
    row = {"kind": "recurrence", "method": "dla", "backbone": "gdn", "tokens": 4096, "heads": 2, "speedup": speedup}
    assert [p for p, _ in targets.check_targets([row], [])] == [passed]


def test_command_writes_json_and_plot_and_exits_by_the_targets(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(targets, "SPEEDUP", 0.0)
    monkeypatch.setattr(targets, "FLATNESS", 1e9)
    monkeypatch.setattr(targets.recurrence_records, "__defaults__", (64,))
    command = ["bench", "kernels", "--device", "cpu", "--heads", "1", "--dims", "16", "--capacities", "3"]
    command += ["--lengths", "64", "128", "--budget", "0.01", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "PASS gdn: chunkwise" in printed and "fwd ms" in printed and "ms/token" in printed
    found = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert found["torch"] == torch.__version__ and found["config"]["lengths"] == [64, 128]
    assert all(r["difference"] < 1e-5 for r in found["records"] if r["kind"] == "recurrence")
    assert (tmp_path / "kernels_cpu.png").stat().st_size > 10_000
    monkeypatch.setattr(targets, "SPEEDUP", 1e9)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "FAIL gdn: chunkwise" in printed and "plot left out" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels_cpu.json", "kernels_cpu.png"]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_dla.kernels.bench.run.run_decode", stop)
    assert main(command) == 130
    partial = json.loads((tmp_path / "kernels_cpu.partial.json").read_text())
    assert {r["tokens"] for r in partial["records"]} == {64, 128}  # nothing measured is lost


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--tune", "--device", "cpu"], ["--tune", "CUDA"]),
        (["--lengths", "0"], ["--lengths 0", "at least 2"]),
        (["--capacities", "1"], ["--capacities 1"]),
        (["--heads", "-3"], ["--heads -3"]),
        (["--heads", "0"], ["--heads 0", "at least 1"]),
        (["--budget", "nan"], ["--budget nan"]),
        (["--budget", "0"], ["--budget 0"]),
        (["--budget", "-1"], ["--budget -1"]),
        (["--seed", str(2**70)], [f"--seed {2**70}"]),
        (["--lengths", "2", "--heads", str(2**40)], [f"--heads {2**40}", "--lengths 2 ", "GB of memory"]),
        (["--lengths", str(2**40)], [f"--lengths {2**40}"]),
        (["--dims", str(2**70)], [f"--dims {2**70}"]),
        (["--out", __file__], ["is a file"]),
        (["--out", f"{__file__}/deeper"], [f"{__file__}/deeper", "Not a directory"]),
    ],
)
def test_requests_that_cannot_be_measured(capsys, arguments: list[str], words: list[str]) -> None:
    arguments = arguments if "--device" in arguments else ["--device", "cpu", *arguments]
    assert main(["bench", "kernels", *arguments]) == 2
    printed, line = capsys.readouterr()
    assert len(line.strip().splitlines()) == 1 and all(word in line for word in words), line
    assert not printed  # refused before anything is measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("command", [["bench", "kernels"], ["bench", "kernels", "--tune"], ["smoke"]])
def test_cuda_where_there_is_none(capsys, command: list[str]) -> None:
    assert main([*command, "--device", "cuda"]) == 2
    assert "CUDA" in capsys.readouterr().err


def test_tuning_refuses_wrong_and_failing_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "KERNELS", {})
    candidates = [{"num_warps": 1}, {"num_warps": 2}, {"num_warps": 8}]
    tuned.register("toy", {"num_warps": 4}, candidates, operation="forward")
    cost = {4: 10.0, 1: 1.0, 2: 1.0, 8: 5.0}

    def warps() -> int:
        config = tuned.launch_config("toy", dtype=torch.float32, dk=16, dv=16, capacity=4, device="cpu")
        return config["num_warps"]

    def call() -> list[torch.Tensor]:
        if warps() == 2:
            raise RuntimeError("out of shared memory")
        return [torch.ones(3) * (2.0 if warps() == 1 else 1.0)]  # one warp computes something else

    class Watch:
        def measure(self, call):
            return type("T", (), {"ms": cost[warps()]})()

    found = tune_kernel(sweep(watch=Watch()), "toy", call)
    assert found["config"] == {"num_warps": 8} and found["ms"] == 5.0
    assert [r["config"]["num_warps"] for r in found["refused"]] == [1, 2]
    assert difference([torch.tensor([float("nan")])], [torch.ones(1)]) == float("inf")
