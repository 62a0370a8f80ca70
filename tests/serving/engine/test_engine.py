"""What a client of the engine sees: events, text, limits, errors, and what is held meanwhile."""

import re
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_dla.errors import UserError
from megatron_dla.serving.engine import Engine, EngineConfig, EngineFullError, Request, SamplingParams
from megatron_dla.serving.engine.output import Output, log_probabilities
from megatron_dla.serving.engine.stats import memory_use
from megatron_dla.serving.stream import TextStream
from tests.support.tiny_hf import build_tokenizer

CONFIG = EngineConfig(slots=4, prefill_chunk=16, kv_pages=40)


@pytest.fixture
def engine(served):
    return Engine(served("slots"), build_tokenizer(), CONFIG)


def run(engine, prompt=(5, 6, 7), **options):
    fields = {name: options.pop(name) for name in list(options) if name in Request.__dataclass_fields__}
    handle = engine.submit(Request(prompt, SamplingParams(**options), **fields))
    engine.drain()
    return handle.result()


def ids(text):
    return build_tokenizer()(text)["input_ids"]


def always(monkeypatch, *tokens):
    """Every request generates these tokens."""
    monkeypatch.setattr(Output, "_choose", lambda self, logits, best, sequence: tokens[len(sequence.tokens)])


def test_events_carry_text_and_counts(engine):
    events = list(engine_events(engine, Request((70, 71), SamplingParams(max_new_tokens=6), ignore_eos=True)))
    assert [event.finish_reason for event in events] == [None] * 5 + ["length"]
    assert [event.tokens for event in events] == [1, 2, 3, 4, 5, 6] and events[0].prompt_tokens == 2
    tokens = [event.token for event in events]
    assert "".join(event.text for event in events) == engine.tokenizer.decode(tokens, skip_special_tokens=True)


def engine_events(engine, request):
    handle = engine.submit(request)
    engine.drain()
    return handle


def test_end_tokens_and_stop_strings_end_it(engine, monkeypatch):
    always(monkeypatch, *ids("one two"), 256, *ids("more"))
    done = run(engine, max_new_tokens=20)
    assert done.text == "one two" and done.finish_reason == "stop" and done.tokens[-1] == 256
    assert run(engine, max_new_tokens=20, ignore_eos=True).finish_reason == "error"  # the stub has no more
    done = run(engine, max_new_tokens=20, stop=("e t",))
    assert done.text == "on" and done.finish_reason == "stop" and len(done.tokens) == 5
    done = run(engine, max_new_tokens=20, stop_ids=tuple(ids(" ")))
    assert done.text == "one" and done.finish_reason == "stop" and done.tokens[-1] == ids(" ")[0]
    assert run(engine, max_new_tokens=2, stop=("e t",)).text == "on"


def test_text_of_an_incomplete_character_waits(engine, monkeypatch):
    always(monkeypatch, *ids("é!"), 256)
    events = list(engine_events(engine, Request((5,), SamplingParams(max_new_tokens=9))))
    assert [event.text for event in events] == ["", "é", "!", ""]


def test_log_probabilities_are_those_of_the_model(engine, served):
    done = run(engine, max_new_tokens=4, logprobs=3, ignore_eos=True, temperature=0.0)
    ids = torch.tensor([[5, 6, 7, *done.tokens]])
    with torch.no_grad():
        logits = served("slots")(ids).logits[0, 2:-1]
    logits[:, served("slots").generation_config.suppress_tokens] = -torch.inf
    want = logits.log_softmax(-1)
    for row, token, found in zip(want, done.tokens, done.logprobs, strict=True):
        assert found.top[0] == (token, found.logprob) and len(found.top) == 3
        assert abs(found.logprob - float(row[token])) < 1e-4
        assert [value for _, value in found.top] == sorted((value for _, value in found.top), reverse=True)


def test_a_seed_decides_and_penalties_apply(engine):
    options = dict(max_new_tokens=12, temperature=1.0, ignore_eos=True)
    one, two, three = (run(engine, seed=seed, **options).tokens for seed in (1, 1, 2))
    assert one == two != three
    plain, changed = (run(engine, max_new_tokens=12, ignore_eos=True, repetition_penalty=x).tokens for x in (1.0, 50.0))
    assert len(set(changed)) == 12 > len(set(plain))


