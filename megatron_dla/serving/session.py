"""A conversation on a shared model: key/value cache and memory states, advanced together, by any number of tokens.

The cache is the context and grows with every token; the states are the memory and keep their size. A session can drop
the cache and keep the states (`forget_context`), be forked, and be saved (`session_file`). The model holds no state of
a session: any number of sessions may use one model, in turns or in threads.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dla.adapters.memory import MemoryControl, MemoryInputs
from megatron_dla.serving.chat import Message, render_chat
from megatron_dla.serving.decode import sample, stop_tokens
from megatron_dla.serving.hf_model import DeltaMemModel, States


class SessionBytes(NamedTuple):
    """Bytes of the states (constant, but for a message that opens or ends) and of the key/value cache."""

    state: int
    cache: int


class Session:
    """One sequence.

    Attributes:
        ids: token ids in the cache. message_ids: number of the message of each (-1: not written), where the adapter
            writes by message. states: after them. forgotten: tokens seen before the context was last dropped.
        history: the chat, as `reply` keeps it. control: evaluation switches of every call.
    """

    def __init__(self, model: DeltaMemModel, tokenizer: Any = None, *, control: MemoryControl | None = None) -> None:
        self.model, self.tokenizer, self.control = model, tokenizer, control
        self.reset()

    # ---- reset and fork

    def reset(self) -> None:
        """Empty the context, the memory and the history."""
        self.forgotten = 0
        self.history: list[Message] = []
        self._start(self.model.initial_states(1))

    def _start(self, states: States) -> None:
        """Begin an empty context whose initial memory is `states`."""
        self.origin = self.states = states
        self.ids: list[int] = []
        self.message_ids: list[int] = []
        self.cache = make_cache([])
        self.logits: Tensor | None = None

    @torch.no_grad()
    def forget_context(self) -> None:
        """Drop cache and history, keep the states; positions start again at 0. An open message is written first."""
        self.forgotten += len(self.ids)
        self.history = []
        self._start(self.model.finish(self.states))

    def fork(self) -> Session:
        """An independent copy."""
        other = Session(self.model, self.tokenizer, control=self.control)
        other.forgotten, other.history = self.forgotten, [dict(message) for message in self.history]
        other.origin, other.states = self.origin, self.states  # not copied: calls do not change them in place
        other.ids, other.message_ids, other.logits = list(self.ids), list(self.message_ids), self.logits
        other.cache = make_cache(cache_tensors(self.cache))
        return other

    @property
    def tokens_seen(self) -> int:
        """Tokens that the states have seen."""
        return self.forgotten + len(self.ids)

    @property
    def nbytes(self) -> SessionBytes:
        cache = sum(x.nbytes for pair in cache_tensors(self.cache) for x in pair)
        return SessionBytes(sum(state.nbytes for state in self.states.values()), cache)

    # ---- tokens

    @torch.no_grad()
    def append(self, ids: Sequence[int], messages: int | Sequence[int] | None = None) -> Tensor:
        """Feed tokens; returns the logits [V] after the last (only those are computed).

        A call that raises leaves the session unchanged.

        Args:
            messages: number of the message, one for all tokens or one for each; needed where the adapter writes by
                message.

        Raises:
            ValueError: no tokens, one that the model does not have, or message numbers that are needed and missing or
                not as many as the tokens.
        """
        if not ids:
            raise ValueError("no tokens to append")
        rows = self.model.base.get_input_embeddings().weight.shape[0]
        if odd := [token for token in ids if not 0 <= token < rows]:
            raise ValueError(f"token {odd[0]} is outside the model's vocabulary of {rows}: use the model's tokenizer")
        numbers = [-1 if messages is None else messages] * len(ids) if not isinstance(messages, Sequence) else messages
        if len(numbers) != len(ids):
            raise ValueError(
                f"{len(ids)} ids and {len(numbers)} message numbers: give one number for all, or one for each"
            )
        inputs = MemoryInputs()
        if messages is not None and self.writes_messages:
            inputs.message = torch.tensor([list(numbers)], device=self.model.device)
        held = len(self.ids)
        try:
            out = self.model(
                torch.tensor([list(ids)], device=self.model.device), states=self.states, inputs=inputs,
                past_key_values=self.cache, use_cache=True, logits_to_keep=1, control=self.control,
            )  # fmt: skip
        except BaseException:  # layers up to the failing one have grown
            self.cache = make_cache(
                [(k[:, :, :held], v[:, :, :held]) for k, v in cache_tensors(self.cache)] if held else []
            )
            raise
        self.states, self.logits = out.states, out.logits[0, -1]
        self.ids += list(ids)
        self.message_ids += list(numbers)
        return self.logits

    @property
    def writes_messages(self) -> bool:
        return self.model.config.write == "message"

    @property
    def next_message(self) -> int:
        """A message number that is not taken."""
        return max(self.message_ids, default=-1) + 1

    def generate(
        self,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        generator: torch.Generator | None = None,
        stop: Collection[int] | None = None,
    ) -> Generator[int]:
        """Continue after what was appended, as a message of its own; yields tokens, each one already fed.

        Args:
            temperature, top_p, top_k, generator: see `sample`. repetition_penalty: of the tokens in the context.
            stop: tokens that end it, neither fed nor yielded; None = the model's and the tokenizer's.

        Raises:
            ValueError: nothing was appended since the session was created, loaded or `forget_context` was called.
        """
        if self.logits is None:
            raise ValueError("append something before generating")
        stop = stop_tokens(self.model, self.tokenizer) if stop is None else stop
        number = self.next_message
        options: dict[str, Any] = {"top_k": top_k, "repetition_penalty": repetition_penalty}
        for _ in range(max_new_tokens):
            if repetition_penalty != 1:
                options["seen"] = torch.tensor([self.ids], device=self.logits.device)
            token = int(sample(self.logits[None], temperature, top_p, generator, **options))
            if token in stop:
                return
            self.append([token], number)
            yield token

    # ---- chat

    def feed(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> Tensor:
        """Feed the tokens of a chat that come after those already in the context.

        Where the rendered chat differs from the tokens seen (an edited history, a template that rewrites old turns,
        text that is tokenized differently from how it was generated), context and states are recomputed from the
        start of the context. Generated tokens keep the message number they were fed with.

        Raises:
            UserError: see `render_chat`.
        """
        ids, numbers = render_chat(
            self.tokenizer, messages, generation_prompt=generation_prompt, numbered=self.writes_messages
        )
        same = _common_prefix(self.ids, ids)
        if same < len(self.ids) or (same == len(ids) and self.logits is None):
            self._start(self.origin)
            same = 0
        if same < len(ids):
            return self.append(ids[same:], numbers[same:])
        assert self.logits is not None
        return self.logits

    def reply(self, text: str, max_new_tokens: int, **sampling: Any) -> Generator[int]:
        """Add `text` as the user's message; yields the answer's tokens (`generate`) and keeps both in `history`."""
        messages = [*self.history, {"role": "user", "content": text}]
        self.feed(messages)
        tokens: list[int] = []
        try:
            for token in self.generate(max_new_tokens, **sampling):
                tokens.append(token)
                yield token
        finally:  # an interrupted answer is part of the chat, too
            answer = self.tokenizer.decode(tokens, skip_special_tokens=True)
            self.history = [*messages, {"role": "assistant", "content": answer}]


def make_cache(pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """A key/value cache with copies of (keys, values) [B, H_kv, T, d_h] by layer; nothing is dropped, also where a
    model's sliding window is shorter."""
    from transformers import DynamicCache

    return DynamicCache(ddp_cache_data=pairs) if pairs else DynamicCache()


def cache_tensors(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of every layer that is not empty."""
    return [(layer.keys, layer.values) for layer in cache.layers if layer.get_seq_length()]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)
