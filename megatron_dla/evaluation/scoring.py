"""Tokenise stories, compute their memory states and score answers.

Conditions (paired: the same questions and prompts in each):

    full          the whole context in the prompt, plain backbone
    full_adapter  the same with the adapter reading and writing
    kept          context removed, its state kept; read-only, as in training
    zeroed        context removed, zero state
    shuffled      context removed, state of another story
    scale_0       context removed, corrections off (plain backbone)
    static        context removed, adapter of the same size without memory
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dla.adapters.memory import MemoryControl, MemoryInputs, MemoryState, half_life
from megatron_dla.adapters.messages import Pending
from megatron_dla.errors import UserError
from megatron_dla.evaluation.stories import Question, Story
from megatron_dla.serving.chat import PlainText, render, render_context, render_prompt, system_message
from megatron_dla.serving.decode import pad_left
from megatron_dla.serving.hf_model import DeltaMemModel, LayerStats, States, select_states

PLAIN, READ_ONLY = MemoryControl(scale=0.0, freeze=True), MemoryControl(freeze=True)


@dataclass(frozen=True)
class TokenRow:
    """Token ids with their message numbers (all -1 if the adapter writes by token)."""

    ids: list[int]
    messages: list[int]


@dataclass(frozen=True)
class EncodedQuestion:
    """A question of story number `story`: prompt without (`prompt`) and with (`full`) the context, both up to the
    answer's word; first token of each candidate word; index of the right one."""

    story: int
    prompt: list[int]
    full: TokenRow
    choices: list[int]
    right: int


def encode_stories(
    tokenizer: Any, stories: Sequence[Story], *, numbered: bool
) -> tuple[list[TokenRow], list[EncodedQuestion]]:
    """Contexts and questions as tokens. Raises UserError if two candidate words begin with the same token."""
    told, asked = [], []
    given = tokenizer
    for number, story in enumerate(stories):
        tokenizer = PlainText(given) if story.plain else given
        system = system_message(story.system)
        context = [*system, *({"role": "user", "content": text} for text in story.context)]
        told.append(TokenRow(*render_context(tokenizer, context, numbered=numbered)))
        for question in story.questions:
            text = story.ask(question)
            user = {"role": "user", "content": text}
            prompt = render_prompt(tokenizer, [*system, user])
            whole = render(tokenizer, [*context, user], generation_prompt=True, numbered=numbered)
            lead, choices = _answer_tokens(tokenizer, question, text)
            full = TokenRow(whole[0] + lead, whole[1] + [-1] * len(lead))
            asked.append(EncodedQuestion(number, prompt + lead, full, choices, question.choices.index(question.word)))
    return told, asked


def _answer_tokens(tokenizer: Any, question: Question, asked: str) -> tuple[list[int], list[int]]:
    """Tokens of the answer before its word, and the first token of each candidate word."""
    answers = []
    for word in question.choices:
        text = f"{question.lead} {word}"
        message = [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
        ids = render(tokenizer, message, generation_prompt=False, numbered=False, follows=True)[0]
        start = len(render_prompt(tokenizer, message[:1]))
        answers.append(ids[start:])
    shortest = min(len(answer) for answer in answers)
    same = next((i for i in range(shortest) if len({answer[i] for answer in answers}) > 1), shortest)
    firsts = [answer[same] for answer in answers if same < len(answer)]
    if len(set(firsts)) < len(answers):
        raise UserError(
            f"recall: with this tokenizer some answers to {question.text!r} begin with the same token and cannot be "
            "scored: use another --recall-task or style"
        )
    return answers[0][:same], firsts


# ---- states


def join_states(parts: Sequence[States]) -> States:
    """States of several batches as one batch."""
    out: States = {}
    for layer in parts[0]:
        states = [part[layer] for part in parts]
        pending = None
        if states[0].pending is not None:
            opened = [vars(state.pending).values() for state in states]
            pending = Pending(*(torch.cat(list(columns)) for columns in zip(*opened, strict=True)))
        out[layer] = MemoryState(torch.cat([state.S for state in states]), pending)
    return out


@dataclass
class LayerMeans:
    """Means per layer: gates over all context tokens, output ratio over question tokens in `kept`; nan if absent."""

    beta: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    keep: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    ratio: dict[int, list[tuple[float, int]]] = field(default_factory=dict)

    def add_gates(self, stats: dict[int, LayerStats]) -> None:
        for layer, found in stats.items():
            if found.written:
                self.beta.setdefault(layer, []).append((found.mean_beta, found.written))
                self.keep.setdefault(layer, []).append((found.mean_keep, found.written))

    def add_ratios(self, stats: dict[int, LayerStats], tokens: int) -> None:
        for layer, found in stats.items():
            self.ratio.setdefault(layer, []).append((found.output_ratio, tokens))

    def rows(self) -> list[dict[str, float]]:
        """layer, mean beta, half-life in writes, ||Δo|| / ||o||."""
        out = []
        for layer in sorted(set(self.beta) | set(self.ratio)):
            beta, keep, ratio = (_weighted(found.get(layer, [])) for found in (self.beta, self.keep, self.ratio))
            out.append({"layer": layer, "mean_beta": beta, "half_life": half_life(keep), "output_ratio": ratio})
        return out


def _weighted(values: Sequence[tuple[float, int]]) -> float:
    if not values:
        return float("nan")
    numbers, weights = np.asarray(values, np.float64).T
    return float((numbers * weights).sum() / weights.sum())


def _batches(count: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, count)) for at in range(0, count, size))


