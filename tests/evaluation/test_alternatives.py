"""What is left of a text by other means than a memory."""

import importlib.util

import pytest

from megatron_dla.errors import UserError
from megatron_dla.evaluation.alternatives import (
    Alternative,
    last_tokens,
    nearest,
    parse_alternatives,
    retell,
    sentences,
)
from megatron_dla.evaluation.recall import make_task, stories
from tests.support.tiny_eval import build_words

TASKS = [
    make_task("facts", style=style, messages=messages, people=3, filler=9)
    for style in ("turn", "text", "chat")
    for messages in ("one", "each")
] + [make_task("profile")]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_a_story_is_told_again_as_it_was(task):
    for story in stories(task, 10, seed=0):
        assert story.retold(story.texts()) == story
        assert " ".join(sentences(story)) == " ".join(story.texts())


@pytest.mark.parametrize("task", TASKS, ids=str)
@pytest.mark.parametrize("count", [1, 7, 20, 1000])
def test_a_window_is_the_end_of_the_text(task, count):
    tokenizer = build_words()
    for story in stories(task, 5, seed=1):
        (text,), whole = last_tokens(tokenizer, story, count), " ".join(story.texts())
        words, used = whole.split(" "), len(tokenizer.encode(text, add_special_tokens=False))
        assert whole.endswith(text) and used <= count
        if text != whole:
            left = words[-len(text.split(" ")) - 1 :] if text else words[-1:]
            assert len(tokenizer.encode(" ".join(left), add_special_tokens=False)) > count


def test_the_nearest_sentences_have_the_answer():
    for story in stories(make_task("facts", people=4, relations=3, filler=30), 20, seed=2, split="test"):
        for question in story.questions:
            found = nearest(story, question, 3)
            told = sentences(story)
            assert f"{question.text.strip()} {question.word}." in found and len(found) == 3
            assert [told.index(sentence) for sentence in found] == sorted(told.index(s) for s in found)
            assert nearest(story, question, 99) == told
    (story,) = stories(make_task("facts", updates=3, people=1, relations=1), 1, seed=0)
    assert nearest(story, story.questions[0], 1) == sentences(story)[-1:]  # of equals the newest


def test_each_question_has_its_own_context():
    made = list(stories(make_task("facts", people=2, filler=8), 3, seed=3))
    asked: list = []

    def summarise(texts, tokens):
        asked.append((list(texts), tokens))
        return [f"summary {i}" for i in range(len(texts))]

    for kind in ("window", "bm25", "summary"):
        left = retell(Alternative(kind, 9), build_words(), made, summarise)
        for number, (story, few) in enumerate(zip(made, left, strict=True)):
            assert [one.questions for one in few] == [(question,) for question in story.questions]
            assert all((one.opening, one.turn, one.plain) == (story.opening, story.turn, story.plain) for one in few)
            if kind == "summary":
                assert {one.context for one in few} == {(f"<|im_start|>user\nsummary {number}<|im_end|>\n",)}
    assert asked == [([" ".join(story.texts()) for story in made], 9)]


def test_what_is_not_installed_is_named(monkeypatch):
    assert parse_alternatives(["bm25=2", "window=64"]) == [Alternative("bm25", 2), Alternative("window", 64)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--beside bm25=2 needs bm25s.*pip install"):
        parse_alternatives(["bm25=2"])
    with pytest.raises(UserError, match=r"--beside lora=2 needs peft.*pip install"):
        parse_alternatives(["lora=2"])
    assert parse_alternatives(["window=64"])
