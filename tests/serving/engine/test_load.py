"""What a request gets does not depend on what else is served: bit for bit, whatever happens to the others."""

import random
from dataclasses import replace

import pytest
import torch

from megatron_dla.serving.engine import Engine, EngineConfig, Request, SamplingParams
from megatron_dla.serving.engine.scheduler import Phase

CONFIG = EngineConfig(slots=8, decode_rows=4, prefill_chunk=32, kv_pages=60, token_budget=120, prefix_states=4)
MODELS = ["slots", "softmax", "mamba2_all", "gdn_all"]
SYSTEM = tuple(range(3, 40))


def requests(count, seed=0):
    """Of mixed lengths; a third begins with the same tokens, a quarter is sampled."""
    r = random.Random(seed)
    made = []
    for n in range(count):
        own = tuple(r.randrange(3, 300) for _ in range(r.choice([1, 2, 15, 16, 17, 33, 60])))
        sampling = SamplingParams(max_new_tokens=r.randrange(1, 11), temperature=0.9 * (n % 4 == 3), top_p=0.9, seed=n)
        made.append(Request(SYSTEM * (n % 3 == 0) + own, sampling, ignore_eos=True, logprobs=0))
    return made


def outcome(handle):
    """Tokens and their log-probabilities, which show a difference in the last bit of any logit."""
    done = handle.result()
    return done.tokens, [x.logprob for x in done.logprobs], done.finish_reason


def alone(model, request, config=CONFIG):
    engine = Engine(model, None, config)
    handle = engine.submit(request)
    engine.drain()
    return outcome(handle)


def no_leak(engine):
    s = engine._scheduler
    assert sorted(s.free_rows) == list(range(engine.config.slots)) and not s.held and not s.waiting
    while s.prefixes.evict():
        pass
    assert all(pool.free == pool.total for pool in s.pools) and engine.stats().reserved_bytes == 0


@pytest.mark.parametrize("name, count", [("slots", 64), ("softmax", 64), ("mamba2_all", 16), ("gdn_all", 16)])
def test_requests_at_once_are_each_alone(served, name, count):
    model, todo, cancelled = served(name), requests(count), (3, 7, count - 3)
    engine = Engine(model, None, CONFIG)
    handles = [engine.submit(x) for x in todo[:-4]]
    while engine._scheduler.free_rows:
        engine.step()
    handles += [engine.submit(replace(x, priority=1)) for x in todo[-4:]]
    for number in cancelled:
        handles[number].cancel()
    engine.step()
    held = [x for x in engine._scheduler.held if x.phase is Phase.DECODING]
    engine._scheduler.put_aside(held[-1])
    engine.drain()
    stats = engine.stats()
    assert stats.saves > 1 and stats.prefix_tokens > 0 and stats.rows_agree
    single = Engine(model, None, replace(CONFIG, prefix_states=0))
    for number, (handle, request) in enumerate(zip(handles, todo, strict=True)):
        tokens, logprobs, reason = outcome(handle)
        one = single.submit(request)
        single.drain()
        want = outcome(one)
        if reason == "cancelled":
            assert number in cancelled and len(tokens) < len(want[0])
            assert (tokens, logprobs) == (want[0][: len(tokens)], want[1][: len(tokens)])
        else:
            assert (tokens, logprobs, reason) == want, number
    no_leak(engine)
    no_leak(single)


@pytest.mark.parametrize("name", MODELS[1:])
def test_greedy_tokens_are_those_of_transformers(served, name):
    """In float64, where a batch of another shape takes no other decision."""
    model = served(name).double()
    engine = Engine(model, None, CONFIG)
    todo = [replace(x, sampling=replace(x.sampling, temperature=0.0)) for x in requests(6, seed=1)]
    handles = [engine.submit(x) for x in todo]
    engine.drain()
    for handle, request in zip(handles, todo, strict=True):
        ids = torch.tensor([request.prompt])
        want = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.sampling.max_new_tokens, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
        assert handle.result().tokens == want[0, ids.shape[1] :].tolist()
    model.float()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("steps", [2, 6])
def test_saving_and_restoring_changes_no_bit(served, name, steps):
    """While it is read (2 steps of one chunk) and while it decodes."""
    model, request = served(name), Request(tuple(range(3, 83)), SamplingParams(max_new_tokens=9), logprobs=0)
    config = replace(CONFIG, token_budget=40)
    engine = Engine(model, None, config)
    handle = engine.submit(request)
    for _ in range(steps):
        engine.step()
    (sequence,) = engine._scheduler.held
    assert sequence.is_read == (steps == 6)
    engine._scheduler.put_aside(sequence)
    assert engine.stats().saved_bytes > 0 and engine.stats().reserved_bytes == 0
    other = engine.submit(Request((5,) * 40, SamplingParams(max_new_tokens=4), priority=1))  # takes its row and pages
    engine._take_changes()
    engine._scheduler.begin_step()
    engine._scheduler.next_read()
    engine._scheduler.put_aside(next(x for x in engine._scheduler.held if x.arrival == other.id))
    engine.drain()
    assert outcome(handle) == alone(model, request, config) and len(other.result().tokens) == 4
    no_leak(engine)


@pytest.mark.parametrize("name", MODELS)
def test_a_kept_prefix_is_as_good_as_reading_it(served, name):
    model = served(name)
    ends = [(50, 7), (51,), (51,), (52, 8, 9), (53,)]
    sampling = SamplingParams(max_new_tokens=5)
    todo = [Request((*SYSTEM[:32], *end), sampling, logprobs=0, shared_prefix=32) for end in ends]
    engine = Engine(model, None, CONFIG)
    handles = [engine.submit(x) for x in todo]
    engine.drain()
    assert engine.stats().prefix_tokens == 4 * 32 and engine.stats().read == 32 + 8
    unshared = replace(CONFIG, prefix_states=0)
    assert [outcome(x) for x in handles] == [alone(model, x, unshared) for x in todo]
    no_leak(engine)


def test_other_shapes_of_calls_round_differently(served):
    """The premise of `decode_rows`: what a call of another shape computes is not the same to the last bit."""
    model, todo = served("slots"), requests(8)
    found = []
    for rows in (1, 4):
        engine = Engine(model, None, replace(CONFIG, decode_rows=rows))
        handles = [engine.submit(x) for x in todo]
        engine.drain()
        found.append([outcome(x) for x in handles])
    assert found[0] != found[1] and [x[0] for x in found[0]] == [x[0] for x in found[1]]


def test_a_thousand_short_requests_leave_nothing_behind(served):
    engine = Engine(served("softmax"), None, CONFIG)
    r, done = random.Random(0), []
    for number in range(1000):
        prompt = tuple(r.randrange(3, 300) for _ in range(r.randrange(1, 6)))
        handle = engine.submit(Request(prompt, SamplingParams(max_new_tokens=r.randrange(1, 3))), done.append)
        if number % 19 == 0:
            handle.cancel()
        if number % 5 == 0:
            engine.step()
    engine.drain()
    assert sum(event.finish_reason is not None for event in done) == 1000
    assert {event.finish_reason for event in done} >= {"length", "cancelled"} and not engine._live
    no_leak(engine)
