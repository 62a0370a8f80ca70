"""`dla convert` and `dla generate`: arguments only; the work is imported when a command runs."""

from __future__ import annotations

import argparse
from typing import Any


def add_convert_parser(subparsers: Any) -> None:
    """Add `convert to-hf | from-hf | verify` to an argparse subparsers object; `func(args)` gives the exit code."""
    parser = subparsers.add_parser("convert", help="checkpoint to Hugging Face format, back, and the proof")
    actions = parser.add_subparsers(dest="action", required=True)
    to_hf = actions.add_parser("to-hf", help="write a directory that AutoModelForCausalLM loads")
    to_hf.add_argument("checkpoint", help="a step_N directory, or a run directory (its newest checkpoint)")
    to_hf.add_argument("out", help="directory to write")
    to_hf.add_argument("--tokenizer", help="tokenizer.model of the training data (default: the run's copy)")
    to_hf.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights (default: as stored)")
    to_hf.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    to_hf.set_defaults(func=_to_hf)
    from_hf = actions.add_parser("from-hf", help="write a checkpoint to go on training from")
    from_hf.add_argument("model", help="a directory that `to-hf` wrote")
    from_hf.add_argument("out", help="checkpoint directory to write (step_N)")
    from_hf.add_argument("--tensor-parallel", type=int, default=1, help="number of weight files (default: 1)")
    from_hf.set_defaults(func=_from_hf)
    verify = actions.add_parser("verify", help="compare the logits of a checkpoint and its export")
    verify.add_argument("checkpoint", help="a step_N directory, or a run directory")
    verify.add_argument("model", help="a directory that `to-hf` wrote")
    verify.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit (default: 1e-4)")
    verify.add_argument("--tokens", type=int, default=256, help="tokens to compare over (default: 256)")
    verify.set_defaults(func=_verify)


def add_generate_parser(subparsers: Any) -> None:
    """Add `generate` to an argparse subparsers object."""
    parser = subparsers.add_parser("generate", help="continue a prompt with an exported model")
    parser.add_argument("model", help="a directory that `dla convert to-hf` wrote")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = always the best token (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.set_defaults(func=_generate)


def _to_hf(args: argparse.Namespace) -> int:
    from megatron_dla.hf.convert import to_hf

    options = {"tokenizer": args.tokenizer, "dtype": args.dtype, "overwrite": args.overwrite}
    print(f"wrote {to_hf(args.checkpoint, args.out, **options)}")
    return 0


def _from_hf(args: argparse.Namespace) -> int:
    from megatron_dla.hf.convert import from_hf

    print(f"wrote {from_hf(args.model, args.out, args.tensor_parallel)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from megatron_dla.hf.verify import verify

    verify(args.checkpoint, args.model, tolerance=args.tolerance, tokens=args.tokens)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from megatron_dla.hf.generate import generate

    options = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed, "device": args.device}
    generate(args.model, args.prompt, args.max_new_tokens, **options)
    return 0
