"""Documents from files: formats, order, and errors that name the file and line."""

import gzip
import json
import lzma

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
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{bad\n', r"x\.jsonl:2: not a JSON object"),
        ("x.jsonl", b'{"body": "a"}\n', r"x\.jsonl:1: no field 'text' \(found \['body'\]\); .*--text-field"),
        ("x.jsonl", b'{"text": 3}\n', "field 'text' is int"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "lone surrogate"),
        ("x.jsonl", b'\n{"text": "\xff"}\n', r"x\.jsonl:2: not valid UTF-8"),
        ("x.txt", b"ab\xff", "not valid UTF-8 at byte 2"),
        ("x.txt.gz", gzip.compress(b"a" * 9, mtime=0)[:-9], "cannot be read|damaged compression"),
        ("x.jsonl.xz", b"junk", "cannot be read"),
        ("x.txt.zst", zstandard.ZstdCompressor().compress(bytes(range(256)) * 999)[:-4], "middle of a frame"),
        ("x.txt.zst", b"junkjunk", "damaged compression"),
        ("x.csv", b"", "unknown format"),
    ],
)
def test_source_errors(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(DocumentSource([tmp_path / name]))


def test_source_arguments(tmp_path):
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    for inputs, message in (
        ([tmp_path / "none"], "no such file"), ([], "no input"), ([tmp_path, tmp_path / "x.txt"], "given twice"),
        ([tmp_path / "empty"], "no .txt or .jsonl"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            DocumentSource(inputs)
