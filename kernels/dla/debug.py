"""Debugging a wrong decision or a wrong result: forced replay of a partition, error gates of a backend.

**Forced replay.** Two implementations may legitimately differ after a near tie, so partitions are not compared element
by element. `forced_replay` follows a partition's own decisions in float64 and lists those that are wrong by a margin:
a decision is wrong if, given all earlier ones of the same partition, float64 would have decided otherwise.

**Gates.** With the partition given, `run` computes the outputs and gradients of any backend, `oracle` the same in
float64. `verdict` compares one tensor: a fixed limit on its relative RMS error, and no worse than torch in the same
precision. `check_all` raises AssertionError with the numbers of all tensors that fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .attention import dla_attention
from .cache import FIRST_SCORE, Partition, SlotCache
from .documents import document_starts
from .rules import INFORMATION, Controls, needs_positions, positions

# relative RMS error against float64 on the same inputs, for bf16 and fp16
LIMITS = {
    "o": 0.005,
    "dq": 0.008,
    "dk": 0.008,
    "dv": 0.008,
    "dg": 0.02,
    "dbeta": 0.02,
    "dslot_weights": 0.02,
    "dtau": 0.02,
    "states": 0.005,
    "dstates": 0.008,
}
FP32_LIMIT = 1e-5
# How far the error may exceed that of torch in the same precision.
FACTOR = {False: 2.0, True: 3.0}  # forward, backward
# Errors below this are never worse than torch's. Rounding an exact result to a 16-bit type already costs an RMS of
# about 0.2 eps (an error uniform in half an ulp either way, over a random mantissa). In fp32 two orders of the same sum
# differ by a few eps, and which of two such errors is larger says nothing about a kernel.
FLOOR_EPS = {torch.bfloat16: 0.25, torch.float16: 0.25, torch.float32: 4.0}

_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
_ADDED_MATMULS = (torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default)


class Violation(NamedTuple):
    """One wrong decision of lane (batch, head); `numbers` are what was found, then what float64 says."""

    batch: int
    head: int
    position: int
    kind: str
    numbers: tuple[float, ...]


def open_scores(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, start: Tensor, resets: Tensor, cache: SlotCache | None
) -> Tensor:
    """Float64 information scores [B, T, H] along the boundaries `start`; `resets` bool [B, T].

    Only the open slot is scored against, and it depends on the boundaries alone: merges do not matter here.
    """
    B, T, H, Dv = v.shape
    k = k.double().repeat_interleave(H // k.shape[2], dim=2)
    v, decay = v.double(), g.double().exp()
    weight = torch.ones_like(decay) if beta is None else beta.double()
    state, empty = v.new_zeros(B, H, k.shape[-1], Dv), torch.ones(B, H, dtype=torch.bool, device=v.device)
    if cache is not None:
        last = (cache.live - 1).clamp(min=0)[..., None, None, None].expand(B, H, 1, *state.shape[2:])
        state, empty = cache.states.double().gather(2, last).squeeze(2), cache.live == 0
        state = state * ~empty[..., None, None]
    scores = []
    for t in range(T):
        kt, vt, wt = k[:, t], v[:, t], weight[:, t]
        empty = empty | resets[:, t, None]
        state = state * ~resets[:, t, None, None, None]
        read = torch.einsum("bhd,bhde->bhe", kt, state)
        norm = wt.abs() * kt.norm(dim=-1) * vt.norm(dim=-1) * state.flatten(2).norm(dim=-1)
        cosine = torch.where(norm > 0, wt * (read * vt).sum(-1) / norm, 0)
        scores.append(torch.where(empty, FIRST_SCORE, (2 - 2 * cosine).clamp(min=0).sqrt()))
        if beta is not None:
            state = state - (wt[..., None] * kt)[..., None] * read[..., None, :]
        kept = decay[:, t] * ~(start[:, t] | empty)
        state = kept[..., None, None] * state + (wt[..., None] * kt)[..., None] * vt[..., None, :]
        empty = torch.zeros_like(empty)
    return torch.stack(scores, 1)


@dataclass
class _Slot:
    start: int  # position in the row; -1 - i for slot i of the cache
    count: int
    info: float


@dataclass
class _Lane:
    """The decisions of one lane (lists over T), the float64 scores; `death` also has the cache's slots, by -1 - i."""

    batch: int
    head: int
    start: list[bool]
    death: dict[int, int]
    score: list[float]
    lo: list[int] | None
    exact: list[float]
    resets: list[bool]
    tau: float
    capacity: int
    margins: tuple[float, float]
    merge_rule: str
    opens: list[bool] | None  # what a control says; None: by information
    pairs: list[int] | None  # which pair merges, if not the cheapest

    def follow(self, slots: list[_Slot]) -> tuple[list[Violation], list[_Slot]]:
        """Walk the lane; returns what is wrong and the slots after the last token."""
        self.found: list[Violation] = []
        self.ends: dict[int, list[int]] = {}
        T, document = len(self.start), 0
        for position, at in self.death.items():
            if at != T:
                self.ends.setdefault(at, []).append(position)
            if at != T and not (max(position, -1) < at < T):
                self.report(max(position, 0), "death out of range", at)
            if at != T and position >= 0 and not self.start[position]:
                self.report(position, "death of a token that is not a start", at)
        for t in range(T):
            if self.resets[t]:
                slots, document = [], t
            self.check_score(t, first=not slots)
            self.check_lo(t, slots, document)
            fires = self.start[t] or not slots
            self.merge(t, slots, due=fires and len(slots) >= self.capacity)
            if fires:
                slots.append(_Slot(t, 1, self.exact[t]))
            else:
                slots[-1].count += 1
                slots[-1].info += self.exact[t]
        return self.found, slots

    def report(self, position: int, kind: str, *numbers: float) -> None:
        self.found.append(Violation(self.batch, self.head, position, kind, numbers))

    def check_score(self, t: int, first: bool) -> None:
        margin = 1e-6 if first else self.margins[0]
        if not abs(self.score[t] - self.exact[t]) < margin:  # also where it is NaN
            self.report(t, "score", self.score[t], self.exact[t])
        if first and not self.start[t]:
            self.report(t, "first token is not a start")
        kind, margin = "start" if self.start[t] else "no start", self.margins[0]
        if self.opens is not None:
            if not first and self.start[t] != self.opens[t]:
                self.report(t, kind)
            return
        wrong = not first and self.start[t] != (self.exact[t] >= self.tau)
        if wrong and not abs(self.exact[t] - self.tau) < margin:
            self.report(t, kind, self.exact[t], self.tau)

    def cheapest(self, t: int, slots: list[_Slot]) -> tuple[dict[int, float], float]:
        """Cost of each pair by the start of its younger member, and the least."""
        costs: dict[int, float] = {}
        for i, (a, b) in enumerate(zip(slots, slots[1:], strict=False)):
            if self.pairs is not None:
                costs[b.start] = float(i != self.pairs[t])
            elif self.merge_rule == "equal_counts":
                costs[b.start] = a.count + b.count
            else:
                costs[b.start] = (a.info + b.info) / (a.count + b.count)
        return costs, min(costs.values(), default=0.0)

    def check_lo(self, t: int, slots: list[_Slot], document: int) -> None:
        if self.lo is None:
            return
        allowed = {document}
        if len(slots) >= self.capacity:
            costs, least = self.cheapest(t, slots)
            allowed = {max(start, 0) for start, cost in costs.items() if cost - least < self.margins[1]}
        if self.lo[t] not in allowed:
            self.report(t, "lo", self.lo[t], *sorted(allowed))

    def merge(self, t: int, slots: list[_Slot], due: bool) -> None:
        """Apply the deaths at t: exactly one if a merge is due, of the younger member of a cheapest pair, else none."""
        dying = self.ends.get(t, [])
        if len(dying) != due:
            self.report(t, "deaths", len(dying), int(due))
        costs, least = self.cheapest(t, slots)
        for start in dying:
            i = next((i for i, slot in enumerate(slots) if slot.start == start), 0)
            if i == 0:  # not live, in another document, or the oldest, which has nothing to merge into
                self.report(t, "death of a slot that cannot merge", start)
                continue
            if not costs[start] - least < self.margins[1]:
                self.report(t, "victim", start, costs[start], least)
            young = slots.pop(i)
            slots[i - 1].count += young.count
            slots[i - 1].info += young.info


