"""DLA in torch, chunkwise and exact, with a hand-written backward (the `torch` backend).

Slot-dependent work is bilinear and backbone-free. With Phi(t, j) the backbone's transition from j to t,

    At[t,j] = q_t^T Phi(t,j) b_j k_j    Qt[t] = Phi(t,0)^T q_t    Kh[j] = Phi(C,j) b_j k_j    Phi = Phi(C,0)
    O    = (At .* M) V + sum_i diag(lam[t, idx_t(i)]) Qt S_i,        M[t,j] = lam[t, slot_t(j)]
    S'_m = sum_{i -> m} Phi S_i + Kh[j in m]^T V[j in m]

so Mamba-2 and Gated DeltaNet differ only in `_Local`. Every slot index is a count of live starts. Tensors are in lanes
N = B * H, chunks n, chunk length C, slots K by recency (0 = open). All exponents are <= 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .arrays import causal_decay, chunked, delta_rule_inverse, document_cumsum
from .autocast import without_autocast
from .cache import EMPTY
from .documents import begin_of_document
from .threshold import threshold_gradient

# What is in memory at once, so that it stays in the cache of a CPU, whatever the sizes: tokens; elements of an array
# [N, n, C, C], for the lanes that are worked on together; elements of one [N, m, C, K * Dk], for the chunks
WINDOW, PAIRS, ELEMENTS = 512, 1 << 18, 1 << 18
# glibc returns freed memory to the system beyond twice the largest block ever freed, up to 64 MB (mallopt(3)), and all
# temporaries would be faulted in again: free one such block, which nobody has written to
torch.empty(31 << 20, dtype=torch.uint8, device="cpu")
NEVER = 2**30  # death of a start that lives to the end


@dataclass
class SlotTable:
    """Every index that the chunkwise form needs, from the partition alone.

    Attributes:
        slot: int64 [N, n, C, C], slot of token j at time t (in one chunk).
        idx: int64 [N, n, C, K], slot of the i-th inherited state at time t; valid: bool [N, n, K].
        start, death: int64 [N, K] recency: the slots at the end of the range; start is EMPTY where there is none.
    """

    slot: Tensor
    idx: Tensor
    valid: Tensor
    start: Tensor
    death: Tensor


def slot_table(
    start: Tensor, death: Tensor, begin: Tensor, first: int, chunk_size: int, slots: Tensor, slot_death: Tensor
) -> SlotTable:
    """Index tables from the partition.

    Args:
        start, death, begin: [N, T] (begin: `begin_of_document`; deaths are NEVER where they are none), whole chunks,
            from position `first` of the row.
        slots, slot_death: [N, K] recency: positions (EMPTY = none) and deaths of the slots there before.
    """
    N, T = start.shape
    K = slots.shape[1]
    row = first + torch.arange(T, device=start.device)
    position = row.view(-1, chunk_size)  # [n, C]
    where, ends = torch.cat([slots, row.expand(N, -1)], 1), torch.cat([slot_death, death], 1)  # [N, K + T]
    opens = torch.cat([slots > EMPTY, start], 1)
    start, death, begin = (x.view(N, -1, chunk_size) for x in (start, death, begin))
    t = position[:, :, None]
    alive = start[:, :, None, :] & (position[:, None, :] <= t) & (death[:, :, None, :] > t)
    alive &= position[:, None, :] >= begin[..., None]
    count = alive.cumsum(-1)
    opened = count[..., -1:]  # [N, n, C, 1], live starts of the chunk at time t
    slot = (opened - count).clamp_(max=K - 1)

    last = position[:, -1:]  # [n, 1]
    lives = opens[:, None] & (where[:, None] <= last) & (ends[:, None] > last)  # [N, n, K + T], at the end of a chunk
    lives &= where[:, None] >= begin[:, :, -1:]
    after, order = torch.where(lives, where[:, None], EMPTY).topk(K, dim=-1)  # [N, n, K]
    after_death = ends[:, None].expand_as(lives).gather(-1, order)
    inherited = torch.cat([slots[:, None], after[:, :-1]], 1)
    kept = torch.cat([slot_death[:, None], after_death[:, :-1]], 1)[:, :, None] > t  # [N, n, C, K]
    kept &= inherited[:, :, None] >= begin[..., None]
    newer = kept.cumsum(-1) - kept.long()
    idx = newer.add_(opened).clamp_(max=K - 1)
    return SlotTable(slot, idx, inherited > EMPTY, after[:, -1], after_death[:, -1])


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
        """dPhi from S and D (already moved to the slots of S), [N, m, K, Dk, Dv]: [N, m] or [N, m, Dk, Dk]."""
        if self.beta is None:
            return (states * dstates).sum((2, 3, 4))
        return (dstates @ states.transpose(-1, -2)).sum(2)

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


def _stacked(states: list[Tensor]) -> Tensor:
    """States [N, ...] of m chunks as [N, m, ...]; of a single one without a copy."""
    return states[0][:, None] if len(states) == 1 else torch.stack(states, 1)


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
    scratch: list[Tensor] = field(default_factory=list)

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

    def room(self, *shape: int) -> Tensor | None:
        """Uninitialised, in the same memory at every call: new memory would cost more than what is computed in it.

        None where autograd records, for a second derivative.
        """
        if torch.is_grad_enabled():
            return None
        size = math.prod(shape)
        if not self.scratch or self.scratch[0].numel() < size:
            self.scratch[:] = [self.v.new_empty(size)]
        return self.scratch[0][:size].view(shape)

    def groups(self) -> list[slice]:
        """Lanes that are worked on together: on a GPU all of them."""
        N = len(self.start)
        many = N if self.v.is_cuda else max(1, PAIRS // (WINDOW * self.chunk_size))
        return [slice(at, at + many) for at in range(0, N, many)]

    def of_lanes(self, lanes: slice) -> _Row:
        q, k, v, g, lam, start, death, begin = (
            x[lanes] for x in (self.q, self.k, self.v, self.g, self.lam, self.start, self.death, self.begin)
        )
        beta = None if self.beta is None else self.beta[lanes]
        return _Row(q, k, v, g, lam, beta, start, death, begin, self.chunk_size, self.scratch)

    def windows(self) -> list[slice]:
        size = max(1, WINDOW // self.chunk_size) * self.chunk_size
        return [slice(at, min(at + size, self.start.shape[1])) for at in range(0, self.start.shape[1], size)]


class _Pass:
    """What forward and backward share of one window, rebuilt from the inputs and the saved partition."""

    def __init__(self, row: _Row, at: slice, slots: Tensor, slot_death: Tensor) -> None:
        self.row, size = row, row.chunk_size
        begin = row.begin[:, at]
        self.table = slot_table(row.start[:, at], row.death[:, at], begin, at.start, size, slots, slot_death)
        q, k, v, g, lam = (chunked(x[:, at], size) for x in (row.q, row.k, row.v, row.g, row.lam))
        beta = None if row.beta is None else chunked(row.beta[:, at], size)
        self.v, self.lam = v, lam
        chunk = torch.arange(at.start, at.stop, device=v.device).view(-1, size)
        self.local = _Local(q, k, g, beta, begin.view(begin.shape[0], -1, size), chunk)
        self.M = self.lam.gather(-1, self.table.slot)  # [N, n, C, C]
        # only as many slots as ever live at once are worked on
        used = torch.cat([self.table.valid, (self.table.start > EMPTY)[:, None]], 1).sum(-1).amax(0).tolist()
        self.K = max(1, *used)
        self.widths = [min(self.K, 1 + w) for w in self.table.slot[:, :, -1].amax((0, 2)).tolist()]

    def groups(self) -> list[slice]:
        """Chunks whose slot-dependent arrays are in memory at once."""
        lanes, chunks, size, dim = self.local.Kh.shape
        many = max(1, ELEMENTS // (lanes * size * self.K * dim))
        return [slice(at, min(at + many, chunks)) for at in range(0, chunks, many)]

    def reads(self, at: slice) -> tuple[Tensor, Tensor]:
        """Slot index and weight with which each query of some chunks reads each inherited state: [N, m, C, K]."""
        idx = self.table.idx[:, at, :, : self.K]
        return idx, self.lam[:, at].gather(-1, idx) * self.table.valid[:, at, None, : self.K]

    def queries(self, at: slice, weight: Tensor) -> Tensor:
        """[N, m, C, K * Dk], against the states of all slots, one after the other; in `_Row.room`."""
        Qt = self.local.Qt[:, at]
        room = self.row.room(*weight.shape, Qt.shape[-1])
        return torch.mul(weight[..., None], Qt[..., None, :], out=room).flatten(3)

    def kept(self, at: slice) -> Tensor:
        """Where the inherited states of some chunks are at their ends: [N, m, K, K] (from, to)."""
        to = self.table.idx[:, at, -1, : self.K]
        return _one_hot(to, self.K, self.table.valid[:, at, : self.K], self.v)

    def keys(self, at: slice) -> tuple[Tensor, Tensor]:
        """Where the tokens of some chunks are at their ends, [N, m, C, W], and by which key: [N, m, C, W * Dk].

        Tokens end in the newest slots: W is no larger than the oldest of theirs asks for.
        """
        tokens = _one_hot(self.table.slot[:, at, -1], max(self.widths[at]), None, self.v)
        return tokens, (tokens[..., None] * self.local.Kh[:, at, :, None]).flatten(3)

    def advance(self, at: slice, states: Tensor) -> tuple[list[Tensor], Tensor]:
        """States [N, K, Dk, Dv] before each of some chunks, and after the last."""
        kept = self.kept(at).transpose(-1, -2).unbind(1)
        tokens, keys = self.keys(at)
        width = tokens.shape[-1]
        written = (keys.transpose(-1, -2) @ self.v[:, at]).unflatten(2, (width, -1)).unbind(1)
        before = []
        for n, (move, write) in enumerate(zip(kept, written, strict=True)):
            before.append(states)
            states = self.local.advance(at.start + n, (move @ states.flatten(2)).view_as(states))
            states[:, :width] += write
        return before, states


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
        outs, finals, before = [], [], []
        for lanes in row.groups():
            out, final, entering = _forward(row.of_lanes(lanes), states[lanes].clone(), slots[lanes], slot_death[lanes])
            outs.append(out)
            finals.append(final)
            before += entering
        ctx.save_for_backward(q, k, v, g, lam, beta, tau, *before)
        ctx.decisions, ctx.chunk_size, ctx.temperature = decisions, chunk_size, temperature
        return torch.cat(outs)[:, : start.shape[1]], torch.cat(finals)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, do: Tensor, dfinal: Tensor):
        q, k, v, g, lam, beta, tau, *before = ctx.saved_tensors
        start, death, score, lo, resets, *_ = ctx.decisions
        row = _Row.of(q, k, v, g, lam, beta, start, death, resets, ctx.chunk_size)
        groups, many = row.groups(), 3 * len(row.windows())
        parts = [
            _backward(row.of_lanes(lanes), before[many * i : many * (i + 1)], do[lanes], dfinal[lanes])
            for i, lanes in enumerate(groups)
        ]
        T = start.shape[1]
        joined = [None if x[0] is None else torch.cat(x)[:, :T] for x in zip(*(p[0] for p in parts), strict=True)]
        dstates = torch.cat([p[1] for p in parts])
        dtau = None
        if ctx.needs_input_grad[7]:
            begin = begin_of_document(resets)
            assert joined[4] is not None
            dtau = threshold_gradient(joined[4], lam, start, death, lo, score, begin, tau, ctx.temperature)
        return *joined, dstates, dtau, None, None, None


def _forward(row: _Row, states: Tensor, slots: Tensor, slot_death: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Some lanes: out, the states after the last token, and states, slots and their deaths before each window."""
    outs, before = [], []
    for at in row.windows():
        work = _Pass(row, at, slots, slot_death)
        before += [states, slots, slot_death]
        S = states[:, : work.K]
        o = (work.local.At * work.M) @ work.v
        for chunks in work.groups():
            _, weight = work.reads(chunks)
            inherited, S = work.advance(chunks, S)
            for out, queries, held in zip(
                o[:, chunks].unbind(1), work.queries(chunks, weight).unbind(1), inherited, strict=True
            ):
                out += queries @ held.flatten(1, 2)
        outs.append(o.flatten(1, 2))
        states = torch.zeros_like(states)
        states[:, : work.K] = S
        slots, slot_death = work.table.start, work.table.death
    return torch.cat(outs, 1), states, before


