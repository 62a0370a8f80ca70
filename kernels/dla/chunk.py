"""DLA in torch, chunkwise and exact, with a hand-written backward (the `torch` backend).

Slot-dependent work is bilinear and backbone-free. With Phi(t, j) the backbone's transition from j to t,

    At[t,j] = q_t^T Phi(t,j) b_j k_j    Qt[t] = Phi(t,0)^T q_t    Kh[j] = Phi(C,j) b_j k_j    Phi = Phi(C,0)
    O    = (At .* M) V + sum_i diag(lam[t, idx_t(i)]) Qt S_i,        M[t,j] = lam[t, slot_t(j)]
    S'_m = sum_{i -> m} Phi S_i + Kh[j in m]^T V[j in m]

so Mamba-2 and Gated DeltaNet differ only in `_Local`. Every slot index is a count of live starts. Tensors are in lanes
N = B * H, chunks n, chunk length C, slots K by recency (0 = open). All exponents are <= 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arrays import causal_decay, chunked, delta_rule_inverse, document_cumsum
from .autocast import without_autocast
from .cache import EMPTY
from .documents import begin_of_document
from .threshold import threshold_gradient

WINDOW = 512  # tokens whose arrays are in memory at once: they stay in the cache of a CPU, whatever T is
NEVER = 2**30  # death of a start that lives to the end


@dataclass
class SlotTable:
    """Every index that the chunkwise form needs, from the partition alone.

    Attributes:
        slot: int64 [N, n, C, C], slot of token j at time t (in one chunk).
        idx: int64 [n][N, C, K], slot of the i-th inherited state at time t; valid: bool [n][N, K].
        start, death, live: [N, K] recency: the slots at the end of the range.
    """

    slot: Tensor
    idx: list[Tensor]
    valid: list[Tensor]
    start: Tensor
    death: Tensor
    live: Tensor


def slot_table(
    start: Tensor, death: Tensor, begin: Tensor, first: int, chunk_size: int, slots: Tensor, slot_death: Tensor
) -> SlotTable:
    """Index tables from the partition.

    Args:
        start, death, begin: [N, T] (begin: `begin_of_document`; deaths are NEVER where they are none), whole chunks,
            from position `first` of the row.
        slots, slot_death: [N, K] recency: positions (EMPTY = none) and deaths of the slots there before.
    """
    T, K = start.shape[1], slots.shape[1]
    position = first + torch.arange(T, device=start.device).view(-1, chunk_size)  # [n, C]
    start, death, begin = (x.view(x.shape[0], -1, chunk_size) for x in (start, death, begin))
    t = position[:, :, None]
    alive = start[:, :, None, :] & (position[:, None, :] <= t) & (death[:, :, None, :] > t)
    alive &= position[:, None, :] >= begin[..., None]
    count = alive.long().cumsum(-1)
    opened = count[..., -1:]  # [N, n, C, 1], live starts of the chunk at time t
    slot = (opened - count).clamp_(max=K - 1)
    idx, valid = [], []
    for n in range(position.shape[0]):
        kept = slot_death[:, None] > t[n]  # [N, C, K]
        kept &= slots[:, None] >= begin[:, n, :, None]
        newer = kept.long().cumsum(-1) - kept.long()
        idx.append((opened[:, n] + newer).clamp_(max=K - 1))
        valid.append(slots > EMPTY)
        last = int(position[n, -1])
        ends = torch.cat([slot_death, death[:, n]], 1)
        where = torch.cat([slots, position[n].expand(start.shape[0], -1)], 1)
        lives = (ends > last) & (where >= begin[:, n, -1:])
        lives[:, K:] &= start[:, n]
        where = torch.where(lives, where, EMPTY)
        slots, order = where.topk(K, dim=1)
        slot_death = ends.gather(1, order)
    return SlotTable(slot, idx, valid, slots, slot_death, slots > EMPTY)


class _Local:
    """The chunk-local, slot-independent arrays, and the gradient through them.

    `within` is True where t and j share a document; a reset is a decay of zero.
    """

    def __init__(self, q: Tensor, k: Tensor, g: Tensor, beta: Tensor | None, begin: Tensor, chunk: Tensor) -> None:
        self.q, self.k, self.beta = q, k, beta
        within = begin[..., :, None] == begin[..., None, :]
        self.within = within
        cg = document_cumsum(g, within)  # [N, n, C]
        self.D = causal_decay(cg, cg, within)
        self.from_start = cg.exp() * (begin < chunk[:, :1])
        self.to_end = (cg[..., -1:] - cg).masked_fill(~within[..., -1, :], float("-inf")).exp()
        self.keep = self.from_start[..., -1]
        self.QK = q @ k.transpose(-1, -2) * self.D
        if beta is None:
            self.At = self.QK
            self.Qt = self.from_start[..., None] * q
            self.Kh = self.to_end[..., None] * k
            self.Phi = self.keep  # a scalar [N, n]
            return
        self.inverse, self.gram = delta_rule_inverse(k, beta, self.D)
        self.B = self.inverse * beta[..., None, :]
        self.ek, self.ck = self.from_start[..., None] * k, self.to_end[..., None] * k
        self.At = self.QK @ self.B
        self.Qt = self.from_start[..., None] * q - self.At @ self.ek
        self.Kh = self.B.transpose(-1, -2) @ self.ck
        eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
        self.Phi = self.keep[..., None, None] * eye - self.Kh.transpose(-1, -2) @ self.ek

    def advance(self, n: int, states: Tensor) -> Tensor:
        """Phi S over all slots: [N, K, Dk, Dv]."""
        if self.beta is None:
            return self.Phi[:, n, None, None, None] * states
        return self.Phi[:, n, None] @ states

    def advance_t(self, n: int, states: Tensor) -> Tensor:
        """Phi^T D over all slots."""
        return self.advance(n, states) if self.beta is None else self.Phi[:, n, None].transpose(-1, -2) @ states

    def phi_gradient(self, states: Tensor, dstates: Tensor) -> Tensor:
        """dPhi of one chunk from S and D (already moved to the slots of S): [N] or [N, Dk, Dk]."""
        if self.beta is None:
            return (states * dstates).sum((1, 2, 3))
        return (dstates @ states.transpose(-1, -2)).sum(1)

    def backward(self, dAt: Tensor, dQt: Tensor, dKh: Tensor, dPhi: Tensor):
        """(dq, dk, dg, dbeta); the decay gradient is a reverse cumsum inside each chunk only."""
        q, k, beta, D = self.q, self.k, self.beta, self.D
        if beta is None:
            dQK, dbeta = dAt, None
            dck, dkeep = dKh, dPhi
            dk = torch.zeros_like(k)
            dcg = (dQt * self.Qt).sum(-1)
        else:
            Bt, eb = self.B.transpose(-1, -2), beta[..., None]
            dAt = dAt - dQt @ self.ek.transpose(-1, -2)
            dKh = dKh - self.ek @ dPhi.transpose(-1, -2)
            dek = -self.At.transpose(-1, -2) @ dQt - self.Kh @ dPhi
            dQK = dAt @ Bt
            dB = (self.QK.transpose(-1, -2) @ dAt + self.ck @ dKh.transpose(-1, -2)).tril()
            dck = self.B @ dKh
            inverse_t = self.inverse.transpose(-1, -2)
            dL = -(inverse_t @ (dB * beta[..., None, :]) @ inverse_t).tril(-1)
            dbeta = (dB * self.inverse).sum(-2) + (dL * self.gram).sum(-1)
            dgram = dL * eb * D
            dk = dgram @ k + dgram.transpose(-1, -2) @ k + self.from_start[..., None] * dek
            pairs = dL * eb * self.gram
            dcg = self.from_start * ((dQt * q).sum(-1) + (dek * k).sum(-1)) + pairs.sum(-1) - pairs.sum(-2)
            dkeep = dPhi.diagonal(dim1=-2, dim2=-1).sum(-1)
        scores = dQK * self.QK
        ends = self.to_end * (dck * k).sum(-1)
        dcg = dcg + scores.sum(-1) - scores.sum(-2) - ends
        dcg[..., -1] += ends.sum(-1) + dkeep * self.keep
        dQK = dQK * D
        dq = self.from_start[..., None] * dQt + dQK @ k
        dk = dk + dQK.transpose(-1, -2) @ q + self.to_end[..., None] * dck
        dg = document_cumsum(dcg.flip(-1), self.within.flip(-1, -2)).flip(-1)
        return dq, dk, dg, dbeta


def _one_hot(index: Tensor, width: int, keep: Tensor | None, like: Tensor) -> Tensor:
    """[..., width] in the dtype of `like`; rows where `keep` is False are zero."""
    hot = index[..., None] == torch.arange(width, device=index.device)
    return (hot if keep is None else hot & keep[..., None]).to(like.dtype)


@dataclass
class _Row:
    """All tokens, in lanes and whole chunks. Padding belongs to the last document and opens nothing."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    lam: Tensor
    beta: Tensor | None
    start: Tensor
    death: Tensor
    begin: Tensor
    chunk_size: int

    @classmethod
    def of(cls, q, k, v, g, lam, beta, start, death, resets, chunk_size) -> _Row:
        T = start.shape[1]
        pad = -T % chunk_size
        death = torch.where(death >= T, NEVER, death).long()
        begin = begin_of_document(resets)
        if pad:
            start = torch.nn.functional.pad(start, (0, pad))
            death = torch.nn.functional.pad(death, (0, pad), value=NEVER)
            begin = torch.cat([begin, begin[:, -1:].expand(-1, pad)], 1)
        return cls(q, k, v, g, lam, beta, start, death, begin, chunk_size)

    def windows(self) -> list[slice]:
        size = max(1, WINDOW // self.chunk_size) * self.chunk_size
        return [slice(at, min(at + size, self.start.shape[1])) for at in range(0, self.start.shape[1], size)]


class _Pass:
    """What forward and backward share of one window, rebuilt from the inputs and the saved partition."""

    def __init__(self, row: _Row, at: slice, slots: Tensor, slot_death: Tensor) -> None:
        size = row.chunk_size
        begin = row.begin[:, at]
        self.table = slot_table(row.start[:, at], row.death[:, at], begin, at.start, size, slots, slot_death)
        q, k, v, g, lam = (chunked(x[:, at], size) for x in (row.q, row.k, row.v, row.g, row.lam))
        beta = None if row.beta is None else chunked(row.beta[:, at], size)
        self.v, self.lam = v, lam
        chunk = torch.arange(at.start, at.stop, device=v.device).view(-1, size)
        self.local = _Local(q, k, g, beta, begin.view(begin.shape[0], -1, size), chunk)
        self.M = self.lam.gather(-1, self.table.slot)  # [N, n, C, C]
        # only as many slots as ever live at once are worked on
        used = [int(x.sum(1).max()) for x in [*self.table.valid, self.table.live]]
        self.K = max([1, *used])
        self.widths = [min(self.K, 1 + w) for w in self.table.slot[:, :, -1].amax((0, 2)).tolist()]

    def reads(self, n: int) -> tuple[Tensor, Tensor]:
        """Slot index and weight with which each query of chunk n reads each inherited state: [N, C, K]."""
        idx = self.table.idx[n][..., : self.K]
        return idx, self.lam[:, n].gather(-1, idx) * self.table.valid[n][:, None, : self.K]

    def moves(self, n: int) -> tuple[Tensor, Tensor]:
        """Where the inherited states [N, K, K] (from, to) and the tokens [N, C, W] of chunk n are at its end.

        Tokens end in the newest slots: W is no larger than the oldest of theirs asks for.
        """
        to = self.table.idx[n][:, -1, : self.K]
        kept = _one_hot(to, self.K, self.table.valid[n][:, : self.K], self.v)
        return kept, _one_hot(self.table.slot[:, n, -1], self.widths[n], None, self.v)

    def step(self, n: int, states: Tensor) -> Tensor:
        """States at the end of chunk n: [N, K, Dk, Dv]."""
        kept, tokens = self.moves(n)
        moved = (kept.transpose(1, 2) @ states.flatten(2)).view_as(states)
        keys = (tokens[..., None] * self.local.Kh[:, n, :, None]).flatten(2)  # [N, C, W * Dk]
        after = self.local.advance(n, moved)
        after[:, : tokens.shape[-1]] += (keys.transpose(1, 2) @ self.v[:, n]).unflatten(1, (tokens.shape[-1], -1))
        return after


class ChunkDLA(torch.autograd.Function):
    """Lanes in, lanes out; see `dla_attention` for the meaning of the arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        lam: Tensor,
        beta: Tensor | None,
        states: Tensor,
        tau: Tensor,
        decisions: tuple,
        chunk_size: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        start, death, score, lo, resets, slots, slot_death = decisions
        row = _Row.of(q, k, v, g, lam, beta, start, death, resets, chunk_size)
        slot_death = torch.where(slot_death >= start.shape[1], NEVER, slot_death).long()
        states = states.clone()
        outs, before = [], []
        for at in row.windows():
            work = _Pass(row, at, slots, slot_death)
            before += [states, slots, slot_death]
            S = states[:, : work.K]
            o = (work.local.At * work.M) @ work.v
            for n in range(o.shape[1]):
                _, weight = work.reads(n)
                queries = (weight[..., None] * work.local.Qt[:, n, :, None]).flatten(2)  # [N, C, K * Dk]
                o[:, n] += queries @ S.flatten(1, 2)
                S = work.step(n, S)
            outs.append(o.flatten(1, 2))
            states = torch.zeros_like(states)
            states[:, : work.K] = S
            slots, slot_death = work.table.start, work.table.death
        ctx.save_for_backward(q, k, v, g, lam, beta, tau, *before)
        ctx.decisions, ctx.chunk_size, ctx.temperature = decisions, chunk_size, temperature
        return torch.cat(outs, 1)[:, : start.shape[1]], states

    @staticmethod
    @without_autocast
    def backward(ctx: Any, do: Tensor, dfinal: Tensor):
        q, k, v, g, lam, beta, tau, *before = ctx.saved_tensors
        start, death, score, lo, resets, *_ = ctx.decisions
        row = _Row.of(q, k, v, g, lam, beta, start, death, resets, ctx.chunk_size)
        parts: list[tuple] = []
        dstates = dfinal
        for n, at in reversed(list(enumerate(row.windows()))):
            states, slots, slot_death = before[3 * n : 3 * n + 3]
            grads, dstates = _backward(_Pass(row, at, slots, slot_death), states, do[:, at], dstates, ctx.chunk_size)
            parts.insert(0, grads)
        T = start.shape[1]
        joined = [None if x[0] is None else torch.cat(x, 1)[:, :T] for x in zip(*parts, strict=True)]
        dtau = None
        if ctx.needs_input_grad[7]:
            begin = begin_of_document(resets)
            assert joined[4] is not None
            dtau = threshold_gradient(joined[4], lam, start, death, lo, score, begin, tau, ctx.temperature)
        return *joined, dstates, dtau, None, None, None


def _backward(work: _Pass, states: Tensor, do: Tensor, dfinal: Tensor, chunk_size: int) -> tuple[tuple, Tensor]:
    """One window: gradients of q, k, v, g, lam, beta ([N, tokens, ...]) and of the states before it."""
    local, table, V, K = work.local, work.table, work.v, work.K
    S = [states[:, :K]]
    for n in range(V.shape[1] - 1):
        S.append(work.step(n, S[-1]))
    dO = chunked(do, chunk_size)
    dlam = torch.zeros_like(work.lam)
    X = dO @ V.transpose(-1, -2)
    dAt = (X * work.M).tril()
    dlam.scatter_add_(-1, table.slot, (X * local.At))
    dV = (local.At * work.M).transpose(-1, -2) @ dO
    dQt, dKh, dPhi = torch.empty_like(local.Qt), torch.empty_like(local.Kh), torch.empty_like(local.Phi)
    dS = dfinal[:, :K]
    for n in reversed(range(V.shape[1])):
        kept, tokens = work.moves(n)
        W = tokens.shape[-1]
        keys = (tokens[..., None] * local.Kh[:, n, :, None]).flatten(2)
        dV[:, n] += keys @ dS[:, :W].flatten(1, 2)
        written = (V[:, n] @ dS[:, :W].flatten(1, 2).transpose(1, 2)).unflatten(-1, (W, -1))  # [N, C, W, Dk]
        dKh[:, n] = (tokens[..., None] * written).sum(2)
        moved = (kept @ dS.flatten(2)).view_as(dS)
        dPhi[:, n] = local.phi_gradient(S[n], moved)
        idx, weight = work.reads(n)
        y = (dO[:, n] @ S[n].flatten(1, 2).transpose(1, 2)).unflatten(-1, (K, -1))  # dO S_i^T: [N, C, K, Dk]
        dQt[:, n] = (weight[..., None] * y).sum(2)
        dweight = (y * local.Qt[:, n, :, None]).sum(-1) * table.valid[n][:, None, :K]
        dlam[:, n].scatter_add_(-1, idx, dweight)
        queries = (weight[..., None] * local.Qt[:, n, :, None]).flatten(2)
        dS = (queries.transpose(1, 2) @ dO[:, n]).view_as(moved) + local.advance_t(n, moved)
    dq, dk, dg, dbeta = local.backward(dAt, dQt, dKh, dPhi)
    dstates = torch.zeros_like(states)
    dstates[:, :K] = dS
    flat = tuple(None if x is None else x.flatten(1, 2) for x in (dq, dk, dV, dg, dlam, dbeta))
    return flat, dstates
