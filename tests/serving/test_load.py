"""Adapters on base models, from their directories."""

import pytest
import torch

from megatron_dla.adapters.files import write_adapter
from megatron_dla.errors import CheckpointError
from megatron_dla.serving.load import load_adapted
from tests.support.tiny_hf import adapter_of, build_adapted, logits, save_base, tokens


def test_an_adapter_loads_on_its_own_base_only_unless_any_base_is_set(tmp_path):
    save_base(tmp_path / "base")
    save_base(tmp_path / "other", seed=1)
    model = build_adapted()
    write_adapter(tmp_path / "adapter", adapter_of(model))
    assert torch.equal(logits(load_adapted(tmp_path / "base", tmp_path / "adapter")), logits(model))
    with pytest.raises(CheckpointError, match="belongs to the base model 'tiny'"):
        load_adapted(tmp_path / "other", tmp_path / "adapter")
    forced = load_adapted(tmp_path / "other", tmp_path / "adapter", any_base=True)
    assert (logits(forced) - logits(model)).abs().max() > 1e-2
    plain = load_adapted(tmp_path / "base", None)
    with torch.no_grad():
        assert torch.equal(logits(plain), model.base(tokens(seed=1)).logits)
