"""How many facts does a δ-mem state hold? The memory of one layer alone, trained to recall, over the number of facts.

A fact is one token, the sum of an embedding of its key and one of its value; N facts are written one after another,
then every key is asked once, in another order, without writing. Embeddings, `DeltaMemory` and readout are trained
together, on numbers of facts that differ from step to step, so neither a backbone nor sentences limit what is
recalled: only the rule, its gates and the rank do. The reference is a matrix that holds one value for each of r
orthogonal keys exactly, and guesses the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.memory import DeltaMemory, MemoryInputs
from megatron_dla.evaluation.stats import Interval, bootstrap_mean

KEYS, VALUES, HIDDEN = 128, 16, 64


@dataclass(frozen=True)
class Training:
    """steps: optimizer steps of `batch` rows each, by AdamW at `lr` with a linear warm-up and a cosine decay to 0."""

    steps: int = 3000
    batch: int = 32
    lr: float = 1e-2

    @property
    def warmup(self) -> int:
        return min(100, max(1, self.steps // 10))


def exact(keys: int, facts: int) -> float:
    """Right answers of a matrix that holds the values of `keys` orthogonal keys, where so many `facts` are asked."""
    held = min(1.0, keys / facts)
    return held + (1 - held) / VALUES


def draw(count: int, facts: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of the facts, and the order in which they are asked: int64 [count, facts] each."""
    keys = rng.permuted(np.tile(np.arange(KEYS), (count, 1)), axis=1)[:, :facts]
    order = rng.permuted(np.tile(np.arange(facts), (count, 1)), axis=1)
    values = rng.integers(0, VALUES, (count, facts))
    return torch.from_numpy(keys), torch.from_numpy(values), torch.from_numpy(order)


class Recall(nn.Module):
    """Facts in, logits of the asked values out.

    Args:
        config: of the memory; its correction of the output alone is used. seed: of all parameters.
    """

    def __init__(self, config: DeltaMemConfig, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.keys, self.values, self.readout = (
            nn.Parameter(torch.randn(rows, HIDDEN, generator=generator)) for rows in (KEYS, VALUES, VALUES)
        )
        self.memory = DeltaMemory(config, HIDDEN, HIDDEN)
        self.memory.initialise(seed, "capacity", torch.eye(HIDDEN), torch.eye(HIDDEN))

    def forward(self, keys: Tensor, values: Tensor, order: Tensor) -> Tensor:
        """int64 [B, N] each -> logits [B, N, VALUES] of the facts in the asked order."""
        B, N = keys.shape
        told, asked = self.keys[keys] + self.values[values], self.keys[keys.gather(1, order)]
        x = F.rms_norm(torch.cat([told, asked], dim=1), (HIDDEN,))  # [B, 2 N, HIDDEN]
        write = torch.arange(2 * N).expand(B, -1) < N
        state = self.memory.initial_state(B, x.device)
        reads = self.memory.scan(self.memory.project(x), state, MemoryInputs(write=write)).reads[:, N:]
        return F.linear(self.memory.delta_o(reads, x[:, N:]), self.readout)


def train(
    config: DeltaMemConfig, most: int, training: Training, seed: int, report: Callable[[int, float], None] | None = None
) -> Recall:
    """A memory that has learned to recall 1 to `most` facts. `report`: called with each step's number and loss."""
    model, rng = Recall(config, seed), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), training.lr, weight_decay=0.0)
    for step in range(training.steps):
        after = (step - training.warmup) / max(1, training.steps - training.warmup)
        share = (step + 1) / training.warmup if after < 0 else 0.5 + 0.5 * float(np.cos(np.pi * after))
        optimizer.param_groups[0]["lr"] = training.lr * share
        facts = int(np.exp(rng.uniform(0, np.log(most + 1))))  # as often 1 to 2 as 8 to 16
        keys, values, order = draw(training.batch, facts, rng)
        loss = F.cross_entropy(model(keys, values, order).flatten(0, 1), values.gather(1, order).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if report is not None:
            report(step + 1, loss.item())
    return model


@torch.no_grad()
def measure(model: Recall, facts: int, episodes: int, seed: int) -> Interval:
    """Right answers to all keys of episodes with so many facts, and their 95 % interval over the episodes."""
    rng, right = np.random.default_rng([seed, facts]), []
    for done in range(0, episodes, 200):
        keys, values, order = draw(min(200, episodes - done), facts, rng)
        answers = model(keys, values, order).argmax(-1)
        right.append((answers == values.gather(1, order)).double().mean(1).numpy())
    return bootstrap_mean(np.concatenate(right), seed=seed)
