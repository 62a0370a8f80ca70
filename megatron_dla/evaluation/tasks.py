"""Recall with the context removed, and the perplexity cost of an adapter on ordinary text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_dla.adapters.memory import MemoryControl
from megatron_dla.errors import UserError
from megatron_dla.evaluation.alternatives import Alternative, retell
from megatron_dla.evaluation.costs import Costs
from megatron_dla.evaluation.lora import TunedLora
from megatron_dla.evaluation.recall import RecallTask, stories
from megatron_dla.evaluation.scoring import (
    PLAIN,
    READ_ONLY,
    EncodedQuestion,
    LayerMeans,
    TokenRow,
    derangement,
    encode_stories,
    score,
    write_contexts,
)
from megatron_dla.evaluation.stories import Story
from megatron_dla.evaluation.summary import Summariser
from megatron_dla.evaluation.table import Table
from megatron_dla.serving.chat import encode
from megatron_dla.serving.hf_model import DeltaMemModel, select_states

METRICS = ("choice", "exact", "logprob")


def recall_table(
    model: DeltaMemModel,
    tokenizer: Any,
    task: RecallTask,
    *,
    episodes: int,
    seed: int = 0,
    batch: int = 16,
    controls: bool = True,
    static: DeltaMemModel | None = None,
    beside: Sequence[Alternative] = (),
    sweep: str = "",
) -> Table:
    """Recall of the test split; a unit is an episode, its value the mean over its questions.

    Args:
        model: with or without an adapter (without: only `full` and `scale_0`). controls: add zeroed, shuffled and
            full_adapter. static: the same backbone with a static adapter. beside: the same questions by other means,
            and then also what a question costs: tokens of its prompt, seconds in a batch (with those to write the
            memory or the summary), and bytes that are kept of what an episode told. sweep: the setting of the task
            that differs between several tables, for the report.

    Raises:
        UserError: too few episodes to shuffle states; see `encode_stories`.
    """
    if episodes < 2:
        raise UserError(f"episodes = {episodes}: must be at least 2 (states are shuffled between them)")
    numbered = model.config.write == "message"
    made = list(stories(task, episodes, seed=seed, split="test"))
    told, asked = encode_stories(tokenizer, made, numbered=numbered)
    costs = Costs(len(asked), episodes, bare=sum(len(question.prompt) for question in asked))
    with costs.of("full"):
        found = {"full": score(model, asked, batch, states=None, full=True, control=PLAIN)}
    costs.read("full", sum(len(question.full.ids) for question in asked))
    costs.keep("full", _text_bytes(made))
    means = LayerMeans()
    pairs: list[tuple[str, str]] = []
    if model.layers:
        if controls:
            found["full_adapter"] = score(model, asked, batch, states=None, full=True, control=MemoryControl())
        with costs.of("kept"):
            states = write_contexts(model, told, batch, means)
            found["kept"] = score(model, asked, batch, states=states, control=READ_ONLY, means=means)
        costs.keep("kept", sum(state.nbytes for state in states.values()))
        if controls:
            found["zeroed"] = score(model, asked, batch, states=None, control=READ_ONLY)
            others = select_states(states, derangement(episodes, seed).tolist())
            found["shuffled"] = score(model, asked, batch, states=others, control=READ_ONLY)
    found["scale_0"] = score(model, asked, batch, states=None, control=PLAIN)
    if static is not None:
        found["static"] = score(static, asked, batch, states=None, control=READ_ONLY)
    for one in beside:
        if one.kind == "lora":
            found[one.name] = _tuned(one, model, told, asked, costs, seed)
        else:
            found[one.name] = _retold(one, model, tokenizer, made, costs, batch)
    if model.layers:
        pairs += [("kept", name) for name in ("zeroed", "shuffled", "scale_0", "static") if name in found]
        pairs += [("full_adapter", "full")] if controls else []
        pairs += [("kept", one.name) for one in beside]
    story = np.asarray([question.story for question in asked])
    values = {name: {m: _by_story(scores[m], story) for m in METRICS} for name, scores in found.items()}
    chance = float(np.mean([1 / len(question.choices) for question in asked]))
    settings = {"recall": task.kind, **vars(task), "episodes": episodes, "questions": len(asked), "seed": seed,
                "chance": chance, "tokens_told": float(np.mean([len(row.ids) for row in told]))}  # fmt: skip
    name = task.kind
    if sweep:
        settings["sweep"], name = sweep, f"{task.kind}, {sweep} = {getattr(task, sweep)}"
    return Table(
        f"recall ({name})", "episodes", METRICS, values, pairs, settings, layers=means.rows(),
        costs=costs.found if beside else {},
    )  # fmt: skip


def _retold(
    one: Alternative, model: DeltaMemModel, tokenizer: Any, made: Sequence[Story], costs: Costs, batch: int
) -> dict[str, np.ndarray]:
    """Scores of an alternative that leaves another context, and its costs."""
    with costs.of(one.name):
        left = retell(one, tokenizer, made, Summariser(model, tokenizer, batch))
        numbered = model.config.write == "message"
        rows = encode_stories(tokenizer, [story for few in left for story in few], numbered=numbered)[1]
        found = score(model, rows, batch, states=None, full=True, control=PLAIN)
    # what is left of a text, but a search needs all of it
    costs.keep(one.name, _text_bytes(made if one.kind == "bm25" else [few[0] for few in left]))
    costs.read(one.name, sum(len(row.full.ids) for row in rows))
    return found


def _tuned(
    one: Alternative, model: DeltaMemModel, told: Sequence[TokenRow], asked: Sequence[EncodedQuestion], costs: Costs,
    seed: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Scores of a LoRA for each story, and its costs."""
    lora = TunedLora(model.base, sum(p.numel() for p in model.parameters()), one.size, seed)
    with costs.of(one.name):
        found = lora.score(told, asked)
    costs.keep(one.name, len(told) * lora.parameters * model.base.dtype.itemsize)
    return found


