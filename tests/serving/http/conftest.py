"""A real server in this process: uvicorn in a thread, on a free port."""

import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import openai
import pytest
import uvicorn

from megatron_dla.hf.convert import to_hf
from megatron_dla.hf.load import load_export, load_export_tokenizer
from megatron_dla.serving.engine import Engine, EngineConfig
from megatron_dla.serving.http.app import create_app
from megatron_dla.serving.http.server import EngineThread, Server, with_engine
from megatron_dla.serving.http.service import Limits, Service
from tests.support.exports import BASE

CONFIG = EngineConfig(slots=8, prefill_chunk=32, max_waiting=200)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@contextmanager
def ended(service: Service):
    """Wait until nothing runs any more; the requests that ended within the block must have been cancelled."""
    engine, reasons = service.engine, []
    end, step = engine._end, engine.step

    def listen(live, reason, *rest):
        reasons.append(reason)
        return end(live, reason, *rest)

    def slow_step():  # so that no request comes to its length before
        time.sleep(0.02)
        return step()

    engine._end, engine.step = listen, slow_step
    try:
        yield
        deadline = time.monotonic() + 20
        while engine.stats().running:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        engine._end, engine.step = end, step
    assert set(reasons) == {"cancelled"}


@contextmanager
def running(service: Service, key: str | None = None):
    """The base address of a server."""
    thread = EngineThread(service)
    app = with_engine(create_app(service, key), thread)
    server = Server(uvicorn.Config(app, port=0, log_level="error"), service)
    thread.server = server
    loop = threading.Thread(target=server.run)
    loop.start()
    try:
        while not server.started:
            assert loop.is_alive()
            time.sleep(0.01)
        (one,) = server.servers
        yield f"http://127.0.0.1:{one.sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        loop.join(30)
        assert not loop.is_alive() and not thread.is_alive


@contextmanager
def served(directory, *options: str):
    """`dla serve` as a process of its own, and its base address."""
    command = [sys.executable, "-m", "megatron_dla.cli", "serve", str(directory), "--port", "0", *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        line = process.stdout.readline()
        found = re.search(r"serving \S+ at (http://127\.0\.0\.1:\d+)", line)
        assert found, line + process.stderr.read()
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def export(saved, tmp_path_factory):
    """Directory of a DLA model whose tokenizer has a chat template."""
    run = tmp_path_factory.mktemp("served")
    directory = to_hf(saved(BASE, run)[1], run / "hf_served")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def make_service(export):
    def make(config: EngineConfig = CONFIG, limits: Limits | None = None) -> Service:
        engine = Engine(load_export(export), load_export_tokenizer(export), config)
        return Service(engine, "tiny", limits)

    return make


@pytest.fixture(scope="module")
def service(make_service):
    return make_service(limits=Limits(body_bytes=100_000, max_tokens=64))


@pytest.fixture(scope="module")
def address(service):
    with running(service) as found:
        yield found


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
