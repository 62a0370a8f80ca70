"""Plain Gated DeltaNet as a Megatron-Core module: the DLA mixer with one state a head, no boundaries and no merges."""

from __future__ import annotations

from dataclasses import replace

from megatron_dla.kernels.dla.rules import ONE_SLOT, SlotRule
from megatron_dla.mixers.dla import DLAMixer
from megatron_dla.mixers.layout import gdn_parameters


class GDNMixer(DLAMixer):
    """Gated DeltaNet (arXiv 2412.06464) over [S, B, hidden], whatever `model.backbone` is.

    Parameters: see `layout.gdn_parameters`. The fused passes of `kernels/fused` do not take it yet.
    """

    table, delta = staticmethod(gdn_parameters), True
    reports_boundaries = False

    def _rule(self) -> SlotRule:
        return replace(ONE_SLOT, backend=self.backend)
