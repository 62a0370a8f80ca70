"""Building shards: independence of the worker count, verification, and the command line."""

import argparse
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
import yaml

from megatron_dla import console
from megatron_dla.cli import main
from megatron_dla.data.shards import ShardReader
from megatron_dla.data_prep import shard_file
from megatron_dla.data_prep import shards as shards_module
from megatron_dla.data_prep.cli import add_data_parser
from megatron_dla.data_prep.shards import build_shards
from megatron_dla.data_prep.tokenizer import Tokenizer, train_tokenizer
from megatron_dla.data_prep.verify import verify_shards
from megatron_dla.errors import DataError
from megatron_dla.shard_index import MIN_TRAIN_SHARDS, ShardIndex
from tests.data.test_loader import rewrite_as_format_1
from tests.support import shipped


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
    return build_shards(
        [base / "d.jsonl"], base, out, **{"workers": 1, "shard_tokens": 500, "min_train_shards": 8, **options}
    )


def tree(root):
    """Files and contents, without those of an unfinished build."""
    files = {file.relative_to(root): file for file in sorted(root.rglob("*")) if file.is_file()}
    return {str(name): file.read_bytes() for name, file in files.items() if name.parts[0] != ".building"}


def test_shards_hold_every_document_once(base, tmp_path):
    index = build(base, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    found = {}
    for shard in index.shards:
        (sample,) = wds.WebDataset([str(tmp_path / shard.path)], shardshuffle=False)
        assert sample["__key__"] == shard.name.removesuffix(".tar")
        tokens, ends = (np.load(io.BytesIO(sample[name])) for name in ("tokens.npy", "ends.npy"))
        records = json.loads(sample["records.json"])
        assert tokens.dtype == np.uint16 and (tokens[ends - 1] == tokenizer.eos_id).all() and ends[-1] == shard.tokens
        for start, end, source, n_bytes in zip([0, *ends], ends, records["sources"], records["n_bytes"], strict=False):
            text = tokenizer.decode(tokens[start : end - 1].tolist())
            assert len(text.encode()) == n_bytes
            found[source] = text
        assert len(ends) == len(records["sources"]) == len(records["n_bytes"]) == shard.documents
    assert found == {f"d.jsonl:{i}": text for i, text in enumerate(texts(60), 1)}
    assert index.splits == ["train", "val"] and index.totals().documents == 60
    assert index.totals("val").documents >= 1 and index.totals("train").shards >= 8
    sizes = [shard.tokens for shard in index.split("train")]
    assert max(sizes) - min(sizes) <= 130  # no more than one document apart
    assert ShardIndex.load(tmp_path) == index


def test_shards_are_those_of_webdataset(base, tmp_path):
    build(base, tmp_path)
    for path in (tmp_path / "train").iterdir():
        (sample,) = wds.WebDataset([str(path)], shardshuffle=False)
        written = io.BytesIO()
        with wds.TarWriter(written, encoder=False, mtime=0) as writer:
            writer.write({name: value for name, value in sample.items() if name == "__key__" or name[0] != "_"})
        assert written.getvalue() == path.read_bytes()


def test_a_build_does_not_load_torch(base, tmp_path):
    code = "import sys; from megatron_dla.cli import main; assert not main(sys.argv[1:]) and 'torch' not in sys.modules"
    words = ("--input", base / "d.jsonl", "--tokenizer", base, "--output", tmp_path / "out", "--workers", 1)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, "data", "shards", *map(str, words)], check=True, env=environment)


