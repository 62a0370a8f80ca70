"""`dla bench data` at tiny sizes: what it measures and writes, and what it says of libraries that are missing."""

import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from megatron_dla.cli import main
from megatron_dla.data import ShardReader
from megatron_dla.data_prep.shards import build_shards
from megatron_dla.kernels.bench import data, data_memory, data_peers

PEERS = {
    "datasets.map, tokenizers": "datasets", "datasets, 1,000 documents a batch": "datasets",
    "litdata, TokensLoader": "litdata", "webdataset, a document a sample": "webdataset",
}  # fmt: skip
NUMBERS = {"tokenise": {"mb_s", "mb_cpu_s"}, "read": {"tokens_s", "tokens_cpu_s"}, "wait": {"share"}}


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Of the process, kept for the tests after these."""
    for name in ("TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE"):
        monkeypatch.setitem(os.environ, name, "false" if name[0] == "T" else "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def broken(*_):
    raise RuntimeError("does not work\nat all")


def test_every_measurement_has_a_record(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(data, "RANKS", 4)
    monkeypatch.setattr(data, "SEQ_LEN", 64)
    monkeypatch.setitem(data_peers.READERS, "webdataset, a document a sample", broken)
    options = [
        "--mb",
        "0.02",
        "--vocab-size",
        "400",
        "--workers",
        "1",
        "--budget",
        "0.01",
        "--steps",
        "1",
        "--repeats",
        "2",
    ]
    assert main(["bench", "data", *options, "--step-seconds", "0", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "data.json").read_text())
    assert results["vocab_size"] == 400 and results["characters"] == 20_000
    records, lines = results["records"], capsys.readouterr().out.splitlines()
    found = [(r["what"], r["name"], r["documents"]) for r in records]
    assert len(set(found)) == len(found) == 2 * (3 + 5 + 2) == len(lines) - 1
    for record in records:
        peer = PEERS.get(record["name"])
        if peer == "webdataset":
            assert record["missing"] == "RuntimeError: does not work"
        elif peer and importlib.util.find_spec(peer) is None:
            assert peer in record["missing"] and any(record["missing"] in one for one in lines)
        else:
            assert all(record[name] > 0 or record["what"] == "wait" for name in NUMBERS[record["what"]]), record


def test_the_middle_of_rounds() -> None:
    rounds = [{"mb_s": 1.0, "mb_cpu_s": 5.0}, {"mb_s": 9.0, "mb_cpu_s": 4.0}, {"mb_s": 2.0, "mb_cpu_s": 6.0}]
    assert data.middle(rounds) == {"mb_s": 2.0, "mb_cpu_s": 5.0, "mb_s_range": [1.0, 9.0]}
    assert data.middle([*rounds, {"missing": "why"}]) == {"missing": "why"}


def test_samples_of_webdataset_are_the_documents(tmp_path) -> None:
    text = tmp_path / "text.jsonl"
    data.write_documents(text, data.generated_text(9000), 100)
    tokenizer = data.train_tokenizers("some words, and some more of them", 300, tmp_path)["sentencepiece"]
    build_shards([text], tokenizer, tmp_path / "built", workers=1, val_fraction=0, min_train_shards=2)
    reader = ShardReader(tmp_path / "built", "train")
    sizes = [len(document) for shard in reader.shards for document in reader.read(shard).split()]
    found = data_peers.read_webdataset(tmp_path / "built", tmp_path / "samples", 64)
    assert len(sizes) == 90 and list(itertools.islice(found, 91)) == [*sizes, sizes[0]]
    data.repeat_shards(tmp_path / "built", tmp_path / "ranks", 5)
    again = ShardReader(tmp_path / "ranks", "train")
    stored = [reader.read(reader.shards[i % 2]).tokens.tolist() for i in range(5)]
    assert [again.read(shard).tokens.tolist() for shard in again.shards] == stored


@pytest.mark.parametrize(
    "options",
    [
        ["--memory", "1"],
        ["--mb", "0"],
        ["--repeats", "0"],
        ["--workers", "2", "0"],
        ["--budget", "nan"],
        ["--input", "/nowhere"],
    ],
)
def test_arguments_out_of_range(options, tmp_path: Path, capsys) -> None:
    assert main(["bench", "data", *options, "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert options[-1] in error and (options[0] in error or "/nowhere" in error)
    assert not (tmp_path / "new").exists()


def test_memory_of_a_build_and_of_a_larger_one(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delitem(data_memory.FORMATS, "jsonl.xz")
    options = ["--memory", "2", "--mb", "0.02", "--vocab-size", "300", "--workers", "1", "--out", str(tmp_path)]
    assert main(["bench", "data", *options]) == 0
    records = json.loads((tmp_path / "data_memory.json").read_text())["records"]
    assert [(r["name"], r["times"]) for r in records] == [("parquet", 1), ("parquet", 2)]
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert 0.02 <= records[0]["text_mb"] < 0.021 and 0.04 <= records[1]["text_mb"] < 0.041
    for record in records:
        assert 5 < record["anonymous_mb"] <= record["pss_mb"] <= record["rss_mb"] and record["main_mb"] > 20


def test_memory_of_all_processes_is_counted() -> None:
    code = "import subprocess, sys, time; held = bytearray(30_000_000); "
    child = code + "time.sleep(1)"
    found = data_memory.peak_memory([sys.executable, "-c", f"{code}subprocess.run([sys.executable, '-c', {child!r}])"])
    assert 28 < found["main_mb"] < 58 < found["pss_mb"] < 100
    with pytest.raises(RuntimeError, match="no such thing"):
        data_memory.peak_memory([sys.executable, "-c", "raise SystemExit('no such thing')"])
