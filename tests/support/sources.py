"""Input files of `dla data`: every format, compressed, as others save them, and damaged; and what is read of them."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from megatron_dla.data_prep.sources import DocumentSource, ReadOptions


def zstd(data: bytes, window_log: int = 0) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # no content size in the header
    return stream.compress(data) + stream.flush()


PACKED = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}


def lines(*texts, key="text") -> bytes:
    return b"".join(json.dumps({"id": i, key: text}).encode() + b"\n" for i, text in enumerate(texts))


def read(*inputs, **options):
    return named(DocumentSource(inputs, ReadOptions(**options)))


def named(source):
    return [(d.text, source.name(d.file, d.number)) for d in source]


def texts(*inputs, **options):
    return [text for text, _ in read(*inputs, **options)]


def save_arrow(path: Path, *tables: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)


def save_dataset(folder: Path, *shards: list[str], **state) -> Path:
    """The files of `datasets.Dataset.save_to_disk`."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_arrow(folder / name, pa.table({"text": shard}))
    files = [{"filename": name} for name in reversed(names)]  # the state's order counts, not that of the names
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "0", **state}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}, indent=2))
    return folder


PARQUET = pa.BufferOutputStream()
pq.write_table(pa.table({"text": [f"row {i}" for i in range(2000)]}), PARQUET)
PARQUET = PARQUET.getvalue().to_pybytes()
ARROW = pa.BufferOutputStream()
with pa.ipc.new_stream(ARROW, pa.schema({"text": pa.string()})) as stream:
    stream.write_table(pa.table({"text": ["x" * 50] * 99}))
