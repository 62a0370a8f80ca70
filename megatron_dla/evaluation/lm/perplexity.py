"""Perplexity and bits per byte of plain text, by position in the window.

A window is an input of at most `window` tokens. Plain windows follow each other; with a stride they overlap, and only
tokens that no earlier window scored count. Either way every token of a document but the first is scored once, by the
same loss as transformers' own (`labels=ids`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dla.data_prep.readers import Problem, kind_of, known_formats, read_records
from megatron_dla.errors import UserError
from megatron_dla.evaluation.lm.items import Item, Task, Values, digest
from megatron_dla.evaluation.lm.models import Subject
from megatron_dla.evaluation.lm.scoring import Row, score_rows

LN2 = float(np.log(2))


def read_documents(files: Sequence[str], option: str = "--text") -> list[str]:
    """The documents of text, JSONL (field `text`, also compressed) or parquet files; a .txt file is one document.

    Raises:
        UserError: another kind of file, a record without text, or no text at all. DataError: see `read_records`.
    """
    documents = []
    for file in files:
        path = Path(file)
        kind = kind_of(path)
        if kind is None:
            raise UserError(f"{option} {file}: no reader takes this name: use {known_formats()}")
        if not path.is_file():
            raise UserError(f"{option} {file}: No such file")
        for record in read_records(path, kind, "text", ""):
            if isinstance(record.text, Problem):
                raise UserError(f"{option} {file}:{record.number}: {record.text.what}; {record.text.fix}")
            if record.text:
                documents.append(record.text)
    if not documents:
        raise UserError(f"{option} {' '.join(files)}: no text in it")
    return documents


@dataclass(frozen=True)
class Window:
    """A row to score, the context length of its first scored token, and the bytes of each scored token."""

    row: Row
    bytes: list[int]


class Perplexity(Task):
    """Values of a window: its nats, tokens and bytes, in bins of positions [2^k, 2^(k+1)).

    Args:
        window: tokens of an input. stride: tokens between the starts of two windows, at most `window`.
        count: windows, drawn by `seed` out of all; 0 = all.
    """

    metrics = ("nats", "bits_per_byte")
    unit = "windows"

    def __init__(
        self, documents: Sequence[str], *, window: int, stride: int, count: int = 0, seed: int = 0, budget: int = 8192,
        files: Sequence[str] = (),
    ) -> None:  # fmt: skip
        super().__init__("perplexity", {"window": window, "stride": stride, "text": list(files)})
        self._documents, self._window, self._stride = documents, window, stride
        self._count, self._seed, self._budget = count, seed, budget

    def items(self, subject: Subject) -> list[Item]:
        found = []
        for number, text in enumerate(self._documents):
            ids, sizes = encode_bytes(subject, text)
            for at, row in windows(ids, self._window, self._stride):
                scored = sizes[at + row.start : at + len(row.ids)]
                key = f"{number}/{at}/{digest(row.ids)}"
                found.append(Item(key, len(row.ids) - 1, Window(row, scored)))
        if not found:
            raise UserError("--text: no document has two tokens: give a longer text")
        if self._count:
            order = np.random.default_rng(self._seed).permutation(len(found))[: self._count]
            found = [found[i] for i in sorted(order)]
        return found

    def measure(self, subject: Subject, items: Sequence[Item]) -> list[Values]:
        out = []
        for item, scores in zip(items, score_rows(subject, [i.payload.row for i in items], self._budget), strict=True):
            start, sizes = item.payload.row.start, item.payload.bytes
            bins = np.log2(np.arange(start, start + len(sizes))).astype(int)
            count = int(bins[-1]) + 1
            out.append({
                "nats": np.bincount(bins, -scores.logprob, count).tolist(),
                "tokens": np.bincount(bins, minlength=count).tolist(),
                "bytes": np.bincount(bins, sizes, count).astype(int).tolist(),
            })  # fmt: skip
        return out


def encode_bytes(subject: Subject, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a text, and the bytes that each adds: they sum to those of the text up to the last token's end.

    Tokens that share a character (its bytes) count once; characters between tokens count to the later one.
    """
    found: Any = subject.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    before = [0, *accumulate(len(letter.encode("utf-8", "surrogatepass")) for letter in text)]
    ends = list(accumulate((end for _, end in found["offset_mapping"]), max))
    sizes = [before[end] - before[start] for start, end in pairwise([0, *ends])]
    return found["input_ids"], sizes


def windows(ids: Sequence[int], window: int, stride: int) -> list[tuple[int, Row]]:
    """(position of the first token, row) of each window: up to `window` + 1 tokens, the last one a label only."""
    found, scored, at = [], 1, 0
    while scored < len(ids):
        end = min(at + window + 1, len(ids))
        found.append((at, Row(list(ids[at:end]), scored - at)))
        scored, at = end, at + stride
    return found


def ratio_units(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """One number a unit whose mean is sum(numerators) / sum(denominators), and whose spread is that of the ratio
    (linearised): what `bootstrap_mean` needs for windows of unequal length."""
    ratio = numerators.sum() / denominators.sum()
    return ratio + (numerators - ratio * denominators) / denominators.mean()


def perplexity_units(values: Sequence[Values]) -> dict[str, np.ndarray]:
    """The metrics of `Perplexity`, one number a window."""
    nats, tokens, size = (np.array([float(sum(value[key])) for value in values]) for key in ("nats", "tokens", "bytes"))
    return {"nats": ratio_units(nats, tokens), "bits_per_byte": ratio_units(nats / LN2, size)}


def by_position(values: Sequence[Values]) -> list[dict[str, float]]:
    """Of each bin of positions: first and last number of context tokens, tokens, nats a token and bits a byte."""
    rows = []
    for k in range(max(len(value["tokens"]) for value in values)):
        nats, tokens, size = (
            sum(value[key][k] for value in values if k < len(value[key])) for key in ("nats", "tokens", "bytes")
        )
        if tokens:
            bits = nats / LN2 / size if size else float("nan")
            rows.append(
                {"from": 2**k, "to": 2 ** (k + 1) - 1, "tokens": tokens, "nats": nats / tokens, "bits_per_byte": bits}
            )
    return rows
