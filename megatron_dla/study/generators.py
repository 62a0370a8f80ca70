"""Rows of the synthetic recall tasks: what a model reads, and which tokens it must predict.

`mqar` is multi-query associative recall (S. Arora et al., Zoology, 2023): key-value pairs, then single keys at gaps of
a power law. In `segment_recall` a row has segments that begin with a name and bind the same keys anew, and a question
names segment and key. `needle` and `multi_key_needle` have one or several pairs in filler tokens and questions at the
end (C.-P. Hsieh et al., RULER, 2024). All is drawn from a seed, so that the arms of a study read the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BeforeValidator, Field

from megatron_dla.errors import ConfigError

IGNORED = -100  # a label where nothing is asked
QUESTION = 0  # the token before a question
POWER = 0.01  # p(gap) ~ gap^(POWER - 1), as in Zoology


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


NotBool = BeforeValidator(_number)  # pydantic takes true for 1
Count = Annotated[int, NotBool, Field(ge=1, le=4096)]
Rows = tuple[np.ndarray, np.ndarray]


@dataclass
class TaskSection:
    """One synthetic task. Counts of `mqar` and `segment_recall` are for rows of `length` tokens and grow with longer
    rows; needles stay as many in more filler."""

    kind: str = ""
    """mqar, segment_recall, needle or multi_key_needle; the task's name if not given."""
    length: Count = 32
    """Tokens of a training row."""
    eval_lengths: tuple[Count, ...] = (32, 64)
    pairs: Count = 4
    """Pairs of a key and a value: of a row, of a segment in segment_recall."""
    segments: Count = 2
    """segment_recall: of a row."""
    questions: Count = 4
    """segment_recall, multi_key_needle: of a row; mqar asks for every key."""
    keys: Count = 16
    values: Count = 16
    names: Count = 8
    """segment_recall: different names of segments."""
    fillers: Count = 8


@dataclass(frozen=True)
class Vocabulary:
    """First token of each class; the tokens of a class follow each other."""

    names: int
    keys: int
    values: int
    fillers: int
    size: int


def vocabulary(task: TaskSection) -> Vocabulary:
    names = QUESTION + 1
    keys = names + task.names
    values = keys + task.keys
    fillers = values + task.values
    return Vocabulary(names, keys, values, fillers, fillers + task.fillers)


def make_rows(task: TaskSection, length: int, rows: int, *seed: int) -> Rows:
    """Tokens and labels, int64 [rows, length]; a label is what follows its token, `IGNORED` where nothing is asked."""
    return KINDS[task.kind](task, length, rows, np.random.default_rng(seed))


def _choice(rng: np.random.Generator, rows: int, count: int, size: int) -> np.ndarray:
    """int64 [rows, size]: numbers below `count`, none twice in a row."""
    return rng.random((rows, count)).argsort(1)[:, :size]


def _blank(task: TaskSection, length: int, rows: int, rng: np.random.Generator) -> Rows:
    tokens = vocabulary(task).fillers + rng.integers(0, task.fillers, (rows, length))
    return tokens, np.full((rows, length), IGNORED)


