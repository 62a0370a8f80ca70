"""A trained adapter from a run's checkpoint. No Megatron: the checkpoint's tensors have layout-free names."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.files import Adapter, read_adapter
from megatron_dla.adapters.fingerprint import Fingerprint
from megatron_dla.checkpoint.find import LAYOUT, checkpoint_dir, resolve_checkpoint
from megatron_dla.checkpoint.weights import load_merged
from megatron_dla.errors import CheckpointError

_KEY = re.compile(r"decoder\.layers\.(\d+)\.self_attention\.delta_mem\.(\w+)")


def read_any_adapter(path: str | Path) -> Adapter:
    """From a run directory (its newest checkpoint), a step_N directory, or an adapter directory of either format.

    Raises:
        CheckpointError: none of these, or a checkpoint of a whole model.
    """
    path = Path(path)
    if not checkpoint_dir(path).is_dir() and not (path / LAYOUT).is_file():
        return read_adapter(path)
    checkpoint = resolve_checkpoint(path)
    merged, layout = load_merged(checkpoint)
    if not layout.adapter:
        raise CheckpointError(f"{str(checkpoint)!r} holds a whole model, not an adapter: use `dla convert to-hf`")
    tensors: dict[int, dict[str, Tensor]] = {}
    for key, value in merged.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{str(checkpoint)!r}: {key} is not a tensor of an adapter")
        tensors.setdefault(int(match[1]), {})[match[2]] = value
    return Adapter(
        DeltaMemConfig.from_dict(layout.adapter["delta_mem"]), tensors, Fingerprint(**layout.adapter["base"])
    )
