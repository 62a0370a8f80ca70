"""Multiple choice and last-word tasks from local JSONL, scored as lm-eval does.

The form of a row says what it is:

    {"q": ..., "choices": [...], "gold": 1}              question and answers (also "support": a text before)
    {"ctx": ..., "choices": [...], "gold": 1}            a text and its continuations ("activity": its heading)
    {"sentence": "... _ ...", "choices": [...], "gold": 0}   what fills the blank; the rest of the sentence is scored
    {"context": ..., "target": " word"}                  the last word
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dla.data_prep.readers import COMPRESSIONS, kind_of
from megatron_dla.errors import UserError
from megatron_dla.evaluation.lm.items import Item, Task, Values, digest
from megatron_dla.evaluation.lm.models import Subject
from megatron_dla.evaluation.lm.scoring import Row, score_rows
from megatron_dla.files import parse_json

PLAIN_QUESTIONS = ("openbookqa",)
"""Sets whose question is the beginning of a sentence, without `Question:` before it."""


@dataclass(frozen=True)
class Question:
    """(context, continuation) pairs of which the model prefers one; `gold` is the right one."""

    pairs: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]  # characters of the choices, for acc_norm
    gold: int


class MultipleChoice(Task):
    """`acc`: the right continuation has the highest log-probability; `acc_norm`: divided by the characters of the
    choice."""

    metrics = ("acc", "acc_norm")
    unit = "questions"

    def __init__(self, name: str, questions: Sequence[Question], file: str, budget: int = 8192) -> None:
        chance = float(np.mean([1 / len(question.pairs) for question in questions]))
        super().__init__(name, {"file": file}, chance)
        self._questions, self._budget = questions, budget

    def items(self, subject: Subject) -> list[Item]:
        out = []
        for number, question in enumerate(self._questions):
            rows = [pair_row(subject, *pair) for pair in question.pairs]
            key = f"{number}/{digest(question.pairs, question.gold)}"
            out.append(Item(key, sum(len(row.ids) - 1 for row in rows), (question, rows)))
        return out

    def measure(self, subject: Subject, items: Sequence[Item]) -> list[Values]:
        rows = [row for item in items for row in item.payload[1]]
        scores = iter(score_rows(subject, rows, self._budget))
        out = []
        for item in items:
            question, mine = item.payload
            found = np.array([next(scores).logprob.sum() for _ in mine])
            normed = found / np.array(question.lengths)
            out.append({
                "acc": float(found.argmax() == question.gold), "acc_norm": float(normed.argmax() == question.gold),
                "logprobs": found.tolist(),
            })  # fmt: skip
        return out


class LastWord(Task):
    """`acc`: every token of the word is the most probable one; `nats` of the whole word."""

    metrics = ("acc", "nats")
    unit = "texts"

    def __init__(self, name: str, pairs: Sequence[tuple[str, str]], file: str, budget: int = 8192) -> None:
        super().__init__(name, {"file": file})
        self._pairs, self._budget = pairs, budget

    def items(self, subject: Subject) -> list[Item]:
        rows = [pair_row(subject, *pair) for pair in self._pairs]
        keys = [f"{number}/{digest(pair)}" for number, pair in enumerate(self._pairs)]
        return [Item(key, len(row.ids) - 1, row) for key, row in zip(keys, rows, strict=True)]

    def measure(self, subject: Subject, items: Sequence[Item]) -> list[Values]:
        out = []
        for item, scores in zip(items, score_rows(subject, [i.payload for i in items], self._budget), strict=True):
            right = bool((scores.best == np.array(item.payload.ids[item.payload.start :])).all())
            out.append({"acc": float(right), "nats": float(-scores.logprob.sum())})
        return out


# ---- tokens


def pair_row(subject: Subject, context: str, continuation: str) -> Row:
    """Tokens of both texts, of which those of the continuation are scored, by lm-eval's rules.

    Spaces at the end of the context belong to the continuation. Both are encoded as one text, and what follows as many
    tokens as the context alone has is the continuation. An empty context is one token (`Subject.prefix`). What is
    longer than the model's `max_position_embeddings` loses tokens on the left.
    """
    if not context:
        before, after = [subject.prefix], subject.encode(continuation)
    else:
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        before = subject.encode(context, special=True)
        after = subject.encode(context + continuation, special=True)[len(before) :]
    ids = before + after
    limit = getattr(subject.model.config, "max_position_embeddings", len(ids))
    ids = ids[-(limit + 1) :]
    return Row(ids, max(1, len(ids) - len(after)))


# ---- files


def read_questions(argument: str, limit: int = 0, budget: int = 8192) -> Task:
    """The task of an argument FILE or NAME=FILE; the name of a bare file is its own, up to the first dot.

    Args:
        limit: the first so many rows; 0 = all. budget: tokens of a batch.

    Raises:
        UserError: no such file, or a row that has none of the forms, or another than the first row.
    """
    name, equals, file = argument.partition("=")
    if not equals:
        name, file = Path(argument).name.split(".")[0], argument
    rows = _read_rows(file)[: limit or None]
    line, first = rows[0]
    forms = [form for form in _FORMS if all(key in first for key in form)]
    if not forms:
        wanted = " or ".join("{" + ", ".join(form) + "}" for form in _FORMS)
        raise UserError(f"--questions {file}:{line}: has {', '.join(sorted(first))[:200]}: want rows of {wanted}")
    read = _FORMS[forms[0]]
    found = []
    for number, row in rows:
        try:
            found.append(read(name, row))
        except ValueError as error:
            raise UserError(
                f"--questions {file}:{number}: not a row of {', '.join(forms[0])} ({error}): correct or remove it"
            ) from error
    if forms[0] == ("context", "target"):
        return LastWord(name, found, file, budget)
    return MultipleChoice(name, found, file, budget)


def _read_rows(file: str) -> list[tuple[int, dict[str, Any]]]:
    """(number of the line, object) of every line that is not blank."""
    kind = kind_of(Path(file))
    if kind is None or kind.format not in (".jsonl", ".json"):
        raise UserError(f"--questions {file}: give a .jsonl file (also with {', '.join(filter(None, COMPRESSIONS))})")
    rows = []
    for number, line in enumerate(_lines(file, kind.compression), 1):
        try:
            row = parse_json(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise UserError(f"--questions {file}:{number}: no JSON object ({error})") from error
        if row:
            rows.append((number, row))
    if not rows:
        raise UserError(f"--questions {file}: it has no rows")
    return rows


def _lines(file: str, compression: str) -> list[bytes]:
    with open(file, "rb") as raw, COMPRESSIONS[compression](raw) as stream:
        try:
            return stream.read().splitlines()
        except Exception as error:  # the packages' errors share no base class
            raise UserError(f"--questions {file}: cannot be read ({error}); copy or compress it again") from error


def _text(key: str, value: Any, blank: bool = False) -> str:
    """`value` if it is a text. `blank`: it may be one of spaces alone, or of nothing. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{key} = {reprlib.repr(value)}: must be a text")
    if not blank and not value.strip():
        raise ValueError(f"{key} = {value[:80]!r}: must not be blank")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON allows it, tokenizers do not
        shown = value[max(0, error.start - 20) : error.start + 20]
        raise ValueError(f"{key} = {shown!a}: lone surrogate at character {error.start}") from None
    return value


