"""The sentencepiece tokenizer of a DLA model (copied into every exported directory)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

_SPACE = "\u2581"  # sentencepiece stores every space as this character
_WINDOW = 1 << 16  # characters encoded at once: BPE's memory grows with the length of its input


def _windows(text: str) -> Iterator[str]:
    """Pieces of at most 65,536 characters, cut after a line or a space where there is one."""
    start = 0
    while len(text) - start > _WINDOW:
        end = start + _WINDOW
        cut = max(text.rfind("\n", start, end), text.rfind(" ", start + _WINDOW // 2, end)) + 1
        end = cut if cut > start else end
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


class DLATokenizer(PreTrainedTokenizer):
    """Lossless byte-fallback BPE: `decode(encode(text)) == text` for every text.

    The ids are those the training data was made with. No special token is added, and none is read out of a text
    ("</s>" in a text is five characters; pass `split_special_tokens=False` to change that). A literal U+2581, which
    sentencepiece alone would turn into a space, is always encoded as its three byte tokens. `pad` is `eos`: the
    attention mask tells them apart.

    Raises:
        ValueError: the text holds a lone surrogate.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = str(vocab_file)
        self._load()
        sp = self._sp
        names = {"unk_token": sp.unk_id(), "bos_token": sp.bos_id(), "eos_token": sp.eos_id()}
        for name, index in names.items():
            kwargs.setdefault(name, sp.id_to_piece(index))
        kwargs.setdefault("pad_token", kwargs["eos_token"])
        kwargs.setdefault("split_special_tokens", True)
        kwargs.setdefault("special_tokens_pattern", "none")
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(**kwargs)

    def _load(self) -> None:
        self._sp: Any = sentencepiece.SentencePieceProcessor(model_proto=Path(self.vocab_file).read_bytes())
        self._marker = [f"<0x{byte:02X}>" for byte in _SPACE.encode()]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_sp"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    @property
    def vocab_size(self) -> int:
        """Tokens of the sentencepiece model (the model's embedding may have more rows)."""
        return self._sp.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        return {self._sp.id_to_piece(i): i for i in range(self.vocab_size)} | self._added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"text holds a lone surrogate at character {error.start}; it is not valid Unicode"
            raise ValueError(message) from None
        tokens: list[str] = []
        for i, part in enumerate(text.split(_SPACE)):
            tokens += self._marker if i else []
            for window in _windows(part):
                tokens += (self._sp.id_to_piece(index) for index in self._sp.encode(window))
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self._sp.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size}")
        return self._sp.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; special tokens appear as they are written."""
        parts: list[str] = []
        run: list[str] = []
        for token in tokens:
            if token in self._added_tokens_encoder:
                parts += [self._sp.decode(run), token]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self._sp.decode(run)])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy `tokenizer.model` into the directory."""
        name = f"{filename_prefix}-" if filename_prefix else ""
        target = os.path.join(save_directory, f"{name}tokenizer.model")
        if os.path.abspath(target) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, target)
        return (target,)


__all__ = ["DLATokenizer"]
