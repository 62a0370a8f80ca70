"""An adapter on a Hugging Face model, from their directories."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from megatron_dla.adapters.files import Adapter, empty_adapter, read_adapter
from megatron_dla.errors import CheckpointError
from megatron_dla.hf.directory import fingerprint
from megatron_dla.hf.load import load_backbone
from megatron_dla.serving.hf_model import DeltaMemModel, attach


def attach_adapter(base: nn.Module, adapter: Adapter, *, any_base: bool = False) -> DeltaMemModel:
    """`adapter` on a model in memory.

    Args:
        any_base: take it although it was trained on other weights (the shapes must fit).

    Raises:
        CheckpointError: it belongs to another model, or does not fit.
    """
    if adapter.base is not None and not any_base:
        adapter.base.check(fingerprint(base), "the adapter")
    model = attach(base, adapter.config)
    try:
        model.load_tensors(adapter.tensors)
    except CheckpointError:
        model.detach()
        raise
    return model


def load_adapted(
    hf_dir: str | Path,
    adapter_dir: str | Path | None,
    *,
    any_base: bool = False,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
) -> DeltaMemModel:
    """Model and adapter of two directories; without an adapter the plain model in the same interface (no memory).

    Raises:
        CheckpointError: see `load_backbone`, `read_adapter` and `attach_adapter`.
    """
    adapter = empty_adapter() if adapter_dir is None else read_adapter(adapter_dir)
    return attach_adapter(load_backbone(hf_dir, dtype=dtype, device=device), adapter, any_base=any_base)
