"""Documents from files: formats, order, what is found through links, and errors that name the file and line."""

import errno
import glob
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_dla.data_prep import listing, readers
from megatron_dla.data_prep.sources import DocumentSource, ReadOptions
from megatron_dla.errors import DataError
from tests.support.sources import PACKED, lines, named, read, save_arrow, save_dataset, texts, zstd


def test_sources_read_every_format_in_sorted_order(tmp_path):
    line = json.dumps({"text": "h\xe9\r\n"}).encode() + b"\n"
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfplain\r\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 2, mtime=0))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(line + b"\n"))
    (tmp_path / "d.jsonl.zst").write_bytes(zstd(line) + zstd(line))
    (tmp_path / "readme.md").write_text("ignored")
    source = DocumentSource([tmp_path])
    documents = named(source)
    name = tmp_path.name
    assert [place for _, place in documents] == [
        f"{name}/a.jsonl.gz:1", f"{name}/a.jsonl.gz:2", f"{name}/b.txt", f"{name}/c.jsonl.xz:1",
        f"{name}/d.jsonl.zst:1", f"{name}/d.jsonl.zst:2",
    ]  # fmt: skip
    assert documents[2][0] == "plain\r\n" and next(iter(source)) == ("h\xe9\r\n", 5, 0, 1)
    assert len(list(source)) == 6
    assert source.bytes_read == source.total_bytes and source.counts.blank_lines == 1
    assert [path.name for path in source.listing.ignored] == ["readme.md"] and len(source.listing.notes()) == 1
    assert len(source.notes()) == 1


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("form", [".jsonl", ".ndjson", ".json", ".txt"])
def test_every_text_format_in_every_compression(tmp_path, form, packed):
    path = tmp_path / f"c4-train.00000-of-01024{form}{packed}"
    path.write_bytes(PACKED[packed](b"one" if form == ".txt" else lines("one", "two")))
    want = ["one"] if form == ".txt" else ["one", "two"]
    assert texts(path) == texts(tmp_path) == want


@pytest.mark.parametrize("packed", [end for end in PACKED if end])
def test_files_of_several_streams(tmp_path, packed):
    """As pbzip2, pigz, pzstd and `cat` make them; zeros may follow those of xz."""
    pack, path = PACKED[packed], tmp_path / f"x.jsonl{packed}"
    zeros = b"\0" * 8 if packed == ".xz" else b""
    path.write_bytes(zeros.join(pack(lines(text * 300_000)) for text in "abc") + zeros)
    assert texts(path) == [text * 300_000 for text in "abc"]


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstd_with_a_long_window(tmp_path, window_log):
    data = zstd(lines("one", "two"), window_log)
    assert zstandard.get_frame_parameters(data).window_size == 1 << window_log
    (tmp_path / "RC_2019-04.zst").write_bytes(data)
    assert texts(tmp_path) == texts(tmp_path / "RC_2019-04.zst") == ["one", "two"]


@pytest.mark.parametrize("packed", [end for end in PACKED if end])
def test_a_name_that_says_only_how_it_is_compressed(tmp_path, packed):
    """As Pushshift names its files: JSONL, if it holds that."""
    long = "x" * (3 << 20)  # more than is read at once
    (tmp_path / f"RS_2020-01{packed}").write_bytes(PACKED[packed](b"\n" + lines(long, "two")))
    (tmp_path / f"weights{packed}").write_bytes(PACKED[packed](b"\0\1{" * 1000))
    (tmp_path / f"object{packed}").write_bytes(PACKED[packed](b'{\n"text": "no"}'))
    (tmp_path / f"x.tar{packed}").write_bytes(PACKED[packed](lines("no")))
    source = DocumentSource([tmp_path])
    assert [d.text for d in source] == [long, "two"]
    assert sorted(p.name for p in source.listing.ignored) == [f"{n}{packed}" for n in ("object", "weights", "x.tar")]


