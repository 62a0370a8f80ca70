"""A layer with the fused passes equals the torch path, at every layout that leads another way through the mixer."""

import dataclasses

import pytest
import torch

from megatron_dla.config import ParallelSection
from megatron_dla.mixers import around
from tests.support import workers
from tests.support.workers import BASE_SECTION as BASE
from tests.support.workers import check

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not used beside a GPU")

ALONE, TENSOR = ParallelSection(), ParallelSection(tensor_model_parallel_size=2, sequence_parallel=True)
HEADS = ParallelSection(context_parallel_size=2)
CHAIN = ParallelSection(context_parallel_size=2, cp_scheme="chain")
GDN = dataclasses.replace(BASE, backbone="gdn", tau_mode="learned")
SHARED = dataclasses.replace(BASE, num_groups=1, conv_bias=True, gated_norm="group")
CASES = {
    "mamba2": (BASE, ALONE, "none"),
    "gdn": (GDN, ALONE, "none"),
    "gdn, recomputed": (GDN, ALONE, "selective"),
    "mamba2, recomputed": (BASE, ALONE, "selective"),
    "shared group": (SHARED, TENSOR, "none"),
    "gdn, tensor": (GDN, TENSOR, "none"),
    "mamba2, heads": (BASE, HEADS, "none"),
    "mamba2, chain": (BASE, CHAIN, "none"),
    "gdn, chain": (dataclasses.replace(GDN, tau_mode="fixed"), CHAIN, "none"),
}
DOCUMENTS = [0, 17, 24, 48, 60, 61, 96]  # 24 is where the second rank begins


@pytest.mark.parametrize("name", CASES)
def test_a_layer_with_fused_passes(ranks, name: str) -> None:
    section, parallel, recompute = CASES[name]
    size = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    for errors in ranks(size).run(workers.fused_parity, section, parallel, DOCUMENTS, 21, recompute):
        check(errors, 1e-4)


def test_a_model_with_fused_passes_and_loss(ranks) -> None:
    """Over two vocabulary parts, one layer."""
    section = dataclasses.replace(BASE, num_layers=1)
    for errors in ranks(2).run(workers.fused_model_parity, section, TENSOR, DOCUMENTS, 21):
        check(errors, 1e-4)


def test_the_choice_follows_backend_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    low, wide = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float64)
    assert around.uses_kernels(low, "triton") and not around.uses_kernels(wide, "triton")
    assert not any(around.uses_kernels(low, backend) for backend in ("auto", "torch", "naive"))
    monkeypatch.setattr(around, "kernels_missing", lambda: "no triton")
    assert not around.uses_kernels(low, "triton")