def forced_replay(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    partition: Partition,
    *,
    tau: float | Tensor,
    capacity: int,
    merge: str = "density",
    controls: Controls = INFORMATION,
    cu_seqlens: Tensor | None = None,
    cache: SlotCache | None = None,
    score_margin: float = 1e-3,
    density_margin: float = 1e-3,
) -> list[Violation]:
    """What is wrong with a partition by any rule but `ward`; arguments as `partition`, inputs of any dtype (taken as
    exact)."""
    B, T, H, _ = v.shape
    resets = document_starts(cu_seqlens, B, T, v.device)
    exact = open_scores(k, v, g, beta, partition.start, resets, cache).cpu()
    taus = torch.as_tensor(tau, dtype=torch.float64).detach().cpu().expand(H).tolist()
    found: list[Violation] = []
    opens = pairs = None
    if needs_positions(merge, controls):
        where = positions(resets, H, cache)
        opens = None if controls.boundary == "information" else controls.opens(where)
        pairs = controls.pairs(merge, capacity, where)
    for b in range(B):
        for h in range(H):
            death = dict(enumerate(partition.death[b, :, h].tolist()))
            slots = []
            if partition.cache_death is not None:
                death |= {-1 - i: at for i, at in enumerate(partition.cache_death[b, h].tolist())}
            if cache is not None:
                counts, infos = cache.count[b, h].tolist(), cache.info[b, h].tolist()
                slots = [_Slot(-1 - i, counts[i], infos[i]) for i in range(int(cache.live[b, h]))]
            lane = _Lane(
                b, h, partition.start[b, :, h].tolist(), death, partition.score[b, :, h].tolist(),
                None if partition.lo is None else partition.lo[b, :, h].tolist(), exact[b, :, h].tolist(),
                resets[b].tolist(), taus[h], capacity, (score_margin, density_margin), merge,
                *(None if x is None else x[b, :, h].tolist() for x in (opens, pairs)),
            )  # fmt: skip
            wrong, slots = lane.follow(slots)
            found += wrong
            if partition.final_info is not None:
                found += _check_final(b, h, partition.final_info[b, h].tolist(), slots, score_margin, T)
    return found


