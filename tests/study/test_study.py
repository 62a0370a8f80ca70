"""`dla study`: which runs it makes, that it goes on where it was, and that its report says what the runs said."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_dla.cli import main
from megatron_dla.errors import STOPPED, ConfigError, UserError
from megatron_dla.model.counts import count_parameters
from megatron_dla.processes import PARENT
from megatron_dla.study import run
from megatron_dla.study.findings import findings
from megatron_dla.study.plan import Cell, Study, load_study
from megatron_dla.study.rates import rate_name
from megatron_dla.study.record import SYNTHETIC
from megatron_dla.study.report import page, table, write_report
from megatron_dla.study.results import collect, difference, verdict
from megatron_dla.study.run import CELL, StudyRunner, read_cell
from megatron_dla.tasks import make_task
from tests.support import shipped, tiny

ARMS = {"one": {"model.pattern": "G"}, "dla": {}, "soft": {"model.pattern": "A"}}
SELF: list = []
SELF.append(SELF)
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "study"
BEST = {"one": 2e-3, "dla": 1e-3, "soft": 4e-3}  # of the fake runs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.build_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def write(data, tmp_path):
    """Writes a study's file, with changes, and returns its path."""
    training = {"steps": 2, "eval_every": 1, "eval_rows": 4, "device": "cpu", "precision": "fp32"}
    base = tiny.config_dict(data, tmp_path / "none", training=training, model={"backbone": "gdn"})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def write(**changes) -> Path:
        values = {
            "name": "s", "dir": str(tmp_path / "studies"), "base": str(tmp_path / "base.yaml"), "arms": ARMS,
            "learning_rates": [1e-3, 2e-3, 4e-3], "seeds": [7, 8, 9], "reference": "one",
            "parameters": "as_given",  # too small for 1 %
        } | changes  # fmt: skip
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return tmp_path / "study.yaml"

    return write


class Fake:
    """Writes the metrics of a run at once: best at `BEST`, and a little worse with every seed."""

    def __init__(self, stop_at: int = -1, diverge: tuple[str, ...] = ()) -> None:
        self.cells: list[Cell] = []
        self.stop_at, self.diverge = stop_at, diverge

    def __call__(self, config, nproc: int, place: Path) -> int:
        arm, rate, seed = place.parts[-3], config.optimizer.lr, config.run.seed
        assert Path(config.run.dir) / config.run.name == place and str(place).endswith(f"lr_{rate:g}/seed_{seed}")
        if len(self.cells) == self.stop_at:
            return STOPPED
        self.cells.append(Cell(arm, rate, seed))
        place.mkdir(parents=True)
        if arm in self.diverge:
            (place / "exits/a").mkdir(parents=True)
            record = {"message": "FloatingPointError: the loss is nan", "time": time.time()}
            (place / "exits/a/rank0.json").write_text(json.dumps(record))
            return 1
        value = 2.0 + list(ARMS).index(arm) / 10 + abs(rate - BEST[arm]) + 0.01 * (seed - 7)
        step = {"step": 1, "loss": 3.0, "tokens": 512, "tokens_per_s": 10.0, "memory_gb": 0.5, "boundary_rate": 0.25}
        places = {"val_bpb_by_position": {"0-15": value + 0.5, "16-31": value - 0.5}}
        slots = {"newest_merge_share_by_layer": [0.5, 0.25, None], "slot_weights": {"0": 1.0, "1": 0.5}}
        sizes = {"16-31": 0.25, "2-3": 0.75} if seed == 7 else {"1": 1.0}
        lines = [
            {**step, "val_bpb": value + 1, "val_loss": 4.0},
            {**step, "step": 2, "val_bpb": value, "val_loss": 3.0, **places, **slots, "slot_sizes": sizes},
        ]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0


def test_each_arm_tries_the_learning_rates_and_repeats_the_best(write) -> None:
    fake = Fake()
    assert StudyRunner(load_study(write()), launch=fake).run() == 0
    for arm in ARMS:
        cells = [cell for cell in fake.cells if cell.arm == arm]
        assert [(c.rate, c.seed) for c in cells[:3]] == [(1e-3, 7), (2e-3, 7), (4e-3, 7)]
        assert [(c.rate, c.seed) for c in cells[3:]] == [(BEST[arm], 8), (BEST[arm], 9)]
    assert len(set(fake.cells)) == len(fake.cells) == 15


