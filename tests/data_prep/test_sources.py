"""Documents from files: formats, order, and errors that name the file and line."""

import gzip
import json
import lzma
import re

import pytest
import zstandard

from megatron_dla.data_prep.sources import DocumentSource
from megatron_dla.errors import DataError


def test_sources_read_every_format_in_sorted_order(tmp_path):
    line = json.dumps({"text": "h\xe9\r\n"}).encode() + b"\n"
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfplain\r\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 2, mtime=0))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(line + b"\n"))
    frame = zstandard.ZstdCompressor().compress
    (tmp_path / "d.jsonl.zst").write_bytes(frame(line) + frame(line))
    (tmp_path / "readme.md").write_text("ignored")
    source = DocumentSource([tmp_path])
    documents = list(source)
    name = tmp_path.name
    assert [d.source for d in documents] == [
        f"{name}/a.jsonl.gz:1", f"{name}/a.jsonl.gz:2", f"{name}/b.txt", f"{name}/c.jsonl.xz:1",
        f"{name}/d.jsonl.zst:1", f"{name}/d.jsonl.zst:2",
    ]  # fmt: skip
    assert documents[2].text == "plain\r\n" and documents[0] == ("h\xe9\r\n", f"{name}/a.jsonl.gz:1", 5)
    assert source.bytes_read == source.total_bytes and source.blank_lines == 1
    assert [path.name for path in source.ignored] == ["readme.md"] and len(source.notes()) == 2


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("x.jsonl", b'{"text": "a"}\n{bad\n', ":2: .*JSON"),
        ("x.jsonl", b'{"body": "a"}\n', r":1: .*'text' .*\['body'\].*--text-field"),
        ("x.jsonl", b'{"text": 3}\n', ":1: .*'text' is int"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', ":1: .*surrogate at character 0"),
        ("x.jsonl", b'\n{"text": "\xff"}\n', ":2: .*UTF-8 at byte 10"),
        ("x.txt", b"ab\xff", ": .*UTF-8 at byte 2"),
        ("x.txt.gz", gzip.compress(b"a" * 9, mtime=0)[:-9], ": .*compress it again"),
        ("x.jsonl.xz", b"junk", ": .*compress it again"),
        ("x.txt.zst", zstandard.ZstdCompressor().compress(bytes(range(256)) * 999)[:-4], ": .*middle of a frame"),
        ("x.txt.zst", b"junkjunk", ": .*compress it again"),
        ("x.csv", b"", ": .*format"),
    ],
)
def test_source_errors(tmp_path, name, content, where):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{re.escape(name)}{where}"):
        list(DocumentSource([tmp_path / name]))


def test_source_arguments(tmp_path):
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    for inputs, key in (
        ([tmp_path / "none"], "none: .*--input"), ([], "inputs .*--input"),
        ([tmp_path, tmp_path / "x.txt"], "x.txt: .*twice"), ([tmp_path / "empty"], "empty: no .txt or .jsonl"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=key):
            DocumentSource(inputs)
