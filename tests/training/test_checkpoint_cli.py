"""`dla checkpoint list | verify | prune`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_dla.checkpoint.find import checkpoint_dir
from megatron_dla.checkpoint.integrity import DATA_STATE, seal
from megatron_dla.cli import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(
        "training: {keep_checkpoints: 2}\ncheckpoint: {keep_every: 20, keep_best: 1}\n"
    )
    for step in (10, 20, 30, 40, 50):
        path = checkpoint_dir(tmp_path) / f"step_{step}"
        path.mkdir(parents=True)
        (path / DATA_STATE).write_text(json.dumps({"steps": step}))
        seal(path, {"step": step, "val_loss": 2.0 + step / 100})
    return tmp_path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in checkpoint_dir(run).iterdir())


def test_list(run: Path, capsys) -> None:
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == [f"step_{step}" for step in (10, 20, 30, 40, 50)]
    assert lines["step_10"].endswith("best") and lines["step_20"].endswith("every")
    assert lines["step_30"].endswith("not kept by the config") and lines["step_40"].endswith("newest, every")
    assert "val_loss 2.3000" in lines["step_30"]


def test_verify_names_the_file(run: Path, capsys) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    path = checkpoint_dir(run) / "step_30"
    (path / DATA_STATE).write_text(json.dumps({"steps": 31}))
    for given in (run, path):
        capsys.readouterr()
        assert main(["checkpoint", "verify", str(given)]) == 1
        (line,) = [line for line in capsys.readouterr().out.splitlines() if not line.endswith("whole")]
        assert str(path) in line and DATA_STATE in line
    assert main(["checkpoint", "verify", str(run / "none")]) == 2


def test_prune_keeps_what_the_config_keeps(run: Path, capsys) -> None:
    for name in ("step_35", "step_60.a.partial", "step_25.damaged"):
        (checkpoint_dir(run) / name).mkdir()
    before = names(run)
    assert main(["checkpoint", "prune", str(run), "--dry-run"]) == 0 and names(run) == before
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main(["checkpoint", "prune", str(run)]) == 0
    assert names(run) == ["step_10", "step_20", "step_40", "step_50"]
    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert names(run) == ["step_10", "step_20", "step_40", "step_50"]  # the others are kept for other reasons
    assert main(["checkpoint", "prune", str(run), "--keep", "0"]) == 2


def test_prune_does_not_delete_the_only_whole_one(run: Path, capsys) -> None:
    for step in (10, 20, 40, 50):  # all that the config keeps
        (checkpoint_dir(run) / f"step_{step}" / DATA_STATE).write_text("{}")
    before = names(run)
    assert main(["checkpoint", "prune", str(run)]) == 2 and names(run) == before
    assert "step_50" in capsys.readouterr().err
    shutil.rmtree(checkpoint_dir(run) / "step_50")
    assert main(["checkpoint", "prune", str(run), "--keep", "2"]) == 0 and "step_30" in names(run)


def test_prune_is_refused_while_the_run_is_alive(run: Path) -> None:
    from megatron_dla.training.fence import Fence

    (checkpoint_dir(run) / "step_60.a.partial").mkdir()
    before, fence = names(run), Fence(run, "alive.1")
    fence.claim()
    try:
        assert main(["checkpoint", "prune", str(run)]) == 2 and names(run) == before
    finally:
        fence.release()
