"""Stories: texts that tell something and questions about it, and the words that they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from megatron_dla.errors import UserError

SPLITS = ("train", "validation", "test")
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
TOPICS = {  # sentences without a name or a word of RELATIONS
    "weather": (
        "The rain stopped before noon.", "A cold wind came from the hills.", "Clouds covered most of the sky.",
        "The forecast for tomorrow is good.", "Fog lay over the valley all morning.", "The first snow fell last night.",
    ),
    "kitchen": (
        "The soup needs a little more salt.", "Bread should rest before it is cut.", "The oven takes long to heat.",
        "Fresh herbs are added at the end.", "The pan must be hot before oil goes in.", "Beans are soaked overnight.",
    ),
    "trains": (
        "The express was ten minutes late.", "Tickets are sold at the second counter.", "The last coach was empty.",
        "A new bridge carries the line over the river.", "The timetable changes in winter.", "Passengers wait inside.",
    ),
    "garden": (
        "The roses have to be cut in spring.", "Tomatoes want sun and water.", "The hedge has grown too high.",
        "Old leaves make good soil.", "The apple tree blossomed early.", "Seeds are kept dry until March.",
    ),
    "music": (
        "The concert began with a slow piece.", "The choir practises on Mondays.", "One string was out of tune.",
        "The hall has a fine sound.", "The second movement is the longest.", "Applause came from the balcony.",
    ),
    "sea": (
        "The tide comes in twice a day.", "Boats stay in the harbour tonight.", "The waves were higher than a house.",
        "A lighthouse marks the rocks.", "The ferry leaves from the old pier.", "Salt covers all near the shore.",
    ),
}  # fmt: skip


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
        turn: what `context` has around each text, {} = the text; "": nothing, and a space before all but the first.
    """

    context: tuple[str, ...]
    questions: tuple[Question, ...]
    system: str = ""
    plain: bool = False
    opening: str = ""
    turn: str = ""

    def texts(self) -> list[str]:
        """What is told, without the turns."""
        before, _, after = self.turn.partition("{}")
        return [text[len(before) : len(text) - len(after)].strip() for text in self.context]

    def retold(self, texts: Sequence[str]) -> Story:
        """The same questions after other texts."""
        if self.turn:
            context = tuple(self.turn.replace("{}", text) for text in texts)
        else:
            context = tuple(f" {text}" if self.plain and i else text for i, text in enumerate(texts))
        return replace(self, context=context)

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
class CompletionTask:
    """Settings of tasks whose questions are beginnings of sentences."""

    style: str = "turn"
    """text: completion of one running text. turn: the text in a user's turn, the question in the assistant's, which
    small models can solve. Some tasks have chat, a question in the chat template, and chatml, turn in ChatML always."""
    user: str = "<|im_start|>user\n{}<|im_end|>\n"
    """turn: a user's turn, {} = its text, and below how the assistant's opens; `for_tokenizer` takes the model's."""
    assistant: str = "<|im_start|>assistant\n"
    styles: ClassVar[tuple[str, ...]] = ("text", "turn")

    def __post_init__(self) -> None:
        self.one_of("style", self.styles)

    def one_of(self, name: str, known: tuple[str, ...]) -> None:
        """Raises UserError for a value of field `name` that is not `known`."""
        if getattr(self, name) not in known:
            raise UserError(f"{name} = {getattr(self, name)!r}: use one of {', '.join(known)}")

    def between(self, name: str, low: int, high: int) -> None:
        """Raises UserError for a value of field `name` outside low <= value <= high."""
        if not low <= getattr(self, name) <= high:
            raise UserError(f"{name} = {getattr(self, name)}: must be {low} to {high}")

    def completions(self, said: list[str], questions: tuple[Question, ...]) -> Story:
        """A story whose questions are beginnings of sentences; `said`: what is told, one message a text."""
        turns = {} if self.style == "text" else {"opening": self.assistant, "turn": self.user}
        return Story((), questions, plain=True, **turns).retold(said)


def filler(rng: np.random.Generator, count: int) -> list[str]:
    """Sentences of all topics, in random order."""
    sentences = [sentence for topic in TOPICS.values() for sentence in topic]
    return [sentences[rng.integers(len(sentences))] for _ in range(count)]


def topic_blocks(rng: np.random.Generator, count: int, sentences: int = 4) -> list[str]:
    """`count` texts of some sentences on one topic each, on another than the text before."""
    blocks: list[str] = []
    last = -1
    for _ in range(count):
        last = int((last + 1 + rng.integers(len(TOPICS) - (last >= 0))) % len(TOPICS))
        topic = list(TOPICS.values())[last]
        blocks.append(" ".join(topic[i] for i in rng.choice(len(topic), sentences, replace=False)))
    return blocks
