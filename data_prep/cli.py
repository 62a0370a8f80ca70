"""`dla data tokenizer | shards | merge | verify | stats | show`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dla.data_prep.sources import ReadOptions
from megatron_dla.errors import DataError
from megatron_dla.files import FULL, naming_full_disk
from megatron_dla.shard_index import MIN_TRAIN_SHARDS, ShardIndex

DEFAULT_SKIP_BAD = 0.01


def add_data_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add `dla data` with its commands; `args.func(args)` returns the exit code and may raise DataError."""
    data = subparsers.add_parser("data", help="train a tokenizer, tokenise text into shards, look at and verify shards")
    names = "tokenizer|shards|merge|verify|stats|show"
    commands = data.add_subparsers(dest="data_command", required=True, metavar=names)

    tokenizer = commands.add_parser(
        "tokenizer",
        help="train a lossless byte-fallback BPE tokenizer",
        description="Train a lossless byte-fallback BPE tokenizer and write OUTPUT/tokenizer.model.",
    )
    _add_input(tokenizer)
    tokenizer.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory for tokenizer.model")
    tokenizer.add_argument(
        "--vocab-size",
        type=int,
        default=4096,
        metavar="N",
        help="number of tokens, including 256 bytes and 3 special tokens (default 4096)",
    )
    tokenizer.add_argument(
        "--max-pieces", type=int, default=500_000, metavar="N",
        help="train on a random sample of at most N pieces of up to 4,000 bytes of text (default 500000)",
    )  # fmt: skip
    tokenizer.add_argument("--seed", type=int, default=0, metavar="N", help="seed of that sample (default 0)")
    tokenizer.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    tokenizer.set_defaults(func=_tokenizer)

    _add_shards(commands)
    merge = commands.add_parser(
        "merge",
        help="join data directories that were built apart",
        description="Join data directories of one tokenizer, built with --part for instance, into OUTPUT. Shards are "
        "hard links where the file system allows it.",
    )
    merge.add_argument("parts", nargs="+", type=Path, metavar="DIR", help="data directories, in the order to keep")
    merge.add_argument("--output", required=True, type=Path, metavar="DIR", help="data directory to write")
    merge.add_argument(
        "--dedup", action="store_true",
        help="keep only the first of documents with the same tokens, also of those in different parts",
    )  # fmt: skip
    _add_workers(merge)
    merge.add_argument("--overwrite", action="store_true", help="replace existing data")
    merge.set_defaults(func=_merge)

    verify = commands.add_parser(
        "verify",
        help="check shards against their index",
        description="Check sizes, checksums, the tokenizer and every document; list all damaged or missing shards.",
    )
    _add_directory(verify)
    verify.add_argument("--fast", action="store_true", help="check sizes and checksums only, not the tokens")
    _add_workers(verify)
    verify.set_defaults(func=_verify)
    _add_stats(commands)
    _add_show(commands)


def _add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="data directory, or its URL")
    parser.add_argument(
        "--cache-dir", default="", metavar="DIR", help="where shards at a URL are kept (default: ~/.cache/megatron-dla)"
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: one per available core)")


def _add_stats(commands: argparse._SubParsersAction[Any]) -> None:
    stats = commands.add_parser(
        "stats",
        help="tokens, documents, their lengths and sources",
        description="Print tokens, documents, bytes a token, the lengths of documents, and all of it by source.",
    )
    _add_directory(stats)
    stats.add_argument("--out", type=Path, metavar="DIR", help="write stats.json and a histogram, lengths.png, there")
    stats.add_argument(
        "--depth", type=int, default=1, metavar="N",
        help="parts of a path that name a source: 1 is an input file or directory, 2 its subdirectories (default 1)",
    )  # fmt: skip
    stats.add_argument("--shards", type=int, metavar="N", help="read N shards only, evenly spaced (default: all)")
    _add_workers(stats)
    stats.set_defaults(func=_stats)


