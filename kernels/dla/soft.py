"""The annealed soft gate: the other way to train a learned threshold (torch, quadratic in the length).

The gate of token p is g_p = sigmoid((I_p - tau) / temperature). A token j lies r_tj = sum of g over (j, t] slots behind
the open one, a fraction, and its slot weight is read between two neighbours:

    O = (At .* M) V,      M[t,j] = (1 - f) lam[t, l] + f lam[t, l + 1],      l + f = min(r_tj, K - 1)

With gates in {0, 1} this is the hard form without merges: there is no capacity rule here, whatever is older than K - 1
boundaries reads the last slot weight. The scores I_p come from the hard rule at the same tau and are detached, as in
the straight-through arm; tau gets its exact gradient through r. Inference is hard: train the last steps hard too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .arrays import causal_decay, chunked, compute_dtype, delta_rule_inverse, document_cumsum, lanes, unlanes
from .attention import partition as decide
from .autocast import without_autocast
from .cache import Partition
from .documents import document_starts


def soft_gate(score: Tensor, tau: Tensor, temperature: float) -> Tensor:
    """g_p in (0, 1): score [N, T] (no gradient), tau [N]."""
    return torch.sigmoid((score.detach() - tau[:, None]) / temperature)


def gates_since_begin(gate: Tensor, document: Tensor) -> Tensor:
    """Inclusive cumsum of the gates [N, T] inside each document (int [N, T]), by doubling: no rounding crosses one."""
    shift = 1
    while shift < gate.shape[1]:
        same = document[:, shift:] == document[:, :-shift]
        gate = torch.cat([gate[:, :shift], gate[:, shift:] + torch.where(same, gate[:, :-shift], 0)], 1)
        shift *= 2
    return gate


def interpolated_weights(lam: Tensor, r: Tensor) -> Tensor:
    """M [..., C, C] from lam [..., C, K] and r [..., C, C]; r outside [0, K - 1] reads the end."""
    r = r.clamp(0, lam.shape[-1] - 1)
    lower = r.detach().floor().clamp(max=lam.shape[-1] - 2)
    index, part = lower.long(), r - lower
    return lam.gather(-1, index) * (1 - part) + lam.gather(-1, index + 1) * part


def _chunk_arrays(q: Tensor, k: Tensor, g: Tensor, beta: Tensor | None, document: Tensor):
    """(At, Qt, Kh, Phi) of `chunk.py`, by autograd: [N, n, C, C], [N, n, C, Dk] twice, [N, n, 1 or Dk, 1 or Dk]."""
    within = document[..., :, None] == document[..., None, :]
    cg = document_cumsum(g, within)
    D = causal_decay(cg, cg, within)
    previous = F.pad(document[:, :-1, -1], (1, 0), value=-1)[..., None]  # document before the chunk
    from_start = (cg.exp() * (document == previous))[..., None]
    to_end = (cg[..., -1:] - cg).masked_fill(~within[..., -1, :], float("-inf")).exp()[..., None]
    keep = from_start[..., -1:, :]
    At = q @ k.transpose(-1, -2) * D
    if beta is None:
        return At, from_start * q, to_end * k, keep
    inverse, _ = delta_rule_inverse(k, beta, D)
    B = inverse * beta[..., None, :]
    At, ek = At @ B, from_start * k
    Kh = B.transpose(-1, -2) @ (to_end * k)
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    return At, from_start * q - At @ ek, Kh, keep * eye - Kh.transpose(-1, -2) @ ek


def _read(At: Tensor, v: Tensor, lam: Tensor, r_query: Tensor, r_key: Tensor) -> Tensor:
    return (At * interpolated_weights(lam, r_query[..., :, None] - r_key[..., None, :])) @ v


def _read_far(Q: Tensor, Kh: Tensor, v: Tensor, lam: Tensor, r_query: Tensor, r_key: Tensor) -> Tensor:
    return _read(Q @ Kh.transpose(-1, -2), v, lam, r_query, r_key)


@without_autocast
def soft_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    slot_weights: Tensor,
    beta: Tensor | None = None,
    *,
    tau: float | Tensor,
    temperature: float,
    partition: Partition | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """DLA with soft gates over a sequence; every gradient, tau's too, is the exact one of what is computed.

    O(T^2) time a head. Pairs of chunks at one distance are worked on at once and recomputed in backward, which keeps
    T^2 Dk / chunk_size numbers a head and needs a few T * chunk_size more at a time.

    Args:
        q, k, v, g, slot_weights, beta, tau, cu_seqlens: as `dla_attention`; K = slot_weights.shape[-1], at least 2.
        temperature: width of the sigmoid, positive. partition: the hard decisions at this tau, if already there.

    Returns:
        out [B, T, H, Dv] in v's dtype, and the boundary rate of the hard rule, fp32 [H].

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    B, T, H, _ = v.shape
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}; dla_attention is the limit at 0")
    if slot_weights.shape[:3] != v.shape[:3] or slot_weights.shape[3] < 2:
        raise ValueError(f"slot_weights must be {(B, T, H)} + (K >= 2,), got {tuple(slot_weights.shape)}")
    if partition is None:
        hard = tau.detach() if isinstance(tau, Tensor) else tau
        partition = decide(k, v, g, beta, tau=hard, capacity=slot_weights.shape[3], cu_seqlens=cu_seqlens)
    dtype = compute_dtype(v)
    resets = document_starts(cu_seqlens, B, T, v.device).repeat_interleave(H, dim=0)
    document = resets.long().cumsum(1)
    lane_tau = torch.as_tensor(tau, dtype=dtype, device=v.device).expand(H).repeat(B)
    score = partition.score.transpose(1, 2).flatten(0, 1).to(dtype)
    r = chunked(gates_since_begin(soft_gate(score, lane_tau, temperature), document), chunk_size)
    document = F.pad(document, (0, -T % chunk_size), value=-2).view(r.shape)  # padding is a document of its own
    query, key, value, decay, lam = (chunked(lanes(x, H, dtype), chunk_size) for x in (q, k, v, g, slot_weights))
    strength = None if beta is None else chunked(lanes(beta, H, dtype), chunk_size)
    At, Q, Kh, Phi = _chunk_arrays(query, key, decay, strength, document)
    out = _read(At, value, lam, r, r)
    n = r.shape[1]
    for back in range(1, n):  # chunk i reads chunk i - back, through all of Phi between them
        Q, far = Q[:, 1:], n - back
        if back > 1:
            between = Phi[:, 1 : far + 1]
            Q = Q * between if beta is None else Q @ between
        args = (Q, Kh[:, :far], value[:, :far], lam[:, back:], r[:, back:], r[:, :far])
        out = out + F.pad(checkpoint(_read_far, *args, use_reentrant=False), (0, 0, 0, 0, back, 0))
    return unlanes(out.flatten(1, 2)[:, :T], B).to(v.dtype), partition.boundary_rate()
