"""The recurrence and the torch path in float64: results, every gradient, and what a scan must not depend on."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_dla.kernels.delta_mem import delta_mem_scan
from megatron_dla.kernels.delta_mem.chunk import chunk_plan
from megatron_dla.kernels.dla import debug
from tests.support.memory_cases import FORMS, MUTATIONS, Case, assert_exact, assert_gates, recurrence, run

ROOT = Path(__file__).resolve().parents[3]
BASE = Case(B=2, N=2)
TOKENS = ("q", "k", "v", "beta", "keep", "erase")


def test_two_tokens_by_hand() -> None:
    def token(*rows: tuple[float, float]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.float64).view(1, 2, 1, 2)

    reads, state = delta_mem_scan(
        token((5, 5), (1, 1)), token((1, 0), (0.6, 0.8)), token((2, 3), (1, 1)), token((0.5, 0.25), (0.5, 0.5)),
        backend="naive",
    )  # fmt: skip
    torch.testing.assert_close(reads, token((0, 0), (1, 0.75)))
    want = torch.tensor([[0.62, 0.16], [0.54, 0.22]], dtype=torch.float64)
    torch.testing.assert_close(state.view(2, 2), want)


@pytest.mark.parametrize("form", FORMS)
def test_naive_is_the_definition(form: str) -> None:
    case = replace(BASE, form=form, T=9)
    want, got = (run(case.make(), case.cotangents(), **how) for how in ({"scan": recurrence}, {"backend": "naive"}))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-14, rtol=1e-12)


SHAPES = [
    BASE,
    replace(BASE, B=1, N=1, T=1),
    replace(BASE, B=1, N=4, T=50),
    replace(BASE, r=5),
    replace(BASE, B=1, r=16),
    replace(BASE, B=1, N=1, r=32, T=20),
    replace(BASE, B=1, N=1, r=64, T=20),
    replace(BASE, flagged=False, edges=False),
    *(replace(BASE, form=form) for form in FORMS[1:]),
]


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 100])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_torch_is_exact(case: Case, chunk_size: int | None) -> None:
    assert_exact(case.make(), case.cotangents(), backend="torch", chunk_size=chunk_size)


def test_both_orders_of_chunks_are_tested() -> None:
    plans = [chunk_plan(case.T, case.B * case.N, case.r, 7) for case in SHAPES]
    assert {side_by_side for _, side_by_side in plans} == {True, False}


def test_gates_of_zero_and_one_alone() -> None:
    """keep is exactly 0 where beta is 1: only the last write is left, and nothing turns into NaN."""
    case = replace(BASE, flagged=False)
    x = case.make()
    x["beta"] = (x["beta"] > 0.2).double()
    assert_exact(x, case.cotangents(), backend="torch")
    x["beta"] = torch.ones_like(x["beta"])
    assert_exact(x, case.cotangents(), backend="torch")
    _, state = delta_mem_scan(**x, backend="torch")
    assert bool((torch.linalg.matrix_rank(state, rtol=1e-9) == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(dtype: torch.dtype) -> None:
    """fp32 inside whatever comes in: reads and states keep fp32's accuracy on the rounded inputs."""
    x = replace(BASE, T=100).make(dtype)
    got = run(x, replace(BASE, T=100).cotangents(), backend="torch")
    assert got["reads"].dtype == got["state"].dtype == torch.float32
    assert_gates(got, x, replace(BASE, T=100).cotangents(), recurrence)


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_autocast_leaves_the_memory_alone(backend: str) -> None:
    case = replace(BASE, flagged=False)
    x = case.make(torch.float32)
    want = run(x, case.cotangents(), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(x, case.cotangents(), backend=backend)
    assert got["reads"].dtype == torch.float32
    if backend == "torch":  # autograd's own backward of the recurrence follows the user's autocast
        assert all(torch.equal(value, got[name]) for name, value in want.items())
    assert torch.equal(want["reads"], got["reads"]) and torch.equal(want["state"], got["state"])


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_recurrence_is_found(mutation: str) -> None:
    case = replace(BASE, form="uncoupled")
    x = case.make(torch.float32)
    got = run(x, case.cotangents(), backend="torch")
    assert_gates(got, x, case.cotangents(), recurrence)
    with pytest.raises(AssertionError, match="failed"):
        assert_gates(got, x, case.cotangents(), partial(recurrence, mutation=mutation))


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_split_calls_equal_one(backend: str) -> None:
    x = BASE.make()
    state, parts = x.pop("initial_state"), []
    want, last = delta_mem_scan(**x, initial_state=state, backend=backend)
    for span in (slice(0, 1), slice(1, 20), slice(20, None)):
        reads, state = delta_mem_scan(**{n: y[:, span] for n, y in x.items()}, initial_state=state, backend=backend)
        parts.append(reads)
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(state, last, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_one_token_a_call_equals_the_scan(form: str) -> None:
    x = replace(BASE, form=form).make()
    state = x.pop("initial_state")
    want, last = delta_mem_scan(**x, initial_state=state)
    for t in range(BASE.T):
        read, state = delta_mem_scan(**{n: y[:, t : t + 1] for n, y in x.items()}, initial_state=state)
        torch.testing.assert_close(read[:, 0], want[:, t], atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(state, last, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_padding_changes_nothing(backend: str) -> None:
    """Garbage on both sides that does not write: same reads inside, same state, no gradient to the garbage."""
    case = replace(BASE, flagged=False)
    x = case.make()
    want, last = delta_mem_scan(**x, backend=backend)
    state = x.pop("initial_state")
    mask = torch.zeros(case.B, case.T + 9, dtype=torch.bool)
    mask[:, 4:-5] = True
    wide = {n: torch.nn.functional.pad(y, (0, 0, 0, 0, 4, 5), value=3.0).requires_grad_() for n, y in x.items()}
    reads, final = delta_mem_scan(**wide, initial_state=state, write_mask=mask, backend=backend)
    torch.testing.assert_close(reads[:, 4:-5], want, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(final, last, atol=1e-13, rtol=1e-12)
    grads = torch.autograd.grad(final.sum() + reads[mask].sum(), list(wide.values()), allow_unused=True)
    assert all(not grad[~mask].any() for grad in grads)


def test_documents_do_not_see_each_other() -> None:
    """The same bits in the second document, whatever the first one holds."""
    case = replace(BASE, flagged=False, T=40)
    x, other = case.make(torch.float32), replace(case, seed=5).make(torch.float32)
    reset = torch.zeros(case.B, case.T, dtype=torch.bool)
    reset[:, 17] = True
    mixed = {n: torch.cat([other[n][:, :17], y[:, 17:]], 1) for n, y in x.items() if n in TOKENS}
    first, second = (delta_mem_scan(**y, reset=reset, backend="torch") for y in (x, mixed))
    assert torch.equal(first[0][:, 17:], second[0][:, 17:]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0][:, :17], second[0][:, :17])


def test_the_initial_state_is_left_alone() -> None:
    x = BASE.make()
    before = x["initial_state"].clone()
    _, state = delta_mem_scan(**x, backend="torch")
    assert torch.equal(before, x["initial_state"]) and not torch.equal(state, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(beta=torch.rand(2, 37, 2, 1)), r"beta must be \[B, T, N, r\]"),
        (dict(keep=torch.rand(2, 36, 2, 8)), r"keep must be \[B, T, N, r\]"),
        (dict(initial_state=torch.zeros(2, 8, 8)), r"initial_state must be \[B, N, r, r\] = \[2, 2, 8, 8\]"),
        (dict(reset=torch.zeros(2, 37)), r"reset must be bool \[B, T\]"),
        (dict(write_mask=torch.zeros(37, dtype=torch.bool)), r"write_mask must be bool \[B, T\]"),
        (dict(backend="cuda"), "backend must be one of auto, naive, torch, triton, got"),
        (dict(chunk_size=0), "chunk_size must be at least 1"),
        (dict(backend="triton"), "backend='triton' cannot be used here: dtype torch.float64"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta_mem_scan(**(BASE.make() | change))


def test_triton_is_not_imported_for_a_cpu() -> None:
    code = (
        "import sys, torch; from megatron_dla.kernels.delta_mem import delta_mem_scan as scan\n"
        "x = torch.rand(1, 20, 1, 8, requires_grad=True); scan(x, x, x, x)[0].sum().backward()\n"
        "assert x.grad is not None and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})


def test_relative_errors_mean_something() -> None:
    """Guards the comparisons above: nothing in the inputs makes results vanish or blow up."""
    got = run(BASE.make(), BASE.cotangents(), backend="naive")
    assert all(0.01 < debug.relative_rms(value, torch.zeros_like(value)) < 100 for value in got.values())
