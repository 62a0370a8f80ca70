"""What runs on the ranks of the adapter tests, and the small frozen model they share."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from megatron_dla import compat
from tests.support.train_workers import make_trainer

compat.install()

from megatron_dla.adapters.calls import MemoryCall  # noqa: E402
from megatron_dla.adapters.delta_mem import with_memory  # noqa: E402
from megatron_dla.checkpoint.weights import load_merged  # noqa: E402
from megatron_dla.errors import STOPPED  # noqa: E402
from megatron_dla.evaluation.recall import CATEGORIES, FILLERS  # noqa: E402
from megatron_dla.metrics.sinks import read_metrics  # noqa: E402
from megatron_dla.tasks.adapter.loader import EpisodeLoader  # noqa: E402


def backbone(directory: Path, rows: int = 0) -> None:
    """A random Llama of two layers with a word-level tokenizer; `rows`: of its embedding, at least."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "?", *CATEGORIES, *FILLERS, *(w for text in CATEGORIES.values() for w in text.split())]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=-(-max(rows, len(vocab)) // 8) * 8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)


def config_dict(data: Path, runs: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A config as nested dictionaries; `sections` override keys."""
    base: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "dir": str(runs), "seed": 5},
        "backbone": {"dir": str(data / "llama")},
        "delta_mem": {"num_states": 2, "beta_bias": -2.0},
        "episodes": {
            "train": str(data / "train.jsonl"), "valid": str(data / "validation.jsonl"), "write_length": 16,
            "read_length": 16, "row_length": 56,
        },
        "optimizer": {"lr": 1e-2, "warmup_steps": 1, "weight_decay": 0.0},
        "training": {
            "steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "device": "cpu",
            "eval_every": 1,
        },
        "gate_loss": {"weight": 0.3},
    }  # fmt: skip
    for name, values in sections.items():
        base.setdefault(name, {}).update(values)
    return base


def train(values: dict[str, Any]) -> dict[str, Any]:
    """Runs to the end (or to `stop_after`); metrics, the adapter, the episodes of the first step, and logits."""
    stop_after = values["training"].pop("stop_after", None)
    trainer = make_trainer(values)
    config, run_dir, loader, first = trainer.config, trainer.run_dir, trainer.task.loader, []
    if isinstance(loader, EpisodeLoader):
        places = {id(episode): i for i, episode in enumerate(loader.episodes)}
        stream = loader._stream()
        first = [places[id(episode)] for _ in range(config.training.global_batch_size) for episode in next(stream)]
    if stop_after is not None:
        step = trainer._train_step

        def signalled() -> float:
            if trainer.step + 1 == stop_after:
                os.kill(os.getpid(), signal.SIGUSR1)
            return step()

        trainer._train_step = signalled
        assert trainer.run() == STOPPED
        return {}
    assert trainer.run() == 0
    torch.distributed.barrier()
    merged, _ = load_merged(run_dir / "checkpoints" / f"step_{config.training.steps}")
    logits = None
    if torch.distributed.get_world_size() == 1:
        ids = torch.arange(20)[None] % 40
        trainer.engine.eval()
        with torch.no_grad():
            logits = trainer.engine(ids, None, None, packed_seq_params=with_memory(MemoryCall(), 20))
    return {
        "metrics": read_metrics(run_dir / "metrics.jsonl"),
        "adapter": merged,
        "first_rows": first,
        "logits": logits,
    }


def drifting(values: dict[str, Any]) -> str:
    """The error of a run in which rank 1 changes one replica of the adapter's parameters in step 2."""
    trainer = make_trainer(values)
    step = trainer._train_step
    parameters = trainer.engine.module.named_parameters()
    parameter = next(p for name, p in parameters if p.requires_grad and not name.endswith("delta_q_proj"))

    def drifting_step() -> float:
        loss = step()
        if trainer.step == 1 and torch.distributed.get_rank() == 1:
            parameter.data.view(-1)[0] += 1e-3
        return loss

    trainer._train_step = drifting_step
    try:
        trainer.run()
    except RuntimeError as error:
        return f"after {trainer.step} steps: {error}"
    return ""


def poisoned(values: dict[str, Any]) -> tuple[str, int]:
    """A run whose loss is not a number in step 2: (the error, finished steps)."""
    trainer = make_trainer(values)
    engine, forward = trainer.engine, trainer.engine.forward
    engine.forward = lambda *a, **k: forward(*a, **k) * (float("nan") if trainer.step == 1 and engine.training else 1.0)
    try:
        trainer.run()
    except FloatingPointError as error:
        return str(error), trainer.step
    return "", trainer.step


def divergences() -> tuple[float, float]:
    """Largest differences of `divergence` and of its gradient, over a vocabulary of all ranks, from plain torch."""
    from megatron_dla.adapters.divergence import divergence

    torch.manual_seed(0)
    logits, base, cotangent = torch.randn(3, 5, 8).double(), torch.randn(3, 5, 8).double(), torch.randn(3, 5).double()
    logits.requires_grad_()
    whole = torch.nn.functional.kl_div(logits.log_softmax(-1), base.softmax(-1), reduction="none").sum(-1)
    (wanted,) = torch.autograd.grad(whole, logits, cotangent)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine, theirs, part = (x.detach().chunk(world, -1)[rank].clone() for x in (logits, base, wanted))
    mine.requires_grad_()
    found = divergence(mine, theirs, torch.distributed.group.WORLD)
    (gradient,) = torch.autograd.grad(found, mine, cotangent)
    return float((found - whole).abs().max()), float((gradient - part).abs().max())


def matrix_products(values: dict[str, Any]) -> list[tuple[int, ...]]:
    """Shapes of the right factors of all products of a run, forward and backward: [m, n], or [batch, m, n]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                shapes.append(tuple(args[1].shape))
            return func(*args, **(kwargs or {}))

    trainer = make_trainer(values)
    with Products():
        assert trainer.run() == 0
    return shapes
