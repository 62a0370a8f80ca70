"""Kernels against float64 on fresh random inputs: decisions, output, gradients, determinism, decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dla.kernels.bench.inputs import BACKBONES, TAU, Inputs, Problem, make_inputs
from megatron_dla.kernels.dla import Partition, decode_step, dla_attention, partition
from megatron_dla.smoke.report import CheckFailed, Stages

# relative RMS against float64 on the same (rounded) inputs
GATES = {
    torch.bfloat16: {"out": 0.005, "q": 0.008, "k": 0.008, "v": 0.008, "g": 0.02, "slot_weights": 0.02, "beta": 0.02},
    torch.float32: dict.fromkeys(("out", "q", "k", "v", "g", "slot_weights", "beta"), 1e-5),
}
SCORE_MARGIN = {torch.bfloat16: 2e-3, torch.float32: 1e-3}  # of an information score; closer to tau, a decision is free
COST_MARGIN = 1e-3  # of a merge cost
NAMES = ("q", "k", "v", "g", "slot_weights", "beta")


@dataclass(frozen=True)
class Sizes:
    """Shapes of the checks on one kind of device; `prefix` tokens are held against the token recurrence."""

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
    """One device, one backend; every check raises CheckFailed with the shape and the value."""

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
        """Output and gradients [out, dq, dk, dv, dg, dslot_weights(, dbeta)]; the memory it gets is full of NaN."""
        poison(self.device)
        x.require_grad()
        rule: dict[str, Any] = {"tau": TAU, "capacity": p.capacity, "backend": backend or self.backend}
        out, _ = dla_attention(*x.arguments(), partition=part, **rule)  # type: ignore[arg-type]
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
        """Output and every gradient against float64, with the decisions given; finite although memory held NaN."""
        oracle = "torch" if self.backend != "torch" else "naive"
        worst: dict[str, float] = {}
        for name, p, dtype, x in self.cases():
            if oracle == "naive":  # the chunkwise path itself is what is checked: a token recurrence, on a prefix
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
        """Twice the same bits: decisions, output and gradients."""
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
        """A prefill and then one token at a time give the full pass, with a cache of constant size."""
        worst: dict[str, float] = {}
        for name, p, dtype, x in self.cases():
            rule: dict[str, Any] = {"tau": TAU, "capacity": p.capacity}
            T = self.sizes.tokens
            first = T - self.sizes.decoded
            with torch.no_grad():
                full, last = dla_attention(*x.arguments(), return_cache=True, backend=self.backend, **rule)  # type: ignore[arg-type]
                prompt = x.rows(0, first).arguments()
                _, cache = dla_attention(*prompt, return_cache=True, backend=self.backend, **rule)  # type: ignore[arg-type]
                assert cache is not None and last is not None
                size, outs = cache.nbytes, []
                for t in range(first, T):
                    q, k, v, g, lam, beta = x.rows(t, t + 1).arguments()
                    outs.append(decode_step(q, k, v, g, lam, cache, beta, **rule)[0])  # type: ignore[arg-type]
            off = relative_rms(torch.cat(outs, 1), full[:, first:])
            kind = str(dtype).removeprefix("torch.")
            worst[kind] = max(worst.get(kind, 0.0), off)
            _want(off, GATES[dtype]["out"], f"{name}: decoding against the full pass, relative RMS")
            _want(abs(cache.nbytes - size), 0, f"{name}: bytes by which the cache grew")
            for field in ("start", "count", "live", "position"):
                if not torch.equal(getattr(cache, field), getattr(last, field)):
                    raise CheckFailed(f"{name}: decoding ends with other slots than the full pass ({field})")
        self.stages.facts["largest_relative_rms"] = worst
        self.stages.say("largest relative RMS: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))


def poison(device: torch.device) -> None:
    """Fill memory that the allocator will hand out next with NaN: an output that nobody writes shows."""
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
    """The decisions about the first tokens, on the CPU (a death after them is none)."""
    start, death, score = (x[:, :tokens].cpu() for x in (part.start, part.death, part.score))
    return Partition(start, death.clamp(max=tokens), score)


def score_error(head: Inputs, found: Partition, capacity: int) -> float:
    """Largest difference of a score to the float64 recurrence that follows the same decisions, over a prefix."""
    part = _prefix(found, head.v.shape[1])
    replayed = partition_of(head.cpu(), part, capacity)
    return float((replayed - part.score).abs().max())


def partition_of(x: Inputs, part: Partition, capacity: int) -> Tensor:
    """Scores [B, T, H] of the token recurrence that follows `part`."""
    from megatron_dla.kernels.dla.naive import naive_attention

    with torch.no_grad():
        return naive_attention(*x.arguments(), tau=TAU, capacity=capacity, partition=part)[1].score  # type: ignore[arg-type]


def undecided(found: Partition, margin: float) -> int:
    """Tokens that opened a slot with a score clearly under tau, or did not with one clearly above it."""
    wrong = torch.where(found.start, found.score < TAU - margin, found.score >= TAU + margin)
    return int(wrong.sum())


def wrong_merges(found: Partition, capacity: int) -> int:
    """Replays the capacity rule in plain Python from start and score; ties within `COST_MARGIN` are free."""
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
    """Do the merge that was decided; 1 if the rule says otherwise."""
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
