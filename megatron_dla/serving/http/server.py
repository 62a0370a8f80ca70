"""`dla serve`: model, engine thread and uvicorn, from start to the drain at SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from megatron_dla.errors import UserError
from megatron_dla.hf.directory import read_config
from megatron_dla.hf.load import load_export, load_export_tokenizer, load_tokenizer
from megatron_dla.serving.engine import Engine, EngineConfig
from megatron_dla.serving.http.app import create_app
from megatron_dla.serving.http.service import Limits, Service
from megatron_dla.serving.load import load_adapted
from megatron_dla.serving.sampling import cpu_threads

KEY = "DLA_API_KEY"
"""Environment variable with the API key."""


def api_key() -> str | None:
    """The key in the environment, None without one.

    Raises:
        UserError: no client could send it. The message does not show it.
    """
    key = os.environ.get(KEY) or None
    try:
        if key is None or (key.encode() and key == key.strip() and key.isprintable()):
            return key
    except UnicodeEncodeError:  # bytes that are no UTF-8
        pass
    raise UserError(f"{KEY} has spaces around it, control characters or bytes that are not UTF-8: set another key")


class EngineThread:
    """Steps an engine until it is stopped; a fault ends the server with exit code 1."""

    def __init__(self, service: Service, threads: int | None = None) -> None:
        self.service, self.threads = service, threads
        self.server: uvicorn.Server | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            model = self.service.engine.model
            with cpu_threads(getattr(model, "base", model), self.threads):  # a setting of each thread
                self.service.engine.run(self._stop)
        except Exception as error:
            traceback.print_exc()
            self.service.failed = f"the engine ended: {type(error).__name__}: {error}"
            if self.server is not None:
                self.server.should_exit = True


class Server(uvicorn.Server):
    """uvicorn's. After a signal it says that it takes no more calls; those that run end `drain` seconds later."""

    def __init__(self, config: uvicorn.Config, service: Service, drain: float = 60.0) -> None:
        super().__init__(config)
        self.service, self.drain = service, drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            at = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            print(f"serving {self.service.name} at {at} (page /, API /v1, metrics /metrics)", flush=True)

    def _end(self) -> None:
        """Of the drain."""
        self.service.ended = True
        self.service.engine.cancel_all()

    def handle_exit(self, sig: int, frame: Any) -> None:
        if not self.service.draining:
            timer = threading.Timer(self.drain, self._end)
            timer.daemon = True
            timer.start()
        self.service.draining = True
        super().handle_exit(sig, frame)


def with_engine(app: FastAPI, thread: EngineThread) -> FastAPI:
    """The app, whose engine runs from its start to its end."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        thread.start()
        try:
            yield
        finally:
            thread.stop()

    app.router.lifespan_context = lifespan
    return app


def _make_engine(model: Any, tokenizer: Any, config: EngineConfig) -> Engine:
    """Raises UserError: its slots and pages do not fit into the memory."""
    try:
        return Engine(model, tokenizer, config)
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not full and not any(words in text for words in ("allocate", "overflow", "Storage size")):
            raise
        asked = f"--slots {config.slots} --kv-tokens {config.kv_tokens}"
        raise UserError(f"{asked}: the memory does not hold so many sequences and tokens: lower them") from error


def load(
    hf_dir: Path, adapter: Path | None, config: EngineConfig, name: str | None, limits: Limits, *, device: str = "cpu",
    any_base: bool = False, threads: int | None = None,
) -> Service:  # fmt: skip
    """Raises CheckpointError, UserError: see `load_export`, `load_adapted` and `_make_engine`."""
    label = name or hf_dir.resolve().name
    exported = read_config(hf_dir).get("model_type") == "dla"
    if exported and adapter is not None:
        raise UserError(f"--adapter is for a plain model, {str(hf_dir)!r} is an export with layers of its own")
    if exported:
        model, tokenizer = load_export(hf_dir, device=device), load_export_tokenizer(hf_dir)
        with cpu_threads(model, threads):
            return Service(_make_engine(model, tokenizer, config), label, limits)
    adapted = load_adapted(hf_dir, adapter, any_base=any_base, device=device)
    memory = bool(adapted.layers)
    with cpu_threads(adapted.base, threads):
        engine = _make_engine(adapted, load_tokenizer(hf_dir), config)
    by_message = memory and adapted.config.write == "message"
    return Service(engine, label, limits, has_memory=memory, by_message=by_message)


def serve(service: Service, host: str, port: int, *, drain: float = 60.0, threads: int | None = None) -> int:
    """Serve until SIGTERM or SIGINT; calls that are running have `drain` seconds to end. Returns the exit code."""
    key = api_key()
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        print(f"note: anybody who reaches {host}:{port} can use this server: set {KEY}", file=sys.stderr)
    thread = EngineThread(service, threads)
    app = with_engine(create_app(service, key), thread)
    server = Server(
        uvicorn.Config(
            app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=round(drain) + 5,
            server_header=False,
        ),
        service, drain,
    )  # fmt: skip
    thread.server = server
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises what it caught once more at its end
        signal.signal(number, lambda *_: None)
    try:
        server.run()
    except SystemExit as error:  # uvicorn's, when it cannot listen; it has said why
        raise UserError(f"--host {host} --port {port}: cannot listen there: choose another port") from error
    finally:
        if thread.is_alive:  # after a second signal uvicorn leaves at once
            thread.stop()
    return 1 if service.failed else 0
