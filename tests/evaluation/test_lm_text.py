"""`dla eval lm --text` against transformers' own loss; several models; resume; refusals."""

import json
import math
import os

import numpy as np
import pytest
import torch

from megatron_dla import cli
from megatron_dla.errors import UserError
from megatron_dla.evaluation.lm.journal import JOURNAL, Journal
from megatron_dla.evaluation.lm.models import load_subject
from megatron_dla.evaluation.lm.perplexity import Perplexity, by_position, encode_bytes, perplexity_units
from megatron_dla.evaluation.lm.runner import Runner
from megatron_dla.evaluation.lm.scoring import batches
from tests.hf.conftest import exported, saved, tokenizer, use_modules_cache
from tests.support.tiny_hf import save_base

__all__ = ["exported", "saved", "tokenizer", "use_modules_cache"]
TEXT = "The grey mill stood by the river; nobody had seen it turn. Déjà vu, said the miller, and went on — slowly. " * 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models with one tokenizer, and texts."""
    root = tmp_path_factory.mktemp("lm")
    save_base(root / "one")
    save_base(root / "two", "qwen3", seed=3)
    (root / "text.txt").write_text(TEXT)
    (root / "more.jsonl").write_text("".join(json.dumps({"text": TEXT[i : i + 30 + i]}) + "\n" for i in range(5)))
    return root


@pytest.fixture(scope="module")
def subject(place):
    return load_subject("one", str(place / "one"))


def their_nats(model, ids, window, stride):
    """Sum of transformers' losses: overlapping windows, labels only on what no earlier window scored."""
    total, scored = 0.0, 1
    for at in range(0, len(ids), stride):
        part = torch.tensor([ids[at : at + window + 1]])
        labels = part.clone()
        labels[0, : scored - at] = -100
        new = at + part.shape[1] - scored
        if new <= 0:
            break
        with torch.no_grad():
            total += model(part, labels=labels, num_items_in_batch=torch.tensor(1)).loss.item()
        scored += new
    assert scored == len(ids)
    return total


@pytest.mark.parametrize("window,stride", [(32, 32), (32, 8), (1000, 1000)])
def test_transformers_own_loss(subject, window, stride):
    ids = subject.encode(TEXT)
    task = Perplexity([TEXT], window=window, stride=stride, budget=100)
    items = task.items(subject)
    values = task.measure(subject, items)
    assert sum(sum(value["tokens"]) for value in values) == len(ids) - 1
    wanted = their_nats(subject.model, ids, window, stride) / (len(ids) - 1)
    found = perplexity_units(values)
    assert found["nats"].mean() == pytest.approx(wanted, abs=1e-5)
    size = len(TEXT.encode()) - 1  # the first token is one byte
    assert found["bits_per_byte"].mean() == pytest.approx(wanted * (len(ids) - 1) / math.log(2) / size, abs=1e-5)
    if window == 1000:
        whole = torch.tensor([ids])
        assert found["nats"].mean() == pytest.approx(subject.model(whole, labels=whole).loss.item(), abs=1e-5)


@pytest.mark.parametrize("name", ["gdn_hybrid"])
def test_an_export_and_its_run(exported, name, tmp_path):
    """The loss of an export is that of its own class, and a run is its newest checkpoint."""
    export = load_subject("x", str(exported(name).directory))
    ids = export.encode("hello world the quick brown fox " * 9)
    text = export.tokenizer.decode(ids)
    task = Perplexity([text, text[:40]], window=24, stride=24)
    values = task.measure(export, task.items(export))
    wanted = sum(their_nats(export.model, export.encode(t), 24, 24) for t in (text, text[:40]))
    assert sum(sum(value["nats"]) for value in values) == pytest.approx(wanted, rel=1e-5)
    run = load_subject("run", str(exported(name).checkpoint.parent.parent))
    assert run.digest == export.digest


def test_positions_and_bytes(subject):
    ids, sizes = encode_bytes(subject, TEXT)
    assert ids == subject.encode(TEXT) and sum(sizes) == len(TEXT.encode()) > len(TEXT)
    task = Perplexity([TEXT], window=48, stride=48)
    items = task.items(subject)
    rows = by_position(task.measure(subject, items))
    full, rest = divmod(len(ids) - 1, 48)
    assert [row["from"] for row in rows] == [1, 2, 4, 8, 16, 32] and rows[0]["to"] == 1 and rows[-1]["to"] == 63
    assert rows[0]["tokens"] == len(items) and rows[5]["tokens"] == 17 * full + max(0, rest - 31)
    first = []
    for item in items:
        with torch.no_grad():
            logits = subject.model(torch.tensor([item.payload.row.ids[:1]])).logits[0, -1]
        first.append(-logits.log_softmax(-1)[item.payload.row.ids[1]].item())
    assert rows[0]["nats"] == pytest.approx(np.mean(first), abs=1e-5)


def test_batches_are_of_similar_length_and_within_the_budget():
    lengths = [5, 40, 7, 8, 100, 6, 41]
    found = list(batches(lengths, 82))
    assert sorted(i for batch in found for i in batch) == list(range(7)) and found[0] == [4]
    assert all(len(batch) == 1 or len(batch) * lengths[batch[0]] <= 82 for batch in found)


