"""Multiple choice and last words: lm-eval's rules, against sums over single unbatched calls."""

import importlib.util
import json
import lzma
from string import ascii_lowercase

import numpy as np
import pytest
import torch

from megatron_dla import cli
from megatron_dla.errors import UserError
from megatron_dla.evaluation.lm.models import load_subject
from megatron_dla.evaluation.lm.questions import pair_row, read_questions
from tests.support.tiny_hf import save_base

ASKED = [
    {"q": f"What is {i} and {i + 1}?", "choices": ["a lot", f"the number {i}", "no", "some more of it"][: 2 + i % 3],
     "gold": i % 2}
    for i in range(12)
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("questions")
    save_base(root / "model")
    (root / "asked.jsonl.xz").write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in ASKED).encode()))
    return root


@pytest.fixture(scope="module")
def subject(place):
    return load_subject("model", str(place / "model"))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def logprob(subject, ids, count):
    """Of the last `count` tokens, in one call without padding."""
    with torch.no_grad():
        logits = subject.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(len(ids) - count, len(ids)))


def measured(subject, task):
    return task.measure(subject, task.items(subject))


def test_multiple_choice(subject, place):
    task = read_questions(str(place / "asked.jsonl.xz"), budget=150)
    assert task.name == "asked" and task.chance == pytest.approx(np.mean([1 / len(row["choices"]) for row in ASKED]))
    found = measured(subject, task)
    for row, values in zip(ASKED, found, strict=True):
        context = f"Question: {row['q']}\nAnswer:"
        sums = [logprob(subject, subject.encode(f"{context} {choice}"), len(f" {choice}")) for choice in row["choices"]]
        assert values["logprobs"] == pytest.approx(sums, abs=1e-4)
        normed = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        assert values["acc"] == (int(np.argmax(sums)) == row["gold"])
        assert values["acc_norm"] == (int(np.argmax(normed)) == row["gold"])
    assert [value["acc"] for value in found] != [value["acc_norm"] for value in found]
    assert len(read_questions(str(place / "asked.jsonl.xz"), limit=3).items(subject)) == 3


def test_last_words(subject, tmp_path):
    rows = [{"context": "the grey mill stood by the", "target": " river"}, {"context": "a b ", "target": "c"}]
    contexts = (f"{a}{b} {a} {b}{b}" for a in ascii_lowercase for b in ascii_lowercase)
    for context in contexts:  # one after which a letter is the most probable byte
        greedy = subject.model(torch.tensor([subject.encode(context)])).logits[0, -1].argmax()
        if (target := subject.tokenizer.decode(greedy)).isascii() and target.isalpha():
            break
    rows.append({"context": context, "target": target})
    found = measured(subject, read_questions(write(tmp_path / "last.jsonl", *rows)))
    for row, values in zip(rows, found, strict=True):
        ids = subject.encode(row["context"] + row["target"])
        count = len(row["target"]) + (row["context"][-1] == " ")  # bytes: a token each
        assert values["nats"] == pytest.approx(-logprob(subject, ids, count), abs=1e-4)
    assert [values["acc"] for values in found] == [0, 0, 1]


def test_blank_and_continuation(subject, tmp_path):
    row = {"sentence": "Anna told Eve that _ was late.", "choices": ["Anna", "Eve"], "gold": 1}
    (found,) = measured(subject, read_questions(write(tmp_path / "blank.jsonl", row)))
    texts = [f"Anna told Eve that {name} was late." for name in row["choices"]]
    wanted = [logprob(subject, subject.encode(text), len(" was late.")) for text in texts]
    assert found["logprobs"] == pytest.approx(wanted, abs=1e-4)
    row = {"activity": "Roofs", "ctx": "A man sits. [header] he", "choices": ["falls [x] off.", "sings."], "gold": 0}
    (found,) = measured(subject, read_questions(write(tmp_path / "ctx.jsonl", row)))
    texts = [("Roofs: A man sits. he", " falls off."), ("Roofs: A man sits. he", " sings.")]
    wanted = [logprob(subject, subject.encode("".join(pair)), len(pair[1])) for pair in texts]
    assert found["logprobs"] == pytest.approx(wanted, abs=1e-4)


