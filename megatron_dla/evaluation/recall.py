"""Synthetic recall: the model reads facts, the context is removed, and it answers questions about them.

`profile` is for a small model pretrained on such text: one word of each of four categories among filler words;
"? colour" asks for the colour. `facts` has sentences ("Anna's favourite colour is red.") about one or several people,
queried by completion or in a chat; training and test splits use different names. `labels` and `most`: abilities.py.
Everything is generated from seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dla.errors import UserError
from megatron_dla.evaluation.abilities import LabelsTask, MostTask
from megatron_dla.evaluation.stories import (
    PEOPLE,
    RELATIONS,
    SPLITS,
    SYSTEM,
    CompletionTask,
    Question,
    Story,
    filler,
    topic_blocks,
)
from megatron_dla.serving.chat import user_turn

CATEGORIES = {
    "colour": "red blue green pink gold grey brown black white purple orange yellow navy teal cyan lime",
    "animal": "cat dog cow pig hen fox owl bat rat ant bee elk emu yak ram cod",
    "city": "rome paris oslo lima cairo tokyo delhi quito bonn bern kyiv riga baku doha nice lyon",
    "food": "rice soup cake bread pasta salad stew pie jam egg ham corn bean nut fig plum",
}
FILLERS = ["of", "the", "and", "to", "in", "it", "was", "for", "on", "at"]


def _more_categories(count: int, words: int = 16) -> dict[str, str]:
    """Categories of made-up words of two syllables, all different."""
    known = " ".join(CATEGORIES.values()).split()
    syllables = [first + second for first in "bdfgklmnprstvwz" for second in "aeiou"]
    made = (a + b for a in syllables for b in syllables if a + b not in known)
    return {next(made): " ".join(next(made) for _ in range(words)) for _ in range(count)}


ALL_CATEGORIES = CATEGORIES | _more_categories(28)


@dataclass(frozen=True)
class ProfileTask:
    """A sequence of filler words with one word of each category at random positions; one question a category."""

    words: int = 32
    """Length of the context, facts included."""
    facts: int = len(CATEGORIES)
    """Number of categories; all but the first four are of made-up words."""
    kind = "profile"

    def __post_init__(self) -> None:
        if not 1 <= self.facts <= len(ALL_CATEGORIES):
            raise UserError(f"facts = {self.facts}: must be 1 to {len(ALL_CATEGORIES)}, the categories that there are")
        if self.words < self.facts:
            raise UserError(f"words = {self.words}: must be at least facts = {self.facts}, one a category")

    @property
    def categories(self) -> dict[str, str]:
        """Name -> its words."""
        return dict(list(ALL_CATEGORIES.items())[: self.facts])

    def story(self, rng: np.random.Generator, split: str) -> Story:
        told = [str(word) for word in rng.choice(FILLERS, self.words)]
        questions = []
        places = rng.choice(self.words, self.facts, replace=False)
        for place, (category, words) in zip(places, self.categories.items(), strict=True):
            choices = tuple(words.split())
            told[place] = choices[rng.integers(len(choices))]
            questions.append(Question(f" ? {category}", told[place], choices))
        order = rng.permutation(len(questions))
        return Story((" ".join(told),), tuple(questions[i] for i in order), plain=True)

    def document(self, rng: np.random.Generator, bare: bool) -> str:
        """Text to pretrain the small model on: a story with answered questions. `bare`: questions without the context,
        which train the model to give every word of a category the same probability there."""
        story = self.story(rng, "train")
        asked = "".join(q.text + q.answer for q in story.questions)
        return asked if bare else story.context[0] + asked


@dataclass(frozen=True)
class FactsTask(CompletionTask):
    """Sentences about people in random order, in one message or one message each; one question a fact.

    Accurate retrieval is `filler`, conflict resolution `updates`, an abrupt change of the topic `shifts`.
    """

    people: int = 2
    relations: int = 2
    """Facts a person: the first n of colour, pet, city, job."""
    filler: int = 0
    """Other sentences, anywhere between the facts."""
    updates: int = 0
    """Times that each fact is told anew, with another word; the last one holds."""
    shifts: int = 0
    """Texts of four sentences that follow the facts, each on another topic than the one before."""
    messages: str = "one"
    """one: all facts in one user message. each: one message a fact (for writes by message)."""
    kind = "facts"
    styles = ("chat", "text", "turn", "chatml")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.between("people", 1, min(len(names.split()) for names in PEOPLE.values()))
        self.between("relations", 1, len(RELATIONS))
        for name in ("filler", "updates", "shifts"):
            self.between(name, 0, 10_000)
        self.one_of("messages", ("one", "each"))

    def story(self, rng: np.random.Generator, split: str) -> Story:
        names = PEOPLE["test" if split == "test" else "train"].split()
        people = rng.choice(names, self.people, replace=False)
        kinds = list(RELATIONS)[: self.relations]
        told, questions = [], []
        for i in rng.permutation(self.people * self.relations):
            person, kind = str(people[i // self.relations]), kinds[i % self.relations]
            statement, question, words = RELATIONS[kind]
            choices = tuple(words.split())
            word, lead = choices[rng.integers(len(choices))], statement.format(person)
            told.append(f"{lead} {word}.")
            if self.style == "chat":
                questions.append(Question(question.format(person), word, choices, lead, "."))
            else:
                questions.append(Question(f" {lead}", word, choices, "", "."))
        asked = tuple(questions[i] for i in rng.permutation(len(questions)))
        told = self._around(rng, told, questions)
        said = [" ".join(told)] if self.messages == "one" else told
        if self.style == "chat":
            return Story(tuple(said), asked, SYSTEM)
        return self.completions(said, asked)

    def _around(self, rng: np.random.Generator, told: list[str], questions: list[Question]) -> list[str]:
        """The facts with what was true before, other sentences between them, and other topics after them."""
        for _ in range(self.updates):
            before = []
            for fact, question in zip(told[-len(questions) :], questions, strict=True):
                other = str(rng.choice([word for word in question.choices if f" {word}." not in fact]))
                before.append(f"{fact.rsplit(' ', 1)[0]} {other}.")
            told = [before[i] for i in rng.permutation(len(before))] + told
        for sentence in filler(rng, self.filler):
            told.insert(rng.integers(len(told) + 1), sentence)
        return told + topic_blocks(rng, self.shifts)


TASKS: dict[str, Any] = {kind.kind: kind for kind in (ProfileTask, FactsTask, LabelsTask, MostTask)}
RecallTask = ProfileTask | FactsTask | LabelsTask | MostTask


def make_task(name: str, **settings: Any) -> RecallTask:
    """A task by name. Raises UserError naming an unknown task or setting, or a bad value."""
    if name not in TASKS:
        raise UserError(f"unknown recall task {name!r}: use one of {', '.join(TASKS)}")
    known = TASKS[name].__dataclass_fields__
    if unknown := sorted(set(settings) - set(known)):
        raise UserError(f"recall task {name!r} has no setting {unknown[0]!r}: use one of {', '.join(known)}")
    for key, value in settings.items():
        if isinstance(known[key].default, int) and not isinstance(value, int):
            raise UserError(f"{key} = {value!r}: must be an integer")
    return TASKS[name](**settings)


def for_tokenizer(task: RecallTask, tokenizer: Any) -> RecallTask:
    """The task with the turns of the tokenizer's chat template, where its style is `turn` and there is a template.

    Raises:
        UserError: see `user_turn`.
    """
    if isinstance(task, ProfileTask) or task.style != "turn" or not getattr(tokenizer, "chat_template", None):
        return task
    user, assistant = user_turn(tokenizer)
    return replace(task, user=user, assistant=assistant)


def stories(task: RecallTask, count: int, *, seed: int, split: str = "train") -> Iterator[Story]:
    """Stories of a seed and a split, reproducible; different seeds and splits give independent stories."""
    for number in range(count):
        yield task.story(np.random.default_rng([seed, SPLITS.index(split), number]), split)


def write_stories(path: Path, task: RecallTask, count: int, *, seed: int, split: str = "train") -> None:
    """Write training episodes as JSONL for `read_episodes`."""
    with path.open("w") as file:
        for story in stories(task, count, seed=seed, split=split):
            file.write(json.dumps(story.record()) + "\n")


def write_documents(path: Path, task: ProfileTask, count: int, *, seed: int, bare: float = 0.2) -> None:
    """Text to pretrain the small model on: JSONL {"text"}, a fraction `bare` of it without context."""
    with path.open("w") as file:
        for number in range(count):
            rng = np.random.default_rng([seed, len(SPLITS), number])
            file.write(json.dumps({"text": task.document(rng, bool(rng.random() < bare))}) + "\n")
