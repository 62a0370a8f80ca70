"""A request, and what comes back token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_dla.errors import UserError
from megatron_dla.serving.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


class EngineFullError(UserError):
    """Too many requests wait already; a later one may be taken."""


class EngineClosedError(EngineFullError):
    """The engine has ended, or is about to."""


@dataclass(frozen=True)
class SamplingParams(Sampling):
    """`Sampling` whose messages name the field as a request does."""

    @classmethod
    def shown(cls, name: str) -> str:
        return "max_tokens" if name == "max_new_tokens" else name


@dataclass(frozen=True)
class Request:
    """One continuation.

    Attributes:
        prompt: token ids, at least one. sampling: `max_new_tokens`, temperature, stop strings and the like.
        stop_ids: further tokens that end it. ignore_eos: the model's own end tokens do not.
        logprobs: None, or how many of the most probable tokens are reported with each token's own log-probability.
        priority: higher goes first, and may put sequences of a lower one aside. deadline: seconds from submission.
        shared_prefix: leading tokens of the prompt that other requests have, too (a system prompt): they are kept at
            once; without it a prefix is kept when it comes a second time.
        memory: with a δ-mem, its states before the prompt, as `Handle.memory` has them after an earlier request; None:
            empty.
        messages: where the adapter writes by message, the number of the message of each token of the prompt, -1: not
            written; the answer has the next number. What `memory` has not yet written is a message of its own.

    Raises:
        UserError: a value out of range; the message names the field.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    priority: int = 0
    deadline: float | None = None
    shared_prefix: int = 0
    memory: Any = None
    messages: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))
        checks = (
            ("prompt", bool(self.prompt), "at least one token"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "0 to 20, or None"),
            ("deadline", self.deadline is None or self.deadline > 0, "more than 0 seconds, or None"),
            ("messages", self.messages is None or len(self.messages) == len(self.prompt), "one for each token"),
            ("shared_prefix", self.shared_prefix >= 0, "at least 0"),
        )
        for name, good, wanted in checks:
            if not good:
                given = list(self.prompt) if name == "prompt" else getattr(self, name)
                raise UserError(f"{name} = {given}: want {wanted}")


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probabilities before temperature: of the token, and of the most probable ones, highest first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Event:
    """One token of a request, or its end.

    Attributes:
        token: None in an event that only ends it (cancelled, deadline, error).
        text: what may be shown since the last event; a token's text can come later (an incomplete character, the
            possible beginning of a stop string), and that of a stop string never.
        finish_reason: None while it goes on. error: the reason of `error`.
        prompt_tokens, tokens, cached_tokens: of the request so far; tokens of the prompt that a kept prefix saved.
    """

    token: int | None
    text: str
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    error: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    cached_tokens: int = 0
