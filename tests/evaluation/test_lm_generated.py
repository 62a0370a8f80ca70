"""RULER's tasks, key-value retrieval and MQAR: lengths, seeds, a solver that reads the prompt, one that does not."""

import json
import re
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch

from megatron_dla import cli
from megatron_dla.errors import DataError, UserError
from megatron_dla.evaluation.lm import generated
from megatron_dla.evaluation.lm.answering import Documents
from megatron_dla.evaluation.lm.counting import frequent_words
from megatron_dla.evaluation.lm.generated import Generated, Place, found_in
from megatron_dla.evaluation.lm.material import ADJECTIVES, NOUNS, Haystack
from megatron_dla.evaluation.lm.models import Subject
from megatron_dla.evaluation.lm.retrieval import Recall, key_value_task, recall_row, word_tokens
from megatron_dla.evaluation.lm.ruler import RULER, ruler_tasks
from megatron_dla.evaluation.lm.scoring import continue_prompts
from tests.support.tiny_hf import build_base

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
COUNT = 3


def book(sentences=800):
    rng = Random(0)
    words = ["".join(rng.choices(SYLLABLES, k=rng.choice((2, 3)))) for _ in range(2500)]
    return " ".join(" ".join(rng.choices(words, k=rng.randint(5, 15))).capitalize() + "." for _ in range(sentences))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A haystack, questions in SQuAD's form and in HotpotQA's."""
    root = tmp_path_factory.mktemp("material")
    (root / "book.txt").write_text(book())
    colours = {name: Random(name).choice(["crimson", "teal", "ochre", "violet"]) for name in NOUNS[:60]}

    def told(name):
        return f"The {name} of the mayor, which people talk about a good deal, is {colours[name]}."

    paragraphs = [
        {"context": told(n), "qas": [
            {"question": f"What colour is the {n}?", "answers": [{"text": colours[n]}, {"text": colours[n]}]},
            {"question": "Why?", "answers": [], "is_impossible": True},
        ]} for n in colours
    ]  # fmt: skip
    (root / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    hotpot = [
        {"question": f"What colour is the {n}?", "answer": colours[n],
         "context": [[n, [told(n), " It is old."]], ["Else", ["Nothing is known.", f" Not even of {n}."]]]}
        for n in colours
    ]  # fmt: skip
    (root / "hotpot.json").write_text(json.dumps(hotpot))
    return root


@pytest.fixture(scope="module")
def subject(files):
    """A trained byte-level BPE of 1,500 tokens with a random model of that many."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([book(200), " ".join(ADJECTIVES + NOUNS) * 3], trainer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=1500, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=0, pad_token_id=0, bos_token_id=None,
    ))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    return Subject("tiny", "tiny", model.eval(), tokenizer)


def make(files, name, lengths=(1024,), count=COUNT, seed=0) -> Generated:
    if name == "key_value":
        return key_value_task(lengths=lengths, count=count, seed=seed)
    haystack = Haystack([(files / "book.txt").read_text()])
    documents = [str(files / "squad.json"), str(files / "hotpot.json")]
    return ruler_tasks([name], lengths=lengths, count=count, seed=seed, haystack=lambda: haystack, documents=documents)[
        0
    ]


def solve(prompt: str) -> str:
    """The answer to a prompt of any of the tasks, from its text alone."""
    question = prompt[prompt.rindex("Question: ") :]
    if found := re.search(r"Which secret (\w+) of (.+) does the text give", question):
        keys = re.split(", | and ", found[2])
        return " ".join(v for key in keys for v in re.findall(rf"One of the secret \w+ of {key} is (\S+)\.", prompt))
    if found := re.search(r"Which variables have the value (\d+)", question):
        value = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", prompt):
            value[name] = value.get(source, source)
        return ", ".join(name for name in value if value[name] == found[1])
    listed = prompt[: prompt.rindex("\nQuestion: ")].rsplit("\n", 1)[1]
    if "in the list" in question:
        return " ".join(word for word, _ in Counter(re.findall(r"\d+\. (\w+)", listed)).most_common(10))
    if "coded words" in question:
        return " ".join(word for word, _ in Counter(re.findall(r"\b[a-z]{6}\b", listed)).most_common(3))
    if found := re.search(r"What colour is the (\w+)", question):
        return re.search(rf"The {found[1]} of the mayor.+ a good deal, is (\w+)\.", prompt)[1]
    key = re.search(r'value of the key "(.+)"\?', question)[1]
    return json.loads(prompt[prompt.index("{") : prompt.rindex("}") + 1])[key]


