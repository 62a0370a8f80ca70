"""What else to do with a text that no longer fits: keep its end, a summary, what is nearest to a question, or weights.

All but the last (lora.py) are another context of the same questions, which the plain backbone reads in its prompt.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dla.errors import UserError
from megatron_dla.evaluation.stories import Question, Story

KINDS = {
    "window": "the last N tokens of the text",
    "bm25": "the N sentences nearest to the question, by BM25",
    "summary": "a summary of at most N tokens by the backbone itself",
    "lora": "a LoRA with the adapter's number of parameters, tuned on the text for N steps",
}
NEEDS = {"bm25": "bm25s", "lora": "peft"}
SUMMARISE = "{}\n\nWrite down all facts of this text, as briefly as you can."

Summarise = Callable[[Sequence[str], int], list[str]]
"""(texts, tokens) -> a summary of each."""


@dataclass(frozen=True)
class Alternative:
    """One of `KINDS` with its N."""

    kind: str
    size: int

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.size}"


def parse_alternatives(values: Sequence[str]) -> list[Alternative]:
    """From KIND=N. Raises UserError naming the value, or the package that it needs."""
    found = []
    for value in values:
        kind, _, size = value.partition("=")
        if kind not in KINDS or not re.fullmatch(r"[1-9]\d{0,8}", size):
            raise UserError(f"--beside {value}: write {', '.join(f'{name}=N' for name in KINDS)}, with N from 1")
        if (package := NEEDS.get(kind)) and importlib.util.find_spec(package) is None:
            raise UserError(
                f"--beside {value} needs {package}, which is not installed: pip install 'megatron-dla[eval]'"
            )
        found.append(Alternative(kind, int(size)))
    if len(set(found)) < len(found):
        raise UserError(f"--beside {' '.join(values)}: one is given twice")
    return found


def sentences(story: Story) -> list[str]:
    """What is told, cut after full stops."""
    return [part for text in story.texts() for part in re.split(r"(?<=\.) ", text)]


def last_tokens(tokenizer: Any, story: Story, count: int) -> list[str]:
    """The last words of what is told that have at most `count` tokens, as one text."""
    words = " ".join(story.texts()).split(" ")
    low, high = 0, len(words)  # the tokens grow with the words
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(tokenizer.encode(" ".join(words[-middle:]), add_special_tokens=False)) <= count
        low, high = (middle, high) if fits else (low, middle - 1)
    return [" ".join(words[len(words) - low :])]


def nearest(story: Story, question: Question, count: int) -> list[str]:
    """The `count` sentences with the highest BM25 score (Lucene's variant, k1 = 1.5, b = 0.75), in their order."""
    import bm25s

    told = sentences(story)
    index = bm25s.BM25(k1=1.5, b=0.75)
    index.index([_words(sentence) for sentence in told], show_progress=False)
    scores = index.get_scores(_words(f"{question.text} {question.lead}"))
    best = sorted(range(len(told)), key=lambda i: (-scores[i], -i))[:count]  # of equals the newest
    return [told[i] for i in sorted(best)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower()) or [""]


def retell(
    alternative: Alternative, tokenizer: Any, stories: Sequence[Story], summarise: Summarise
) -> list[list[Story]]:
    """Of each story, one story a question, with the context that is left of it."""
    if alternative.kind == "summary":
        written = summarise([" ".join(story.texts()) for story in stories], alternative.size)
        contexts = [[[text]] * len(story.questions) for story, text in zip(stories, written, strict=True)]
    elif alternative.kind == "window":
        contexts = [[last_tokens(tokenizer, story, alternative.size)] * len(story.questions) for story in stories]
    else:
        contexts = [[nearest(story, q, alternative.size) for q in story.questions] for story in stories]
    return [
        [Story((), (q,), story.system, story.plain, story.opening, story.turn).retold(texts)
         for q, texts in zip(story.questions, found, strict=True)]
        for story, found in zip(stories, contexts, strict=True)
    ]  # fmt: skip
