"""The official client against a running server: completions, chat, streams, log-probabilities, and what is refused."""

import concurrent.futures
import random
import socket
import threading
import time

import httpx
import openai
import psutil
import pytest

from megatron_dla.serving.engine import EngineConfig, Request, SamplingParams
from megatron_dla.serving.http.answers import Pieces
from megatron_dla.serving.http.service import Limits
from tests.serving.http.conftest import ended, running, served
from tests.support.tiny_hf import build_tokenizer

GREEDY = {"model": "tiny", "temperature": 0}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hello world"}]},
]


def alone(make_service, prompt: str, tokens: int) -> str:
    """The same from an engine, without a server."""
    engine = make_service().engine
    handle = engine.submit(Request(tuple(engine.tokenizer(prompt)["input_ids"]), SamplingParams(tokens)))
    engine.drain()
    return handle.result().text


def test_a_completion_is_the_engine_s(client, make_service) -> None:
    done = client.completions.create(prompt="hello world", max_tokens=12, **GREEDY)
    (choice,) = done.choices
    assert choice.text == alone(make_service, "hello world", 12) and choice.finish_reason in ("stop", "length")
    assert done.usage.completion_tokens <= 12 and done.usage.prompt_tokens > 0
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    ids = make_service().tokenizer("hello world")["input_ids"]
    assert client.completions.create(prompt=ids, max_tokens=12, **GREEDY).choices[0].text == choice.text


