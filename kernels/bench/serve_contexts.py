"""Serving at contexts of 512 to 64K tokens: what fits, what is wasted, and how fast what fits is decoded.

Reading prompts of 64K tokens by the dozen takes hours on a CPU. So requests are scheduled without a model (the
scheduler of the engine never looks at a tensor), and decode calls are timed on states and pages that are there already.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from megatron_dla.console import progress_bar
from megatron_dla.serving.engine import EngineConfig, Request, SamplingParams
from megatron_dla.serving.engine.config import PAGE
from megatron_dla.serving.engine.models import ExportedModel
from megatron_dla.serving.engine.runner import ModelRunner
from megatron_dla.serving.engine.scheduler import Phase, Scheduler, Sequence
from megatron_dla.serving.engine.states import state_bytes
from megatron_dla.serving.engine.stats import memory_use

from .export import VOCAB
from .serve_systems import SYSTEMS, Memory, engine_config
from .serve_trace import ANSWER_MEAN, SIGMA, log_normal

REQUESTS, DECODED, STEPS, PROMPT, CHUNK = 60, 32, 5, 64, 1024  # DECODED: sequences that are timed at most
PROMPT_SHARE, PROMPT_SIGMA = 0.5, 0.4  # mean of the prompts over the context


@dataclass(frozen=True)
class Scheduled:
    """Means over the steps of a schedule. Attributes: waste: share of the reserved memory that holds nothing. held:
    sequences in memory; active: those of them that have not ended."""

    waste: float
    held: float
    active: float


class NoStore:
    """In the place of the runner: there are no states to move."""

    def save(self, sequence: Sequence) -> None: ...

    def load(self, sequence: Sequence) -> None: ...

    def move(self, sequence: Sequence, row: int) -> None: ...

    def snapshot(self, sequence: Sequence) -> Any: ...

    def begin(self, sequence: Sequence, snapshot: Any) -> None: ...


def schedule(name: str, memory: Memory, context: int, seed: int) -> Scheduled:
    """REQUESTS requests of at most `context` tokens, all there at the beginning: prompts of half of it in the mean,
    answers as in the trace, of at most a quarter of it."""
    config = engine_config(name, memory, context)
    windows: list[int | None] = [] if name == "dla" else [None]
    row, token = (memory.state, []) if name == "dla" else (0, [memory.token])
    scheduler, rng = Scheduler(config, NoStore(), windows), random.Random(seed)
    for number in range(REQUESTS):
        answer = log_normal(rng, ANSWER_MEAN, SIGMA, context // 4)
        prompt = log_normal(rng, context * PROMPT_SHARE, PROMPT_SIGMA, context - answer)
        scheduler.add(Sequence(Request((1,) * prompt, SamplingParams(max_new_tokens=answer)), number))

    def generate(one: Sequence) -> None:
        one.tokens.append(0)
        if len(one.tokens) == one.request.sampling.max_new_tokens:
            scheduler.end(one)

    waste, held, active, steps = 0.0, 0, 0, 0
    while scheduler.active:
        for one in scheduler.begin_step():
            scheduler.decoded(one)
            generate(one)
        while (work := scheduler.next_read()) is not None:
            scheduler.was_read(*work)
            if work[0].is_read:
                generate(work[0])
        reserved, used = memory_use(scheduler, row, token)
        if reserved:
            waste, steps = waste + (reserved - used) / reserved, steps + 1
            held += len(scheduler.held)
            active += sum(x.phase is not Phase.ENDED for x in scheduler.held)
    return Scheduled(waste / steps, held / steps, active / steps)


@torch.no_grad()
def state_sizes(model: Any, contexts: Items[int], seed: int) -> dict[int, int]:
    """Bytes of the state of one sequence of random tokens after so many of them, measured while it is read."""
    served, generator = ExportedModel(model), torch.Generator().manual_seed(seed)
    served.template()
    state, length, sizes = None, 0, {}
    with progress_bar(max(contexts), "read", unit="token") as bar:
        for context in sorted(contexts):
            while length < context:
                count = min(CHUNK, context - length)
                ids = torch.randint(3, VOCAB, (1, count), generator=generator).to(served.device)
                past = torch.tensor([length], device=served.device)
                state = served.run(ids, past, state, {}, logits=False)[1]
                length += count
                bar.update(count)
            sizes[context] = state_bytes(state or [])
    return sizes


@torch.no_grad()
def decode_seconds(model: Any, context: int, count: int, rows: int) -> float:
    """Median time of a step that decodes `count` sequences after `context` tokens, in calls of `rows`.

    States are those after PROMPT tokens; keys and values are zeros, the time does not depend on them.
    """
    pages = -(-(context + STEPS + 2) // PAGE)
    config = EngineConfig(slots=count, decode_rows=min(rows, count), kv_pages=max(1, count * pages), prefix_states=0)
    runner = ModelRunner(ExportedModel(model), config)
    scheduler = Scheduler(config, runner, runner.windows)
    prompt = tuple(range(3, 3 + min(PROMPT, context)))
    for number in range(count):
        scheduler.add(Sequence(Request(prompt), number))
    sequences = list(scheduler.waiting)
    for number, one in enumerate(sequences):
        one.row = number
        for table in one.tables:
            table.grow(context + STEPS + 2)
    runner.read(sequences[0], len(prompt))
    state = runner.pool.read(0)
    for one in sequences:
        runner.pool.write(one.row, state)
        one.tokens, one.length = [1], context
    calls = [sequences[i : i + config.rows] for i in range(0, count, config.rows)]
    seconds = []
    for _ in range(STEPS + 1):
        begin = time.perf_counter()
        for call in calls:
            runner.decode(call)
        seconds.append(time.perf_counter() - begin)
        for one in sequences:
            one.length += 1
    return median(seconds[1:])


def measure_context(
    models: dict[str, Any], memory: Memory, context: int, state: int, seed: int
) -> list[dict[str, Any]]:
    """A record a system. Decoding is timed with as many sequences as fit, at most DECODED; static batches are those of
    `reserved`, of which only the share counts that has not ended.

    Args:
        state: bytes of a DLA state after `context` tokens; pages are counted.
    """
    records, timed = [], {}
    for name in SYSTEMS:
        scheduled = schedule(name, memory, context, seed)
        fit = memory.sequences(name, context, context)
        count = min(fit, DECODED)
        kind = "dla" if name == "dla" else "softmax"
        if (kind, count) not in timed:
            timed[kind, count] = decode_seconds(models[kind], context, count, engine_config(name, memory, context).rows)
        share = scheduled.active / scheduled.held if name == "static" else 1.0
        records.append({
            "system": name, "context": context, "fit": fit,
            "bytes_each": state if name == "dla" else memory.each(name, context, context),
            "decoded": count, "step_ms": 1e3 * timed[kind, count], "tokens_per_s": share * count / timed[kind, count],
            **asdict(scheduled),
        })  # fmt: skip
    return records