def _backward(row: _Row, before: list[Tensor], do: Tensor, dstates: Tensor) -> tuple[list[Tensor | None], Tensor]:
    """Some lanes: gradients of q, k, v, g, lam, beta ([N, T, ...]) and of the states before the first token."""
    parts: list[tuple] = []
    for n, at in reversed(list(enumerate(row.windows()))):
        states, slots, slot_death = before[3 * n : 3 * n + 3]
        grads, dstates = _window_backward(_Pass(row, at, slots, slot_death), states, do[:, at], dstates)
        parts.insert(0, grads)
    return [None if x[0] is None else torch.cat(x, 1) for x in zip(*parts, strict=True)], dstates


def _window_backward(work: _Pass, states: Tensor, do: Tensor, dfinal: Tensor) -> tuple[tuple, Tensor]:
    """One window: gradients of q, k, v, g, lam, beta ([N, tokens, ...]) and of the states before it."""
    local, table, V, K = work.local, work.table, work.v, work.K
    held, S = [], states[:, :K]
    for at in work.groups():
        before, S = work.advance(at, S)
        held += before
    dO = chunked(do, work.row.chunk_size)
    dlam = torch.zeros_like(work.lam)
    X = dO @ V.transpose(-1, -2)
    dAt = (X * work.M).tril()
    dlam.scatter_add_(-1, table.slot, (X * local.At))
    dV = (local.At * work.M).transpose(-1, -2) @ dO
    dQt, dKh, dPhi = torch.empty_like(local.Qt), torch.empty_like(local.Kh), torch.empty_like(local.Phi)
    dS = dfinal[:, :K]
    for at in reversed(work.groups()):
        kept, (tokens, keys) = work.kept(at), work.keys(at)
        W = tokens.shape[-1]
        idx, weight = work.reads(at)
        read = (work.queries(at, weight).transpose(-1, -2) @ dO[:, at]).unflatten(2, (K, -1))  # [N, m, K, Dk, Dv]
        ends, moved = [], []
        for n in reversed(range(at.start, at.stop)):
            ends.append(dS)
            moved.append((kept[:, n - at.start] @ dS.flatten(2)).view_as(dS))
            dS = read[:, n - at.start] + local.advance_t(n, moved[-1])
        dend, dmoved, S = (_stacked(x) for x in (ends[::-1], moved[::-1], held[at]))  # [N, m, K, Dk, Dv]
        dend = dend[:, :, :W].flatten(2, 3)
        dV[:, at] += keys @ dend
        written = (V[:, at] @ dend.transpose(-1, -2)).unflatten(-1, (W, -1))  # [N, m, C, W, Dk]
        dKh[:, at] = (tokens[..., None] * written).sum(3)
        dPhi[:, at] = local.phi_gradient(S, dmoved)
        m, C = weight.shape[1:3]
        room = work.row.room(len(S) * m, C, K * S.shape[-2])
        y = torch.bmm(dO[:, at].flatten(0, 1), S.reshape(len(S) * m, -1, S.shape[-1]).mT, out=room)
        y = y.view(*weight.shape, -1)  # dO S_i^T: [N, m, C, K, Dk]
        dQt[:, at] = (weight[..., None, :] @ y).squeeze(-2)
        dweight = (local.Qt[:, at, :, None] @ y.mT).squeeze(-2) * table.valid[:, at, None, :K]
        dlam[:, at].scatter_add_(-1, idx, dweight)
    dq, dk, dg, dbeta = local.backward(dAt, dQt, dKh, dPhi)
    dstates = torch.zeros_like(states)
    dstates[:, :K] = dS
    flat = tuple(None if x is None else x.flatten(1, 2) for x in (dq, dk, dV, dg, dlam, dbeta))
    return flat, dstates
