"""The `fla` backend: δ-mem as flash-linear-attention's gated delta rule, each state row a value head of width 1.

That rule decays before it predicts and reads after it writes: S <- exp(g) S, S += b (v' - S k) k^T, o = S q. So

    exp(g) = keep,   b = erase / keep,   v' = keep (beta / erase) v,   o_t read with q_{t+1} is read_{t+1}

Exact where keep > 0. A logarithm of keep cannot hold zero: keep below `LEAST_KEEP` counts as that, so a token with
beta = 1 leaves a thousandth of the old state instead of nothing. Resets are exact: they cut sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST_KEEP = 2.0**-10
Rule = Callable[..., tuple[Tensor, Tensor]]


def _fla_rule() -> Rule:
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        raise ValueError(
            f"backend='fla' needs flash-linear-attention ({error}): pip install flash-linear-attention==0.6.0, "
            "or use backend='auto'"
        ) from error
    return chunk_gated_delta_rule


def fla_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    keep: Tensor | None,
    erase: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    write_mask: Tensor | None,
    rule: Rule | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `delta_mem_scan`, all of the dtype to compute in; reads [B, T, N, r] and the final state.

    `rule`: stands in for fla's `chunk_gated_delta_rule`, with its arguments and layout. With `reset`, the host waits
    for the positions of the resets once.
    """
    rule = rule or _fla_rule()
    B, T, N, r = v.shape
    keep = (1 - beta if keep is None else keep).clamp(min=LEAST_KEEP)
    value = keep * v if erase is None else keep * v * torch.where(erase > 0, beta / erase.clamp(min=1e-30), 0.0)
    strength = (beta if erase is None else erase) / keep
    decay = keep.log()
    if write_mask is not None:
        writes = write_mask[..., None, None]
        decay, strength = torch.where(writes, decay, 0.0), torch.where(writes, strength, 0.0)
    first = torch.einsum("bnij,bnj->bni", state, q[:, 0])[:, None]
    incoming, more = state, {}
    if reset is not None:
        first = torch.where(reset[:, :1, None, None], 0.0, first)
        starts = reset.clone()
        starts[:, 0] = True
        begins = starts.view(-1).nonzero().view(-1)
        row_begins = begins % T == 0
        incoming = state.new_zeros(len(begins), N, r, r)
        carried = torch.where(reset[:, 0, None, None, None], 0.0, state)
        incoming = incoming.masked_scatter(row_begins[:, None, None, None].expand_as(incoming), carried)
        more["cu_seqlens"] = torch.cat([begins, begins.new_full((1,), B * T)])

    def line(x: Tensor, *heads: int) -> Tensor:
        return x.reshape(*((1, B * T) if reset is not None else (B, T)), *heads)

    later = torch.cat([q[:, 1:], torch.zeros_like(q[:, :1])], 1)
    out, final = rule(
        line(later, N, r), line(k, N, r), line(value, N * r, 1), g=line(decay, N * r), beta=line(strength, N * r),
        scale=1.0, initial_state=incoming.reshape(-1, N * r, r, 1), output_final_state=True, **more,
    )  # fmt: skip
    reads, final = torch.cat([first, out.reshape(B, T, N, r)[:, :-1]], 1), final.reshape(-1, N, r, r)
    if reset is not None:
        reads = torch.where(reset[..., None, None], 0.0, reads)
        final = final[torch.cat([row_begins[1:], row_begins[:1]])]  # a row's last segment: the next one begins a row
    return reads, final
