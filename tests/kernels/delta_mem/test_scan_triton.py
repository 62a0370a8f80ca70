"""The Triton kernels under the interpreter (on a GPU: compiled): results, every gradient, one-token steps.

Chunks are a few tokens long, so that short sequences have several; ranks above 8 put all rows in one program where the
interpreter would otherwise spend minutes, and `test_row_blocks` splits them.
"""

from functools import partial

import pytest
import torch

from megatron_dla.kernels.delta_mem import delta_mem_scan
from tests.support import triton_interpreter
from tests.support.memory_cases import MUTATIONS, Case, assert_gates, recurrence, run

pytest.importorskip("triton")
from megatron_dla.kernels.delta_mem import triton_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16 = torch.float32, torch.bfloat16


def on_device(x: dict) -> dict:
    return {name: y.to(DEVICE) for name, y in x.items()}


def compare(case: Case, dtype: torch.dtype, chunk_size: int | None) -> dict[str, torch.Tensor]:
    x, cotangents = on_device(case.make(dtype)), tuple(y.to(DEVICE) for y in case.cotangents())
    got = run(x, cotangents, backend="triton", chunk_size=chunk_size)  # type: ignore[arg-type]
    assert_gates(got, x, cotangents, recurrence)  # type: ignore[arg-type]
    return got


@pytest.fixture
def wide_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of a state in one program, where nothing is compiled."""
    if DEVICE == "cpu":
        for rank, (chunk, (_, a), (_, b), c) in triton_scan.LAUNCH.items():
            monkeypatch.setitem(triton_scan.LAUNCH, rank, (chunk, (rank, a), (rank, b), c))


FULL = [
    (Case(B=2, T=11, form="lambda_outside"), 4),
    (Case(T=7, N=4, flagged=False), 3),
    (Case(T=5, form="uncoupled"), 100),  # one chunk
    (Case(T=3), 1),
    (Case(T=7, r=5, form="no_lambda"), 2),
    (Case(T=7, r=16), 3),
    (Case(T=5, r=32, form="lambda_outside"), 2),
    (Case(T=5, r=64), 2),
]


@pytest.mark.parametrize(("case", "chunk_size"), FULL, ids=str)
def test_all_gradients_fp32(wide_programs: None, case: Case, chunk_size: int) -> None:
    compare(case, FP32, chunk_size)


@pytest.mark.parametrize(("case", "chunk_size"), [(Case(T=9, N=2, form="lambda_outside"), 4)], ids=str)
def test_all_gradients_bf16(case: Case, chunk_size: int) -> None:
    compare(case, BF16, chunk_size)


def test_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows over several programs, another number for maps than for states, ranks that fill no block."""
    chunk, (_, a), (_, b), c = triton_scan.LAUNCH[16]
    monkeypatch.setitem(triton_scan.LAUNCH, 16, (chunk, (4, a), (8, b), c))
    compare(Case(T=4, r=11), FP32, 2)


def test_backward_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same bits where the states of only two chunks are in memory at once."""
    case = Case(B=2, T=7)
    whole = compare(case, FP32, 3)
    monkeypatch.setattr(triton_scan, "HISTORY_LIMIT", 2 * 4 * 3 * 64 + 1)
    for name, value in compare(case, FP32, 3).items():
        assert torch.equal(value, whole[name]), name


def test_the_shipped_chunks(wide_programs: None) -> None:
    case = Case(T=70)
    plan = triton_scan.make_plan(1, case.T, 1, case.r, None)
    assert plan.chunks == 2
    compare(case, FP32, None)


def test_chunks_grow_before_maps_fill_the_memory() -> None:
    plan = triton_scan.make_plan(4, 8192, 8, 64, None)
    assert plan.chunk > triton_scan.LAUNCH[64][0]
    assert 4 * plan.lanes * plan.chunks * 64**3 <= triton_scan.MAPS_LIMIT


def test_same_bits_in_every_run_and_order() -> None:
    case = Case(T=6, N=2)
    x, cotangents = on_device(case.make(FP32)), tuple(y.to(DEVICE) for y in case.cotangents())
    first = run(x, cotangents, backend="triton", chunk_size=2)  # type: ignore[arg-type]
    with triton_interpreter.reversed_programs():
        second = run(x, cotangents, backend="triton", chunk_size=2)  # type: ignore[arg-type]
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_broken_kernel_is_found() -> None:
    case = Case(T=9, form="uncoupled")
    got = compare(case, FP32, 4)
    for mutation in MUTATIONS:
        with pytest.raises(AssertionError, match="failed"):
            x, cotangents = on_device(case.make(FP32)), tuple(y.to(DEVICE) for y in case.cotangents())
            assert_gates(got, x, cotangents, partial(recurrence, mutation=mutation))  # type: ignore[arg-type]


@pytest.mark.parametrize("mutate", ["forget_the_start", "forget_the_end"])
def test_a_broken_scan_over_chunks_is_found(monkeypatch: pytest.MonkeyPatch, mutate: str) -> None:
    """States, or their gradients, that do not cross from one chunk into the next."""
    if mutate == "forget_the_start":
        real = triton_scan._Problem.maps
        monkeypatch.setattr(triton_scan._Problem, "maps", lambda self: (0 * (m := real(self))[0], m[1]))
    else:
        ends = triton_scan._ends

        def cut(*args):
            found = ends(*args)
            found[:, :-1] = 0
            return found

        monkeypatch.setattr(triton_scan, "_ends", cut)
    with pytest.raises(AssertionError, match="failed"):
        compare(Case(T=7, flagged=False, edges=False), FP32, 3)


@pytest.mark.parametrize("case", [Case(B=3, T=5, N=2, form="lambda_outside"), Case(B=2, T=3, r=24)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_one_token_a_call_follows_the_scan(case: Case, dtype: torch.dtype) -> None:
    x = on_device(case.make(dtype))
    state = x.pop("initial_state").float()
    want, last = delta_mem_scan(**x, initial_state=state, backend="torch")
    for t in range(case.T):
        one = {name: y[:, t : t + 1] for name, y in x.items()}
        before = state
        read, state = delta_mem_scan(**one, initial_state=before, backend="triton")
        kept = ~(one["write_mask"] | one["reset"])[:, 0]
        assert read.dtype == FP32 and torch.equal(before[kept], state[kept])
        torch.testing.assert_close(read[:, 0], want[:, t], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("rank", "dtype", "message"), [(65, FP32, "at most 64"), (8, torch.float64, "float64")])
def test_what_the_kernels_cannot_take(rank: int, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=f"backend='triton'.*{message}"):
        delta_mem_scan(**on_device(Case(T=2, r=rank).make(dtype)), backend="triton")
