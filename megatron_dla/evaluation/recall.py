"""Synthetic recall: the model reads facts, the context is removed, and it answers questions about them.

`profile` is for a small model pretrained on such text: one word of each of four categories among filler words;
"? colour" asks for the colour. `facts` has sentences ("Anna's favourite colour is red.") about one or several people,
queried by completion or in a chat; training and test splits use different names. Everything is generated from seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dla.errors import UserError
from megatron_dla.serving.chat import user_turn

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
    """A question, the word that answers it, the candidate words (including that one), and the text of the answer before
    and after the word."""

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
    """A context, one message a text, and the questions about it.

    Attributes:
        system: system message of both context and question, or "". plain: concatenate the texts without a chat
            template, even if the tokenizer has one. opening: plain text before the first question.
    """

    context: tuple[str, ...]
    questions: tuple[Question, ...]
    system: str = ""
    plain: bool = False
    opening: str = ""

    def ask(self, question: Question, first: bool = True) -> str:
        """Text of a question; the first one of a read segment starts with `opening`."""
        return self.opening + question.text.lstrip() if first and self.opening else question.text

    def record(self) -> dict[str, Any]:
        """A JSONL record for tasks.adapter.episodes."""
        pairs = [{"question": self.ask(q, i == 0), "answer": q.answer} for i, q in enumerate(self.questions)]
        out: dict[str, Any] = {"context": list(self.context), "questions": pairs}
        out |= {"system": self.system} if self.system else {}
        return out | ({"plain": True} if self.plain else {})


@dataclass(frozen=True)
class ProfileTask:
    """A sequence of filler words with one word of each category at random positions; one question a category."""

    words: int = 32
    """Length of the context, facts included."""
    kind = "profile"

    def __post_init__(self) -> None:
        if self.words < len(CATEGORIES):
            raise UserError(f"words = {self.words}: must be at least {len(CATEGORIES)}, one a category")

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
        """Text to pretrain the small model on: a story with answered questions. `bare`: questions without the context,
        which train the model to give every word of a category the same probability there."""
        story = self.story(rng, "train")
        asked = "".join(q.text + q.answer for q in story.questions)
        return asked if bare else story.context[0] + asked


@dataclass(frozen=True)
class FactsTask:
    """Sentences about people in random order, in one message or one message each; one question a fact."""

    people: int = 2
    relations: int = 2
    """Facts a person: the first n of colour, pet, city, job."""
    messages: str = "one"
    """one: all facts in one user message. each: one message a fact (for writes by message)."""
    style: str = "turn"
    """chat: "What is Anna's pet?" in the chat template. text: completion of "Anna's pet is a". turn: facts in a user's
    turn and the completion in the assistant's turn, which small models can solve; chatml: the same in ChatML always."""
    user: str = "<|im_start|>user\n{}<|im_end|>\n"
    """turn: a user's turn, {} = its text, and below how the assistant's opens; `for_tokenizer` takes the model's."""
    assistant: str = "<|im_start|>assistant\n"
    kind = "facts"

    def __post_init__(self) -> None:
        most = min(len(names.split()) for names in PEOPLE.values())
        for name, value, limit in (("people", self.people, most), ("relations", self.relations, len(RELATIONS))):
            if not 1 <= value <= limit:
                raise UserError(f"{name} = {value}: must be 1 to {limit}")
        for name, known in (("messages", ("one", "each")), ("style", ("chat", "text", "turn", "chatml"))):
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
        context = tuple(self.user.replace("{}", text) for text in said)
        return Story(context, asked, plain=True, opening=self.assistant)


TASKS: dict[str, Any] = {"profile": ProfileTask, "facts": FactsTask}
RecallTask = ProfileTask | FactsTask


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
    if not isinstance(task, FactsTask) or task.style != "turn" or not getattr(tokenizer, "chat_template", None):
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