def test_hidden_files_are_left_out_and_noted(tmp_path):
    for name in ("a.jsonl", "._a.jsonl", ".ipynb_checkpoints/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines(name))
    source = DocumentSource([tmp_path])
    assert [d.text for d in source] == ["a.jsonl"] and source.report()["ignored_files"] == 2
    assert "ignored 2 files and directories whose names begin with a dot" in " ".join(source.listing.notes())
    assert texts(tmp_path / ".ipynb_checkpoints") == [".ipynb_checkpoints/a.jsonl"]  # named
    assert DocumentSource([tmp_path, tmp_path / "._a.jsonl"], part=(1, 2)).report()["ignored_files"] == 0


@pytest.mark.parametrize("pattern", ["*/*.jsonl", "**/*.jsonl", "b/*.jsonl", "*"])
def test_directories_that_cannot_be_read_are_named_in_patterns_too(tmp_path, monkeypatch, pattern):
    for name in ("a/1.jsonl", "b/2.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(lines(name))

    def refusing(real):
        def call(path):
            if Path(path) == tmp_path / "b":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path)

        return call

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    with pytest.raises(DataError, match=r"/b: cannot be read \(Permission denied\)"):
        DocumentSource([tmp_path / pattern])


def test_json_files_that_are_not_lines_are_left_out_of_directories_and_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("one"))
    (tmp_path / "info.json").write_text(json.dumps({"text": "no"}, indent=2))
    (tmp_path / "array.json.gz").write_bytes(gzip.compress(b'[{"text": "no"}]'))
    source = DocumentSource([tmp_path])
    assert [d.text for d in source] == ["one"]
    assert sorted(path.name for path in source.listing.ignored) == ["array.json.gz", "info.json"]
    for name in ("info.json", "array.json.gz"):
        with pytest.raises(DataError, match=f"{name}: not JSONL"):
            DocumentSource([tmp_path / name])


