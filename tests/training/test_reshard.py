"""A checkpoint means the same at every layout: saved at TP2 x DP2 ZeRO-1, it resumes at any other with equal losses."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_dla.checkpoint.optimizer import SavedState
from megatron_dla.errors import CheckpointError
from megatron_dla.files import load_tensors, save_tensors
from tests.support import tiny, train_workers

MODELS = {
    "mamba2": {"backbone": "mamba2", "tau_mode": "learned"},
    "hybrid": {"backbone": "gdn", "pattern": "DA", "tie_embeddings": True},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.build_data(tmp_path_factory.mktemp("corpus"))


def config(data: Path, runs: Path, name: str, model: str, tensor: int, stage: int, **training) -> dict:
    return tiny.config_dict(
        data, runs, run={"name": name}, model=MODELS[model], parallel={"tensor_model_parallel_size": tensor},
        training={"steps": 10, "save_every": 5, "keep_checkpoints": 0, "zero_stage": stage} | training,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(data, pools, tmp_path_factory):
    """{model: (run directory, metrics)} of the uninterrupted run, with a checkpoint at step 5."""
    from tests.support.distributed import Ranks

    pools.setdefault(4, Ranks(4))
    runs, found = tmp_path_factory.mktemp("straight"), {}
    for model in MODELS:
        values = config(data, runs, model, model, 2, 1)
        found[model] = runs / model, pools[4].run(train_workers.train, values)[0]
    return found


def resumed(ranks, data, straight, tmp_path, model: str, world: int, values_change: dict, stop: int = 10) -> list[dict]:
    """Metrics of the steps after 5 (or after the newest checkpoint in tmp_path) at another layout."""
    target = tmp_path / "run"
    if not target.exists():
        shutil.copytree(straight[model][0], target)
        shutil.rmtree(target / "checkpoints" / "step_10")
    values = config(data, tmp_path, "run", model, 1, 1)
    for section, change in values_change.items():
        values[section] |= change
    values["training"] |= {"steps": stop}
    values["optimizer"] |= {"min_lr_ratio": 0.1}
    return ranks(world).run(train_workers.train, values)[0]


def same_losses(got: list[dict], want: list[dict]) -> None:
    assert [m["step"] for m in got] == [m["step"] for m in want]
    for key, limit in (("loss", 2e-5), ("grad_norm", 1e-4), ("lr", 1e-12)):
        known = [(a[key], b[key]) for a, b in zip(got, want, strict=True) if a[key] is not None]
        assert known or key == "grad_norm"  # DeepSpeed's stage 0 reports no norm
        for a, b in known:
            assert a == pytest.approx(b, rel=limit), key


LAYOUTS = {
    "tp1": ("mamba2", 1, {}),
    "tp4, shared groups": ("mamba2", 4, {"parallel": {"tensor_model_parallel_size": 4}}),
    "tp1 dp2 zero2": ("hybrid", 2, {"training": {"zero_stage": 2}}),
    "dp2 zero0": ("mamba2", 2, {"training": {"zero_stage": 0}}),
    "tp2 dp2 zero3": ("hybrid", 4, {"parallel": {"tensor_model_parallel_size": 2}, "training": {"zero_stage": 3}}),
    "tp2+sp cp2 zero2": (
        "mamba2", 4,
        {
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2},
            "training": {"zero_stage": 2},
        },
    ),
}  # fmt: skip


MORE = {"tp1", "tp1 dp2 zero2", "dp2 zero0"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n in MORE)) for n in LAYOUTS])
def test_the_next_losses_are_those_of_the_uninterrupted_run(ranks, data, straight, tmp_path, name: str) -> None:
    model, world, change = LAYOUTS[name]
    got = resumed(ranks, data, straight, tmp_path, model, world, change)
    same_losses(got[5:], straight[model][1][5:])


@pytest.mark.parametrize("stage", [0, 3])
def test_there_and_back(ranks, data, straight, tmp_path, stage: int) -> None:
    """Two steps at DP2 and stage 0 or 3, then back to TP2 x DP2 ZeRO-1."""
    change = {"training": {"zero_stage": stage, "save_every": 1}}
    got = resumed(ranks, data, straight, tmp_path, "mamba2", 2, change)
    same_losses(got[5:], straight["mamba2"][1][5:])
    for step in (8, 9, 10):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step}")
    got = resumed(ranks, data, straight, tmp_path, "mamba2", 4, {"parallel": {"tensor_model_parallel_size": 2}})
    same_losses(got[7:], straight["mamba2"][1][7:])


def test_the_same_layout_goes_on_bit_for_bit(ranks, data, straight, tmp_path) -> None:
    got = resumed(ranks, data, straight, tmp_path, "hybrid", 4, {"parallel": {"tensor_model_parallel_size": 2}})
    want = straight["hybrid"][1]
    for a, b in zip(got, want, strict=True):
        assert (a["step"], a["loss"], a["grad_norm"]) == (b["step"], b["loss"], b["grad_norm"])
    ends = [SavedState(p / "checkpoints" / "step_10") for p in (tmp_path / "run", straight["hybrid"][0])]
    for name, tag in ends[0].layout.tags.items():
        for quantity in ("master", "exp_avg", "exp_avg_sq"):
            a, b = (end.parameter(name, tag, quantity) for end in ends)
            assert torch.equal(a, b) and a.abs().max() > 0, (name, quantity)


@pytest.mark.parametrize("quantity, value", [("master", float("nan")), ("exp_avg", float("inf")), ("exp_avg_sq", -1.0)])
def test_optimizer_state_that_no_optimizer_has_is_refused(straight, tmp_path, quantity: str, value: float) -> None:
    step = Path(shutil.copytree(straight["hybrid"][0] / "checkpoints/step_10", tmp_path / "step_10"))
    path = next((step / "optimizer").glob("*.safetensors"))
    tensors, metadata = load_tensors(path)
    key = next(key for key in tensors if f"|{quantity}|" in key)
    tensors[key].view(-1)[-1] = value
    save_tensors(tensors, path, metadata)
    saved, name = SavedState(step), key.split("|")[0]
    with pytest.raises(CheckpointError, match=rf"optimizer.*{re.escape(name)}\|{quantity}"):
        saved.parameter(name, saved.layout.tags[name], quantity)


@pytest.mark.long
def test_bf16_goes_on_from_its_fp32_master_weights(ranks, data, tmp_path) -> None:
    def run(name: str, steps: int, stage: int, world: int = 2) -> list[dict]:
        values = config(data, tmp_path, name, "mamba2", 1, stage, precision="bf16", steps=10, save_every=4)
        values["optimizer"] |= {"warmup_steps": 1}
        return ranks(world).run(train_workers.train, values | {"training": values["training"] | {"steps": steps}})[0]

    whole = run("whole", 8, 1)
    assert [m["step"] for m in whole] == list(range(1, 9))
    for name, stage, world, limit in (("same", 1, 2, 0), ("stage2", 2, 2, 2e-3), ("alone", 1, 1, 2e-3)):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step_8")
        got = run(name, 8, stage, world)
        for a, b in zip(got, whole, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=limit, abs=0), (name, a["step"])
