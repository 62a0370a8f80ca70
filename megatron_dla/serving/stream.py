"""Text from tokens as they are generated, and the times at which they came."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any, TextIO

import torch
from torch import Tensor


class TextStream:
    """The text of one continuation.

    Prints each token's text immediately, but an incomplete character only when its last byte is there, and what may be
    the beginning of a stop string only when it is not.

    Attributes:
        ids: the tokens so far. text: what was printed. stopped: a stop string came; `text` ends before it.
    """

    def __init__(self, tokenizer: Any, out: TextIO | None = None, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.out, self.stop = tokenizer, out, stop
        self.ids: list[int] = []
        self.text, self.stopped = "", False
        self._settled = ""  # text of ids[:_next]
        self._first = self._next = 0

    def put(self, token: int) -> None:
        self.ids.append(token)
        self._print(self._decode())

    def end(self) -> None:
        self._print(self._decode(), final=True)

    def _decode(self) -> str:
        """The text so far. Only the last tokens are decoded, those before them as the context of their first
        character: the cost of a token does not grow with the text."""
        before = self.tokenizer.decode(self.ids[self._first : self._next], skip_special_tokens=True)
        text = self.tokenizer.decode(self.ids[self._first :], skip_special_tokens=True)
        # while the last character of a run of byte tokens is incomplete, fast tokenizers decode none of the run, also
        # not what is settled: then each byte is a character, and the run ends in \ufffd
        text = text[len(before) :]
        whole = self._settled + text
        if text and not text.endswith("\ufffd"):
            self._settled, self._first, self._next = whole, self._next, len(self.ids)
        return whole

    def _print(self, text: str, final: bool = False) -> None:
        found = [at for at in (text.find(word) for word in self.stop) if at >= 0]
        if found:
            text, self.stopped = text[: min(found)], True
        elif not final:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - self._held(text)]
        text = self.text + text[len(self.text) :]  # what was printed stays
        if self.out is not None:
            self.out.write(text[len(self.text) :])
            self.out.flush()
        self.text = text

    def _held(self, text: str) -> int:
        """Characters at the end of `text` that begin a stop string."""
        return max(
            (n for word in self.stop for n in range(1, min(len(word), len(text) + 1)) if text.endswith(word[:n])),
            default=0,
        )


class Rows:
    """Streamer and stopping criterion of transformers' `generate` for a batch of `TextStream`s.

    Attributes:
        ended: bool a row, whether an end token or a stop string came. first, last: `time.perf_counter()` after the
            first and the last token.
    """

    def __init__(self, streams: Sequence[TextStream], ends: Collection[int]) -> None:
        self.streams, self.ends = streams, ends
        self.ended = [False] * len(streams)
        self.first = self.last = 0.0
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if self._prompt:  # generate() puts the prompts first
            self._prompt = False
            return
        for row, token in enumerate(value.flatten().tolist()):
            if not self.ended[row]:
                self.streams[row].put(token)
                self.ended[row] = self.streams[row].stopped or token in self.ends
        self.last = time.perf_counter()
        self.first = self.first or self.last

    def end(self) -> None:
        for stream in self.streams:
            stream.end()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor(self.ended, device=input_ids.device)
