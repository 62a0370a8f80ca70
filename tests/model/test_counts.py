"""The analytic counts equal the real module's."""

import dataclasses

import pytest

from megatron_dla import compat
from megatron_dla.config import LETTERS, ModelSection, ParallelSection
from megatron_dla.model.counts import count_parameters, flops_per_token
from megatron_dla.model.gpt import build_model, padded_vocab
from megatron_dla.parallel.groups import initialize_distributed, initialize_model_parallel

compat.install()
BASE = ModelSection(
    hidden_size=32, num_layers=3, num_heads=4, num_groups=2, key_dim=8, value_dim=12, capacity=3, ffn_hidden_size=48,
    attention_heads=4, attention_groups=2,
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_groups": 1},
        {"backbone": "gdn", "tau_mode": "learned"},
        {"ffn_hidden_size": 0, "conv_bias": True, "gated_norm": "group"},
        {"pattern": "DA", "tie_embeddings": True},
        {"pattern": "AN", "attention_head_dim": 12, "qk_norm": True},
        *({"pattern": letter} for letter in LETTERS),
    ],
    ids=str,
)
def test_parameter_count_is_the_models(change: dict) -> None:
    section = dataclasses.replace(BASE, **change)
    initialize_distributed("cpu")
    initialize_model_parallel(1, 1)
    model = build_model(section, ParallelSection(), vocab_size=200, seq_len=16, seed=1)
    counted = count_parameters(section, padded_vocab(200, section.vocab_multiple))
    assert counted == sum(p.numel() for p in model.parameters())


def test_flops_follow_the_sizes() -> None:
    short, long = flops_per_token(BASE, 256, 64), flops_per_token(BASE, 256, 10_000)
    assert short == long  # linear attention: cost a token does not grow with the context
    softmax = dataclasses.replace(BASE, pattern="A")
    assert flops_per_token(softmax, 256, 10_000) > flops_per_token(softmax, 256, 64)
    window = dataclasses.replace(BASE, pattern="W", sliding_window=100)
    assert flops_per_token(window, 256, 100) == flops_per_token(softmax, 256, 100)
    assert flops_per_token(window, 256, 10**6) < flops_per_token(softmax, 256, 201)  # 100 keys, less those at the start
    assert flops_per_token(BASE, 256, 64) > 6 * (count_parameters(BASE, 256) - 256 * 32)
