"""Requests as a chat service gets them, and what a system makes of them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import quantiles

from megatron_dla.serving.engine import Engine, Event, Request, SamplingParams

PROMPT_MEAN, ANSWER_MEAN = 161.31, 337.99
"""Tokens of ShareGPT's prompts and answers: Kwon et al. 2023 (arXiv 2309.06180), figure 11. The paper shows long tails,
no other number; here they are log-normal."""
SIGMA = 1.0


@dataclass(frozen=True)
class Arrival:
    """A request. Attributes: at: seconds after the first. answer: tokens, which are generated in any case."""

    at: float
    prompt: tuple[int, ...]
    answer: int


def log_normal(rng: random.Random, mean: float, sigma: float, most: int) -> int:
    """A length of that mean before it is cut to 1 to `most`."""
    return min(most, max(1, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))


def make_trace(count: int, rate: float, longest: int, vocabulary: int, seed: int) -> list[Arrival]:
    """Poisson arrivals, `rate` a second; a prompt and its answer have at most `longest` tokens, each at most half."""
    rng, at, made = random.Random(seed), 0.0, []
    for _ in range(count):
        prompt = log_normal(rng, PROMPT_MEAN, SIGMA, longest // 2)
        ids = tuple(rng.randrange(3, vocabulary) for _ in range(prompt))
        made.append(Arrival(at, ids, log_normal(rng, ANSWER_MEAN, SIGMA, longest // 2)))
        at += rng.expovariate(rate)
    return made


@dataclass
class Times:
    """Of one request, in seconds on one clock. Attributes: asked: when it came. tokens: when each token came."""

    asked: float
    tokens: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """A trace on one system.

    Attributes:
        seconds: from the first arrival to the last token. times: by request. waste: share of the reserved memory that
            held nothing, and running: sequences in memory, both in the mean over the time.
    """

    seconds: float
    times: list[Times]
    waste: float
    running: float

    def facts(self) -> dict[str, float]:
        """Tokens a second; seconds to the first token, and milliseconds a token after it: median and 99th percentile
        over the requests."""
        first = [x.tokens[0] - x.asked for x in self.times]
        later = [1e3 * (x.tokens[-1] - x.tokens[0]) / (len(x.tokens) - 1) for x in self.times if len(x.tokens) > 1]
        count = sum(len(x.tokens) for x in self.times)
        made = {"seconds": self.seconds, "tokens": count, "tokens_per_s": count / self.seconds}
        for name, values in (("first_token_s", first), ("token_ms", later)):
            made |= {f"{name}_p50": percentile(values, 50), f"{name}_p99": percentile(values, 99)}
        return {**made, "waste": self.waste, "running": self.running}


def percentile(values: Sequence[float], percent: int) -> float:
    """Interpolated; of one value: the value."""
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def replay(engine: Engine, trace: Sequence[Arrival], progress: Callable[[int], None]) -> Outcome:
    """Submit each request when it is due, and step until all have ended. `progress`: called with new tokens."""
    begin, todo = time.perf_counter(), list(reversed(trace))
    times = [Times(begin + one.at) for one in trace]
    wasted = held = sequence_seconds = 0.0
    count = 0

    def listener(of: Times) -> Callable[[Event], None]:
        def note(event: Event) -> None:
            assert event.finish_reason in (None, "length"), event
            of.tokens.append(time.perf_counter())

        return note

    while True:
        now = time.perf_counter()
        while todo and begin + todo[-1].at <= now:
            one = todo.pop()
            request = Request(one.prompt, SamplingParams(max_new_tokens=one.answer), ignore_eos=True)
            engine.submit(request, listener(times[len(trace) - len(todo) - 1]))
        more = engine.step()
        took = time.perf_counter() - now
        reserved, used = engine.memory_use()
        wasted, held = wasted + took * (reserved - used), held + took * reserved
        sequence_seconds += took * engine.running
        before, count = count, sum(len(x.tokens) for x in times)
        progress(count - before)
        if not more and not todo:
            break
        if not more:
            time.sleep(max(0.0, begin + todo[-1].at - time.perf_counter()))
    seconds = max(x.tokens[-1] for x in times) - begin
    return Outcome(seconds, times, wasted / held if held else 0.0, sequence_seconds / seconds)