def test_an_arm_may_have_learning_rates_of_its_own(write) -> None:
    arms = {**ARMS, "dla": {**ARMS["dla"], "learning_rates": [5e-4, 1e-3]}, "soft": {"learning_rates": [3e-3]}}
    fake, study = Fake(), load_study(write(arms=arms, questions={"Is one better?": ["one", "soft"]}))
    assert StudyRunner(study, launch=fake).run() == 0
    cells = {name: [(c.rate, c.seed) for c in fake.cells if c.arm == name] for name in arms}
    assert cells["dla"] == [(5e-4, 7), (1e-3, 7), (1e-3, 8), (1e-3, 9)]
    assert cells["soft"] == [(3e-3, 7), (3e-3, 8), (3e-3, 9)] and len(cells["one"]) == 5
    results = collect(study)
    assert results["cells"] == {"done": 12, "planned": 12} and "learning_rates" not in str(results)
    assert results["arms"]["dla"]["rate_at_edge"] and not results["arms"]["soft"]["rate_at_edge"]


def test_a_study_goes_on_where_it_was_stopped(write, capsys) -> None:
    study = load_study(write())
    first, second, third = Fake(stop_at=7), Fake(), Fake()
    assert StudyRunner(study, launch=first).run() == STOPPED
    assert StudyRunner(study, launch=second).run() == 0
    assert len(first.cells) == 7 and len(second.cells) == 8 and not set(first.cells) & set(second.cells)
    assert StudyRunner(study, launch=third).run() == 0 and not third.cells
    assert capsys.readouterr().out.splitlines()[-1].startswith("cell 15/15 | soft lr 0.004 seed 9 | val_bpb 2.2200")
    changed = load_study(write(overrides={"training.steps": 3}))
    with pytest.raises(ConfigError, match=r"cell\.json.*training\.steps"):
        StudyRunner(changed, launch=Fake()).run()
    with pytest.raises(ConfigError, match=r"cell\.json.*training\.steps"):
        collect(changed)


