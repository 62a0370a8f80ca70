"""Tokenizers: the class that encodes and decodes, and the training of a lossless byte-fallback BPE."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_dla.console import progress_bar
from megatron_dla.data_prep.encoders import MAX_VOCAB, SPACE, Encoder, JsonEncoder, SentencePieceEncoder
from megatron_dla.data_prep.readers import shown
from megatron_dla.data_prep.shard_file import check_creatable
from megatron_dla.data_prep.sources import DocumentSource, ReadOptions
from megatron_dla.errors import DataError
from megatron_dla.files import naming_full_disk, write_bytes
from megatron_dla.shard_index import TOKENIZER_CONFIG, TOKENIZER_JSON, TOKENIZER_NAME, ShardIndex, difference

if TYPE_CHECKING:
    from megatron_dla.data.remote import RemoteDirectory

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
_RESERVED = {ord(SPACE): None, 0x2585: None}  # sentencepiece reads one as a space and drops texts with the other
_SHORT = 1 << 12  # characters
_PIECE_BYTES = 4000  # largest piece of training text; sentencepiece drops pieces above its own limit
_PROBES = (
    "", " ", "  lead", "trail  ", "a   b", "\ttab\t\t", "\n\n x\r\n\r", "\x00\x01\x1f\x7f", "<s></s><unk><0x0A>",
    "\u2581 x\u2581\u2581", "\u2585", "\ufeffe\u0301 \xe9", "\U0001f600\U0001f468\u200d\U0001f469", "12345 6.7e-8",
)  # fmt: skip


class Tokenizer:
    """A trained tokenizer. `path` is a `tokenizer.model` of sentencepiece, a `tokenizer.json` of the package
    `tokenizers`, or a directory that holds one of them (of both, the model).

    Attributes:
        vocab_size: above every token id. eos_id: ends every document. bos_id: never written by us (-1: none).
        sha256: hex, of the file `path`.
        losses: texts that decode to something else, (text, decoded), of those tried; () for the tokenizers that
            `dla data tokenizer` makes, whose `decode(encode(text))` is `text` for every text.
        exact_bytes: `token_bytes` of a text's tokens sum to its size, except where the text is changed.

    Raises DataError if the file is missing, is no tokenizer, or has no token that ends documents.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        file = Path(path)
        if file.is_dir():
            names = [name for name in (TOKENIZER_NAME, TOKENIZER_JSON) if (file / name).is_file()]
            if not names:
                raise DataError(
                    f"{shown(file)}: no {TOKENIZER_NAME} or {TOKENIZER_JSON} in this directory; name the file, or "
                    "train a tokenizer with `dla data tokenizer`"
                )
            file = file / names[0]
        self.path = file
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise DataError(f"{file}: not a file; give a tokenizer.model or tokenizer.json (--tokenizer)")
        try:
            model = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"{file}: cannot read the tokenizer ({error.strerror}); train one with `dla data tokenizer`"
            ) from error
        self._encoder: Encoder = (JsonEncoder if file.suffix == ".json" else SentencePieceEncoder)(file, model)
        self.sha256: str = hashlib.sha256(model).hexdigest()
        self.vocab_size, self.eos_id, self.bos_id = (
            self._encoder.vocab_size, self._encoder.eos_id, self._encoder.bos_id,
        )  # fmt: skip
        try:
            tried = [(probe, self.encode(probe)) for probe in _PROBES]
        except Exception as error:  # the package tokenizers raises no narrower type
            raise DataError(
                f"{shown(file)}: cannot encode every text ({error}); use one with bytes or an unknown token"
            ) from error
        decoded = [(probe, self.decode(ids)) for probe, ids in tried]
        self.losses = tuple((probe, text) for probe, text in decoded if probe != text)
        sizes, lost = self.token_bytes(), dict(self.losses)
        self.exact_bytes = all(sizes[ids].sum() == len(p.encode()) for p, ids in tried if p not in lost)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos or eos. Raises DataError for a lone surrogate, which is not text."""
        return list(itertools.chain.from_iterable(self.parts(text)))

    def parts(self, text: str) -> Iterator[list[int]]:
        """The ids that `encode` gives, in lists of those of 65,536 characters where the tokenizer allows it.

        As Python integers, the ids of a long document take ten times the memory of its text.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"lone surrogate at character {error.start} of the text is not valid Unicode; remove it"
            ) from None
        return self._encoder.parts(text)

    def parts_of_each(self, texts: Sequence[str]) -> Iterator[Iterable[list[int]]]:
        """What `parts` gives for each text; faster for many short ones, whose ids are all held meanwhile."""
        short = [text for text in texts if len(text) <= _SHORT and SPACE not in text]
        ids = iter(self._encoder.encode_short(short))
        for text in texts:
            yield [next(ids)] if len(text) <= _SHORT and SPACE not in text else self.parts(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bos and eos decode to nothing."""
        return self._encoder.decode(ids)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int32 [vocab_size], 0 for unk, bos and eos."""
        return self._encoder.token_bytes()

    def files(self) -> dict[str, bytes]:
        """{name: content} of what a directory needs to hold so that `Tokenizer(directory)` is this one."""
        content = self.path.read_bytes()
        if isinstance(self._encoder, JsonEncoder):
            return {TOKENIZER_JSON: content, TOKENIZER_CONFIG: json.dumps({"eos_token": self._encoder.eos}).encode()}
        return {TOKENIZER_NAME: content}

    def notes(self, changed: int) -> list[str]:
        """What the tokenizer loses, in a line. `changed`: documents that it does not reproduce."""
        if not self.losses:
            return []
        examples = ", ".join(f"{probe!r} -> {text!r}" for probe, text in self.losses[:3])
        return [f"note: {self.path} changes some texts, {changed} of these documents among them, such as {examples}"]


def tokenizer_problem(tokenizer: Tokenizer, index: ShardIndex) -> str:
    """How the tokenizer of a data directory differs from the one in its index; empty if it does not."""
    if tokenizer.sha256 != index.tokenizer_sha256:
        return f"{difference('sha256', index.tokenizer_sha256, tokenizer.sha256)}, with which the shards were made"
    ours, found = (index.vocab_size, index.eos_id), (tokenizer.vocab_size, tokenizer.eos_id)
    return difference("(vocab_size, eos_id)", ours, found) if ours != found else ""


def tokenizer_of(directory: Path | RemoteDirectory, index: ShardIndex) -> Tokenizer:
    """The tokenizer of a data directory. Raises DataError if it is not the one that the shards were made with."""
    tokenizer = Tokenizer(directory)
    if problem := tokenizer_problem(tokenizer, index):
        raise DataError(f"{tokenizer.path}: {problem}; copy it and index.json again")
    return tokenizer


def _pieces(text: str) -> Iterator[str]:
    """Split a document into runs of whole lines of at most 4,000 bytes; longer lines are cut, nothing is dropped."""
    run: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        # a character has at most four bytes
        for part in [line] if len(line) * 4 <= _PIECE_BYTES else re.findall(rf"(?s).{{1,{_PIECE_BYTES // 4}}}", line):
            n = len(part.encode())
            if run and size + n > _PIECE_BYTES:
                yield "".join(run)
                run, size = [], 0
            run.append(part)
            size += n
    if run:
        yield "".join(run)


def _sample(pieces: Iterable[str], cap: int, seed: int) -> tuple[list[str], int]:
    """(uniform reservoir sample of at most `cap` pieces, number of pieces)."""
    rng, total = random.Random(seed), 0
    kept: list[str] = []
    for piece in pieces:
        total += 1
        if len(kept) < cap:
            kept.append(piece)
        elif (slot := rng.randrange(total)) < cap:
            kept[slot] = piece
    return kept, total


def train_tokenizer(
    inputs: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    vocab_size: int = 4096,
    *,
    options: ReadOptions | None = None,
    input_sentence_size: int = 500_000,
    character_coverage: float = 0.9995,
    seed: int = 0,
    overwrite: bool = False,
) -> Tokenizer:
    """Train a byte-fallback BPE tokenizer on the documents of `inputs`; write `output_dir/tokenizer.model`.

    Args:
        options: how the inputs are read, see `ReadOptions`.
        vocab_size: number of tokens, including 3 special ones (unk 0, bos 1, eos 2; no pad) and 256 bytes.
        input_sentence_size: train on at most this many pieces (runs of lines, up to 4,000 bytes), sampled with `seed`.
        character_coverage: share of the text's characters that get a token; the others are encoded as bytes.

    The same inputs and arguments give the same file. Raises DataError for an input that cannot be read, a
    vocabulary that is too small or too large for the text (naming the bound), an existing tokenizer without
    `overwrite`, or text that the tokenizer does not reproduce; nothing is written then.
    """
    if vocab_size > MAX_VOCAB:
        raise DataError(f"vocab_size = {vocab_size}: must be at most {MAX_VOCAB} (--vocab-size)")
    if vocab_size < 260:
        raise DataError(
            f"vocab_size = {vocab_size}: must be at least 260 (256 bytes, 3 special tokens and one character)"
        )
    if not 0 < character_coverage <= 1:
        raise DataError(f"character_coverage = {character_coverage}: must be in (0, 1]")
    if input_sentence_size < 1:
        raise DataError(f"input_sentence_size = {input_sentence_size}: must be at least 1 (--max-pieces)")
    target = Path(output_dir) / TOKENIZER_NAME
    if target.exists() and not overwrite:
        raise DataError(f"{target}: exists, and shards may depend on it; pass --overwrite or another --output")
    check_creatable(target.parent)  # before hours of training
    source = DocumentSource(inputs, options)
    for note in source.listing.notes():
        print(note, file=sys.stderr)
    checked: list[str] = []
    reserved = 0

    def pieces() -> Iterator[str]:
        nonlocal reserved
        with progress_bar(source.total_bytes, "reading text") as bar:
            for document in source:
                for piece in _pieces(document.text):
                    if len(checked) < 1000:
                        checked.append(piece)
                    usable = piece.translate(_RESERVED)
                    reserved += len(piece) - len(usable)
                    yield usable
                bar.update(source.bytes_read - bar.n)
            bar.update(source.total_bytes - bar.n)

    sentences, total = _sample(pieces(), input_sentence_size, seed)
    for note in source.notes():
        print(note, file=sys.stderr)
    if reserved:
        print(
            f"note: {reserved} characters U+2581 or U+2585 have no token and will be encoded as bytes", file=sys.stderr
        )
    if not any(piece.strip("\n") for piece in sentences):
        raise source.nothing()
    # sentencepiece reports no progress
    print(
        f"training {vocab_size:,} tokens on {len(sentences):,} of {total:,} pieces of text", file=sys.stderr, flush=True
    )
    model = _train(sentences, vocab_size, character_coverage)
    return _write(target, model, checked)


def _write(target: Path, model: bytes, checked: list[str]) -> Tokenizer:
    """Write a model that reproduces the texts `checked`. Raises DataError, and writes nothing, if it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{TOKENIZER_NAME}.{os.getpid()}.new")
    try:
        with naming_full_disk(target, len(model)):
            temporary.write_bytes(model)
        tokenizer = Tokenizer(temporary)
        bad = next((piece for piece in checked if tokenizer.decode(tokenizer.encode(piece)) != piece), None)
        if bad is not None:
            raise DataError(
                f"{target}: not written, because the tokenizer would lose text: {bad[:80]!r} changes in a round trip"
            )
        write_bytes(target, model)
    finally:
        temporary.unlink(missing_ok=True)
    tokenizer.path = target
    return tokenizer


def _train(sentences: list[str], vocab_size: int, character_coverage: float) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=False, required_chars=SPACE, split_digits=True, allow_whitespace_only_pieces=True,
            character_coverage=character_coverage, max_sentence_length=2 * _PIECE_BYTES, num_threads=1,
            unk_id=UNK_ID, bos_id=BOS_ID, eos_id=EOS_ID, pad_id=-1, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        if match := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", str(error)):
            raise DataError(
                f"vocab_size = {vocab_size}: this text supports at most {match[1]}; lower --vocab-size or add text"
            ) from error
        if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise DataError(
                f"vocab_size = {vocab_size}: the characters of this text need at least {match[1]}; raise --vocab-size"
            ) from error
        if "all_chars_count" in str(error):
            raise DataError("no text in these inputs: sentencepiece ignores the characters that they have") from error
        raise DataError(f"vocab_size = {vocab_size}: sentencepiece could not train on this text: {error}") from error
    return model.getvalue()