def test_default_shards_suffice_for_the_streams_of_every_shipped_config(base, tmp_path, capsys):
    configs = [yaml.safe_load(path.read_text()) for path in shipped.RUNS]
    streams = [config["data"]["num_streams"] for config in configs if "num_streams" in config.get("data", {})]
    assert len(streams) > 4 and max(streams) <= MIN_TRAIN_SHARDS
    source = jsonl(tmp_path / "many.jsonl", texts(2 * MIN_TRAIN_SHARDS))
    index = build_shards([source], base, tmp_path / "many", workers=1)
    assert index.totals("train").shards == MIN_TRAIN_SHARDS and "note:" not in capsys.readouterr().err
    index = build_shards([base / "d.jsonl"], base, tmp_path / "few", workers=1)  # fewer documents than shards
    train = index.totals("train")
    assert train.shards == train.documents < MIN_TRAIN_SHARDS
    assert f"data.num_streams <= {train.shards}" in capsys.readouterr().err


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
    monkeypatch.setattr(shards_module, "write_shard", lambda *_: 1 / 0)
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
        ({"val_fraction": 1.0}, "val_fraction = 1.0"), ({"workers": 0}, "workers = 0"),
        ({"val_docs": 60}, "val_docs = 60"), ({"seed": -1}, "seed = -1"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            build(base, tmp_path / "c", **options)


def test_empty_documents_and_copies_are_reported(base, tmp_path, capsys):
    source = jsonl(tmp_path / "x.jsonl", ["a", "", "b", "a"])
    index = build_shards([source], base, tmp_path / "out", workers=1, val_fraction=0)
    shown = capsys.readouterr().err
    assert index.totals().documents == 3
    assert "1 empty documents" in shown and "1 documents that are exact copies" in shown


def test_verify_lists_every_problem(base, tmp_path):
    index = build(base, tmp_path)
    report = verify_shards(tmp_path)
    assert report.documents == 60 and report.tokens == index.totals().tokens and "60 documents" in str(report)
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
        assert "5 problems" in message and "dla data shards" in message
        problems = dict(line.strip().split(": ", 1) for line in message.splitlines()[1:])
        first, second, third = index.shards[:3]
        assert "sha256" in problems[first.path] and first.sha256 in problems[first.path]
        assert f"bytes {second.bytes}" in problems[second.path] and str(second.bytes - 1000) in problems[second.path]
        assert "No such file" in problems[third.path] and "train/train-999999.tar" in problems
        assert str(tmp_path / "tokenizer.model") in problems


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: np.where(np.arange(len(t)) == 0, 60000, t).astype(t.dtype), "token 60000 .* vocab_size 290"),
        (lambda t: t[::-1].copy(), "eos 2"),
        (lambda t: t[1:], "tokens [0-9]+, found [0-9]+"),
        (lambda t: t.astype(np.int64), "tokens of uint16, found int64"),
        (lambda t: np.where(np.arange(len(t)) == 0, 2, t).astype(t.dtype), "eos 2 at token 0"),
    ],
)
def test_deep_verify_checks_the_tokens(base, tmp_path, monkeypatch, change, words):
    real, calls = shard_file._npy, []

    def npy(tokens):
        calls.append(1)
        return real(change(tokens) if len(calls) == 1 else tokens)

    monkeypatch.setattr(shard_file, "_npy", npy)
    build(base, tmp_path)
    verify_shards(tmp_path, deep=False)
    with pytest.raises(DataError, match=words):
        verify_shards(tmp_path)


