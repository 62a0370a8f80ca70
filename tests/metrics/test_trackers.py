"""TensorBoard and W&B: what was written is read back by their own readers; nothing of theirs ends a run."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_dla.cli import main
from megatron_dla.config.schema import LoggingSection, WandbSection
from megatron_dla.errors import ConfigError
from megatron_dla.metrics.names import shown
from megatron_dla.metrics.sinks import read_metrics
from megatron_dla.metrics.trackers import Sinks, TensorBoardSink, check_packages, open_sinks
from megatron_dla.report.charts import make_charts
from megatron_dla.report.page import write_page
from megatron_dla.report.record import read_record
from tests.support import tiny


def needs(package: str) -> pytest.MarkDecorator:
    reason = f"{package} is not installed here: make setup, or pip install {package}"
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=reason)


def read_tensorboard(directory: Path) -> dict[str, dict[int, float]]:
    """{name: {step: value}}, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    series = {}
    for name in found.Tags()["scalars"]:
        events = found.Scalars(name)
        series[name] = {event.step: event.value for event in events}
        assert len(series[name]) == len(events), f"{name} has a step twice"
    return series


def read_wandb(run_dir: Path) -> dict[str, list[dict]]:
    """Rows of the history by W&B run id, in the order in which `wandb sync` would send them."""
    runs: dict[str, list[dict]] = {}
    program = Path(sys.executable).with_name("wandb")
    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        printed = subprocess.run(
            [program, "leet", "inspect", "--json", path], capture_output=True, text=True, check=True
        )
        records = [json.loads(line) for line in printed.stdout.splitlines()]
        rows = [record["history"] for record in records if record["type"] == "history"]
        runs.setdefault(path.stem.removeprefix("run-"), []).extend(map(_row, rows))
    return runs


def _row(history: dict) -> dict:
    for key in ("item", "items", "row"):
        if key in history:
            return history[key]
    return history


def row(step: int, sign: int = 1) -> dict:
    return {"step": step, "time": 1e9 + step, "loss": sign * 1.5 / step, "lr": 0.25, "mix": {"a": 0.5}, "mfu": 0.125}


BOTH = LoggingSection(tensorboard=True, wandb=WandbSection(project="p", mode="offline"))


@needs("tensorboard")
@needs("wandb")
def test_a_run_that_goes_back_has_no_step_twice(tmp_path: Path) -> None:
    config = {"data": {"dir": "https://me:s3cret@host/data"}}
    for resumed, steps, sign in ((None, range(1, 5), 1), (2, range(3, 7), -1), (6, range(7, 8), 1)):
        with open_sinks(tmp_path, BOTH, "n", config, resumed, pytest.fail) as sinks:
            for step in steps:
                sinks.write(row(step, sign))
        assert set(sinks.failures.values()) == {0} and len(sinks.failures) == 3
    logged = {m["step"]: shown(m) for m in read_metrics(tmp_path / "metrics.jsonl")}
    assert {step: values["loss_metrics/global_avg_loss"] > 0 for step, values in logged.items()} == {
        1: True, 2: True, 3: False, 4: False, 5: False, 6: False, 7: True
    }  # fmt: skip
    series = read_tensorboard(tmp_path / "tensorboard")
    assert series.keys() == logged[1].keys() == {"loss_metrics/global_avg_loss", "lr", "mix/a", "mfu(%)"}
    for name, values in series.items():
        assert values == {step: pytest.approx(logged[step][name]) for step in range(1, 8)}, name
    ((name, rows),) = read_wandb(tmp_path).items()
    assert name == json.loads((tmp_path / "wandb_run.json").read_text())["id"]
    assert [x["_step"] for x in rows] == list(range(1, 8))
    for x in rows:  # what W&B has, it keeps: 3 and 4 are of the first time
        want = shown(row(x["_step"], -1 if x["_step"] in (5, 6) else 1))
        assert {key: x[key] for key in want} == want
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"s3cret" in p.read_bytes()]


class Broken:
    name = "broken"

    def write(self, metrics: dict) -> None:
        raise OSError("no\nspace")

    def close(self, failed: bool = False) -> None:
        raise OSError("gone")


