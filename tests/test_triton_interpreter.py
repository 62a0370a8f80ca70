"""The patched interpreter computes what a GPU computes, for the features that the kernels use."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

from tests.support import triton_interpreter  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not used beside a GPU")
ROOT = Path(__file__).resolve().parents[1]
BF16 = torch.bfloat16


@triton.jit
def _dot(a, b, out, N: tl.constexpr, PRECISION: tl.constexpr):
    n = tl.arange(0, N)
    tile = n[:, None] * N + n[None, :]
    product = tl.dot(tl.load(a + tile), tl.load(b + tile), input_precision=PRECISION)
    tl.store(out + tile, product.to(out.dtype.element_ty))


@triton.jit
def _arithmetic(a, b, out, N: tl.constexpr):
    n = tl.arange(0, N)
    x, y = tl.load(a + n), tl.load(b + n)
    half = tl.full((N,), 0.5, tl.bfloat16)
    tl.store(out + n, x + y)
    tl.store(out + N + n, x * y)
    tl.store(out + 2 * N + n, tl.where(x > y, x, y) - half)
    tl.store(out + 3 * N + n, tl.abs(x) * 2.0)
    tl.store(out + 4 * N + n, tl.exp(x.to(tl.float32)).to(tl.bfloat16))
    tl.store(out + 5 * N + n, tl.zeros((N,), tl.bfloat16) + tl.sum(x, 0).to(tl.bfloat16))


@triton.jit
def _copy(a, out, width, N: tl.constexpr, FILL: tl.constexpr):
    n = tl.arange(0, N)
    zero = tl.load(a, mask=width < 0, other=0)  # a scalar load
    if FILL:  # noqa: SIM108 (one branch per specialisation)
        x = tl.load(a + n, mask=n < width, other=7) + zero
    else:
        x = tl.load(a + n, mask=n < width)
    tl.store(out + n, x.to(out.dtype.element_ty), mask=n < N - 1)


@triton.jit
def _indexing(a, index, out, N: tl.constexpr):
    n = tl.arange(0, N)
    tile = n[:, None] * N + n[None, :]
    x = tl.load(a + tile)
    gathered = tl.gather(x, tl.load(index + tile), axis=1)
    tl.store(out + tile, gathered)
    tl.store(out + N * N + tile, tl.cumsum(x, axis=1))
    tl.store(out + 2 * N * N + tile, tl.cumsum(x, axis=0, reverse=True))
    tl.store(out + 3 * N * N + n, tl.argmin(x, axis=1).to(tl.float32))
    tl.store(out + 3 * N * N + N + n, tl.min(x, axis=1))


@triton.jit
def _loops(out, n, N: tl.constexpr):
    total = tl.zeros((), tl.int64)
    for i in range(n):
        total += i.to(tl.int64) * 2  # only a tensor has .to
    for i in tl.range(1, n, 2):
        total += i.to(tl.int64)
    for i in tl.static_range(N):
        total += i
    step = 0
    while step < n:  # bound known at run time only
        step += 3
        tl.debug_barrier()
    if step > n:
        total += 1000
    tl.store(out, total)
    tl.store(out + 1, step)


@triton.jit
def _order(out):
    tl.store(out, tl.program_id(0) * 10 + tl.program_id(1))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_dot_multiplies_in_fp32(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(16, 16)
    _dot[(1,)](a, b, out, 16, "ieee")
    torch.testing.assert_close(out, a.float() @ b.float(), atol=1e-5, rtol=1e-5)
    rounded = torch.empty(16, 16, dtype=BF16)
    _dot[(1,)](a, b, rounded, 16, "ieee")
    assert torch.equal(rounded, out.to(BF16))  # nearest even, as torch rounds


def test_dot_in_tf32_loses_what_tensor_cores_lose() -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    out = torch.empty(16, 16)
    _dot[(1,)](a, b, out, 16, "tf32")
    error = ((out - a @ b).square().mean() / (a @ b).square().mean()).sqrt()
    assert 1e-4 < error < 2e-3


def test_dot_refuses_a_short_inner_dimension() -> None:
    a = torch.zeros(8, 8, dtype=BF16)
    with pytest.raises(InterpreterError, match="K >= 16"):
        _dot[(1,)](a, a, torch.empty(8, 8), 8, "ieee")


def test_bfloat16_arithmetic_rounds_to_nearest_even() -> None:
    a, b = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
    out = torch.empty(6, 64, dtype=BF16)
    _arithmetic[(1,)](a, b, out, 64)
    want = [a + b, a * b, torch.maximum(a, b) - 0.5, a.abs() * 2, a.float().exp().to(BF16)]
    for got, expected in zip(out, want, strict=False):
        assert torch.equal(got, expected)
    assert torch.allclose(out[5].float(), a.float().sum(), rtol=1e-2)  # summed in fp32


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32, torch.int32, torch.int8, torch.bool], ids=str)
def test_masked_load_and_store(dtype: torch.dtype) -> None:
    a = torch.arange(8).to(dtype)
    out = torch.full((8,), -1.0)
    _copy[(1,)](a, out, 5, 8, True)
    fill = float(torch.tensor(7).to(dtype))
    assert out.tolist() == [*a[:5].float().tolist(), fill, fill, -1]  # the last lane is not stored


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.int32, torch.int64], ids=str)
def test_undefined_lanes_are_poisoned(dtype: torch.dtype) -> None:
    a = torch.arange(8).to(dtype)
    out = torch.zeros(8)
    _copy[(1,)](a, out, 5, 8, False)
    assert torch.equal(out[:5], a[:5].float())
    bad = out[5:7]
    assert bad.isnan().all() if dtype.is_floating_point else (bad > 2**29).all()
    triton_interpreter.install(poison=False)
    try:
        _copy[(1,)](a, out, 5, 8, False)
    finally:
        triton_interpreter.install(poison=True)
    assert (out[5:7] == 0).all()


def test_gather_cumsum_argmin() -> None:
    gen = torch.Generator().manual_seed(2)
    x = torch.randint(0, 4, (16, 16), generator=gen).float()  # many ties
    index = torch.randint(0, 16, (16, 16), generator=gen).int()
    out = torch.empty(3 * 256 + 32)
    _indexing[(1,)](x, index, out, 16)
    gathered, along, against = out[:768].view(3, 16, 16)
    assert torch.equal(gathered, x.gather(1, index.long()))
    assert torch.equal(along, x.cumsum(1))
    assert torch.equal(against, x.flip(0).cumsum(0).flip(0))
    first = torch.from_numpy(np.argmin(x.numpy(), axis=1)).float()  # numpy promises the first of equals
    assert torch.equal(out[768:784], first) and torch.equal(out[784:], x.min(1).values)


@pytest.mark.parametrize("n", [0, 5, 6])
def test_loops(n: int) -> None:
    out = torch.zeros(2, dtype=torch.int64)
    _loops[(1,)](out, n, 4)
    step = -(-n // 3) * 3
    total = 2 * sum(range(n)) + sum(range(1, n, 2)) + sum(range(4)) + 1000 * (step > n)
    assert out.tolist() == [total, step]


def test_programs_can_run_backwards() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    _order[(3, 2)](out)
    assert out.item() == 21
    with triton_interpreter.reversed_programs():
        _order[(3, 2)](out)
    assert out.item() == 0


def test_processes_without_kernels_do_not_import_triton() -> None:
    code = "import sys\nfrom tests.support import triton_interpreter as t; t.use_interpreter()\n"
    code += "assert 'triton' not in sys.modules\n"
    code += "import triton; assert hasattr(sys.modules[t.INTERPRETER], '_strict')"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT)})
