"""When slots open and which ones merge: the paper's rules, and controls that decide by position instead of by content.

A control must decide alike wherever it is asked: in any packing, tensor- or context-parallel layout, in training,
prefill and decoding, after a resume and in an export. So it depends on the position in the document alone, and random
numbers are hashes of (seed, layer, head, position), not draws from a generator: a head has the same random boundaries
in every document.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .cache import SlotCache
from .documents import begin_of_document

MERGES = ("density", "ward", "equal_counts", "oldest", "random")
FENWICK = "fenwick"  # the hierarchy of Log-Linear Attention, see `fenwick.py`; for every token a slot
BOUNDARIES = ("information", "random", "every")
ALWAYS, NEVER = -1.0, 4.0  # thresholds: every score is in [0, 2]
_LOW = 0xFFFFFFFF


def mixed(x: Any) -> Any:
    """A one-to-one map of the integers below 2^32 (or of an int64 tensor of them) that changes about half of the bits
    where one bit of x changes."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _LOW
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & _LOW
    return x ^ (x >> 16)


def draw(key: Any, position: Any) -> Any:
    """The random number in [0, 2^32) of a token: key and position (int64) broadcast."""
    return mixed(mixed(position & _LOW) ^ key)


def head_key(seed: int, layer: int, head: int, stream: int) -> int:
    """Of the random numbers of a head; boundaries (stream 0) and merges (1) have their own."""
    key = 0
    for part in (seed, layer, head, stream):
        key = mixed((key + part + 0x9E3779B9) & _LOW)
    return key


@lru_cache(maxsize=256)
def _keys(seed: int, layer: int, heads: tuple[int, int], stream: int, device: torch.device) -> Tensor:
    return torch.tensor([head_key(seed, layer, head, stream) for head in range(*heads)], device=device)


@dataclass(frozen=True)
class Controls:
    """How slots open where not by information, and what the random numbers of the controls depend on.

    Attributes:
        boundary: a slot opens at a token if its score reaches tau (`information`), at a share `rate` of the tokens
            (`random`), or at every `every`-th token of a document (`every`). A document's first token opens one always.
        seed, layer, first_head: of random boundaries and merges; `first_head` is the number of the first head at hand
            among all heads of the layer.
    """

    boundary: str = "information"
    rate: float = 1 / 64
    every: int = 64
    seed: int = 0
    layer: int = 0
    first_head: int = 0

    def from_head(self, offset: int) -> Controls:
        """Of the heads from `offset` on."""
        return replace(self, first_head=self.first_head + offset)

    def keys(self, heads: int, stream: int, device: torch.device) -> Tensor:
        """int64 [H]."""
        args = self.seed, self.layer, (self.first_head, self.first_head + heads), stream, device
        return _keys.__wrapped__(*args) if torch.compiler.is_compiling() else _keys(*args)

    def opens(self, position: Tensor) -> Tensor:
        """bool, from the positions in the document, int64 [..., H]; not for `information`."""
        if self.boundary == "every":
            return position % self.every == 0
        return draw(self.keys(position.shape[-1], 0, position.device), position) < round(self.rate * 2**32)

    def thresholds(self, tau: float | Tensor, position: Tensor) -> float | Tensor:
        """`tau`, or thresholds of the shape of `position` that open a slot where the control says so."""
        if self.boundary == "information":
            return tau
        return torch.where(self.opens(position), ALWAYS, NEVER)

    def pairs(self, merge: str, capacity: int, position: Tensor) -> Tensor | None:
        """Which neighbours merge if a boundary at the token needs room, of the shape of `position`: 0 = the oldest
        pair. None where costs decide."""
        if merge == "oldest":
            return torch.zeros_like(position)
        if merge != "random":
            return None
        return pair_of(draw(self.keys(position.shape[-1], 1, position.device), position), capacity)


def pair_of(number: Any, capacity: int) -> Any:
    """A pair of neighbours in a full cache, from a random number."""
    return (number >> 16) * (capacity - 1) >> 16


INFORMATION = Controls()


def needs_positions(merge: str, controls: Controls) -> bool:
    """Whether a decision depends on where in its document a token is."""
    return merge in ("oldest", "random") or controls.boundary != "information"


def positions(starts: Tensor, heads: int, cache: SlotCache | None) -> Tensor:
    """int64 [B, T, H]: tokens of the document before each token; starts: bool [B, T], document starts."""
    begin = begin_of_document(starts)
    index = torch.arange(starts.shape[1], device=starts.device).expand_as(begin)
    held = begin.new_zeros(1, 1) if cache is None else cache.held()
    inside = begin >= 0
    return torch.where(inside[..., None], (index - begin)[..., None], index[..., None] + held[:, None]).expand(
        -1, -1, heads
    )


def check_rule(merge: str, controls: Controls) -> None:
    """Raises ValueError where a rule is not known; the message names it."""
    if merge not in (*MERGES, FENWICK):
        raise ValueError(f"merge must be one of {(*MERGES, FENWICK)}, got {merge!r}")
    if controls.boundary not in BOUNDARIES:
        raise ValueError(f"controls.boundary must be one of {BOUNDARIES}, got {controls.boundary!r}")
    if not 0 <= controls.rate <= 1:
        raise ValueError(f"controls.rate must be in [0, 1], got {controls.rate}")
    if controls.every < 1:
        raise ValueError(f"controls.every must be at least 1, got {controls.every}")
    if merge == FENWICK and (controls.boundary, controls.every) != ("every", 1):
        raise ValueError(f"merge='fenwick' needs controls of boundary='every' with every=1, got {controls}")


@dataclass(frozen=True)
class SlotRule:
    """When a slot opens, how many a head keeps and which ones merge, as in `dla_attention`."""

    tau: float | Tensor
    capacity: int
    merge: str = "density"
    controls: Controls = INFORMATION
    backend: str = "auto"
    sharpness: Tensor | None = None
    keep_states: bool = False

    def of_heads(self, first: int, heads: int) -> SlotRule:
        """The same of some of the heads at hand."""
        tau = self.tau[first : first + heads] if isinstance(self.tau, Tensor) and self.tau.ndim else self.tau
        sharp = None if self.sharpness is None else self.sharpness[first : first + heads]
        return replace(self, tau=tau, controls=self.controls.from_head(first), sharpness=sharp)


EVERY_TOKEN = Controls("every", every=1)
ONE_SLOT = SlotRule(tau=3.0, capacity=1)  # holds everything: no score, at most 2, reaches tau
