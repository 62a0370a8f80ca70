"""Arguments of `dla boundaries`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_dla.errors import UserError


def add_boundaries_parser(subparsers: Any) -> None:
    """Add the command to an argparse subparsers object; `args.func(args)` returns the exit code."""
    text = "show where an exported model opens slots in a text, and which it merges: an HTML page and a PNG"
    parser = subparsers.add_parser("boundaries", help=text, description=text)
    parser.add_argument("hf_dir", type=Path, help="directory of `dla convert to-hf`")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a text file (UTF-8)")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="of its beginning (default: 512)")
    parser.add_argument(
        "--head", type=_head, metavar="LAYER,HEAD", help="shown first, and in the PNG (default: the one in the middle "
        "by boundary rate)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("boundaries.html"), metavar="FILE",
        help="the page; the picture goes beside it (default: boundaries.html)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.set_defaults(func=_boundaries)


def _head(text: str) -> tuple[int, int]:
    layer, _, head = text.partition(",")
    if not (layer.isdecimal() and head.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: write LAYER,HEAD, both from 0")
    return int(layer), int(head)


def _boundaries(args: argparse.Namespace) -> int:
    from megatron_dla.boundaries.collect import collect, tokenise
    from megatron_dla.boundaries.page import choose, write_page
    from megatron_dla.boundaries.picture import draw
    from megatron_dla.hf.load import load_export, load_export_tokenizer

    if not 2 <= args.tokens <= 4096:
        raise UserError(f"--tokens {args.tokens}: use 2 to 4096")
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--text {str(args.text)!r} cannot be read ({error}): give a UTF-8 text file") from error
    ids, pieces = tokenise(load_export_tokenizer(args.hf_dir), text, args.tokens)
    record = collect(load_export(args.hf_dir, device=args.device), ids, pieces)
    shown = choose(record, args.head)
    picture = args.out.with_suffix(".png")
    for path in (write_page(record, shown, args.out, args.hf_dir.name, args.text.name), draw(record, shown, picture)):
        print(path)
    return 0