def test_a_sink_that_fails_is_counted_and_the_others_go_on(tmp_path: Path) -> None:
    lines: list[str] = []
    whole = open_sinks(tmp_path, LoggingSection(), "n", {}, None, lines.append).sinks
    with Sinks([Broken(), *whole], lines.append) as sinks:
        for step in range(1, 10):
            sinks.write(row(step))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 9 and sinks.failures == {"broken": 10, "metrics.jsonl": 0}
    assert [("once" in line, "8 times" in line) for line in lines] == [
        (True, False),
        *[(False, False)] * 2,
        (False, True),
    ]
    assert all("no space" in line and "\n" not in line for line in lines)


@needs("tensorboard")
def test_tensorboard_goes_on_in_a_new_file_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = TensorBoardSink(tmp_path, 0)
    sink.write(row(1))
    with monkeypatch.context() as patch:
        patch.setattr(sink._writer, "flush", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sink.write(row(2))
    for step in (3, 4):
        sink.write(row(step))
    sink.close()
    found = read_tensorboard(tmp_path)["loss_metrics/global_avg_loss"]
    assert found.keys() - {2} == {1, 3, 4} and len(list(tmp_path.iterdir())) == 2


def test_a_missing_package_is_named_with_its_key_before_anything_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for package in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    check_packages(LoggingSection(wandb=WandbSection(project="p", mode="disabled")))
    check_packages(LoggingSection(wandb=WandbSection(mode="online")))
    with pytest.raises(ConfigError, match=r"logging\.wandb\.project = 'p'.*pip install wandb"):
        check_packages(LoggingSection(wandb=WandbSection(project="p")))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny.config_dict(tiny.build_data(tmp_path), tmp_path / "runs")))
    capsys.readouterr()
    assert main(["train", str(config), "logging.tensorboard=true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "logging.tensorboard = true" in line and "pip install tensorboard" in line
    assert not (tmp_path / "runs").exists()


@needs("tensorboard")
@needs("wandb")
def test_rank_0_alone_logs_what_metrics_jsonl_has(ranks, tmp_path: Path) -> None:
    from tests.support import train_workers

    data = tiny.build_data(tmp_path)
    training = {"steps": 4, "eval_every": 2, "save_every": 2, "eval_rows": 4}
    values = tiny.config_dict(data, tmp_path / "runs", logging={"tensorboard": True}, training=training)
    ranks(2).run(train_workers.train, values)
    run = tmp_path / "runs" / "tiny"
    shutil.rmtree(run / "checkpoints" / "step_4")
    (run / "done").unlink()
    values["logging"]["wandb"] = {"project": "p", "mode": "offline"}  # from its second start on
    values["optimizer"]["lr"] = 1e-3  # steps 3 and 4 differ the second time
    lines = ranks(2).run(train_workers.train, values)[0]
    assert [m["step"] for m in lines] == [0, 1, 2, 3, 4]
    logged = {m["step"]: shown(m) for m in lines}
    series = read_tensorboard(run / "tensorboard")
    assert {"throughput(tps)", "time_metrics/data_loading(%)", "boundary_rate/layer_01"} <= series.keys()
    assert series == {
        name: {step: pytest.approx(x[name], rel=1e-6) for step, x in logged.items() if name in x} for name in series
    }
    assert len(list((run / "tensorboard").iterdir())) == 2  # a file a start
    ((_, rows),) = read_wandb(run).items()
    assert [x["_step"] for x in rows] == [3, 4]
    assert all(x.items() >= logged[x["_step"]].items() for x in rows)
    happened = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(x["event"], x["step"]) for x in happened] == [
        ("start", 0), ("save", 2), ("save", 4), ("done", 4), ("start", 2), ("save", 4), ("done", 4)
    ]  # fmt: skip
    record = read_record(run)
    assert [(event.kind, event.step) for event in record.events] == [(x["event"], x["step"]) for x in happened]
    assert "steps 3 to 4 are repeated" in record.events[4].text and record.status == ("good", "done")
    charts = {chart.title: chart for chart in make_charts(record)}
    assert charts["Loss"].curves[0].points == [(m["step"], m["loss"]) for m in lines[1:]]
    assert {"Held-out text", "Boundary rate by layer", "Speed", "Time waiting for data", "Memory"} <= charts.keys()
    page = write_page(run).read_text()
    assert page.count('class="chart"') == len(charts) and "NaN" not in page


@needs("wandb")
def test_no_key_is_one_message_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    section = LoggingSection(wandb=WandbSection(project="p"))
    with pytest.raises(ConfigError, match=r"logging\.wandb\.mode = online.*WANDB_API_KEY"):
        open_sinks(tmp_path, section, "n", {}, None, pytest.fail)
    assert not (tmp_path / "wandb_run.json").exists()
