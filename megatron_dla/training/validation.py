"""Held-out loss and bits per byte."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from megatron_dla.config import RunConfig
from megatron_dla.data import validation_batches
from megatron_dla.model.gpt import packed_sequence
from megatron_dla.parallel.context import context_slice


@torch.no_grad()
def validate(engine, config: RunConfig, token_bytes: torch.Tensor, groups: Any) -> dict[str, float]:
    """One pass over the held-out rows.

    Args:
        token_bytes: [vocab], UTF-8 bytes each token stands for. groups: Megatron's
            ProcessGroupCollection.

    Returns:
        val_loss (nats a token) and val_bpb (bits a byte of text).
    """
    engine.eval()
    dp = groups.dp
    device = token_bytes.device
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    batches = validation_batches(
        config.data.dir, config.data.seq_len, config.training.micro_batch_size, dp.rank(), dp.size(),
        config.training.eval_rows or None, verify=config.data.verify,
    )  # fmt: skip
    for batch in batches:
        rows = (batch.tokens, batch.labels, batch.loss_mask)
        tokens, labels, mask = (context_slice(x, groups.cp).to(device) for x in rows)
        cu_seqlens = batch.cu_seqlens.to(device) if config.data.reset_at_documents else None
        packed = packed_sequence(cu_seqlens, config.data.seq_len)
        losses = engine(tokens, None, None, labels=labels, packed_seq_params=packed)
        totals += torch.stack([(losses * mask).sum(), mask.sum(), (token_bytes[labels] * mask).sum()]).double()
    dist.all_reduce(totals, group=groups.dp_cp)
    engine.train()
    nats, count, size = totals.tolist()
    return {"val_loss": nats / count, "val_bpb": nats / math.log(2) / size}
