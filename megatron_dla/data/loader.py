"""Batches for training: the same global sequence of rows at every data-parallel size, resumable at any step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from megatron_dla.data.best_fit import BestFitStream
from megatron_dla.data.mixture import Limit, MixedStream, Stages, check_tokenizers, weights_at
from megatron_dla.data.packing import Batch, make_batch
from megatron_dla.data.prefetch import ReadAhead
from megatron_dla.data.shards import ShardReader, Verify
from megatron_dla.data.state import check_same, check_streams, count_in, merge_states, to_version_1, to_version_2
from megatron_dla.data.stream import ShardStream, TokenStream
from megatron_dla.errors import DataError
from megatron_dla.shard_index import ShardIndex

STATE_VERSION = 2
ONLY = "data"  # the name of the source where there is one directory
Packing = Literal["concat", "best_fit"]
PACKINGS: dict[str, type[ShardStream]] = {"concat": TokenStream, "best_fit": BestFitStream}
Data = str | os.PathLike[str] | ShardIndex


class _Step(NamedTuple):
    """This rank's micro batches of a step, and after them the state of each of its streams and the sum of their
    [documents, cut, padding]."""

    batches: list[Batch]
    states: dict[str, Any]
    counts: list[int]


class _Steps:
    """Makes the steps of one rank, one a call; the loader counts those that training has taken."""

    def __init__(self, loader: TokenLoader) -> None:
        self.streams, self.stages, self.size = loader.streams, loader.stages, loader.micro_batch_size
        rows, count = range(loader.global_batch_size), loader.num_streams
        self.by_row = {row: self.streams[row % count] for row in rows if row % count in self.streams}
        self.tokens_seen, self.step_tokens = loader.tokens_seen, len(rows) * loader.seq_len

    def __call__(self) -> _Step:
        weights = weights_at(self.stages, self.tokens_seen)
        rows = [stream.next_row(weights) for stream in self.by_row.values()]
        self.tokens_seen += self.step_tokens
        numbers, size = list(self.by_row), self.size
        batches = [make_batch(rows[i : i + size], numbers[i : i + size]) for i in range(0, len(rows), size)]
        return _Step(batches, self.states(), self.counts())

    def states(self) -> dict[str, Any]:
        return {str(j): stream.state_dict() for j, stream in self.streams.items()}

    def counts(self) -> list[int]:
        sources = [source for stream in self.streams.values() for source in stream.sources.values()]
        return [sum(getattr(source, name) for source in sources) for name in ("documents", "cut", "padding")]


class TokenLoader:
    """The batches of one data-parallel rank.

    Row i of a step's global batch comes from stream i % num_streams, and rank r reads the streams j with
    j % dp_size == r: the rows of a step do not depend on the number of ranks. With several sources, each stream mixes
    its own parts of them.

    Attributes for logging: `steps`; `tokens_seen` (positions, sum over all ranks); `epoch` (float: tokens seen divided
    by the split's tokens, of all sources together); `mixtures` (the weights of the run so far); `last_wait_s` and
    `total_wait_s` (seconds spent in `next_step`).

    Args:
        data_dir: directory with `index.json`, or a ShardIndex together with `root`, the shards' directory; for a
            mixture, {name: one of these}.
        verify: what is checked before a shard is read: "sha256", "size" or "none".
        packing: "concat" cuts rows from the joined documents, "best_fit" cuts no document that fits into a row.
        stages: weights of the sources; None: equal ones. limits: where sources end.
        prefetch_rows: rows that a thread reads ahead, rounded up to whole steps; 0 = none. State and counts are of the
            steps that `next_step` has returned.

    Raises DataError for missing data and for sizes that do not divide, naming the key and valid values.
    """

    def __init__(
        self,
        data_dir: Data | Mapping[str, Data],
        split: str = "train",
        *,
        seq_len: int,
        global_batch_size: int,
        micro_batch_size: int,
        num_streams: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
        verify: Verify = "sha256",
        packing: Packing = "concat",
        stages: Stages | None = None,
        limits: Mapping[str, Limit] | None = None,
        prefetch_rows: int = 0,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        self._single = not isinstance(data_dir, Mapping)
        sources: Mapping[str, Data] = data_dir if isinstance(data_dir, Mapping) else {ONLY: data_dir}
        self.readers = {name: ShardReader(one, split, verify=verify, root=root) for name, one in sources.items()}
        check_tokenizers({name: reader.index for name, reader in self.readers.items()})
        self.split, self.packing = split, packing
        self.seq_len, self.seed, self.num_streams = seq_len, seed, num_streams
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.prefetch_rows = prefetch_rows
        self._check()
        self.stages = stages or [(0, dict.fromkeys(sources, 1.0))]
        limits = limits or {}
        plain = [[start, dict(weights)] for start, weights in self.stages]
        self.mixtures = [{"from_tokens": 0, "stages": plain, "limits": {name: list(limits[name]) for name in limits}}]
        self.streams = {j: self._stream(j, limits) for j in range(dp_rank, num_streams, dp_size)}
        self.source_tokens = {
            name: sum(shard.tokens for shard in reader.shards) for name, reader in self.readers.items()
        }
        self.steps = self.tokens_seen = 0
        self.last_wait_s = self.total_wait_s = 0.0
        self._begin()

    def _stream(self, number: int, limits: Mapping[str, Limit]) -> MixedStream:
        kind, options = PACKINGS[self.packing], {"seq_len": self.seq_len, "seed": self.seed}
        sources = {
            name: kind(reader, number, self.num_streams, max_epochs=limits.get(name, Limit()).epochs, **options)
            for name, reader in self.readers.items()
        }
        most = {name: limit.tokens for name, limit in limits.items()}
        return MixedStream(sources, number, self.seq_len, self.num_streams, most)

    def _begin(self) -> None:
        """From where the streams are."""
        steps = _Steps(self)
        self._ahead = ReadAhead(steps, math.ceil(self.prefetch_rows / len(steps.by_row)))
        self._states, self._counts, self._first_step = steps.states(), steps.counts(), self.steps

    def close(self) -> None:
        """End the thread that reads ahead; state and counts stay."""
        self._ahead.close()

    def _check(self) -> None:
        sizes = ("seq_len", "global_batch_size", "micro_batch_size", "num_streams", "dp_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise DataError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.prefetch_rows < 0:
            raise DataError(f"prefetch_rows = {self.prefetch_rows}: must be at least 0 (0 = off)")
        if not 0 <= self.dp_rank < self.dp_size:
            raise DataError(f"dp_rank = {self.dp_rank}: must be 0 to {self.dp_size - 1} (dp_size = {self.dp_size})")
        if self.packing not in PACKINGS:
            raise DataError(f"packing = {self.packing!r}: must be one of {', '.join(PACKINGS)}")
        least = min(self.readers.values(), key=lambda reader: len(reader.shards))
        shards, streams, batch, dp = len(least.shards), self.num_streams, self.global_batch_size, self.dp_size
        if streams > shards:
            raise DataError(
                f"num_streams = {streams}: split {self.split!r} of {least.root} has only {shards} shards; "
                f"use at most {shards}, or rebuild with `dla data shards --min-train-shards {streams}`"
            )
        if streams % dp:
            good = [n for n in range(dp, shards + 1, dp) if batch % n == 0]
            raise DataError(
                f"num_streams = {streams} is not a multiple of dp_size = {dp}; use {_some(good)} "
                f"({shards} shards, global_batch_size = {batch})"
            )
        if batch % streams:
            below, above = batch // streams * streams, (batch // streams + 1) * streams
            raise DataError(
                f"global_batch_size = {batch} is not a multiple of num_streams = {streams}; "
                f"use {f'{below} or ' if below else ''}{above}, or num_streams = "
                f"{_some([n for n in range(dp, min(batch, shards) + 1, dp) if batch % n == 0])}"
            )
        if batch // dp % self.micro_batch_size:
            rank = batch // dp
            raise DataError(
                f"micro_batch_size = {self.micro_batch_size} does not divide the {rank} rows of a rank "
                f"(global_batch_size = {batch} / dp_size = {dp}); use "
                f"{_some([n for n in range(1, rank + 1) if rank % n == 0])}"
            )

    @property
    def epoch(self) -> float:
        """Passes over the split so far, averaged over all streams."""
        return self.tokens_seen / sum(self.source_tokens.values())

    def counts(self) -> list[int]:
        """This rank's numbers for `report`, which takes their sums over all ranks."""
        states = self._states.values()
        read = [sum(state["sources"][name]["tokens"] for state in states) for name in self.readers]
        return [*read, *(sum(state["drawn"][name] for state in states) for name in self.readers), *self._counts]

    def report(self, counts: Sequence[int]) -> dict[str, Any]:
        """Metrics. `padding_share` is of the positions and `cut_share` of the documents of this process's rows so far;
        for a mixture, `mix` is the share of each source in the tokens since the present weights began."""
        n = len(self.readers)
        read, drawn, (documents, cut, padding) = counts[:n], counts[n : 2 * n], counts[2 * n :]
        positions = (self.steps - self._first_step) * self.global_batch_size * self.seq_len
        metrics: dict[str, Any] = {"padding_share": padding / max(1, positions), "cut_share": cut / max(1, documents)}
        if self._single:
            return metrics
        total = max(1, sum(drawn))
        return metrics | {
            "mix": {name: x / total for name, x in zip(self.readers, drawn, strict=True)},
            "source_epochs": {name: x / self.source_tokens[name] for name, x in zip(self.readers, read, strict=True)},
        }

    def next_step(self) -> list[Batch]:
        """This rank's micro batches of the next step, in order; each has `micro_batch_size` rows.

        Raises DataError for a damaged shard, naming it.
        """
        started = time.perf_counter()
        batches, self._states, self._counts = self._ahead.get()
        self.steps += 1
        self.tokens_seen += self.global_batch_size * self.seq_len
        self.last_wait_s = time.perf_counter() - started
        self.total_wait_s += self.last_wait_s
        return batches

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state before the next step, with this rank's streams only; see `merge_states`."""
        progress = {"steps": self.steps, "tokens_seen": self.tokens_seen}
        state = {**self._identity(), "mixtures": self.mixtures, **progress, "streams": self._states}
        return to_version_1(state, ONLY) if self._single and self.packing == "concat" else state

    merge_states = staticmethod(merge_states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a (merged) state; reads one shard for each source of each stream.

        Weights, stages and limits may have changed, and there may be new sources, which begin at their beginning;
        `mixtures` then gets another entry.

        Raises DataError if split, seed, seq_len, num_streams, packing or the data of a source differ, or if a source or
        a stream of this rank is missing.
        """
        identity = self._identity()
        state = to_version_2(state, identity["sources"])
        check_same(state, identity)
        check_streams(state, self.streams)
        self.close()
        for j, stream in self.streams.items():
            stream.load_state_dict(state["streams"][str(j)])
        self.steps, self.tokens_seen = (count_in(state, key) for key in ("steps", "tokens_seen"))
        now = {**self.mixtures[-1], "from_tokens": self.tokens_seen}
        before = state["mixtures"]
        same = before and {**before[-1], "from_tokens": self.tokens_seen} == now
        self.mixtures = [*before, *([] if same else [now])]
        self._begin()

    def _identity(self) -> dict[str, Any]:
        """What must agree to resume."""
        return {
            "version": STATE_VERSION, "split": self.split, "seed": self.seed, "seq_len": self.seq_len,
            "num_streams": self.num_streams, "packing": self.packing,
            "sources": {name: reader.index.fingerprint for name, reader in self.readers.items()},
        }  # fmt: skip


def _some(values: list[int]) -> str:
    if not values:
        return "no value"
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