def _add_show(commands: argparse._SubParsersAction[Any]) -> None:
    show = commands.add_parser(
        "show",
        help="print a document, or a packed row",
        description="Print document N of a split, as its tokens give it, or, with --row, the Nth row that a run reads.",
    )
    _add_directory(show)
    show.add_argument("number", type=int, metavar="N", help="from 0")
    show.add_argument("--split", default="train", metavar="NAME", help="default: train")
    row = show.add_argument_group(
        "rows", "Row i of a step is row step * global_batch_size + i. The other options are those of the run's config."
    )
    row.add_argument("--row", action="store_true", help="a packed row, with the boundaries of its documents")
    for name in ("seq_len", "num_streams", "seed", "packing"):
        row.add_argument(
            f"--{name.replace('_', '-')}", type=str if name == "packing" else int, metavar=name.upper(),
            help="default: that of a config without it",
        )  # fmt: skip
    show.set_defaults(func=_show)


def _add_shards(commands: argparse._SubParsersAction[Any]) -> None:
    shards = commands.add_parser(
        "shards",
        help="tokenise text into WebDataset shards with a checksummed index",
        description="Tokenise text into OUTPUT/train/*.tar and OUTPUT/val/*.tar with OUTPUT/index.json. The result is "
        "identical byte for byte for any number of workers.",
    )
    _add_input(shards)
    shards.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        metavar="FILE_OR_DIR",
        help="tokenizer.model of sentencepiece or a tokenizer.json, or their directory",
    )
    shards.add_argument("--output", required=True, type=Path, metavar="DIR", help="data directory to write")
    shards.add_argument(
        "--val-fraction", type=float, default=0.02, metavar="F",
        help="share of the documents used for validation, at least one; 0 for none (default 0.02)",
    )  # fmt: skip
    shards.add_argument("--val-docs", type=int, metavar="N", help="use N documents for validation instead")
    shards.add_argument(
        "--shard-tokens", type=int, default=1_000_000, metavar="N", help="target tokens per shard (default 1000000)"
    )
    shards.add_argument(
        "--min-train-shards", type=int, default=MIN_TRAIN_SHARDS, metavar="N",
        help="write at least this many train shards if there are as many documents; a run needs one per stream "
        f"(data.num_streams; default {MIN_TRAIN_SHARDS})",
    )  # fmt: skip
    shards.add_argument("--workers", type=int, metavar="N", help="processes (default: one per available core)")
    shards.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the choice of validation documents (default 0)"
    )
    shards.add_argument(
        "--part", type=_part, default=(0, 1), metavar="I/N",
        help="read only every Nth input file, from the Ith on (0 to N-1), so that N machines build a part each for "
        "`dla data merge`",
    )  # fmt: skip
    shards.add_argument("--dedup", action="store_true", help="keep only the first of exact copies of a document")
    shards.add_argument("--overwrite", action="store_true", help="replace existing data once the new data is complete")
    shards.set_defaults(func=_shards)


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", required=True, nargs="+", action="extend", type=Path, metavar="PATH",
        help="files, directories, quoted glob patterns or saved Hugging Face datasets: .txt (one document per file), "
        ".jsonl, .ndjson, .json (JSONL), each also with .gz, .xz, .bz2, .zst; .parquet, .arrow",
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--text-field", default="text", metavar="NAME",
        help="field of JSONL lines, column of tables; a.b is field b inside a (default: text)",
    )  # fmt: skip
    add("--separator", default="", metavar="TEXT", help="text between the documents of a .txt file (default: none)")
    add(
        "--skip-bad", nargs="?", type=float, const=DEFAULT_SKIP_BAD, metavar="SHARE",
        help="leave bad records out, and count them, while they are at most this share of all "
        f"(default without the option: any is an error; with it: {DEFAULT_SKIP_BAD})",
    )  # fmt: skip
    add("--min-chars", type=int, default=0, metavar="N", help="leave out documents under N characters")
    add("--max-chars", type=int, metavar="N", help="leave out documents above N characters")


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be I/N with I from 0 to N-1, such as 0/8")
    return int(number), int(count)


