"""`dla data` from the command line: what goes wrong exits with 2 and one line, and leaves nothing behind."""

import json
import os

import pytest

from megatron_dla.cli import main
from megatron_dla.shard_index import ShardIndex
from tests.data_prep.test_sources import MALFORMED, lines

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def dla(*words):
    return main(["data", *map(str, words)])


def corpus(folder, n=60):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "c.jsonl").write_bytes(lines(*(f"Document {i}. " + " ".join(WORDS[i % 7 :]) + ".\n" for i in range(n))))
    return folder


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    root = tmp_path_factory.mktemp("tok")
    source = corpus(root / "corpus")
    assert dla("tokenizer", "--input", source, "--output", root / "tok", "--vocab-size", 290) == 0
    return root / "tok"


@pytest.mark.parametrize(("name", "content", "where"), MALFORMED)
@pytest.mark.parametrize("command", ["tokenizer", "shards"])
def test_malformed_inputs_are_one_line_and_write_nothing(tmp_path, tok, capsys, command, name, content, where):
    source = corpus(tmp_path / "corpus")
    (source / name).write_bytes(content)
    out = tmp_path / "out"
    rest = ("--tokenizer", tok, "--workers", 1) if command == "shards" else ("--vocab-size", 290)
    capsys.readouterr()
    assert dla(command, "--input", source / "c.jsonl", source / name, "--output", out, *rest) == 2
    printed = [line for line in capsys.readouterr().err.splitlines() if "note:" not in line]
    assert len(printed) == 1 and str(source / name) in printed[0]
    if where.startswith(":") and where[1].isdigit():
        assert f"{source / name}{where.split(': ')[0]}:" in printed[0]
    assert not out.exists() or {path.name for path in out.iterdir()} <= {".building"}


def test_bad_lines_at_the_end_are_named_together_or_skipped(tmp_path, tok, capsys):
    source, out = corpus(tmp_path / "corpus"), tmp_path / "out"
    with open(source / "c.jsonl", "a") as file:
        file.write('{"text": null}\n{"text": 5}\n')
    build = ("shards", "--input", source, "--tokenizer", tok, "--output", out, "--workers", 1)
    assert dla(*build) == 2
    shown = capsys.readouterr().err
    assert "c.jsonl:61: " in shown and "c.jsonl:62: " in shown and "--skip-bad" in shown
    assert dla(*build, "--skip-bad") == 2 and "3.23%" in capsys.readouterr().err
    assert dla(*build, "--skip-bad", 0.05) == 0
    assert "skipped 2 bad records" in capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert (report["documents"], report["bad"], len(report["bad_records"])) == (60, 2, 2)
    assert ShardIndex.load(out).totals().documents == 60


def test_a_corpus_as_people_have_it(tmp_path, tok, capsys):
    """Links, file names that are not UTF-8, stories in one file, copies: all options in one build."""
    source, out = corpus(tmp_path / "corpus"), tmp_path / "out"
    elsewhere = corpus(tmp_path / "elsewhere", n=70)
    (source / "wiki").symlink_to(elsewhere)
    (source / "stories.txt").write_text("Once.\n<|endoftext|>\nTwice upon a time.\n<|endoftext|>\n")
    with open(os.path.join(os.fsencode(source), b"caf\xe9.txt"), "wb") as file:
        file.write(b"A cafe.")
    options = ("--separator", "<|endoftext|>", "--dedup", "--min-chars", 6, "--max-chars", 1000)
    build = ("--tokenizer", tok, "--output", out, "--workers", 1, "--val-docs", 1)
    assert dla("shards", "--input", source, *build, *options) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["duplicates"] == 60 and report["too_short"] == 1 and report["duplicates_removed"] is True
    assert ShardIndex.load(out).totals().documents == 70 + 1 + 1 == report["documents"] - report["duplicates"]
    assert dla("verify", out) == 0
    capsys.readouterr()
    assert dla("tokenizer", "--input", source, "--output", tmp_path / "tok2", "--vocab-size", 310) == 0
    assert "--separator" in capsys.readouterr().err
