"""The DLA mixer through Megatron's TransformerLayer and GPTModel, in one process."""

import dataclasses

import pytest
import torch

from megatron_dla.config import ParallelSection
from megatron_dla.mixers.functional import slot_weights
from megatron_dla.model.gpt import build_model, packed_sequence, slot_mixers
from megatron_dla.parallel.groups import initialize_distributed
from tests.support.workers import BASE_SECTION, lay_out, perturb

SECTIONS = {
    "mamba2": BASE_SECTION,
    "gdn": dataclasses.replace(BASE_SECTION, backbone="gdn"),
    "hybrid": dataclasses.replace(BASE_SECTION, pattern="DA"),
    "windows": dataclasses.replace(BASE_SECTION, pattern="DW"),
    "log-linear": dataclasses.replace(BASE_SECTION, pattern="L"),
    "log-linear gdn": dataclasses.replace(BASE_SECTION, pattern="L", backbone="gdn"),
    "plain": dataclasses.replace(BASE_SECTION, pattern="GM"),
}


def model(section, **change):
    initialize_distributed("cpu")
    lay_out(1)
    section = dataclasses.replace(section, **change)
    built = build_model(section, ParallelSection(), vocab_size=90, seq_len=40, seed=2, dtype=torch.float64)
    return built.eval()


@pytest.mark.parametrize("name", SECTIONS)
def test_a_document_does_not_change_the_next_one(name: str) -> None:
    net = model(SECTIONS[name])
    perturb(net, SECTIONS[name])
    ids = torch.randint(0, 90, (2, 40))
    ends = torch.tensor([0, 13, 21, 40, 55, 80], dtype=torch.int32)
    logits = net(ids, None, None, packed_seq_params=packed_sequence(ends, 40))
    ids[0, 12] = (ids[0, 12] + 1) % 90  # the last token of the first document
    after = net(ids, None, None, packed_seq_params=packed_sequence(ends, 40))
    assert not torch.equal(logits[0, 12], after[0, 12])
    assert torch.equal(logits[0, 13:], after[0, 13:]) and torch.equal(logits[1], after[1])
    alone = net(ids[:1, 13:21], None, None)
    softmax = name in ("hybrid", "windows")
    limit = 1e-6 if softmax else 1e-9  # Megatron's rotary angles are fp32, and here they are shifted
    torch.testing.assert_close(after[:1, 13:21], alone, rtol=limit, atol=limit)


@pytest.mark.parametrize("name", SECTIONS)
def test_the_future_does_not_leak(name: str) -> None:
    net = model(SECTIONS[name])
    perturb(net, SECTIONS[name])
    ids = torch.randint(0, 90, (1, 40))
    before = net(ids, None, None)
    ids[0, 25:] = (ids[0, 25:] + 1) % 90
    after = net(ids, None, None)
    torch.testing.assert_close(before[:, :25], after[:, :25], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, 25:], after[:, 25:])


@pytest.mark.parametrize("name", ["mamba2", "gdn"])
def test_it_starts_as_its_backbone(name: str) -> None:
    """Slot weights start at 1, where the slots do not matter: any threshold gives the same model."""
    ids = torch.randint(0, 90, (1, 40))
    logits = [model(SECTIONS[name], tau=tau)(ids, None, None) for tau in (0.0, 1.2, 3.0)]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-9, atol=1e-9)
    mixer = slot_mixers(model(SECTIONS[name]))[0]
    weights = slot_weights(torch.zeros(1, 4, 3).double(), mixer.slot_scale, mixer.slot_bias)
    torch.testing.assert_close(weights, torch.ones_like(weights))
    log_linear = slot_mixers(model(SECTIONS[name], slot_weight_init="log_linear"))[0]
    assert (log_linear.slot_bias == 0).all() and log_linear.in_proj.weight[-12:].abs().max() > 0


@pytest.mark.parametrize("name", ["mamba2", "gdn"])
def test_soft_gates_only_in_training(name: str) -> None:
    """Warm gates change the training output and give tau its gradient; cold ones, and evaluation, are the hard form."""
    net = model(SECTIONS[name], tau_mode="learned", tau=1.2, capacity=64)  # nothing merges in 40 tokens
    perturb(net, SECTIONS[name])
    ids = torch.randint(0, 90, (2, 40))
    packed = packed_sequence(torch.tensor([0, 13, 40, 80], dtype=torch.int32), 40)

    def logits(temperature: float | None) -> torch.Tensor:
        for mixer in slot_mixers(net):
            mixer.gate_temperature = temperature
        return net(ids, None, None, packed_seq_params=packed)

    hard = logits(None)
    assert torch.equal(logits(0.3), hard)
    net.train()
    torch.testing.assert_close(logits(1e-9), hard, rtol=1e-9, atol=1e-9)
    warm = logits(0.3)
    assert (warm - hard).abs().max() > 1e-3
    warm.square().sum().backward()
    for mixer in slot_mixers(net):
        assert mixer.tau.grad.abs().min() > 0
    assert mixer.take_boundary_rate().shape == (4,)


def test_boundary_rate_counts_and_starts_again() -> None:
    net = model(SECTIONS["gdn"], tau=0.0)
    net(torch.randint(0, 90, (2, 40)), None, None)
    for mixer in slot_mixers(net):
        assert mixer.take_boundary_rate().tolist() == [1.0] * 4
        with pytest.raises(AssertionError):
            mixer.take_boundary_rate()


def test_decoding_inside_megatron_is_refused() -> None:
    net = model(SECTIONS["gdn"])
    with pytest.raises(ValueError, match="convert to-hf"):
        slot_mixers(net)[0](torch.zeros(4, 1, 32).double(), inference_context=object())
