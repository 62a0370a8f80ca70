"""A LoRA for each text: it learns its text, has the wanted size, and leaves the model as it was."""

import importlib.util

import pytest
import torch

from megatron_dla.adapters.memory import MemoryControl
from megatron_dla.evaluation.lora import RANK, TunedLora
from megatron_dla.evaluation.recall import make_task, stories
from megatron_dla.evaluation.scoring import PLAIN, encode_stories, score
from tests.support.tiny_eval import build_model, build_words

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


def encoded(episodes: int = 3):
    made = list(stories(make_task("facts", people=1, relations=2, style="text"), episodes, seed=0))
    return encode_stories(build_words(), made, numbered=False)


def test_no_step_is_the_plain_model_and_many_know_the_text() -> None:
    model, (told, asked) = build_model(), encoded()
    before = {name: p.clone() for name, p in model.base.state_dict().items()}
    ids = torch.arange(4, 12)[None]
    adapted = model(ids, control=MemoryControl()).logits
    plain = score(model, asked, 4, states=None, control=PLAIN)
    none = TunedLora(model.base, 0, 0).score(told, asked)
    assert none.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(torch.from_numpy(none[name]), torch.from_numpy(plain[name]))
    size = 40 * TunedLora(model.base, 0, 0)._per_rank()
    many = TunedLora(model.base, size, 60).score(told, asked)
    assert many["logprob"].mean() > plain["logprob"].mean() + 0.5
    # every story by itself, from the same start, and nothing of it stays in the model
    alone = TunedLora(model.base, size, 60).score(told[:1], [question for question in asked if question.story == 0])
    assert alone["logprob"].tolist() == many["logprob"][: len(alone["logprob"])].tolist()
    after = model.base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(ids, control=MemoryControl()).logits, adapted)


@pytest.mark.parametrize("size", [0, 1, 5_000, 123_456])
def test_its_size_is_the_nearest_to_the_adapters(size: int) -> None:
    from peft import LoraConfig, get_peft_model

    base = build_model().base
    lora = TunedLora(base, size, 1)
    per_rank = lora._per_rank()
    assert lora.rank == RANK if not size else abs(lora.parameters - size) <= per_rank / 2 or lora.rank == 1
    tuned = get_peft_model(base, LoraConfig(r=lora.rank, target_modules=["q_proj", "v_proj"]))
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == lora.parameters
