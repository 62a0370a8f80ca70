"""The Triton pass for the threshold's gradient against the torch one, in fp32."""

import pytest
import torch

from megatron_dla.kernels.dla.threshold import threshold_gradient
from megatron_dla.kernels.dla.triton_threshold import threshold_gradient as triton_gradient
from tests.support import triton_interpreter
from tests.support.dense_threshold import random_problem
from tests.support.dla_cases import CASES, Case, assert_same

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = [
    Case("merges", T=70, B=1, H=1, capacity=4, topic=4),
    Case("packed rows", T=36, H=1, documents=(9, 33, 36, 64, 65), capacity=3, tau=1.0),
    Case("packed in blocks of 32", T=70, B=1, H=1, documents=(32, 64), capacity=3, topic=5),
    Case("two slots, two heads", T=40, B=1, capacity=2),
    Case("no boundary", T=40, B=1, H=1, tau=2.5),
    Case("every token", T=40, B=1, H=1, tau=0.0),
    Case("one token", T=1, B=1),
    Case("full blocks", T=64, B=1, H=1, capacity=8, topic=3, tau=1.0),
    Case("capacity 30", T=66, B=1, H=1, capacity=30, tau=0.3, topic=3),
]


def arguments(case: Case) -> tuple:
    args = random_problem(case, torch.float32)
    return tuple(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args)


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_equals_torch(case: Case) -> None:
    args = arguments(case)
    got = triton_gradient(*args)
    assert got.dtype == torch.float32
    assert_same(got, threshold_gradient(*args), "dtau", 1e-5)


def test_block_size_and_order_of_programs_do_not_matter() -> None:
    args = arguments(SMALL[1])
    want = triton_gradient(*args)
    assert_same(triton_gradient(*args, block=16), want, "blocks of 16", 1e-5)
    with triton_interpreter.reversed_programs():
        assert torch.equal(triton_gradient(*args), want)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: real sizes are too slow in the interpreter")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_all_cases_on_the_device(case: Case) -> None:
    args = arguments(case)
    want = threshold_gradient(*args)
    got = triton_gradient(*args)
    assert_same(got, want, "dtau", 1e-5)
    assert torch.equal(got, triton_gradient(*args))
