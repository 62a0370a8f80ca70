"""The pure-torch pieces of the mixer against other people's operators."""

import pytest
import torch
import torch.nn.functional as F

from megatron_dla.mixers import functional


def test_short_convolution_is_a_causal_depthwise_conv1d() -> None:
    x, weight = torch.randn(2, 19, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    want = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], groups=6)).mT
    torch.testing.assert_close(functional.short_convolution(x, weight), want)
    short = functional.short_convolution(x[:, :2], weight)  # shorter than the kernel
    torch.testing.assert_close(short, want[:, :2])
    bias = torch.randn(6, dtype=torch.float64)
    want = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=6)).mT
    torch.testing.assert_close(functional.short_convolution(x, weight, bias=bias), want)
    last = functional.short_convolution(x[:, -1:], weight, tail=x[:, -4:-1], bias=bias)
    torch.testing.assert_close(last, want[:, -1:])


def test_short_convolution_does_not_look_across_documents() -> None:
    x, weight = torch.randn(1, 12, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    document = torch.tensor([[1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3]])
    got = functional.short_convolution(x, weight, document)
    parts = [functional.short_convolution(x[:, a:b], weight) for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(got, torch.cat(parts, 1))


def test_short_convolution_continues_from_its_tail() -> None:
    x, weight = torch.randn(2, 12, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    whole = functional.short_convolution(x, weight)
    second = functional.short_convolution(x[:, 7:], weight, tail=x[:, 4:7])
    torch.testing.assert_close(second, whole[:, 7:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
def test_norm_over_groups_of_heads_is_mamba2s(groups: int, dtype: torch.dtype) -> None:
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    out, gate, weight = (torch.randn(*shape).to(dtype) for shape in ((2, 5, 4, 6), (2, 5, 4, 6), (24,)))
    norm = MambaRMSNormGated(24, 24 // groups, eps=1e-5)
    norm.weight.data = weight
    got = functional.gated_group_norm(out, gate, weight, 1e-5, groups=groups, gate_first=True)
    assert got.dtype == dtype
    torch.testing.assert_close(got.flatten(2), norm(out.flatten(2), gate.flatten(2)))
    after = functional.gated_group_norm(out, gate, weight, 1e-5, groups=groups, gate_first=False)
    open_gate = torch.full_like(gate, 1e4)  # silu(1e4) scales all channels alike: the norm before it is undone
    want = functional.gated_group_norm(out, open_gate, weight, 1e-12, groups=groups, gate_first=True) * F.silu(gate)
    torch.testing.assert_close(after, want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


def test_clamped_tau_stays_in_range_and_keeps_its_gradient() -> None:
    tau = torch.tensor([0.1, 1.0, 1.9], requires_grad=True)
    clamped = functional.clamp_tau(tau)
    low, high = functional.TAU_RANGE
    torch.testing.assert_close(clamped, torch.tensor([low, 1.0, high]))
    clamped.sum().backward()
    assert tau.grad.tolist() == [1.0, 1.0, 1.0]


def test_mamba2_and_gdn_inputs_follow_their_definitions() -> None:
    step, A_log, bias = torch.randn(1, 5, 2), torch.randn(2), torch.randn(2)
    value = torch.randn(1, 5, 2, 3)
    write, g = functional.mamba2_inputs(value, step, A_log, bias)
    dt = torch.log1p(torch.exp(step + bias))
    torch.testing.assert_close(write, value * dt[..., None])
    torch.testing.assert_close(g, -torch.exp(A_log) * dt)
    q, k, g2, beta = functional.gdn_inputs(torch.randn(1, 5, 1, 4), torch.randn(1, 5, 1, 4), step, step, A_log, bias)
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(1, 5, 1))
    torch.testing.assert_close(q.norm(dim=-1), torch.full((1, 5, 1), 0.5))  # Dk^-1/2
    torch.testing.assert_close(g2, g)
    assert ((beta > 0) & (beta < 1)).all()
