"""Building shards: independence of the worker count, verification, and the command line."""

import argparse
import io
import json
import random

import numpy as np
import pytest
import webdataset as wds

from megatron_dla.data_prep import shards as shards_module
from megatron_dla.data_prep.cli import add_data_parser
from megatron_dla.data_prep.index import ShardIndex
from megatron_dla.data_prep.progress import Progress
from megatron_dla.data_prep.shards import build_shards
from megatron_dla.data_prep.tokenizer import Tokenizer, train_tokenizer
from megatron_dla.data_prep.verify import verify_shards
from megatron_dla.errors import DataError


def texts(n, seed=0):
    rng = random.Random(seed)
    words = ["alpha", "beta", "\xe9", "  x\n", "42", "\u2581", "tab\t"]
    return [f"{i} " + " ".join(rng.choice(words) for _ in range(rng.randrange(1, 60))) for i in range(n)]


def jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    jsonl(root / "d.jsonl", texts(60))
    train_tokenizer([root / "d.jsonl"], root, 290)
    return root


def build(base, out, **options):
    return build_shards([base / "d.jsonl"], base, out, **{"workers": 1, "shard_tokens": 500, **options})


def tree(root):
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def test_shards_hold_every_document_once(base, tmp_path):
    index = build(base, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    found = {}
    for shard in index.shards:
        samples = wds.WebDataset([str(tmp_path / shard.path)], shardshuffle=False)
        for number, sample in enumerate(samples):
            assert sample["__key__"] == f"{shard.name.removesuffix('.tar')}-{number:06d}"
            tokens = np.load(io.BytesIO(sample["npy"]))
            record = json.loads(sample["json"])
            assert tokens.dtype == np.uint16 and tokens[-1] == tokenizer.eos_id
            assert len(tokens) == record["n_tokens"]
            text = tokenizer.decode(tokens[:-1].tolist())
            assert len(text.encode()) == record["n_bytes"]
            found[record["source"]] = text
    assert found == {f"d.jsonl:{i}": text for i, text in enumerate(texts(60), 1)}
    assert index.splits == ["train", "val"] and index.totals().documents == 60
    assert index.totals("val").documents >= 1 and index.totals("train").shards >= 8
    sizes = [shard.tokens for shard in index.split("train")]
    assert max(sizes) - min(sizes) <= 130  # no more than one document apart
    assert ShardIndex.load(tmp_path) == index


def test_result_does_not_depend_on_workers(base, tmp_path, monkeypatch):
    from megatron_dla.data_prep import tokenise

    monkeypatch.setattr(tokenise, "_CHUNK_BYTES", 200)  # many chunks, so that workers overtake each other
    build(base, tmp_path / "one", workers=1)
    build(base, tmp_path / "two", workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_split_is_by_seed_and_content(base, tmp_path):
    index = build(base, tmp_path / "a", val_docs=7)
    assert index.totals("val").documents == 7
    other = build(base, tmp_path / "b", val_docs=7, seed=1)
    assert other.split("val")[0].sha256 != index.split("val")[0].sha256
    assert build(base, tmp_path / "c", val_fraction=0).splits == ["train"]
    assert build(base, tmp_path / "d", val_fraction=1e-9).totals("val").documents == 1
    twice = jsonl(tmp_path / "twice.jsonl", [text for text in texts(30) for _ in (0, 1)])
    index = build_shards([twice], base, tmp_path / "e", val_fraction=0.3, workers=1)
    assert index.totals("val").documents % 2 == 0 < index.totals("val").documents


def test_build_errors_leave_nothing_behind(base, tmp_path, monkeypatch):
    build(base, tmp_path / "a")
    before = tree(tmp_path / "a")
    with pytest.raises(DataError, match="--overwrite"):
        build(base, tmp_path / "a")
    monkeypatch.setattr(shards_module, "_write_shard", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(base, tmp_path / "a", overwrite=True)
    assert tree(tmp_path / "a") == before
    with pytest.raises(ZeroDivisionError):
        build(base, tmp_path / "b")
    assert tree(tmp_path / "b") == {}
    monkeypatch.undo()
    index = build(base, tmp_path / "a", overwrite=True, shard_tokens=10**6, min_train_shards=2)
    assert len(list((tmp_path / "a" / "train").iterdir())) == 2 == index.totals("train").shards
    for options, message in (
        ({"val_fraction": 1.0}, "val_fraction=1.0"), ({"workers": 0}, "workers=0"), ({"val_docs": 60}, "60 of 60"),
        ({"seed": -1}, "seed=-1"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            build(base, tmp_path / "c", **options)


def test_empty_documents_and_copies_are_reported(base, tmp_path, capsys):
    source = jsonl(tmp_path / "x.jsonl", ["a", "", "b", "a"])
    index = build_shards([source], base, tmp_path / "out", workers=1, val_fraction=0)
    shown = capsys.readouterr().err
    assert index.totals().documents == 3
    assert "skipped 1 empty documents" in shown and "1 documents are exact copies" in shown and "100%" in shown


def test_verify_lists_every_problem(base, tmp_path):
    index = build(base, tmp_path)
    report = verify_shards(tmp_path)
    assert report.documents == 60 and report.tokens == index.totals().tokens and "good" in str(report)
    paths = [tmp_path / shard.path for shard in index.shards]
    flipped = bytearray(paths[0].read_bytes())
    flipped[700] ^= 1  # a payload byte: tar itself does not notice
    paths[0].write_bytes(flipped)
    paths[1].write_bytes(paths[1].read_bytes()[:-1000])
    paths[2].unlink()
    (tmp_path / "train" / "train-999999.tar").write_bytes(b"")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    for deep in (True, False):
        with pytest.raises(DataError) as caught:
            verify_shards(tmp_path, deep=deep)
        message = str(caught.value)
        assert "5 problems; rebuild with `dla data shards" in message and "or copy it again" in message
        assert f"{index.shards[0].path}: sha256 want {index.shards[0].sha256}, found" in message
        assert f"{index.shards[1].path}: want {index.shards[1].bytes} bytes, found" in message
        assert f"{index.shards[2].path}: want" in message and "found none" in message
        assert "train-999999.tar: not in the index" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: np.where(np.arange(len(t)) == 0, 60000, t).astype(t.dtype), "token 60000, want below vocab_size"),
        (lambda t: t[::-1].copy(), "does not end with eos"),
        (lambda t: t[1:], "the index says tokens"),
        (lambda t: t.astype(np.int64), "is 1-d uint16, found 1-d int64"),
        (lambda t: np.where(np.arange(len(t)) == 0, 2, t).astype(t.dtype), "eos 2 inside"),
    ],
)
def test_deep_verify_looks_at_the_tokens(base, tmp_path, monkeypatch, change, message):
    real, calls = shards_module._npy, []

    def npy(tokens):
        calls.append(1)
        return real(change(tokens) if len(calls) == 1 else tokens)

    monkeypatch.setattr(shards_module, "_npy", npy)
    build(base, tmp_path)
    verify_shards(tmp_path, deep=False)
    with pytest.raises(DataError, match=message):
        verify_shards(tmp_path)


def test_index_errors(base, tmp_path):
    build(base, tmp_path)
    index = tmp_path / "index.json"
    good = json.loads(index.read_text())
    bad = [
        ("{", "not a readable index"), (json.dumps({**good, "format_version": 9}), "format_version is 9"),
        (json.dumps({**good, "dtype": "int8"}), "dtype is 'int8'"), (json.dumps({**good, "extra": 1}), "damaged index"),
        (json.dumps({**good, "shards": good["shards"][:1] * 2}), "listed twice"), ("[]", "format_version is None"),
        (json.dumps({**good, "eos_id": "2"}), "eos_id is '2'"),
    ]  # fmt: skip
    for text, message in bad:
        index.write_text(text)
        with pytest.raises(DataError, match=message):
            ShardIndex.load(tmp_path)
    index.unlink()
    with pytest.raises(DataError, match="no such index"):
        ShardIndex.load(tmp_path)


def test_progress_in_a_log_and_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, start in ((io.StringIO(), " 50%"), (Terminal(), "\r\033[K 50%")):
        progress = Progress(100, stream=stream, interval=0.0)
        progress.interval = 0.0
        progress.update(2, 1000, 50)
        assert stream.getvalue().startswith(f"{start}  2 documents") and " s left" in stream.getvalue()


def test_command_line(tmp_path, capsys):
    jsonl(tmp_path / "d.jsonl", texts(40))
    parser = argparse.ArgumentParser()
    add_data_parser(parser.add_subparsers())

    def dla(*words):
        args = parser.parse_args(["data", *map(str, words)])
        return args.func(args)

    tok, out = tmp_path / "tok", tmp_path / "out"
    assert dla("tokenizer", "--input", tmp_path / "d.jsonl", "--output", tok, "--vocab-size", 290) == 0
    assert dla("shards", "--input", tmp_path / "d.jsonl", "--tokenizer", tok, "--output", out, "--workers", 1) == 0
    assert dla("verify", out) == 0 and dla("verify", out, "--fast") == 0
    shown = capsys.readouterr().out
    assert "290 tokens, sha256" in shown and "8 shards" in shown and "9 shards good" in shown
    with pytest.raises(SystemExit):
        dla("shards", "--help")
    assert "--min-train-shards" in capsys.readouterr().out