def _mqar(task: TaskSection, length: int, rows: int, rng: np.random.Generator) -> Rows:
    v, pairs = vocabulary(task), task.pairs * length // task.length
    tokens, labels = _blank(task, length, rows, rng)
    keys = v.keys + _choice(rng, rows, task.keys, pairs)
    values = v.values + rng.integers(0, task.values, (rows, pairs))
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    gaps = np.arange(1, (length - 2 * pairs) // 2 + 1)
    # the largest of log p + Gumbel noise are a draw without replacement
    noise = (POWER - 1) * np.log(gaps) + rng.gumbel(size=(rows, len(gaps)))
    places = 2 * pairs + 2 * (-noise).argsort(1)[:, :pairs]
    np.put_along_axis(tokens, places, keys, 1)
    np.put_along_axis(labels, places, values, 1)
    return tokens, labels


def _segment_recall(task: TaskSection, length: int, rows: int, rng: np.random.Generator) -> Rows:
    v, pairs = vocabulary(task), task.pairs
    segments = task.segments * length // task.length
    questions = task.questions * length // task.length
    tokens, labels = _blank(task, length, rows, rng)
    names = v.names + _choice(rng, rows, task.names, segments)
    keys = v.keys + _choice(rng, rows * segments, task.keys, pairs).reshape(rows, segments, pairs)
    values = v.values + rng.integers(0, task.values, (rows, segments, pairs))
    told = length - 3 * questions
    size = told // segments  # filler follows the pairs where there is room
    body = tokens[:, : segments * size].reshape(rows, segments, size)
    body[..., 0] = names
    body[..., 1 : 2 * pairs : 2], body[..., 2 : 2 * pairs + 1 : 2] = keys, values
    tokens[:, : segments * size] = body.reshape(rows, -1)
    asked = _choice(rng, rows, segments * pairs, questions)
    at = told + 3 * np.arange(questions)
    tokens[:, at] = QUESTION
    tokens[:, at + 1] = np.take_along_axis(names, asked // pairs, 1)
    tokens[:, at + 2] = np.take_along_axis(keys.reshape(rows, -1), asked, 1)
    labels[:, at + 2] = np.take_along_axis(values.reshape(rows, -1), asked, 1)
    return tokens, labels


def _needles(task: TaskSection, length: int, rows: int, rng: np.random.Generator) -> Rows:
    v, pairs = vocabulary(task), 1 if task.kind == "needle" else task.pairs
    questions = min(task.questions, pairs)
    tokens, labels = _blank(task, length, rows, rng)
    keys = v.keys + _choice(rng, rows, task.keys, pairs)
    values = v.values + rng.integers(0, task.values, (rows, pairs))
    told = length - 2 * questions
    places = 2 * _choice(rng, rows, told // 2, pairs) + told % 2
    np.put_along_axis(tokens, places, keys, 1)
    np.put_along_axis(tokens, places + 1, values, 1)
    at = told + 2 * np.arange(questions)  # keys lie at places in random order
    tokens[:, at], tokens[:, at + 1], labels[:, at + 1] = QUESTION, keys[:, :questions], values[:, :questions]
    return tokens, labels


KINDS: dict[str, Callable[[TaskSection, int, int, np.random.Generator], Rows]] = {
    "mqar": _mqar,
    "segment_recall": _segment_recall,
    "needle": _needles,
    "multi_key_needle": _needles,
}


def check_task(task: TaskSection, where: str) -> None:
    """Whether rows of all lengths can be drawn. Raises ConfigError, which names the key below `where`."""
    if task.kind not in KINDS:
        raise ConfigError(f"{where}.kind = {task.kind!r}: use one of {', '.join(KINDS)}")
    if not task.eval_lengths or len(set(task.eval_lengths)) < len(task.eval_lengths):
        raise ConfigError(f"{where}.eval_lengths = {list(task.eval_lengths)}: give lengths, none twice")
    for length in (task.length, *task.eval_lengths):
        if length < task.length:
            raise ConfigError(f"{where}.eval_lengths: {length} is below {where}.length = {task.length}")
        longer = length / task.length
        pairs = 1 if task.kind == "needle" else task.pairs
        pairs = int(pairs * longer) if task.kind == "mqar" else pairs
        segments, questions = int(task.segments * longer), int(task.questions * longer)
        needed = {
            "mqar": 4 * pairs,
            "segment_recall": segments * (1 + 2 * pairs) + 3 * questions,
        }.get(task.kind, 2 * pairs + 2)
        if needed > length:
            raise ConfigError(f"{where}: rows of {length} tokens are too short, {needed} are needed: fewer pairs")
        if pairs > task.keys:
            raise ConfigError(f"{where}.keys = {task.keys}: rows of {length} tokens have {pairs} different keys")
        if task.kind == "segment_recall" and (segments > task.names or questions > segments * pairs):
            raise ConfigError(
                f"{where}.names = {task.names}, {where}.questions = {task.questions}: rows of {length} tokens have "
                f"{segments} named segments with {segments * pairs} pairs"
            )