@torch.no_grad()
def write_contexts(
    model: DeltaMemModel, told: Sequence[TokenRow], batch: int, means: LayerMeans | None = None
) -> States:
    """States after each context, in order; a message that is still open is written."""
    parts = []
    for part in _batches(len(told), batch):
        ids, mask, message = _padded(model, told[part])
        out = model(
            ids, inputs=MemoryInputs(message=message), attention_mask=mask, logits_to_keep=1, stats=means is not None
        )
        if means is not None:
            means.add_gates(out.stats)
        parts.append(model.finish(out.states))
    return join_states(parts)


def _padded(model: DeltaMemModel, rows: Sequence[TokenRow]) -> tuple[Tensor, Tensor, Tensor | None]:
    ids, mask = pad_left([row.ids for row in rows], device=model.device)
    if model.config.write != "message":
        return ids, mask, None
    return ids, mask, pad_left([row.messages for row in rows], -1, model.device)[0]


def derangement(count: int, seed: int) -> np.ndarray:
    """A permutation of `count` >= 2 items without fixed points: one step along a random cycle."""
    order = np.random.default_rng(seed).permutation(count)
    out = np.empty(count, np.int64)
    out[order] = np.roll(order, 1)
    return out


@torch.no_grad()
def score(
    model: DeltaMemModel,
    asked: Sequence[EncodedQuestion],
    batch: int,
    *,
    states: States | None,
    full: bool = False,
    control: MemoryControl,
    means: LayerMeans | None = None,
) -> dict[str, np.ndarray]:
    """Scores, each [number of questions]: `choice`, 1 if the right word is the most likely candidate; `exact`, 1 if its
    first token is the most likely of the vocabulary; `logprob` of the right word among the candidates, in nats.

    Args:
        states: of the stories; None = zeros. full: keep the context in the prompt.
    """
    parts = []
    for part in _batches(len(asked), batch):
        rows = asked[part]
        told = [row.full if full else TokenRow(row.prompt, [-1] * len(row.prompt)) for row in rows]
        ids, mask, message = _padded(model, told)
        mine = None if states is None else select_states(states, [row.story for row in rows])
        out = model(
            ids, states=mine, inputs=MemoryInputs(message=message), attention_mask=mask, logits_to_keep=1,
            control=control, stats=means is not None,
        )  # fmt: skip
        if means is not None:
            means.add_ratios(out.stats, int(mask.sum()))
        parts.append(score_logits(out.logits[:, -1], rows))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def score_logits(logits: Tensor, asked: Sequence[EncodedQuestion]) -> dict[str, np.ndarray]:
    """The scores of `score` from the logits [number of questions, V] of the token at which each answer differs."""
    logits = logits.double().cpu()
    among = logits.gather(1, torch.tensor([row.choices for row in asked])).log_softmax(-1)
    right = torch.tensor([row.right for row in asked])
    return {
        "choice": (among.argmax(-1) == right).double().numpy(),
        "exact": (logits.argmax(-1) == torch.tensor([row.choices[row.right] for row in asked])).double().numpy(),
        "logprob": among.gather(1, right[:, None])[:, 0].numpy(),
    }
