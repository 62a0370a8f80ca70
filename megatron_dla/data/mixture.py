"""Mixtures of sources: which one the next row comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_dla.data.packing import Row
from megatron_dla.data.shards import ShardReader
from megatron_dla.data.state import count_in
from megatron_dla.data.stream import ShardStream
from megatron_dla.errors import DataError
from megatron_dla.shard_index import ShardIndex

Stages = Sequence[tuple[int, Mapping[str, float]]]
"""[(tokens seen by the run, weights from there on)], in order, the first from 0. A source not named has weight 0."""


class Limit(NamedTuple):
    """Where a source ends: after so many passes, and after so many tokens in all streams together; 0 = never."""

    epochs: int = 0
    tokens: int = 0


def weights_at(stages: Stages, tokens_seen: int) -> Mapping[str, float]:
    """The weights of the step that begins after `tokens_seen` tokens."""
    return [weights for start, weights in stages if start <= tokens_seen][-1]


def described(mixture: Mapping[str, Any]) -> str:
    """An entry of `TokenLoader.mixtures` in words: the weights of each stage, and where sources end."""
    stages = []
    for start, weights in mixture["stages"]:
        when = f"from token {start:,} on " if start else ""
        stages.append(when + ", ".join(f"{name} {weight:g}" for name, weight in weights.items()))
    ends = []
    for name, (epochs, tokens) in mixture["limits"].items():
        limits = [f"{epochs:g} epochs"] * bool(epochs) + [f"{tokens:,} tokens"] * bool(tokens)
        ends += [f"{name} ends after {' or '.join(limits)}"] if limits else []
    return "; ".join(stages + ends)


def planned_tokens(stages: Stages, total: int) -> dict[str, int]:
    """Tokens of each source in a run of `total` tokens, if none is used up."""
    planned: dict[str, float] = {}
    ends = [start for start, _ in stages[1:]] + [total]
    for (start, weights), end in zip(stages, ends, strict=True):
        for name, weight in weights.items():
            share = weight / sum(weights.values())
            planned[name] = planned.get(name, 0) + share * max(0, min(end, total) - start)
    return {name: round(tokens) for name, tokens in planned.items()}


def least_tokens(readers: Mapping[str, ShardReader], limits: Mapping[str, Limit], streams: int, seed: int) -> float:
    """Tokens of the stream that has the least, infinite where a source has no limit; streams differ by some shards."""
    held = np.zeros(streams)
    for name, reader in readers.items():
        limit = limits.get(name, Limit())
        epochs = np.full(streams, 0.0 if limit.epochs else np.inf)
        tokens = np.array([shard.tokens for shard in reader.shards])
        for epoch in range(limit.epochs):
            order = reader.order(seed, epoch)
            np.add.at(epochs, np.arange(len(order)) % streams, tokens[order])
        held += np.minimum(epochs, limit.tokens / streams if limit.tokens else np.inf)
    return float(held.min())


def check_tokenizers(indexes: Mapping[str, ShardIndex]) -> None:
    """Raises DataError if two sources were not made with the same tokenizer."""
    (first, index), *others = indexes.items()
    for name, other in others:
        if other.tokenizer_sha256 != index.tokenizer_sha256:
            raise DataError(
                f"vocabulary mismatch: source {name!r} was made with the tokenizer {other.tokenizer_sha256[:12]}, "
                f"{first!r} with {index.tokenizer_sha256[:12]}: build the shards of all sources with one tokenizer"
            )


class MixedStream:
    """Stream `number` of `count`: each row is of the source that is furthest behind its share of the tokens.

    So a stream is within a row of its weights at any time. Streams begin at different places of that sequence, one row
    apart, and the rows of a step are close to the weights too. Where a source has ended, or has given this
    stream its part of `max_tokens`, to the next whole row, the others share its weight.

    Position: that of each source; `weights`, the last ones used, and `drawn`, the tokens of each source under them.

    Attributes: `tokens`: of each source, since the beginning of the run.
    """

    def __init__(
        self, sources: Mapping[str, ShardStream], number: int, seq_len: int, count: int = 1,
        max_tokens: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.sources = dict(sorted(sources.items()))  # ties must not depend on the order of a config
        self.most = {name: limit / count for name, limit in (max_tokens or {}).items() if limit}
        self.number, self.seq_len = number, seq_len
        self.tokens = dict.fromkeys(self.sources, 0)
        self.drawn = dict.fromkeys(self.sources, 0)
        self.weights: dict[str, float] = {}
        self._head = self.drawn  # tokens that this stream is counted as having drawn before its first row

    def next_row(self, weights: Mapping[str, float]) -> Row:
        """A row of `seq_len` tokens. Raises DataError for a damaged shard, and where all sources have ended."""
        if weights != self.weights:
            self._use(weights)
            self.drawn = dict.fromkeys(self.sources, 0)
        while names := [name for name in self.sources if self._weight(name) and not self._ended(name)]:
            name = self._behind(names, self._head, self.drawn)
            source = self.sources[name]
            before = source.tokens
            if (row := source.next_row()) is not None:
                self.tokens[name] += source.tokens - before
                self.drawn[name] += source.tokens - before
                return row
        raise DataError(
            f"stream {self.number} has no data left: every source with a weight ({', '.join(weights)}) has had its "
            "max_epochs or max_tokens; raise them, add a source, or train for fewer steps"
        )

    def _ended(self, name: str) -> bool:
        return self.sources[name].ended or self.tokens[name] >= self.most.get(name, math.inf)

    def _weight(self, name: str) -> float:
        return self.weights.get(name, 0)

    def _behind(self, names: list[str], *drawn: Mapping[str, int]) -> str:
        """The source to draw next; the first one of equals."""
        so_far = {name: sum(part[name] for part in drawn) for name in names}
        total, weight = sum(so_far.values()) + self.seq_len, sum(map(self._weight, names))
        return max(names, key=lambda name: self._weight(name) * total - weight * so_far[name])

    def _use(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)
        self._head = dict.fromkeys(self.sources, 0)
        names = [name for name in self.sources if self._weight(name)]
        for _ in range(self.number if len(names) > 1 else 0):
            self._head[self._behind(names, self._head)] += self.seq_len

    def state_dict(self) -> dict[str, Any]:
        """Position before the next row, JSON-serialisable."""
        sources = {name: {"tokens": self.tokens[name], **s.state_dict()} for name, s in self.sources.items()}
        return {"weights": self.weights, "drawn": dict(self.drawn), "sources": sources}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position; reads one shard a source. A source that the state does not have begins at its beginning.

        Raises DataError if a position does not exist.
        """
        if wrong := {name: x for name, x in state["weights"].items() if not _is_weight(x)}:
            raise DataError(f"the loader state of stream {self.number} has weights {wrong}; use another checkpoint")
        self._use(state["weights"])
        for name, source in self.sources.items():
            self.drawn[name] = count_in(state["drawn"], name) if name in state["drawn"] else 0
            if name in state["sources"]:
                self.tokens[name] = count_in(state["sources"][name], "tokens")
                source.load_state_dict(state["sources"][name])


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf
