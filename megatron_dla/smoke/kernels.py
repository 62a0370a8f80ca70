"""Kernels against float64 on new random inputs: decisions, output, gradients, determinism, decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dla.kernels.bench.inputs import BACKBONES, TAU, Inputs, Problem, make_inputs
from megatron_dla.kernels.bench.stages import CheckFailed, Stages
from megatron_dla.kernels.dla import Partition, decode_step, dla_attention, partition

# relative RMS against float64 on the same (rounded) inputs
GATES = {
    torch.bfloat16: {"out": 0.005, "q": 0.008, "k": 0.008, "v": 0.008, "g": 0.02, "slot_weights": 0.02, "beta": 0.02},
    torch.float32: dict.fromkeys(("out", "q", "k", "v", "g", "slot_weights", "beta"), 1e-5),
}
SCORE_MARGIN = {
    torch.bfloat16: 2e-3,
    torch.float32: 1e-3,
}  # of a score; within it, both decisions are right
COST_MARGIN = 1e-3  # of a merge cost
NAMES = ("q", "k", "v", "g", "slot_weights", "beta")


@dataclass(frozen=True)
class Sizes:
    """Shapes of the checks on one type of device; `prefix` tokens are compared with the token recurrence."""

    tokens: int
    heads: int
    dims: tuple[int, ...]
    capacity: int
    prefix: int
    decoded: int

    def problem(self, backbone: str, dim: int) -> Problem:
        return Problem(backbone, self.tokens, dim, self.capacity, self.heads)


SIZES = {
    "cuda": Sizes(tokens=4096, heads=4, dims=(64, 128), capacity=30, prefix=384, decoded=64),
    "cpu": Sizes(tokens=320, heads=2, dims=(32,), capacity=3, prefix=112, decoded=16),
}


@dataclass
class Checker:
    """Checks of one backend on one device; each raises CheckFailed with the shape and the value."""

    device: torch.device
    backend: str
    sizes: Sizes
    seed: int
    stages: Stages

    def cases(self) -> Iterator[tuple[str, Problem, torch.dtype, Inputs]]:
        for n, backbone in enumerate(BACKBONES):
            for m, dim in enumerate(self.sizes.dims):
                for dtype in (torch.bfloat16, torch.float32):
                    p = self.sizes.problem(backbone, dim)
                    x = make_inputs(p, self.seed + 10 * n + m, dtype=dtype, device=self.device)
                    name = f"{backbone} D={dim} {str(dtype).removeprefix('torch.')}"
                    yield name, p, dtype, x

    def decide(self, x: Inputs, p: Problem) -> Partition:
        poison(self.device)
        rule: dict[str, Any] = {"tau": TAU, "capacity": p.capacity, "backend": self.backend}
        return partition(x.k, x.v, x.g, x.beta, **rule)

    def attend(self, x: Inputs, p: Problem, part: Partition | None = None, backend: str | None = None) -> list[Tensor]:
        """Output and gradients [out, dq, dk, dv, dg, dslot_weights(, dbeta)], in memory that was filled with NaN."""
        poison(self.device)
        x.require_grad()
        rule: dict[str, Any] = {"tau": TAU, "capacity": p.capacity, "backend": backend or self.backend}
        out, _ = dla_attention(*x.arguments(), partition=part, **rule)
        grads = torch.autograd.grad(out, x.leaves(), x.dout)
        x.require_grad(False)
        return [out.detach(), *grads]

    def decisions(self) -> None:
        """Scores against the token recurrence on a prefix, merges by replay over the whole length."""
        worst_score, boundaries = 0.0, 0.0
        for name, p, dtype, x in self.cases():
            found = self.decide(x, p)
            head = x.rows(0, self.sizes.prefix)
            margin = SCORE_MARGIN[dtype]
            off = score_error(head, found, p.capacity)
            worst_score = max(worst_score, off)
            _want(off, margin, f"{name}: information score against the token recurrence")
            _want(undecided(found, margin), 0, f"{name}: tokens whose boundary contradicts their score")
            _want(wrong_merges(found, p.capacity), 0, f"{name}: merges of a pair that was not the cheapest")
            boundaries += float(found.start.float().mean())
        cases = len(list(self.cases()))
        self.stages.facts |= {"largest_score_error": worst_score, "boundary_rate": boundaries / cases}
        self.stages.say(f"{cases} cases, largest score error {worst_score:.1e}, boundary rate {boundaries / cases:.3f}")

    def numerics(self) -> None:
        """Output and every gradient against float64 for given decisions; finite although memory was NaN."""
        oracle = "torch" if self.backend != "torch" else "naive"
        worst: dict[str, float] = {}
        for name, p, dtype, x in self.cases():
            if oracle == "naive":  # the torch path is checked: compare with the token recurrence, on a prefix
                x, p = x.rows(0, self.sizes.prefix), Problem(p.backbone, self.sizes.prefix, p.dim, p.capacity, p.heads)
            found = self.decide(x, p)
            got = self.attend(x, p, found)
            exact = x.to(torch.float64)
            if oracle == "naive":
                exact, found = exact.cpu(), _prefix(found, p.tokens)
            wanted = self.attend(exact, p, found, backend=oracle)
            for what, a, b in zip(("out", *NAMES), got, wanted, strict=False):
                off = relative_rms(a, b)
                gate = GATES[dtype][what]
                kind = f"{what if what == 'out' else 'd' + what} {str(dtype).removeprefix('torch.')}"
                worst[kind] = max(worst.get(kind, 0.0), off)
                _want(off, gate, f"{name}: relative RMS of {'the output' if what == 'out' else 'd' + what}")
        self.stages.facts["largest_relative_rms"] = worst
        self.stages.say(f"backend {self.backend} against {oracle} in float64, largest relative RMS:")
        for kind in ("bfloat16", "float32"):
            kinds = {k.split()[0]: v for k, v in worst.items() if k.endswith(kind)}
            self.stages.say(f"{kind}: " + ", ".join(f"{k} {v:.1e}" for k, v in kinds.items()))

    def determinism(self) -> None:
        """Two runs give equal bits: decisions, output and gradients."""
        count = 0
        for name, p, _, x in self.cases():
            runs = []
            for _ in range(2):
                found = self.decide(x, p)
                runs.append([found.start, found.death, found.score, *self.attend(x, p, found)])
            for a, b in zip(*runs, strict=True):
                count += 1
                if not torch.equal(a, b):
                    raise CheckFailed(f"{name}: two runs on the same inputs differ")
        self.stages.say(f"{count} tensors, bit-equal in two runs")

    def decoding(self) -> None:
        """Prefill plus one token at a time equals the full pass, with a cache of constant size."""
        worst: dict[str, float] = {}
        for name, p, dtype, x in self.cases():
            rule: dict[str, Any] = {"tau": TAU, "capacity": p.capacity}
            T = self.sizes.tokens
            first = T - self.sizes.decoded
            with torch.no_grad():
                full, last = dla_attention(*x.arguments(), return_cache=True, backend=self.backend, **rule)
                prompt = x.rows(0, first).arguments()
                _, cache = dla_attention(*prompt, return_cache=True, backend=self.backend, **rule)
                assert cache is not None and last is not None
                size, outs = cache.nbytes, []
                for t in range(first, T):
                    q, k, v, g, lam, beta = x.rows(t, t + 1).arguments()
                    outs.append(decode_step(q, k, v, g, lam, cache, beta, **rule)[0])
            off = relative_rms(torch.cat(outs, 1), full[:, first:])
            kind = str(dtype).removeprefix("torch.")
            worst[kind] = max(worst.get(kind, 0.0), off)
            _want(off, GATES[dtype]["out"], f"{name}: decoding against the full pass, relative RMS")
            _want(abs(cache.nbytes - size), 0, f"{name}: bytes by which the cache grew")
            for field in ("start", "count", "live", "position"):
                if not torch.equal(getattr(cache, field), getattr(last, field)):
                    raise CheckFailed(f"{name}: after decoding the slots differ from the full pass ({field})")
        self.stages.facts["largest_relative_rms"] = worst
        self.stages.say("largest relative RMS: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))


def poison(device: torch.device) -> None:
    """Fill memory that the allocator will return next with NaN, so that unwritten outputs show."""
    sizes = [1 << n for n in range(9, 20)] * 4 + [1 << n for n in range(20, 28 if device.type == "cuda" else 22)] * 2
    blocks = [torch.full((n // 4,), float("nan"), device=device) for n in sizes]
    del blocks


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted|| in float64; infinite where `found` holds a NaN."""
    a, b = found.double(), wanted.double().to(found.device)
    off = float((a - b).norm() / b.norm().clamp(min=1e-300))
    return off if off == off else float("inf")


def _want(value: float, gate: float, what: str) -> None:
    if not value <= gate:
        raise CheckFailed(f"{what} is {value:.3g}, want at most {gate:.3g}")


def _prefix(part: Partition, tokens: int) -> Partition:
    """The decisions on the first tokens, on the CPU (later deaths are removed)."""
    start, death, score = (x[:, :tokens].cpu() for x in (part.start, part.death, part.score))
    return Partition(start, death.clamp(max=tokens), score)


def score_error(head: Inputs, found: Partition, capacity: int) -> float:
    """Largest difference between a score and the float64 recurrence with the same decisions, over a prefix."""
    part = _prefix(found, head.v.shape[1])
    replayed = partition_of(head.cpu(), part, capacity)
    return float((replayed - part.score).abs().max())


def partition_of(x: Inputs, part: Partition, capacity: int) -> Tensor:
    """Scores [B, T, H] of the token recurrence that follows `part`."""
    from megatron_dla.kernels.dla.naive import naive_attention

    with torch.no_grad():
        return naive_attention(*x.arguments(), tau=TAU, capacity=capacity, partition=part)[1].score


def undecided(found: Partition, margin: float) -> int:
    """Number of tokens that open a slot with a score clearly below tau, or do not with one clearly above."""
    wrong = torch.where(found.start, found.score < TAU - margin, found.score >= TAU + margin)
    return int(wrong.sum())


def wrong_merges(found: Partition, capacity: int) -> int:
    """Number of merges that differ from the capacity rule, replayed from start and score; ties within `COST_MARGIN`
    may go either way."""
    start, death, score = (x.transpose(1, 2).flatten(0, 1).tolist() for x in (found.start, found.death, found.score))
    wrong = 0
    for starts, deaths, scores in zip(start, death, score, strict=True):
        slots: list[list[float]] = []  # [first token, tokens, summed score], oldest first
        killed: dict[int, int] = {}
        for t, opens in enumerate(starts):
            if opens:
                killed[t] = deaths[t]
                dying = [i for i, slot in enumerate(slots) if killed[int(slot[0])] == t]
                wrong += _merge(slots, dying, len(slots) == capacity)
                slots.append([t, 0, 0.0])
            slots[-1][1] += 1
            slots[-1][2] += scores[t]
    return wrong


def _merge(slots: list[list[float]], dying: list[int], full: bool) -> int:
    """Apply the merge that was decided; returns 1 if it contradicts the rule, else 0."""
    if not full:
        return int(bool(dying))
    if len(dying) != 1 or dying[0] == 0:
        slots.pop(0)
        return 1
    costs = [(a[2] + b[2]) / (a[1] + b[1]) for a, b in zip(slots, slots[1:], strict=False)]
    i = dying[0] - 1
    slots[i] = [slots[i][0], slots[i][1] + slots[i + 1][1], slots[i][2] + slots[i + 1][2]]
    slots.pop(i + 1)
    return int(costs[i] > min(costs) + COST_MARGIN)
