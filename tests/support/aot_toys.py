"""Toy kernels with planted faults for test_aot.py.

`python -m tests.support.aot_toys ARCH` runs them, in a process without TRITON_INTERPRET.
"""

import dataclasses
import json
import sys

import torch
import triton
import triton.language as tl

from megatron_dla.kernels.aot import compile as aot


@triton.jit
def good(x, y, N: tl.constexpr):
    n = tl.arange(0, N)
    tile = n[:, None] * N + n[None, :]
    a = tl.load(x + tile)
    tl.store(y + tile, tl.dot(a, tl.trans(a)).to(y.dtype.element_ty))


@triton.jit
def spills(x, y, N: tl.constexpr):
    """A tile of 128 x 128 in one warp: 512 values a thread, all needed again after each sum."""
    n = tl.arange(0, N)
    tile = n[:, None] * N + n[None, :]
    a = tl.load(x + tile).to(tl.float32)
    total = tl.sum(a, 0)
    tl.store(y + tile, a + total[None, :])


@triton.jit
def too_much_shared(x, y, N: tl.constexpr):
    """Both operands of a product of 128 x 512 tiles are in shared memory at once."""
    m, n = tl.arange(0, 128), tl.arange(0, N)
    a = tl.load(x + m[:, None] * N + n[None, :])
    b = tl.load(x + 1 + n[:, None] * 128 + m[None, :])
    tl.store(y + m[:, None] * 128 + m[None, :], tl.dot(a, b).to(y.dtype.element_ty))


@triton.jit
def transposed(q, k, v, y, N: tl.constexpr):
    """The transpose of a matmul result is an operand of the next matmul."""
    n = tl.arange(0, N)
    tile = n[:, None] * N + n[None, :]
    s = tl.dot(tl.load(q + tile), tl.trans(tl.load(k + tile))).to(tl.bfloat16)
    tl.store(y + tile, tl.dot(tl.trans(s), tl.load(v + tile)))


@triton.jit
def computed_transposed(q, k, v, y, N: tl.constexpr):
    """The same result without that transpose."""
    n = tl.arange(0, N)
    tile = n[:, None] * N + n[None, :]
    s = tl.dot(tl.load(k + tile), tl.trans(tl.load(q + tile))).to(tl.bfloat16)
    tl.store(y + tile, tl.dot(s, tl.load(v + tile)))


@triton.jit
def does_not_compile(x, y, n):
    value = tl.load(x)
    for _ in range(n):
        value = value.to(tl.float32) + 1.0  # another type than before the loop
    tl.store(y, value)


def launch_all(name: str = "toys") -> None:
    low, wide = torch.zeros(128 * 513, dtype=torch.bfloat16), torch.empty(128 * 128)
    for _ in range(2):  # the second launch of a kernel is no second report
        good[(1,)](low, low, 64)
    good[(1,)](wide, wide, 64)
    spills[(1,)](low, wide, 128, num_warps=1)
    too_much_shared[(1,)](low, low, 512, num_warps=8)
    transposed[(1,)](low, low, low, wide, 64)
    computed_transposed[(1,)](low, low, low, wide, 64)
    does_not_compile[(1,)](low, wide, 3)
    assert float(wide.abs().sum()) == 0  # nothing ran, and `empty` is zero in a dry run


if __name__ == "__main__":
    with aot.dry_run(int(sys.argv[1])) as found:
        launch_all()
    print(aot.table(found))
    print(*aot.failures(found), sep="\n")
    print(json.dumps([dataclasses.asdict(r) | {"problems": r.problems} for r in found]))
