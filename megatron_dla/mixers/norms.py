"""RMSNorm for Megatron layers whose gradient is right under sequence parallelism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dla.mixers.layout import ones
from megatron_dla.parallel.tags import Tag, set_tag, sum_gradient


class RMSNorm(nn.Module):
    """RMSNorm over the last axis of [S, B, hidden].

    Under sequence parallelism each rank sees a part of the tokens, so the weight's gradient is summed in the graph
    (Megatron's WrappedTorchNorm refuses sequence parallelism, and DeepSpeed ignores its attribute).
    """

    by_heads = False

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.group = None
        kind = "replicated_sum" if self.by_heads else "replicated"
        if (config.sequence_parallel or self.by_heads) and config.tensor_model_parallel_size > 1:
            from megatron.core import parallel_state

            self.group, kind = parallel_state.get_tensor_model_parallel_group(), "replicated_sum"
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight = set_tag(weight, Tag(kind), ones)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, sum_gradient(self.weight, self.group), self.eps)


class HeadNorm(RMSNorm):
    """RMSNorm over the channels of each query or key head, [S, B, heads, D]: one weight for all heads.

    A tensor-parallel rank sees its own heads only, so the weight's gradient is summed at every layout.
    """

    by_heads = True
