"""Where slots open: the detection pass in torch, vectorised over the tokens of a chunk.

The score of token t depends on the earlier boundaries only through the start of the open slot. So a chunk scores every
pair (token t, start s) at once, where s is a token of the chunk: a restart at s is column masking (l >= s) of a matrix
E that does not depend on the boundaries, for the delta rule too, because the trailing block of the inverse of a unit
lower-triangular matrix is the inverse of the trailing block. With s_t = b_t k_t v_t^T (b_t = 1 without the delta rule),
a_t = exp(g_t) and S[t, s] the open state before token t,

    E[t, l] = k_t^T Phi(t - 1, l) b_l k_l
    inner[t, s] = k_t^T S[t, s] v_t = sum_{l >= s} E[t, l] v_l^T v_t
    read2[t, s] = |S[t, s]^T k_t|^2 = |sum_{l >= s} E[t, l] v_l|^2
    |S[t + 1, s]|^2 = a_t^2 |S[t, s]|^2 + c[t, s], c linear in inner and read2, hence
    |S[t, s]|^2 = sum_{s <= u < t} (prod_{u < r < t} a_r^2) c[u, s]

and every sum is a product of C x C matrices. The first token after s whose score reaches the threshold is the next
boundary, which gives a table `after[s]`. Chunk by chunk it is left to score the tokens against the state that comes in:
up to the first boundary, from where the table goes on.
"""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arrays import causal_decay, chunked, document_cumsum
from .cache import FIRST_SCORE

PAIRS = 1 << 17  # (token, start) pairs in memory at once: bounds the memory, and keeps them in the cache of a CPU
TOGETHER = 1 << 15  # elements of the open states of all lanes, up to which many chunks are tried at once
MANY = 8  # chunks that have to be right for trying the rest at once, too


def _scores(inner: Tensor, norm2: Tensor) -> Tensor:
    """Eq 13, sqrt(2 - 2 cos), from <s_t, S> and |s_t|^2 |S|^2 (overwritten); sqrt(2) where both are zero."""
    kind = torch.finfo(norm2.dtype)
    norm = norm2.clamp_(min=kind.smallest_normal * kind.eps).sqrt_()  # the least number above zero
    return torch.rsub((inner / norm).clamp_(-1, 1), 2, alpha=2).sqrt_()


