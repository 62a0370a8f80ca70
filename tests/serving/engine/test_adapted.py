"""Models of transformers with a δ-mem: as a session computes them, each request with its own states."""

import random
from dataclasses import replace

import pytest
import torch

from megatron_dla.adapters.files import empty_adapter
from megatron_dla.errors import UserError
from megatron_dla.serving.engine import Engine, EngineConfig, Request, SamplingParams
from megatron_dla.serving.load import attach_adapter
from megatron_dla.serving.session import Session
from tests.serving.engine.test_load import no_leak
from tests.support.sessions import NUMBERS, ROW, same_states
from tests.support.tiny_hf import CONFIGS, build_adapted, build_base

MORE = CONFIGS | {  # what they compute depends on where calls are cut
    "pre_call": replace(CONFIGS["SSW"], message_read="pre_call"),
    "fallback": replace(CONFIGS["SSW"], message_fallback="token"),
}
CONFIG = EngineConfig(slots=6, decode_rows=2, prefill_chunk=16, kv_pages=30, token_budget=60)


def serve(engine, prompt, tokens=9, **fields):
    handle = engine.submit(Request(tuple(prompt), SamplingParams(max_new_tokens=tokens), ignore_eos=True, **fields))
    engine.drain()
    return handle


@pytest.mark.parametrize("family, write", [
    ("llama", "TSW"), ("llama", "MSW"), ("llama", "SSW"), ("llama", "pre_call"), ("llama", "fallback"),
    ("qwen3", "TSW"), ("smollm3", "SSW"), ("mistral", "TSW"),
])  # fmt: skip
def test_a_request_is_a_session(family, write):
    """In float64, where a call of another shape takes no other decision; the second request goes on with the memory."""
    model = build_adapted(MORE[write], base=build_base(family, dtype=torch.float64))
    engine, session, memory = Engine(model, None, CONFIG), Session(model), None
    for prompt, numbers in ((ROW, NUMBERS), (ROW[3:20], NUMBERS[3:20])):
        session.append(prompt, numbers)
        want = list(session.generate(9, stop=[]))
        fields = {"messages": tuple(numbers)} if model.config.write == "message" else {}
        handle = serve(engine, prompt, memory=memory, **fields)
        assert handle.result().tokens == want
        again = Session(model)  # all tokens but the last have been fed
        if memory is not None:
            again.states = memory
        again.append(prompt, numbers)
        for token in want[:-1]:
            again.append([token], max(numbers) + 1)
        assert same_states(handle.memory, again.states, exact=False)
        memory = handle.memory
        session = Session(model)
        session.states = memory
    assert engine.stats().rows_agree and model.base.config._attn_implementation != "megatron_dla_pages"


def test_a_message_does_not_go_on_in_the_next_request():
    """The first message is open when its request ends, and the numbers of the next one begin again at 0."""
    engine = Engine(build_adapted(CONFIGS["SSW"]), None, CONFIG)
    memory = serve(engine, ROW[:5], 1, messages=(0,) * 5).memory
    same, other = (serve(engine, ROW[5:9], 4, messages=(n,) * 4, memory=memory, logprobs=0) for n in (0, 7))
    assert same.result() == other.result() and same_states(same.memory, other.memory, numbers=False)


def test_sessions_stay_apart_under_load():
    model, r = build_adapted(), random.Random(0)
    first = Engine(model, None, CONFIG)
    memories = [serve(first, ROW[n : n + 9]).memory for n in range(4)]
    todo = [
        Request(
            tuple(r.randrange(256) for _ in range(r.choice([1, 5, 16, 40]))),
            SamplingParams(max_new_tokens=r.randrange(1, 9)), ignore_eos=True, logprobs=0, priority=n % 2,
            memory=memories[n % 4] if n % 3 else None,
        )
        for n in range(16)
    ]  # fmt: skip
    engine = Engine(model, None, CONFIG)
    handles = [engine.submit(x) for x in todo[::2]]
    for _ in range(3):
        engine.step()
    handles += [engine.submit(x) for x in todo[1::2]]
    engine.drain()
    assert engine.stats().saves > 0
    for handle, request in zip(handles, [*todo[::2], *todo[1::2]], strict=True):
        alone = Engine(model, None, CONFIG)
        one = alone.submit(request)
        alone.drain()
        assert handle.result() == one.result() and same_states(handle.memory, one.memory)
    no_leak(engine)


def test_a_plain_model_is_served_without_a_memory():
    base = build_base("qwen3", dtype=torch.float64)
    model = attach_adapter(base, empty_adapter())
    handle = serve(Engine(model, None, CONFIG), ROW)
    ids = torch.tensor([ROW])
    want = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert handle.result().tokens == want[0, len(ROW) :].tolist() and handle.memory is None


def test_what_an_adapter_cannot_take_is_named(served):
    by_message, by_token = build_adapted(CONFIGS["SSW"]), build_adapted()
    memory = serve(Engine(by_token, None, CONFIG), ROW[:3]).memory
    bad = [
        (by_message, {}, "messages are missing"), (by_token, {"messages": (0,)}, "leave them out"),
        (by_token, {"messages": (0, 1)}, "messages = "), (by_token, {"memory": 5}, "memory"),
        (by_message, {"memory": memory, "messages": (0,)}, "memory"), (served("slots"), {"memory": memory}, "memory"),
        (served("slots"), {"messages": (1,)}, "messages"),
    ]  # fmt: skip
    for model, fields, named in bad:
        with pytest.raises(UserError, match=named):
            Engine(model, None, replace(CONFIG, slots=2)).submit(Request((5,), **fields))
