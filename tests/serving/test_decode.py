"""Sampling, and batches of prompts against each prompt alone."""

import pytest
import torch

from megatron_dla.serving.decode import generate_batch, sample
from megatron_dla.serving.session import Session
from tests.support.sessions import NUMBERS, ROW


def test_a_batch_of_prompts_is_each_prompt_alone(model):
    prompts, numbers = [ROW, ROW[3:11], ROW[20:21]], [NUMBERS, NUMBERS[3:11], [0]]
    alone = []
    for ids, number in zip(prompts, numbers, strict=True):
        session = Session(model)
        session.append(ids, number)
        alone.append(list(session.generate(5, stop=[])))
    stop = [alone[1][2]]
    want = [row[: next((i for i, t in enumerate(row) if t in stop), 5)] for row in alone]
    ids = numbers if model.config.write == "message" else None
    got, states = generate_batch(model, prompts, 5, stop=stop, messages=ids)
    assert got == want and len(want[1]) <= 2
    session = Session(model)  # a row that ended early: its states are of what it fed
    session.append([*prompts[1], *got[1]], [*numbers[1], *[max(numbers[1]) + 1] * len(got[1])])
    assert torch.allclose(states[0].S[1], session.states[0].S[0], rtol=0, atol=1e-5)


def test_sampling_follows_the_probabilities():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    share = torch.bincount(sample(logits, 1.0, 1.0, generator), minlength=4) / 4000
    assert (share - torch.tensor([0.5, 0.3, 0.15, 0.05])).abs().max() < 0.03
    share = torch.bincount(sample(logits, 1.0, 0.6, generator), minlength=4) / 4000
    assert (share - torch.tensor([0.625, 0.375, 0.0, 0.0])).abs().max() < 0.03
    share = torch.bincount(sample(logits, 0.5, 1.0, generator), minlength=4) / 4000
    assert abs(share[0] - 0.25 / 0.365) < 0.03
    assert set(sample(logits, 0.0).tolist()) == {0}


@pytest.mark.parametrize("temperature, top_p, want", [
    (1.0, 1.0, [45, 9, 37, 47, 25, 4]), (0.7, 0.9, [45, 9, 22, 47, 25, 4]), (1.5, 0.5, [45, 9, 22, 47, 25, 4]),
    (1, 0.2, [45, 9, 34, 32, 25, 21]),
])  # fmt: skip
def test_a_seed_gives_the_tokens_that_it_always_gave(temperature, top_p, want):
    """`want` was sampled by commit 62bb8a7, which did not use transformers' logits warpers."""
    logits = 2 * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    assert sample(logits, temperature, top_p, torch.Generator().manual_seed(7)).tolist() == want


def test_the_most_probable_token_is_never_cut_off():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert {int(sample(logits, 1.0, 1e-6, torch.Generator().manual_seed(seed))) for seed in range(20)} == {1}


def test_top_k_and_repetition_penalty():
    logits = torch.tensor([[2.0, 1.9, 1.8, -5.0]])
    found = {int(sample(logits, 1.0, generator=torch.Generator().manual_seed(s), top_k=2)) for s in range(40)}
    assert found == {0, 1}
    seen = torch.tensor([[0, 0, 3]])
    assert sample(logits, repetition_penalty=1.2, seen=seen).item() == 1  # 2.0 / 1.2 < 1.9
    assert sample(logits, repetition_penalty=1.01, seen=seen).item() == 0
    assert sample(-logits, repetition_penalty=0.1, seen=seen).item() == 3  # 5 / 0.1
    assert logits.tolist() == torch.tensor([[2.0, 1.9, 1.8, -5.0]]).tolist()