def test_index_errors(base, tmp_path):
    build(base, tmp_path)
    index = tmp_path / "index.json"
    good = json.loads(index.read_text())
    bad = [
        ("{", "double quotes"), (json.dumps({**good, "format_version": 9}), "format_version = 9"),
        (json.dumps({**good, "dtype": "int8"}), "dtype = 'int8'"), (json.dumps({**good, "extra": 1}), "extra"),
        (json.dumps({**good, "shards": good["shards"][:1] * 2}), "twice"), ("[]", "format_version = None"),
        (json.dumps({**good, "eos_id": "2"}), "eos_id = '2'"), (json.dumps({**good, "shards": []}), "shards is empty"),
        (json.dumps({**good, "shards": [{**good["shards"][0], "sha256": "../../x"}]}), "sha256 = '../../x'"),
    ]  # fmt: skip
    for text, words in bad:
        index.write_text(text)
        with pytest.raises(DataError, match=f"index.json.*{words}"):
            ShardIndex.load(tmp_path)
    index.unlink()
    with pytest.raises(DataError, match=r"index.json"):
        ShardIndex.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocab_size", -1), ("vocab_size", 10), ("vocab_size", 10**9), ("vocab_size", 291), ("vocab_size", None),
     ("tokenizer_sha256", None), ("tokenizer_sha256", "")],
)  # fmt: skip
def test_an_index_of_another_vocabulary_is_refused_wherever_the_tokenizer_counts(base, tmp_path, capsys, key, value):
    build(base, tmp_path / "data")
    index = tmp_path / "data" / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), key: value}))
    (tmp_path / "c.yaml").write_text(
        f"run: {{dir: {tmp_path}}}\ndata: {{dir: {tmp_path}/data, num_streams: 8}}\ntraining: {{device: cpu}}\n"
    )
    data = str(tmp_path / "data")
    for argv in (
        ["data", "verify", data], ["data", "show", data, "0"], ["data", "merge", data, "--output", str(tmp_path / "m")],
        ["train", str(tmp_path / "c.yaml"), "--dry-run"],
    ):  # fmt: skip
        capsys.readouterr()
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        line = error.splitlines()[0]
        assert line.startswith(f"dla {argv[0]}: ") and data in line, line
        assert (key.removeprefix("tokenizer_") in error) and str(value or "") in error, error
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("old", [False, True], ids=["format 2", "format 1"])
@pytest.mark.parametrize("content", [np.array(5, np.uint16), np.array("x"), np.zeros((2, 3), np.uint16)], ids=repr)
def test_arrays_of_another_shape_are_damage(base, tmp_path, old, content):
    """With checksums made right again: what the arrays hold is looked at too."""
    build(base, tmp_path)
    if old:
        rewrite_as_format_1(tmp_path)
    index = ShardIndex.load(tmp_path)
    path, out, array = tmp_path / index.shards[0].path, io.BytesIO(), io.BytesIO()
    np.save(array, content)
    with tarfile.open(path) as before, tarfile.open(fileobj=out, mode="w") as after:
        for member in before:
            held = array.getvalue() if member.name.endswith(".npy") else before.extractfile(member).read()
            member.size = len(held)
            after.addfile(member, io.BytesIO(held))
    path.write_bytes(out.getvalue())
    changed = replace(index.shards[0], bytes=len(out.getvalue()), sha256=hashlib.sha256(out.getvalue()).hexdigest())
    replace(index, shards=[changed, *index.shards[1:]]).save(tmp_path)
    reader = ShardReader(tmp_path, "train")
    with pytest.raises(DataError, match=index.shards[0].name):
        reader.read(reader.shards[0])
    assert main(["data", "verify", str(tmp_path)]) == 2 and main(["data", "stats", str(tmp_path)]) == 2


def test_progress_in_a_log_is_a_line_per_interval(monkeypatch):
    def updates(interval):
        monkeypatch.setattr(console, "LOG_INTERVAL_S", interval)
        log = io.StringIO()
        with console.progress_bar(1000, "tokenising", log) as bar:
            for _ in range(10):
                time.sleep(0.002)
                bar.update(100)
        assert "\r" not in log.getvalue()
        return log.getvalue().splitlines()

    lines = updates(0.0)
    assert (
        lines[5].startswith("tokenising:  50%") and "500/1.00k" in lines[5] and "B/s" in lines[5] and "left" in lines[5]
    )
    assert updates(3600.0) == []  # short work


def test_progress_on_a_terminal_is_redrawn_in_place():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with console.progress_bar(1000, "tokenising", Terminal()) as bar:
        bar.update(500)
        bar.refresh()
        shown = bar.fp.getvalue()
    assert "\n" not in shown and shown.split("\r")[-1].startswith("tokenising:  50%")


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
    assert "290 tokens" in shown and "40 documents" in shown and str(out) in shown
    with pytest.raises(SystemExit):
        dla("shards", "--help")
    assert "--min-train-shards" in capsys.readouterr().out
