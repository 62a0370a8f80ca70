"""Arguments of `dla boundaries`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_dla.errors import UserError
from megatron_dla.files import atomic_path


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
        help="the page, .html; the picture goes beside it (default: boundaries.html)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.set_defaults(func=_boundaries)


def _head(text: str) -> tuple[int, int]:
    layer, _, head = text.partition(",")
    if not (layer.isdecimal() and head.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: write LAYER,HEAD, both from 0")
    return int(layer), int(head)


def _picture_of(out: Path) -> Path:
    """Where the picture of a page goes. Raises UserError where one of the two could not be written."""
    if out.suffix.lower() != ".html":
        raise UserError(f"--out {str(out)!r}: the page needs a name that ends in .html (the picture has it with .png)")
    picture = out.with_suffix(".png")
    for path in (out, picture):
        if path.exists() and not path.is_file():
            raise UserError(f"--out {str(out)!r}: {str(path)!r} is not a file: remove it, or give another name")
    if not out.parent.is_dir():
        raise UserError(f"--out {str(out)!r}: there is no directory {str(out.parent)!r}: make it first")
    return picture


def _boundaries(args: argparse.Namespace) -> int:
    from megatron_dla.boundaries.collect import collect, tokenise
    from megatron_dla.boundaries.page import choose, write_page
    from megatron_dla.boundaries.picture import draw
    from megatron_dla.hf.load import load_export, load_export_tokenizer

    if not 2 <= args.tokens <= 4096:
        raise UserError(f"--tokens {args.tokens}: use 2 to 4096")
    picture = _picture_of(args.out)
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--text {str(args.text)!r} cannot be read ({error}): give a UTF-8 text file") from error
    ids, pieces = tokenise(load_export_tokenizer(args.hf_dir), text, args.tokens)
    record = collect(load_export(args.hf_dir, device=args.device), ids, pieces)
    shown = choose(record, args.head)
    with atomic_path(picture, fsync=False) as part:  # none of the two stays where the other fails
        draw(record, shown, part)
        write_page(record, shown, args.out, args.hf_dir.name, args.text.name)
    print(args.out, picture, sep="\n")
    return 0
