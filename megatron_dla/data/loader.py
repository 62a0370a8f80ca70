"""Batches for training: the same global sequence of rows at every data-parallel size, resumable at any step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_dla.data.packing import Batch, make_batch
from megatron_dla.data.prefetch import ReadAhead
from megatron_dla.data.shards import ShardReader, Verify
from megatron_dla.data.stream import TokenStream
from megatron_dla.errors import DataError
from megatron_dla.shard_index import ShardIndex

STATE_VERSION = 1
_IDENTITY = ("version", "split", "seed", "seq_len", "num_streams", "index")  # must agree to resume
_PROGRESS = ("steps", "tokens_seen")


class _Step(NamedTuple):
    """This rank's micro batches of a step, and the state of each of its streams after them."""

    batches: list[Batch]
    states: dict[str, Any]


class _Steps:
    """Makes the steps of one rank, one a call; the loader counts those that training has taken.

    Args:
        streams: {number: stream} of this rank. rows: global rows a step. size: rows a micro batch.
    """

    def __init__(self, streams: Mapping[int, TokenStream], rows: int, size: int, count: int) -> None:
        self.streams, self.size = streams, size
        self.sources = {row: streams[row % count] for row in range(rows) if row % count in streams}

    def __call__(self) -> _Step:
        rows = [stream.next_row() for stream in self.sources.values()]
        numbers, size = list(self.sources), self.size
        batches = [make_batch(rows[i : i + size], numbers[i : i + size]) for i in range(0, len(rows), size)]
        return _Step(batches, {str(j): stream.state_dict() for j, stream in self.streams.items()})


class TokenLoader:
    """The batches of one data-parallel rank.

    Row i of a step's global batch comes from stream i % num_streams, and rank r reads the streams j with
    j % dp_size == r: the rows of a step do not depend on the number of ranks.

    Attributes for logging: `steps`; `tokens_seen` (sum over all ranks); `epoch` (float: tokens seen divided by the
    split's tokens); `last_wait_s` and `total_wait_s` (seconds spent in `next_step`).

    Args:
        data_dir: directory with `index.json`, or a ShardIndex together with `root`, the shards' directory.
        verify: what is checked before a shard is read: "sha256", "size" or "none".
        prefetch_rows: rows that a thread reads ahead, rounded up to whole steps; 0 = none. State and counts are of the
            steps that `next_step` has returned.

    Raises DataError for missing data and for sizes that do not divide, naming the key and valid values.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str] | ShardIndex,
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
        prefetch_rows: int = 0,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.reader = ShardReader(data_dir, split, verify=verify, root=root)
        self.seq_len, self.seed, self.num_streams = seq_len, seed, num_streams
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.prefetch_rows = prefetch_rows
        self._check()
        self.streams = {
            j: TokenStream(self.reader, j, num_streams, seq_len=seq_len, seed=seed)
            for j in range(dp_rank, num_streams, dp_size)
        }
        self._split_tokens = sum(shard.tokens for shard in self.reader.shards)
        self.steps = self.tokens_seen = 0
        self.last_wait_s = self.total_wait_s = 0.0
        self._begin()

    def _begin(self) -> None:
        """From where the streams are."""
        steps = _Steps(self.streams, self.global_batch_size, self.micro_batch_size, self.num_streams)
        self._ahead = ReadAhead(steps, math.ceil(self.prefetch_rows / len(steps.sources)))
        self._states = {str(j): stream.state_dict() for j, stream in self.streams.items()}

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
        shards, streams, batch, dp = len(self.reader.shards), self.num_streams, self.global_batch_size, self.dp_size
        if streams > shards:
            raise DataError(
                f"num_streams = {streams}: split {self.reader.split!r} of {self.reader.root} has only {shards} shards; "
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
        return self.tokens_seen / self._split_tokens

    def next_step(self) -> list[Batch]:
        """This rank's micro batches of the next step, in order; each has `micro_batch_size` rows.

        Raises DataError for a damaged shard, naming it.
        """
        started = time.perf_counter()
        batches, self._states = self._ahead.get()
        self.steps += 1
        self.tokens_seen += self.global_batch_size * self.seq_len
        self.last_wait_s = time.perf_counter() - started
        self.total_wait_s += self.last_wait_s
        return batches

    def _identity(self) -> dict[str, Any]:
        values = (
            STATE_VERSION,
            self.reader.split,
            self.seed,
            self.seq_len,
            self.num_streams,
            self.reader.index.fingerprint,
        )
        return dict(zip(_IDENTITY, values, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state before the next step, with this rank's streams only; see `merge_states`."""
        return {**self._identity(), "steps": self.steps, "tokens_seen": self.tokens_seen, "streams": self._states}

    @staticmethod
    def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Merge the states of all ranks into one, which can be loaded at any dp_size that divides num_streams.

        Raises DataError if the states are from different runs or steps, overlap, or lack a stream.
        """
        if not states:
            raise DataError("no loader state to merge: pass the state of every data-parallel rank")
        merged = {**states[0], "streams": {}}
        for state in states:
            for name in (*_IDENTITY, *_PROGRESS):
                if state[name] != merged[name]:
                    raise DataError(
                        f"{name} differs between loader states: {merged[name]!r} and {state[name]!r}; "
                        "use states from one checkpoint"
                    )
            if twice := merged["streams"].keys() & state["streams"].keys():
                raise DataError(f"loader states overlap in streams {sorted(twice)}; pass each rank's state once")
            merged["streams"].update(state["streams"])
        _need(merged, range(merged["num_streams"]))
        merged["streams"] = {str(j): merged["streams"][str(j)] for j in range(merged["num_streams"])}
        return merged

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a (merged) state; reads one shard per stream.

        Raises DataError if split, seed, seq_len, num_streams or the data differ, or a stream of this rank is missing.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                what = "the data (index fingerprint)" if name == "index" else name
                raise DataError(
                    f"cannot resume the loader: {what} was {state.get(name)!r} in the checkpoint and is {value!r} now; "
                    "set it back, or start from the beginning of the data, without this loader state"
                )
        _need(state, self.streams)
        self.close()
        for j, stream in self.streams.items():
            stream.load_state_dict(state["streams"][str(j)])
        self.steps, self.tokens_seen = int(state["steps"]), int(state["tokens_seen"])
        self._begin()


def _need(state: dict[str, Any], streams: Any) -> None:
    missing = [j for j in streams if str(j) not in state["streams"]]
    if missing:
        raise DataError(f"the loader state lacks streams {missing}; merge the states of all ranks with merge_states")


def _some(values: list[int]) -> str:
    if not values:
        return "no value"
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
