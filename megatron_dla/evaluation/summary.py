"""Summaries by the backbone itself, greedily."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_dla.evaluation.alternatives import SUMMARISE
from megatron_dla.evaluation.scoring import PLAIN
from megatron_dla.serving.chat import render_prompt
from megatron_dla.serving.decode import generate_batch, stop_tokens
from megatron_dla.serving.hf_model import DeltaMemModel


class Summariser:
    """Called with texts and a number of tokens, it gives a summary of each."""

    def __init__(self, model: DeltaMemModel, tokenizer: Any, batch: int) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch

    def __call__(self, texts: Sequence[str], tokens: int) -> list[str]:
        asked = [[{"role": "user", "content": SUMMARISE.format(text)}] for text in texts]
        prompts = [render_prompt(self.tokenizer, messages) for messages in asked]
        stop, out = stop_tokens(self.model, self.tokenizer), []
        for at in range(0, len(prompts), self.batch):
            part = prompts[at : at + self.batch]
            silent = [[-1] * len(prompt) for prompt in part] if self.model.config.write == "message" else None
            written, _ = generate_batch(self.model, part, tokens, stop=stop, messages=silent, control=PLAIN)
            out += [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
        return out