def test_what_is_given_is_checked_before_anything_runs(write, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    for options, words in (
        (["--out", str(tmp_path / "file")], "--out"), (["--task", "2/2"], "--task 2/2"), (["--task", "x"], "--task x"),
        (["--task", "1/2", "--out", str(tmp_path / "new")], "--task 1/2"),
    ):  # fmt: skip
        assert main(["study", str(write()), *options]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and words in error and not (tmp_path / "studies").exists()


@pytest.mark.parametrize("code", [128 + signal.SIGTERM, -signal.SIGTERM, 128 + signal.SIGINT, STOPPED])
def test_a_signal_before_the_first_checkpoint_stops_the_study(write, monkeypatch, code) -> None:
    study = load_study(write())
    monkeypatch.setattr(run, "run_process", lambda command, log: code)
    assert StudyRunner(study).run() == STOPPED and not list(study.root.rglob(CELL))


def test_messages_of_an_earlier_attempt_are_not_those_of_this_one(write, tmp_path) -> None:
    study = load_study(write())
    place = study.root / "one/lr_0.001/seed_7"
    (place / "exits/a").mkdir(parents=True)
    (place / "exits/a/rank0.json").write_text(json.dumps({"message": "long ago", "time": time.time() - 5}))
    with pytest.raises(UserError, match="exit code 1"):
        StudyRunner(study, launch=lambda *_: 1).run()


def test_a_command_of_a_study_ends_with_it(tmp_path) -> None:
    """A command whose parent has ended before is killed at once."""
    parent = subprocess.Popen([sys.executable, "-c", ""])
    parent.wait()
    environment = os.environ | {PARENT: str(parent.pid)}
    command = [sys.executable, "-m", "megatron_dla.cli", "--version"]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert subprocess.run(command, env=os.environ | {PARENT: str(os.getpid())}, capture_output=True).returncode == 0
    code = f"import os; from megatron_dla.cli import main; main(['report', 'nowhere']); print({PARENT!r} in os.environ)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {PARENT: str(os.getpid())}, capture_output=True
    )
    assert done.stdout == b"False\n"  # not passed on


def test_tasks_of_an_array_share_the_arms(write) -> None:
    study = load_study(write())
    found = []
    for task in range(2):
        fake = Fake()
        assert StudyRunner(study, (task, 2), fake).run() == 0
        found.append({cell.arm for cell in fake.cells})
    assert found == [{"one", "soft"}, {"dla"}]
    assert collect(study)["cells"] == {"done": 15, "planned": 15}


def test_the_report_says_where_and_when_the_cells_were_made(write, tmp_path, monkeypatch) -> None:
    """Not where the report is written; cells of older versions do not say."""
    study = load_study(write())
    StudyRunner(study, launch=Fake()).run()
    cells = sorted(study.root.rglob(CELL))
    for number, path in enumerate(cells):
        record = json.loads(path.read_text())
        today, here = record.pop("date"), record.pop("machine")
        assert "cores of" in here and len(today) == 10
        if number:
            record |= {"date": f"2026-01-{number:02d}", "machine": "a" if number < 9 else "b"}
        path.write_text(json.dumps(record))
    files = write_report(collect(study), tmp_path / "report", "dla study s")
    results = json.loads(files[0].read_text())
    assert results["made"] == {"machines": ["a", "b"], "dates": ["2026-01-01", "2026-01-14"]}
    assert "2026-01-14" in next(file for file in files if file.suffix == ".html").read_text()
    cells[1].write_text(json.dumps({**json.loads(cells[1].read_text()), "date": "yesterday"}))
    with pytest.raises(ConfigError, match="date = 'yesterday'"):
        collect(study)


def test_the_report_says_what_the_cells_say(write, tmp_path) -> None:
    study = load_study(write(questions={"Is one better?": ["one", "dla"], "Is soft better?": ["soft", "one"]}))
    StudyRunner(study, launch=Fake(diverge=("soft",))).run()
    files = write_report(collect(study), tmp_path / "report", "dla study s")
    results = json.loads(files[0].read_text())
    one, dla, soft = (results["arms"][name] for name in ARMS)
    assert one["best_rate"] == 2e-3 and not one["rate_at_edge"] and dla["rate_at_edge"]
    assert one["results"] == pytest.approx({"7": 2.0, "8": 2.01, "9": 2.02}) and one["mean"] == pytest.approx(2.01)
    assert dla["difference"] == pytest.approx({"mean": 0.1, "seeds": 3, "low": 0.1, "high": 0.1})
    assert soft["best_rate"] is None and "diverged" in soft["cells"][0] and len(soft["cells"]) == 3
    assert results["cells"] == {"done": 13, "planned": 15}
    first, question, control = findings(results)
    assert "worse: dla +0.1000 [+0.1000, +0.1000]" in first and "soft" not in first
    assert question.startswith("Is one better? Yes, one is better (one minus dla: -0.1000")
    assert control.startswith("Is soft better? Too few seeds")
    assert one["by_position"] == pytest.approx({"0-15": 2.51, "16-31": 1.51}) and one["newest_merges"] == 0.375
    assert list(one["slot_sizes"]) == ["1", "2-3", "16-31"]
    assert list(one["slot_sizes"].values()) == pytest.approx([2 / 3, 0.25, 0.25 / 3])
    rows = table(results)
    assert [row[0] for row in rows] == ["arm", "one", "dla", "soft"] and rows[2][7] == "worse"
    text = files[-1].read_text()
    assert text.count("data:image/png") == 4 and "http" not in text and "+0.1000 [+0.1000, +0.1000]" in text
    assert main(["study", "report", str(files[0]), "--out", str(tmp_path / "again")]) == 0
    for file in files:
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), "from study.json alone"


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"study": "s"}', '{"study": 1, "arms": {"a": 5}, "synthetic": {}}']
)
def test_a_damaged_report_is_not_drawn(tmp_path, capsys, content) -> None:
    (tmp_path / "study.json").write_text(content)
    assert main(["study", "report", str(tmp_path / "study.json"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "study.json" in error and not (tmp_path / "out").exists()


def test_differences_are_paired_by_seed() -> None:
    reference = {7: 1.0, 8: 2.0, 9: 3.0}
    found = difference({7: 0.9, 8: 1.8, 9: 2.8, 10: 99.0}, reference)
    assert found is not None and found["mean"] == pytest.approx(-0.5 / 3) and found["seeds"] == 3
    assert verdict(found) == "better" and verdict(difference({7: 0.9, 8: 1.8}, reference)) == ""
    mixed = difference({7: 0.9, 8: 2.1, 9: 3.0}, reference)
    assert verdict(mixed) == "tie" and difference({1: 1.0}, reference) is None


@pytest.mark.parametrize("path", shipped.STUDIES, ids=lambda path: path.stem)
def test_arms_of_shipped_studies_have_equal_parameters(path, data, tmp_path) -> None:
    values = yaml.safe_load(path.read_text())
    values["overrides"] |= {"data.dir": str(data), "data.num_streams": 4}
    (tmp_path / path.name).write_text(yaml.safe_dump(values))
    study = load_study(tmp_path / path.name)
    assert len(study.arms) > 2
    vocab = make_task(study.arms[study.reference]).layout().vocab_size
    counts = {name: count_parameters(arm.model, vocab) for name, arm in study.arms.items()}
    wanted = counts[study.reference]
    assert all(abs(count - wanted) <= 0.01 * wanted for count in counts.values()), counts
    given = {
        name: arm.model.ffn_hidden_size
        for name, arm in Study(replace(study.config, parameters="as_given")).arms.items()
    }
    assert study.arms["softmax"].model.ffn_hidden_size != given["softmax"]


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"arms": {}}, ("arms",)), ({"base": ""}, ("base",)), ({"reference": "x"}, ("reference", "'x'")),
        ({"arms": {"a/b": {}}, "reference": ""}, ("arms", "'a/b'")), ({"seeds": [1, 1]}, ("seeds", "1, 1")),
        ({"seeds": []}, ("seeds",)), ({"arms": {"one": {"run.seed": 3}}}, ("run.seed",)),
        ({"arms": {"one": {"model.tauu": 3}}}, ("arms.one", "model.tauu")),
        ({"questions": {"Why?": ["one", "x"]}}, ("questions.Why?", "'x'")),
        ({"learning_rates": [0.0]}, ("learning_rates",)),
        ({"arms": {"one": {"optimizer.lr": 0.1}}}, ("optimizer.lr",)), ({"nproc": 0}, ("nproc", "0")),
        ({"arms": {"one": {"learning_rates": []}}}, ("arms.one.learning_rates", "[]")),
        ({"arms": {"one": {"learning_rates": [-1.0]}}}, ("arms.one.learning_rates", "-1.0")),
        ({"arms": {"one": {"learning_rates": [0.1, 0.1]}}}, ("arms.one.learning_rates", "twice")),
        (
            {"arms": {"one": {}, "big": {"model.hidden_size": 512}}, "parameters": "equal"},
            ("arms.big", "ffn_hidden_size"),
        ),
        ({"overrides": {"training.stepz": 1}}, ("overrides: ", "training.stepz")),
        ({"questions": {"Why?": ["one"]}}, ("questions.Why?", "one more")), ({"seeds": 1}, ("seeds = 1", "a list")),
        ({"questions": {"Why?": ["one", "x"]}}, ("one, dla, soft",)), ({"base": "nope"}, ("base: ", "'nope'")),
        ({"arms": {"one": 3}}, ("arms.one = 3", "mapping")),
        ({"arms": {True: {}}}, ("arms", "True", "quotes")), ({"synthetic": {"reference": "x"}}, ("synthetic.tasks",)),
        ({"arms": {"one": {}, "study.json": {}}}, ("arms", "'study.json'")), ({"name": "x" * 101}, ("name", "101")),
        ({"armz": 1}, ("armz",)), ({"learning_rates": [1e-3, 1e-3]}, ("learning_rates", "twice")),
        ({"learning_rates": [1e-3, 1.0000000001e-3]}, ("learning_rates", "0.0010000000001", "lr_0.001")),
        ({"seeds": [True]}, ("seeds[0] = True",)), ({"learning_rates": [True]}, ("learning_rates[0] = True",)),
        ({"arms": {"one": {"model.pattern": b"G"}}}, ("arms.one.model.pattern", "b'G'", "bytes")),
        ({"overrides": {"model.pattern": {"G"}}}, ("overrides.model.pattern", "{'G'}", "set")),
        ({"overrides": {"data.stages": SELF}}, ("overrides.data.stages[0]", "itself")),
    ],
)  # fmt: skip
def test_wrong_studies(write, changes, words, capsys) -> None:
    assert main(["study", str(write(**changes))]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(word in error for word in words), error


def test_a_run_that_fails_ends_the_study(write) -> None:
    study = load_study(write())
    with pytest.raises(UserError, match=r"lr_0\.001/seed_7.*exit code 1.*log"):
        StudyRunner(study, launch=lambda *_: 1).run()
    assert not list(study.root.rglob(CELL))
    no_validation = load_study(write(overrides={"training.eval_every": 0}))
    with pytest.raises(ConfigError, match=r"training\.eval_every = 0"):
        StudyRunner(no_validation, launch=Fake()).run()


@pytest.mark.parametrize(
    "change,words",
    [
        ({}, "rate is missing"), ([], "[] is not"), (5, "5 is not"), ({"rate": None}, "rate = None"),
        ({"seed": True}, "seed = True"), ({"config": 5}, "config = 5"), ({"val_bpb": None}, "val_bpb = None"),
        ({"val_bpb": float("nan")}, "val_bpb = nan"), ({"parameters": "9"}, "parameters = '9'"),
        ({"held_out": 5}, "held_out = 5"), ({"held_out": []}, "held_out = []"), ({"by_position": {"x": 1.0}}, "by_pos"),
        ({"slot_sizes": {"1": None}}, "slot_sizes"), ({"tokens_per_s": float("inf")}, "tokens_per_s = inf"),
        ({"val_bpb": ...}, "val_bpb is missing"), ({"diverged": 1}, "diverged = 1"),
        ({"diverged": ""}, "diverged = ''"), ({"rate": 1.0}, "rate = 1.0"),
        ({"seed": 8}, "seed = 8"), ({"config": {}}, "config has no model, run"),
    ],
)  # fmt: skip
def test_a_cell_with_other_content_is_named(write, capsys, change, words) -> None:
    path = write(arms={"one": {}}, learning_rates=[2e-3], seeds=[7])
    study = load_study(path)
    StudyRunner(study, launch=Fake()).run()
    (cell,) = study.root.rglob(CELL)
    record = {**json.loads(cell.read_text()), **change} if change and isinstance(change, dict) else change
    if isinstance(record, dict):
        record = {key: value for key, value in record.items() if value is not ...}
    cell.write_text(json.dumps(record))
    capsys.readouterr()
    for command in (["study", "report", str(path)], ["study", str(path)]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and str(cell) in error and "delete it to run" in error, error
        assert words in error, error
    assert not (study.root / "study.json").exists()


def test_recorded_cells_are_accepted() -> None:
    cells = sorted(RESULTS.glob(f"*/*/lr_*/seed_*/{CELL}"))
    assert len(cells) == 45
    for cell in cells:
        record = read_cell(cell.parent)
        assert record is not None and record["seed"] in (7, 8, 9), cell
    synthetic = sorted(RESULTS.glob(f"*/synthetic/*/*/lr_*/seed_*/{CELL}"))
    assert len(synthetic) == 140 and all(read_cell(cell.parent, SYNTHETIC) for cell in synthetic)


def test_the_shipped_report_is_that_of_its_json_and_cells() -> None:
    results = json.loads((RESULTS / "study.json").read_text())
    shipped_page = re.sub(r'<img alt="[^>]*>', "", (RESULTS / "study.html").read_text())
    assert page(results, []) == shipped_page, "run: dla study report docs/results/study/study.json"
    for name, arm in results["arms"].items():
        for seed, value in arm["results"].items():
            cell = read_cell(RESULTS / "cpu" / name / rate_name(arm["best_rate"]) / f"seed_{seed}")
            assert cell is not None and cell["val_bpb"] == value
    for task, found in results["synthetic"]["tasks"].items():
        for name, arm in found["arms"].items():
            for seed, value in arm["results"][found["lengths"][-1]].items():
                place = RESULTS / "cpu/synthetic" / task / name / rate_name(arm["best_rate"]) / f"seed_{seed}"
                cell = read_cell(place, SYNTHETIC)
                assert cell is not None and cell["accuracy"][found["lengths"][-1]] == value


def test_a_real_study_and_its_report(write, tmp_path, capsys) -> None:
    path = write(arms={"dla": {}}, reference="dla", learning_rates=[], seeds=[7])
    assert main(["study", "report", str(path)]) == 2 and "no cell" in capsys.readouterr().err
    assert main(["study", str(path)]) == 0
    root = tmp_path / "studies/s"
    cell = json.loads((root / "dla/lr_0.002/seed_7" / CELL).read_text())
    metrics = [json.loads(line) for line in (root / "dla/lr_0.002/seed_7/metrics.jsonl").read_text().splitlines()]
    assert cell["val_bpb"] == metrics[-1]["val_bpb"] and len(cell["held_out"]) == 3 and cell["versions"]["torch"]
    capsys.readouterr()
    assert main(["study", str(path)]) == 0  # nothing to do but the report
    lines = capsys.readouterr().out.splitlines()
    assert "found" in lines[0] and lines[-1] == f"wrote {root / 'study.html'}"