@pytest.mark.parametrize("name", [*RULER, "key_value"])
def test_solvers_and_lengths(files, subject, monkeypatch, name):
    """Reading the prompt gives 100 %; answering another prompt of the task gives chance. Prompts fill their length."""
    lengths = (1024, 4096)
    task = make(files, name, lengths, count=4)
    items = task.items(subject)
    assert [item.about["length"] for item in items] == [1024] * 4 + [4096] * 4
    for item in items:
        assert 0.85 * item.about["length"] <= item.tokens <= item.about["length"], (item.about, item.tokens)
    prompts = [item.payload[0].prompt for item in items]
    assert len(set(prompts)) == len(prompts)
    answers = {tuple(subject.encode(prompt)): solve(prompt) for prompt in prompts}
    monkeypatch.setattr(generated, "continue_prompts", lambda subject, ids, new: [answers[tuple(row)] for row in ids])
    assert [value["accuracy"] for value in task.measure(subject, items)] == [1.0] * 8
    moved = dict(zip(answers, [*list(answers.values())[1:], next(iter(answers.values()))], strict=True))
    monkeypatch.setattr(generated, "continue_prompts", lambda subject, ids, new: [moved[tuple(row)] for row in ids])
    blind = np.mean([value["accuracy"] for value in task.measure(subject, items)])
    chance = 0.25 if name.startswith("qa") else 0.0  # the test's documents know four colours
    assert blind <= chance + 0.3 * (chance > 0) and task.chance == 0


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_3", "qa_1", "key_value"])
def test_depth_is_where_the_answer_is(files, subject, name):
    task = make(files, name, count=12)
    for item in task.items(subject):
        sample = item.payload[0]
        if not name.startswith("qa"):
            found = sample.prompt.index(sample.answers[0]) / len(sample.prompt)
            assert abs(found - sample.depth) < 0.25, (found, sample.depth)
    depths = sorted(item.about["depth"] for item in task.items(subject))
    assert depths[0] < 0.2 and depths[-1] > 0.8


def test_the_seed_decides(files, subject):
    def prompts(**kwargs):
        return [item.payload[0].prompt for item in make(files, "niah_multivalue", **kwargs).items(subject)]

    assert prompts() == prompts() != prompts(seed=1)
    assert prompts(count=2) == prompts()[:2]


def test_shapes(files, subject):
    """How many answers, and how many needles that look like them."""
    answers = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}
    needles = {"niah_single_1": 1, "niah_single_3": 1, "niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    for name in RULER:
        for item in make(files, name, (2048,)).items(subject):
            sample = item.payload[0]
            assert sample.either == name.startswith("qa") and len(sample.answers) == answers.get(name, 1)
            if name in needles:
                assert sample.prompt.count("One of the secret") == needles[name]
            if name.startswith("niah_multikey") and name[-1] in "23":
                assert sample.prompt.count("One of the secret") > 10
            form = (
                r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
                if name in ("niah_single_3", "niah_multikey_3")
                else r"\d{7}"
            )
            if name.startswith("niah"):
                assert all(re.fullmatch(form, answer) for answer in sample.answers)


def test_frequent_words_have_no_ties():
    for size in range(60, 100):
        sample = frequent_words(Place(Random(size), 0, 1024), size)
        words = Counter(re.findall(r"\b[a-z]{6}\b", sample.prompt.split("\n")[1])).most_common(4)
        assert [word for word, _ in words[:3]] == list(sample.answers) and words[2][1] > words[3][1], size


def test_what_counts_as_an_answer():
    sample = generated.Sample("", ("Ab", "cd"))
    assert [found_in(text, sample) for text in ("x ab. CD", "cd", "a b")] == [1.0, 0.5, 0.0]
    either = generated.Sample("", ("Ab", "cd"), either=True)
    assert [found_in(text, either) for text in ("ab", "cd ab", "a b")] == [1.0, 1.0, 0.0]


def test_continuations_are_as_alone(subject):
    prompts = [subject.encode(text) for text in ("Bada zuvo", "Kilo", "Bada zuvo mira. Tado")]
    together = continue_prompts(subject, prompts, [5, 9, 7])
    for prompt, count, text in zip(prompts, (5, 9, 7), together, strict=True):
        out = subject.model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
        assert subject.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True) == text


def test_recall(subject):
    """Accuracy and choice of each row from single calls; the row's shape."""
    task = Recall(pairs=4, lengths=(16, 64), count=3, seed=0, budget=100)
    items = task.items(subject)
    found = task.measure(subject, items)
    for item, values in zip(items, found, strict=True):
        ids, among = item.payload[0].ids, item.payload[1]
        told = dict(zip(ids[:8:2], ids[1:8:2], strict=True))
        assert len(ids) == item.about["length"] and sorted(told.values()) == sorted(among) and len(told) == 4
        with torch.no_grad():
            logits = subject.model(torch.tensor([ids])).logits[0]
        exact, choice = [], []
        for at in range(len(ids) - 8, len(ids), 2):
            assert told[ids[at]] == ids[at + 1]
            exact.append(int(logits[at].argmax()) == ids[at + 1])
            choice.append(max(among, key=lambda token, at=at: logits[at, token]) == ids[at + 1])
        assert values == {"accuracy": np.mean(exact), "choice": np.mean(choice)}
    words = word_tokens(subject)
    assert all(subject.tokenizer.convert_ids_to_tokens(token).startswith("Ġ") for token in words)


