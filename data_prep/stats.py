"""What a data directory holds: tokens, documents, their lengths, and where they are from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_dla.data_prep.each_shard import for_each_shard
from megatron_dla.errors import DataError
from megatron_dla.files import atomic_path, write_json
from megatron_dla.shard_index import REBUILD, ShardIndex, ShardInfo, Totals

if TYPE_CHECKING:
    from megatron_dla.data.remote import RemoteDirectory
    from megatron_dla.data.shards import ShardReader

_OCTAVE = 64  # bins of lengths in each doubling: the percentiles are exact to 1.1 %
_BINS = 40 * _OCTAVE
_SOURCES = 10_000  # that are told apart; the documents of the others are counted together
_SHOWN = 20
OTHERS = "(others)"


@dataclass
class SourceCounts:
    """Of the documents of one source. `tokens` includes each eos, `text_bytes` is of UTF-8."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, other: SourceCounts) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes


@dataclass
class Lengths:
    """Tokens of documents, in bins that grow with the length. `bins` int64."""

    bins: np.ndarray = field(default_factory=lambda: np.zeros(_BINS, dtype=np.int64))
    documents: int = 0
    tokens: int = 0
    least: int = 0
    most: int = 0

    def add(self, lengths: np.ndarray) -> None:
        """Documents of these lengths, int64, each at least 1."""
        self.bins += np.bincount(np.floor(np.log2(lengths) * _OCTAVE).astype(np.int64), minlength=_BINS)
        self.least = min(self.least or int(lengths[0]), int(lengths.min()))
        self.most = max(self.most, int(lengths.max()))
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())

    def quantile(self, share: float) -> int:
        """The length that this share of the documents does not exceed, to 1.1 %."""
        place = int(np.searchsorted(np.cumsum(self.bins), math.ceil(share * self.documents)))
        return min(max(round(2 ** ((place + 0.5) / _OCTAVE)), self.least), self.most)

    def summary(self) -> dict[str, float]:
        """Smallest, largest, mean and percentiles."""
        at = {"median": 0.5, "p90": 0.9, "p99": 0.99}
        middle = {name: self.quantile(share) for name, share in at.items()}
        return {"min": self.least, **middle, "max": self.most, "mean": self.tokens / max(1, self.documents)}


@dataclass(frozen=True)
class Stats:
    """Of a data directory: totals of its splits from the index; lengths and sources of the shards that were read."""

    directory: Path | RemoteDirectory
    index: ShardIndex
    shards_read: int
    lengths: Lengths
    sources: dict[str, SourceCounts]

    def to_dict(self) -> dict[str, Any]:
        """For stats.json."""
        index = self.index
        return {
            "format_version": index.format_version, "vocab_size": index.vocab_size, "dtype": index.dtype,
            "splits": {split: asdict(index.totals(split)) for split in index.splits},
            "shards_read": self.shards_read, "document_tokens": self.lengths.summary(),
            "sources": {name: asdict(counts) for name, counts in self.sources.items()},
        }  # fmt: skip

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        index, total = self.index, len(self.index.shards)
        yield f"{self.directory}: format {index.format_version}, {index.vocab_size:,} tokens as {index.dtype}"
        splits = {split: index.totals(split) for split in index.splits}
        yield from _table(
            ["split", "shards", "documents", "tokens", "bytes of text", "bytes/token"],
            [[name, f"{t.shards:,}", *_cells(t)] for name, t in splits.items()],
        )
        seen = "" if self.shards_read == total else f" ({self.shards_read:,} of {total:,} shards were read)"
        values = ", ".join(f"{name} {value:,.0f}" for name, value in self.lengths.summary().items())
        yield f"tokens of a document{seen}: {values}"
        tokens = max(1, self.lengths.tokens)
        shown = list(self.sources.items())[:_SHOWN]
        yield from _table(
            ["source", "documents", "tokens", "bytes of text", "bytes/token", "share"],
            [[name, *_cells(counts), f"{counts.tokens / tokens:.2%}"] for name, counts in shown],
        )
        if rest := len(self.sources) - len(shown):
            yield f"and {rest:,} more sources"


def _cells(counts: SourceCounts | Totals) -> list[str]:
    per_token = counts.text_bytes / max(1, counts.tokens)
    return [f"{counts.documents:,}", f"{counts.tokens:,}", f"{counts.text_bytes:,}", f"{per_token:.2f}"]


def _table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        yield "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )


