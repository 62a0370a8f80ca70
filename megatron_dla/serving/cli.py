"""`dla generate` and `dla chat`: arguments only; the work is imported when a command runs."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_dla.errors import UserError


def add_generate_parser(subparsers: Any) -> None:
    """Add `generate` to an argparse subparsers object."""
    parser = subparsers.add_parser("generate", help="continue a prompt with an exported model")
    parser.add_argument("model", help="a directory that `dla convert to-hf` wrote; with --adapter, of its base model")
    parser.add_argument("--prompt", required=True)
    _add_sampling(parser, max_new_tokens=100)
    _add_session(parser)
    parser.set_defaults(func=_generate)


def add_chat_parser(subparsers: Any) -> None:
    """Add `chat` to an argparse subparsers object."""
    parser = subparsers.add_parser("chat", help="talk to a model with a δ-mem adapter, in the terminal")
    parser.add_argument("model", help="Hugging Face directory of the base model")
    _add_sampling(parser, max_new_tokens=400)
    _add_session(parser)
    parser.set_defaults(func=_chat)


def _add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def _add_session(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", help="directory of a δ-mem adapter")
    parser.add_argument("--any-base", action="store_true", help="take the adapter also on another base model")
    parser.add_argument("--session", help="file to resume from, if it exists, and to save to afterwards")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed, "device": args.device}


def _generate(args: argparse.Namespace) -> int:
    if args.adapter is None:
        from megatron_dla.serving.generate import generate

        if args.session is not None or args.any_base:
            raise UserError("--session and --any-base are for --adapter DIR")
        generate(args.model, args.prompt, args.max_new_tokens, **_sampling(args))
        return 0
    from megatron_dla.serving.terminal import generate_with_memory

    memory = {"adapter": args.adapter, "session_file": args.session, "any_base": args.any_base}
    generate_with_memory(args.model, args.prompt, args.max_new_tokens, **memory, **_sampling(args))
    return 0


def _chat(args: argparse.Namespace) -> int:
    from megatron_dla.serving.terminal import chat

    memory = {"adapter": args.adapter, "session_file": args.session, "any_base": args.any_base}
    chat(args.model, args.max_new_tokens, **memory, **_sampling(args))
    return 0
