"""Rows of the synthetic tasks: a reader that knows the rules answers every question from what stands before it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_dla.errors import ConfigError
from megatron_dla.study.generators import (
    IGNORED,
    KINDS,
    QUESTION,
    TaskSection,
    check_task,
    make_rows,
    vocabulary,
)

SIZES = {"keys": 32, "values": 32, "names": 16, "fillers": 16}
TASKS = {
    "mqar": TaskSection("mqar", 64, (64, 128), pairs=8, **SIZES),
    "segment_recall": TaskSection(
        "segment_recall", 64, (64, 128), pairs=3, segments=4, questions=6, **SIZES | {"keys": 8}
    ),
    "needle": TaskSection("needle", 63, (63, 128), **SIZES),
    "multi_key_needle": TaskSection("multi_key_needle", 64, (64, 128), pairs=6, questions=4, **SIZES),
}


def oracle(task: TaskSection, row: list[int], at: int) -> int:
    """The value that answers the token at `at`, from what stands before it."""
    v = vocabulary(task)
    scope = row[:at]
    if task.kind == "segment_recall":
        begin = scope.index(row[at - 1])  # the segment that the question names
        names = [n for n, token in enumerate(scope) if v.names <= token < v.keys or token == QUESTION]
        scope = scope[begin : next((n for n in names if n > begin), at)]
    found = [scope[n + 1] for n, token in enumerate(scope[:-1]) if token == row[at] and scope[n + 1] >= v.values]
    assert len(found) == 1, "one answer"
    return found[0]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("longer", [False, True])
def test_a_reader_answers_every_question(name, longer) -> None:
    task = TASKS[name]
    check_task(task, name)
    length = task.eval_lengths[longer]
    tokens, labels = make_rows(task, length, 40, 3, 1)
    assert tokens.shape == labels.shape == (40, length) and tokens.dtype == labels.dtype == np.int64
    v, per_row = vocabulary(task), (labels != IGNORED).sum(1)
    assert tokens.min() >= 0 and tokens.max() < v.size
    grows = 2 if longer else 1
    wanted = {"mqar": 8 * grows, "segment_recall": 6 * grows, "needle": 1, "multi_key_needle": 4}[name]
    assert (per_row == wanted).all()
    for row, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
        for at, value in enumerate(asked):
            if value != IGNORED:
                assert v.keys <= row[at] < v.values and v.values <= value < v.fillers
                assert oracle(task, row, at) == value


def test_segments_bind_the_same_keys_anew() -> None:
    task, v = TASKS["segment_recall"], vocabulary(TASKS["segment_recall"])
    tokens, labels = make_rows(task, 64, 100, 5)
    last_value = 0
    for row, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
        at = max(n for n, value in enumerate(asked) if value != IGNORED)
        told = row[: row.index(QUESTION)]
        newest = max((n for n, token in enumerate(told) if token == row[at]), default=0)
        last_value += told[newest + 1] == asked[at]
    assert last_value < 80, "reading the newest value of a key does not answer"
    names = [[token for token in row if v.names <= token < v.keys] for row in tokens[:, : 64 - 18].tolist()]
    assert all(len(set(row)) == 4 for row in names)


@pytest.mark.parametrize("name", KINDS)
def test_a_seed_gives_the_same_rows(name) -> None:
    first, again, other = (make_rows(TASKS[name], 64, 8, seed, 4) for seed in (1, 1, 2))
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_gaps_of_mqar_follow_a_power_law() -> None:
    _, labels = make_rows(replace(TASKS["mqar"], pairs=1), 64, 4000, 0)
    gaps = ((labels != IGNORED).argmax(1) - 2) // 2 + 1
    counts = np.bincount(gaps, minlength=32)[1:]
    share = np.arange(1, 32) ** -0.99
    assert np.abs(counts / 4000 - share / share.sum()).max() < 0.03


@pytest.mark.parametrize(
    "change,words",
    [
        ({"kind": "mqr"}, ("t.kind", "'mqr'")), ({"pairs": 17}, ("64 tokens", "68")),
        ({"eval_lengths": (32,)}, ("t.eval_lengths", "32")), ({"eval_lengths": (64, 64)}, ("t.eval_lengths",)),
        ({"pairs": 8, "keys": 8}, ("t.keys", "128 tokens")),
        ({"kind": "segment_recall", "segments": 4, "names": 4}, ("t.names", "8 named")),
    ],
)  # fmt: skip
def test_wrong_tasks(change, words) -> None:
    with pytest.raises(ConfigError) as error:
        check_task(replace(TaskSection("mqar", 64, (64, 128), **SIZES), **change), "t")
    assert all(word in str(error.value) for word in words), error.value