def _options(args: argparse.Namespace) -> ReadOptions:
    names = ("text_field", "separator", "skip_bad", "min_chars", "max_chars")
    return ReadOptions(**{name: getattr(args, name) for name in names})


def _tokenizer(args: argparse.Namespace) -> int:
    from megatron_dla.data_prep.tokenizer import train_tokenizer

    made = train_tokenizer(
        args.input, args.output, args.vocab_size, options=_options(args), input_sentence_size=args.max_pieces,
        seed=args.seed, overwrite=args.overwrite,
    )  # fmt: skip
    print(f"{made.path}: {made.vocab_size} tokens, sha256 {made.sha256}")
    return 0


@contextmanager
def _going_on(output: Path) -> Iterator[None]:
    """The error of a full disk names a file, and says that nothing has to be done twice."""
    try:
        with naming_full_disk(output):
            yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        words = f"{error.strerror}; free some space, and the same command goes on where it stopped"
        raise OSError(error.errno, words, error.filename) from error


def _shards(args: argparse.Namespace) -> int:
    from megatron_dla.data_prep.shards import build_shards

    with _going_on(args.output):
        index = build_shards(
            args.input, args.tokenizer, args.output, val_fraction=args.val_fraction, val_docs=args.val_docs,
            shard_tokens=args.shard_tokens, min_train_shards=args.min_train_shards, workers=args.workers,
            seed=args.seed, options=_options(args), dedup=args.dedup, part=args.part, overwrite=args.overwrite,
        )  # fmt: skip
    _print_totals(args.output, index)
    return 0


def _merge(args: argparse.Namespace) -> int:
    from megatron_dla.data_prep.merge import merge_shards

    with _going_on(args.output):
        index = merge_shards(
            args.parts, args.output, dedup=args.dedup, workers=args.workers, overwrite=args.overwrite
        )  # fmt: skip
    _print_totals(args.output, index)
    return 0


def _print_totals(directory: Path, index: ShardIndex) -> None:
    for split in index.splits:
        t = index.totals(split)
        print(
            f"{directory / split}: {t.shards} shards, {t.documents:,} documents, {t.tokens:,} tokens, "
            f"{t.text_bytes / t.tokens:.2f} bytes of text per token"
        )


def _opened(args: argparse.Namespace) -> Any:
    from megatron_dla.data.remote import open_directory

    return open_directory(args.directory, args.cache_dir)


def _verify(args: argparse.Namespace) -> int:
    from megatron_dla.data_prep.verify import verify_shards

    print(verify_shards(_opened(args), deep=not args.fast, workers=args.workers))
    return 0


def _stats(args: argparse.Namespace) -> int:
    from megatron_dla.data_prep.shard_file import check_creatable
    from megatron_dla.data_prep.stats import data_stats, write_stats

    if args.out:
        check_creatable(args.out, "--out")
    stats = data_stats(_opened(args), depth=args.depth, shards=args.shards, workers=args.workers)
    print(stats)
    for path in write_stats(stats, args.out) if args.out else []:
        print(path)
    return 0


def _show(args: argparse.Namespace) -> int:
    from megatron_dla.config import RunConfig
    from megatron_dla.data_prep.show import show_document, show_row

    names = ("seq_len", "num_streams", "seed", "packing")
    if not args.row and (alone := [name for name in names if getattr(args, name) is not None]):
        raise DataError(f"--{alone[0].replace('_', '-')} = {getattr(args, alone[0])}: has no effect without --row")
    directory = _opened(args)
    if args.row:
        config = RunConfig()
        defaults: dict[str, Any] = {
            "seq_len": config.data.seq_len, "num_streams": config.data.num_streams, "seed": config.run.seed,
            "packing": config.data.packing,
        }  # fmt: skip
        given = {name: value for name in defaults if (value := getattr(args, name)) is not None}
        print(show_row(directory, args.number, args.split, **defaults | given))
    else:
        print(show_document(directory, args.number, args.split))
    return 0
