"""Batches of packed episodes: the same global sequence of rows at every data-parallel size, resumable at any step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from megatron_dla.data.state import count_in
from megatron_dla.errors import DataError
from megatron_dla.tasks.adapter.episodes import Episode, EpisodeBatch, collate

# the keys behind what must not change when a run resumes
CHANGED = {
    "episodes": "the digest of the episodes (episodes.train, write_length, read_length, recent_messages, in_prompt, "
    "tokenizer)",
    "row_length": "episodes.row_length",
    "global_batch_size": "training.global_batch_size",
    "seed": "run.seed",
}


class EpisodeLoader:
    """Rows of whole episodes, shuffled by the seed in each epoch.

    Args:
        row_length: tokens a row; as many episodes as fit share it.
        dp_rank, dp_size: every rank draws the same order and takes its rows.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        *,
        row_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        self.episodes, self.row_length, self.seed = list(episodes), row_length, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.steps, self.total_wait_s = 0, 0.0
        self.digest = _digest(self.episodes)
        self._rows = self._stream()

    def _stream(self) -> Iterator[list[Episode]]:
        epoch = 0
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.episodes))
            yield from fill_rows([self.episodes[i] for i in order], self.row_length)
            epoch += 1

    @property
    def tokens_seen(self) -> int:
        """By all data-parallel ranks together, padding included."""
        return self.steps * self.global_batch_size * self.row_length

    def next_step(self) -> list[EpisodeBatch]:
        """This rank's micro batches of the next step."""
        started = time.perf_counter()
        rows = [next(self._rows) for _ in range(self.global_batch_size)]
        share = self.global_batch_size // self.dp_size
        mine = rows[self.dp_rank * share : (self.dp_rank + 1) * share]
        size = self.micro_batch_size
        self.steps += 1
        batches = [collate(mine[i : i + size], self.row_length) for i in range(0, share, size)]
        self.total_wait_s += time.perf_counter() - started
        return batches

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "seed": self.seed, "episodes": self.digest, "row_length": self.row_length,
                "global_batch_size": self.global_batch_size}  # fmt: skip

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state from those of all data-parallel ranks, which are equal."""
        return states[0]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            DataError: other episodes, seed, rows or batch size than then.
        """
        for key, value in self.state_dict().items():
            if key != "steps" and state.get(key) != value:
                raise DataError(
                    f"cannot resume: {CHANGED[key]} was {state.get(key)!r} in the checkpoint and is {value!r} now; "
                    "set it back, or use another run.name"
                )
        self._rows = self._stream()
        self.steps = count_in(state, "steps")
        for _ in range(self.steps * self.global_batch_size):
            next(self._rows)


def held_out_batches(
    episodes: Sequence[Episode], *, row_length: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[EpisodeBatch]:
    """This rank's share of the held-out rows, in their own order; every rank has as many batches (the last ones may
    repeat a row outside the loss)."""
    rows = list(fill_rows(episodes, row_length))
    padded = [*rows, *rows[:1] * (-len(rows) % (dp_size * micro_batch_size))]
    mine = range(dp_rank, len(padded), dp_size)
    found = []
    for i in range(0, len(mine), micro_batch_size):
        numbers = mine[i : i + micro_batch_size]
        batch = collate([padded[n] for n in numbers], row_length)
        weights = torch.tensor([float(n < len(rows)) for n in numbers])
        masks = {name: getattr(batch, name) * weights[:, None] for name in ("loss_mask", "keep")}
        found.append(batch._replace(**masks))
    return found


def check_lengths(episodes: Sequence[Episode], key: str, row_length: int) -> None:
    """DataError where an episode of the file in episodes.`key` is longer than a row."""
    if (longest := max(map(len, episodes))) > row_length:
        raise DataError(
            f"an episode of {longest} tokens in episodes.{key} does not fit a row of {row_length}: raise "
            "episodes.row_length, or shorten write_length and read_length"
        )


def _digest(episodes: Sequence[Episode]) -> str:
    """Of all tokens, message numbers and answers, in order."""
    found = hashlib.sha256()
    for episode in episodes:
        for part in (episode.write_ids, episode.write_messages, episode.read_ids, episode.answer):
            found.update(len(part).to_bytes(8, "little") + part.tobytes())
        if episode.in_prompt:
            found.update(b"in prompt")
    return found.hexdigest()[:16]


def fill_rows(episodes: Sequence[Episode], row_length: int) -> Iterator[list[Episode]]:
    """Episodes, none longer than a row, in order, as many a row as fit."""
    row: list[Episode] = []
    used = 0
    for episode in episodes:
        if row and used + len(episode) > row_length:
            yield row
            row, used = [], 0
        row.append(episode)
        used += len(episode)
    if row:
        yield row