def _check_final(b: int, h: int, info: list[float], slots: list[_Slot], margin: float, T: int) -> list[Violation]:
    """Sums of scores after the last token: as close as their scores are, per token."""
    pairs = list(zip(info, slots, strict=False))
    wrong = [i for i, (got, slot) in enumerate(pairs) if not abs(got - slot.info) < margin * slot.count]
    return [Violation(b, h, T, "final_info", (i, info[i], slots[i].info)) for i in wrong]


class RoundedMatmuls(TorchDispatchMode):
    """Every matmul rounds its operands to `dtype` and accumulates in its own: what tensor cores do to torch's fp32.

    A product with a matrix of zeros and ones only moves rows (the chunkwise form moves its states so), and is exact.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        first = 0 if func in _MATMULS else 1 if func in _ADDED_MATMULS else None
        if first is not None:
            operands = args[first : first + 2]
            if not any(bool(((x == 0) | (x == 1)).all()) for x in operands):
                operands = tuple(x.to(self.dtype).to(x.dtype) for x in operands)
            args = (*args[:first], *operands, *args[first + 2 :])
        return func(*args, **(kwargs or {}))


def run(
    inputs: dict[str, Tensor],
    cotangent: Tensor,
    *,
    partition: Partition,
    backend: str,
    tau: float | Tensor,
    states_cotangent: Tensor | None = None,
    cache: SlotCache | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Forward and backward of `dla_attention`, decisions given: "o", "dq", ... by the names of `LIMITS`.

    Args:
        inputs: q, k, v, g, slot_weights and perhaps beta, as `dla_attention`; dtypes are kept.
        cotangent: [B, T, H, Dv]. states_cotangent: [B, H, K, Dk, Dv]; gives "states", the final memory, too.
        tau: a tensor that requires a gradient gives "dtau"; a cache gives "dstates".
    """
    leaves: dict[str, Any] = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    wanted = dict(leaves)
    if isinstance(tau, Tensor) and tau.requires_grad:
        tau = wanted["tau"] = tau.detach().clone().requires_grad_()
    if cache is not None:
        cache = cache.clone()
        cache.states = wanted["states"] = cache.states.detach().requires_grad_()
    out, final = dla_attention(
        **leaves, partition=partition, backend=backend, tau=tau, cache=cache,
        return_cache=states_cotangent is not None, **kwargs,
    )  # fmt: skip
    results, outs, cotangents = {"o": out.detach()}, [out], [cotangent.to(out.dtype)]
    if states_cotangent is not None and final is not None:
        results["states"] = final.states.detach()
        outs, cotangents = [out, final.states], [*cotangents, states_cotangent.to(final.states.dtype)]
    grads = torch.autograd.grad(outs, list(wanted.values()), cotangents, allow_unused=True)
    for (name, x), grad in zip(wanted.items(), grads, strict=True):
        results[f"d{name}"] = torch.zeros_like(x) if grad is None else grad
    return results


