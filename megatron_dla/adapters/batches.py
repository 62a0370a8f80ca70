"""Micro batches for training an adapter: packed episodes, or plain documents from shards. The same global sequence of
rows at every data-parallel size, resumable at any step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from megatron_dla.adapters.calls import MemoryCall
from megatron_dla.adapters.episodes import Episode, EpisodeBatch, collate
from megatron_dla.adapters.memory import MemoryInputs
from megatron_dla.data import TokenLoader
from megatron_dla.data.packing import Batch
from megatron_dla.errors import DataError
from megatron_dla.kernels.dla.naive import document_starts

CHANGED = {
    "episodes": "the digest of the episodes (episodes.train, write_length, read_length, recent_messages, tokenizer)",
    "row_length": "episodes.row_length",
    "global_batch_size": "training.global_batch_size",
    "seed": "run.seed",
}


class EpisodeBatches:
    """Rows of whole episodes, in an order drawn anew each epoch from the seed.

    Args:
        row_length: tokens a row; as many episodes as fit share it. held_out: for validation, in their own order.
        dp_rank, dp_size: every rank draws the same order and takes its rows.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        held_out: Sequence[Episode],
        *,
        row_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        if not episodes:
            raise DataError("episodes.train holds no episode: check the file")
        self.episodes, self.kept, self.seq_len, self.seed = list(episodes), list(held_out), row_length, seed
        self.batch, self.micro, self.rank, self.size = global_batch_size, micro_batch_size, dp_rank, dp_size
        self.steps = 0
        for name, found in (("train", self.episodes), ("valid", self.kept)):
            if found and (longest := max(map(len, found))) > row_length:
                raise DataError(
                    f"an episode of {longest} tokens in episodes.{name} does not fit a row of {row_length}: raise "
                    "episodes.row_length, or shorten write_length and read_length"
                )
        self.digest = _digest(self.episodes)
        self._rows = self._stream()

    def _stream(self) -> Iterator[list[Episode]]:
        epoch = 0
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.episodes))
            yield from fill_rows([self.episodes[i] for i in order], self.seq_len)
            epoch += 1

    def next_step(self) -> list[EpisodeBatch]:
        """This rank's micro batches of the next step."""
        rows = [next(self._rows) for _ in range(self.batch)]
        share = self.batch // self.size
        self.steps += 1
        return self._batches(rows[self.rank * share : (self.rank + 1) * share])

    def held_out(self) -> list[EpisodeBatch]:
        """This rank's share of the held-out rows; every rank has as many batches (the last ones may repeat a row
        outside the loss)."""
        rows = list(fill_rows(self.kept, self.seq_len))
        unit = self.size * self.micro
        spare = -len(rows) % unit
        padded = [*rows, *rows[:1] * spare]
        counts = [i < len(rows) for i in range(len(padded))]
        mine = slice(self.rank, None, self.size)
        return self._batches(padded[mine], counts[mine])

    def _batches(self, rows: list[list[Episode]], counts: Sequence[bool] | None = None) -> list[EpisodeBatch]:
        found = []
        for i in range(0, len(rows), self.micro):
            batch = collate(rows[i : i + self.micro], self.seq_len)
            if counts is not None:
                weights = torch.tensor([float(c) for c in counts[i : i + self.micro]])
                batch = batch._replace(loss_mask=batch.loss_mask * weights[:, None])
            found.append(batch)
        return found

    def call(self, batch: EpisodeBatch, device: torch.device) -> MemoryCall:
        """What the memories are told."""
        flags = {k: None if x is None else x.to(device) for k, x in vars(batch.inputs).items()}
        return MemoryCall(MemoryInputs(**flags))

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "seed": self.seed, "episodes": self.digest, "row_length": self.seq_len,
                "global_batch_size": self.batch}  # fmt: skip

    def merge(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """One state of all data-parallel ranks': here they are the same."""
        return states[0]

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            DataError: other episodes, seed, rows or batch than then.
        """
        for key, value in self.state().items():
            if key != "steps" and state.get(key) != value:
                raise DataError(
                    f"cannot resume: {CHANGED.get(key, key)} was {state.get(key)!r} in the checkpoint and is {value!r} "
                    "now; set it back, or use another run.name"
                )
        self._rows = self._stream()
        self.steps = int(state["steps"])
        for _ in range(self.steps * self.batch):
            next(self._rows)


def _digest(episodes: Sequence[Episode]) -> str:
    """Of all tokens, message numbers and answers, in order."""
    found = hashlib.sha256()
    for episode in episodes:
        for part in vars(episode).values():
            found.update(len(part).to_bytes(8, "little") + part.tobytes())
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


class DocumentBatches:
    """Plain documents from shards: a loss on every token, memories emptied at each document."""

    def __init__(self, loader: TokenLoader) -> None:
        self.loader, self.seq_len = loader, loader.seq_len

    def next_step(self) -> list[Batch]:
        return self.loader.next_step()

    def held_out(self) -> list[Batch]:
        return []

    def call(self, batch: Batch, device: torch.device) -> MemoryCall:
        return MemoryCall(MemoryInputs(reset=document_starts(batch.cu_seqlens.to(device), *batch.tokens.shape, device)))

    def state(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def merge(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return TokenLoader.merge_states(states)

    def load_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)
