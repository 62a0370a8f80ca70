"""The routes."""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_dla.serving.http.answers import DONE, Choice, Form, Pieces, sse
from megatron_dla.serving.http.schema import ApiError, ChatBody, CompletionBody, ascii_only, parse
from megatron_dla.serving.http.service import Call, Service

PAGE = Path(__file__).with_name("page.html")


class _Guard:
    """Answers before the body is read: no key, too large a body; and counts answers by status."""

    def __init__(self, app: ASGIApp, service: Service, key: str | None) -> None:
        self.app, self.service, self.key = app, service, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.service.metrics.answered(message["status"])
            await send(message)

        if error := self._refuse(scope):
            await _answer(error)(scope, receive, counted)
        else:
            await self.app(scope, receive, counted)

    def _refuse(self, scope: Scope) -> ApiError | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.key is not None and scope["path"].startswith("/v1"):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.key.encode()):
                return ApiError(
                    401, "the API key is missing or wrong: send the header Authorization: Bearer KEY",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.service.limits.body_bytes:
            return _too_large(self.service.limits.body_bytes)
        return None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes: send less", code="body_too_large")


def _answer(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


async def _body(request: Request, limit: int) -> bytes:
    """Raises ApiError: 413, as soon as there is more than `limit`; 499, the client left, so that nobody reads it."""
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
    except ClientDisconnect as error:
        raise ApiError(499, "the client left while it sent the body") from error
    return b"".join(parts)


async def _gone(request: Request) -> None:
    """Returns when the client has left. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect(call: Call, request: Request) -> list[Choice] | None:
    """All choices; None: the client left before."""
    choices = [Choice() for _ in call.handles]
    finished = False

    async def gather() -> None:
        nonlocal finished
        async for index, event in call:
            choices[index].add(event)
        finished = True
        group.cancel_scope.cancel()

    async def watch() -> None:
        await _gone(request)
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(gather)
        group.start_soon(watch)
    return choices if finished else None


async def _chunks(call: Call, form: Form, with_usage: bool) -> AsyncIterator[str]:
    choices = [Choice() for _ in call.handles]
    if form.chat:
        for index in range(len(choices)):
            yield sse(form.opening(index))
    async for index, event in call:
        choices[index].add(event)
        if event.finish_reason == "error":
            yield sse(_failed(event.error).body)
            continue
        if event.text or event.finish_reason or event.logprob is not None:
            yield sse(form.chunk(index, choices[index], event))
    if with_usage:
        yield sse(form.last(choices))
    yield DONE


def _failed(error: str) -> ApiError:
    return ApiError(500, ascii_only(error), kind="server_error")


Encode = Callable[[Any], Awaitable[tuple[list[list[int]], list[int] | None]]]


async def _complete(
    service: Service, pieces: Pieces, request: Request, kind: type[CompletionBody] | type[ChatBody], encode: Encode
) -> Response:
    """The answer to a request for text, whole or as a stream. Raises ApiError."""
    begin, raw = time.perf_counter(), await _body(request, service.limits.body_bytes)
    body: Any = await service.in_thread(lambda: parse(kind, raw))
    service.check_model(body.model)
    prompts, numbers = await encode(body)
    form = Form(kind is ChatBody, service.name, int(time.time()), body.choices, pieces)
    async with AsyncExitStack() as stack:
        call = await stack.enter_async_context(service.start(body, prompts, numbers, begin, lambda: _gone(request)))
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            held = stack.pop_all()

            async def stream() -> AsyncIterator[str]:
                async with held:
                    async for chunk in _chunks(call, form, usage):
                        yield chunk

            return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        choices = await _collect(call, request)
    if choices is None:
        return Response(status_code=499)  # nobody reads it
    if errors := [choice.error for choice in choices if choice.finish_reason == "error"]:
        raise _failed(errors[0])
    return await service.in_thread(lambda: JSONResponse(form.whole(choices)))


def create_app(service: Service, key: str | None = None) -> FastAPI:
    """Args: key: clients of /v1 must send it; None: nobody is asked for one."""
    app = FastAPI(title="megatron-dla", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Guard, service=service, key=key)
    _add_errors(app, service)
    _add_completions(app, service)
    _add_state(app, service)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text())

    return app


def _add_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return _answer(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        path = ascii_only(request.url.path)[:200]
        return _answer(
            ApiError(error.status_code, f"{request.method} {path}: {error.detail}", headers=dict(error.headers or {}))
        )

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        service.metrics.answered(500)  # it goes past _Guard
        return _answer(_failed(f"{type(error).__name__}: {error}"))


def _add_completions(app: FastAPI, service: Service) -> None:
    pieces = Pieces(service.tokenizer)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        async def encode(body: CompletionBody) -> tuple[list[list[int]], list[int] | None]:
            return [await service.encode(prompt) for prompt in body.prompts], None

        return await _complete(service, pieces, request, CompletionBody, encode)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        async def encode(body: ChatBody) -> tuple[list[list[int]], list[int] | None]:
            ids, numbers = await service.encode_chat(body)
            return [ids], numbers

        return await _complete(service, pieces, request, ChatBody, encode)


def _add_state(app: FastAPI, service: Service) -> None:
    """Models, sessions, health and numbers."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service)

    @app.get("/v1/sessions")
    async def sessions() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "session"} for name in service.sessions.names()]}

    @app.delete("/v1/sessions/{name:path}")
    async def forget(name: str) -> dict[str, Any]:
        if not service.sessions.forget(name):
            raise ApiError(404, f"session {ascii_only(name)!r}: there is none", param="session")
        return {"id": name, "object": "session", "deleted": True}

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        state = "failed" if service.failed else "draining" if service.draining else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/stats")
    def stats() -> dict[str, Any]:
        found = service.metrics.stats()
        return asdict(found) | {"waste": found.waste, "model": service.name}


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "megatron-dla"}
