"""Loaders over a tiny corpus, and the global batches they make."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from megatron_dla.data import TokenLoader
from megatron_dla.data_prep.shards import build_shards
from megatron_dla.data_prep.tokenizer import train_tokenizer

T, ROWS, STREAMS = 16, 8, 4


def build_words(root: Path, name: str, seed: int, documents: int = 70, shards: int = 9) -> Path:
    """Documents of 1 to 40 random words in so many train shards; the tokenizer in `root` is made if there is none."""
    rng = random.Random(seed)
    words = ["alpha", "beta", "gamma", "\xe9", "42", "\n"]
    text = root / f"{name}.jsonl"
    with open(text, "w") as file:
        for i in range(documents):
            words_in = rng.choice([1, 3, 10, 40])
            file.write(json.dumps({"text": f"{i} " + " ".join(rng.choice(words) for _ in range(words_in))}) + "\n")
    if not (root / "tokenizer.model").exists():
        train_tokenizer([text], root, 290)
    build_shards([text], root, root / name, workers=1, shard_tokens=10**6, min_train_shards=shards, val_docs=9)
    return root / name


def loader(data: Any, rank: int = 0, size: int = 1, **options: Any) -> TokenLoader:
    defaults = {"seq_len": T, "global_batch_size": ROWS, "micro_batch_size": 1, "num_streams": STREAMS, "seed": 3}
    return TokenLoader(data, "train", **{**defaults, **options}, dp_rank=rank, dp_size=size)


def ranks(data: Any, size: int, **options: Any) -> list[TokenLoader]:
    return [loader(data, rank, size, **options) for rank in range(size)]


def global_steps(loaders: list[TokenLoader], steps: int) -> torch.Tensor:
    """[steps, ROWS, 2, T]: tokens and labels of all ranks, by row number."""
    out = []
    for _ in range(steps):
        rows = {}
        for one in loaders:
            for batch in one.next_step():
                for i, number in enumerate(batch.rows.tolist()):
                    assert number not in rows and number % STREAMS % one.dp_size == one.dp_rank
                    rows[number] = torch.stack([batch.tokens[i], batch.labels[i]])
        out.append(torch.stack([rows[i] for i in range(ROWS)]))
    return torch.stack(out)


def hashes(steps: torch.Tensor) -> list[bytes]:
    """Of each step's rows."""
    return [step.numpy().tobytes() for step in steps]
