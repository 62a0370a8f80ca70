"""Recipes of an adapter: what is run, kept, refused and reported."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_dla.ablation import run as runs
from megatron_dla.ablation.plan import load_ablation
from megatron_dla.ablation.report import collect, table_text, write_report
from megatron_dla.ablation.run import RESULT, AblationRunner
from megatron_dla.cli import main
from megatron_dla.errors import STOPPED, ConfigError, UserError
from megatron_dla.evaluation.recall import ProfileTask, write_stories
from tests.support import shipped
from tests.support.adapter_workers import backbone, config_dict

SELF: list = []
SELF.append(SELF)
RECIPES = {"plain": {}, "text": {"episodes.in_prompt": 0.5}, "two": {"delta_mem.num_states": 1, "optimizer.lr": 1e-3}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    backbone(directory / "llama")
    for split, count in (("train", 24), ("validation", 6)):
        write_stories(directory / f"{split}.jsonl", ProfileTask(words=12), count, seed=1, split=split)
    (directory / "text.jsonl").write_text((json.dumps({"text": "red of the and blue in on at " * 4}) + "\n") * 3)
    return directory


@pytest.fixture
def write(data, tmp_path):
    """Writes an ablation's file, with changes, and returns its path."""
    base = config_dict(data, tmp_path / "none", training={"steps": 2, "eval_every": 1})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def write(**changes) -> Path:
        values = {
            "name": "a", "dir": str(tmp_path / "ablations"), "base": str(tmp_path / "base.yaml"), "recipes": RECIPES,
            "seeds": [1, 2],
            "evaluate": {"recall_task": "profile", "set": {"words": 12}, "episodes": 3,
                         "text": [str(data / "text.jsonl")], "window": 8, "windows": 2},
        } | changes  # fmt: skip
        (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return tmp_path / "ablation.yaml"

    return write


class Fake:
    """Commands at once: `plain` remembers and harms, `text` remembers, `two` does nothing."""

    def __init__(self, monkeypatch, stop_at: int = -1) -> None:
        self.commands: list[str] = []
        self.stop_at = stop_at
        monkeypatch.setattr(runs, "launch_run", self.train)
        monkeypatch.setattr(runs, "run_process", self.command)

    def train(self, config, nproc: int, place: Path) -> int:
        if len(self.commands) == self.stop_at:
            return STOPPED
        self.commands.append(f"train {place.parent.name} {place.name} {config.run.seed}")
        assert Path(config.run.dir) / config.run.name == place
        place.mkdir(parents=True)
        lines = [{"step": 0, "val_loss": 1.0}, {"step": 1, "step_s": 2.0}, {"step": 3, "step_s": 4.0}]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0

    def command(self, command: list[str], log: Path) -> int:
        if len(self.commands) == self.stop_at:
            return -15
        words = command[3:]
        self.commands.append(" ".join(Path(w).name if w.startswith("/") else w for w in words))
        if words[0] == "convert":
            Path(words[3]).mkdir()
            return 0
        out = Path(words[words.index("--out") + 1])
        gain, harm = {"plain": (0.9, 0.25), "text": (0.8, 0.0), "two": (0.0, 0.0)}[out.parent.name]

        def row(first: str, second: str, metric: str, mean: float) -> dict:
            return {"first": first, "second": second, "metric": metric, "mean": mean, "low": mean - 0.1,
                    "high": mean + 0.05}  # fmt: skip

        recall = [row("kept", "shuffled", "choice", gain), row("kept", "shuffled", "logprob", 2 * gain),
                  row("full_adapter", "full", "choice", -harm)]  # fmt: skip
        out.mkdir()
        tables = [{"differences": recall}, {"differences": [row("adapter", "base", "nats", harm)]}]
        (out / "eval.json").write_text(json.dumps({"tasks": tables}))
        return 0


def test_every_seed_is_trained_and_all_are_evaluated_together(write, data, monkeypatch, tmp_path, capsys) -> None:
    fake, path = Fake(monkeypatch), write()
    assert main(["ablate", str(path)]) == 0
    assert fake.commands[:5] == [
        "train plain seed_1 1", "convert adapter seed_1 seed_1_adapter", "train plain seed_2 2",
        "convert adapter seed_2 seed_2_adapter",
        "eval llama --adapter seed_1_adapter seed_2_adapter --controls --tasks recall,ppl --episodes 3 --seed 0 "
        "--recall-task profile --set words=12 --text text.jsonl --window 8 --windows 2 --out eval",
    ]  # fmt: skip
    assert len(fake.commands) == 15
    results = json.loads((tmp_path / "ablations/a/ablation.json").read_text())
    plain, text = (results["recipes"][name] for name in ("plain", "text"))
    assert plain["points"]["memory"] == pytest.approx({"mean": 0.9, "low": 0.8, "high": 0.95})
    assert plain["points"]["harm in the prompt"] == pytest.approx({"mean": 0.25, "low": 0.2, "high": 0.35})
    assert text["points"]["memory, nats"]["mean"] == 1.6 and text["overrides"] == {"episodes.in_prompt": 0.5}
    assert plain["seconds"] == [1 * 2.0 + 2 * 4.0] * 2 and plain["seeds"] == [1, 2] and plain["parameters"] > 0
    out = capsys.readouterr().out
    assert "| plain | 0.900 [0.800, 0.950] | 1.800 [1.700, 1.850] | 0.250 [0.200, 0.350] | 0.250 " in out
    assert (tmp_path / "ablations/a/ablation.png").read_bytes()[:4] == b"\x89PNG"
    again = Fake(monkeypatch)
    assert main(["ablate", str(path)]) == 0 and not again.commands


@pytest.mark.parametrize("stop_at", range(7))
def test_one_that_was_stopped_goes_on(write, monkeypatch, tmp_path, stop_at) -> None:
    first, ablation = Fake(monkeypatch, stop_at), load_ablation(write())
    assert AblationRunner(ablation).run() == STOPPED
    second = Fake(monkeypatch)

    def train(config, nproc: int, place: Path) -> int:
        return 0 if place.is_dir() else second.train(config, nproc, place)

    monkeypatch.setattr(runs, "launch_run", train)
    assert AblationRunner(ablation).run() == 0
    done = [command for command in first.commands if not command.startswith("eval")]
    assert not {*done} & {c for c in second.commands if not c.startswith(("eval", "convert"))}
    assert collect(ablation)["planned"] == len(collect(ablation)["recipes"]) == 3


def test_tasks_share_the_recipes_and_the_last_word_is_the_report(write, monkeypatch, tmp_path, capsys) -> None:
    path, report = write(), tmp_path / "ablations/a/ablation.json"
    for task, recipes in (("1/2", ["text"]), ("0/2", ["plain", "two"])):
        fake = Fake(monkeypatch)
        assert main(["ablate", str(path), "--task", task]) == 0 and not report.exists()
        assert [c.split()[1] for c in fake.commands if c.startswith("train")] == [r for r in recipes for _ in range(2)]
    assert main(["ablate", "report", str(path)]) == 0
    assert list(json.loads(report.read_text())["recipes"]) == ["plain", "text", "two"]
    capsys.readouterr()
    assert main(["ablate", str(path), "--task", "2/2"]) == 2 and "--task 2/2" in capsys.readouterr().err


def test_a_run_that_was_stopped_goes_on_with_its_own_config_only(write, monkeypatch) -> None:
    """Real `launch_run`, commands at once: the place of the run is there, as a stop would leave it."""
    monkeypatch.setattr("megatron_dla.study.run.run_process", lambda command, log: -15)
    path = write()
    assert AblationRunner(load_ablation(path)).run() == STOPPED
    load_ablation(path).place("plain", 1).mkdir()
    assert AblationRunner(load_ablation(path)).run() == STOPPED
    with pytest.raises(ConfigError, match=r"plain/seed_1.*optimizer\.lr changed"):
        AblationRunner(load_ablation(write(overrides={"optimizer.lr": 0.5}))).run()


def test_an_adapter_of_before_a_stop_is_exported_anew(write, monkeypatch) -> None:
    Fake(monkeypatch)
    ablation = load_ablation(write(recipes={"plain": {}}))
    old = [ablation.place("plain", seed).with_name(f"seed_{seed}_adapter") for seed in (1, 2)]
    for directory in old:
        directory.mkdir(parents=True)
        (directory / "old").touch()
    AblationRunner(ablation).run()
    assert [directory.is_dir() and not list(directory.iterdir()) for directory in old] == [True, True]


def test_a_task_that_was_stopped_names_itself(write, monkeypatch, capsys) -> None:
    Fake(monkeypatch, stop_at=0)
    path = write()
    assert main(["ablate", str(path), "--task", "1/2"]) == STOPPED
    assert f"`dla ablate {path} --task 1/2` goes on" in capsys.readouterr().out
    for words in (["report", str(path), "--task", "1/2"], [str(path), "--task", "1/2", "--out", "x"]):
        assert main(["ablate", *words]) == 2 and "--task 1/2" in capsys.readouterr().err


def test_results_of_other_configs_and_damaged_ones_are_refused(write, monkeypatch, capsys) -> None:
    Fake(monkeypatch)
    ablation = load_ablation(write())
    AblationRunner(ablation).run()
    for change, word in (
        ({"overrides": {"optimizer.lr": 0.5}}, "optimizer.lr"), ({"seeds": [1, 3]}, "seeds"),
        ({"evaluate": {"episodes": 9}}, "evaluate"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"{RESULT}.*{word}"):
            AblationRunner(load_ablation(write(**change))).run()
    result = ablation.root / "text" / RESULT
    whole = json.loads(result.read_text())
    part = {**whole["points"], "memory": {"mean": 0.5}}
    changed = [{**whole, "points": {"memory": {"mean": "x"}}}, {**whole, "config": 5}, {**whole, "points": {}},
               {**whole, "points": part}, {**whole, "seconds": []}]  # fmt: skip
    for wrong in ("{", "[]", *map(json.dumps, changed)):
        result.write_text(wrong)
        assert main(["ablate", "report", str(write())]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and str(result) in error and "damaged" in error, error


def test_a_failure_names_the_log_and_leaves_no_result(write, monkeypatch) -> None:
    Fake(monkeypatch)
    ablation = load_ablation(write())
    monkeypatch.setattr(runs, "launch_run", lambda *_: 1)
    with pytest.raises(UserError, match=r"plain/seed_1.*exit code 1.*seed_1\.log"):
        AblationRunner(ablation).run()
    Fake(monkeypatch)

    def fails(command: list[str], log: Path) -> int:
        log.write_text("some lines\ndla eval: no such thing\n")
        return 2

    monkeypatch.setattr(runs, "run_process", fails)
    with pytest.raises(UserError, match="no such thing"):
        AblationRunner(ablation).run()
    assert not list(ablation.root.rglob(RESULT))
    with pytest.raises(UserError, match="no recipe has ended"):
        main_report(ablation)


def main_report(ablation) -> None:
    from argparse import Namespace

    from megatron_dla.ablation.cli import _ablate

    _ablate(Namespace(words=["report", str(ablation.root.parents[1] / "ablation.yaml")], task="0/1", out=None))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": ""}, ("base",)), ({"recipes": {}}, ("recipes",)), ({"seeds": []}, ("seeds", "[]")),
        ({"seeds": [1, 1]}, ("seeds", "twice")), ({"recipes": {"a/b": {}}}, ("recipes", "'a/b'")),
        ({"recipes": {"a": {"run.seed": 3}}}, ("recipes.a", "run.seed")),
        ({"recipes": {"a": {"delta_mem.rnk": 3}}}, ("recipes.a", "delta_mem.rnk")),
        ({"recipes": {"a": {"delta_mem.rank": 3}}}, ("recipes.a", "delta_mem.rank", "3")),
        ({"base": "demo_cpu"}, ("base = 'demo_cpu'", "dla study")), ({"nproc": 0}, ("nproc", "0")),
        ({"evaluate": {"episodes": 1}}, ("evaluate.episodes", "1")),
        ({"evaluate": {"recall_task": "fact"}}, ("'fact'",)), ({"evaluate": {"text": ["none.txt"]}}, ("'none.txt'",)),
        ({"evaluate": {"recall_task": "facts", "set": {"peple": 1}}}, ("'peple'",)),
        ({"recipes": {"a": {"optimizer.warmup_steps": 99}}}, ("recipes.a", "optimizer.warmup_steps")),
        ({"evaluate": {"tasks": "x"}}, ("evaluate.tasks",)), ({"recipes": {"ablation.json": {}}}, ("'ablation.json'",)),
        ({"recipes": {"a": {"training.steps": b"x"}}}, ("recipes.a.training.steps", "bytes")),
        ({"recipes": {"a": {"training.steps": {"x"}}}}, ("recipes.a.training.steps", "set")),
        ({"recipes": {"a": SELF}}, ("recipes.a[0]", "itself")),
        ({"overrides": {"delta_mem.rnk": 3}}, ("overrides: ", "delta_mem.rnk")),
    ],
)  # fmt: skip
def test_wrong_ablations(write, changes, words, capsys) -> None:
    assert main(["ablate", str(write(**changes))]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(word in error for word in words), error


def test_a_column_that_was_not_evaluated_is_empty(write, monkeypatch, tmp_path) -> None:
    Fake(monkeypatch)
    ablation = load_ablation(write(recipes={"plain": {}}))
    AblationRunner(ablation).run()
    result = ablation.root / "plain" / RESULT
    record = json.loads(result.read_text())
    record["points"]["harm on text, nats"] = None
    result.write_text(json.dumps(record))
    results = collect(ablation)
    assert results["recipes"]["plain"]["points"]["harm on text, nats"] is None
    assert "| - |" in table_text(results) and len(write_report(results, tmp_path / "out")) == 2
    for column in record["points"]:
        record["points"][column] = None
    result.write_text(json.dumps(record))
    assert [path.name for path in write_report(collect(ablation), tmp_path / "none")] == ["ablation.json"]


@pytest.mark.parametrize("path", shipped.ABLATIONS, ids=lambda path: path.stem)
def test_shipped_ablations_load(path) -> None:
    ablation = load_ablation(path)
    assert "default" in ablation.recipes and len(ablation.config.seeds) >= 1


def test_real_commands(write, tmp_path) -> None:
    """Two seeds of a recipe, trained, exported and evaluated."""
    path = write(recipes={"text": {"episodes.in_prompt": 0.5, "distillation.weight": 1.0}})
    assert main(["ablate", str(path)]) == 0
    results = json.loads((tmp_path / "ablations/a/ablation.json").read_text())
    recipe = results["recipes"]["text"]
    assert all(point is not None for point in recipe["points"].values()) and min(recipe["seconds"]) > 0
    assert recipe["tables"][0]["settings"]["adapters"] == 2 and recipe["tables"][1]["settings"]["windows"] == 2


def test_the_committed_records_are_what_the_docs_say(tmp_path) -> None:
    docs = Path(__file__).parents[2] / "docs"
    values = yaml.safe_load(next(path for path in shipped.ABLATIONS if path.stem == "ablation_recall").read_text())
    path = tmp_path / "ablation.yaml"
    changed = values | {"dir": str(docs / "results" / "ablation")}
    path.write_text(yaml.safe_dump(changed, sort_keys=False))
    results = collect(load_ablation(path))
    assert list(results["recipes"]) == list(values["recipes"])
    text = (docs / "delta_mem.md").read_text()
    for row in table_text(results).splitlines()[2:]:
        name, *cells = row.strip("| ").split(" | ")
        assert f"| `{name}` | {' | '.join(cells[:4])} |" in text
