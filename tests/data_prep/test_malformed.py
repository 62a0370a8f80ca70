"""Damaged and malformed input: what is named, counted, skipped and refused."""

import gzip
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dla.data_prep.sources import DocumentSource, ReadOptions
from megatron_dla.errors import DataError
from tests.support.sources import MALFORMED, MALFORMED_IDS, TABLES, lines, save_arrow, save_dataset, texts


def test_all_bad_records_are_named_at_once(tmp_path):
    good = lines(*["x"] * 20)
    (tmp_path / "a.jsonl").write_bytes(good + b'{"text": null}\n{"text": 5}\n' + good)
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(good * 50)[:-9])
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "d.parquet")
    source = DocumentSource([tmp_path])
    with pytest.raises(DataError) as caught:
        list(source)
    message = str(caught.value)
    for where in ("a.jsonl:21: ", "a.jsonl:22: ", "b.txt: ", "c.jsonl.gz: ", "d.parquet:2: "):
        assert where in message
    assert "1 files" in message and "4 of " in message
    (tmp_path / "c.jsonl.gz").unlink()
    with pytest.raises(DataError, match="--skip-bad"):
        texts(tmp_path)
    source = DocumentSource([tmp_path], ReadOptions(skip_bad=0.1))
    assert len(list(source)) == 41 and source.counts.bad == 4 and source.counts.records == 45
    assert "skipped 4 bad records" in " ".join(source.notes()) and "a.jsonl:21" in source.report()["bad_records"][0]
    with pytest.raises(DataError, match=r"4 of 45 .* 8.89%.* 0.08"):
        texts(tmp_path, skip_bad=0.08)


def test_damaged_files_are_never_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("a"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines(*["x"] * 9))[:-9])
    with pytest.raises(DataError, match=r"c.jsonl.gz: "):
        texts(tmp_path, skip_bad=1.0)


def test_the_list_of_bad_records_is_bounded_and_a_wrong_field_stops_early(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("x") + lines(*range(500)))
    with pytest.raises(DataError, match="500 of 501") as caught:
        texts(tmp_path)
    assert "a.jsonl:2 to 101: " in str(caught.value) and "and 400 more" in str(caught.value)
    (tmp_path / "a.jsonl").write_bytes(lines(*["x"] * 11_000, key="content"))
    for skip_bad, read in ((None, 100), (0.5, 10_000)):
        source = DocumentSource([tmp_path], ReadOptions(skip_bad=skip_bad))
        with pytest.raises(DataError, match="--text-field"):
            list(source)
        assert source.counts.records == read
    (tmp_path / "b.jsonl").write_bytes(lines("good"))
    assert texts(tmp_path, skip_bad=1) == ["good"]


def test_one_bad_record_above_the_limit_has_its_share(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("x", 5))
    with pytest.raises(DataError, match=r"1 of 2 records .* 50.00%, above --skip-bad 0.1.*\n.*a.jsonl:2: "):
        texts(tmp_path, skip_bad=0.1)


@pytest.mark.parametrize(("name", "content", "where"), MALFORMED, ids=MALFORMED_IDS)
def test_malformed_files(tmp_path, name, content, where):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{re.escape(name)}{where}") as caught:
        texts(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_an_arrow_stream_that_was_cut_between_two_batches(tmp_path):
    table = pa.table({"text": [f"{i}" for i in range(60)]})
    sink, ends = pa.BufferOutputStream(), []
    with pa.ipc.new_stream(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=10):
            writer.write_batch(batch)
            ends.append(sink.tell())
    content = sink.getvalue().to_pybytes()
    for end in (*ends, len(content)):
        (tmp_path / "x.arrow").write_bytes(content[:end])
        if end == len(content):
            assert len(texts(tmp_path / "x.arrow")) == 60
        else:
            with pytest.raises(DataError, match=r"x.arrow: .*mark at the end"):
                texts(tmp_path / "x.arrow")


def test_rows_of_an_arrow_file_outside_of_its_dictionary(tmp_path):
    damaged = pa.DictionaryArray.from_arrays(pa.array([0, 1, 10**9]), pa.array(["a", "b"]), safe=False)
    save_arrow(tmp_path / "x.arrow", pa.table({"text": damaged}))
    with pytest.raises(DataError, match=r"x.arrow: .*dictionary.*compress it again"):
        texts(tmp_path / "x.arrow")


@pytest.mark.parametrize("form", [".parquet", ".arrow"])
@pytest.mark.parametrize(("columns", "where"), TABLES)
def test_malformed_tables(tmp_path, form, columns, where):
    path = tmp_path / f"x{form}"
    save = pq.write_table if form == ".parquet" else lambda table, path: save_arrow(path, table)
    save(pa.table(columns), path)
    with pytest.raises(DataError, match=f"x{form}{where}") as caught:
        texts(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "module", "fix"),
    [("a.parquet", "pyarrow", r"megatron-dla\[data\]"), ("a.jsonl.zst", "zstandard", "pip install zstandard"),
     ("a.jsonl.bz2", "bz2", "Python"), ("a.jsonl.xz", "lzma", "Python")],
)  # fmt: skip
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, module, fix):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.parquet", raising=False)
    with pytest.raises(DataError, match=f"{name}: .*{module}.*{fix}"):
        texts(tmp_path / name)


def test_saved_dataset_errors(tmp_path):
    for split in ("train", "test"):
        save_dataset(tmp_path / "both" / split, [split])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"both: .*train, test.*--input"):
        DocumentSource([tmp_path / "both"])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    assert texts(tmp_path / "both") == ["test"]
    save_dataset(tmp_path / "selected", ["a"], _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match=r"selected: .*flatten_indices"):
        DocumentSource([tmp_path / "selected"])
    (tmp_path / "selected" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state.json: "):
        DocumentSource([tmp_path / "selected"])


def test_bad_records_in_a_row_are_one_line(tmp_path):
    rows = [5, "x", 5, 5, None, None, "y", 5]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows))
    (tmp_path / "b.jsonl").write_bytes(lines(*rows[:1]))
    with pytest.raises(DataError) as caught:
        texts(tmp_path)
    found = [line.partition(": ")[0].rpartition("/")[2] for line in str(caught.value).splitlines()[1:]]
    assert found == ["a.jsonl:1", "a.jsonl:3 to 4", "a.jsonl:5 to 6", "a.jsonl:8", "b.jsonl:1"]