def test_a_deadline_ends_what_waits_and_what_runs(served):
    now = [0.0]
    engine = Engine(served("slots"), None, replace(CONFIG, slots=1, decode_rows=1), clock=lambda: now[0])
    first = engine.submit(Request((5,), SamplingParams(max_new_tokens=100), deadline=10))
    second = engine.submit(Request((5,), SamplingParams(max_new_tokens=100), deadline=5))
    for _ in range(3):
        engine.step()
    now[0] = 5.0
    engine.step()
    assert second.result().finish_reason == "deadline" and engine.stats().running == 1
    now[0] = 10.0
    engine.drain()
    done = first.result()
    assert done.finish_reason == "deadline" and len(done.tokens) == 4
    stats = engine.stats()
    assert (stats.generated, stats.read) == (4, 1) and stats.generated_per_s == pytest.approx(0.4)


def test_an_error_ends_its_requests_and_no_others(engine, monkeypatch):
    read = engine._runner.read

    def fails(sequence, stop):
        if sequence.request.prompt[0] == 9:
            raise RuntimeError("no memory")
        return read(sequence, stop)

    monkeypatch.setattr(engine._runner, "read", fails)
    bad, good = (engine.submit(Request((n, 5), SamplingParams(max_new_tokens=3))) for n in (9, 8))
    engine.drain()
    assert (bad.result().finish_reason, good.result().finish_reason) == ("error", "length")
    monkeypatch.setattr(engine._runner, "decode", lambda rows, reading: 1 / 0)
    bad = engine.submit(Request((8,), SamplingParams(max_new_tokens=3)))
    engine.drain()
    done = bad.result()
    assert done.finish_reason == "error" and "ZeroDivisionError" in done.error
    assert engine.stats().slots_used == 0 and not engine.step()


def test_a_tokenizer_that_fails_loses_only_its_request(engine, monkeypatch):
    decode = engine.tokenizer.decode

    def fails(ids, **options):
        if 200 in ids:
            raise TypeError("no such token")
        return decode(ids, **options)

    monkeypatch.setattr(engine.tokenizer, "decode", fails)
    monkeypatch.setattr(Output, "_choose", lambda self, logits, best, one: 200 if one.arrival == 0 else 70)
    bad, good = (engine.submit(Request((5,), SamplingParams(max_new_tokens=3))) for _ in range(2))
    engine.drain()
    assert "no such token" in bad.result().error and good.result().finish_reason == "length"


def test_logits_that_are_no_numbers_end_the_request():
    logits = torch.tensor([0.0, 1.0, -torch.inf])
    assert [token for token, _ in log_probabilities(logits, 0, 3).top] == [1, 0]
    for row, token in ((logits, 2), (torch.full((3,), torch.nan), 0)):
        with pytest.raises(ValueError, match="finite"):
            log_probabilities(row, token, 1)


def test_stop_strings_cost_no_more_than_the_text():
    begin, stream = time.monotonic(), TextStream(build_tokenizer(), stop=["x" * 1_000_000])
    for token in ids("some words"):
        stream.put(token)
    stream.end()
    assert stream.text == "some words" and time.monotonic() - begin < 5


def test_a_listener_that_fails_loses_only_its_own(engine, capsys):
    seen = []

    def fails(event):
        seen.append(event)
        raise OSError("gone")

    engine.submit(Request((5,), SamplingParams(max_new_tokens=50)), fails)
    other = engine.submit(Request((6,), SamplingParams(max_new_tokens=3), ignore_eos=True))
    engine.drain()
    assert other.result().finish_reason == "length" == other.result().finish_reason
    assert [event.finish_reason for event in seen] == [None, "cancelled"] and "gone" in capsys.readouterr().err


