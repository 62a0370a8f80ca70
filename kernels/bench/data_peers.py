"""The libraries that `dla bench data` measures beside this package. Each is imported where it is used."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_dla.data import ShardReader

from .report import version

END = "<|endoftext|>"
SAMPLES = 50_000  # documents that are written as samples of webdataset
_NAMES = ("tokenizers", "sentencepiece", "datasets", "webdataset", "litdata")


def versions() -> dict[str, str | None]:
    return {name: version(name) for name in _NAMES}


def load_text(path: Path, cache: Path) -> Any:
    """A datasets.Dataset of a JSONL file."""
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))


def map_tokens(data: Any, tokenizer: Path, processes: int) -> Any:
    """The dataset with `tokens` instead of `text`, on disk, by the fastest call of tokenizers (without offsets)."""
    import tokenizers

    core = tokenizers.Tokenizer.from_file(str(tokenizer))
    options = {"core": core, "end": core.token_to_id(END)}
    return data.map(
        _encode, batched=True, fn_kwargs=options, num_proc=processes if processes > 1 else None,
        remove_columns=["text"], load_from_cache_file=False,
    )  # fmt: skip


def _encode(batch: dict[str, list[str]], core: Any, end: int) -> dict[str, list[list[int]]]:
    found = core.encode_batch_fast(batch["text"], add_special_tokens=False)
    return {"tokens": [[*one.ids, end] for one in found]}


def _documents(built: Path) -> Iterator[np.ndarray]:
    reader = ShardReader(built, "train")
    for shard in reader.shards:
        yield from reader.read(shard).split()


def read_webdataset(built: Path, place: Path, seq_len: int) -> Iterator[int]:
    """Tokens of each decoded sample, of which each is one document; nothing is packed or shuffled."""
    import webdataset as wds

    place.mkdir(parents=True)
    with wds.TarWriter(str(place / "samples.tar")) as writer:
        for i, tokens in enumerate(itertools.islice(_documents(built), SAMPLES)):
            writer.write({"__key__": f"{i:08d}", "npy": tokens})
    data = wds.WebDataset(str(place / "samples.tar"), shardshuffle=False).decode().repeat()
    return (len(sample["npy"]) for sample in data)


def read_datasets(built: Path, place: Path, seq_len: int) -> Iterator[int]:
    """Tokens of each 1,000 documents, as numpy arrays; nothing is packed or shuffled."""
    datasets = importlib.import_module("datasets")
    data = datasets.Dataset.from_generator(_rows, gen_kwargs={"built": built}, cache_dir=str(place))
    batches = (batch["tokens"] for _ in itertools.count() for batch in data.with_format("numpy").iter(1000))
    return (sum(map(len, tokens)) for tokens in batches)


def _rows(built: Path) -> Iterator[dict[str, np.ndarray]]:
    for tokens in _documents(built):
        yield {"tokens": tokens.astype(np.int32)}


def read_litdata(built: Path, place: Path, seq_len: int) -> Iterator[int]:
    """Tokens of each row, cut from the joined documents; nothing is shuffled."""
    litdata = importlib.import_module("litdata")
    litdata.optimize(
        _tensors, [str(built)], str(place), chunk_bytes="64MB", num_workers=1, item_loader=litdata.TokensLoader(),
        verbose=False,
    )  # fmt: skip
    data = litdata.StreamingDataset(str(place), item_loader=litdata.TokensLoader(block_size=seq_len + 1))
    return (len(row) - 1 for _ in itertools.count() for row in data)


def _tensors(built: str) -> Iterator[torch.Tensor]:
    for tokens in _documents(Path(built)):  # litdata takes a generator function only
        yield torch.from_numpy(tokens.astype(np.int32))


READERS: dict[str, Callable[[Path, Path, int], Iterator[int]]] = {
    "webdataset, a document a sample": read_webdataset,
    "datasets, 1,000 documents a batch": read_datasets,
    "litdata, TokensLoader": read_litdata,
}
