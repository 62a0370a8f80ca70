"""The recurrence in torch, chunkwise and exact, with a hand-written backward (the `torch` backend).

A chunk acts on each row of the state as s <- s M + c. Chunks run side by side: first their (M, c), then a short scan
over the chunks, then the recurrence from each chunk's true start. M costs r^3 a token: where that is more than the
steps it saves (high ranks, many sequences), the chunks run one after the other, and are only a unit of memory.

Nothing is divided and no logarithm is taken, so gates of exactly 0 and 1 are ordinary. A reset is keep = erase = 0 at
its token with the read cut, a token that does not write is keep = 1, erase = write = 0. What depends on time has shape
[C, r, L]: steps first, lanes (chunks x batch x states) last, for torch's elementwise loops run over the last axis.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CUBE_LIMIT = 20_000  # batch x states x r^3 above which chunk maps cost more than the steps they save (one CPU core)
CHUNK_FACTOR = 0.6  # tokens a chunk / sqrt(T) where chunks run side by side: a scan step costs a third of a token's
SERIAL_CHUNK = 64
FILL = [0.0, 0.0, 1.0, 0.0, 0.0]  # q, k, keep, -erase, source of a step past the last token: nothing changes


def effective_gates(
    v: Tensor,
    beta: Tensor,
    keep: Tensor | None,
    erase: Tensor | None,
    reset: Tensor | None,
    write_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """keep, erase and write * v, each [B, T, N, r], with resets and masked writes folded in.

    Args: as `delta_mem_scan`. The caller still has to zero the reads of tokens at a reset.
    """
    keep = 1 - beta if keep is None else keep
    erase = beta if erase is None else erase
    source = beta * v
    if write_mask is not None:
        writes = write_mask[..., None, None]
        keep = torch.where(writes, keep, 1.0)
        erase, source = torch.where(writes, erase, 0.0), torch.where(writes, source, 0.0)
    if reset is not None:
        kept = ~reset[..., None, None]
        keep, erase = torch.where(kept, keep, 0.0), torch.where(kept, erase, 0.0)
    return keep, erase, source


def chunk_plan(length: int, lanes: int, rank: int, chunk_size: int | None) -> tuple[int, bool]:
    """Tokens a chunk, and whether the chunks run side by side; `lanes` = batch x states."""
    side_by_side = lanes * rank**3 <= CUBE_LIMIT
    if chunk_size is None:
        chunk_size = max(8, math.ceil(CHUNK_FACTOR * math.sqrt(length))) if side_by_side else SERIAL_CHUNK
    return min(chunk_size, length), side_by_side and length > chunk_size


def chunk_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    keep: Tensor | None,
    erase: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    write_mask: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `delta_mem_scan`, all of the dtype to compute in; reads [B, T, N, r] and the final state."""
    keep, erase, source = effective_gates(v, beta, keep, erase, reset, write_mask)
    B, T, N, r = v.shape
    plan = chunk_plan(T, B * N, r, chunk_size)
    reads, final = ChunkScan.apply(q, k, keep, erase, source, state, *plan)
    return reads if reset is None else torch.where(reset[..., None, None], 0.0, reads), final


class _Steps:
    """What each step of a run of chunks needs: views of `packed` [5, C, r, L], taken once.

    Attributes:
        q, k, keep, forget, source: over the steps, [r, L]; forget = -erase.
    """

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed
        self.q, self.k, self.keep, self.forget, self.source = (x.unbind(0) for x in packed.unbind(0))

    def __len__(self) -> int:
        return len(self.q)