def oracle(inputs: dict[str, Tensor], cotangent: Tensor, **rule: Any) -> dict[str, Tensor]:
    """`run` in float64 on the values of `inputs` (the torch path, which equals the recurrence to 1e-10)."""
    if isinstance(tau := rule["tau"], Tensor):
        rule["tau"] = tau.detach().double().requires_grad_(tau.requires_grad)
    if rule.get("cache") is not None:
        rule["cache"] = rule["cache"].clone()
        rule["cache"].states = rule["cache"].states.double()
    rule["backend"] = "torch"
    return run({name: x.double() for name, x in inputs.items()}, cotangent.double(), **rule)


def same_dtype_torch(
    inputs: dict[str, Tensor], cotangent: Tensor, *, dtype: torch.dtype, **rule: Any
) -> dict[str, Tensor]:
    """`run` of the torch path with the arithmetic of a GPU: in bf16 and fp16 every matmul operand is rounded to it."""
    rule["backend"] = "torch"
    if dtype == torch.float32:
        return run(inputs, cotangent, **rule)
    with RoundedMatmuls(dtype):
        return run(inputs, cotangent, **rule)


def relative_rms(got: Tensor, want: Tensor) -> float:
    """rms(got - want) / rms(want) in float64; where `want` is zero, rms(got): inputs are of the order of 1."""
    want = want.detach().double()
    gap = (got.detach().to(want.device).double() - want).square().mean().sqrt().item()
    scale = want.square().mean().sqrt().item()
    return gap / scale if scale > 1e-30 else gap


def verdict(
    name: str,
    got: Tensor,
    oracle: Tensor,
    same_dtype_torch: Tensor | None = None,
    *,
    dtype: torch.dtype,
    backward: bool,
    fp32_inside: Tensor | None = None,
) -> tuple[bool, str]:
    """Whether `got` passes, and one line of numbers; arguments as `check`."""
    if got.shape != oracle.shape:
        return False, f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    if not bool(got.isfinite().all()):
        return False, f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} values are NaN or infinite"
    limit = FP32_LIMIT if dtype == torch.float32 else LIMITS[name]
    error = relative_rms(got, oracle)
    ok, line = error <= limit, f"{name}: relative RMS error {error:.2e}, limit {limit:.0e}"
    if same_dtype_torch is not None:
        theirs, factor = relative_rms(same_dtype_torch, oracle), FACTOR[backward]
        allowed = max(factor * theirs, FLOOR_EPS[dtype] * torch.finfo(dtype).eps)
        ok = ok and error <= allowed
        line += f"; {error / max(theirs, 1e-30):.2f} x torch in {dtype} ({theirs:.2e}; allowed {allowed:.2e})"
    if fp32_inside is not None:
        line += f"; {error / max(relative_rms(fp32_inside, oracle), 1e-30):.2f} x torch with fp32 inside"
    return ok, line


def check(
    name: str,
    got: Tensor,
    oracle: Tensor,
    same_dtype_torch: Tensor | None = None,
    *,
    dtype: torch.dtype,
    backward: bool,
    fp32_inside: Tensor | None = None,
) -> None:
    """Assert both gates for one tensor.

    Args:
        name: a key of `LIMITS`. got: the kernel's result. oracle: float64, on the same (rounded) inputs.
        same_dtype_torch: torch's result in that precision, see the function; None skips that gate.
        dtype: bfloat16, float16 or float32, what the kernel computes in.
        fp32_inside: `backend="torch"` on the same inputs, only for the message.
    """
    ok, line = verdict(name, got, oracle, same_dtype_torch, dtype=dtype, backward=backward, fp32_inside=fp32_inside)
    assert ok, line


def check_all(inputs: dict[str, Tensor], cotangent: Tensor, *, dtype: torch.dtype, backend: str, **rule: Any) -> None:
    """Run `backend` and every reference on `inputs`, and assert all gates at once; arguments as `run`."""
    got = run(inputs, cotangent, backend=backend, **rule)
    want = oracle(inputs, cotangent, **rule)
    torch_path = same_dtype_torch(inputs, cotangent, dtype=dtype, **rule)
    inside = run(inputs, cotangent, backend="torch", **rule)
    failed, lines = [], []
    for name, value in got.items():
        ok, line = verdict(
            name, value, want[name], torch_path[name], dtype=dtype, backward=name.startswith("d"),
            fp32_inside=inside[name],
        )  # fmt: skip
        lines.append(("  " if ok else "! ") + line)
        failed += [] if ok else [name]
    assert not failed, f"{', '.join(failed)} failed\n" + "\n".join(lines)
