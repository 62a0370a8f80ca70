"""`dla serve` as a process, sessions of a δ-mem, and the page in a browser."""

import contextlib
import os
import signal
import time
from pathlib import Path

import httpx
import openai
import pytest

from megatron_dla.cli import main
from tests.serving.http.conftest import ended, running, served
from tests.support.chromium import needs_chromium, open_tab

SOFTMAX = Path(__file__).parents[2] / "fixtures/62bb8a7/export"  # which has a softmax layer
LONG = {"model": "hf_served", "prompt": "x", "stream": True, "extra_body": {"ignore_eos": True}}


def client_of(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)


def test_sigterm_lets_a_request_end(export) -> None:
    with served(export, "--slots", "2") as (process, address), client_of(address) as client:
        stream = client.completions.create(max_tokens=200, **LONG)
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert process.wait(60) == 0 and process.stderr.read() == ""


def test_a_second_interrupt_ends_it_at_once(export) -> None:
    with served(export, "--slots", "2") as (process, address), client_of(address) as client:
        stream = client.completions.create(max_tokens=4000, **LONG)
        next(stream)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.4)
        assert process.wait(30) >= 0 and "terminate called" not in process.stderr.read()
        with contextlib.suppress(httpx.HTTPError, openai.APIError):  # it may break off
            assert all(part.choices[0].finish_reason != "length" for part in stream)


def test_what_runs_when_the_drain_ends_gets_an_end(export) -> None:
    with served(export, "--drain", "1") as (process, address), client_of(address) as client:
        stream = client.completions.create(max_tokens=4000, **LONG)
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason == "cancelled"
        assert process.wait(30) == 0 and process.stderr.read() == ""


@pytest.mark.parametrize("arguments, words", [
    (["nowhere"], "nowhere"),
    (["{export}", "--port", "70000"], "--port 70000"),
    (["{export}", "--slots", "0"], "slots = 0"),
    (["{export}", "--max-tokens", "0"], "--max-tokens 0"),
    (["{export}", "--drain", "inf"], "--drain inf"),
    (["{export}", "--adapter", "nowhere"], "--adapter"),
    (["{export}", "--slots", "1099511627776"], "--slots 1099511627776"),
    (["{export}", "--kv-tokens", "1125899906842624"], "--kv-tokens 1125899906842624"),
    (["{softmax}", "--slots", "65536", "--kv-tokens", "1099511627776"], "--slots 65536 --kv-tokens 1099511627776"),
    (["{softmax}", "--kv-tokens", "1099511627776"], "--slots 16 --kv-tokens 1099511627776"),
    (["{export}", "--host", ""], "--host ''"),
    (["{export}", "--host", "a" * 70], "--host"),
])  # fmt: skip
def test_mistakes_are_one_line(export, capsys, arguments, words) -> None:
    folders = {"{export}": str(export), "{softmax}": str(SOFTMAX)}
    assert main(["serve", *(folders.get(one, one) for one in arguments)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and words in error


@pytest.mark.parametrize("key", [b"\xff", b"secret ", b"sec\nret"])
def test_a_key_that_no_client_can_send(capsys, monkeypatch, key: bytes) -> None:
    monkeypatch.setenv("DLA_API_KEY", os.fsdecode(key))
    assert main(["serve", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "DLA_API_KEY" in error and "sec" not in error.replace("DLA_API_KEY", "")


@needs_chromium
def test_the_page_streams_an_answer(make_service, tmp_path) -> None:
    service = make_service()
    with running(service) as address, open_tab(address, tmp_path) as tab:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x") as client:
            same = client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=128, temperature=0)
        tab.wait("document.getElementById('model').textContent === 'tiny'")
        tab.evaluate("document.getElementById('temperature').value = 0; document.getElementById('go').click()")
        first = tab.wait("document.getElementById('out').textContent")  # before the last token
        speed = tab.wait("document.getElementById('speed').textContent")
        assert speed.startswith(f"{same.usage.completion_tokens} tokens, ") and speed.endswith(" tokens/s")
        assert tab.evaluate("document.getElementById('out').textContent") == same.choices[0].text
        assert same.choices[0].text.startswith(first) and len(first) < len(same.choices[0].text)
        assert tab.evaluate("document.getElementById('error').textContent") == "" and tab.console == []


@needs_chromium
def test_the_page_stops_and_says_what_is_wrong(make_service, tmp_path) -> None:
    service = make_service()
    with running(service, key="secret") as address, open_tab(address, tmp_path) as tab:
        tab.wait("document.getElementById('model').textContent === 'tiny'")
        tab.evaluate("document.getElementById('go').click()")
        assert "key" in tab.wait("document.getElementById('error').textContent").lower()
        tab.evaluate("document.getElementById('key').value = 'secret'")
        tab.evaluate("document.getElementById('tokens').value = 100000; document.getElementById('go').click()")
        assert "max_tokens" in tab.wait("document.getElementById('error').textContent.includes('tokens') && "
                                        "document.getElementById('error').textContent")  # fmt: skip
        with ended(service):
            tab.evaluate("document.getElementById('tokens').value = 900; document.getElementById('go').click()")
            tab.wait("document.getElementById('out').textContent")
            tab.evaluate("document.getElementById('stop').click()")
            tab.wait("!document.getElementById('go').disabled")
        assert tab.evaluate("document.getElementById('error').textContent") == ""
