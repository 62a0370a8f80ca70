"""Megatron's GPTModel with a fused loss on a GPU. Import it after `compat.install`, as Megatron."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_dla.mixers import around


class LanguageModel(GPTModel):
    """GPTModel. `backend`: of its kernels, as in `dla_attention`."""

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss of each token [B, S]; labels [B, S]; logits [S, B, V], this rank's part, which it uses up."""
        if not around.uses_kernels(logits, self.backend):
            return super().compute_language_model_loss(labels, logits)
        loss = around.kernels("loss").cross_entropy(logits, labels.transpose(0, 1), self.pg_collection.tp)
        return loss.transpose(0, 1).contiguous()
