"""δ-mem as a gated delta rule: the mapping against that rule written out in float64, and fla itself where it is."""

import sys

import pytest
import torch
from torch import Tensor

from megatron_dla.kernels.delta_mem import delta_mem_scan
from megatron_dla.kernels.delta_mem.fla_mapping import LEAST_KEEP, fla_scan
from tests.support.memory_cases import FORMS, Case, assert_gates, recurrence, run


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor,
    output_final_state: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet's recurrence in fla's layout: decay, predict, write, read."""
    assert output_final_state
    heads = beta.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(heads, 2) for x in (q, k))
    ends = [0, beta.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outs, finals = [], []
    for s, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        state = initial_state if cu_seqlens is None else initial_state[s : s + 1]
        for t in range(begin, end):
            state = g[:, t, :, None, None].exp() * state
            error = v[:, t] - (state * k[:, t, :, :, None]).sum(2)
            state = state + (beta[:, t, :, None] * error)[:, :, None] * k[:, t, :, :, None]
            outs.append(scale * (state * q[:, t, :, :, None]).sum(2))
        finals.append(state)
    return torch.stack(outs, 1), torch.cat(finals)


def mapped(q, k, v, beta, keep=None, erase=None, initial_state=None, reset=None, write_mask=None):
    return fla_scan(q, k, v, beta, keep, erase, initial_state, reset, write_mask, gated_delta_rule)


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_mapping_is_exact(form: str, flagged: bool) -> None:
    case = Case(B=3, T=23, N=2, form=form, flagged=flagged, edges=False)
    x = case.make()
    if flagged:
        x["reset"][0, 0] = True
    want, got = (run(x, case.cotangents(), **how) for how in ({"backend": "naive"}, {"scan": mapped}))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-13, rtol=1e-11, msg=name)


def test_a_gate_of_one_keeps_no_more_than_the_clamp() -> None:
    case = Case(T=20, flagged=False)
    x = case.make()
    (want, _), (got, _) = delta_mem_scan(**x, backend="naive"), mapped(**x)
    assert 0 < (got - want).abs().max() < 4 * LEAST_KEEP * want.abs().max()


def test_fla_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(ValueError, match=r"backend='fla' needs flash-linear-attention.*pip install"):
        delta_mem_scan(**Case().make(torch.float32), backend="fla")


def test_fla_takes_no_float64() -> None:
    with pytest.raises(ValueError, match="backend='fla' computes in fp32"):
        delta_mem_scan(**Case().make(), backend="fla")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fla's kernels need a GPU")
@pytest.mark.parametrize("rank", [8, 32, 64])
def test_fla_itself(rank: int) -> None:
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    case = Case(B=2, T=150, N=2, r=rank, edges=False)
    x = {name: y.cuda() for name, y in case.make(torch.float32).items()}
    got = run(x, tuple(y.cuda() for y in case.cotangents()), backend="fla")  # type: ignore[arg-type]
    assert_gates(got, x, case.cotangents(), recurrence)