ARROW = ARROW.getvalue().to_pybytes()
MALFORMED = [
    ("x.jsonl", b'{"text": "a"}\n{bad\n', ":2: .*JSON"),
    ("x.jsonl", b'{"text": "a"}\n{"text": "b"\n', ":2: .*JSON"),
    ("x.jsonl", b'{"text": "a"}\n"b"\n', ":2: a JSON str"),
    ("x.jsonl", b'["a"]\n', ":1: a JSON list.*jq"),
    ("x.jsonl", b'[{"text": "a"},\n', ":1: .*JSON"),
    ("x.jsonl", b"null\n", ":1: a JSON NoneType"),
    ("x.jsonl", b'{"body": "a"}\n', r":1: .*'text' .*\['body'\].*--text-field"),
    ("x.jsonl", b"{}\n", r":1: .*'text' .*\[\].*--text-field"),
    ("x.jsonl", b'{"text": 3}\n', ":1: .*'text' is int"),
    ("x.jsonl", b'{"text": null}\n', ":1: .*'text' is NoneType"),
    ("x.jsonl", b'{"text": ["a"]}\n', ":1: .*'text' is list"),
    ("x.jsonl", b'{"text": {"text": "a"}}\n', ":1: .*'text' is dict"),
    ("x.jsonl", b'{"text": "\\ud800"}\n', ":1: .*surrogate at character 0"),
    ("x.jsonl", b'\n{"text": "\xff"}\n', ":2: .*UTF-8 at byte 10"),
    ("x.jsonl", b'{"text": "a"}\n\x00\x00\n', ":2: .*JSON"),
    ("x.jsonl", b'{"text": "a\tb"}\n', ":1: .*JSON"),
    ("x.jsonl", b'{"text": "a"} {"text": "b"}\n', ":1: .*JSON"),
    ("x.jsonl", b'{"text": ' + b"[" * 100000 + b"\n", ":1: .*JSON"),
    ("x.jsonl", '{"text": "a"}'.encode("utf-16"), ":1: .*UTF-8 at byte 0"),
    ("x.ndjson", b'{"text": "a"}\n{bad\n', ":2: .*JSON"),
    ("x.ndjson.bz2", bz2.compress(b'{"text": "a"}\n{bad\n'), ":2: .*JSON"),
    ("x.json", b'{"text": "a"}\n{"text": 5}\n', ":2: .*'text' is int"),
    ("x.json", b'{\n "text": "a"\n}\n', ": not JSONL.*jq"),
    ("x.json", b'[{"text": "a"}]', ": not JSONL.*jq"),
    ("x.json.gz", gzip.compress(b'{"text": "a"}\n{bad\n'), ":2: .*JSON"),
    ("x.json.gz", b'{"text": "a"}\n', ": .*compress it again"),
    ("x.txt", b"ab\xff", ": .*UTF-8 at byte 2"),
    ("x.txt", "ab".encode("utf-16"), ": .*UTF-8 at byte 0"),
    ("x.txt.gz", gzip.compress(b"a\xff"), ": .*UTF-8 at byte 1"),
    ("x.txt.gz", gzip.compress(b"a" * 9, mtime=0)[:-9], ": .*compress it again"),
    ("x.txt.gz", b"", ": .*empty"),
    ("x.jsonl.bz2", b"", ": .*empty"),
    ("x.jsonl.zst", b"", ": .*empty"),
    ("x.jsonl.xz", b"", ": .*empty"),
    ("x.txt.gz", b"junkjunk", ": .*compress it again"),
    ("x.jsonl.gz", gzip.compress(lines("a"), mtime=0) + b"junkjunk", ": .*compress it again"),
    ("x.jsonl.gz", gzip.compress(lines(*["a"] * 999), mtime=0)[:60], ": .*compress it again"),
    ("x.jsonl.xz", b"junk", ": .*compress it again"),
    ("x.jsonl.xz", lzma.compress(lines("a"))[:-5], ": .*compress it again"),
    ("x.jsonl.bz2", b"junkjunk", ": .*compress it again"),
    ("x.jsonl.bz2", bz2.compress(lines("a"))[:-5], ": .*compress it again"),
    # Python's own readers take what is no stream for the end of the file
    *(
        (f"x.jsonl{end}", pack(lines("a")) + after, ": .*compress it again")
        for end, pack in ((".xz", lzma.compress), (".bz2", bz2.compress))
        for after in (b"junkjunk", b"\xff" * 4 + pack(lines("b"))[4:])
    ),
    ("x.jsonl.xz", lzma.compress(lines("a")) * 2 + lzma.compress(lines("b"))[:-5], ": .*middle of a frame"),
    ("x.parquet", PARQUET.replace(b"text", b"te\xffx"), ": .*compress it again"),
    (
        "x.arrow",
        ARROW.replace(b"\x32\0\0\0\x64\0\0\0", b"\x32\0\0\0\1\0\0\0"),
        ": .*compress it again",
    ),  # ends before its start
    (
        "x.arrow",
        ARROW.replace(b"\x32\0\0\0\x64\0\0\0", b"\x32\0\0\0\0\0\0\x7f"),
        ": .*compress it again",
    ),  # ends far beyond the data
    ("x.txt.zst", zstandard.ZstdCompressor().compress(bytes(range(256)) * 999)[:-4], ": .*middle of a frame"),
    ("x.txt.zst", b"junkjunk", ": .*compress it again"),
    ("x.jsonl.zst", zstd(lines("a")) + b"junkjunk", ": .*compress it again"),
    ("x.jsonl.zst", zstd(lines("a", "b"), 31)[:-3], ": .*middle of a frame"),
    ("x.parquet", b"", ": .*compress it again"),
    ("x.parquet", b"PAR1junkPAR1", ": .*compress it again"),
    ("x.parquet", PARQUET[:-20], ": .*compress it again"),
    ("x.parquet", PARQUET[:100] + b"\xff" * 400 + PARQUET[500:], ": .*compress it again"),
    ("x.parquet", lines("a"), ": .*compress it again"),
    ("x.arrow", b"", ": .*compress it again"),
    ("x.arrow", ARROW[: len(ARROW) // 2], ": .*compress it again"),
    ("x.arrow", lines("a"), ": .*compress it again"),
    ("x.arrow", ARROW[:-8], ": .*mark at the end.*compress it again"),
    ("x.csv", b"", ": .*format"),
    ("x.gz", gzip.compress(b"a"), ": .*format"),
    ("x", b"a", ": .*format"),
    ("x.parquet.gz", gzip.compress(PARQUET), ": .*format"),
]
TABLES = [
    ({"body": ["a"]}, r": no column 'text' .*\['body'\].*--text-field"),
    ({"text": [1]}, ": column 'text' is int64"),
    ({"text": [["a"]]}, ": column 'text' is list"),
    ({"text": [{"text": "a"}]}, ": column 'text' is struct"),
    ({"text": ["a", None]}, ":2: .*null"),
    ({"text": [b"a", b"b", b"\xff"]}, ":3: .*UTF-8 at byte 0"),
]


MALFORMED_IDS = [f"{i} {name}" for i, (name, *_) in enumerate(MALFORMED)]  # not the bytes: gzip's have the time
