"""`dla data stats`, `show` and `verify`, of both formats, of merged data and of data at a URL."""

import json
import re
import shutil

import numpy as np
import pytest

from megatron_dla.cli import main
from megatron_dla.data import TokenLoader
from megatron_dla.data_prep import stats as stats_module
from megatron_dla.data_prep import verify
from megatron_dla.data_prep.stats import Lengths, data_stats
from megatron_dla.data_prep.tokenizer import Tokenizer
from megatron_dla.data_prep.verify import verify_shards
from megatron_dla.errors import DataError
from megatron_dla.shard_index import ShardIndex
from tests.data.test_loader import rewrite_as_format_1
from tests.support.http_faults import FaultyServer
from tests.support.sources import lines


def dla(*words):
    return main(["data", *map(str, words)])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """{source: text} of the documents, and the data directory."""
    root = tmp_path_factory.mktemp("corpus")
    found = {}
    for name in ("wiki/a/x.jsonl", "wiki/b.jsonl", "web/c.jsonl"):
        texts = [f"{name} document {i}. " + "one two \xe9 " * (i * 7 % 40) for i in range(20)]
        path = root / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines(*texts))
        found |= {f"text/{name}:{i + 1}": text for i, text in enumerate(texts)}
    assert dla("tokenizer", "--input", root / "text", "--output", root / "tok", "--vocab-size", 300) == 0
    sizes = ("--min-train-shards", 4, "--val-fraction", 0.1, "--workers", 1)
    assert dla("shards", "--input", root / "text", "--tokenizer", root / "tok", "--output", root / "data", *sizes) == 0
    return found, root / "data"


@pytest.fixture(scope="module", params=["new", "old", "merged", "url"])
def data(request, texts, tmp_path_factory):
    """The data directory in several forms."""
    if request.param == "url":
        server = FaultyServer(texts[1])
        request.addfinalizer(server.close)
        return server.url
    copy = shutil.copytree(texts[1], tmp_path_factory.mktemp("copy") / "data")
    if request.param == "old":
        rewrite_as_format_1(copy)
    if request.param == "merged":
        assert dla("merge", texts[1], copy, "--output", copy.parent / "both") == 0
        return copy.parent / "both"
    return copy


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_stats_count_every_document_by_source(texts, data, tmp_path, capsys):
    by_source, directory = texts
    times = 2 if str(data).endswith("both") else 1
    assert dla("stats", data, "--out", tmp_path / "out", "--depth", 2) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "stats.json").read_text())
    tokenizer = Tokenizer(directory)
    for name in ("text/wiki", "text/web"):
        of_source = [text for source, text in by_source.items() if source.startswith(f"{name}/")]
        tokens = sum(len(tokenizer.encode(text)) + 1 for text in of_source)
        sizes = {"documents": len(of_source), "tokens": tokens, "text_bytes": sum(len(t.encode()) for t in of_source)}
        assert found["sources"][name] == {key: value * times for key, value in sizes.items()} and name in printed
    lengths = sorted(len(tokenizer.encode(text)) + 1 for text in by_source.values())
    at = found["document_tokens"]
    assert (at["min"], at["max"], at["mean"]) == (lengths[0], lengths[-1], pytest.approx(np.mean(lengths)))
    assert at["median"] == pytest.approx(lengths[29], rel=0.02) and at["p90"] == pytest.approx(lengths[53], rel=0.02)
    assert {split: t["tokens"] for split, t in found["splits"].items()}.keys() == {"train", "val"}
    assert sum(t["tokens"] for t in found["splits"].values()) == times * sum(lengths)
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_stats_of_some_shards_and_of_many_sources(texts, monkeypatch):
    _, directory = texts
    some = data_stats(directory, shards=2, workers=1)
    assert some.shards_read == 2 and some.lengths.documents < 60 and "2 of 5 shards" in str(some)
    assert set(some.sources) == {"text"} and set(data_stats(directory, depth=9).sources) == {
        "text/wiki/a/x.jsonl", "text/wiki/b.jsonl", "text/web/c.jsonl",
    }  # fmt: skip
    monkeypatch.setattr(stats_module, "_SOURCES", 1)
    few = data_stats(directory, depth=9)
    assert len(few.sources) == 2 and list(few.sources)[-1] == "(others)"
    assert sum(counts.documents for counts in few.sources.values()) == 60


def test_length_percentiles_do_not_keep_the_lengths():
    lengths, rng = Lengths(), np.random.default_rng(0)
    parts = [np.exp(rng.normal(6, 2, 1000)).astype(np.int64) + 1 for _ in range(5)] + [np.array([2**38])]
    for part in parts:
        lengths.add(part)
    everything = np.sort(np.concatenate(parts))
    for share in (0.01, 0.5, 0.9, 0.99):
        assert lengths.quantile(share) == pytest.approx(everything[int(share * 5001)], rel=0.012, abs=1)
    assert lengths.summary()["max"] == 2**38


