"""Recall with the context removed: facts are told, the context is dropped, questions are asked. Generated, by seeds.

`profile`: words for a small model that is pretrained on such texts: one word of each of four categories among filler
words; "? colour" asks for the colour. `facts`: sentences, "Anna's favourite colour is red.", with several people if the
memory shall tell them apart, asked for by their beginning or in a chat; the people of the test split are not those of
training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dla.errors import UserError

SPLITS = ("train", "validation", "test")
CATEGORIES = {
    "colour": "red blue green pink gold grey brown black white purple orange yellow navy teal cyan lime",
    "animal": "cat dog cow pig hen fox owl bat rat ant bee elk emu yak ram cod",
    "city": "rome paris oslo lima cairo tokyo delhi quito bonn bern kyiv riga baku doha nice lyon",
    "food": "rice soup cake bread pasta salad stew pie jam egg ham corn bean nut fig plum",
}
FILLERS = ["of", "the", "and", "to", "in", "it", "was", "for", "on", "at"]
RELATIONS = {  # relation: statement up to its last word, question, words
    "colour": (
        "{}'s favourite colour is",
        "What is {}'s favourite colour?",
        "red blue green pink gold black white purple orange yellow brown silver",
    ),
    "pet": ("{}'s pet is a", "What is {}'s pet?", "cat dog horse fish rabbit mouse bird snake turtle pig duck goat"),
    "city": (
        "{} lives in",
        "Where does {} live?",
        "Paris London Rome Berlin Tokyo Madrid Boston Chicago Moscow Cairo Sydney Dublin",
    ),
    "job": (
        "{} works as a",
        "What does {} work as?",
        "teacher doctor lawyer nurse farmer writer painter driver mechanic dancer baker singer",
    ),
}
PEOPLE = {
    "train": "Anna Ben Carl Diana Emma Frank Grace Henry Irene Jack Kate Leo Maria Nick Olga Peter Rosa Sam Tina",
    "test": "Alice Bob Clara David Eve Fred Gina Hugo Ivan Julia Kevin Laura Mark Nora Oscar Paula",
}
SYSTEM = "Answer the question."


@dataclass(frozen=True)
class Question:
    """One question; the word that answers it, the words it is chosen from (that one among them), and the beginning and
    end of the answer around it."""

    text: str
    word: str
    choices: tuple[str, ...]
    lead: str = ""
    end: str = ""

    @property
    def answer(self) -> str:
        return f"{self.lead} {self.word}{self.end}"


@dataclass(frozen=True)
class Story:
    """What is told, each text one message, and what is asked about it.

    Attributes:
        system: a message before what is told and what is asked, or none. plain: the texts are joined as they stand,
            also for a tokenizer that has a chat template. opening: plain text before the first question.
    """

    context: tuple[str, ...]
    questions: tuple[Question, ...]
    system: str = ""
    plain: bool = False
    opening: str = ""

    def ask(self, question: Question, first: bool = True) -> str:
        """Text of a question, as the first of its read segment or a later one."""
        return self.opening + question.text.lstrip() if first and self.opening else question.text

    def record(self) -> dict[str, Any]:
        """As a line that tasks.adapter.episodes reads."""
        pairs = [{"question": self.ask(q, i == 0), "answer": q.answer} for i, q in enumerate(self.questions)]
        out: dict[str, Any] = {"context": list(self.context), "questions": pairs}
        out |= {"system": self.system} if self.system else {}
        return out | ({"plain": True} if self.plain else {})


@dataclass(frozen=True)
class ProfileTask:
    """A row of filler words with one word of each category at random places; one question a category."""

    words: int = 32
    """Told, facts included."""
    kind = "profile"

    def __post_init__(self) -> None:
        if self.words < len(CATEGORIES):
            raise UserError(f"words = {self.words}: want at least {len(CATEGORIES)}, one a category")

    def story(self, rng: np.random.Generator, split: str) -> Story:
        told = [str(word) for word in rng.choice(FILLERS, self.words)]
        questions = []
        places = rng.choice(self.words, len(CATEGORIES), replace=False)
        for place, (category, words) in zip(places, CATEGORIES.items(), strict=True):
            choices = tuple(words.split())
            told[place] = choices[rng.integers(len(choices))]
            questions.append(Question(f" ? {category}", told[place], choices))
        order = rng.permutation(len(questions))
        return Story((" ".join(told),), tuple(questions[i] for i in order), plain=True)

    def document(self, rng: np.random.Generator, bare: bool) -> str:
        """Text to pretrain the small model on: a story with its questions answered in context; `bare`: only the
        questions, as they stand in a read segment, so that without a context every word of a category is as likely."""
        story = self.story(rng, "train")
        asked = "".join(q.text + q.answer for q in story.questions)
        return asked if bare else story.context[0] + asked


@dataclass(frozen=True)
class FactsTask:
    """Sentences about people, in random order, in one message or each in its own; every fact is asked for."""

    people: int = 2
    relations: int = 2
    """Facts about each person: the first so many of colour, pet, city, job."""
    messages: str = "one"
    """one: all facts in one user message. each: one message a fact (for writes by message)."""
    style: str = "chatml"
    """chat: "What is Anna's pet?" is asked, in the chat template. text: "Anna's pet is a" is to be continued. chatml:
    the same by the assistant of a ChatML model (SmolLM2, Qwen) that a user has told: few tokens, and small models can
    do it with the context."""
    kind = "facts"

    def __post_init__(self) -> None:
        most = min(len(names.split()) for names in PEOPLE.values())
        for name, value, limit in (("people", self.people, most), ("relations", self.relations, len(RELATIONS))):
            if not 1 <= value <= limit:
                raise UserError(f"{name} = {value}: want 1 to {limit}")
        for name, known in (("messages", ("one", "each")), ("style", ("chat", "text", "chatml"))):
            chosen = getattr(self, name)
            if chosen not in known:
                raise UserError(f"{name} = {chosen!r}: use one of {', '.join(known)}")

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
        said = [" ".join(told)] if self.messages == "one" else told
        if self.style == "chat":
            return Story(tuple(said), asked, SYSTEM)
        if self.style == "text":
            return Story((said[0], *(f" {text}" for text in said[1:])), asked, plain=True)
        context = tuple(f"<|im_start|>user\n{text}<|im_end|>\n" for text in said)
        return Story(context, asked, plain=True, opening="<|im_start|>assistant\n")


TASKS: dict[str, Any] = {"profile": ProfileTask, "facts": FactsTask}
RecallTask = ProfileTask | FactsTask


def make_task(name: str, **settings: Any) -> RecallTask:
    """A task by name. Raises UserError naming an unknown task or setting, or a bad value."""
    if name not in TASKS:
        raise UserError(f"unknown recall task {name!r}: use one of {', '.join(TASKS)}")
    known = TASKS[name].__dataclass_fields__
    if unknown := sorted(set(settings) - set(known)):
        raise UserError(f"recall task {name!r} has no {unknown[0]!r}: it has {', '.join(known)}")
    for key, value in settings.items():
        if isinstance(known[key].default, int) and not isinstance(value, int):
            raise UserError(f"{key} = {value!r}: want a whole number")
    return TASKS[name](**settings)


def stories(task: RecallTask, count: int, *, seed: int, split: str = "train") -> Iterator[Story]:
    """Stories of a seed and a split: the same each time, none shared between seeds or splits but by chance."""
    for number in range(count):
        yield task.story(np.random.default_rng([seed, SPLITS.index(split), number]), split)


def write_stories(path: Path, task: RecallTask, count: int, *, seed: int, split: str = "train") -> None:
    """Episodes of an adapter's training: JSONL for `read_episodes`."""
    with path.open("w") as file:
        for story in stories(task, count, seed=seed, split=split):
            file.write(json.dumps(story.record()) + "\n")


def write_documents(path: Path, task: ProfileTask, count: int, *, seed: int, bare: float = 0.2) -> None:
    """Text to pretrain the small model on: JSONL {"text"}, a share `bare` of it without context."""
    with path.open("w") as file:
        for number in range(count):
            rng = np.random.default_rng([seed, len(SPLITS), number])
            file.write(json.dumps({"text": task.document(rng, bool(rng.random() < bare))}) + "\n")
