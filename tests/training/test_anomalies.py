"""Losses and gradients that are not finite and spikes of the loss, on real ranks: `training.anomalies`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_dla.checkpoint.find import checkpoint_dir
from megatron_dla.checkpoint.integrity import read_marker
from megatron_dla.cli import main
from megatron_dla.config import AnomalySection
from megatron_dla.training.anomalies import RECORDS, Anomalies, LossWatch
from tests.support import tiny, train_workers

ROOT = Path(__file__).resolve().parents[2]
NAN = math.nan


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.build_data(tmp_path_factory.mktemp("corpus"))


def config(data: Path, runs: Path, name: str = "run", **sections) -> dict:
    return tiny.config_dict(data, runs, run={"name": name}, **sections)


def state(run: Path, step: int) -> dict[str, str]:
    """{file: SHA-256} of weights and optimizer."""
    files = read_marker(checkpoint_dir(run) / f"step_{step}")["files"]
    return {name: record["sha256"] for name, record in files.items() if name.endswith(".safetensors")}


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / RECORDS).read_text().splitlines()]


# ---- the decisions alone


def test_a_spike_does_not_move_the_limit_and_a_new_level_does() -> None:
    found = Anomalies(AnomalySection(window=16, min_losses=8, spike_threshold=10.0, max_consecutive=3))
    for i in range(20):
        assert not found.judge(5.0 + 0.01 * (i % 3), 1.0) and found.found is None
    limit = found.watch.limit()
    assert 5.01 < limit < 5.2
    for _ in range(2):
        assert not found.judge(9.0, 1.0)
        assert found.found is not None and found.found.kind == "spike" and found.watch.limit() == limit
    assert not found.judge(4.0, 1.0) and found.found is None  # a fall is none
    for _ in range(3):
        found.judge(9.0, 1.0)
    assert found.watch.limit() == math.inf and not found.judge(9.0, 1.0) and found.found is None


def test_equal_losses_do_not_make_a_spike_of_everything() -> None:
    watch = LossWatch(8, 4, 10.0, [2.0] * 8)
    assert 2.0 < watch.limit() < 2.1


def test_the_state_decides_as_before() -> None:
    section = AnomalySection(window=8, min_losses=4, spike="skip", max_consecutive=4)
    losses = [3.0, 2.9, 2.95, 2.8, 9.0, NAN, 2.85, 9.0, 9.0, 2.7]
    whole, first = Anomalies(section), Anomalies(section)
    for number, loss in enumerate(losses):
        if number == 6:
            second = Anomalies(section)
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            first = second
        assert whole.judge(loss, 1.0) == first.judge(loss, 1.0)
        assert whole.state_dict() == first.state_dict()
    assert whole.skipped == 4 and whole.in_a_row == 0 and whole.records == 4


# ---- in a run


@pytest.mark.parametrize("stage", [pytest.param(n, marks=[pytest.mark.long] * (n in (0, 2))) for n in range(4)])
def test_a_gradient_of_one_rank_that_is_not_a_number_leaves_out_the_update_of_all(ranks, data, tmp_path, stage) -> None:
    """The first step and a later one; without them as one that never saw them, bit for bit."""
    training = {"zero_stage": stage, "steps": 5}
    got = ranks(2).run(train_workers.anomalous, config(data, tmp_path, training=training), {1: 0, 3: 1}, {})
    printed, metrics = got[0]
    assert printed.count("the gradient is not finite") == 2
    assert [m["grad_norm"] is None for m in metrics] == [True, False, True, False, False]
    assert [m["skipped_steps"] for m in metrics] == [1, 1, 2, 2, 2]
    ranks(2).run(train_workers.without_updates, config(data, tmp_path, "never", training=training), {1, 3})
    assert state(tmp_path / "run", 5) == state(tmp_path / "never", 5)
    first, second = records(tmp_path / "run")
    assert (first["step"], first["kind"], first["action"], first["batch"]) == (1, "gradient", "skip", 0)
    assert (second["step"], second["rows"], second["data"]["steps"]) == (3, [16, 23], 2)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_same_in_bf16(ranks, data, tmp_path, stage) -> None:
    training = {"zero_stage": stage, "steps": 4, "precision": "bf16"}
    ranks(2).run(train_workers.anomalous, config(data, tmp_path, training=training), {2: 1}, {})
    ranks(2).run(train_workers.without_updates, config(data, tmp_path, "never", training=training), {2})
    assert state(tmp_path / "run", 4) == state(tmp_path / "never", 4)
    assert [r["step"] for r in records(tmp_path / "run")] == [2]


@pytest.mark.parametrize(("stage", "tensor"), [pytest.param(0, 1, marks=pytest.mark.long), (1, 2), (3, 1)])
def test_the_update_of_a_spike_is_left_out(ranks, data, tmp_path, stage, tensor) -> None:
    anomalies, parallel = {"min_losses": 3, "spike": "skip"}, {"tensor_model_parallel_size": tensor}
    values = config(data, tmp_path, training={"zero_stage": stage, "steps": 6}, anomalies=anomalies, parallel=parallel)
    printed, metrics = ranks(2).run(train_workers.anomalous, values, {}, {5: (0, 3.0)})[0]
    assert "step 5: the loss of" in printed and [m["skipped_steps"] for m in metrics] == [0, 0, 0, 0, 1, 1]
    (record,) = records(tmp_path / "run")
    assert record["loss"] == metrics[4]["loss"] > record["limit"] and record["grad_norm"] > 0
    never = config(data, tmp_path, "never", training=values["training"], anomalies={"spike": "off"}, parallel=parallel)
    ranks(2).run(train_workers.without_updates, never, {5})
    assert state(tmp_path / "run", 6) == state(tmp_path / "never", 6)


def test_a_resumed_run_decides_as_the_undisturbed_one(ranks, data, tmp_path) -> None:
    """The window, the counts and the schedule after a skipped step; records of steps that are repeated are replaced."""
    anomalies = {"min_losses": 3, "window": 4}
    where = {3: (1, NAN), 7: (0, 3.0), 8: (0, NAN)}
    whole = config(data, tmp_path, "whole", training={"steps": 9, "save_every": 5}, anomalies=anomalies)
    straight = ranks(2).run(train_workers.anomalous, whole, {}, where)[0][1]
    parts = config(data, tmp_path, "parts", training={"steps": 9, "save_every": 5}, anomalies=anomalies)
    ranks(2).run(train_workers.anomalous, parts, {}, where)
    for step in (checkpoint_dir(tmp_path / "parts") / "step_9", tmp_path / "parts" / "done"):
        step.rename(tmp_path / step.name)
    resumed = ranks(2).run(train_workers.anomalous, parts, {}, where)[0][1]
    same = {"step", "loss", "grad_norm", "lr", "skipped_steps", "data_crc32"}
    assert [{k: m[k] for k in same} for m in resumed] == [{k: m[k] for k in same} for m in straight]
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert [r["action"] for r in records(tmp_path / "whole")] == ["skip", "report", "skip"]
    data_state = [(checkpoint_dir(tmp_path / n) / "step_9" / "data_state.json").read_text() for n in ("parts", "whole")]
    assert state(tmp_path / "parts", 9) == state(tmp_path / "whole", 9) and data_state[0] == data_state[1]


REWIND = {"min_losses": 3, "spike": "rewind", "spike_threshold": 5.0}


@pytest.mark.parametrize(
    ("stage", "tensor", "precision"),
    [
        pytest.param(0, 1, "fp32", marks=pytest.mark.long),
        (1, 2, "fp32"),
        pytest.param(3, 1, "fp32", marks=pytest.mark.long),
        (2, 1, "bf16"),
    ],
)
def test_a_rewound_run_equals_one_without_the_batch(ranks, data, tmp_path, stage, tensor, precision) -> None:
    sections = {
        "training": {"zero_stage": stage, "precision": precision, "steps": 7, "save_every": 3},
        "parallel": {"tensor_model_parallel_size": tensor},
    }
    values = config(data, tmp_path, anomalies=REWIND, **sections)
    printed, metrics = ranks(2).run(train_workers.spiky, values, {4: 3.0}, set())[0]
    assert "step 5: the loss of" in printed and "back at step 3" in printed and "without batch 4" in printed
    never = config(data, tmp_path, "never", **sections)
    _, want = ranks(2).run(train_workers.spiky, never, {}, {4})[0]
    same = {"step", "loss", "grad_norm", "lr", "tokens", "data_crc32", "boundary_rate"}
    assert [{k: m[k] for k in same} for m in metrics] == [{k: m[k] for k in same} for m in want]
    assert state(tmp_path / "run", 7) == state(tmp_path / "never", 7)
    (record,) = records(tmp_path / "run")
    assert (record["step"], record["action"], record["batch"]) == (5, "rewind", 4)


def test_a_rewound_run_resumes_as_it_would_have_gone_on(ranks, data, tmp_path) -> None:
    """From a checkpoint before the rewind it goes back again; from one after it the batches stay left out."""
    spikes = {4: 3.0, 5: 3.0, 8: 3.0}
    values = config(data, tmp_path, anomalies=REWIND, training={"steps": 8, "save_every": 3, "keep_checkpoints": 0})
    run = tmp_path / "run"
    _, want = ranks(2).run(train_workers.spiky, values, spikes, set())[0]
    before = state(run, 8), records(run), (checkpoint_dir(run) / "step_8" / "data_state.json").read_text()
    assert json.loads(before[2])["anomalies"]["left_out"] == [4, 5, 8] and len(before[1]) == 3
    for lost in ({8}, {6, 8}):
        for path in (*(checkpoint_dir(run) / f"step_{step}" for step in lost), run / "done"):
            path.rename(tmp_path / f"{len(lost)}{path.name}")
        _, got = ranks(2).run(train_workers.spiky, values, spikes, set())[0]
        assert [(m["step"], m["loss"], m["data_crc32"]) for m in got] == [
            (m["step"], m["loss"], m["data_crc32"]) for m in want
        ]
        after = state(run, 8), records(run), (checkpoint_dir(run) / "step_8" / "data_state.json").read_text()
        assert after == before


def test_rewinds_have_a_limit_and_need_a_checkpoint(ranks, data, tmp_path) -> None:
    values = config(data, tmp_path, anomalies=REWIND | {"max_rewinds": 1}, training={"steps": 9, "save_every": 4})
    printed, metrics = ranks(2).run(train_workers.spiky, values, {3: 3.0, 5: 3.0, 6: 3.0}, set())[0]
    assert "anomalies.max_rewinds" in printed and metrics[-1]["step"] == 5
    assert [r["action"] for r in records(tmp_path / "run")] == ["skip", "rewind", "rewind"]


@pytest.mark.parametrize(("key", "value", "last"), [("non_finite", "stop", 2), ("max_consecutive", 2, 3)])
def test_a_run_ends_at_the_limit_without_a_checkpoint(ranks, data, tmp_path, key, value, last) -> None:
    values = config(data, tmp_path, training={"steps": 9, "save_every": 1}, anomalies={key: value})
    gradients = dict.fromkeys(range(2, 10), 1)
    for printed, metrics in ranks(2).run(train_workers.anomalous, values, gradients, {}):
        assert f"step {last}: the gradient is not finite" in printed and f"anomalies.{key}" in printed
        assert metrics[-1]["step"] == last - 1
    assert not (checkpoint_dir(tmp_path / "run") / f"step_{last}").exists()


def test_a_checkpoint_before_the_first_update_resumes(ranks, data, tmp_path) -> None:
    """Every step so far was left out: there are no moments yet."""
    training = {"steps": 4, "save_every": 2, "keep_checkpoints": 0}
    for stage in (0, 1, 3):
        values = config(data, tmp_path, f"s{stage}", training=training | {"zero_stage": stage})
        ranks(2).run(train_workers.anomalous, values, {1: 0, 2: 0}, {})
        run = tmp_path / f"s{stage}"
        before = state(run, 4)
        for path in (checkpoint_dir(run) / "step_4", run / "done"):
            path.rename(tmp_path / f"{stage}{path.name}")
        ranks(2).run(train_workers.anomalous, values, {}, {})
        assert state(run, 4) == before


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_replay_gives_the_recorded_numbers_and_names_what_overflows_first(ranks, capsys, data, tmp_path) -> None:
    training = {"steps": 10, "save_every": 1, "keep_checkpoints": 0}
    # a rate at which losses rise and fall: those above the median of three are of batches as they are
    values = config(
        data, tmp_path, training=training, optimizer={"lr": 0.2}, anomalies={"window": 3, "min_losses": 3,
        "spike_threshold": 1e-3},
    )  # fmt: skip
    ranks(2).run(train_workers.anomalous, values, {}, {})
    run = tmp_path / "run"
    record, before = records(run)[0], files(run)
    loss, norm, text = ranks(2).run(train_workers.replayed, values, record["step"], "")[0]
    assert loss == record["loss"] and norm == pytest.approx(record["grad_norm"], rel=1e-5)
    assert text.count("is not finite: none") == 2 and "layers.1" in text
    text = ranks(2).run(train_workers.replayed, values, record["step"], "layers.1.mlp.linear_fc1")[0][2]
    assert "first output that is not finite: decoder.layers.1.mlp.linear_fc1" in text
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path), "--replay", "777"]) == 2 and "777" in capsys.readouterr().err
    assert files(run) == before


@pytest.mark.parametrize("command", ["train", "run"])
def test_the_end_is_one_line_and_exit_code_1(data, tmp_path, command) -> None:
    """A model whose numbers overflow at once."""
    values = config(
        data, tmp_path, model={"init_std": 100.0, "pattern": "A"}, optimizer={"lr": 1000.0, "clip_grad": 0.0},
        training={"steps": 60, "log_every": 100, "save_every": 50}, anomalies={"max_consecutive": 2},
    )  # fmt: skip
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(values))
    arguments = [sys.executable, "-m", "megatron_dla.cli", command, str(path)]
    done = subprocess.run(
        arguments + (["--nproc", "2"] if command == "run" else []), cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=200,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("dla ")]
    assert len(lines) == 1 and "not finite" in lines[0] and "anomalies.max_consecutive" in lines[0], done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "run").glob("checkpoints/step_*"))
