"""Sessions of a δ-mem: each with its own states, kept between calls."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest

from megatron_dla.serving.engine import Engine, EngineConfig, Request, SamplingParams
from megatron_dla.serving.http.service import Limits, Service
from tests.serving.http.conftest import running
from tests.support.sessions import ROW
from tests.support.tiny_hf import CONFIGS, build_adapted, build_tokenizer

CONFIG = EngineConfig(slots=6, decode_rows=2, prefill_chunk=16, kv_pages=30, token_budget=60)


@pytest.fixture(scope="module")
def engine():
    return Engine(build_adapted(), build_tokenizer(), CONFIG)


@pytest.fixture(scope="module")
def address(engine):
    service = Service(engine, "tiny", Limits(sessions=2), has_memory=True)
    with running(service) as found:
        yield found


def ask(address: str, session: str | None, prompt: list[int], **more) -> list[float]:
    """Log-probabilities of an answer, which show what was remembered."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 5, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    answer = httpx.post(f"{address}/v1/completions", json=body | {"session": session} | more, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["logprobs"]["token_logprobs"]


def expected(*prompts: list[int]) -> list[float]:
    """The last of a row of requests, each with the memory of the one before."""
    engine, memory = Engine(build_adapted(), None, CONFIG), None
    for prompt in prompts:
        request = Request(tuple(prompt), SamplingParams(5), ignore_eos=True, logprobs=0, memory=memory)
        handle = engine.submit(request)
        engine.drain()
        memory = handle.memory
    return [x.logprob for x in handle.result().logprobs]


def names(address: str) -> list[str]:
    return [one["id"] for one in httpx.get(f"{address}/v1/sessions").json()["data"]]


def test_sessions_remember_and_stay_apart(address) -> None:
    a, b, end = ROW[:9], ROW[9:20], ROW[20:24]
    assert ask(address, "one", a) == expected(a)
    assert ask(address, "two", b) == expected(b)
    after_a, after_b, fresh = ask(address, "one", end), ask(address, "two", end), ask(address, None, end)
    assert (after_a, after_b, fresh) == (expected(a, end), expected(b, end), expected(end))
    assert len({tuple(x) for x in (after_a, after_b, fresh)}) == 3
    assert sorted(names(address)) == ["one", "two"]
    ask(address, "three", a)  # the third of two
    assert sorted(names(address)) == ["three", "two"]
    assert httpx.delete(f"{address}/v1/sessions/two").json()["deleted"] and names(address) == ["three"]
    assert httpx.delete(f"{address}/v1/sessions/two").status_code == 404
    assert ask(address, "two", end) == fresh


def test_a_call_that_does_not_end_changes_nothing(address) -> None:
    a, end = ROW[:9], ROW[20:24]
    ask(address, "kept", a)
    body = {"model": "tiny", "prompt": ROW, "max_tokens": 4000, "session": "kept", "ignore_eos": True}
    too_long = httpx.post(f"{address}/v1/completions", json=body)
    assert too_long.status_code == 400 and too_long.json()["error"]["code"] == "context_length_exceeded"
    body |= {"max_tokens": 300, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    assert ask(address, "kept", end) == expected(a, end)


def test_one_answer_a_session(address) -> None:
    for more in ({"n": 2}, {"prompt": [[1], [2]]}):
        body = {"model": "tiny", "prompt": [1], "session": "x"} | more
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 400
    assert "x" not in names(address)


def call(session: str, **more) -> dict:
    return {"model": "tiny", "prompt": ROW, "max_tokens": 300, "ignore_eos": True, "session": session} | more


def test_a_session_that_is_deleted_stays_so(address) -> None:
    """Also where a call of it is running."""
    url = f"{address}/v1/completions"
    with httpx.stream("POST", url, json=call("gone", stream=True), timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert httpx.delete(f"{address}/v1/sessions/gone").status_code == 200
        assert "data: [DONE]" in list(lines)
    assert "gone" not in names(address)
    assert ask(address, "gone", ROW[20:24]) == expected(ROW[20:24]) and "gone" in names(address)


def test_who_waits_for_a_session_waits_no_longer_than_asked(engine) -> None:
    small = replace(CONFIG, max_waiting=1)
    service, deadlines = Service(Engine(engine.model, engine.tokenizer, small), "tiny", has_memory=True), []
    submit = service.engine.submit
    service.engine.submit = lambda request, put: deadlines.append(request.deadline) or submit(request, put)
    with running(service) as address, ThreadPoolExecutor() as pool:
        url = f"{address}/v1/completions"
        with httpx.stream("POST", url, json=call("one", stream=True, max_tokens=380), timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            begin = time.monotonic()
            late = httpx.post(url, json=call("one", timeout=0.05), timeout=60)
            assert late.status_code == 408 and late.json()["error"]["param"] == "timeout"
            assert time.monotonic() - begin >= 0.05
            other = pool.submit(httpx.post, url, json=call("one", max_tokens=2, timeout=50), timeout=60)
            while not service.sessions.waiting:
                time.sleep(0.001)
            assert httpx.post(url, json=call("one"), timeout=60).status_code == 429
            assert httpx.post(url, json=call("two", max_tokens=2), timeout=60).status_code == 200
            assert not other.done()
            answer.close()
            assert other.result().status_code == 200
        first, second, waited = deadlines
        assert (first, second) == (None, None) and 0 < waited < 50 - 0.05
        assert service.sessions.waiting == 0 and not service.sessions._turns


def until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_client_that_leaves_waits_no_longer_for_its_session(engine) -> None:
    service = Service(Engine(engine.model, engine.tokenizer, CONFIG), "tiny", has_memory=True)
    with running(service) as address:
        url = f"{address}/v1/completions"
        with httpx.stream("POST", url, json=call("one", stream=True, max_tokens=380), timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=call("one"), timeout=0.2)
            until(lambda: not service.sessions.waiting)
            assert service.engine.stats().running == 1  # of the first call
            answer.close()
        until(lambda: not service.sessions._turns)
        assert service.engine.stats().requests == 1
        assert ask(address, "one", ROW[20:24]) == expected(ROW[20:24])


def test_who_waits_when_the_drain_ends_is_not_begun(engine) -> None:
    service = Service(Engine(engine.model, engine.tokenizer, CONFIG), "tiny", has_memory=True)
    with running(service) as address, ThreadPoolExecutor() as pool:
        url = f"{address}/v1/completions"
        with httpx.stream("POST", url, json=call("one", stream=True, max_tokens=380), timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            late = pool.submit(httpx.post, url, json=call("one"), timeout=60)
            until(lambda: service.sessions.waiting)
            service.ended = True
            service.engine.cancel_all()
            assert any("cancelled" in line for line in lines)
        assert late.result().status_code == 503


def test_writes_by_message() -> None:
    engine = Engine(build_adapted(CONFIGS["SSW"]), build_tokenizer(), CONFIG)
    with running(Service(engine, "tiny", has_memory=True, by_message=True)) as address:
        first = ask(address, "s", ROW[:9])
        assert ask(address, "s", ROW[20:24]) != ask(address, None, ROW[20:24]) and first == ask(address, "t", ROW[:9])
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "session": "s"}
        assert httpx.post(f"{address}/v1/chat/completions", json=chat).status_code == 200
