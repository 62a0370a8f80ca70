"""`dla bench export` at tiny sizes: what it measures and writes."""

import json
from pathlib import Path

import pytest
import torch

from megatron_dla.cli import main
from megatron_dla.kernels.bench import export


def test_every_number_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules_cache: None) -> None:
    sizes = {"PROMPTS": (32,), "BATCHES": (1, 2), "PADDED": (2, 24), "CONTEXT": 8, "STEPS": 2, "REPEATS": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(export, name, value)
    monkeypatch.setattr(export, "LENGTHS", (64,))
    monkeypatch.setattr(export, "RECURRENT", 4)
    threads = torch.get_num_threads()
    try:
        options = ["--attention", "--budget", "0.001", "--backbones", "gdn", "--out", str(tmp_path / "new")]
        assert main(["bench", "export", *options]) == 0
    finally:
        torch.set_num_threads(threads)
    results = json.loads((tmp_path / "new" / "export_cpu.json").read_text())
    counts = []
    for name in export.models():
        numbers = results[name]
        assert set(numbers) == {"parameters", "prefill 32", "decode 1", "decode 2", "padded"}
        assert all(value > 0 for value in numbers.values())
        counts.append(numbers["parameters"])
    assert max(counts) < 1.1 * min(counts)
    for heads in (4, 16):
        numbers = results[f"gdn, {heads} heads"]
        assert set(numbers) == {"dla 64", "sdpa 64", "boundaries 64", "recurrence"}
        assert numbers["recurrence"] > numbers["dla 64"]


@pytest.mark.parametrize("budget", ["0", "-1", "nan"])
def test_budget_out_of_range(budget: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "export", "--budget", budget, "--out", str(tmp_path / "new")]) == 2
    assert f"--budget {budget}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_softmax_is_causal_attention() -> None:
    x = export.make_inputs(export.Problem("mamba2", 40, 8, 4, heads=2), 0, dtype=torch.float64)
    scores = torch.einsum("btgd,bsgd->bts", x.q, x.k).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    want = torch.einsum("bts,bshd->bthd", scores.softmax(-1), x.v)
    torch.testing.assert_close(export._sdpa(*x.arguments()), want)
