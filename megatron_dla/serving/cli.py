"""`dla generate` and `dla chat`: arguments only; the work is imported when a command runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from megatron_dla.errors import UserError

if TYPE_CHECKING:
    from megatron_dla.serving.sampling import Sampling


def add_generate_parser(subparsers: Any) -> None:
    """Add `generate` to an argparse subparsers object."""
    parser = subparsers.add_parser("generate", help="continue prompts with an exported model")
    parser.add_argument("model", help="a directory that `dla convert to-hf` wrote; with --adapter, of its base model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt")
    source.add_argument(
        "--prompts", metavar="FILE",
        help='one prompt a line, or {"prompt": ...} a line in a .jsonl file; - = standard input',
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=8, help="with --prompts: decoded together (default 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt instead of text")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code in the model's directory, not this package's"
    )
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
    parser.add_argument("--top-k", type=int, default=0, help="0 = all tokens (default)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of a CPU (default: 1 for models under 100M parameters)")


def _add_session(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", help="directory of a δ-mem adapter")
    parser.add_argument("--any-base", action="store_true", help="take the adapter also on another base model")
    parser.add_argument("--session", help="file to resume from, if it exists, and to save to afterwards")


def _sampling(args: argparse.Namespace) -> Sampling:
    from megatron_dla.serving.sampling import Sampling

    return Sampling(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
        repetition_penalty=args.repetition_penalty, stop=tuple(args.stop), seed=args.seed,
    )  # fmt: skip


def _session(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "adapter": args.adapter, "session_file": args.session, "any_base": args.any_base, "device": args.device,
        "threads": args.threads,
    }  # fmt: skip


def _generate(args: argparse.Namespace) -> int:
    sampling = _sampling(args)
    if args.adapter is None:
        from megatron_dla.serving.generate import read_prompts, run

        if args.session is not None or args.any_base:
            raise UserError("--session and --any-base are for --adapter DIR")
        prompts = [args.prompt] if args.prompts is None else read_prompts(args.prompts)
        options = {"device": args.device, "threads": args.threads, "batch_size": args.batch_size}
        options["trust_remote_code"] = args.trust_remote_code
        run(args.model, prompts, sampling, as_json=args.json, **options)
        return 0
    from megatron_dla.serving.terminal import generate_with_memory

    if args.trust_remote_code:
        raise UserError("--trust-remote-code is not for --adapter: base models run with transformers' own code")
    if args.prompts is not None or args.json:
        raise UserError("--prompts and --json are not for --adapter: a session has one prompt after another")
    generate_with_memory(args.model, args.prompt, sampling, **_session(args))
    return 0


def _chat(args: argparse.Namespace) -> int:
    from megatron_dla.serving.terminal import chat

    chat(args.model, _sampling(args), **_session(args))
    return 0