def _text_bytes(told: Sequence[Story]) -> int:
    return sum(len(text.encode()) for story in told for text in story.texts())


def _by_story(values: np.ndarray, story: np.ndarray) -> np.ndarray:
    """Mean of each story's questions."""
    return np.bincount(story, values) / np.bincount(story)


@torch.no_grad()
def perplexity_table(
    model: DeltaMemModel,
    windows: Sequence[Sequence[int]],
    *,
    batch: int = 4,
    static: DeltaMemModel | None = None,
    settings: dict[str, Any] | None = None,
) -> Table:
    """Nats a token on plain text, for the backbone alone and with the adapter reading and writing; a unit is a window,
    which starts with an empty memory.

    Args:
        windows: token ids, all of one length (at least 2).

    Raises:
        UserError: the adapter writes by message (plain text has no messages).
    """
    if model.config.write == "message" and model.layers:
        raise UserError("--tasks ppl: this adapter writes by message and plain text has no messages: leave ppl out")
    runs: dict[str, tuple[DeltaMemModel, MemoryControl]] = {"base": (model, PLAIN)}
    if model.layers:
        runs["adapter"] = (model, MemoryControl())
    if static is not None:
        runs["static"] = (static, MemoryControl())
    values = {}
    for name, (subject, control) in runs.items():
        losses = []
        for at in range(0, len(windows), batch):
            ids = torch.tensor([list(row) for row in windows[at : at + batch]], device=subject.device)
            logits = subject(ids, control=control).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
            losses.append(loss.view(len(ids), -1).double().mean(1).cpu())
        values[name] = {"nats": torch.cat(losses).numpy()}
    pairs = [(name, "base") for name in runs if name != "base"]
    perplexity = {name: float(np.exp(found["nats"].mean())) for name, found in values.items()}
    settings = {**(settings or {}), "windows": len(windows), "tokens": len(windows[0]), "perplexity": perplexity}
    return Table("perplexity", "windows", ("nats",), values, pairs, settings)


def text_windows(tokenizer: Any, texts: Sequence[str], tokens: int, count: int, seed: int) -> list[list[int]]:
    """`count` windows of `tokens` tokens, drawn without overlap from the texts.

    Raises:
        UserError: the text is too short for one window.
    """
    found = []
    for text in texts:
        ids = encode(tokenizer, text)
        found += [ids[at : at + tokens] for at in range(0, len(ids) - tokens + 1, tokens)]
    if not found:
        raise UserError(f"--text has no window of {tokens} tokens: give a longer text or a smaller --window")
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[i] for i in sorted(order)]
