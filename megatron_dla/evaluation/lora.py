"""The alternative that keeps a text in weights: a LoRA (arXiv 2106.09685, by peft) tuned on the text alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from megatron_dla.evaluation.scoring import EncodedQuestion, TokenRow, score_logits
from megatron_dla.serving.decode import pad_left

TARGETS = ["q_proj", "v_proj"]  # those of the paper
RANK = 8  # beside no adapter
RATE = 3e-3


@dataclass
class TunedLora:
    """A LoRA for each text in turn, on a frozen model that is afterwards what it was.

    Args:
        base: a causal language model of transformers. size: parameters that it should have; 0: those of rank `RANK`.
        steps: of AdamW with the constant rate `RATE`, on all tokens of the text. seed: of its start.
    """

    base: Any
    size: int
    steps: int
    seed: int = 0

    @property
    def rank(self) -> int:
        """That with which it comes nearest to `size`, at least 1."""
        return max(1, round(self.size / self._per_rank())) if self.size else RANK

    @property
    def parameters(self) -> int:
        return self.rank * self._per_rank()

    def _per_rank(self) -> int:
        modules = (m for name, m in self.base.named_modules() if name.rpartition(".")[2] in TARGETS)
        return sum(sum(m.weight.shape) for m in modules)

    def score(self, told: Sequence[TokenRow], asked: Sequence[EncodedQuestion]) -> dict[str, np.ndarray]:
        """`scoring.score` of the questions alone, each by a model that was tuned on its story.

        Args:
            told: the texts by story. asked: the questions in the order of their stories.
        """
        from peft import LoraConfig, get_peft_model

        parts = []
        for number, row in enumerate(told):
            torch.manual_seed(self.seed + number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=TARGETS)
                tuned = get_peft_model(self.base, config, autocast_adapter_dtype=False)
            try:
                self._tune(tuned, row.ids)
                parts.append(self._ask([question for question in asked if question.story == number]))
            finally:
                tuned.unload()
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _tune(self, tuned: nn.Module, text: list[int]) -> None:
        ids = torch.tensor([text], device=self.base.device)
        optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=RATE, weight_decay=0.0)
        for _ in range(self.steps):
            logits = self.base(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def _ask(self, asked: Sequence[EncodedQuestion]) -> dict[str, np.ndarray]:
        ids, mask = pad_left([question.prompt for question in asked], device=self.base.device)
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        out = self.base(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
        return score_logits(out.logits[:, -1], asked)
