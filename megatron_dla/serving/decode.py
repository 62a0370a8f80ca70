"""Sampling tokens, and generation from a batch of prompts (evaluation)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from megatron_dla.adapters.memory import MemoryControl, MemoryInputs
from megatron_dla.serving.hf_model import DeltaMemModel, States


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """Next tokens int64 [B] of logits [B, V].

    Args:
        temperature: 0 = the most probable token. top_p: nucleus sampling, from the fewest most probable tokens whose
            probabilities add up to at least this. top_k: among so many tokens; 0 = all.
        generator: on the CPU, where tokens are sampled, so that a seed gives the same tokens on every device.
        repetition_penalty: of the tokens `seen`, int64 [B, T] (see `Sampling`).
    """
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    if repetition_penalty != 1 and seen is not None:
        logits = RepetitionPenaltyLogitsProcessor(float(repetition_penalty))(seen, logits)  # type: ignore[arg-type]
    if temperature == 0:
        return logits.argmax(-1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    probabilities = warpers(None, logits.float().cpu()).softmax(-1)  # type: ignore[arg-type]
    # keep this order: it decides which tokens a seed gives
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    sampled = torch.multinomial(ordered, 1, generator=generator)
    return order.gather(-1, sampled)[:, 0].to(logits.device)


def stop_tokens(model: DeltaMemModel, tokenizer: object | None = None) -> frozenset[int]:
    """Tokens that end an answer, from the model's generation config and the tokenizer."""
    found: list[int | None] = []
    for source in (getattr(model.base, "generation_config", None), tokenizer):
        value = getattr(source, "eos_token_id", None)
        found += value if isinstance(value, (list, tuple)) else [value]
    return frozenset(token for token in found if token is not None)


def pad_left(rows: Sequence[Sequence[int]], fill: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows of any lengths -> left-padded int64 [B, T], and the mask of the tokens that are not padding."""
    T = max(len(row) for row in rows)
    values = [[fill] * (T - len(row)) + list(row) for row in rows]
    mask = [[0] * (T - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(values, device=device), torch.tensor(mask, device=device)


@torch.no_grad()
def generate_batch(
    model: DeltaMemModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Collection[int] = (),
    states: States | None = None,
    messages: Sequence[Sequence[int]] | None = None,
    control: MemoryControl | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[list[list[int]], States]:
    """Continue every prompt, in one left-padded batch; each row is as if it were alone (up to rounding).

    Args:
        prompts: token ids, none empty. stop: tokens that end a row; they are neither returned nor fed.
        states: of the rows, from before the prompts; None = zeros. control: `freeze` for read-only answers.
        messages: number of the chat message of each prompt token (writes by message only); the answer has the next.

    Returns:
        The new tokens of each row, and the states after the last token fed: every returned one but, in rows that
        reached `max_new_tokens`, the last.
    """
    from transformers import DynamicCache

    device = model.device
    ids, mask = pad_left(prompts, device=device)
    message = None if messages is None else pad_left(messages, -1, device)[0]
    answer = None if messages is None else torch.tensor([[max(row) + 1] for row in messages], device=device)
    cache, running = DynamicCache(), torch.ones(len(prompts), dtype=torch.bool, device=device)
    states = model.initial_states(len(prompts)) if states is None else states
    ends = torch.tensor(sorted(stop), dtype=torch.long, device=device)
    out: list[list[int]] = [[] for _ in prompts]
    for step in range(max_new_tokens):
        done = model(
            ids, states=states, inputs=MemoryInputs(message=message), attention_mask=mask, past_key_values=cache,
            use_cache=True, logits_to_keep=1, control=control,
        )  # fmt: skip
        states, token = done.states, sample(done.logits[:, -1], temperature, top_p, generator)
        running &= ~torch.isin(token, ends)
        for row in running.nonzero()[:, 0].tolist():
            out[row].append(int(token[row]))
        if not bool(running.any()) or step == max_new_tokens - 1:
            break
        ids, message = torch.where(running, token, 0)[:, None], answer
        mask = torch.cat([mask, running[:, None].long()], 1)
    return out, states
