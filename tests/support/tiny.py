"""A tiny corpus and config that the training tests share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "of",
    "memory",
    "state",
    "slot",
    "reads",
    "writes",
    "keeps",
    "opens",
    "merges",
    "when",
    "a",
    "new",
    "topic",
    "begins",
    "and",
    "an",
    "old",
    "one",
    "ends",
]


def write_corpus(directory: Path, documents: int = 60, seed: int = 0) -> Path:
    """JSONL documents of random words."""
    rnd = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "text.jsonl"
    with path.open("w") as file:
        for number in range(documents):
            text = " ".join(rnd.choice(WORDS) for _ in range(rnd.randint(20, 200)))
            file.write(json.dumps({"text": f"Document {number}. {text}.\n"}) + "\n")
    return path


def build_data(directory: Path, vocab_size: int = 300, seed: int = 0) -> Path:
    """Tokenizer and shards; returns the data directory."""
    from megatron_dla.data_prep.shards import build_shards
    from megatron_dla.data_prep.tokenizer import train_tokenizer

    corpus = write_corpus(directory / "corpus", seed=seed)
    tokenizer = train_tokenizer([str(corpus)], str(directory / "tokenizer"), vocab_size=vocab_size)
    build_shards(
        [str(corpus)], str(tokenizer.path), str(directory / "data"), workers=1, val_fraction=0.1, min_train_shards=8
    )
    return directory / "data"


def config_dict(data: Path, runs: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A config as nested dictionaries; `sections` override keys."""
    base: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "dir": str(runs), "seed": 5},
        "data": {"dir": str(data), "seq_len": 64, "num_streams": 4},
        "model": {
            "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_groups": 2, "key_dim": 8, "value_dim": 8,
            "capacity": 3, "tau": 1.2, "ffn_hidden_size": 64, "attention_heads": 4, "attention_groups": 2,
            "init_std": 0.1, "vocab_multiple": 16,
        },
        "optimizer": {"lr": 2e-3, "warmup_steps": 2, "clip_grad": 0.5},
        "training": {
            "steps": 5, "global_batch_size": 8, "micro_batch_size": 2, "device": "cpu", "precision": "fp32",
            "log_every": 1, "eval_every": 0, "save_every": 0,
        },
    }  # fmt: skip
    for name, values in sections.items():
        base.setdefault(name, {}).update(values)
    return base
