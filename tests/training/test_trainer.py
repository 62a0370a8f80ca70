"""The trainer over DeepSpeed equals plain single-process training; interrupted + resumed equals uninterrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from megatron_dla.checkpoint.integrity import DATA_STATE, find_faults, read_marker, seal
from megatron_dla.checkpoint.weights import load_merged
from megatron_dla.cli import main
from megatron_dla.metrics.sinks import read_metrics
from tests.support import tiny, train_workers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.build_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory):
    """Losses, norms and weights of the run without DeepSpeed, once for all layouts: {backbone: ...}."""
    from tests.support.distributed import Ranks

    pool = Ranks(1)
    runs = tmp_path_factory.mktemp("plain")
    try:
        yield {b: pool.run(train_workers.plain_training, run_config(data, runs, b))[0] for b in ("mamba2", "gdn")}
    finally:
        pool.stop()


def run_config(data: Path, runs: Path, backbone: str, **sections) -> dict:
    sections["model"] = {"backbone": backbone, "pattern": "DA" if backbone == "gdn" else "D"} | sections.get(
        "model", {}
    )
    return tiny.config_dict(data, runs, **sections)


@pytest.mark.parametrize("backbone", ["mamba2", "gdn"])
@pytest.mark.parametrize("sequence", [pytest.param(False, marks=pytest.mark.long), True], ids=["", "sp"])
def test_zero1_tp2_dp2_equals_one_process(ranks, data, plain, tmp_path, backbone, sequence) -> None:
    values = run_config(
        data, tmp_path, backbone, parallel={"tensor_model_parallel_size": 2, "sequence_parallel": sequence}
    )
    metrics = ranks(4).run(train_workers.train, values)[0]
    losses, norms, weights = plain[backbone]
    got = torch.tensor([m["loss"] for m in metrics]), torch.tensor([m["grad_norm"] for m in metrics])
    torch.testing.assert_close(got[0], torch.tensor(losses), rtol=2e-5, atol=0)
    torch.testing.assert_close(got[1], torch.tensor(norms), rtol=1e-4, atol=0)
    merged, layout = load_merged(tmp_path / "tiny" / "checkpoints" / "step_5")
    assert layout.tensor_parallel == 2
    for name, want in weights.items():
        keys = layout.tags[name].keys(name)
        torch.testing.assert_close(torch.cat([merged[k] for k in keys], layout.tags[name].dim), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backbone", ["mamba2", "gdn"])
def test_context_parallel_equals_one_process(ranks, data, plain, tmp_path, backbone) -> None:
    values = run_config(
        data, tmp_path, backbone, parallel={"context_parallel_size": 2}, training={"eval_every": 5, "eval_rows": 4}
    )
    metrics = ranks(4).run(train_workers.train, values)[0]
    losses, norms, _ = plain[backbone]
    torch.testing.assert_close(torch.tensor([m["loss"] for m in metrics[1:]]), torch.tensor(losses), rtol=2e-5, atol=0)
    got = torch.tensor([m["grad_norm"] for m in metrics[1:]])
    torch.testing.assert_close(got, torch.tensor(norms), rtol=1e-4, atol=0)
    values["run"]["name"], values["parallel"] = "alone", {}
    alone = ranks(1).run(train_workers.train, values)[0]
    for a, b in zip(alone, metrics, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & {"val_loss", "val_bpb", "val_bpb_by_position", "boundary_rate"}:
            assert a[key] == (pytest.approx(b[key], rel=1e-5) if b[key] is not None else None), key
    assert {"val_loss", "val_bpb", "val_bpb_by_position", "boundary_rate"} <= metrics[-1].keys()
    assert len(metrics[-1]["val_bpb_by_position"]) > 1


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_other_zero_stages_equal_one_process(ranks, data, plain, tmp_path, stage) -> None:
    values = run_config(data, tmp_path, "mamba2", training={"zero_stage": stage})
    metrics = ranks(2).run(train_workers.train, values)[0]
    got = torch.tensor([m["loss"] for m in metrics])
    torch.testing.assert_close(got, torch.tensor(plain["mamba2"][0]), rtol=2e-5, atol=0)


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_keeps_the_scalars_of_the_recurrence_fp32(ranks, data, tmp_path, stage) -> None:
    values = run_config(
        data, tmp_path, "mamba2", training={"precision": "bf16", "zero_stage": stage, "steps": 3},
        model={"tau_mode": "learned"},
    )  # fmt: skip
    found = ranks(2).run(train_workers.scalar_dtypes, values)
    for dtypes in found:
        for name in ("A_log", "dt_bias", "D", "slot_scale", "slot_bias", "tau"):
            assert dtypes[name][0] == "torch.float32", name
        assert dtypes["in_proj.weight"] == ("torch.bfloat16", True)
        assert dtypes["A_log"][1] and dtypes["slot_bias"][1], "an fp32 parameter is not trained"


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_a_bf16_run_are_summed_in_fp32(ranks, data, tmp_path, stage) -> None:
    training = {"precision": "bf16", "zero_stage": stage, "steps": 2, "eval_every": 0}
    found = ranks(2).run(train_workers.summed_dtypes, run_config(data, tmp_path, "mamba2", training=training))
    assert all("torch.float32" in x and "torch.bfloat16" not in x for x in found)


def test_a_checkpoint_has_the_mode_that_the_umask_gives(ranks, data, tmp_path) -> None:
    ranks(2).run(train_workers.train, run_config(data, tmp_path, "mamba2", training={"steps": 1}))
    (tmp_path / "new").touch()
    modes = {p.suffix: p.stat().st_mode for p in tmp_path.glob("*/checkpoints/step_1/**/*") if p.is_file()}
    assert ".safetensors" in modes and set(modes.values()) == {(tmp_path / "new").stat().st_mode}


def test_annealed_gates_cool_down_and_end_hard(ranks, data, tmp_path) -> None:
    model = {
        "tau_mode": "learned",
        "slot_weight_init": "log_linear",
        "init_std": 0.3,
    }  # from `backbone` all weights start at 1
    tau = {"gate": "annealed", "anneal_share": 0.6}
    values = run_config(data, tmp_path, "mamba2", model=model, tau=tau)
    metrics = ranks(2).run(train_workers.train, values)[0]
    temperatures = [m["gate_temperature"] for m in metrics]
    assert temperatures[3:] == [None, None]
    assert temperatures[:3] == pytest.approx([0.3, 0.09487, 0.03], rel=1e-4)
    values = run_config(data, tmp_path, "mamba2", model=model, run={"name": "hard"})
    hard = ranks(2).run(train_workers.train, values)[0]
    assert "gate_temperature" not in hard[0]
    gap = abs(metrics[0]["loss"] / hard[0]["loss"] - 1)
    assert 1e-6 < gap < 0.05


@pytest.mark.parametrize("tau,words", [(0.4, "raise model.tau"), (1.99, "lower model.tau"), (0.0, "")])
def test_a_threshold_that_decides_nothing_is_named_once(data, tmp_path, capsys, tau: float, words: str) -> None:
    """After the warm-up; not where every token is asked to open a slot. What slots do is among the metrics."""
    values = run_config(
        data, tmp_path, "gdn", model={"tau": tau, "pattern": "D"}, optimizer={"warmup_steps": 2},
        training={"steps": 5, "log_every": 2, "save_every": 0},
    )  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: boundary rate")]
    assert len(warnings) == bool(words) and all(words in line for line in warnings)
    steps = {m["step"]: m for m in read_metrics(tmp_path / "tiny" / "metrics.jsonl") if "loss" in m}
    assert [("slot_sizes" in m, "slot_weights" in m) for m in steps.values()] == [(True, True)] * 2 + [(False, False)]
    assert sum(steps[2]["slot_sizes"].values()) == pytest.approx(1, abs=1e-3)
    share = steps[4]["newest_merge_share_by_layer"]
    assert all(x is None for x in share) if tau == 1.99 else all(0 < x <= 1 for x in share)


CALIBRATED = {
    "model": {"tau_mode": "calibrated", "boundary_rate": 0.2, "tau": 0.6},
    "tau": {"calibration_steps": 4},
    "training": {"steps": 6, "save_every": 2, "keep_checkpoints": 0},
}


def taus(run: Path, step: int) -> dict[str, torch.Tensor]:
    merged, _ = load_merged(run / "checkpoints" / f"step_{step}")
    return {name: x for name, x in merged.items() if name.endswith(".tau")}


def test_calibrated_thresholds_reach_the_rate_and_stay(ranks, data, tmp_path) -> None:
    """Also after a resume within the calibration: the same bits as without."""
    values = run_config(data, tmp_path, "gdn", **CALIBRATED)
    metrics = ranks(2).run(train_workers.train, values)[0]
    assert metrics[0]["boundary_rate"] > 0.4 and abs(metrics[-1]["boundary_rate"] - 0.2) < 0.05
    run, again = tmp_path / "tiny", tmp_path / "again"
    first, middle, last = (taus(run, step) for step in (2, 4, 6))
    assert middle and first.keys() == middle.keys() == last.keys()
    for name, tau in middle.items():
        assert torch.equal(tau, last[name]) and not torch.equal(tau, first[name]) and len(set(tau.tolist())) == 4
    shutil.copytree(run, again)
    for step in (4, 6):
        shutil.rmtree(again / "checkpoints" / f"step_{step}")
    ranks(2).run(train_workers.train, values | {"run": values["run"] | {"name": "again"}})
    weights = [load_merged(path / "checkpoints/step_6")[0] for path in (run, again)]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


LAYOUTS = {
    "cp2": {"context_parallel_size": 2},
    "tp2+sp x cp2 chain": {
        "tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2, "cp_scheme": "chain",
    },
}  # fmt: skip


def test_calibrated_thresholds_do_not_depend_on_the_layout(ranks, data, tmp_path) -> None:
    short = {"steps": 3, "save_every": 0}
    sections = CALIBRATED | {"tau": {"calibration_steps": 2}, "training": short}
    want = ranks(2).run(train_workers.train, run_config(data, tmp_path, "mamba2", **sections))[0]
    for name, parallel in LAYOUTS.items():
        values = run_config(data, tmp_path, "mamba2", **sections, parallel=parallel)
        values["run"]["name"] = name
        got = ranks(4 if "x" in name else 2).run(train_workers.train, values)[0]
        losses = [torch.tensor([m["loss"] for m in metrics]) for metrics in (got, want)]
        torch.testing.assert_close(*losses, rtol=2e-5, atol=0)
        ours, theirs = taus(tmp_path / name, 3), taus(tmp_path / "tiny", 3)
        assert ours.keys() == theirs.keys() and ours
        for key, tau in theirs.items():
            torch.testing.assert_close(ours[key], tau, rtol=0, atol=1e-4)


def test_changed_optimizer_settings_hold_after_a_resume(ranks, data, tmp_path) -> None:
    values = run_config(data, tmp_path, "mamba2")
    ranks(2).run(train_workers.train, values)
    values["optimizer"] |= {"lr": 0.5, "weight_decay": 0.03, "min_lr_ratio": 1.0}
    values["training"]["steps"] = 7
    for groups in ranks(2).run(train_workers.resumed_optimizer, values):
        assert groups == [("decay", 0.5, 0.03), ("plain", 0.5, 0.0)]
    metrics = ranks(2).run(train_workers.train, values)[0]
    assert [m["lr"] for m in metrics[5:]] == [0.5, 0.5]


def test_another_batch_size_at_a_resume_is_said(ranks, data, tmp_path) -> None:
    values = run_config(data, tmp_path, "mamba2")
    before = ranks(2).run(train_workers.train, values)[0]
    assert "global_batch_size" not in ranks(2).run(train_workers.resume_note, values)[0]
    rows = values["training"]["global_batch_size"]
    values["training"] |= {"steps": 6, "global_batch_size": rows // 2}
    note = ranks(2).run(train_workers.resume_note, values)[0]
    assert f"global_batch_size was {rows} and is {rows // 2} from step 6 on" in note
    after = ranks(2).run(train_workers.train, values)[0]
    step = before[-1]["tokens"] // 5
    assert [m["tokens"] for m in after] == [step, 2 * step, 3 * step, 4 * step, 5 * step, 5 * step + step // 2]


def test_a_run_starts_from_converted_weights_at_another_layout(ranks, data, plain, tmp_path) -> None:
    from megatron_dla.hf.convert import from_hf, to_hf

    values = run_config(data, tmp_path, "gdn")
    ranks(2).run(train_workers.train, values)
    trained = tmp_path / "tiny" / "checkpoints" / "step_5"
    to_hf(trained, tmp_path / "hf", tokenizer=data)
    values["run"]["name"] = "second"
    from_hf(tmp_path / "hf", tmp_path / "second" / "checkpoints" / "step_0")
    values["parallel"] = {"tensor_model_parallel_size": 2}
    values["training"] |= {"steps": 1, "eval_every": 1, "eval_rows": 4}
    metrics = ranks(2).run(train_workers.train, values)[0]
    straight = plain["gdn"][0]
    assert metrics[0]["step"] == 0 and metrics[0]["val_loss"] < straight[0] - 0.2  # trained weights, not fresh ones
    assert load_merged(tmp_path / "second" / "checkpoints" / "step_1")[1].step == 1


def test_a_refused_resume_leaves_the_run_as_it_was(ranks, capsys, data, tmp_path) -> None:
    values = run_config(data, tmp_path, "mamba2", training={"steps": 1})
    config = tmp_path / "tiny.yaml"
    ranks(2).run(train_workers.train, values)
    before = {p.name: p.read_bytes() for p in (tmp_path / "tiny").iterdir() if p.is_file()}
    for change, word in (
        ({"model": {"capacity": 4}}, "model.capacity 3 -> 4"),
        ({"data": {"seq_len": 32}}, "data.seq_len = 64"),
    ):
        config.write_text(yaml.safe_dump({k: v | change.get(k, {}) for k, v in values.items()}))
        for arguments in (["train", str(config)], ["run", str(config), "--nproc", "1", "--dry-run"]):
            assert main(arguments) == 2
            assert word in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "tiny").iterdir() if p.is_file()} == before


FILES = (
    "optimizer/tp_00_dp_0000.safetensors",
    "weights/tp_00.safetensors",
    "random_00000.pt",
    "data_state.json",
    "complete.json",
)


@pytest.mark.parametrize("damage", FILES)
def test_damaged_checkpoints_are_named(ranks, data, tmp_path, damage) -> None:
    values = run_config(data, tmp_path, "mamba2", training={"steps": 1})
    ranks(1).run(train_workers.train, values)
    (tmp_path / "tiny" / "checkpoints" / "step_1" / damage).write_bytes(b"[]" if damage.endswith("json") else b"junk")
    with pytest.raises(AssertionError, match=rf"CheckpointError.*step_1' is damaged \(.*{damage}"):
        ranks(1).run(train_workers.train, values)


STATES = {
    "streams": lambda state: state.pop("streams"),
    "streams.0": lambda state: state["streams"].pop("0"),
    "streams.1": lambda state: state["streams"].update({"1": [0, 0]}),
    "streams.2.shard": lambda state: state["streams"]["2"].update(shard=10**30),
    "streams.0.last": lambda state: state["streams"]["0"].update(last=10**9),
    "streams.1.last": lambda state: state["streams"]["1"].update(last=state["streams"]["1"]["last"] ^ 1),
    "steps": lambda state: state.update(steps="1"),
    "tokens_seen": lambda state: state.update(tokens_seen=-1),
    "anomalies": lambda state: state.update(anomalies=[0]),
}


def test_a_data_state_that_a_tool_has_edited_is_refused(ranks, data, tmp_path) -> None:
    """With a marker whose checksums are right."""
    values = run_config(data, tmp_path, "mamba2", training={"steps": 1})
    ranks(1).run(train_workers.train, values)
    step = tmp_path / "tiny" / "checkpoints" / "step_1"
    before, marker = (step / DATA_STATE).read_text(), read_marker(step)
    for key, edit in STATES.items():
        state = json.loads(before)
        edit(state)
        (step / DATA_STATE).write_text(json.dumps(state))
        seal(step, {k: v for k, v in marker.items() if k not in ("files", "sha256")})
        assert not find_faults(step)
        with pytest.raises(AssertionError, match=rf"(Checkpoint|Data)Error.*{key.split('.')[-1]}"):
            ranks(1).run(train_workers.train, values)


def test_shards_of_another_tokenizer_than_the_checkpoint(ranks, capsys, data, tmp_path) -> None:
    values = run_config(data, tmp_path, "mamba2", training={"steps": 1})
    ranks(1).run(train_workers.train, values)
    values["data"]["dir"] = str(tiny.build_data(tmp_path / "other", vocab_size=310, seed=3))
    values["training"]["steps"] = 2
    config = tmp_path / "other.yaml"
    config.write_text(yaml.safe_dump(values))
    capsys.readouterr()
    assert main(["train", str(config)]) == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1 and "vocabulary mismatch" in line and "step_1" in line


def cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatron_dla.cli", *arguments]


def start(config: Path, **kwargs) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(cli("run", str(config), "--nproc", "2"), env=env, cwd=config.parent, **kwargs)


def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(ranks, data, tmp_path) -> None:
    values = run_config(
        data, tmp_path, "gdn", run={"name": "straight"}, parallel={"tensor_model_parallel_size": 2},
        training={"steps": 12, "eval_every": 6, "eval_rows": 4},
    )  # fmt: skip
    straight = ranks(2).run(train_workers.train, values)[0]
    values["run"]["name"] = "stopped"
    config = tmp_path / "stopped.yaml"
    config.write_text(yaml.safe_dump(values))
    process = start(config)
    log = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and '"step": 2,' in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    (saved,) = (tmp_path / "stopped" / "checkpoints").glob("step_*[0-9]")
    assert 2 <= int(saved.name.removeprefix("step_")) < 12
    with log.open("a") as file:  # a step after the checkpoint, as a crash would leave it
        file.write('{"step": 11, "loss": 1')
    assert start(config).wait(300) == 0
    resumed = read_metrics(log)
    for a, b in zip(straight, resumed, strict=True):
        same = {"step", "loss", "grad_norm", "lr", "tokens", "data_crc32", "epoch", "val_loss", "val_bpb"}
        assert {k: a[k] for k in same & a.keys()} == {k: b[k] for k in same & b.keys()}
    assert [m["step"] for m in resumed] == list(range(13))
    finals = [load_merged(tmp_path / name / "checkpoints" / "step_12")[0] for name in ("straight", "stopped")]
    for key, value in finals[0].items():
        assert torch.equal(value, finals[1][key]), key


def test_a_shard_damaged_under_two_ranks_gives_one_line_and_exit_code_2(data, tmp_path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    for shard in (copy / "train").glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:-1024] + bytes(1023) + b"x")
    config = tmp_path / "damaged.yaml"
    values = run_config(copy, tmp_path, "mamba2", parallel={"tensor_model_parallel_size": 2})
    config.write_text(yaml.safe_dump(values))
    process = start(config, stderr=subprocess.PIPE, text=True)
    _, printed = process.communicate(timeout=200)
    assert process.returncode == 2, printed
    lines = [line for line in printed.splitlines() if "dla train:" in line]
    assert len(lines) == 1 and "train-00000" in lines[0], printed
    assert "Traceback" not in printed
