"""The synthetic tasks of a study: real cells, which cells there are, going on, and the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_dla.cli import main
from megatron_dla.config.load import fill
from megatron_dla.errors import STOPPED, ConfigError, UserError
from megatron_dla.hf.random_model import random_model
from megatron_dla.model.counts import count_parameters
from megatron_dla.study.generators import KINDS, vocabulary
from megatron_dla.study.learner import learn
from megatron_dla.study.plan import StudyConfig, load_study
from megatron_dla.study.report import write_report
from megatron_dla.study.report_synthetic import synthetic_table
from megatron_dla.study.results import collect
from megatron_dla.study.results_synthetic import collect_synthetic
from megatron_dla.study.run import CELL
from megatron_dla.study.run_synthetic import SyntheticRunner
from megatron_dla.study.synthetic import CellConfig, SyntheticCell, SyntheticStudy, memory_size
from tests.support import shipped

TINY = {"length": 16, "eval_lengths": [16, 24], "pairs": 2, "segments": 1, "questions": 1, "keys": 8, "values": 4}
ARMS = {"soft": {"model.pattern": "A"}, "gdn": {"model.pattern": "G"}, "dla": {"model.pattern": "D"}}
TRAINING = {"steps": 3, "rows": 4, "check_every": 2, "check_rows": 8, "test_rows": 8}


def section(**changes) -> dict:
    values = {
        "tasks": {"needle": TINY, "again": {**TINY, "kind": "mqar"}}, "arms": ARMS, "reference": "gdn",
        "training": TRAINING, "learning_rates": [1e-3, 2e-3, 4e-3], "seeds": [1, 2, 3],
        "model": {"hidden_size": 16, "key_dim": 8, "value_dim": 8, "ffn_hidden_size": 32, "num_layers": 1},
    }  # fmt: skip
    return values | changes


@pytest.fixture
def write(tmp_path):
    """Writes a study of synthetic tasks alone, with changes, and returns its path."""

    def write(**changes) -> Path:
        values = {"name": "s", "dir": str(tmp_path / "studies"), "synthetic": section(**changes)}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return tmp_path / "study.yaml"

    return write


def synthetic(path: Path) -> SyntheticStudy:
    found = load_study(path).synthetic
    assert found is not None
    return found


class Fake:
    """Results of cells at once: the rate 2e-3 is the best, `gdn` answers half, `dla` more, less at longer rows."""

    def __init__(self, stop_at: int = -1, diverge: str = "") -> None:
        self.places: list[str] = []
        self.stop_at, self.diverge = stop_at, diverge

    def __call__(self, config: CellConfig, place: Path) -> dict | None:
        if len(self.places) == self.stop_at:
            return None
        self.places.append("/".join(place.parts[-4:]))
        if self.diverge and self.diverge in self.places[-1]:
            return {"diverged": "the loss is nan in step 1", "steps": 1, "curve": []}
        good = {"gdn": 0.5, "dla": 0.75, "soft": 0.25}[place.parts[-3]] - abs(config.rate - 2e-3) + config.seed / 100
        return {
            "accuracy": {"16": good, "24": good - 0.2}, "check_accuracy": good, "steps": 3, "parameters": 1000,
            "curve": [[3, 1.0, good]], "seconds": 1.0,
        }  # fmt: skip


def test_each_task_tries_the_learning_rates_and_repeats_the_best(write) -> None:
    fake = Fake()
    assert SyntheticRunner(synthetic(write()), launch=fake).run() == 0
    assert len(set(fake.places)) == len(fake.places) == 2 * 3 * 5
    places = [place for place in fake.places if place.startswith("again/dla")]
    assert places == [
        f"again/dla/lr_{rate}/seed_{seed}" for rate, seed in
        [("0.001", 1), ("0.002", 1), ("0.004", 1), ("0.002", 2), ("0.002", 3)]
    ]  # fmt: skip


def test_an_arm_may_have_learning_rates_of_its_own(write) -> None:
    arms = {**ARMS, "dla": {**ARMS["dla"], "learning_rates": [5e-4]}}
    fake, study = Fake(), synthetic(write(arms=arms, tasks={"needle": TINY}))
    assert SyntheticRunner(study, launch=fake).run() == 0
    assert [p for p in fake.places if "dla" in p] == [f"needle/dla/lr_0.0005/seed_{seed}" for seed in (1, 2, 3)]
    results = collect_synthetic(study)
    assert results["cells"] == {"done": 13, "planned": 13}
    assert not results["tasks"]["needle"]["arms"]["dla"]["rate_at_edge"]


def test_of_two_rates_that_suffice_the_faster_one_is_taken(write) -> None:
    study = synthetic(write(tasks={"needle": TINY}, arms={"gdn": {}}, reference=""))

    def launch(config: CellConfig, place: Path) -> dict:
        record = {"accuracy": {"16": 1.0, "24": 1.0}, "check_accuracy": 1.0, "steps": 9, "curve": [], "parameters": 9}
        return record | ({"check_accuracy": 0.991, "steps": 5} if config.rate == 4e-3 else {})

    SyntheticRunner(study, launch=launch).run()
    assert (study.root / "needle/gdn/lr_0.004/seed_3" / CELL).is_file()


def test_a_stopped_study_goes_on_and_refuses_other_configs(write) -> None:
    first, second, third = Fake(stop_at=7), Fake(), Fake()
    study = synthetic(write())
    assert SyntheticRunner(study, launch=first).run() == STOPPED
    assert SyntheticRunner(study, launch=second).run() == SyntheticRunner(study, launch=third).run() == 0
    assert len(first.places) == 7 and len(second.places) == 23 and not third.places
    assert not set(first.places) & set(second.places)
    for changes, key in (({"training": {**TRAINING, "rows": 5}}, "training.rows"), ({"arms": {"gdn": {}}}, "model")):
        with pytest.raises(ConfigError, match=rf"cell\.json.*{key}"):
            SyntheticRunner(synthetic(write(**changes)), launch=Fake()).run()
        with pytest.raises(ConfigError, match=rf"cell\.json.*{key}"):
            collect_synthetic(synthetic(write(**changes)))


def test_tasks_of_an_array_share_the_cells(write) -> None:
    fakes = [Fake(), Fake()]
    for number, fake in enumerate(fakes):
        assert SyntheticRunner(synthetic(write()), (number, 2), fake).run() == 0
    assert not set(fakes[0].places) & set(fakes[1].places)
    assert len(fakes[0].places) == len(fakes[1].places) == 15


def test_the_report_says_what_the_cells_say(write, tmp_path) -> None:
    study = load_study(write())
    assert study.synthetic is not None
    SyntheticRunner(study.synthetic, launch=Fake(diverge="again/soft")).run()
    results = {**collect(study), "synthetic": collect_synthetic(study.synthetic)}
    files = write_report(results, tmp_path / "report", "dla study s")
    assert [file.name for file in files] == ["study.json", "recall.png", "study.html"]
    found = json.loads(files[0].read_text())["synthetic"]
    assert found["cells"] == {"done": 28, "planned": 30} and found["tasks"]["needle"]["lengths"] == ["16", "24"]
    dla, soft = (found["tasks"]["needle"]["arms"][name] for name in ("dla", "soft"))
    assert dla["best_rate"] == 2e-3 and not dla["rate_at_edge"]
    assert dla["mean"]["16"] == pytest.approx(0.77) and dla["range"]["24"] == pytest.approx([0.56, 0.58])
    assert soft["difference"]["24"] == pytest.approx({"mean": -0.25, "seeds": 3, "low": -0.25, "high": -0.25})
    assert found["tasks"]["again"]["arms"]["soft"]["mean"] == {"16": None, "24": None}
    rows = synthetic_table(found, "needle")
    assert [row[0] for row in rows] == ["arm", "dla", "gdn", "soft"]
    assert rows[1][6:9] == ["0.770 [0.760, 0.780]", "+0.250 [+0.250, +0.250]", "better"] and rows[3][8] == "worse"
    text = files[-1].read_text()
    assert text.count("data:image/png") == 1 and "0.770 [0.760, 0.780]" in text and "28 of 30" in text
    again = write_report(json.loads(files[0].read_text()), tmp_path / "again", "dla study s")
    assert again[-1].read_text() == text, "every number comes from the JSON"


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_of_each_task_trains_end_to_end(kind, tmp_path) -> None:
    pattern = {"mqar": "AW", "segment_recall": "GM", "needle": "DL", "multi_key_needle": "D"}[kind]
    values = section(tasks={kind: TINY}, arms={"x": {"model.pattern": pattern, "model.num_layers": len(pattern)}})
    study = SyntheticStudy(fill_study(values, tmp_path).synthetic, tmp_path)
    config = study.cell_config(SyntheticCell(kind, "x", 1e-2, 1))
    record = learn(config)
    assert record == learn(CellConfig.from_plain(json.loads(json.dumps(config.plain())))) | {
        "seconds": record["seconds"]
    }
    assert record["steps"] == 3 and [point[0] for point in record["curve"]] == [2, 3]
    assert record["accuracy"].keys() == {"16", "24"} and all(0 <= x <= 1 for x in record["accuracy"].values())
    assert record["parameters"] == count_parameters(config.model, vocabulary(config.task).size)


def fill_study(values: dict, place: Path) -> StudyConfig:
    return fill(StudyConfig, {"dir": str(place), "synthetic": {**values, "reference": ""}})


def test_a_needle_is_learned_and_training_ends_early(tmp_path) -> None:
    values = section(
        tasks={"needle": {**TINY, "keys": 2, "values": 2, "fillers": 2}}, arms={"x": {"model.pattern": "A"}},
        training={**TRAINING, "steps": 400, "rows": 32, "check_every": 20, "check_rows": 64, "test_rows": 64},
        model={"hidden_size": 32, "ffn_hidden_size": 32},
    )  # fmt: skip
    study = SyntheticStudy(fill_study(values, tmp_path).synthetic, tmp_path)
    record = learn(study.cell_config(SyntheticCell("needle", "x", 1e-2, 1)))
    assert record["steps"] < 400 and record["accuracy"]["16"] > 0.95, record


def test_a_loss_that_is_not_finite_counts_as_diverged(tmp_path) -> None:
    study = SyntheticStudy(fill_study(section(tasks={"needle": TINY}), tmp_path).synthetic, tmp_path)
    config = study.cell_config(SyntheticCell("needle", "gdn", 1e30, 1))
    assert "loss" in learn(replace(config, training=replace(config.training, steps=40)))["diverged"]


def test_memory_of_an_arm(tmp_path) -> None:
    study = SyntheticStudy(fill_study(section(), tmp_path).synthetic, tmp_path)
    model = study.arms["gdn"][0]
    assert memory_size(model, 16) == 8 * 8 and memory_size(replace(model, pattern="D"), 16) == 8 * 8 * 8
    assert memory_size(replace(model, pattern="A"), 16) == 2 * 16 * 16
    assert memory_size(replace(model, pattern="W", sliding_window=5), 16) == 2 * 16 * 5
    assert random_model(model, 20).num_parameters() == count_parameters(model, 20)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"tasks": {"mqr": {}}}, ("synthetic.tasks.mqr.kind", "'mqr'")), ({"arms": {}}, ("synthetic.arms",)),
        ({"tasks": {"needle": {"pears": 3}}}, ("synthetic.tasks.needle.pears", "pairs")),
        ({"reference": "x"}, ("synthetic.reference", "'x'")), ({"seeds": [1, 1]}, ("synthetic.seeds", "1, 1")),
        ({"learning_rates": []}, ("synthetic.learning_rates",)), ({"training": {"steps": 0}}, ("training.steps", "0")),
        ({"arms": {"gdn": {"model.patern": "G"}}}, ("synthetic.arms.gdn.model.patern",)),
        ({"arms": {"gdn": {"steps": 3}}}, ("synthetic.arms.gdn", "'steps'")),
        ({"arms": {"gdn": {"model.pattern": "Q"}}}, ("synthetic.arms.gdn", "model.pattern", "'Q'")),
        ({"arms": {"gdn": {}, "big": {"model.hidden_size": 512}}}, ("synthetic.arms.big", "ffn_hidden_size")),
        ({"tasks": {"needle/x": {"kind": "needle"}}}, ("synthetic.tasks", "'needle/x'")),
        ({"learning_rates": [1e-3, 1.0000000001e-3]}, ("synthetic.learning_rates", "0.0010000000001", "lr_0.001")),
        ({"learning_rates": [1e-3, 1e-3]}, ("synthetic.learning_rates", "twice")),
        ({"arms": {"gdn": {"learning_rates": 0.1}}}, ("synthetic.arms.gdn.learning_rates", "0.1")),
        ({"seeds": [True]}, ("synthetic.seeds[0] = True", "number")),
        ({"tasks": {"needle": {"eval_lengths": [True]}}}, ("synthetic.tasks.needle.eval_lengths[0] = True",)),
        ({"arms": {"gdn": {"model.pattern": b"G"}}}, ("synthetic.arms.gdn.model.pattern", "b'G'", "bytes")),
    ],
)  # fmt: skip
def test_wrong_synthetic_tasks(write, changes, words, capsys) -> None:
    assert main(["study", str(write(**{"reference": "", **changes}))]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(word in error for word in words), error


@pytest.mark.parametrize(
    "change,words",
    [
        ({"accuracy": None}, "accuracy = None"), ({"accuracy": {}}, "accuracy = {}: it has no length 16"),
        ({"accuracy": {"16": "x"}}, "accuracy = {'16': 'x'}"), ({"accuracy": {"16": float("nan")}}, "'16': nan"),
        ({"accuracy": {"16": 0.5}}, "no length 24"), ({"check_accuracy": ...}, "check_accuracy is missing"),
        ({"steps": None}, "steps = None"), ({"rate": None}, "rate = None"), ({"curve": 5}, "curve = 5"),
        ({"rate": 1.0}, "rate = 1.0"), ({"seed": 2}, "seed = 2"), ({"config": {}}, "config has no model, run"),
        ({"curve": [[1, 2.0]]}, "curve = [[1, 2.0]]"), ({"parameters": ...}, "parameters is missing"),
    ],
)  # fmt: skip
def test_a_cell_with_other_content_is_named(write, capsys, change, words) -> None:
    path = write(tasks={"needle": TINY}, arms={"gdn": {}}, reference="", seeds=[1], learning_rates=[1e-3])
    study = synthetic(path)
    SyntheticRunner(study, launch=Fake()).run()
    (cell,) = study.root.rglob(CELL)
    record = {**json.loads(cell.read_text()), **change}
    cell.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))
    for command in (["study", "report", str(path)], ["study", str(path)]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and str(cell) in error and "delete it to run" in error, error
        assert words in error, error


@pytest.mark.parametrize("path", shipped.SYNTHETIC, ids=lambda path: path.stem)
def test_arms_of_shipped_studies_have_equal_parameters(path, tmp_path) -> None:
    values = yaml.safe_load(path.read_text())["synthetic"]
    study = SyntheticStudy(fill_study(values, tmp_path).synthetic, tmp_path)
    assert set(study.tasks) == set(KINDS)
    for task in study.tasks:
        cells = [study.cell_config(SyntheticCell(task, arm, 1e-3, 1)) for arm in study.arms]
        counts = [count_parameters(cell.model, vocabulary(cell.task).size) for cell in cells]
        assert max(counts) - min(counts) <= 0.02 * min(counts), counts


def test_a_killed_study_goes_on(write) -> None:
    """The process of a cell ends with the study's, and the cells that had ended are found."""
    some = {"tasks": {"needle": TINY}, "arms": {"gdn": {}, "soft": {"model.pattern": "A"}}, "seeds": [1]}
    fast, long = ({**TRAINING, "steps": 10**6, **more} for more in ({"stop_at": 0.0}, {}))
    some |= {"learning_rates": [1e-3], "training": fast}
    path = write(**some, reference="gdn")
    root = path.parent / "studies/s/synthetic/needle"
    code = f"from megatron_dla.cli import main; main(['study', {str(path)!r}])"
    SyntheticRunner(synthetic(path), launch=Fake(stop_at=1)).run()  # one cell has ended
    some["arms"]["soft"] |= {f"training.{key}": value for key, value in long.items()}  # the other would never end
    write(**some, reference="gdn")
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not (child := _child(run.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.kill()
    run.wait()
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child and not _alive(child)
    assert [found.parts[-4] for found in root.rglob(CELL)] == ["gdn"]

    some["arms"]["soft"] = {"model.pattern": "A"}
    assert main(["study", str(write(**some, reference="gdn"))]) == 0
    record = json.loads((root / "soft/lr_0.001/seed_1" / CELL).read_text())
    assert record["steps"] == 2 and record["config"]["task"]["kind"] == "needle" and record["versions"]["torch"]
    assert (path.parent / "studies/s/recall.png").is_file()


def _child(parent: int) -> int:
    """A process that `parent` started; 0 where there is none."""
    try:
        return int((Path(f"/proc/{parent}/task/{parent}/children").read_text().split() or ["0"])[0])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_signal_stops_the_study_and_a_failed_cell_ends_it(write) -> None:
    study = synthetic(write())
    assert SyntheticRunner(study, launch=lambda *_: None).run() == STOPPED

    def fail(*_):
        raise UserError("needle: the cell failed (exit code 1)")

    with pytest.raises(UserError, match="exit code 1"):
        SyntheticRunner(study, launch=fail).run()
    assert not list(study.root.rglob(CELL))
