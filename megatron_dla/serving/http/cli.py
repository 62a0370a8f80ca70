"""`dla serve`: arguments only; the work is imported when the command runs."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from megatron_dla.errors import UserError

MAX_SLOTS, MAX_KV_TOKENS = 2**16, 2**40  # each slot takes time and memory of its own; bytes of tokens fit 64 bits


def add_serve_parser(subparsers: Any) -> None:
    """Add `serve` to an argparse subparsers object."""
    text = (
        "An OpenAI-compatible server (completions, chat, streaming) over one engine, with a page to try it at / and "
        "Prometheus metrics at /metrics. Clients need the key in the environment variable DLA_API_KEY, if it is set. "
        "SIGTERM ends it when the running requests have ended."
    )
    parser = subparsers.add_parser("serve", help="serve a model over HTTP", description=text)
    parser.add_argument("model", help="what `dla convert to-hf` wrote, or a plain model (Llama, Qwen3, ...)")
    parser.add_argument("--adapter", help="directory of a δ-mem adapter: requests may name a `session`")
    parser.add_argument("--any-base", action="store_true", help="take the adapter also on another base model")
    parser.add_argument("--name", help="of the model in the API (default: the directory's)")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of a CPU (default: 1 for models under 100M parameters)")
    parser.add_argument("--slots", type=int, default=16, help="sequences that are served at once (default 16)")
    parser.add_argument("--decode-rows", type=int, default=0, help="rows of one decode call (default: 16, or --slots)")
    parser.add_argument("--prefill-chunk", type=int, default=128, help="tokens of a prompt that are read at once")
    parser.add_argument("--kv-tokens", type=int, default=4096, help="of softmax layers: tokens a sequence, in the mean")
    parser.add_argument("--prefixes", type=int, default=8, help="beginnings of prompts that are kept (default 8)")
    parser.add_argument("--max-waiting", type=int, default=1024, help="requests that may wait; more get status 429")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of one answer (default 4096)")
    parser.add_argument("--max-body", type=int, default=8 * 2**20, metavar="BYTES", help="of a request (default 8 MiB)")
    parser.add_argument("--sessions", type=int, default=64, help="δ-mem sessions that are kept (default 64)")
    parser.add_argument("--drain", type=float, default=60.0, metavar="S", help="time for running requests at SIGTERM")
    parser.set_defaults(func=_serve)


def _check_host(host: str) -> None:
    """UserError: it names no machine. An empty one would stand for all addresses."""
    try:
        good = bool(host.strip() and host.encode("idna"))
    except UnicodeError:
        good = False
    if not good:
        raise UserError(
            f"--host {host!r}: want a name or an address: 127.0.0.1 for this machine alone, 0.0.0.0 for all"
        )


def _serve(args: argparse.Namespace) -> int:
    for name in ("max_tokens", "max_body", "sessions", "drain"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: want more than 0")
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: want 0 to 65535")
    for name, most in (("slots", MAX_SLOTS), ("kv_tokens", MAX_KV_TOKENS)):
        if getattr(args, name) > most:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: want at most {most}")
    _check_host(args.host)
    try:
        from megatron_dla.serving.http.server import api_key, load, serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn", "prometheus_client"):
            raise
        raise UserError(f"{error.name} is not installed: pip install 'megatron-dla[serve]'") from error
    from megatron_dla.serving.engine import EngineConfig
    from megatron_dla.serving.http.service import Limits

    api_key()  # before the model is read
    config = EngineConfig(
        slots=args.slots, decode_rows=args.decode_rows, prefill_chunk=args.prefill_chunk, kv_tokens=args.kv_tokens,
        prefix_states=args.prefixes, max_waiting=args.max_waiting,
    )  # fmt: skip
    limits = Limits(args.max_body, args.max_tokens, args.sessions)
    adapter = None if args.adapter is None else Path(args.adapter)
    service = load(
        Path(args.model), adapter, config, args.name, limits, device=args.device, any_base=args.any_base,
        threads=args.threads,
    )  # fmt: skip
    return serve(service, args.host, args.port, drain=args.drain, threads=args.threads)
