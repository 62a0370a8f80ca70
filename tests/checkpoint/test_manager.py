"""Saves beside training, on a full disk, and starts from damaged checkpoints: `checkpoint.manager`, with real ranks."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from megatron_dla.checkpoint.find import checkpoint_dir
from megatron_dla.checkpoint.integrity import find_faults, read_marker
from megatron_dla.metrics.sinks import read_metrics
from tests.checkpoint.test_integrity import check_damages
from tests.support import tiny, train_workers

TRAINING = {"steps": 4, "save_every": 1, "keep_checkpoints": 0, "eval_every": 2, "eval_rows": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.build_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(pools, data: Path, tmp_path_factory) -> Path:
    """An undisturbed run of two ranks: TP 1, ZeRO-1, a checkpoint every step, in the background."""
    from tests.support.distributed import Ranks

    pools[2] = Ranks(2)
    runs = tmp_path_factory.mktemp("runs")
    pools[2].run(train_workers.train, tiny.config_dict(data, runs, training=TRAINING))
    return runs / "tiny"


def names(run: Path) -> set[str]:
    return {path.name for path in checkpoint_dir(run).iterdir()}


def tensors(run: Path, step: int) -> dict[str, str]:
    """{file: SHA-256} of what the state of training is in."""
    files = read_marker(checkpoint_dir(run) / f"step_{step}")["files"]
    return {name: record["sha256"] for name, record in files.items() if not name.endswith((".yaml", ".pt"))}


def test_a_checkpoint_written_beside_training_is_that_of_its_step(ranks, data, straight, tmp_path) -> None:
    values = tiny.config_dict(data, tmp_path, training=TRAINING, checkpoint={"background": False})
    ranks(2).run(train_workers.train, values)
    for step in range(1, 5):
        path = checkpoint_dir(straight) / f"step_{step}"
        assert not find_faults(path)
        assert {"optimizer/tp_00_dp_0001.safetensors", "data_state.json", "layout.json"} <= tensors(
            straight, step
        ).keys()
        assert tensors(straight, step) == tensors(tmp_path / "tiny", step)
        assert ("val_loss" in read_marker(path)) == (step % 2 == 0)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_memory_of_the_first_save_is_made_beside_training(ranks, data, tmp_path, stage) -> None:
    values = tiny.config_dict(data, tmp_path, training={"steps": 4, "save_every": 2, "zero_stage": stage})
    for rank, (made, asked) in enumerate(ranks(2).run(train_workers.made_buffers, values)):
        wanted = [size for size in made if size]
        assert asked == wanted * 2 and len(wanted) == (2 if rank == 0 else min(stage, 1))


def test_a_hundred_damages_of_a_real_checkpoint(straight, tmp_path) -> None:
    check_damages(Path(shutil.copytree(straight, tmp_path / "run")), 100)


def test_a_save_that_waits_is_known_to_the_watchdog(ranks, data, tmp_path) -> None:
    training = {"steps": 4, "save_every": 2}
    for background, first in ((True, "save"), (False, "waiting_save")):
        values = tiny.config_dict(data, tmp_path / first, training=training, checkpoint={"background": background})
        doings, *_ = ranks(2).run(train_workers.doings, values)
        assert doings == [(first, 2), ("waiting_save", 4)]


@pytest.mark.parametrize("policy", ["fallback", "refuse"])
def test_a_damaged_checkpoint_is_passed_over_or_refused(ranks, data, straight, tmp_path, policy) -> None:
    shutil.copytree(straight, tmp_path / "tiny")
    (tmp_path / "tiny" / "done").unlink()
    damaged = checkpoint_dir(tmp_path / "tiny") / "step_4" / "optimizer" / "tp_00_dp_0001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-9] ^= 1
    damaged.write_bytes(content)
    values = tiny.config_dict(data, tmp_path, training=TRAINING, checkpoint={"damaged": policy})
    if policy == "refuse":
        with pytest.raises(AssertionError, match=r"CheckpointError.*step_4.*optimizer/tp_00_dp_0001"):
            ranks(2).run(train_workers.train, values)
        assert names(tmp_path / "tiny") == names(straight)
        return
    printed = ranks(2).run(train_workers.resume_note, values)[0]
    assert "step_4" in printed and "optimizer/tp_00_dp_0001.safetensors" in printed and "at step 3" in printed
    ranks(2).run(train_workers.train, values)
    assert names(tmp_path / "tiny") == {*names(straight), "step_4.damaged"}
    assert tensors(tmp_path / "tiny", 4) == tensors(straight, 4)
    again, before = (read_metrics(run / "metrics.jsonl") for run in (tmp_path / "tiny", straight))
    assert [m.get("loss") for m in again] == [m.get("loss") for m in before]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_costs_one_checkpoint(ranks, data, straight, tmp_path, background) -> None:
    values = tiny.config_dict(data, tmp_path, training=TRAINING, checkpoint={"background": background})
    printed, error, metrics = ranks(2).run(train_workers.on_a_full_disk, values, [2, 3])[0]
    assert not error and names(tmp_path / "tiny") == {"step_1", "step_4"}
    assert tensors(tmp_path / "tiny", 4) == tensors(straight, 4)
    lines = [line for line in printed.splitlines() if line.startswith("warning") and "step_" in line]
    assert len(lines) == 2 and all("step_" in line and "bytes" in line and "No space left" in line for line in lines)
    assert "1 of at most 3" in lines[0] and "2 of at most 3" in lines[1]


def test_twenty_saves_on_disks_that_are_really_full(ranks, data, disk) -> None:
    rng = random.Random(7)
    shares = {step: rng.uniform(0, 0.95) for step in range(2, 26) if step % 5 != 1}
    shares |= {2: 0.0, 13: 0.0}  # not a byte: neither the heartbeat nor the log can be written
    training = TRAINING | {"steps": 26, "keep_checkpoints": 1, "eval_every": 0}
    values = tiny.config_dict(data, disk, training=training, checkpoint={"max_failures": 5}, model={"num_layers": 1})
    printed, found = ranks(2).run(train_workers.on_small_disks, values, shares)[0]
    assert found == [f"step_{(step - 2) // 5 * 5 + 1}" for step in shares]  # the last good one, and no .partial
    lines = [line for line in printed.splitlines() if line.startswith("warning") and "step_" in line]
    assert len(lines) == 20, printed
    for step, line in zip(shares, lines, strict=True):
        assert f"step_{step}." in line and "bytes" in line and "No space left" in line
    assert names(disk / "tiny") == {"step_26"} and not find_faults(checkpoint_dir(disk / "tiny") / "step_26")


@pytest.mark.parametrize("steps,kept", [([1, 2, 3], set()), ([4], {"step_1", "step_2", "step_3"})])
def test_too_many_failed_saves_or_the_last_one_end_the_run(ranks, data, tmp_path, steps, kept) -> None:
    values = tiny.config_dict(data, tmp_path, training=TRAINING)
    for _, error, metrics in ranks(2).run(train_workers.on_a_full_disk, values, steps):
        assert error.startswith("28 ") and f"step_{steps[-1]}" in error and metrics[-1]["step"] == steps[-1]
    assert names(tmp_path / "tiny") == kept and not (tmp_path / "tiny" / "done").exists()
