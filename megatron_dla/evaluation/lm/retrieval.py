"""Associative recall in tokens (MQAR), and a value of a JSON object by its key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random

import numpy as np

from megatron_dla.errors import UserError
from megatron_dla.evaluation.lm.generated import Generated, Place, Recipe, Sample
from megatron_dla.evaluation.lm.items import Item, Task, Values, digest
from megatron_dla.evaluation.lm.material import uuids
from megatron_dla.evaluation.lm.models import Subject
from megatron_dla.evaluation.lm.scoring import Row, score_rows

KEY_VALUE, MQAR = "key_value", "mqar"


class Recall(Task):
    """Multi-query associative recall (arXiv 2312.04927) in the model's own word tokens.

    A row is `pairs` keys each followed by its value, other words up to the length, and the keys again in another order,
    each followed by its value. `accuracy`: the value is the most probable token after a repeated key. `choice`: among
    the values of the row (chance: 1 / pairs).
    """

    metrics = ("accuracy", "choice")
    unit = "rows"

    def __init__(self, *, pairs: int, lengths: Sequence[int], count: int, seed: int, budget: int = 8192) -> None:
        super().__init__(MQAR, {"pairs": pairs, "lengths": list(lengths), "items": count, "seed": seed}, chance=0.0)
        if short := [length for length in lengths if length < 4 * pairs]:
            raise UserError(f"--lengths {short[0]}: mqar with --pairs {pairs} needs at least {4 * pairs} tokens")
        self._budget = budget

    def items(self, subject: Subject) -> list[Item]:
        pairs, words = self.settings["pairs"], word_tokens(subject)
        if len(words) < 2 * pairs + 1:
            raise UserError(
                f"--pairs {pairs}: mqar needs {2 * pairs + 1} word tokens, this tokenizer has {len(words)}: give fewer"
            )
        out = []
        for length in self.settings["lengths"]:
            for index in range(self.settings["items"]):
                row, values = recall_row(Random(f"{self.settings['seed']}/{length}/{index}"), words, pairs, length)
                key = f"{length}/{index}/{digest(row.ids)}"
                out.append(Item(key, length, (row, values), {"length": length}))
        return out

    def measure(self, subject: Subject, items: Sequence[Item]) -> list[Values]:
        found = score_rows(subject, [i.payload[0] for i in items], self._budget, among=[i.payload[1] for i in items])
        out = []
        for item, scores in zip(items, found, strict=True):
            right = np.array(item.payload[0].ids[item.payload[0].start :])[1::2]  # what follows the keys
            hits = {"accuracy": scores.best[1::2] == right, "choice": scores.best_among[1::2] == right}
            out.append({name: float(hit.mean()) for name, hit in hits.items()})
        return out


def recall_row(rng: Random, words: Sequence[int], pairs: int, length: int) -> tuple[Row, list[int]]:
    """A row of `length` tokens whose second half of pairs is scored, and its values."""
    chosen = rng.sample(words, 2 * pairs)
    keys, values = chosen[:pairs], chosen[pairs:]
    used = set(chosen)
    others = [word for word in words if word not in used]
    told = [token for pair in zip(keys, values, strict=True) for token in pair]
    asked = [token for i in rng.sample(range(pairs), pairs) for token in (keys[i], values[i])]
    between = rng.choices(others, k=length - 4 * pairs)
    return Row([*told, *between, *asked], length - 2 * pairs), values


def word_tokens(subject: Subject) -> list[int]:
    """Tokens that are words of two ASCII letters or more, sorted: those that begin a word where the tokenizer marks
    it."""
    found: dict[bool, list[int]] = {True: [], False: []}
    for text, token in subject.tokenizer.get_vocab().items():
        word = text.lstrip("▁Ġ ")
        if len(word) >= 2 and word.isascii() and word.isalpha() and token not in subject.tokenizer.all_special_ids:
            found[word != text].append(token)
    return sorted(found[True] if len(found[True]) >= 100 else found[True] + found[False])


def key_value_task(*, lengths: Sequence[int], count: int, seed: int) -> Generated:
    """Retrieval of a random value by its random key from a JSON object (arXiv 2307.03172)."""
    return Generated(KEY_VALUE, Recipe(_key_value, 40), lengths=lengths, count=count, seed=seed)


def _key_value(place: Place, size: int) -> Sample:
    """One key and `size` others."""
    keys, values = uuids(place.rng, size + 1), uuids(place.rng, size + 1)
    at = round(place.depth * size)
    data = json.dumps(dict(zip(keys, values, strict=True)), indent=0)
    prompt = (
        f"The JSON object below has random keys and values. Look up the value of one key.\n{data}\n"
        f'Question: What is the value of the key "{keys[at]}"?\nAnswer: The value is "'
    )
    return Sample(prompt, (values[at],), depth=place.depth)
