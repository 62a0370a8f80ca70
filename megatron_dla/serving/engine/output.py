"""From logits to the events of one request: sampling, end tokens, stop strings, text, log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_dla.serving.decode import sample
from megatron_dla.serving.engine.request import Event, FinishReason, Request, TokenLogprob
from megatron_dla.serving.engine.scheduler import Sequence
from megatron_dla.serving.stream import TextStream


def end_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text, of a model's generation config and of its tokenizer."""
    found: list[int | None] = []
    for source in (generation_config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found += value if isinstance(value, (list, tuple)) else [value]
    return frozenset(x for x in found if x is not None)


def log_probabilities(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """Of `token` and of the `top` most probable ones that the model may generate, from logits [V].

    Raises ValueError where the logits are not finite.
    """
    values = logits.float().log_softmax(-1)
    if not math.isfinite(own := float(values[token])):
        raise ValueError("the logits are not finite")
    best, which = values.topk(top)
    pairs = zip(which.tolist(), best.tolist(), strict=True)
    return TokenLogprob(own, tuple(pair for pair in pairs if math.isfinite(pair[1])))


class Output:
    """The continuation of one request; its random numbers are its own, so that a seed gives it alike under any load."""

    def __init__(self, request: Request, tokenizer: Any, ends: frozenset[int]) -> None:
        self.request, self.ends = request, ends
        self._text = None if tokenizer is None else TextStream(tokenizer, stop=request.sampling.stop)
        self._shown = 0
        self._generator = torch.Generator().manual_seed(request.sampling.seed)

    def next(self, logits: Tensor, best: int, sequence: Sequence) -> Event:
        """Choose a token from logits [V], whose largest is at `best`, and add it to the sequence."""
        sampling, token = self.request.sampling, self._choose(logits, best, sequence)
        sequence.tokens.append(token)
        logprob = None if self.request.logprobs is None else log_probabilities(logits, token, self.request.logprobs)
        reason: FinishReason | None = "stop" if token in self.ends else None
        if self._text is not None and reason is None:
            self._text.put(token)
            reason = "stop" if self._text.stopped else None
        if reason is None and len(sequence.tokens) >= sampling.max_new_tokens:
            reason = "length"
        return self._event(sequence, token, logprob, reason)

    def last(self, sequence: Sequence, reason: FinishReason, error: str) -> Event:
        """The end of a request from outside."""
        return self._event(sequence, None, None, reason, error)

    def _choose(self, logits: Tensor, best: int, sequence: Sequence) -> int:
        options = self.request.sampling.for_session()
        if options["temperature"] == 0 and options["repetition_penalty"] == 1:
            return best
        if options["repetition_penalty"] != 1:
            options["seen"] = torch.tensor([[*self.request.prompt, *sequence.tokens]], device=logits.device)
        return int(sample(logits[None], **options | {"generator": self._generator}))

    def _event(
        self, sequence: Sequence, token: int | None, logprob: TokenLogprob | None, reason: FinishReason | None,
        error: str = "",
    ) -> Event:  # fmt: skip
        text = ""
        if self._text is not None:
            if reason and reason != "error":  # of which the tokenizer may be the cause
                self._text.end()
            text, self._shown = self._text.text[self._shown :], len(self._text.text)
        return Event(
            token, text, logprob, reason, error, len(self.request.prompt), len(sequence.tokens), sequence.cached
        )
