"""The gates pass the torch path, and stop errors of the size that a wrong kernel makes."""

import pytest
import torch

from megatron_dla.kernels.dla import debug, dla_attention, partition
from megatron_dla.kernels.dla.naive import naive_attention
from tests.support.dla_cases import Case

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def problem(dtype: torch.dtype, delta: bool) -> tuple[dict, torch.Tensor, dict]:
    case = Case("gates", T=90, delta=delta, seed=3, Dk=16, Dv=16, documents=(37, 90, 120))
    x = {name: t.detach().to(dtype) for name, t in case.make().items()}
    decided = partition(x["k"], x["v"], x["g"], x.get("beta"), **case.rule)
    cotangent = torch.randn(x["v"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x, cotangent, {**case.rule, "partition": decided, "chunk_size": 32}


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_passes(dtype: torch.dtype, delta: bool) -> None:
    x, cotangent, rule = problem(dtype, delta)
    debug.check_all(x, cotangent, dtype=dtype, backend="torch", **rule)


@pytest.mark.parametrize("delta", [False, True])
def test_rounding_the_operands_is_a_bfloat16_error(delta: bool) -> None:
    x, cotangent, rule = problem(torch.bfloat16, delta)
    want = debug.oracle(x, cotangent, **rule)
    rounded = debug.same_dtype_torch(x, cotangent, dtype=torch.bfloat16, **rule)
    inside = debug.run(x, cotangent, backend="torch", **rule)
    for name in want:
        errors = debug.relative_rms(inside[name], want[name]), debug.relative_rms(rounded[name], want[name])
        assert errors[0] < errors[1] < 2 * debug.LIMITS[name], (name, errors)


def test_cache_states_and_learned_tau_have_gates_too() -> None:
    case = Case("cache", T=60, Dk=16, Dv=16, capacity=3)
    x = {name: t.detach().float() for name, t in case.make().items()}
    rule = {"tau": case.tau, "capacity": case.capacity}
    _, cache = dla_attention(**x, **rule, return_cache=True)
    cotangent = torch.randn(x["v"].shape)
    args = x["k"], x["v"], x["g"]
    continued = {**rule, "cache": cache, "states_cotangent": torch.randn(cache.states.shape)}
    continued["partition"] = partition(*args, **rule, cache=cache)
    assert {"states", "dstates"} < set(debug.run(x, cotangent, backend="torch", **continued))
    debug.check_all(x, cotangent, dtype=torch.float32, backend="torch", **continued)
    learned = {**rule, "tau": torch.full((case.H,), case.tau, requires_grad=True)}
    learned["partition"] = partition(*args, **learned)
    assert "dtau" in debug.run(x, cotangent, backend="torch", **learned)
    debug.check_all(x, cotangent, dtype=torch.float32, backend="torch", **learned)


def test_the_oracle_is_the_recurrence() -> None:
    x, cotangent, rule = problem(torch.bfloat16, True)
    want = debug.oracle(x, cotangent, **rule)["o"]
    plain = {name: rule[name] for name in ("tau", "capacity", "cu_seqlens", "partition")}
    assert debug.relative_rms(want, naive_attention(**x, **plain)[0]) < 1e-10


def test_wrong_results_fail() -> None:
    x, cotangent, rule = problem(torch.bfloat16, False)
    want = debug.oracle(x, cotangent, **rule)
    torch_path = debug.same_dtype_torch(x, cotangent, dtype=torch.bfloat16, **rule)
    good = want["o"].bfloat16()

    def check(got: torch.Tensor, name: str = "o", dtype: torch.dtype = torch.bfloat16) -> None:
        debug.check(name, got, want[name], torch_path[name], dtype=dtype, backward=name != "o")

    check(good)
    nan, noisy, missing = good.clone(), good.clone().float(), good.clone()
    nan[0, 3, 1, 2] = float("nan")
    with pytest.raises(AssertionError, match=r"1 of \d+ values are NaN"):
        check(nan)
    noisy += 0.01 * noisy.square().mean().sqrt() * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match="relative RMS error"):
        check(noisy)
    missing[0, 40:42] = 0  # two tokens of 180
    with pytest.raises(AssertionError, match="relative RMS error"):
        check(missing)
    with pytest.raises(AssertionError, match="limit 1e-05"):
        check(good, dtype=torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        check(good[:, 1:])
    zero = torch.zeros(4, dtype=torch.float64)
    debug.check("dg", zero.float() + 1e-9, zero, zero.float(), dtype=torch.float32, backward=True)
    with pytest.raises(AssertionError):
        debug.check("dg", zero.float() + 1e-4, zero, dtype=torch.float32, backward=True)


def test_errors_of_a_few_ulp_are_not_compared() -> None:
    want = torch.ones(4, dtype=torch.float64)
    debug.check("dq", want.float() + 3e-7, want, want.float() + 1e-9, dtype=torch.float32, backward=True)
    with pytest.raises(AssertionError, match="allowed"):
        debug.check("dq", want.float() + 3e-6, want, want.float() + 1e-9, dtype=torch.float32, backward=True)
