"""What `dla bench serve` compares: four ways to hold sequences in the same memory, and `generate` of transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_dla.config import ModelSection
from megatron_dla.errors import UserError
from megatron_dla.hf.random_model import random_model
from megatron_dla.serving.engine import Engine, EngineConfig
from megatron_dla.serving.engine.config import PAGE
from megatron_dla.study.parameters import equal_width

from .export import VOCAB, demo_model
from .serve_trace import Arrival, Outcome, Times

ROWS = 32  # of a decode call, where there are as many slots
PAGED_TOKENS = 128  # a slot for so many tokens of the pool: pages are what limits the paged system
SYSTEMS = {
    "static": "static batches, room for the longest (FasterTransformer)",
    "reserved": "continuous batching, room for the longest (Orca)",
    "paged": "continuous batching, pages of 16 tokens (vLLM)",
    "dla": "continuous batching, constant states",
}
GENERATE = "generate"


def make_models(backbone: str, changes: dict[str, Any], seed: int) -> dict[str, Any]:
    """A softmax and a DLA model of `make demo`'s size and the same number of parameters within 1 %, with random
    weights. `changes`: of the model's section."""
    section = demo_model() | {"backbone": backbone} | changes
    if backbone == "mamba2":
        section["num_groups"] = 1
    reference = ModelSection(**section)
    softmax = equal_width(replace(reference, pattern="A"), reference, VOCAB, "softmax", 8)
    made = {}
    for name, one in (("softmax", softmax), ("dla", reference)):
        torch.manual_seed(seed)
        made[name] = random_model(one, VOCAB).eval()
        made[name].generation_config.eos_token_id = None  # answers have the lengths of the trace
    return made


@dataclass(frozen=True)
class Memory:
    """What all systems share, and what their models take. Attributes: total, state: bytes. token: bytes of the keys and
    values of a token."""

    total: int
    state: int
    token: int

    @classmethod
    def of(cls, total: int, models: dict[str, Any]) -> Memory:
        small = EngineConfig(slots=1, kv_pages=1)
        (_, token), (state, _) = (Engine(models[name], None, small).bytes_each for name in ("softmax", "dla"))
        return cls(total, state, token)

    @property
    def tokens(self) -> int:
        """Places for keys and values, in whole pages."""
        return self.total // (PAGE * self.token) * PAGE

    def sequences(self, name: str, tokens: int, longest: int) -> int:
        """How many of that many tokens fit into a system that takes sequences of up to `longest`."""
        if name == "dla":
            return self.total // self.state
        return self.tokens // (-(-(tokens if name == "paged" else longest) // PAGE) * PAGE)

    def each(self, name: str, tokens: int, longest: int) -> int:
        """Bytes that one of them takes."""
        if name == "dla":
            return self.state
        return -(-(tokens if name == "paged" else longest) // PAGE) * PAGE * self.token


def engine_config(name: str, memory: Memory, longest: int, chunk: int = 128) -> EngineConfig:
    """Of one of SYSTEMS. Raises UserError: not one sequence fits."""
    slots = memory.sequences(name, PAGED_TOKENS, longest)
    if memory.sequences(name, longest, longest) < 1:
        need = memory.each(name, longest, longest) / 1e6
        raise UserError(f"{name}: {memory.total / 1e6:.1f} MB do not hold one sequence, which takes {need:.1f} MB")
    shared = EngineConfig(
        slots=slots, decode_rows=min(ROWS, slots), prefill_chunk=chunk, prefix_states=0, max_waiting=1 << 20
    )
    if name == "dla":
        return shared
    paged = replace(shared, kv_pages=memory.tokens // PAGE)
    return paged if name == "paged" else replace(paged, reserve_tokens=longest, whole_batches=name == "static")


class _Watch:
    """A stopping criterion of transformers that ends each row at its own length, and notes when tokens came."""

    def __init__(self, batch: Sequence[Arrival], times: Sequence[Times], progress: Callable[[int], None]) -> None:
        self.batch, self.times, self.progress = batch, times, progress
        self.width = max(len(x.prompt) for x in batch)
        self.wasted = self.held = self.running = 0.0
        self._last, self._count = time.perf_counter(), 0

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        now = time.perf_counter()
        took, self._last, self._count = now - self._last, now, self._count + 1
        live = [n for n, x in enumerate(self.batch) if self._count <= x.answer]
        used = sum(len(self.batch[n].prompt) + self._count for n in live)
        reserved = len(self.batch) * (self.width + self._count)
        self.wasted, self.held = self.wasted + took * (reserved - used), self.held + took * reserved
        self.running += took * len(live)
        for n in live:
            self.times[n].tokens.append(now)
        self.progress(len(live))
        return torch.tensor([self._count >= x.answer for x in self.batch], device=ids.device)


@torch.no_grad()
def generate_trace(model: Any, trace: Sequence[Arrival], rows: int, progress: Callable[[int], None]) -> Outcome:
    """`generate` of transformers on batches of at most `rows` requests that have come, padded to the longest prompt.

    `progress`: called with the number of new tokens.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    begin, done = time.perf_counter(), 0
    times = [Times(begin + one.at) for one in trace]
    wasted = held = running = 0.0
    while done < len(trace):
        time.sleep(max(0.0, begin + trace[done].at - time.perf_counter()))
        now = time.perf_counter() - begin
        batch = [x for x in trace[done : done + rows] if x.at <= now]
        watch = _Watch(batch, times[done : done + len(batch)], progress)
        ids = torch.zeros(len(batch), watch.width, dtype=torch.int64, device=model.device)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(batch):
            ids[row, watch.width - len(one.prompt) :] = torch.tensor(one.prompt)
            mask[row, watch.width - len(one.prompt) :] = 1
        greedy = GenerationConfig(max_new_tokens=max(x.answer for x in batch), do_sample=False, pad_token_id=0)
        model.generate(
            ids, attention_mask=mask, generation_config=greedy, stopping_criteria=StoppingCriteriaList([watch])
        )
        done += len(batch)
        wasted, held, running = wasted + watch.wasted, held + watch.held, running + watch.running
    seconds = max(x.tokens[-1] for x in times) - begin
    return Outcome(seconds, times, wasted / held, running / seconds)