def data_stats(
    directory: str | os.PathLike[str], *, depth: int = 1, shards: int | None = None, workers: int | None = None,
) -> Stats:  # fmt: skip
    """Read the sizes and sources of all documents; of the shards of format 2, not the tokens.

    Args:
        depth: parts of a document's path that name its source: 1 is the input file or directory, 2 its subdirectories.
        shards: read only so many, evenly spaced. workers: threads; None: one per usable core.

    Memory does not grow with the documents, but for the names of up to 10,000 sources. Raises DataError for missing
    data, a damaged shard, and bad arguments.
    """
    from megatron_dla.data.remote import open_directory

    for name, value in (("depth", depth), ("shards", shards)):
        if value is not None and value < 1:
            raise DataError(f"{name} = {value}: must be at least 1")
    root = open_directory(directory)
    index = ShardIndex.load(root)
    if isinstance(root, Path) and root.is_file():
        root = root.parent
    chosen = _evenly(index.shards, shards)
    lengths, sources = Lengths(), dict[str, SourceCounts]()
    work = partial(_read, depth=depth)
    for _, (sizes, found) in for_each_shard(root, index, work, workers, chosen, "reading"):
        lengths.add(sizes)
        for name, counts in found.items():
            known = name in sources or len(sources) < _SOURCES
            sources.setdefault(name if known else OTHERS, SourceCounts()).add(counts)
    ordered = sorted(sources.items(), key=lambda item: (item[0] == OTHERS, -item[1].tokens, item[0]))
    return Stats(root, index, len(chosen), lengths, dict(ordered))


def _evenly(shards: Sequence[ShardInfo], count: int | None) -> Sequence[ShardInfo]:
    if count is None or count >= len(shards):
        return shards
    return [shards[i * len(shards) // count] for i in range(count)]


def _read(reader: ShardReader, shard: ShardInfo, depth: int) -> tuple[np.ndarray, dict[str, SourceCounts]]:
    """Tokens of each document, and the counts of each source."""
    from megatron_dla.data.shards import read_layout

    found: dict[str, SourceCounts] = {}
    try:
        with reader.open(shard) as file:
            ends, records = read_layout(file)
        sizes = np.diff(ends, prepend=0)
        if len(sizes) != shard.documents or len(records) != len(sizes) or sizes.min() < 1:
            raise ValueError(f"{len(sizes)} documents and {len(records)} records, expected {shard.documents}")
        for size, record in zip(sizes.tolist(), records, strict=True):
            counts = found.setdefault(_source(record["source"], depth), SourceCounts())
            counts.documents += 1
            counts.tokens += size
            counts.text_bytes += record["n_bytes"]
    except DataError:
        raise
    except Exception as error:  # tarfile, numpy and json raise many types for damaged bytes
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{reader.root}/{shard.path}: damaged shard ({what}); {REBUILD}") from error
    return sizes, found


def _source(place: str, depth: int) -> str:
    """`wiki` of `wiki/a/b.jsonl:12`, at depth 1."""
    name, _, number = place.rpartition(":")
    parts = (name if name and number.isdecimal() else place).split("/")
    return "/".join(parts[:depth])


def write_stats(stats: Stats, out: Path) -> list[Path]:
    """Write `stats.json` and `lengths.png` into the directory `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "stats.json", stats.to_dict(), indent=1)
    with atomic_path(out / "lengths.png", fsync=False) as part:
        _plot(stats, part)
    return [out / "stats.json", out / "lengths.png"]


def _plot(stats: Stats, path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise DataError("--out: the plot needs matplotlib; pip install matplotlib, or leave --out out") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    step = _OCTAVE // 4
    edges = 2.0 ** (np.arange(0, _BINS + 1, step) / _OCTAVE)
    documents = stats.lengths.bins.reshape(-1, step).sum(1)
    middle = np.sqrt(edges[:-1] * edges[1:])
    figure, axes = plt.subplots(figsize=(9, 4.5), constrained_layout=True)
    axes.stairs(documents / documents.sum(), edges, label="documents", fill=True, alpha=0.6)
    tokens = documents * middle
    axes.stairs(tokens / tokens.sum(), edges, label="tokens", linewidth=2)
    used = np.flatnonzero(documents)
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[used[0]], edges[used[-1] + 1])
    axes.set(
        title=f"Document lengths of {stats.directory}".replace("$", r"\$"),  # or it would be mathematics
        xlabel="tokens of a document",
        ylabel="share of documents, of tokens",
    )
    axes.legend()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
