"""Every condition of the tables against the same question asked alone, without padding, in plain calls."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.memory import MemoryControl, MemoryInputs
from megatron_dla.errors import UserError
from megatron_dla.evaluation.recall import make_task, stories
from megatron_dla.evaluation.scoring import READ_ONLY, derangement, encode_stories, score, write_contexts
from megatron_dla.evaluation.stories import Question, Story
from megatron_dla.evaluation.table import Table, join_tables
from megatron_dla.evaluation.tasks import perplexity_table, recall_table, text_windows
from megatron_dla.serving.hf_model import select_states
from tests.support.tiny_eval import build_model, build_words

SSW = DeltaMemConfig(write="message")
COUNT = 5


@pytest.fixture(scope="module")
def tokenizer():
    return build_words()


def logprob(logits, asked):
    return torch.log_softmax(logits[0, -1, asked.choices], -1)[asked.right].item()


@pytest.mark.parametrize("config", [None, SSW], ids=["TSW", "SSW"])
def test_conditions(tokenizer, config):
    """Batches of 3 against single calls; the states also against another order of calls."""
    model, static = build_model(config), build_model(DeltaMemConfig(memory="static"))
    task = make_task("facts", people=2, relations=1, messages="each", style="chatml" if config is None else "chat")
    found = recall_table(model, tokenizer, task, episodes=COUNT, seed=4, batch=3, static=static)
    told, asked = encode_stories(
        tokenizer, list(stories(task, COUNT, seed=4, split="test")), numbered=config is not None
    )
    assert list(found.values) == ["full", "full_adapter", "kept", "zeroed", "shuffled", "scale_0", "static"]
    states = []
    for row in told:
        session, cache = model.initial_states(1), DynamicCache()
        for ids, message in ((row.ids[:7], row.messages[:7]), (row.ids[7:], row.messages[7:])):
            message = torch.tensor([message]) if config else None
            flags = MemoryInputs(message=message)
            session = model(
                torch.tensor([ids]), states=session, inputs=flags, past_key_values=cache, use_cache=True
            ).states
        states.append(model.finish(session))
    moved = derangement(COUNT, 4)
    wanted = {name: np.zeros((COUNT, 2)) for name in found.values}
    for number, question in enumerate(asked):
        story, place = question.story, (question.story, number % 2)
        prompt, full = torch.tensor([question.prompt]), torch.tensor([question.full.ids])
        message = torch.tensor([question.full.messages]) if config else None
        with torch.no_grad():
            silent = MemoryInputs(write=torch.zeros_like(prompt, dtype=torch.bool),
                                  message=torch.full_like(prompt, -1))  # fmt: skip
            outputs = {
                "full": model.base(full),
                "full_adapter": model(full, inputs=MemoryInputs(message=message)),
                "kept": model(prompt, states=states[story], inputs=silent),
                "zeroed": model(prompt, inputs=silent),
                "shuffled": model(prompt, states=states[moved[story]], inputs=silent),
                "scale_0": model.base(prompt),
                "static": static(prompt),
            }
        for name, out in outputs.items():
            wanted[name][place] = logprob(out.logits, question)
    for name, values in wanted.items():
        np.testing.assert_allclose(found.values[name]["logprob"], values.mean(1), rtol=1e-9, err_msg=name)
    distinct = ("full", "full_adapter", "kept", "shuffled", "scale_0", "static")
    assert len({found.values[name]["logprob"].round(9).tobytes() for name in distinct}) == len(distinct)
    same = found.values["zeroed"]["logprob"] - found.values["scale_0"]["logprob"]
    assert np.abs(same).max() < 1e-12  # reads of a zero state are zero
    beta = [row["mean_beta"] for row in found.layers]
    assert [row["layer"] for row in found.layers] == [0, 1, 2] and all(0 < b < 1 for b in beta)
    np.testing.assert_allclose([row["half_life"] for row in found.layers], -np.log(2) / np.log1p(-np.array(beta)))
    assert all(0 < row["output_ratio"] < 100 for row in found.layers)


def test_choice_and_exact_count_what_they_say(tokenizer):
    model = build_model()
    told, asked = encode_stories(tokenizer, list(stories(make_task("facts"), 30, seed=0)), numbered=False)
    states = write_contexts(model, told, 7)
    found = score(model, asked, 7, states=states, control=READ_ONLY)
    for i, question in enumerate(asked):
        mine = select_states(states, [question.story])
        with torch.no_grad():
            logits = model(torch.tensor([question.prompt]), states=mine, control=READ_ONLY).logits[0, -1]
        right = question.choices[question.right]
        assert found["choice"][i] == (max(question.choices, key=lambda c: logits[c]) == right)
        assert found["exact"][i] == (int(logits.argmax()) == right)
    assert 0 < found["choice"].mean() < 0.5


def test_answers_are_scored_at_the_word(tokenizer):
    story = Story(("Anna lives in Paris.",), (Question("Where?", "Rome", ("Paris", "Rome"), "Anna lives in", "."),))
    _, (asked,) = encode_stories(tokenizer, [story], numbered=True)
    assert tokenizer.decode(asked.prompt).endswith("assistant \n Anna lives in")
    assert [tokenizer.decode([c]) for c in asked.choices] == ["Paris", "Rome"] and asked.right == 1
    assert len(asked.full.ids) == len(asked.full.messages) and asked.full.messages[-1] == -1
    again = Story(("x",), (Question("Where?", "a b", ("a b", "a b"), "", ""),))
    with pytest.raises(UserError, match=r"Where\?"):
        encode_stories(tokenizer, [again], numbered=False)


def test_derangement():
    for count in (2, 3, 10):
        for seed in range(20):
            order = derangement(count, seed)
            assert sorted(order) == list(range(count)) and (order != np.arange(count)).all()


def test_perplexity(tokenizer):
    model = build_model()
    windows = text_windows(tokenizer, ["red tea of the and in " * 9, "cold"], 12, 3, 0)
    assert len(windows) == 3 and all(len(row) == 12 for row in windows)
    table = perplexity_table(model, windows, batch=2)
    for i, row in enumerate(windows):
        ids = torch.tensor([row])
        with torch.no_grad():
            base = model.base(ids, labels=ids).loss.item()
            mine = model(ids, control=MemoryControl()).logits
        adapter = torch.nn.functional.cross_entropy(mine[0, :-1], ids[0, 1:]).item()
        assert table.values["base"]["nats"][i] == pytest.approx(base, rel=1e-6)
        assert table.values["adapter"]["nats"][i] == pytest.approx(adapter, rel=1e-6)
    assert table.pairs == [("adapter", "base")]
    assert table.settings["perplexity"]["base"] == pytest.approx(np.exp(table.values["base"]["nats"].mean()))
    with pytest.raises(UserError, match=r"--text .* 99 "):
        text_windows(tokenizer, ["red tea"], 99, 1, 0)
    with pytest.raises(UserError, match="--tasks ppl"):
        perplexity_table(build_model(SSW), windows)


def table(shift: float) -> Table:
    values = {"kept": {"m": np.array([1.0, 2, 3]) + shift}, "zeroed": {"m": np.array([0.0, 1, 2])}}
    return Table("t", "episodes", ("m",), values, [("kept", "zeroed")], {}, layers=[{"layer": 0}])


def test_joined_tables_are_grouped_by_adapter():
    joined = join_tables([table(0), table(1), table(5)])
    found = joined.difference("kept", "zeroed", "m")
    assert (found.mean, found.groups, found.count) == (3.0, 3, 9) and (found.low, found.high) == (1.0, 6.0)
    assert table(1).difference("kept", "zeroed", "m").low == 2.0  # paired: no spread at all
    assert joined.settings == {"adapters": 3} and [row["adapter"] for row in joined.layers] == [0, 1, 2]
    text = joined.text()
    assert "t: 9 episodes in 3 groups" in text and "kept - zeroed  3.000 [1.000, 6.000]" in text