def test_requests_come_from_threads_while_it_runs(engine):
    stop, done = threading.Event(), []
    runner = threading.Thread(target=engine.run, args=(stop,))
    runner.start()

    def client(number):
        handle = engine.submit(Request((number + 3,), SamplingParams(max_new_tokens=4), ignore_eos=True))
        done.append(handle.result().finish_reason)

    clients = [threading.Thread(target=client, args=(n,)) for n in range(9)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(60)
    long = engine.submit(Request((5,), SamplingParams(max_new_tokens=100_000), ignore_eos=True))
    stop.set()
    runner.join(60)
    assert done == ["length"] * 9 and long.result().finish_reason == "cancelled"
    with pytest.raises(EngineFullError, match="closed"):
        engine.submit(Request((5,)))


def test_too_many_requests_are_refused(served):
    engine = Engine(served("slots"), None, replace(CONFIG, max_waiting=2))
    for _ in range(CONFIG.slots + 2):  # a free slot is waited for by nobody
        engine.submit(Request((5,)))
    with pytest.raises(EngineFullError, match="max_waiting = 2"):
        engine.submit(Request((5,)))
    engine.cancel(0)  # it frees its place at once
    engine.submit(Request((5,)))
    engine.drain()
    engine.submit(Request((5,)))


@pytest.mark.parametrize("fields, sampling, named", [
    ({"prompt": ()}, {}, "prompt"), ({"prompt": (5, 384)}, {}, "384"), ({"prompt": (-1,)}, {}, "-1"),
    ({"prompt": (True,)}, {}, "True"), ({"logprobs": 21}, {}, "logprobs = 21"), ({"deadline": 0}, {}, "deadline = 0"),
    ({}, {"max_new_tokens": 0}, "max_tokens 0"), ({}, {"temperature": float("nan")}, "temperature nan"),
    ({}, {"top_p": 0}, "top_p 0"), ({}, {"stop": ("",)}, "stop"), ({"shared_prefix": -1}, {}, "shared_prefix = -1"),
    ({"prompt": (5,) * 600}, {}, "600"), ({}, {"max_new_tokens": 640}, "max_tokens = 640"),
])  # fmt: skip
def test_a_bad_request_is_named(served, fields, sampling, named):
    engine = Engine(served("softmax"), None, CONFIG)
    with pytest.raises(UserError, match=named):
        engine.submit(Request(**{"prompt": (5,), "sampling": SamplingParams(**sampling)} | fields))
    assert not engine.step()
    with pytest.raises(UserError, match="tokenizer"):
        engine.submit(Request((5,), SamplingParams(stop=("a",))))


def test_a_model_with_older_code_is_refused(served):
    class Old(type(served("slots"))):
        pass

    model = served("slots")
    Old.__module__ = "json"
    model.__class__ = Old
    try:
        with pytest.raises(UserError, match="trust_remote_code"):
            Engine(model)
    finally:
        model.__class__ = Old.__mro__[1]


def held_after(served, name, prompt, tokens=40, **config):
    engine = Engine(served(name), None, replace(CONFIG, **config))
    engine.submit(Request((5,) * prompt, SamplingParams(max_new_tokens=tokens), ignore_eos=True))
    while not engine._scheduler.active or not engine._scheduler.active[0].is_read:
        engine.step()
    (one,) = engine.sequence_bytes().values()
    return one, engine.stats()


def test_a_state_is_constant_and_keys_grow(served):
    short, long = (held_after(served, "slots", n)[0] for n in (3, 300))
    assert short == long and short.kv_reserved == 0 and short.state > 0
    short, long = (held_after(served, "softmax", n)[0] for n in (3, 300))
    token = 2 * 2 * 8 * 4  # keys and values, groups, channels, bytes; of one full and one windowed layer
    assert short.state == 0 and short.kv_used == token * (3 + 3) and short.kv_reserved == token * 2 * 16
    assert long.kv_used == token * (300 + 6) and long.kv_reserved == token * 16 * (19 + 1)
    assert held_after(served, "softmax", 3, reserve_tokens=320)[0].kv_reserved == token * 16 * (20 + 1)


def test_stats_say_what_is_wasted(served):
    for name, waste in (("slots", 0.0), ("softmax", 1 - 6 / 32)):
        one, stats = held_after(served, name, 3)
        assert stats.waste == pytest.approx(waste) and stats.running == stats.slots_used == 1 and stats.slots == 4
        assert stats.reserved_bytes == one.state + one.kv_reserved and stats.used_bytes == one.state + one.kv_used
    assert stats.pages_used == 2 and stats.pages == 80 and stats.pool_bytes == 2 * 40 * 16 * 128
    _, stats = held_after(served, "slots", 300)
    assert 0 < stats.open_slots <= stats.all_slots == 2 * 4 * 4


def test_a_row_without_a_token_is_waste(served, monkeypatch):
    engine = Engine(served("slots"), None, CONFIG)
    engine.submit(Request((5,) * 40, SamplingParams(max_new_tokens=2)))
    seen = []
    read = engine._runner.read

    def look(sequence, stop):
        seen.append(memory_use(engine._scheduler, engine._runner.pool.row_bytes, ()))
        return read(sequence, stop)

    monkeypatch.setattr(engine._runner, "read", look)
    engine.drain()
    row = engine.bytes_each[0]
    assert seen == [(row, 0), (row, row), (row, row)]


def test_the_example_of_the_docs_runs(exported, capsys):
    text = (Path(__file__).parents[3] / "docs/serving.md").read_text()
    code = textwrap.dedent(next(part for part in re.findall(r"(?:^    .*\n|^\n)+", text, re.M) if "Engine(" in part))
    exec(code.replace('"out/"', repr(str(exported("mamba2").directory))), {})
    out = capsys.readouterr().out
    assert "running=0" in out and "requests=2" in out and ("length" in out or "stop" in out)
