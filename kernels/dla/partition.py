"""Exact chunkwise partition in torch: where slots open, and which starts the capacity rule removes.

Two passes. Detection reads the keys and values chunk by chunk: Gram matrices, then one vectorised step a token over all
(batch, head) lanes. It does not depend on the capacity, because a full cache merges only among the slots already there.
The capacity pass then needs three scalars a segment (start, tokens, summed score) and one step a boundary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import FIRST_SCORE, Partition, SlotCache
from .documents import document_starts


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def lanes(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B, T, G, ...] -> [B * heads, T, ...]; groups are repeated for their heads."""
    x = x.to(dtype)
    if x.shape[2] != heads:
        x = x.repeat_interleave(heads // x.shape[2], dim=2)
    return x.transpose(1, 2).reshape(x.shape[0] * heads, x.shape[1], *x.shape[3:])


def unlanes(x: Tensor, batch: int) -> Tensor:
    """[B * H, T, ...] -> [B, T, H, ...]."""
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)


def chunked(x: Tensor, size: int) -> Tensor:
    """[N, T, ...] -> [N, n, size, ...], zero-padded at the end."""
    pad = -x.shape[1] % size
    if pad:
        x = torch.cat([x, x.new_zeros(x.shape[0], pad, *x.shape[2:])], dim=1)
    return x.view(x.shape[0], -1, size, *x.shape[2:])


