"""The plain backbones as Megatron-Core modules: the DLA mixer with one state a head, no boundaries and no merges."""

from __future__ import annotations

from dataclasses import replace

from megatron_dla.kernels.dla.rules import ONE_SLOT, SlotRule
from megatron_dla.mixers.dla import DLAMixer
from megatron_dla.mixers.layout import gdn_parameters, mamba2_parameters


class PlainMixer(DLAMixer):
    """A backbone over [S, B, hidden], whatever `model.backbone` is; `kernels/fused` does not take it yet."""

    reports_boundaries = False

    def _rule(self) -> SlotRule:
        return replace(ONE_SLOT, backend=self.backend)


class GDNMixer(PlainMixer):
    """Gated DeltaNet (arXiv 2412.06464). Parameters: see `layout.gdn_parameters`."""

    table, delta = staticmethod(gdn_parameters), True


class Mamba2Mixer(PlainMixer):
    """Mamba-2 (arXiv 2405.21060). Parameters: see `layout.mamba2_parameters`."""

    table, delta = staticmethod(mamba2_parameters), False