def _choices(row: dict[str, Any]) -> tuple[list[str], int]:
    """Choices and gold. Raises ValueError."""
    choices, gold = _need(row, "choices"), _need(row, "gold")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"choices = {reprlib.repr(choices)}: must be a list of two at least")
    choices = [_text(f"choices[{number}]", choice) for number, choice in enumerate(choices)]
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(f"gold = {reprlib.repr(gold)}: must be a number of one of {len(choices)} choices, from 0")
    return choices, gold


def _need(row: dict[str, Any], key: str) -> Any:
    if key not in row:
        raise ValueError(f"{key} is missing")
    return row[key]


def _check_one_right(choices: Sequence[str], gold: int) -> int:
    """`gold`. Two wrong choices may be equal, as in two rows of SciQ."""
    if list(choices).count(choices[gold]) > 1:
        raise ValueError(f"gold = {gold}: the choice {choices[gold][:80]!r} is given twice")
    return gold


def _question(context: str, choices: Sequence[str], gold: int) -> Question:
    pairs = tuple((context, f" {choice}") for choice in choices)
    return Question(pairs, tuple(map(len, choices)), _check_one_right(choices, gold))


def _read_asked(name: str, row: dict[str, Any]) -> Question:
    asked = _text("q", _need(row, "q"), blank=True)
    context = asked if name in PLAIN_QUESTIONS else f"Question: {asked}\nAnswer:"
    if "support" in row:
        context = f"{_text('support', row['support'], blank=True).lstrip()}\n{context}"
    return _question(context, *_choices(row))


def _read_continued(name: str, row: dict[str, Any]) -> Question:
    activity = row.get("activity")
    heading = f"{_text('activity', activity)}: " if activity not in (None, "") else ""
    context, (choices, gold) = _text("ctx", _need(row, "ctx"), blank=True), _choices(row)
    cleaned = [_text(f"choices[{number}] without [marks]", _clean(choice)) for number, choice in enumerate(choices)]
    return _question(_clean(heading + context), cleaned, gold)


def _clean(text: str) -> str:
    """Without the marks that WikiHow's texts carry."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _read_blank(name: str, row: dict[str, Any]) -> Question:
    sentence = _text("sentence", _need(row, "sentence"))
    before, _, after = sentence.partition("_")
    end = after.strip()
    if not end:
        raise ValueError(f"sentence = {sentence[-80:]!r}: must have a _, and text behind it, which is what is scored")
    choices, gold = _choices(row)
    pairs = tuple((before + choice, f" {end}") for choice in choices)
    return Question(pairs, tuple(len(end) for _ in pairs), _check_one_right(choices, gold))


def _read_last_word(name: str, row: dict[str, Any]) -> tuple[str, str]:
    return _text("context", _need(row, "context")), _text("target", _need(row, "target"))


_FORMS: dict[tuple[str, ...], Any] = {
    ("q", "choices", "gold"): _read_asked,
    ("ctx", "choices", "gold"): _read_continued,
    ("sentence", "choices", "gold"): _read_blank,
    ("context", "target"): _read_last_word,
}
