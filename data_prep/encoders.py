"""The two kinds of tokenizer files: sentencepiece's `tokenizer.model` and `tokenizer.json` of `tokenizers`.

Both have `vocab_size`, `eos_id`, `bos_id` (-1: none), `parts`, `decode` and `token_bytes`, as `Tokenizer` documents,
and `encode_short`, the ids of each of many texts shorter than a window and without U+2581.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_dla.data_prep.readers import shown
from megatron_dla.errors import DataError
from megatron_dla.files import parse_json
from megatron_dla.shard_index import TOKENIZER_CONFIG

SPACE = "\u2581"  # sentencepiece stores every space as this character
WINDOW = 1 << 16  # characters encoded at once: BPE's memory grows with the length of its input
_LONGEST = 1 << 20  # characters encoded at once where there is no place to cut; `tokenizers` takes 110 bytes for each
MAX_VOCAB = 2**24
# appended to a model, this switches its dummy prefix off: normalizer_spec { add_dummy_prefix: false }
NO_PREFIX = b"\x1a\x02\x18\x00"
# what published models end documents with, where no file beside tokenizer.json says it
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
_TRAIN = "train one with `dla data tokenizer`"


class Encoder(Protocol):
    """What `Tokenizer` asks of a tokenizer file."""

    vocab_size: int
    eos_id: int
    bos_id: int

    def parts(self, text: str) -> Iterator[list[int]]: ...
    def encode_short(self, texts: list[str]) -> Iterable[list[int]]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def token_bytes(self) -> np.ndarray: ...


class SentencePieceEncoder:
    """A sentencepiece model.

    A literal U+2581, which sentencepiece alone would turn into a space, is encoded as its three byte tokens where the
    model has them. Texts are encoded in windows, except by models that remove white space.

    Raises DataError for a file that is no such model or has no end-of-document token.
    """

    def __init__(self, path: Path, model: bytes) -> None:
        import sentencepiece

        try:
            self._first: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
            # for text that follows other text
            self._next: Any = sentencepiece.SentencePieceProcessor(model_proto=model + NO_PREFIX)
        except (RuntimeError, ValueError, TypeError) as error:  # ValueError: its message is not UTF-8
            raise DataError(
                f"{shown(path)}: not a sentencepiece model (beside Llama 3's, use its tokenizer.json); {_TRAIN}"
            ) from error
        self.vocab_size: int = self._first.get_piece_size()
        if not self.vocab_size:
            raise DataError(f"{shown(path)}: the model is empty or has no tokens; {_TRAIN}")
        self.eos_id: int = self._first.eos_id()
        self.bos_id: int = self._first.bos_id()
        if self.eos_id < 0:
            raise DataError(f"{shown(path)}: this tokenizer has no end-of-document token; {_TRAIN}")
        marker = [self._first.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._marker = marker if all(self._first.is_byte(i) for i in marker) else []
        self._prefix = [self._first.piece_to_id(SPACE)] if self._first.encode("a") != self._next.encode("a") else []
        self._strips = self.decode(self._first.encode("a  b ")) != "a  b "

    def parts(self, text: str) -> Iterator[list[int]]:
        if self._strips:
            yield self._first.encode(text)
            return
        if text.startswith(SPACE) and self._marker:
            yield self._prefix
        processor = self._first
        for i, part in enumerate(text.split(SPACE) if self._marker else [text]):
            if i:
                yield self._marker
                processor = self._next
            for window in windows(part):
                yield processor.encode(window)
                processor = self._next

    def encode_short(self, texts: list[str]) -> Iterable[list[int]]:
        return self._first.encode(texts, num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._first.decode([int(i) for i in ids]))

    def token_bytes(self) -> np.ndarray:
        sp = self._first
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for i in range(self.vocab_size):
            if sp.is_byte(i):
                sizes[i] = 1
            elif not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)):
                sizes[i] = len(sp.id_to_piece(i).replace(SPACE, " ").encode())
        return sizes


class JsonEncoder:
    """A `tokenizer.json`, read by the package `tokenizers`. Special tokens that a text spells are text.

    The end-of-document token is that of the files beside it (tokenizer_config.json, generation_config.json,
    config.json), or one that published tokenizers use. `eos` is its text.

    Raises DataError for a file that is no such tokenizer or whose end-of-document token is not known.
    """

    def __init__(self, path: Path, model: bytes) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(f"{shown(path)}: reading it needs tokenizers; pip install 'megatron-dla[data]'") from error
        try:
            self._core: Any = tokenizers.Tokenizer.from_str(model.decode())
        except Exception as error:  # tokenizers raises Exception itself
            raise DataError(f"{shown(path)}: not a tokenizer.json ({error}); copy it again") from error
        self._core.no_truncation()
        self._core.no_padding()
        self._core.encode_special_tokens = True
        self._vocabulary: dict[str, int] = self._core.get_vocab(with_added_tokens=True)
        self._added = self._core.get_added_tokens_decoder()
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        if self.vocab_size > MAX_VOCAB:  # `to_str` below would count to the largest id
            raise DataError(f"{shown(path)}: a token has id {self.vocab_size - 1}: must be below {MAX_VOCAB}")
        self.eos = self._end(path)
        self.eos_id = self._vocabulary[self.eos]
        self.bos_id = -1
        described = json.loads(self._core.to_str())
        before = json.dumps([described["normalizer"], described["pre_tokenizer"]])
        self._bytewise = '"ByteLevel"' in before + json.dumps(described["decoder"])
        # what changes the start or the end of each text that it is given
        at_ends = ('"Prepend"', '"Strip"', '"Metaspace"', '"add_prefix_space": true', '"BertNormalizer"')
        self._windowed = bool(described["pre_tokenizer"]) and not any(step in before for step in at_ends)

    def _end(self, path: Path) -> str:
        by_id = {i: token for token, i in self._vocabulary.items()}
        where, end = next(_named_ends(path.parent), ("", ""))
        if where:
            token = by_id.get(end) if isinstance(end, int) else end
            if token not in self._vocabulary:
                raise DataError(f"{where} = {end!r}: no token of {shown(path)}; name the one that ends a document")
            return str(token)
        if published := [token for token in _ENDS if token in self._vocabulary]:
            return published[0]
        raise DataError(
            f"{shown(path)}: which token ends a document is not known; write it beside this file as "
            f'{TOKENIZER_CONFIG} with {{"eos_token": "..."}}'
        )

    def parts(self, text: str) -> Iterator[list[int]]:
        for window in _line_windows(text) if self._windowed else [text]:
            # unlike `encode`, it does not find out where each token is in the text
            (encoded,) = self._core.encode_batch_fast([window], add_special_tokens=False)
            yield encoded.ids

    def encode_short(self, texts: list[str]) -> Iterable[list[int]]:
        return [encoded.ids for encoded in self._core.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._core.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, i in self._vocabulary.items():
            if i in self._added:
                sizes[i] = 0 if self._added[i].special else len(token.encode())
            elif self._bytewise:
                sizes[i] = len(token)  # a character stands for a byte
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                sizes[i] = 1
            else:
                sizes[i] = len(token.replace(SPACE, " ").encode())
        return sizes


def _named_ends(folder: Path) -> Iterator[tuple[str, str | int]]:
    """What the files of a Hugging Face directory give as the end of a document, each with file and key."""
    for name, key in (
        (TOKENIZER_CONFIG, "eos_token"), ("special_tokens_map.json", "eos_token"),
        ("generation_config.json", "eos_token_id"), ("config.json", "eos_token_id"),
    ):  # fmt: skip
        try:
            value = parse_json((folder / name).read_bytes())[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        value = value.get("content") if isinstance(value, dict) else value
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str | int):
            yield f"{shown(folder / name)}: {key}", value


def windows(text: str) -> Iterator[str]:
    """Parts of at most 65,536 characters, cut after a line or a space where possible."""
    start = 0
    while len(text) - start > WINDOW:
        end = start + WINDOW
        cut = max(text.rfind("\n", start, end), text.rfind(" ", start + WINDOW // 2, end)) + 1
        end = cut if cut > start else end
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


_LINE = re.compile(r"(?<=\S)\n(?=\S)")
_WORD = re.compile(r"(?<=\S) (?=\S)")


def _line_windows(text: str) -> Iterator[str]:
    """Parts of about 65,536 characters that end with a line: no pre-tokenizer joins what is cut there.

    Without such a place, 1M characters end before a word, or, in a text without spaces, anywhere.
    """
    start = 0
    while len(text) - start > WINDOW:
        if found := _LINE.search(text, start + WINDOW, start + _LONGEST):
            end = found.end()
        elif len(text) - start <= _LONGEST:
            break
        else:
            word = _WORD.search(text, start + _LONGEST - WINDOW, start + _LONGEST)
            end = word.start() if word else start + _LONGEST
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