def test_two_models(place, capsys, tmp_path):
    out = tmp_path / "out"
    arguments = ["eval", "lm", f"{place}/one", f"b={place}/two", "--window", "32", "--batch-tokens", "200"]
    assert cli.main([*arguments, "--text", f"{place}/text.txt", f"{place}/more.jsonl", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((out / "eval.json").read_text())
    (task,) = found["tasks"]
    assert list(found["models"]) == [f"{place}/one", "b"] and task["settings"]["paired"] == ["b"]
    nats = {model: row["nats"] for model, row in task["conditions"].items()}
    (difference,) = (row for row in task["differences"] if row["metric"] == "nats")
    assert (difference["first"], difference["second"]) == ("b", f"{place}/one")
    assert difference["mean"] == pytest.approx(nats["b"]["mean"] - nats[f"{place}/one"]["mean"])
    assert task["perplexity"]["b"] == pytest.approx(math.exp(nats["b"]["mean"]))
    assert f"b: perplexity {task['perplexity']['b']:.4f}" in printed
    total = sum(row["tokens"] * row["nats"] for row in task["by_position"]["b"])
    tokens = sum(row["tokens"] for row in task["by_position"]["b"])
    assert (
        total / tokens == pytest.approx(nats["b"]["mean"]) and nats["b"]["low"] < nats["b"]["mean"] < nats["b"]["high"]
    )
    assert (out / "eval.png").read_bytes()[:4] == b"\x89PNG"


class StoppedError(Exception):
    pass


def test_resume(subject, place, tmp_path):
    """What was measured before a kill is not measured again, and the result is the same."""

    class Counted(Perplexity):
        left, done = 10**9, 0

        def measure(self, subject, items):
            self.left -= 1
            if self.left < 0:
                raise StoppedError
            self.done += len(items)
            return super().measure(subject, items)

    def run(out, left=10**9, window=32):
        task = Counted([TEXT], window=window, stride=window)
        task.left = left
        with Journal(out) as journal:
            runner = Runner([task], journal, 70)
            runner.run(lambda: subject)
        return task.done, runner.outcomes["perplexity"]["one"].values

    total, wanted = run(None)
    with pytest.raises(StoppedError):
        run(tmp_path, left=2)
    with open(tmp_path / JOURNAL, "ab") as file:
        file.write(b'{"run": "half a li')
    lines = (tmp_path / JOURNAL).read_bytes().count(b"\n")
    done, values = run(tmp_path)
    assert 0 < lines < total and done == total - lines and values == wanted
    assert run(tmp_path)[0] == 0  # nothing is left
    assert run(tmp_path, window=16)[0] > 0  # other settings, other items
    assert (tmp_path / JOURNAL).read_bytes().endswith(b"}\n")
    first, *rest = (tmp_path / JOURNAL).read_text().splitlines()
    entry = json.loads(first)
    old = {key: value for key, value in entry.items() if key != "digest"}  # of a version before it
    (tmp_path / JOURNAL).write_text("\n".join([json.dumps(old), *rest]) + "\n")
    assert run(tmp_path) == (1, values)
    for wrong in ([], -1.0, ["q"], "x", {}, None):
        entry["values"]["nats"] = wrong
        (tmp_path / JOURNAL).write_text("\n".join([json.dumps(entry), *rest]) + "\n")
        with pytest.raises(UserError, match="line 1 is damaged"):
            Journal(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b'{"run": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        Journal(tmp_path)


def test_one_evaluation_a_directory(tmp_path):
    with Journal(tmp_path), pytest.raises(UserError, match="--out"):
        Journal(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_journal_that_is_no_file(tmp_path, make):
    make(tmp_path / JOURNAL)
    with pytest.raises(UserError, match=rf"--out '{tmp_path}'.*{JOURNAL}.*remove"):
        Journal(tmp_path)


BAD = {
    (): ["no task", "--text"],
    ("--text", "{place}/none.txt"): ["{place}/none.txt"],
    ("--text", "{place}/one/model.safetensors"): ["model.safetensors", ".jsonl"],
    ("--text", "{place}/text.txt", "--window", "8", "--stride", "9"): ["--stride 9", "--window 8"],
    ("--text", "{place}/text.txt", "--batch-tokens", "0"): ["--batch-tokens 0"],
    ("{place}/one", "--text", "{place}/text.txt"): ["{place}/one", "twice"],
    ("a={place}/nowhere", "--text", "{place}/text.txt"): ["{place}/nowhere", "directory"],
    ("--text", "{place}/text.txt", "--out", "{place}/text.txt"): ["--out", "file"],
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_arguments_are_named(place, capsys, arguments):
    code = cli.main(["eval", "lm", f"{place}/one", *(text.format(place=place) for text in arguments)])
    _, err = capsys.readouterr()
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("dla eval lm: ")
    assert all(word.format(place=place) in err for word in BAD[arguments]), err