def delta_rule_inverse(k: Tensor, beta: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """T = (I + stril(diag(beta) (K K^T .* D)))^-1 and stril(K K^T .* D), both [..., C, C]."""
    gram = (k @ k.transpose(-1, -2) * D).tril(-1)
    eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    return torch.linalg.solve_triangular(eye + beta[..., None] * gram, eye.expand_as(gram), upper=False), gram


def document_cumsum(g: Tensor, within: Tensor) -> Tensor:
    """Inclusive cumsum of g over the last axis [..., C] that restarts at each document.

    `within` [..., C, C] is True where two tokens share a document. A doubling scan, so that no rounding error of one
    document reaches the next: packed documents are isolated bit for bit.
    """
    shift = 1
    while shift < g.shape[-1]:
        joined = within.diagonal(-shift, -2, -1)
        g = torch.cat([g[..., :shift], g[..., shift:] + torch.where(joined, g[..., :-shift], 0)], -1)
        shift *= 2
    return g


def causal_decay(row: Tensor, col: Tensor, within: Tensor, diagonal: int = 0) -> Tensor:
    """exp(row_t - col_j) for j <= t + diagonal in one document, else 0; masked before exp, which could overflow."""
    gap = row[..., :, None] - col[..., None, :]
    return gap.masked_fill(~within.tril(diagonal), float("-inf")).exp()


def detect(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    tau: Tensor,
    resets: Tensor,
    state: Tensor | None,
    info: Tensor | None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Boundaries and scores over lanes.

    Args:
        k, v: [N, T, Dk], [N, T, Dv]. g, beta: [N, T]. tau: [N]. resets: bool [N, T], document starts.
        state, info: [N, Dk, Dv] and [N], open state of the incoming cache and its summed scores, or None (then the
            first token opens a slot).

    Returns:
        start bool [N, T]; score [N, T] and the summed scores of the open slot after each token [N, T] in the compute
        dtype. The sum restarts at every boundary and is taken token by token, like the recurrence's: differences of
        one long cumsum would break exact ties, lose digits with T, and carry one document's rounding into the next.
    """
    N, T, Dk = k.shape
    resets = resets.clone()
    if state is None:
        state = k.new_zeros(N, Dk, v.shape[-1])
        resets[:, :1] = True
    k, v, g = (chunked(x, chunk_size) for x in (k, v, g))
    beta = None if beta is None else chunked(beta, chunk_size)
    running = k.new_zeros(N) if info is None else info
    starts, scores, sums = [], [], []
    for n in range(k.shape[1]):
        rows = min(chunk_size, T - n * chunk_size)
        document = F.pad(resets[:, n * chunk_size :][:, :chunk_size], (0, chunk_size - rows)).long().cumsum(1)
        within = document[:, :, None] == document[:, None, :]
        chunk = _ChunkScan(k[:, n], v[:, n], g[:, n], None if beta is None else beta[:, n], within, state)
        for t in range(rows):
            fired, score = chunk.step(t, tau, resets[:, n * chunk_size + t])
            starts.append(fired)
            scores.append(score)
            running = torch.where(fired, score, running + score)
            sums.append(running)
        state = chunk.open_state()
    return torch.stack(starts, 1), torch.stack(scores, 1), torch.stack(sums, 1)


class _ChunkScan:
    """One chunk of the detection pass: everything that does not depend on the boundaries is computed up front.

    A restart of the open state at token s is column masking (l >= s) of E, for the delta rule too: the trailing block
    of the inverse of a unit lower-triangular matrix is the inverse of the trailing block.
    """

    def __init__(self, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, within: Tensor, state: Tensor) -> None:
        cg = document_cumsum(g, within)
        before = F.pad(cg[:, :-1], (1, 0))  # at a document's first token: never used
        self.v, self.beta, self.state = v, beta, state
        self.alpha = g.exp()
        self.alpha2 = self.alpha.square()
        self.k2 = k.square().sum(-1)
        self.norm2 = self.k2 * v.square().sum(-1)  # ||s_t||_F^2
        D = causal_decay(before, cg, within, -1)  # [N, C, C]
        to_end = (cg[:, -1:] - cg).masked_fill(~within[:, -1], float("-inf")).exp()[..., None]
        if beta is None:
            gram = (k @ k.transpose(-1, -2)) * D * (v @ v.transpose(-1, -2))
            self.E = gram.transpose(0, 1).contiguous()  # [C, N, C]: E .* V V^T
            carried = before.exp()[..., None] * k @ state
            self.carried = (carried * v).sum(-1).T.contiguous()  # [C, N]: k_t^T S_0 v_t, decayed
            self.Kh, self.Phi = to_end * k, cg[:, -1].exp()[:, None, None]
        else:
            self.norm2 = self.norm2 * beta.square()
            inverse, _ = delta_rule_inverse(k, beta, causal_decay(cg, cg, within))
            B = inverse * beta[:, None, :]
            E = (k @ k.transpose(-1, -2)) * D @ B
            self.E = E.transpose(0, 1).contiguous()
            ek = cg.exp()[..., None] * k
            self.carried = ((before.exp()[..., None] * k - E @ ek) @ state).transpose(0, 1).contiguous()  # [C, N, Dv]
            self.Kh = B.transpose(-1, -2) @ (to_end * k)
            eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
            self.Phi = cg[:, -1].exp()[:, None, None] * eye - self.Kh.transpose(-1, -2) @ ek
        self.state_norm2 = state.square().sum((-1, -2))  # recomputed every chunk: no drift
        self.kept = torch.ones_like(self.state_norm2)  # 1 while the open slot began before this chunk
        self.segment = torch.zeros_like(g)  # 1 on the tokens of the open slot

    def step(self, t: int, tau: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.E[t] * self.segment
        write2 = self.norm2[:, t]
        if self.beta is None:
            x = torch.addcmul(weights.sum(-1), self.kept, self.carried[t])
            gain, along = x, self.state_norm2
        else:
            beta, read = self.beta[:, t], self.kept[:, None] * self.carried[t]
            read = torch.baddbmm(read[:, None], weights[:, None], self.v).squeeze(1)  # S^T k_t: [N, Dv]
            x = (read * self.v[:, t]).sum(-1)
            shrink = 1 - beta * self.k2[:, t]
            along = self.state_norm2 - beta * (1 + shrink) * read.square().sum(-1)
            x, gain = beta * x, beta * shrink * x
        norm = (write2 * self.state_norm2).sqrt_()
        cosine = torch.where(norm > 0, x / norm, 0)
        score = (2 - 2 * cosine).clamp_(min=0).sqrt_()
        score = torch.where(reset, FIRST_SCORE, score)
        fired = reset | (score >= tau)
        grown = self.alpha2[:, t] * along + 2 * self.alpha[:, t] * gain + write2
        self.state_norm2 = torch.where(fired, write2, grown).clamp_(min=0)
        kept = ~fired
        self.kept = self.kept * kept
        self.segment = self.segment * kept[:, None]
        self.segment[:, t] = 1
        return fired, score

    def open_state(self) -> Tensor:
        carried = self.kept[:, None, None] * (self.Phi * self.state if self.beta is None else self.Phi @ self.state)
        return carried + (self.Kh * self.segment[..., None]).transpose(-1, -2) @ self.v


def apply_capacity(
    start: Tensor,
    running: Tensor,
    resets: Tensor,
    capacity: int,
    cache: SlotCache | None = None,
    *,
    want_lo: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Which starts die, by the density rule (eq 16); one vectorised step a boundary.

    Args:
        start, resets: bool [N, T]; running: [N, T], see `detect`; cache: slots already there, lanes as [B * H].

    Returns:
        death int32 [N, T], cache_death int32 [N, K], lo int32 [N, T] or None, and the slots' final sums [N, K].
    """
    N, T = start.shape
    device, rows = start.device, torch.arange(N, device=start.device)
    table = _SlotTable(N, T, capacity, running, cache)
    death = torch.full((N, T + 1), T, dtype=torch.int32, device=device)
    cache_death = torch.full((N, capacity), T, dtype=torch.int32, device=device)
    opens = start | resets
    before = F.pad(running, (1, 0))  # [N, T + 1]: the open slot's sum before each token
    # boundaries of every lane in order, padded with T: [N, M + 1]
    count = opens.sum(1)
    width = int(count.max()) if N else 0
    position = torch.where(opens, torch.arange(T, device=device), T).sort(1).values[:, : width + 1]
    position = F.pad(position, (0, width + 1 - position.shape[1]), value=T)
    lo = _LowestMoved(before[:, :-1]) if want_lo else None
    first = position[:, 0] if width else torch.full((N,), T, device=device)
    table.grow(first, before[rows, first])  # tokens that still belong to the cache's open slot
    if lo is not None:
        lo.record(table, torch.full_like(first, -1), first, torch.zeros_like(first))
    document = torch.zeros(N, dtype=torch.int64, device=device)
    for m in range(width):
        at, until = position[:, m], position[:, m + 1]
        here = at < T
        reset = here & resets[rows, at.clamp(max=T - 1)]
        table.live = torch.where(reset, 0, table.live)
        document = torch.where(reset, at, document)
        dying = table.merge_cheapest(here & (table.live == capacity))
        in_row = dying >= 0
        death[rows, torch.where(in_row, dying, T)] = torch.where(in_row, at, T).int()
        lost = table.has & ~in_row
        cache_death[rows[lost], (-1 - dying)[lost]] = at[lost].int()
        table.append(here, at, until - at, before[rows, until])
        if lo is not None:
            lo.record(table, torch.where(here, at, T), until, document)
    lowest = None if lo is None else torch.where(resets, torch.arange(T, device=device), lo.values).int()
    return death[:, :T], cache_death, lowest, torch.where(table.index < table.live[:, None], table.info, 0)


class _SlotTable:
    """The scalars of every lane's live slots, chronological: start, tokens, summed score."""

    def __init__(self, N: int, T: int, capacity: int, score: Tensor, cache: SlotCache | None) -> None:
        device = score.device
        index = torch.arange(capacity, device=device)
        self.index, self.never = index, T
        self.start = (-1 - index).expand(N, -1).clone()
        self.count = torch.zeros(N, capacity, dtype=score.dtype, device=device)
        self.info = torch.zeros_like(self.count)
        self.live = torch.zeros(N, dtype=torch.int64, device=device)
        self.has = torch.zeros(N, dtype=torch.bool, device=device)
        if cache is not None:
            self.count += cache.count.view(N, capacity)
            self.info += cache.info.view(N, capacity)
            self.live += cache.live.view(N)

    def pair_costs(self, skip_open: bool = False) -> Tensor:
        """[N, K - 1]: density of each pair of neighbours, inf where there is none."""
        cost = (self.info[:, :-1] + self.info[:, 1:]) / (self.count[:, :-1] + self.count[:, 1:])
        last = self.live[:, None] - (2 if skip_open else 1)
        return torch.where(self.index[:-1] < last, cost, float("inf"))

    def grow(self, count: Tensor, info: Tensor) -> None:
        """Give tokens to the open slot, whose sum becomes `info` (lanes without one, or without tokens, ignore it)."""
        there = (self.live > 0) & (count > 0)
        slot = (self.live - 1).clamp(min=0)[:, None]
        self.count.scatter_add_(1, slot, torch.where(there, count, 0).to(self.count.dtype)[:, None])
        self.info.scatter_(1, slot, torch.where(there[:, None], info[:, None], self.info.gather(1, slot)))

    def merge_cheapest(self, full: Tensor) -> Tensor:
        """Merge the cheapest pair in the lanes `full`; returns the start that dies (T: none, < 0: of the cache)."""
        self.has = full
        if not bool(full.any()):
            return torch.full_like(self.live, self.never)
        pair = self.pair_costs().argmin(1, keepdim=True)  # the oldest pair wins a tie
        dying = self.start.gather(1, pair + 1).squeeze(1)
        for name in ("count", "info"):
            x = getattr(self, name)
            x.scatter_add_(1, pair, torch.where(full[:, None], x.gather(1, pair + 1), 0))
        source = (self.index + (full[:, None] & (self.index > pair))).clamp(max=len(self.index) - 1)
        for name in ("start", "count", "info"):
            setattr(self, name, getattr(self, name).gather(1, source))
        self.live = self.live - full.long()
        return torch.where(full, dying, self.never)

    def append(self, here: Tensor, start: Tensor, count: Tensor, info: Tensor) -> None:
        new = here[:, None] & (self.index == self.live[:, None])
        self.start = torch.where(new, start[:, None], self.start)
        self.count = torch.where(new, count[:, None].to(self.count.dtype), self.count)
        self.info = torch.where(new, info[:, None], self.info)
        self.live = self.live + here.long()


class _LowestMoved:
    """`Partition.lo`: with a full cache, toggling token p moves only the tokens from the start that would die to p."""

    def __init__(self, before: Tensor) -> None:
        self.values = torch.zeros(before.shape, dtype=torch.int32, device=before.device)
        self.tokens = torch.arange(before.shape[1], device=before.device)
        self.before = before  # [N, T], sum of the open slot before each token

    def record(self, table: _SlotTable, at: Tensor, until: Tensor, document: Tensor) -> None:
        """Fill lo for the tokens in (at, until]: their open slot began at `at` (or in the cache) and is still open."""
        rows = torch.arange(len(at), device=at.device)
        closed_cost, closed = table.pair_costs(skip_open=True).min(1)
        closed_start = table.start[rows, closed + 1]
        full = table.live == len(table.index)
        # the pair with the open slot: its cost at token p counts only the tokens before p
        info = table.info[:, -2:-1] + self.before
        count = table.count[:, -2:].sum(1)[:, None] - (until[:, None] - self.tokens)
        open_start = table.start[:, -1]
        low = torch.where(info / count < closed_cost[:, None], open_start[:, None], closed_start[:, None])
        low = torch.where(full[:, None], low.clamp(min=0), document[:, None])
        mine = (self.tokens > at[:, None]) & (self.tokens <= until[:, None])
        self.values = torch.where(mine, low.int(), self.values)


def torch_partition(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    *,
    tau: float | Tensor,
    capacity: int,
    cu_seqlens: Tensor | None = None,
    cache: SlotCache | None = None,
    want_lo: bool = False,
    chunk_size: int = 64,
) -> Partition:
    """The density-rule partition; arguments as `partition` (the public entry point), no gradient.

    `want_lo` also computes `Partition.lo`, which the gradient of a learned threshold needs.
    """
    with torch.no_grad():
        B, T, H, _ = v.shape
        resets = document_starts(cu_seqlens, B, T, v.device).repeat_interleave(H, dim=0)
        lane_tau = torch.as_tensor(tau, dtype=compute_dtype(v), device=v.device).expand(H).repeat(B)
        state, info, dtype = None, None, compute_dtype(v)
        if cache is not None:
            last = (cache.live - 1).clamp(min=0)[..., None]
            open_slot = last[..., None, None].expand(B, H, 1, *cache.states.shape[3:])
            state = cache.states.gather(2, open_slot).flatten(0, 2).to(dtype)
            info = cache.info.gather(2, last).flatten().to(dtype)
            resets[:, 0] |= cache.live.view(-1) == 0
        start, score, running = detect(
            lanes(k, H, dtype), lanes(v, H, dtype), lanes(g, H, dtype),
            None if beta is None else lanes(beta, H, dtype), lane_tau, resets, state, info, chunk_size,
        )  # fmt: skip
        done = apply_capacity(start, running, resets, capacity, cache, want_lo=want_lo)
        death, cache_death, lo, final_info = done
        return Partition(
            start=unlanes(start, B),
            death=unlanes(death, B),
            score=unlanes(score.float(), B),
            lo=None if lo is None else unlanes(lo, B),
            cache_death=cache_death.view(B, H, capacity),
            final_info=final_info.view(B, H, capacity),
        )
