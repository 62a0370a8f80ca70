"""How tokens are chosen and when a continuation stops: the options of `dla generate` and `dla chat`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_dla.errors import UserError

MAX_THREADS = 1024
SMALL_MODEL = 100_000_000
"""Parameters below which `dla generate` uses one CPU thread: its matrices are too small to share."""


@dataclass(frozen=True)
class Sampling:
    """Options of one generation, checked.

    Attributes:
        temperature: 0 = greedy. top_p: nucleus sampling, the share of the probability that is sampled from.
        top_k: sample among so many tokens; 0 = all. repetition_penalty: divides the positive logits of tokens that
            occurred, and multiplies the negative ones (CTRL, arXiv:1909.05858, section 4.1); 1 = none.
        stop: strings that end a continuation; the text ends before them.

    Raises:
        UserError: names the option with a bad value.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (1 <= self.max_new_tokens < 2**31, "max_new_tokens", "1 to 2^31 - 1"),
            (self.temperature == 0 or 1e-3 <= self.temperature <= 1e3, "temperature", "0, or 0.001 to 1000"),
            (0 < self.top_p <= 1, "top_p", "in (0, 1]"),
            (0 <= self.top_k < 2**31, "top_k", "0 to 2^31 - 1"),
            (1e-6 <= self.repetition_penalty <= 1e6, "repetition_penalty", "1e-6 to 1e6"),
            (all(self.stop), "stop", "a string that is not empty"),
            (0 <= self.seed < 2**63, "seed", "in [0, 2^63)"),
        )
        for good, name, wanted in checks:
            if not good:
                value = getattr(self, name)
                raise UserError(f"{self.shown(name)} {value[0] if name == 'stop' else value}: want {wanted}")

    @classmethod
    def shown(cls, name: str) -> str:
        """A field, as whoever set it knows it."""
        return f"--{name.replace('_', '-')}"

    def for_transformers(self) -> dict[str, Any]:
        """Keyword arguments of transformers' `generate`; `stop` and `seed` are the caller's."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.repetition_penalty != 1:
            options["repetition_penalty"] = self.repetition_penalty
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return options

    def for_session(self) -> dict[str, Any]:
        """Keyword arguments of `Session.generate`, which has its own random generator."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "generator": torch.Generator().manual_seed(self.seed),
        }


def check_prompt(prompt: str, name: str = "--prompt") -> None:
    """Raises UserError where a prompt is empty or holds bytes that are not UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not valid UTF-8 text: check the terminal's encoding") from error
    if not prompt:
        raise UserError(f"{name} is empty: give at least one character")


@contextmanager
def cpu_threads(model: nn.Module, threads: int | None = None) -> Iterator[None]:
    """Run with so many threads of torch; None: one for a small model on a CPU, where more only wait for each other.

    Raises:
        UserError: threads < 1 or > MAX_THREADS.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UserError(f"--threads {threads}: want 1 to {MAX_THREADS}")
    before = torch.get_num_threads()
    small = next(model.parameters()).device.type == "cpu" and sum(p.numel() for p in model.parameters()) < SMALL_MODEL
    torch.set_num_threads(threads or (1 if small else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