def test_show_prints_the_text_of_a_document(texts, data, capsys):
    by_source, _ = texts
    shown = set()
    for number in (0, 11, 40):
        assert dla("show", data, number) == 0
        head, _, text = capsys.readouterr().out.partition("\n")
        source = head.split("(train): ")[1].split(",")[0]
        assert text.removesuffix("\n") == by_source[source]
        shown.add(source)
    assert len(shown) == 3
    assert dla("show", data, 0, "--split", "val") == 0 and "val/val-000000.tar" in capsys.readouterr().out


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_show_prints_the_rows_that_training_reads(texts, data, capsys, packing):
    _, directory = texts
    sizes = {"seq_len": 48, "num_streams": 4, "seed": 7}
    loader = TokenLoader(data, global_batch_size=8, micro_batch_size=8, packing=packing, **sizes)
    batches = [loader.next_step()[0] for _ in range(3)]
    options = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", value)]
    decode = Tokenizer(directory).decode
    for number in (0, 13, 22):
        assert dla("show", data, number, "--row", *options, "--packing", packing) == 0
        head, *parts = capsys.readouterr().out.removesuffix("\n").split("--- tokens ")
        batch, row = batches[number // 8], number % 8
        mask = batch.loss_mask[row].bool()
        assert head.startswith(f"row {number} of train") and f" {int(mask.sum())} of 48 tokens" in head
        starts = [c - row * 48 for c in batch.cu_seqlens.tolist() if row * 48 <= c < row * 48 + 48]
        assert [int(part.split()[0]) for part in parts] == starts
        for part, start, end in zip(parts, starts, [*starts[1:], 48], strict=True):
            if ", padding" in part:
                assert packing == "best_fit" and end == 48 and not mask[start:].any()
            else:
                text = part.partition(" ---\n")[2].removesuffix("\n" if end < 48 else "")
                assert text == decode(batch.tokens[row, start:end].tolist())
        assert all("cut at the end" not in part for part in parts[:-1])
    if packing == "concat":
        assert "goes on from the row before" in parts[0]


@pytest.mark.parametrize("row", [(), ("--row", "--seq-len", 32, "--num-streams", 2)])
def test_show_needs_the_tokenizer_of_the_shards(texts, tmp_path, capsys, row):
    """Another one gives another text, or an error of its own where its vocabulary is smaller."""
    _, directory = texts
    broken = shutil.copytree(directory, tmp_path / "broken")
    model = broken / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b"\x1a\x02\x18\x01")  # normalizer_spec { add_dummy_prefix: true }
    assert dla("show", broken, 0, *row) == 2
    assert str(model) in capsys.readouterr().err
    model.unlink()
    assert dla("show", broken, 0, *row) == 2
    assert f"{broken}: " in capsys.readouterr().err


def test_show_and_stats_errors(texts, tmp_path, capsys):
    _, directory = texts
    broken = shutil.copytree(directory, tmp_path / "broken")
    shard = ShardIndex.load(broken).split("train")[0]
    (broken / shard.path).write_bytes(b"x" * shard.bytes)
    for words, named in (
        (("show", directory, 999), "document 999: .* 0 to "), (("show", directory, -1, "--row"), "row -1"),
        (("show", directory, 0, "--split", "x"), "'x'"),
        (("show", directory, 0, "--row", "--seq-len", 0), "seq_len = 0"),
        (("show", directory, 0, "--row", "--packing", "x"), "packing = 'x'"),
        (("show", directory, 0, "--row", "--num-streams", 99), "num_streams = 99"),
        (("show", broken, 0), shard.path), (("stats", broken), shard.path), (("stats", tmp_path), "index.json"),
        (("stats", directory, "--depth", 0), "depth = 0"), (("stats", directory, "--shards", 0), "shards = 0"),
        (("verify", directory, "--workers", 0), "workers = 0"), (("verify", broken), shard.path),
    ):  # fmt: skip
        assert dla(*words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(named, line), (words, line)


def test_verify_finds_the_same_with_any_number_of_workers(texts, data, tmp_path, monkeypatch, capsys):
    _, directory = texts
    for words in ((), ("--fast",), ("--workers", 3)):
        assert dla("verify", data, *words) == 0
    assert "shards ok" in capsys.readouterr().out
    broken = shutil.copytree(directory, tmp_path / "broken")
    index = ShardIndex.load(broken)
    for shard in index.split("train")[::2]:
        (broken / shard.path).unlink()
    last = index.split("val")[-1]
    (broken / last.path).write_bytes(b"x" * last.bytes)
    messages = set()
    for workers in (1, 2, 8):
        with pytest.raises(DataError) as caught:
            verify_shards(broken, workers=workers)
        messages.add(str(caught.value))
    (message,) = messages
    assert "3 problems" in message and f"{last.path}: expected sha256 " in message
    monkeypatch.setattr(verify, "_LISTED", 1)
    with pytest.raises(DataError, match=r"3 problems(.|\n)*and 2 more$"):
        verify_shards(broken)
