"""One cell of a synthetic task: a small model learns it on one core, and its answers are counted.

The model is the package's Hugging Face one, which starts in seconds and has every letter of `model.pattern`; the tests
of `hf` compare it with Megatron's.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dla.hf.random_model import random_model
from megatron_dla.study.generators import IGNORED, TaskSection, make_rows, vocabulary
from megatron_dla.study.synthetic import CellConfig

TRAIN, CHECK, TEST = range(3)  # last part of the seed of rows


def learn(config: CellConfig) -> dict[str, Any]:
    """Train and test: accuracy by length, and the curve [step, loss, accuracy at the training length]."""
    begin, task, training = time.monotonic(), config.task, config.training
    torch.manual_seed(config.seed)
    model = random_model(config.model, vocabulary(task).size)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.rate, betas=(0.9, 0.98))
    check = rows_of(task, task.length, training.check_rows, config.seed, 0, CHECK)
    curve: list[tuple[int, float, float]] = []
    record: dict[str, Any] = {}
    for step in range(1, training.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.rate * schedule(step / training.steps)
        tokens, labels = rows_of(task, task.length, training.rows, config.seed, step, TRAIN)
        loss = F.cross_entropy(*answers(model, tokens, labels))
        if not bool(loss.isfinite()):
            record["diverged"] = f"the loss is {float(loss.detach())} in step {step}"
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % training.check_every == 0 or step == training.steps:
            curve.append((step, float(loss.detach()), accuracy(model, *check)))
            if curve[-1][2] >= training.stop_at:
                break
    if not record:
        tests = {n: rows_of(task, n, training.test_rows, config.seed, 0, TEST) for n in task.eval_lengths}
        record["accuracy"] = {str(n): accuracy(model, *rows) for n, rows in tests.items()}
        record["check_accuracy"] = curve[-1][2]
    parameters = sum(p.numel() for p in model.parameters())
    return record | {"steps": step, "curve": curve, "parameters": parameters, "seconds": time.monotonic() - begin}


def schedule(part: float) -> float:
    """Share of the learning rate after `part` of the steps."""
    return min(part / 0.1, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0.0, part - 0.1) / 0.9)))


def rows_of(task: TaskSection, length: int, rows: int, *seed: int) -> tuple[Tensor, Tensor]:
    tokens, labels = make_rows(task, length, rows, *seed)
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def answers(model: Any, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary] and labels [n] of the tokens that are asked for."""
    asked = labels != IGNORED
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return model.lm_head(hidden[asked]), labels[asked]


@torch.no_grad()
def accuracy(model: Any, tokens: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    right = total = 0
    for some in torch.arange(len(tokens)).split(128):
        logits, wanted = answers(model, tokens[some], labels[some])
        right, total = right + int((logits.argmax(1) == wanted).sum()), total + len(wanted)
    return right / total
