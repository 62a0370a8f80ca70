"""Answers in the form of OpenAI's API, whole or as chunks."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_dla.serving.engine import Event, TokenLogprob


def sse(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


DONE = "data: [DONE]\n\n"


class Piece(NamedTuple):
    """A token's text and bytes."""

    text: str
    raw: bytes

    @classmethod
    def of(cls, text: str) -> Piece:
        return cls(text, text.encode())


class Pieces:
    """Tokens as text of their own. One that is no whole character is shown as its byte's name in the vocabulary
    (<0xE2>, sentencepiece) or, of byte-level BPE, as OpenAI does (bytes:\\xe2\\x80)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._byte_level: dict[str, int] = {}
        self._known: dict[int, Piece] = {}
        if "ByteLevel" in repr(decoder):
            self._byte_level = {letter: byte for byte, letter in bytes_to_unicode().items()}
        anchor = tokenizer("x", add_special_tokens=False)["input_ids"]  # a first token may lose its space
        self._anchor, self._length = anchor, len(tokenizer.decode(anchor))

    def __call__(self, token: int) -> Piece:
        if (known := self._known.get(token)) is None:
            known = self._known[token] = self._make(token)
        return known

    def _make(self, token: int) -> Piece:
        text = self._tokenizer.decode([*self._anchor, token])[self._length :]
        if text and "\ufffd" not in text:
            return Piece.of(text)
        name = self._tokenizer.convert_ids_to_tokens(token) or f"<{token}>"  # rows of the embedding without a token
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return Piece(name, bytes([int(byte[1], 16)]))
        if "\ufffd" in text and all(letter in self._byte_level for letter in name):
            raw = bytes(self._byte_level[letter] for letter in name)
            return Piece("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)
        return Piece.of(name)


@dataclass
class Choice:
    """What is known of one choice so far."""

    text: str = ""
    finish_reason: str | None = None
    error: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_tokens: int = 0
    generated: int = 0
    cached: int = 0

    def add(self, event: Event) -> None:
        self.text += event.text
        self.finish_reason, self.error = event.finish_reason, event.error
        self.prompt_tokens, self.generated, self.cached = event.prompt_tokens, event.tokens, event.cached_tokens
        if event.token is not None and event.logprob is not None:
            self.tokens.append(event.token)
            self.logprobs.append(event.logprob)


class Form:
    """One answer's shape.

    Args:
        chat: of a chat, else of a completion. prompts: each is read once, however many choices it has.
    """

    def __init__(self, chat: bool, model: str, created: int, per_prompt: int, pieces: Pieces) -> None:
        self.chat, self.per_prompt, self.pieces = chat, per_prompt, pieces
        kind = "chat.completion" if chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": created, "model": model}
        self.whole_kind, self.chunk_kind = kind, f"{kind}.chunk" if chat else kind

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        prompt = sum(choice.prompt_tokens for choice in choices[:: self.per_prompt])
        generated = sum(choice.generated for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached for choice in choices[:: self.per_prompt])},
        }

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        parts = []
        for index, one in enumerate(choices):
            logprobs = self._logprobs(one, 0) if one.logprobs else None
            said: dict[str, Any] = {"text": one.text}
            if self.chat:
                said = {"message": {"role": "assistant", "content": one.text, "refusal": None}}
            parts.append({"index": index, **said, "logprobs": logprobs, "finish_reason": one.finish_reason})
        return {**self.head, "object": self.whole_kind, "choices": parts, "usage": self.usage(choices)}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat's choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(self, index: int, choice: Choice, event: Event) -> dict[str, Any]:
        """`event`, which `choice` has already."""
        start = len(choice.text) - len(event.text)
        logprobs = None
        if event.logprob is not None and event.token is not None:
            logprobs = self._logprobs(Choice(tokens=[event.token], logprobs=[event.logprob]), start)
        said: dict[str, Any] = (
            {"delta": {"content": event.text} if event.text else {}} if self.chat else {"text": event.text}
        )
        return self._chunk([{"index": index, **said, "logprobs": logprobs, "finish_reason": event.finish_reason}])

    def last(self, choices: list[Choice]) -> dict[str, Any]:
        """The chunk with the usage, where it is asked for."""
        return self._chunk([]) | {"usage": self.usage(choices)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": self.chunk_kind, "choices": choices}

    def _logprobs(self, choice: Choice, start: int) -> dict[str, Any]:
        tokens = [self.pieces(token) for token in choice.tokens]
        top = [[(self.pieces(token), value) for token, value in one.top] for one in choice.logprobs]
        if self.chat:
            content = [
                _entry(piece, one.logprob) | {"top_logprobs": [_entry(*pair) for pair in pairs]}
                for piece, one, pairs in zip(tokens, choice.logprobs, top, strict=True)
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for piece in tokens:
            offsets.append(start)
            start += len(piece.text)
        return {
            "tokens": [piece.text for piece in tokens],
            "token_logprobs": [one.logprob for one in choice.logprobs],
            "top_logprobs": [
                {piece.text: value for piece, value in reversed(pairs)} for pairs in top
            ],  # of equal texts the most probable
            "text_offset": offsets,
        }


def _entry(piece: Piece, logprob: float) -> dict[str, Any]:
    return {"token": piece.text, "logprob": logprob, "bytes": list(piece.raw)}
