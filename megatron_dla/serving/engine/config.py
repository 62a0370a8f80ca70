"""Sizes of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dla.errors import UserError

PAGE = 16
"""Tokens of one page of keys and values."""


@dataclass(frozen=True)
class EngineConfig:
    """Everything that is reserved when an engine starts, and the rules of its scheduler.

    Attributes:
        slots: sequences that are held at once, each with its constant-size state.
        decode_rows: rows of one decode call. Every call has this shape, idle rows included, so that a sequence is
            computed alike alone and under load; `slots` sequences, best a multiple, take `slots / decode_rows` calls a
            step. 0: 16, or `slots` where that is less.
        prefill_chunk: prompts are cut at multiples of so many tokens, a multiple of 16.
        token_budget: tokens of one step, decoded and read together. 0: `slots + prefill_chunk`.
        readers: prompts that are read side by side, a chunk of each in turn: a short prompt does not wait for a long
            one.
        kv_pages: pages of 16 tokens of each kind of softmax layer (full, sliding window). 0: `slots` sequences of
            `kv_tokens`.
        kv_tokens: see there.
        prefix_states: prompt prefixes that are kept, the least recently used is dropped. 0: none.
        max_waiting: requests that wait although all slots are taken; more are refused.
        max_saved: sequences that were put aside for requests of a higher priority.
        reserve_tokens: room for the keys and values of so many tokens is taken when a sequence is admitted, instead of
            a page when it is needed. For comparisons.
        whole_batches: sequences are admitted only when none is held, and keep what they hold until all of them have
            ended. For comparisons.

    Raises:
        UserError: a value out of range; the message names the key.
    """

    slots: int = 16
    decode_rows: int = 0
    prefill_chunk: int = 128
    token_budget: int = 0
    readers: int = 4
    kv_pages: int = 0
    kv_tokens: int = 4096
    prefix_states: int = 8
    max_waiting: int = 1024
    max_saved: int = 64
    reserve_tokens: int = 0
    whole_batches: bool = False

    def __post_init__(self) -> None:
        checks = (
            ("slots", self.slots >= 1, "at least 1"),
            ("decode_rows", 0 <= self.decode_rows <= self.slots, f"1 to slots = {self.slots}, or 0 for the default"),
            ("prefill_chunk", self.prefill_chunk >= PAGE and self.prefill_chunk % PAGE == 0, f"a multiple of {PAGE}"),
            ("readers", self.readers >= 1, "at least 1"),
            ("kv_pages", self.kv_pages >= 0, "at least 1, or 0 for the default"),
            ("kv_tokens", self.kv_tokens >= 1, "at least 1"),
            ("prefix_states", self.prefix_states >= 0, "at least 0"),
            ("max_waiting", self.max_waiting >= 1, "at least 1"),
            ("max_saved", self.max_saved >= 0, "at least 0"),
            ("reserve_tokens", self.reserve_tokens >= 0, "at least 0"),
            (
                "token_budget",
                self.token_budget == 0 or self.token_budget >= self.slots + self.prefill_chunk,
                f"at least slots + prefill_chunk = {self.slots + self.prefill_chunk}, or 0 for that",
            ),
        )
        for name, good, wanted in checks:
            if not good:
                raise UserError(f"{name} = {getattr(self, name)}: want {wanted}")

    @property
    def rows(self) -> int:
        """Rows of a decode call."""
        return self.decode_rows or min(16, self.slots)

    @property
    def budget(self) -> int:
        """Tokens of a step."""
        return self.token_budget or self.slots + self.prefill_chunk

    @property
    def pages(self) -> int:
        """Pages of one kind of softmax layer."""
        return self.kv_pages or self.slots * -(-self.kv_tokens // PAGE)