def test_recall_of_a_model_that_guesses(subject):
    """Among the values of the row, a guess is right once in `pairs`."""
    rng, hits, words = Random(1), [], word_tokens(subject)
    for index in range(300):
        row, values = recall_row(Random(index), words, 8, 40)
        hits += [rng.choice(values) == right for right in row.ids[row.start + 1 :: 2]]
    assert abs(np.mean(hits) - 1 / 8) < 0.03


def test_bad_material_is_named(files, subject, tmp_path):
    with pytest.raises(UserError, match="--lengths 64: vt needs at least"):
        make(files, "vt", (64,)).items(subject)
    short = Haystack([book(30)])
    (task,) = ruler_tasks(["cwe"], lengths=(16384,), count=1, seed=0, haystack=lambda: short)
    with pytest.raises(UserError, match="--lengths 16384: cwe has material"):
        task.items(subject)
    with pytest.raises(UserError, match="--lengths 8: mqar with --pairs 4"):
        Recall(pairs=4, lengths=(8,), count=1, seed=0)
    with pytest.raises(UserError, match="--haystack"):
        Haystack(["One. Two."])
    (tmp_path / "bad.json").write_text('{"data": [{"paragraphs": [{"qas": []}]}]}')
    (tmp_path / "none.json").write_text('{"data": []}')
    for name in ("bad", "none"):
        with pytest.raises(DataError, match=rf"{name}\.json"):
            Documents(str(tmp_path / f"{name}.json"))
    half = '{"context": "a b", "question": "\\ud800", "answers": ["b"]}\n'
    (tmp_path / "half.jsonl").write_text(half)
    with pytest.raises(DataError, match=r"half\.jsonl.*surrogates"):
        Documents(str(tmp_path / "half.jsonl"))
    (tmp_path / "rows.jsonl").write_text('{"context": "a b", "question": "q", "answers": {"text": ["b"]}}\n')
    assert Documents(str(tmp_path / "rows.jsonl")).asked[0].answers == ("b",)


def test_the_command(files, subject, tmp_path, capsys):
    build_base().save_pretrained(tmp_path / "model")
    model = tmp_path / "model"
    subject.model.save_pretrained(model)
    subject.tokenizer.save_pretrained(model)
    arguments = ["eval", "lm", f"a={model}", f"b={model}", "--tasks", "niah_single_2,vt,mqar,key_value"]
    arguments += ["--lengths", "1024", "2K", "--items", "2", "--haystack", str(files / "book.txt"), "--pairs", "4"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    found = {task["task"]: task for task in json.loads((tmp_path / "out" / "eval.json").read_text())["tasks"]}
    assert list(found) == ["niah_single_2", "vt", "mqar", "key_value"]
    assert [row["length"] for row in found["vt"]["by_length"]["a"]] == [1024, 2048] and "by_depth" not in found["vt"]
    assert found["key_value"]["by_depth"]["b"] and found["mqar"]["settings"]["pairs"] == 4
    assert all(row["mean"] == 0 for row in found["vt"]["differences"])  # the same model
    printed = capsys.readouterr().out
    assert re.search(r"^a +1,024 +2,048$", printed, re.M) and re.search(r"^vt +\S+ +\S+$", printed, re.M)
    assert (tmp_path / "out" / "eval.png").read_bytes()[:4] == b"\x89PNG"


BAD = {
    ("--tasks", "maze"): ["--tasks maze", "'maze'", "ruler"],
    ("--tasks", ","): ["--tasks ,", "nothing", "ruler"],
    ("--tasks", "niah_single_2"): ["--tasks niah_single_2", "--haystack"],
    ("--tasks", "qa_2", "--qa", "one.json"): ["--tasks qa_2", "--qa"],
    ("--tasks", "vt", "--lengths", "1k", "many"): ["--lengths many"],
    ("--tasks", "vt", "--items", "0"): ["--items 0"],
    ("--tasks", "vt", "--items", str(2**70)): [f"--items {2**70}", "2^31"],
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_arguments_are_named(tmp_path, capsys, arguments):
    assert cli.main(["eval", "lm", str(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and all(word in err for word in BAD[arguments]), err
