"""Random problems with a realistic structure: topics, boundaries every few dozen tokens, heads that disagree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dla import Partition

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]  # q, k, v, g, slot_weights, beta

BACKBONES = ("mamba2", "gdn")
TAU = 1.0  # between the scores inside a topic (about 0.6) and at a change (about 1.4)
TOPIC = 36  # mean tokens between boundaries of a head
NOISE = 0.4  # of a token around its topic


@dataclass(frozen=True)
class Problem:
    """Shape of one measurement; `name` of the backbone decides groups, normalisation and beta.

    mamba2: one q/k group for all heads, additive writes. gdn: a group a head, unit q and k, delta rule.
    """

    backbone: str
    tokens: int
    dim: int
    capacity: int
    heads: int = 16
    batch: int = 1

    @property
    def groups(self) -> int:
        return 1 if self.backbone == "mamba2" else self.heads


@dataclass
class Inputs:
    """Arguments of `dla_attention`, and the output gradient for timing the backward pass.

    q, k [B, T, G, D], v and dout [B, T, H, D] in the compute dtype; g and beta [B, T, H] and slot_weights [B, T, H, K]
    in fp32 (float64 where the compute dtype is), as a model makes them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    slot_weights: Tensor
    beta: Tensor | None
    dout: Tensor

    def leaves(self) -> list[Tensor]:
        """The tensors that get a gradient."""
        return [x for x in (self.q, self.k, self.v, self.g, self.slot_weights, self.beta) if x is not None]

    def require_grad(self, needed: bool = True) -> Inputs:
        for x in self.leaves():
            x.requires_grad_(needed)
            x.grad = None
        return self

    def arguments(self) -> Arguments:
        """Positional arguments of `dla_attention`."""
        return self.q, self.k, self.v, self.g, self.slot_weights, self.beta

    def to(self, dtype: torch.dtype) -> Inputs:
        """A copy in another dtype, detached: float64 for the oracle."""
        small = torch.float64 if dtype == torch.float64 else torch.float32
        q, k, v, dout = (x.detach().to(dtype) for x in (self.q, self.k, self.v, self.dout))
        g, lam = (x.detach().to(small) for x in (self.g, self.slot_weights))
        return Inputs(q, k, v, g, lam, None if self.beta is None else self.beta.detach().to(small), dout)

    def cpu(self) -> Inputs:
        """A copy on the CPU, detached: for the token recurrence."""
        return self._map(Tensor.cpu)

    def rows(self, start: int, stop: int) -> Inputs:
        """The tokens [start, stop), detached."""
        return self._map(lambda x: x[:, start:stop].contiguous())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        changed = {f.name: change(x.detach()) for f in fields(self) if (x := getattr(self, f.name)) is not None}
        return replace(self, **changed)


def _topics(problem: Problem, changes: Tensor, heads: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[B, T, heads, D]: a direction per topic plus noise; changes bool [B, T, heads or 1]."""
    run = changes.long().cumsum(1)
    shape = (problem.batch, int(run.max()) + 1, heads, problem.dim)
    base = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    index = run.expand(-1, -1, heads)[..., None].expand(-1, -1, -1, problem.dim)
    noise = torch.randn(index.shape, generator=generator, device=generator.device, dtype=dtype)
    return base.gather(1, index).add_(noise, alpha=NOISE)


def make_inputs(
    problem: Problem, seed: int, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> Inputs:
    """Random inputs on `device`, the same for the same seed, device kind and torch version.

    Half of the topic changes are common to all heads (a new passage), half are a head's own (its values turn), so that
    heads open and merge slots at different tokens. The memory's length differs between heads as Mamba-2's does.
    """
    p, device = problem, torch.device(device)
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (p.batch, p.tokens, p.heads)

    def rand(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    common = rand(p.batch, p.tokens, 1) < 0.5 / TOPIC
    own = rand(*shape) < 0.5 / TOPIC
    k = _topics(p, common, p.groups, dtype, generator)
    v = _topics(p, common | own, p.heads, dtype, generator)
    q = torch.randn(k.shape, generator=generator, device=device, dtype=dtype)
    if p.backbone == "gdn":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    rate = 10 ** (-3 + 2 * rand(p.heads))  # a head forgets over 10 to 1000 tokens
    small = torch.float64 if dtype == torch.float64 else torch.float32
    g = -rate * (0.5 + rand(*shape))
    return Inputs(
        q=q * p.dim**-0.5, k=k, v=v, g=g.to(small), slot_weights=(0.5 + rand(*shape, p.capacity)).to(small),
        beta=rand(*shape).to(small) if p.backbone == "gdn" else None,
        dout=torch.randn(v.shape, generator=generator, device=device, dtype=dtype),
    )  # fmt: skip


def mean_live_slots(part: Partition) -> float:
    """Slots in use, averaged over tokens and heads (one document a row)."""
    opened = part.start.int()
    B, T, H = opened.shape
    died = torch.zeros(B, T + 1, H, dtype=torch.int32, device=opened.device)
    died.scatter_add_(1, torch.where(part.start, part.death, T).long(), torch.ones_like(opened))
    live = opened.cumsum(1) - died[:, :T].cumsum(1)
    return float(live.double().mean())
