"""Log-Linear Attention as a Megatron-Core module: the DLA mixer with slots that merge by position alone."""

from __future__ import annotations

from megatron_dla.kernels.dla.rules import EVERY_TOKEN, FENWICK, SlotRule
from megatron_dla.mixers.dla import DLAMixer
from megatron_dla.mixers.layout import log_linear_parameters


class LogLinearMixer(DLAMixer):
    """Log-Linear Mamba-2 or Gated DeltaNet (arXiv 2506.04761) over [S, B, hidden], on `model.backbone`.

    Slot weights are those of the levels, `model.levels` a head, see `kernels/dla/fenwick.py`. Parameters: see
    `layout.log_linear_parameters`.
    """

    table = staticmethod(log_linear_parameters)
    reports_boundaries = False  # every token opens a slot

    def _rule(self) -> SlotRule:
        return SlotRule(0.0, self.model.levels, FENWICK, EVERY_TOKEN, self.backend)
