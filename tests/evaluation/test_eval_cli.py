"""`dla eval`: what is printed, written and refused."""

import json
import math

import pytest

from megatron_dla import cli
from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.files import Adapter, write_adapter
from megatron_dla.hf.directory import fingerprint
from tests.support.tiny_eval import build_model, save_words
from tests.support.tiny_hf import save_base


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base, two adapters, a static one, text."""
    import torch

    root = tmp_path_factory.mktemp("eval")
    save_words(root / "base")
    configs = {"one": DeltaMemConfig(), "two": DeltaMemConfig(num_states=2), "static": DeltaMemConfig(memory="static")}
    for name, config in configs.items():
        tensors = build_model(config, torch.float32).tensors()
        write_adapter(root / name, Adapter(config, tensors, fingerprint(root / "base")))
    (root / "text.txt").write_text("red tea of the and in " * 40)
    return root


@pytest.fixture
def dla(place, capsys):
    """`dla eval` -> exit code, standard output, standard error; {place} is filled in."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["eval", *(text.format(place=place) for text in arguments)])
        return code, *capsys.readouterr()

    return run


def test_everything(dla, place, tmp_path):
    code, out, err = dla(
        "{place}/base", "--adapter", "{place}/one", "{place}/two", "--static", "{place}/static", "--controls",
        "--tasks", "recall,ppl", "--set", "people=2", "relations=1", "--episodes", "4", "--text", "{place}/text.txt",
        "--window", "16", "--windows", "3", "--seed", "5", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert len(found["model_sha256"]) == 64 and found["seed"] == 5
    recall, ppl = found["tasks"]
    assert recall["settings"]["people"] == 2 and recall["settings"]["adapters"] == 2
    names = ["full", "full_adapter", "kept", "zeroed", "shuffled", "scale_0", "static"]
    assert list(recall["conditions"]) == names
    kept = recall["conditions"]["kept"]["choice"]
    assert kept["count"] == 8 and kept["groups"] == 2 and kept["low"] <= kept["mean"] <= kept["high"]
    pairs = {(row["first"], row["second"]) for row in recall["differences"]}
    assert pairs == {("kept", n) for n in names[3:]} | {("full_adapter", "full")}
    for row in recall["differences"]:
        first, second = (recall["conditions"][row[key]][row["metric"]]["mean"] for key in ("first", "second"))
        assert math.isclose(row["mean"], first - second, abs_tol=1e-12)
    assert [(row["adapter"], row["layer"]) for row in recall["layers"]] == [(a, i) for a in (0, 1) for i in range(3)]
    assert ppl["unit"] == "windows" and set(ppl["conditions"]) == {"base", "adapter", "static"}
    line = next(line for line in out.splitlines() if line.startswith("kept - zeroed"))
    shown = next(r for r in recall["differences"] if r["second"] == "zeroed" and r["metric"] == "logprob")
    assert f"{shown['mean']:.3f} [{shown['low']:.3f}, {shown['high']:.3f}]" in line
    assert (tmp_path / "out" / "eval.png").read_bytes()[:4] == b"\x89PNG"


def test_a_curve_over_a_setting(dla, tmp_path):
    code, out, err = dla(
        "{place}/base", "--adapter", "{place}/one", "--controls", "--set", "people=1", "--sweep", "shifts=0,2",
        "--episodes", "4", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, err
    tables = json.loads((tmp_path / "out" / "eval.json").read_text())["tasks"]
    assert [(t["settings"]["shifts"], t["settings"]["people"], t["settings"]["sweep"]) for t in tables] == [
        (0, 1, "shifts"), (2, 1, "shifts")
    ]  # fmt: skip
    assert tables[0]["settings"]["tokens_told"] + 20 < tables[1]["settings"]["tokens_told"]
    assert "recall (facts, shifts = 0)" in out and "recall (facts, shifts = 2)" in out and "costs" not in tables[0]
    assert (tmp_path / "out" / "eval.png").read_bytes()[:4] == b"\x89PNG"


def test_the_same_questions_by_other_means(dla, place, tmp_path):
    code, out, err = dla(
        "{place}/base", "--adapter", "{place}/one", "{place}/two", "--set", "people=2", "relations=2", "filler=12",
        "--beside", "window=20", "bm25=3", "summary=6", "lora=2", "--episodes", "4", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, err
    (table,) = json.loads((tmp_path / "out" / "eval.json").read_text())["tasks"]
    other = ["window_20", "bm25_3", "summary_6", "lora_2"]
    assert list(table["conditions"]) == ["full", "kept", "scale_0", *other]
    assert {(r["first"], r["second"]) for r in table["differences"]} == {("kept", n) for n in ["scale_0", *other]}
    costs = table["costs"]
    assert list(costs) == ["full", "kept", *other] and all(cost["seconds"] > 0 for cost in costs.values())
    tokens = {name: cost["prompt tokens"] for name, cost in costs.items()}
    assert tokens["kept"] + 15 < tokens["window_20"] <= tokens["kept"] + 20 + 6  # and the turn around it
    assert tokens["full"] > max(tokens[name] for name in other) and tokens["lora_2"] == tokens["kept"]
    kept = {name: cost["bytes an episode keeps"] for name, cost in costs.items()}
    assert kept["kept"] == 3 * (1 + 2) / 2 * 8 * 8 * 4  # layers, states of the two adapters, fp32
    assert kept["full"] == kept["bm25_3"] > kept["window_20"] > 0 and kept["full"] > kept["summary_6"]
    assert "prompt tokens" in out


def test_texts_of_jsonl_are_on_their_own(dla, place, tmp_path):
    texts = ["red tea of the and in the red", "the and", "of red tea and the in tea tea red"]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n")
    out = tmp_path / "out"
    options = ("--tasks", "ppl", "--text", str(tmp_path / "t.jsonl"), "--window", "6", "--out", str(out))
    assert dla("{place}/base", *options)[0] == 0
    (table,) = json.loads((out / "eval.json").read_text())["tasks"]
    assert table["settings"]["windows"] == 2  # the beginnings of the two long ones
    for line, word in (
        ('{"text": 5}', '"text"'),
        ("[]", '"text"'),
        ('{"text": "\\ud800"}', "surrogate"),
        ("{", "not JSON"),
    ):
        (tmp_path / "t.jsonl").write_text('{"text": "red tea"}\n' + line + "\n")
        code, _, err = dla("{place}/base", *options)
        assert code == 2 and "t.jsonl:2" in err and word in err and len(err.splitlines()) == 1


def test_plain_model(dla):
    code, out, _ = dla("{place}/base", "--episodes", "2")
    assert code == 0 and "full" in out and "scale_0" in out and "kept" not in out and "half-life" not in out


BAD = {
    ("--tasks", "recall,maze"): ["--tasks recall,maze", "'maze'", "recall, ppl, locomo"],
    ("--tasks", ","): ["--tasks ,"],
    ("--tasks", "ppl"): ["--tasks ppl", "--text FILE"],
    ("--tasks", "locomo"): ["--tasks locomo", "--locomo FILE"],
    ("--episodes", "1"): ["--episodes 1", "2"],
    ("--episodes", str(2**70)): [f"--episodes {2**70}", "2^31"],
    ("--batch", str(2**70)): [f"--batch {2**70}", "2^31"],
    ("--seed", str(2**70)): [f"--seed {2**70}", "2^63"],
    ("--set", "people"): ["--set people", "KEY=VALUE"],
    ("--set", "cats=2"): ["'facts'", "'cats'", "people"],
    ("--set", "people=many"): ["people = 'many'"],
    ("--set", "people=--2"): ["people = '--2'"],
    ("--seed", "-1"): ["--seed -1"],
    ("--static", "{place}/one"): ["--static", "delta_mem.memory = 'online'"],
    ("--tasks", "ppl", "--text", "{place}/none"): ["{place}/none", "No such file"],
    ("--tasks", "ppl", "--text", "{place}/text.txt", "--window", "999"): ["--text", "999", "--window"],
    ("--tasks", "locomo", "--locomo", "{place}/text.txt"): ["{place}/text.txt", "locomo10.json"],
    ("--recall-task", "profile", "--set", "words=2"): ["words = 2", "4"],
    ("--sweep", "people"): ["--sweep people", "KEY=V,V"],
    ("--sweep", "people=2"): ["--sweep people=2", "two"],
    ("--sweep", "people=2,,3"): ["--sweep people=2,,3", "KEY=V,V"],
    ("--sweep", "cats=2,3"): ["'facts'", "'cats'"],
    ("--sweep", "people=1,2", "--set", "people=2"): ["--sweep people=1,2", "--set"],
    ("--beside", "window"): ["--beside window", "bm25=N"],
    ("--beside", "window=0"): ["--beside window=0", "from 1"],
    ("--beside", "notes=3"): ["--beside notes=3", "summary=N"],
    ("--beside", "bm25=3", "bm25=3"): ["--beside bm25=3 bm25=3", "twice"],
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_arguments_are_named(dla, place, tmp_path, arguments):
    code, out, err = dla("{place}/base", *arguments, "--out", str(tmp_path / "out"))
    assert code == 2 and len(err.splitlines()) == 1 and not out
    assert all(word.format(place=place) in err for word in BAD[arguments]), err
    assert not (tmp_path / "out").exists()


def test_no_model_and_no_place_for_the_report_are_named_first(dla, place, tmp_path):
    for arguments, message in (
        ((str(tmp_path / "none"),), f"'{tmp_path}/none' is not a directory"),
        (("{place}/base", "--out", "{place}/text.txt"), "text.txt"),
    ):
        code, out, err = dla(*arguments)
        assert code == 2 and message in err and len(err.splitlines()) == 1 and not out


def test_adapter_of_another_model_is_refused(dla, tmp_path):
    save_base(tmp_path / "other", seed=1)
    code, _, err = dla(str(tmp_path / "other"), "--adapter", "{place}/one")
    assert code == 2 and "adapter" in err and len(err.splitlines()) == 1