def test_parquet_by_row_groups_and_column_name(tmp_path):
    table = pa.table({"body": [f"row {i}" for i in range(700)], "n": list(range(700))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    found = read(tmp_path, text_field="body")
    assert found == [(f"row {i}", f"{tmp_path.name}/a.parquet:{i + 1}") for i in range(700)]
    source = DocumentSource([tmp_path], ReadOptions("body"))
    seen = [source.bytes_read for _ in source]
    assert seen == sorted(seen) and seen[0] < seen[-1] == source.total_bytes


def test_few_long_rows_are_decoded_at_once(tmp_path, monkeypatch):
    rows = [f"{i} " + "x" * 5000 for i in range(90)]
    pq.write_table(pa.table({"text": rows, "n": rows}), tmp_path / "a.parquet", row_group_size=50, use_dictionary=False)
    save_arrow(tmp_path / "b.arrow", pa.table({"text": rows}))
    real, sizes = readers._cells, []
    monkeypatch.setattr(readers, "_cells", lambda batch, column: sizes.append(batch.num_rows) or real(batch, column))
    monkeypatch.setattr(readers, "_ROWS_BYTES", 20_000)
    monkeypatch.setattr(readers, "_ROWS", 30)
    for name in ("a.parquet", "b.arrow"):
        sizes.clear()
        assert texts(tmp_path / name) == rows and 1 < max(sizes) <= 4
    monkeypatch.setattr(readers, "_ROWS_BYTES", 100)
    assert texts(tmp_path) == rows * 2 and sizes[-1] == 1


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_columns_of_every_text_type(tmp_path, kind):
    table = pa.table({"text": pa.array(["a", "\xe9"]).cast(kind)})
    save_arrow(tmp_path / "a.arrow", table, table.slice(1))
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    assert texts(tmp_path) == ["a", "\xe9", "\xe9", "a", "\xe9"]
    if kind != pa.string_view():
        pq.write_table(table, tmp_path / "c.parquet")
        assert texts(tmp_path / "c.parquet") == ["a", "\xe9"]


def test_text_field_by_dotted_path(tmp_path):
    rows = [{"data": {"text": "in", "n": 1}}, {"data": {"text": "side", "n": 2}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    save_arrow(tmp_path / "c.arrow", pa.Table.from_pylist(rows))
    assert texts(tmp_path, text_field="data.text") == ["in", "side"] * 3
    (tmp_path / "a.jsonl").write_text('{"data.text": "dot", "data": {"text": "no"}}\n')
    assert texts(tmp_path / "a.jsonl", text_field="data.text") == ["dot"]
    for name in ("a.jsonl", "b.parquet", "c.arrow"):
        with pytest.raises(DataError, match=rf"{name}.*'data.body'.*\['data'.*--text-field"):
            texts(tmp_path / name, text_field="data.body")


def test_saved_dataset_in_the_order_of_its_state(tmp_path):
    folder = save_dataset(tmp_path / "corpus" / "ds", ["c", "d"], ["a", "b"])
    save_arrow(folder / "cache-123.arrow", pa.table({"text": ["left over"]}))
    assert texts(folder) == texts(tmp_path) == ["a", "b", "c", "d"]
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002.arrow: missing"):
        DocumentSource([tmp_path])


def test_links_are_followed_once(tmp_path):
    for name in ("elsewhere/wiki", "corpus/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.txt").write_text(name)
    (tmp_path / "blob").write_text("from a cache")
    corpus = tmp_path / "corpus"
    (corpus / "wiki").symlink_to(tmp_path / "elsewhere" / "wiki")
    (corpus / "again").symlink_to(corpus / "a")
    (corpus / "a" / "loop").symlink_to(corpus)
    (corpus / "hub.txt").symlink_to(tmp_path / "blob")
    source = DocumentSource([corpus])
    found = named(source)
    assert sorted(text for text, _ in found) == ["corpus/a", "elsewhere/wiki", "from a cache"]
    assert ("elsewhere/wiki", "corpus/wiki/x.txt") in found and ("from a cache", "corpus/hub.txt") in found
    assert len(source.listing.repeated) == 2 and "a second time" in " ".join(source.listing.notes())
    (corpus / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone.jsonl: a link to .*nowhere"):
        DocumentSource([corpus])
    with pytest.raises(DataError, match=r"gone.jsonl: a link to .*nowhere"):
        DocumentSource([corpus / "gone.jsonl"])


def test_patterns(tmp_path):
    for name in ("c/x/1.jsonl", "c/y/2.jsonl", "c/y/deep/3.jsonl", "c/y/4.txt", "c/odd[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines(name) if name.endswith("l") else name.encode())
    source = DocumentSource([tmp_path / "c" / "*" / "*.jsonl"])
    assert [place for _, place in named(source)] == ["c/x/1.jsonl:1", "c/y/2.jsonl:1"]
    assert {file.input for file in source.files} == {"c/*/*.jsonl"}
    assert texts(tmp_path / "c" / "**" / "*.jsonl") == ["c/x/1.jsonl", "c/y/2.jsonl", "c/y/deep/3.jsonl"]
    assert sorted(texts(tmp_path / "c" / "**")) == sorted(texts(tmp_path / "c"))
    assert texts(tmp_path / "c" / "odd[1].txt") == ["c/odd[1].txt"]  # a name, not a pattern
    for pattern in ("c/*.parquet", "c/x*/*.txt"):
        with pytest.raises(DataError, match="pattern"):
            DocumentSource([tmp_path / pattern])
    with pytest.raises(DataError, match="twice"):
        DocumentSource([tmp_path / "c", tmp_path / "c" / "*" / "*.jsonl"])


def test_what_a_link_names_again_is_read_once_by_patterns_too(tmp_path):
    for name in ("c/a/1.txt", "c/b/2.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c/b/again.txt").symlink_to(tmp_path / "c/a/1.txt")
    (tmp_path / "c/same").symlink_to(tmp_path / "c/a")
    for pattern in ("**", "*", "**/*.txt", "*/*.txt"):
        source = DocumentSource([tmp_path / "c" / pattern])
        assert sorted(text for text, _ in named(source)) == ["c/a/1.txt", "c/b/2.txt"], pattern
        assert tmp_path / "c/b/again.txt" in source.listing.repeated, pattern


def test_separator_and_its_hint(tmp_path, monkeypatch):
    stories = ["One.\n\nEnd.", " Two \xe9.", "Three."]
    for ends in ("\n", "\r\n"):
        (tmp_path / "s.txt").write_bytes(f"{ends}<|endoftext|>{ends}".join([*stories, ""]).encode())
        for block in (1 << 20, 7):  # a separator may lie across two blocks
            monkeypatch.setattr(readers, "_STORIES", block)
            found = read(tmp_path / "s.txt", separator="<|endoftext|>")
            assert found == [(story, f"s.txt:{i}") for i, story in enumerate(stories, 1)]
    source = DocumentSource([tmp_path])
    assert len(list(source)) == 1 and "--separator '<|endoftext|>'" in " ".join(source.notes())
    source = DocumentSource([tmp_path], ReadOptions(separator="###"))
    assert len(list(source)) == 1 and "none of the .txt files" in " ".join(source.notes())


def test_stories_around_the_blocks_of_reading(tmp_path, monkeypatch):
    stories = ["a" * n for n in (1, 7, 30, 2, 64, 5)]
    (tmp_path / "s.txt").write_text("\ufeff" + "<||>".join(stories))
    for block in range(3, 20):
        monkeypatch.setattr(readers, "_STORIES", block)
        assert texts(tmp_path / "s.txt", separator="<||>") == stories


@pytest.mark.parametrize("mark", ["|", "##", "abab"])
def test_stories_of_a_letter_are_those_of_splitting_the_whole_text(tmp_path, monkeypatch, mark):
    monkeypatch.setattr(readers, "_STORIES", 50)
    text = mark.join("ab#x"[i * i % 4] * (i % 3) for i in range(300)) + mark
    (tmp_path / "s.txt").write_text(text)
    assert texts(tmp_path / "s.txt", separator=mark) == [story for story in text.split(mark) if story]


def test_file_names_that_are_not_utf8_are_escaped(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt"), "wb") as file:
        file.write(b"a")
    assert read(tmp_path) == [("a", f"{tmp_path.name}/caf\\xe9.txt")]
    with open(os.path.join(os.fsencode(tmp_path), b"\xff.jsonl"), "wb") as file:
        file.write(b"{}\n")
    with pytest.raises(DataError, match=r"\\xff.jsonl:1: ") as caught:
        read(tmp_path)
    str(caught.value).encode()


def test_length_limits_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("", "ab", "abc", "abcd", "\xe9" * 5))
    source = DocumentSource([tmp_path], ReadOptions(min_chars=3, max_chars=4))
    assert [d.text for d in source] == ["abc", "abcd"]
    counts = source.counts
    assert (counts.empty, counts.too_short, counts.too_long, counts.documents, counts.records) == (1, 1, 1, 2, 5)
    assert len(source.notes()) == 3


def test_large_pages_of_a_parquet_file_are_noted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readers, "_PAGE_BYTES", 250_000)
    table = pa.table({"text": [f"{i} " + "a" * 1000 for i in range(300)], "other": ["b"] * 300})
    pq.write_table(table, tmp_path / "whole.parquet")
    pq.write_table(table, tmp_path / "small.parquet", row_group_size=200)
    assert len(texts(tmp_path / "small.parquet")) == len(texts(tmp_path / "whole.parquet")) == 300
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note:") and "whole.parquet" in note and "300 rows" in note and "row_group_size" in note


def test_source_arguments(tmp_path):
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    for inputs, key in (
        ([tmp_path / "none"], "none: .*--input"), ([], "inputs .*--input"),
        ([tmp_path, tmp_path / "x.txt"], "x.txt: .*twice"), ([tmp_path / "empty"], "empty: no document"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=key):
            DocumentSource(inputs)
    for options, key in (
        ({"text_field": ""}, "text_field = ''"), ({"skip_bad": 1.5}, "skip_bad = 1.5"),
        ({"min_chars": -1}, "min_chars = -1"), ({"min_chars": 5, "max_chars": 4}, "max_chars = 4: .* 5"),
        ({"max_chars": 0}, "max_chars = 0"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=key):
            ReadOptions(**options)


def test_patterns_through_directories_match_what_glob_does_and_links_in_a_circle_end(tmp_path):
    for name in ("a.jsonl", "x/b.jsonl", "x/y/c.jsonl", "x/y/.d.jsonl", ".h/e.jsonl", "x/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines(name))
    for pattern in ("**/*.jsonl", "**", "x/**/*", "**/y/*", "*/**/c.jsonl", "**/[xy]/*.jsonl", "**/.h/*.jsonl"):
        found = set(listing._below(tmp_path, tmp_path / pattern))
        want = {Path(path) for path in glob.glob(str(tmp_path / pattern), recursive=True)}
        assert found == want, pattern
    for name in ("one", "two"):
        (tmp_path / "x" / name).symlink_to("..", target_is_directory=True)
    names = [file.name for file in listing.Listing([tmp_path / "**/*.jsonl"]).files]
    assert [name.partition("/")[2] for name in names] == ["a.jsonl", "x/b.jsonl", "x/y/c.jsonl"]