def test_a_stream_is_the_whole(client) -> None:
    whole = client.completions.create(prompt="the quick", max_tokens=20, **GREEDY)
    chunks = list(
        client.completions.create(
            prompt="the quick", max_tokens=20, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert len(chunks) > 5 and chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason


def test_chat_goes_through_the_template(client, service) -> None:
    whole = client.chat.completions.create(messages=CHAT, max_completion_tokens=10, **GREEDY)
    prompt = "system: Be brief.\nuser: hello world\nassistant: "
    ids = service.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    plain = client.completions.create(prompt=ids, max_tokens=10, **GREEDY)
    assert whole.choices[0].message.content == plain.choices[0].text and whole.usage == plain.usage
    chunks = list(client.chat.completions.create(messages=CHAT, max_tokens=10, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


def test_choices_prompts_and_seeds(client) -> None:
    options = {"model": "tiny", "prompt": ["hello", "the quick"], "n": 2, "max_tokens": 8, "temperature": 1.5}
    first, again, other = (client.completions.create(seed=seed, **options) for seed in (1, 1, 2))
    assert [c.index for c in first.choices] == [0, 1, 2, 3]
    texts = [[c.text for c in one.choices] for one in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]
    single = client.completions.create(**options | {"n": 1, "prompt": "the quick", "seed": 1})
    assert single.choices[0].text == texts[0][2] and first.usage.completion_tokens <= 32


def test_log_probabilities(client) -> None:
    done = client.completions.create(prompt="hello", max_tokens=5, logprobs=3, **GREEDY).choices[0]
    found = done.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert all(value == max(top.values()) for value, top in zip(found.token_logprobs, found.top_logprobs, strict=True))
    chat = client.chat.completions.create(messages=CHAT, max_tokens=5, logprobs=True, top_logprobs=2, **GREEDY)
    for one in chat.choices[0].logprobs.content:
        assert len(one.top_logprobs) == 2 and one.logprob == one.top_logprobs[0].logprob <= 0
        assert bytes(one.bytes) == (bytes([int(one.token[3:5], 16)]) if one.token[:3] == "<0x" else one.token.encode())
    pieces = [x.choices[0] for x in client.chat.completions.create(
        messages=CHAT, max_tokens=5, logprobs=True, top_logprobs=2, stream=True, **GREEDY)]  # fmt: skip
    streamed = [entry for x in pieces if x.logprobs for entry in x.logprobs.content]
    assert streamed == chat.choices[0].logprobs.content


def test_stop_strings_end_before_them(client) -> None:
    text = client.completions.create(prompt="hello", max_tokens=40, **GREEDY).choices[0].text
    stop = text[len(text) // 2 :][:3]
    done = client.completions.create(prompt="hello", max_tokens=40, stop=[stop], **GREEDY).choices[0]
    assert done.text == text[: text.index(stop)] and done.finish_reason == "stop"


def test_models_health_and_numbers(client, address) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").object == "model"
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{address}/metrics").text.splitlines() if line[0] != "#")
    assert float(lines["dla_slots"]) == 8 and float(lines["dla_running"]) == 0
    assert float(lines["dla_generated_total"]) > 0 and float(lines["dla_first_token_seconds_count"]) > 0
    assert float(lines['dla_answers_total{status="200"}']) > 0
    assert httpx.get(f"{address}/stats").json()["slots"] == 8
    assert "<textarea" in httpx.get(address).text


def test_parts_of_a_character_have_their_bytes(service) -> None:
    """Of byte-level BPE, and of sentencepiece with bytes."""
    pieces, text = Pieces(tokenizer := build_tokenizer()), "é "
    made = [pieces(token) for token in tokenizer(text)["input_ids"]]
    assert made == [("bytes:\\xc3", b"\xc3"), ("bytes:\\xa9", b"\xa9"), (" ", b" ")]
    assert pieces(256) == ("<|im_end|>", b"<|im_end|>")
    tokenizer.decode = None  # not asked again
    assert pieces(256) == ("<|im_end|>", b"<|im_end|>")
    pieces = Pieces(service.tokenizer)
    made = [pieces(token) for token in service.tokenizer("x\u2603", add_special_tokens=False)["input_ids"]]
    assert b"".join(piece.raw for piece in made).endswith("\u2603".encode())
    assert made[-1] == ("<0x83>", b"\x83")


@pytest.mark.parametrize("path, body, status, words", [
    ("completions", {"prompt": "x", "max_tokens": 0}, 400, ["max_tokens = 0", "1 to 64"]),
    ("completions", {"prompt": "x", "max_tokens": 65}, 400, ["max_tokens = 65"]),
    ("completions", {"prompt": "x", "temperature": -1}, 400, ["temperature -1"]),
    ("completions", {"prompt": "x", "temperature": "1"}, 400, ["temperature = '1'"]),
    ("completions", {"prompt": "x", "top_p": 2}, 400, ["top_p 2"]),
    ("completions", {"prompt": "x", "seed": -1}, 400, ["seed -1"]),
    ("completions", {"prompt": "x", "seed": 2**63}, 400, [f"seed {2**63}"]),
    ("completions", {"prompt": "x", "seed": 2**200, "n": 2}, 400, [f"seed {2**200}"]),
    ("completions", {"prompt": "x", "n": 1000}, 400, ["n = 1000"]),
    ("completions", {"prompt": "x", "logit_bias": {"1": 2}}, 400, ["logit_bias"]),
    ("completions", {"prompt": "x", "frequency_penalty": 0.5}, 400, ["frequency_penalty = 0.5"]),
    ("completions", {"prompt": "x", "nonsense": 1}, 400, ["nonsense"]),
    ("completions", {"prompt": "x", "session": "s"}, 400, ["session", "--adapter"]),
    ("completions", {"prompt": "x", "stream_options": {}}, 400, ["stream_options"]),
    ("completions", {"prompt": "x", "stop": [""]}, 400, ["stop"]),
    ("completions", {"prompt": "x", "stop": ["a"] * 17}, 400, ["stop", "16"]),
    ("completions", {"prompt": "x", "stop": "a" * 257}, 400, ["stop", "256"]),
    ("completions", {"prompt": "x", "stream": True, "stream_options": {"include_obfuscation": True}}, 400,
     ["include_obfuscation"]),
    ("completions", {"prompt": "x", "timeout": 0}, 400, ["timeout = 0"]),
    ("completions", {"prompt": ""}, 400, ["prompt"]),
    ("completions", {"prompt": []}, 400, ["prompt"]),
    ("completions", {"prompt": ["x"] * 129}, 400, ["129"]),
    ("completions", {"prompt": [10**6]}, 400, ["1000000"]),
    ("completions", {"prompt": [-1]}, 400, ["-1"]),
    ("completions", {"prompt": {"x": 1}}, 400, ["prompt"]),
    ("completions", {}, 400, ["prompt"]),
    ("completions", {"prompt": "x", "model": "other"}, 404, ["'other'", "'tiny'"]),
    ("chat/completions", {"messages": []}, 400, ["messages"]),
    ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, ["messages.0.role", "tool"]),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, ["messages.0.content"]),
    ("chat/completions", {"messages": [{"role": "user", "content": "x", "name": "n"}]}, 400, ["messages.0.name"]),
    ("chat/completions", {"messages": CHAT, "tools": [{}]}, 400, ["tools"]),
    ("chat/completions", {"messages": CHAT, "top_logprobs": 2}, 400, ["top_logprobs"]),
    ("chat/completions", {"messages": CHAT, "response_format": {"type": "json_object"}}, 400, ["response_format"]),
    ("embeddings", {"input": "x"}, 404, ["/v1/embeddings"]),
])  # fmt: skip
def test_what_is_refused_is_named(address, path, body, status, words) -> None:
    answer = httpx.post(f"{address}/v1/{path}", json={"model": "tiny", **body})
    error = answer.json()["error"]
    assert answer.status_code == status and all(word in error["message"] for word in words), error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("raw", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "tiny", "prompt": "\\ud800"}', b"[" * 10_000,
    b'{"model": "tiny", "prompt": "x", "temperature": NaN}', b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
])  # fmt: skip
def test_bodies_that_are_no_request(address, raw) -> None:
    answer = httpx.post(f"{address}/v1/completions", content=raw)
    assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text


def test_a_large_body_is_refused_early(address) -> None:
    def parts():
        for _ in range(30):
            yield b"x" * 10_000

    for content in (b"x" * 100_001, parts()):  # with its length, and without
        answer = httpx.post(f"{address}/v1/completions", content=content)
        assert answer.status_code == 413 and "100000 bytes" in answer.json()["error"]["message"]


def test_a_client_that_leaves_while_it_sends_is_no_fault(service, address, capfd) -> None:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
        time.sleep(0.2)
    deadline = time.monotonic() + 20
    while b'dla_answers_total{status="499"}' not in (seen := service.metrics.page()):
        assert time.monotonic() < deadline, seen.decode()
        time.sleep(0.01)
    assert "Traceback" not in capfd.readouterr().err


def test_the_key_is_asked_for(make_service) -> None:
    with running(make_service(), key="secret") as address:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = httpx.post(f"{address}/v1/completions", headers=headers, json={"model": "tiny", "prompt": "x"})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{address}/health").status_code == httpx.head(f"{address}/health").status_code == 200
        assert httpx.get(f"{address}/v1/models", headers={"Authorization": "bearer secret"}).status_code == 200
        with openai.OpenAI(base_url=f"{address}/v1", api_key="secret") as client:
            assert client.completions.create(prompt="x", max_tokens=1, **GREEDY).choices


def test_a_client_that_leaves_frees_its_slot(client, service) -> None:
    with ended(service):
        stream = client.completions.create(
            prompt="x", max_tokens=64, stream=True, extra_body={"ignore_eos": True}, **GREEDY
        )
        next(stream)
        stream.close()


def test_a_long_submission_holds_up_nobody(make_service) -> None:
    service, begun = make_service(), threading.Event()
    submit = service.engine.submit

    def slow(*arguments):
        begun.set()
        time.sleep(1.0)
        return submit(*arguments)

    service.engine.submit = slow
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    with running(service) as address, concurrent.futures.ThreadPoolExecutor() as pool:
        call = pool.submit(httpx.post, f"{address}/v1/completions", json=body)
        assert begun.wait(20)
        begin = time.monotonic()
        assert httpx.get(f"{address}/health").status_code == 200 and time.monotonic() - begin < 0.8
        assert not call.done() and call.result().status_code == 200


def test_a_fault_is_counted_and_an_engine_that_has_ended_is_no_limit_of_rate(make_service, monkeypatch) -> None:
    service = make_service()
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    with running(service) as address:
        monkeypatch.setattr(service, "check_model", lambda name: 1 / 0)
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 500
        assert b'dla_answers_total{status="500"} 1.0' in service.metrics.page()
        monkeypatch.undo()
        service.engine._closed = True
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 503
        service.engine._closed = False


def test_numbers_are_there_while_the_engine_works(make_service) -> None:
    service = make_service(limits=Limits(max_tokens=4000))
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with running(service) as address, httpx.stream("POST", f"{address}/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        for _ in range(20):
            begin = time.monotonic()
            assert httpx.get(f"{address}/stats").json()["running"] == 1
            assert time.monotonic() - begin < 1.0
        answer.close()


def test_too_many_and_too_late(make_service) -> None:
    service = make_service(EngineConfig(slots=1, max_waiting=2), Limits(max_tokens=2000))
    with running(service) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError, match="max_waiting = 2"):
            client.completions.create(prompt="x", n=9, max_tokens=2000, **GREEDY)
        late = client.completions.create(
            prompt="x", max_tokens=2000, extra_body={"timeout": 0.3, "ignore_eos": True}, **GREEDY
        )
        assert late.choices[0].finish_reason == "deadline"
        service.draining = True
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.completions.create(prompt="x", **GREEDY)
        assert httpx.get(f"{address}/health").status_code == 503


@pytest.mark.long
def test_a_thousand_requests_of_which_some_are_wrong(export) -> None:
    """Each one is answered, nothing is left behind, and the server's memory does not grow."""
    r = random.Random(3)

    def make(number: int) -> tuple[bool, dict]:
        wrong = number % 20 == 7
        body = {"model": "tiny", "prompt": "hello"[: r.randrange(1, 6)], "max_tokens": r.randrange(1, 4)}
        body |= {"stream": number % 3 == 0}
        if wrong:
            body |= r.choice([{"max_tokens": -1}, {"prompt": None}, {"what": 1}, {"model": "no"}, {"n": "many"}])
        return wrong, body

    with (
        served(export, "--name", "tiny", "--slots", "8") as (process, address),
        httpx.Client(timeout=60) as http,
        concurrent.futures.ThreadPoolExecutor(16) as pool,
    ):

        def ask(one: tuple[bool, dict]) -> tuple[bool, int]:
            wrong, body = one
            answer = http.post(f"{address}/v1/completions", json=body)
            if answer.status_code == 200 and body["stream"]:
                assert answer.text.endswith("data: [DONE]\n\n")
            return wrong, answer.status_code

        answers, resident = [], []
        for first in (0, 500):
            answers += pool.map(ask, [make(n) for n in range(first, first + 500)])
            resident.append(psutil.Process(process.pid).memory_info().rss)
        after = httpx.get(f"{address}/stats").json()
    assert len(answers) == 1000 and sum(wrong for wrong, _ in answers) == 50
    assert all(status in ((400, 404) if wrong else (200,)) for wrong, status in answers)
    assert after["requests"] == 950
    assert after["running"] == after["waiting"] == after["slots_used"] == after["reserved_bytes"] == 0
    assert resident[1] < 1.02 * resident[0], resident


def test_an_answer_can_be_sent_back_as_it_is(client) -> None:
    said = [{"role": "user", "content": "hello"}]
    first = client.chat.completions.create(messages=said, max_tokens=4, **GREEDY).choices[0].message
    more = {"role": "user", "content": "and then?"}
    texts = [
        client.chat.completions.create(messages=[*said, message, more], max_tokens=4, **GREEDY)
        .choices[0]
        .message.content
        for message in (first, first.model_dump(), {"role": "assistant", "content": first.content})
    ]
    assert len(set(texts)) == 1
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}
    with pytest.raises(openai.BadRequestError, match="tool_calls"):
        client.chat.completions.create(messages=[*said, call, more], **GREEDY)


@pytest.mark.parametrize(
    "prompt", [[1.5] * 20_000, [[1.5]] * 10_000, [None] * 15_000], ids=["numbers", "lists", "null"]
)
def test_a_long_wrong_list_is_one_error(address, prompt) -> None:
    begin = time.process_time()
    answer = httpx.post(f"{address}/v1/completions", json={"model": "tiny", "prompt": prompt})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("prompt")
    assert len(answer.json()["error"]["message"]) < 500 and time.process_time() - begin < 2


def test_a_fault_of_the_engine_ends_every_call(make_service) -> None:
    service = make_service()
    with running(service) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
        stream = client.completions.create(
            prompt="x", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}, timeout=20, **GREEDY
        )
        next(stream)

        def broken() -> list:
            raise RuntimeError("out of memory")

        service.engine._scheduler.begin_step = broken
        with pytest.raises(openai.APIError, match="out of memory"):
            list(stream)
    assert service.failed


def test_stream_options_may_be_empty(client) -> None:
    options = {"stream": True, "stream_options": {"include_usage": None}}
    assert list(client.completions.create(prompt="x", max_tokens=2, **options, **GREEDY))