def _to_lanes(inputs: list[Tensor], chunk: int, fill: list[float]) -> Tensor:
    """Tensors [B, T, N, r] -> [n, C, r, chunks * B * N]; steps after the last token hold `fill`."""
    B, T, N, r = inputs[0].shape
    chunks = -(-T // chunk)
    padded = inputs[0].new_empty(len(inputs), B, chunks * chunk, N, r)
    for slot, x, value in zip(padded, inputs, fill, strict=True):
        slot[:, :T] = x
        slot[:, T:] = value
    return padded.view(-1, B, chunks, chunk, N, r).permute(0, 3, 5, 2, 1, 4).reshape(len(inputs), chunk, r, -1)


def _from_lanes(x: Tensor, like: Tensor) -> Tensor:
    """[C, r, chunks * B * N] -> [B, T, N, r], the inverse of `_to_lanes`."""
    B, T, N, r = like.shape
    C = x.shape[0]
    return x.view(C, r, -1, B, N).permute(3, 2, 0, 4, 1).reshape(B, -1, N, r)[:, :T]


def _maps(steps: _Steps, lanes: int) -> Tensor:
    """(M, c) of the first `lanes` lanes: [r + 1, r, r, lanes], M[a, i, b] with c[i, b] last.

    A row i of the state becomes s_i'[b] = sum_a s_i[a] M[a, i, b] + c[i, b].
    """
    r = steps.packed.shape[2]
    maps = steps.packed.new_zeros(r + 1, r, r, lanes)
    maps[:r] = torch.eye(r, dtype=maps.dtype, device=maps.device).view(r, 1, r, 1)
    products, change = torch.empty_like(maps), maps.new_empty(r + 1, r, lanes)
    for t in range(len(steps)):
        key = steps.k[t][:, :lanes]
        torch.mul(maps, key, out=products)
        torch.sum(products, 2, out=change)
        change.mul_(steps.forget[t][:, :lanes])
        change[r].add_(steps.source[t][:, :lanes])
        maps.mul_(steps.keep[t][:, None, :lanes]).addcmul_(change[:, :, None], key)
    return maps


def _rows(x: Tensor, groups: int) -> Tensor:
    """[r, r, chunks * G] -> [chunks, G * r, 1, r]: every row of a state a batch entry."""
    r = x.shape[0]
    return x.view(r, r, -1, groups).permute(2, 3, 0, 1).reshape(-1, groups * r, 1, r)


def _scan(local: Tensor, maps: Tensor, first: Tensor, backward: bool = False) -> Tensor:
    """The chunks one after the other: s <- s M + c from `first`, or (backward) the last chunk first and by M^T.

    Args:
        local: [r, r, chunks * G], c of each chunk. maps: [chunks, G * r, r, r]. first: [r, r, G].

    Returns:
        [r, r, (chunks + 1) * G] in the order of time: `first` and what comes out of each chunk.
    """
    r, groups = first.shape[0], first.shape[-1]
    added = _rows(local, groups).unbind(0)
    maps_of = (maps.mT if backward else maps).unbind(0)
    states = [_rows(first, groups)[0]]
    with torch.autocast(first.device.type, enabled=False):  # backward may run inside one
        for n in range(len(added)):
            at = len(added) - 1 - n if backward else n
            states.append(torch.baddbmm(added[at], states[-1], maps_of[at]))
    stacked = torch.stack(states[::-1] if backward else states)
    return stacked.view(-1, groups, r, r).permute(2, 3, 0, 1).reshape(r, r, -1)


def _replay(steps: _Steps, state: Tensor, history: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence from `state` [r, r, L]: reads [C, r, L], predictions S k [C, r, L], the last state.

    `history`: [C, r, r, L], filled with the state before each step.
    """
    reads, predictions = steps.packed.new_empty(2, *steps.packed.shape[1:]).unbind(0)
    reads_at, predictions_at = reads.unbind(0), predictions.unbind(0)
    products = torch.empty_like(state)
    state = state.clone()
    for t in range(len(steps)):
        if history is not None:  # the backward pass has no use for reads
            history[t] = state
        else:
            torch.sum(torch.mul(state, steps.q[t], out=products), 1, out=reads_at[t])
        torch.sum(torch.mul(state, steps.k[t], out=products), 1, out=predictions_at[t])
        change = torch.addcmul(steps.source[t], steps.forget[t], predictions_at[t])
        state.mul_(steps.keep[t][:, None]).addcmul_(change[:, None], steps.k[t])
    return reads, predictions, state


def _adjoint(steps: _Steps, dreads: Tensor, grad: Tensor) -> Tensor:
    """The recurrence of the state's gradient, last step first: G <- keep G - erase (G k) k^T + dread q^T.

    Args: dreads [C, r, L]; grad [r, r, L], the gradient after the last step.
    Returns: the gradient before the first step [r, r, L].
    """
    grad, products, dreads_at = grad.clone(), torch.empty_like(grad), dreads.unbind(0)
    for t in reversed(range(len(steps))):
        dchange = torch.mul(grad, steps.k[t], out=products).sum(1)
        _adjoint_step(grad, dchange.mul_(steps.forget[t]), dreads_at[t], steps, t)
    return grad


def _adjoint_step(grad: Tensor, dprediction: Tensor, dread: Tensor, steps: _Steps, t: int) -> None:
    grad.mul_(steps.keep[t][:, None]).addcmul_(dprediction[:, None], steps.k[t]).addcmul_(dread[:, None], steps.q[t])


def _gradients(steps: _Steps, dreads: Tensor, state: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [5, C, r, L] of q, k, keep, erase and source; and of the state before the first step.

    Args: dreads [C, r, L]; state and grad [r, r, L]: the state before the first step, the gradient after the last.
    Step by step and not in one product over all of them: a step's arrays stay in the cache.
    """
    before = state.new_empty(len(steps), *state.shape)
    _, prediction, _ = _replay(steps, state, before)
    _, _, _, forget, source = steps.packed.unbind(0)
    changes = torch.addcmul(source, forget, prediction).unbind(0)
    grads = torch.empty_like(steps.packed)
    dq, dk, dkeep, _, dchange = (x.unbind(0) for x in grads.unbind(0))
    grad, products, dreads_at = grad.clone(), torch.empty_like(grad), dreads.unbind(0)
    for t in reversed(range(len(steps))):
        torch.sum(torch.mul(grad, steps.k[t], out=products), 1, out=dchange[t])
        dprediction = dchange[t] * steps.forget[t]
        torch.sum(torch.mul(before[t], dreads_at[t][:, None], out=products), 0, out=dq[t])
        torch.sum(torch.mul(before[t], grad, out=products), 1, out=dkeep[t])
        torch.mul(grad, changes[t][:, None], out=products).addcmul_(before[t], dprediction[:, None])
        torch.sum(products, 0, out=dk[t])
        _adjoint_step(grad, dprediction, dreads_at[t], steps, t)
    torch.mul(grads[4], prediction, out=grads[3]).neg_()  # erase multiplies the prediction in the change
    return grads, grad


class ChunkScan(torch.autograd.Function):
    """(reads, final state) of (q, k, keep, erase, source, state); see `chunk_scan`.

    Saved for backward: the inputs, each chunk's starting state (r^2 numbers) and, where chunks run side by side, the
    chunks' M (r^3).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, keep: Tensor, erase: Tensor, source: Tensor, state: Tensor,
        chunk: int, side_by_side: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        B, _, N, r = q.shape
        groups = B * N
        packed = _to_lanes([q, k, keep, -erase, source], chunk, FILL)
        first = state.permute(2, 3, 0, 1).reshape(r, r, groups)
        maps = None
        if side_by_side:
            steps = _Steps(packed)
            local = _maps(steps, packed.shape[-1] - groups)  # no chunk starts from where the last one ends
            maps = local[:r].view(r, r, r, -1, groups).permute(3, 4, 1, 0, 2).reshape(-1, groups * r, r, r)
            starts = _scan(local[r], maps, first)
            reads, _, ends = _replay(steps, starts)
            final = ends[..., -groups:]
        else:
            found, begins, final = [], [], first
            for part in packed.split(groups, -1):
                begins.append(final)
                one, _, final = _replay(_Steps(part.contiguous()), final)
                found.append(one)
            reads, starts = torch.cat(found, -1), torch.cat(begins, -1)
        ctx.save_for_backward(q, k, keep, erase, source, starts, maps)
        ctx.chunk = chunk
        return _from_lanes(reads, q), final.reshape(r, r, B, N).permute(2, 3, 0, 1).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dreads: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, keep, erase, source, starts, maps = ctx.saved_tensors
        B, _, N, r = q.shape
        groups = B * N
        packed = _to_lanes([q, k, keep, -erase, source, dreads], ctx.chunk, [*FILL, 0.0])
        dend = dfinal.permute(2, 3, 0, 1).reshape(r, r, groups)
        if maps is None:
            found = []
            for part, start in zip(reversed(packed.split(groups, -1)), reversed(starts.split(groups, -1)), strict=True):
                part = part.contiguous()
                grads, dend = _gradients(_Steps(part[:5]), part[5], start, dend)
                found.append(grads)
            grads, dstart = torch.cat(found[::-1], -1), dend
        else:
            later = packed[..., groups:].contiguous()
            ends = torch.zeros_like(starts[..., groups:])
            ends[..., -groups:] = dend
            local = _adjoint(_Steps(later[:5]), later[5], ends)
            ends = _scan(local[..., :-groups], maps[1:], local[..., -groups:], backward=True)
            grads, dstarts = _gradients(_Steps(packed[:5]), packed[5], starts, torch.cat([ends, dend], -1))
            dstart = dstarts[..., :groups]
        dstate = dstart.reshape(r, r, B, N).permute(2, 3, 0, 1)
        return *(_from_lanes(x, q) for x in grads), dstate, None, None
