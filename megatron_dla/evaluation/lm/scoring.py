"""Log-probabilities of given tokens, and greedy continuations, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dla.evaluation.lm.models import Subject
from megatron_dla.serving.decode import pad_left

LOGITS = 1 << 26  # numbers of the output layer that are held at once


@dataclass(frozen=True)
class Row:
    """Tokens of which `ids[start:]` are scored, each after all before it; 1 <= start < len(ids)."""

    ids: Sequence[int]
    start: int


@dataclass(frozen=True)
class Scores:
    """Of the scored tokens of a row [n]: log-probability in nats, the most probable token, and that of a choice."""

    logprob: np.ndarray
    best: np.ndarray
    best_among: np.ndarray


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first: rows x longest <= budget, or one row."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def score_rows(
    subject: Subject, rows: Sequence[Row], budget: int, among: Sequence[Sequence[int]] | None = None
) -> list[Scores]:
    """Scores of each row, as if it were alone: rows are padded on the right, where a causal model does not look.

    Args:
        budget: tokens of a forward pass, padding included. among: of each row, the tokens out of which
            `Scores.best_among` is; None = all.
    """
    out: list[Scores | None] = [None] * len(rows)
    for batch in batches([len(row.ids) - 1 for row in rows], budget):
        longest = max(len(rows[i].ids) for i in batch) - 1
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for line, i in enumerate(batch):
            ids[line, : len(rows[i].ids) - 1] = torch.tensor(rows[i].ids[:-1])
        hidden = subject.model.base_model(input_ids=ids.to(subject.device), use_cache=False).last_hidden_state
        for line, i in enumerate(batch):
            row = rows[i]
            wanted = torch.tensor(row.ids[row.start :], device=hidden.device)
            choice = None if among is None else torch.tensor(among[i], device=hidden.device)
            out[i] = _score(subject.model, hidden[line, row.start - 1 : len(row.ids) - 1], wanted, choice)
    return [scores for scores in out if scores is not None]


def _score(model: Any, hidden: Tensor, wanted: Tensor, choice: Tensor | None) -> Scores:
    """Of hidden states [n, hidden], the tokens [n] that follow them, and tokens to choose from."""
    head = model.get_output_embeddings()
    logprob, best, chosen = [], [], []
    step = max(1, LOGITS // head.weight.shape[0])
    for at in range(0, len(wanted), step):
        logits = head(hidden[at : at + step]).float()
        logprob.append(logits.log_softmax(-1).gather(1, wanted[at : at + step, None])[:, 0].cpu())
        best.append(logits.argmax(-1).cpu())
        chosen.append(best[-1] if choice is None else choice[logits[:, choice].argmax(-1)].cpu())
    return Scores(torch.cat(logprob).double().numpy(), torch.cat(best).numpy(), torch.cat(chosen).numpy())


@torch.no_grad()
def continue_prompts(subject: Subject, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> list[str]:
    """The greedy continuation of each prompt, of at most its number of new tokens, up to an end token, as text.

    Prompts are padded on the left.
    """
    model = subject.model
    pad = model.config.pad_token_id or 0
    ids, mask = pad_left(prompts, fill=pad, device=subject.device)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=max(new_tokens), do_sample=False, num_beams=1, pad_token_id=pad,
        temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    rows = [row[:count] for row, count in zip(out[:, ids.shape[1] :].tolist(), new_tokens, strict=True)]
    return subject.tokenizer.batch_decode(rows, skip_special_tokens=True)