def _suffix_sums(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum(-1).flip(-1)


class _Chunk(NamedTuple):
    """What the state that comes into a chunk meets: of C tokens in M lanes."""

    v: Tensor  # [M, C, Dv]
    write2: Tensor  # [M, C]
    gain: Tensor  # [M, C]
    reads: Tensor  # [M, C, Dk]
    writes: Tensor  # [M, Dk, C]
    Phi: Tensor  # [M, Dk, Dk], [M, 1, 1] without the delta rule
    A: Tensor  # [M, C, C]
    A0: Tensor  # [M, C, 1]
    last: Tensor  # int64 [M, C + 1], the chunk's last boundary if there is one at s; -1 at C
    tau: Tensor  # [M, 1] or [M, C]
    resets: Tensor  # bool [M, C]
    own: Tensor  # of the slot that opens with the chunk: E v [M, C, Dv], without the delta rule `inner` [M, C]
    loss: Tensor | None  # [M, C], as beta
    beta: Tensor | None

    def enter(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [M, C] of the tokens against the state that comes in [M, Dk, Dv] as long as no slot opens, and the
        first boundary [M], C = none.
        """
        if self.beta is None:
            inner = torch.bmm(self.reads, state).mul_(self.v).sum(-1).add_(self.own)
            grown = torch.addcmul(self.write2, self.gain, inner)
        else:
            assert self.loss is not None
            read = torch.baddbmm(self.own, self.reads, state)
            inner = (read * self.v).sum(-1)
            grown = torch.addcmul(self.write2, self.gain, inner).addcmul_(self.loss, read.square_().sum(-1))
            inner.mul_(self.beta)
        norm2 = state.square().sum((1, 2), keepdim=True)  # recomputed every chunk: no drift
        norm2 = torch.baddbmm(self.A0 * norm2, self.A, grown[..., None])
        score = _scores(inner, norm2.squeeze(-1).mul_(self.write2))
        C = score.shape[1]
        fired = (score >= self.tau) | self.resets
        return score, torch.where(fired, torch.arange(C, device=score.device), C).amin(-1)

    def boundary(self, first: Tensor) -> Tensor:
        """The last boundary [M] of a chunk whose first one is `first` [M]; -1 = none."""
        return self.last.gather(-1, first[:, None]).squeeze(-1)

    def written(self, begin: Tensor) -> Tensor:
        """What the tokens from `begin` [M] on add to the open state that leaves the chunk."""
        index = torch.arange(self.v.shape[1], device=begin.device)
        return torch.bmm(self.writes * (index >= begin[:, None, None]), self.v)

    def leave(self, state: Tensor, first: Tensor) -> Tensor:
        """The open state after the chunk."""
        begin = self.boundary(first)
        carry = self.Phi * (begin < 0)[:, None, None]
        state = carry * state if self.beta is None else torch.bmm(carry, state)
        return state.add_(self.written(begin))


class _Window:
    """Some chunks of all lanes, [Z, N, C, ...]: everything that does not depend on the state that comes in.

    Attributes:
        score: [Z, N, C, C], of each token against each start. after: int64 [Z, N, C + 1], the boundary after each
            start, C = none. parts: the fields of `_Chunk`, [Z, N, ...].
    """

    def __init__(self, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, tau: Tensor, resets: Tensor) -> None:
        self.tau, self.resets = tau, resets
        document = resets.cumsum(-1, dtype=torch.int32)
        within = document[..., :, None] == document[..., None, :]
        cg = document_cumsum(g, within)
        before = F.pad(cg[..., :-1], (1, 0))  # at a document's first token: never used
        D = causal_decay(before, cg, within, -1)  # [Z, N, C, C]
        alpha, keep, enters = g.exp(), cg[..., -1].exp()[..., None, None], before.exp()[..., None]
        keys, values = k @ k.transpose(-1, -2), v @ v.transpose(-1, -2)
        k2, v2 = (x.diagonal(dim1=-2, dim2=-1).clone() for x in (keys, values))
        write2 = k2 * v2  # |s_t|^2
        ends = (cg[..., -1:] - cg).masked_fill_(~within[..., -1, :], float("-inf")).exp_()[..., None] * k
        reads, writes = enters * k, ends.transpose(-1, -2)  # of the state that comes in; into the one that goes out
        E = keys.mul_(D)
        A = D.square_()
        gain = 2 * alpha
        if beta is None:
            inner = _suffix_sums(E * values)
            own, loss = inner[..., 0], None
            grown = gain[..., None] * inner
            Phi = keep
        else:
            write2, shrink = write2 * beta.square(), 1 - beta * k2
            gain, loss = gain * beta * shrink, -alpha.square() * beta * (1 + shrink)
            L = (beta * alpha)[..., None] * E  # its diagonal is taken as 1
            rows = torch.cat([E, writes], -2)  # [Z, N, C + Dk, C]
            rows = torch.linalg.solve_triangular(L, rows, upper=False, left=False, unitriangular=True)
            E, writes = rows.mul_(beta[..., None, :]).split(sizes := [k.shape[-2], k.shape[-1]], -2)
            left, moved = (rows @ (cg.exp()[..., None] * k)).split(sizes, -2)  # of the state that comes in
            inner = _suffix_sums(E * values)
            pairs = values.tril_(-1).mul_(2).add_(torch.diag_embed(v2))
            read2 = _suffix_sums((E @ pairs).mul_(E))
            grown = (gain[..., None] * inner).addcmul_(loss[..., None], read2)
            inner.mul_(beta[..., None])
            Phi = torch.diag_embed(keep[..., 0].expand(*cg.shape[:-1], k.shape[-1])) - moved
            own, reads = E @ v, reads - left
        norm2 = A @ grown.add_(write2[..., None]).tril_()
        # pairs s >= t have no meaning, and no norm: the root of a denormal number takes 20 times as long as one of 1
        apart = torch.ones(2 * v.shape[2:3], dtype=v.dtype, device=v.device).triu_()
        self.score = _scores(inner, norm2.mul_(write2[..., None]).add_(apart))
        last = self._link(v.shape[2])
        self.parts = _Chunk(
            v, write2, gain, reads, writes, Phi, A, enters.square(), last, tau, resets, own, loss, beta
        )  # fmt: skip

    def _link(self, C: int) -> Tensor:
        """`_Chunk.last`."""
        self.index = torch.arange(C, device=self.score.device)
        fired = (self.score >= self.tau[..., None]) | self.resets[..., None]
        early = fired.to(self.score.dtype).mul_(self.index[:, None] - C).tril_(-1)  # 0 = no boundary at the token
        self.after = F.pad(early.amin(-2).long() + C, (0, 1), value=C)
        self.hops = [self.after]  # 1, 2, 4 ... boundaries on
        last = torch.where(self.after < C, self.after, torch.arange(C + 1, device=self.score.device))
        while 2 ** len(self.hops) <= C:
            self.hops.append(self.hops[-1].gather(-1, self.hops[-1]))
            last = last.gather(-1, last)
        return F.pad(last[..., :-1], (0, 1), value=-1)

    @cached_property
    def chunks(self) -> list[_Chunk]:
        # views taken at once: indexing a tensor costs as much as a small product
        each: list[Any] = [itertools.repeat(None) if x is None else x.unbind() for x in self.parts]
        return [_Chunk(*fields) for fields in zip(*each, strict=False)]

    def rest(self, z: int) -> _Chunk:
        """The chunks from z on, as lanes: [(Z - z) * N, ...]."""
        fields: list[Any] = [None if x is None else x[z:].flatten(0, 1) for x in self.parts]
        return _Chunk(*fields)

    def follow(self, first: Tensor, score0: Tensor) -> tuple[Tensor, Tensor]:
        """Boundaries (bool) and scores [Z, N, C] from the first boundary of each chunk [Z, N] and `enter`'s scores."""
        reached = torch.zeros_like(self.after).scatter_(-1, first[..., None], 1)
        for hop in self.hops:
            reached = reached.scatter_add(-1, hop, reached)
        fired = reached[..., :-1] > 0
        opened = torch.where(fired, self.index, -1).cummax(-1).values
        opened = F.pad(opened[..., :-1], (1, 0), value=-1)  # the start of the open slot before each token
        score = self.score.gather(-1, opened.clamp(min=0)[..., None]).squeeze(-1)
        return fired, torch.where(opened < 0, score0, score).masked_fill_(self.resets, FIRST_SCORE)


def _pass(window: _Window, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The open state after the window; of each chunk the first boundary [Z, N], and `enter`'s scores [Z, N, C].

    What leaves a chunk depends on what came in only through its last boundary, if it has one, and this is nearly always
    the one that it would have after a boundary at its first token. Where a chunk is too small to keep a processor busy,
    all of them are tried at once on that guess. A chunk is right if those before it guessed right.
    """
    (Z, N, C), few = window.resets.shape, state.numel() <= TOGETHER
    firsts, scores, z = [], [], 0
    while z < Z:
        if not few or Z - z < MANY:
            score, first = window.chunks[z].enter(state)
            state = window.chunks[z].leave(state, first)
            firsts.append(first[None])
            scores.append(score[None])
            z += 1
            continue
        rest = window.rest(z)
        guess = rest.last[:, 0]
        left = rest.written(guess).unflatten(0, (-1, N))  # [Z - z, N, Dk, Dv]
        came = torch.cat([state[None], left[:-1]])
        score, first = rest.enter(came.flatten(0, 1))
        wrong = (rest.boundary(first) != guess).view(-1, N).any(1).tolist()
        score, first = score.view(-1, N, C), first.view(-1, N)
        done = wrong.index(True) + 1 if True in wrong else Z - z  # these met the right state
        state = window.chunks[z + done - 1].leave(came[done - 1], first[done - 1]) if wrong[done - 1] else left[-1]
        firsts.append(first[:done])
        scores.append(score[:done])
        z, few = z + done, done >= MANY
    return state, torch.cat(firsts), torch.cat(scores)


def detect(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    tau: Tensor,
    resets: Tensor,
    state: Tensor | None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Boundaries and scores over lanes.

    Args:
        k, v: [N, T, Dk], [N, T, Dv]. g, beta: [N, T]. tau: [N], or [N, T] for each token its own. resets: bool [N, T],
            document starts.
        state: [N, Dk, Dv], open state of the incoming cache, or None: then the first token must be a document start.

    Returns:
        start bool [N, T], score [N, T].
    """
    N, T = g.shape
    state = k.new_zeros(N, k.shape[-1], v.shape[-1]) if state is None else state
    k, v, g, document = (chunked(x, chunk_size).transpose(0, 1) for x in (k, v, g, resets))  # [n, N, C, ...]
    beta = None if beta is None else chunked(beta, chunk_size).transpose(0, 1)
    taus = chunked(tau, chunk_size).transpose(0, 1) if tau.ndim == 2 else tau[:, None].expand(len(document), N, 1)
    size = max(1, PAIRS // (N * chunk_size**2))
    starts, scores = [], []
    for at in range(0, len(document), size):
        kw, vw, gw = (x[at : at + size].contiguous() for x in (k, v, g))
        bw = None if beta is None else beta[at : at + size].contiguous()
        window = _Window(kw, vw, gw, bw, taus[at : at + size], document[at : at + size])
        state, first, score = _pass(window, state)
        start, score = window.follow(first, score)
        starts.append(start)
        scores.append(score)
    start, score = (torch.cat(x).transpose(0, 1).flatten(1)[:, :T] for x in (starts, scores))
    return start, score
