"""Which checkpoints are kept: `checkpoint.retention`."""

from pathlib import Path

import pytest

from megatron_dla.checkpoint.find import checkpoint_dir
from megatron_dla.checkpoint.integrity import seal
from megatron_dla.checkpoint.retention import Retention, apply_retention, prune

LOSSES = {10: 3.0, 20: 2.0, 30: None, 40: 1.5, 50: 1.7, 60: float("nan"), 70: 1.6}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step, loss in LOSSES.items():
        path = checkpoint_dir(tmp_path) / f"step_{step}"
        path.mkdir(parents=True)
        seal(path, {"step": step} | ({} if loss is None else {"val_loss": loss}))
    return tmp_path


@pytest.mark.parametrize(
    "rule,kept",
    [
        (Retention(0), set(LOSSES)),
        (Retention(2), {60, 70}),
        (Retention(1, every=30), {30, 60, 70}),
        (Retention(1, best=2), {40, 70}),
        (Retention(1, best=3), {40, 50, 70}),
        (Retention(1, permanent=(10, 99)), {10, 70}),
        (Retention(100), set(LOSSES)),
    ],
)
def test_what_is_kept(run: Path, rule: Retention, kept: set[int]) -> None:
    assert {x.step for x in apply_retention(run, rule) if x.reasons} == kept
    assert prune(run, rule) == []
    assert {path.name for path in checkpoint_dir(run).iterdir()} == {f"step_{step}" for step in kept}


def test_a_checkpoint_without_a_readable_marker_is_not_the_best(run: Path) -> None:
    (checkpoint_dir(run) / "step_40" / "complete.json").write_text("{")
    assert {x.step for x in apply_retention(run, Retention(1, best=1)) if x.reasons} == {70}