def test_tokens_of_a_pair(subject):
    assert pair_row(subject, "ab ", " c") == pair_row(subject, "ab", "  c")
    row = pair_row(subject, "", "cat")
    assert row.ids[0] == subject.tokenizer.eos_token_id and row.start == 1 and len(row.ids) == 4
    limit = subject.model.config.max_position_embeddings
    row = pair_row(subject, "x" * 400, " end")
    assert len(row.ids) == limit + 1 and len(row.ids) - row.start == 4  # cut on the left
    assert subject.tokenizer.decode(row.ids[row.start :]) == " end"
    assert pair_row(subject, "x", "y" * 400).start == 1


def test_the_command(place, capsys, tmp_path):
    save_base(tmp_path / "other", seed=5)
    arguments = ["eval", "lm", f"a={place}/model", f"b={tmp_path}/other", "--questions", f"{place}/asked.jsonl.xz"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    (task,) = json.loads((tmp_path / "out" / "eval.json").read_text())["tasks"]
    assert task["task"] == "asked" and task["conditions"]["a"]["acc"]["count"] == 12
    assert task["settings"]["paired"] == ["b"] and {row["metric"] for row in task["differences"]} == {"acc", "acc_norm"}
    assert "b - a" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_lm_eval_is_asked_for(place, capsys):
    assert cli.main(["eval", "lm", f"{place}/model", "--lm-eval", "piqa"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "--lm-eval piqa" in err and "megatron-dla[eval]" in err


def test_wrong_choices_may_be_equal_and_lines_are_those_of_the_file(tmp_path):
    row = {"q": "x", "support": "", "choices": ["a", "b", "b"], "gold": 0}  # as in SciQ
    path = tmp_path / "equal.jsonl"
    path.write_text(f"{json.dumps(row)}\n\n{json.dumps({**row, 'gold': 1})}\n")
    assert read_questions(str(path), limit=1).chance == pytest.approx(1 / 3)
    with pytest.raises(UserError, match=r"equal\.jsonl:3: .*gold = 1.*'b'.*twice"):
        read_questions(str(path))


BAD = {
    "no.jsonl": ([], ["no rows"]),
    "odd.jsonl": ([{"a": 1}], [":1", "choices", "target"]),
    "gold.jsonl": ([*ASKED[:2], {"q": "x", "choices": ["a", "b"], "gold": 2}], [":3", "gold = 2"]),
    "float.jsonl": ([ASKED[0], {**ASKED[1], "gold": 0.5}], [":2", "gold = 0.5"]),
    "bool.jsonl": ([{**ASKED[0], "gold": True}], [":1", "gold = True"]),
    "letters.jsonl": ([{**ASKED[0], "choices": "ab"}], [":1", "choices = 'ab'", "list"]),
    "dict.jsonl": ([{**ASKED[0], "choices": {"a": 1, "b": 2}}], [":1", "choices = {'a'", "list"]),
    "one.jsonl": ([{**ASKED[0], "choices": ["a"], "gold": 0}], [":1", "choices = ['a']", "two"]),
    "twice.jsonl": ([{**ASKED[0], "choices": ["a", "b", "a"], "gold": 2}], [":1", "gold = 2", "'a'", "twice"]),
    "blank.jsonl": ([{**ASKED[0], "choices": ["a", " "]}], [":1", "choices[1] = ' '"]),
    "null.jsonl": ([{**ASKED[0], "q": None}], [":1", "q = None", "text"]),
    "marks.jsonl": ([{"ctx": "a", "choices": ["[x]", "b"], "gold": 1}], [":1", "choices[0]", "''"]),
    "end.jsonl": ([{"sentence": "a _", "choices": ["x", "y"], "gold": 0}], [":1", "sentence = 'a _'", "_"]),
    "half.jsonl": ([ASKED[0], {**ASKED[1], "q": "ab\ud800"}], [":2", "q = ", "ud800", "character 2"]),
    "word.jsonl": ([{"context": "a", "target": "\udfff"}], [":1", "target = ", "udfff"]),
    "list.jsonl": ([[1]], [":1", "object"]),
    "name.txt": ([{"q": 1}], ["name.txt", ".jsonl"]),
    "mixed.jsonl": ([ASKED[0], {"context": "a", "target": "b"}], [":2", "choices"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, name):
    rows, words = BAD[name]
    with pytest.raises(UserError) as caught:
        read_questions(write(tmp_path / name, *rows))
    assert all(word in str(caught.value) for word in [name, *words]), caught.value
