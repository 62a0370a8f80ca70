"""The plain mixers (pattern letters G and M) equal token recurrences in float64: outputs and every gradient."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dla.config import ParallelSection
from megatron_dla.mixers.plain import GDNMixer, Mamba2Mixer, PlainMixer
from megatron_dla.model.gpt import build_model, packed_sequence, slot_mixers
from megatron_dla.parallel.groups import initialize_distributed
from tests.support.workers import BASE_SECTION, lay_out, perturb

PUBLISHED = {"conv_bias": True, "gated_norm": "group"}
SECTIONS = {
    "gdn": dataclasses.replace(BASE_SECTION, pattern="G"),
    "published gdn": dataclasses.replace(BASE_SECTION, pattern="G", num_groups=4, **PUBLISHED),
    "mamba2": dataclasses.replace(BASE_SECTION, pattern="M", backbone="gdn"),
    "published mamba2": dataclasses.replace(BASE_SECTION, pattern="M", num_groups=1, **PUBLISHED),
}
MIXERS = {"G": GDNMixer, "M": Mamba2Mixer}
ROWS, TOKENS = 2, 40
ENDS = [0, 13, 14, 40, 55, 80]


def mixer_of(section) -> PlainMixer:
    initialize_distributed("cpu")
    lay_out(1)
    net = build_model(section, ParallelSection(), vocab_size=90, seq_len=TOKENS, seed=2, dtype=torch.float64)
    perturb(net, section)
    assert slot_mixers(net) == []  # no boundaries to count
    mixer = net.decoder.layers[0].self_attention
    assert isinstance(mixer, MIXERS[section.pattern])
    return mixer


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[T, C] of one document."""
    padded = F.pad(x.T, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded[None], weight[:, None], bias, groups=len(weight))[0].T)


def states_of(mixer: PlainMixer, part: dict[str, Tensor], value: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """What each head reads, [T, H, Dv], from the published equations (arXiv 2412.06464 and 2405.21060)."""
    T, heads, _ = value.shape
    delta, outs = isinstance(mixer, GDNMixer), []
    if delta:
        query, key = (y / y.norm(dim=-1, keepdim=True) for y in (query, key))
    dt = F.softplus(part["step"] + mixer.dt_bias)
    decay = torch.exp(-mixer.A_log.exp() * dt)
    for h in range(heads):
        group, state = h * key.shape[1] // heads, value.new_zeros(key.shape[2], value.shape[2])
        for t in range(T):
            k, v, state = key[t, group], value[t, h], decay[t, h] * state
            if delta:
                state = state + part["strength"][t, h].sigmoid() * torch.outer(k, v - k @ state)
                outs.append(query[t, group] @ state * len(k) ** -0.5)
            else:
                state = state + dt[t, h] * torch.outer(k, v)
                outs.append(query[t, group] @ state + mixer.D[h] * v)
    return torch.stack(outs).unflatten(0, (heads, T)).transpose(0, 1)


def token_loop(mixer: PlainMixer, x: Tensor) -> Tensor:
    """One document [T, hidden] -> same, a state at a time."""
    m, heads, groups = mixer.model, mixer.model.num_heads, mixer.model.num_groups
    sizes = dict(mixer.sections)
    part = dict(zip(sizes, (x @ mixer.in_proj.weight.T).split(list(sizes.values()), -1), strict=True))
    delta = isinstance(mixer, GDNMixer)
    assert list(sizes) == ["gate", "value", "query", "key", "step", "strength"][: 6 if delta else 5]
    conv = {
        name: convolved(part[name], getattr(mixer, f"conv_{name}"), getattr(mixer, f"conv_{name}_bias", None))
        for name in ("query", "key", "value")
    }
    value = conv["value"].unflatten(-1, (heads, -1))
    query, key = (conv[name].unflatten(-1, (groups, -1)) for name in ("query", "key"))
    out = states_of(mixer, part, value, query, key)
    gate = F.silu(part["gate"])
    if not delta:  # Mamba-2 gates before its norm
        out = out * gate.unflatten(-1, (heads, -1))
    if m.gated_norm == "group":
        grouped = out.flatten(1).unflatten(-1, (groups, -1))
        normed = (grouped / (grouped.square().mean(-1, keepdim=True) + m.norm_eps).sqrt()).flatten(1) * mixer.norm
    else:
        normed = (out / (out.square().mean(-1, keepdim=True) + m.norm_eps).sqrt() * mixer.norm).flatten(1)
    return (normed * gate if delta else normed) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("documents", [False, True], ids=["whole rows", "documents"])
@pytest.mark.parametrize("name", SECTIONS)
def test_it_is_the_token_recurrence(name: str, documents: bool) -> None:
    mixer = mixer_of(SECTIONS[name])
    x = torch.randn(TOKENS, ROWS, 32, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(TOKENS, ROWS, 32, dtype=torch.float64)
    wanted = {"x": x, **dict(mixer.named_parameters())}
    ends = ENDS if documents else [0, TOKENS, 2 * TOKENS]
    packed = packed_sequence(torch.tensor(ENDS, dtype=torch.int32), TOKENS) if documents else None
    out, _ = mixer(x, None, packed_seq_params=packed)
    got = torch.autograd.grad(out, list(wanted.values()), cotangent)
    flat = x.transpose(0, 1).flatten(0, 1)
    loop = torch.cat([token_loop(mixer, flat[a:b]) for a, b in zip(ends, ends[1:], strict=False)])
    loop = loop.unflatten(0, (ROWS, TOKENS)).transpose(0, 1)
    torch.testing.assert_close(out, loop, rtol=1e-9, atol=1e-9)
    want = torch.autograd.grad(loop, list(wanted.values()), cotangent)
    for key, a, b in zip(wanted, got, want, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max()), msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", ["gdn", "mamba2"])
def test_slots_backbone_and_tau_do_not_matter(name: str) -> None:
    x = torch.randn(TOKENS, ROWS, 32, dtype=torch.float64)
    other = "mamba2" if SECTIONS[name].backbone == "gdn" else "gdn"
    change = {"backbone": other, "capacity": 9, "tau": 0.0, "tau_mode": "learned", "merge": "ward"}
    one, other = (mixer_of(dataclasses.replace(SECTIONS[name], **c)) for c in ({}, change))
    assert set(dict(one.named_parameters())).isdisjoint({"slot_scale", "slot_bias", "tau"})
    assert torch.equal(one(x)[0], other(x)[0])
