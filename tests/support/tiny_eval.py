"""A tokenizer of whole words for the recall tasks, and a random model for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.evaluation.recall import CATEGORIES, FILLERS
from megatron_dla.evaluation.stories import PEOPLE, RELATIONS
from megatron_dla.serving.hf_model import DeltaMemModel
from tests.support.tiny_hf import TEMPLATE, build_adapted

SPECIAL = ("<|im_end|>", "<pad>", "<|im_start|>", "<unk>")


def build_words(template: bool = True) -> Any:
    """Words, single punctuation marks and line breaks; spaces are not kept."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [*CATEGORIES, *CATEGORIES.values(), *FILLERS, *PEOPLE.values(), "Answer the question. ? : ,"]
    texts += [f"{lead} {question} {words}" for lead, question, words in RELATIONS.values()]
    texts.append("system user assistant be kind Red tea cold \n")
    words = sorted(set(re.findall(r"\w+|[^\w ]", " ".join(texts))))
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex(r"\w+|[^\w ]"), "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIAL[0], pad_token=SPECIAL[1], unk_token="<unk>",
        additional_special_tokens=[SPECIAL[2]],
    )  # fmt: skip
    if template:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(config: DeltaMemConfig | None = None, dtype: torch.dtype = torch.float64) -> DeltaMemModel:
    """The random Llama of the adapters' tests (260 tokens: room for every word), its memory not small."""
    from tests.support.tiny_hf import build_base

    model = build_adapted(config, base=build_base(dtype=dtype))
    with torch.no_grad():
        for memory in model.memories.values():
            memory.delta_o_proj.mul_(4)
    return model


def save_words(directory: Path, **kwargs: Any) -> Path:
    from tests.support.tiny_hf import build_base

    build_base().save_pretrained(directory)
    build_words(**kwargs).save_pretrained(directory)
    return directory
