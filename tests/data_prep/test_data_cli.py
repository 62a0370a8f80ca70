"""`dla data` from the command line: what goes wrong exits with 2 and one line, and leaves nothing behind."""

import errno
import fcntl
import json
import os
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dla.cli import main
from megatron_dla.data_prep.spool import lock
from megatron_dla.errors import DataError
from megatron_dla.shard_index import ShardIndex
from tests.support.sources import MALFORMED, MALFORMED_IDS, PACKED, TABLES, lines, save_arrow, save_dataset

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


@pytest.mark.parametrize(("name", "content", "where"), MALFORMED, ids=MALFORMED_IDS)
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


FIRST = "data-00000-of-00002.arrow"


def dataset(folder, **files):
    """A dataset of `save_to_disk` with some of its files replaced; None: deleted."""
    save_dataset(folder, ["a"], ["b"])
    for name, content in files.items():
        path = folder / {"first": FIRST, "state": "state.json"}[name]
        path.unlink()
        if isinstance(content, pa.Table):
            save_arrow(path, content)
        elif content is not None:
            path.write_bytes(content)
    return folder


def splits(folder, content):
    save_dataset(folder / "train", ["a"])
    (folder / "dataset_dict.json").write_text(content)
    return folder


def link(path, target):
    path.symlink_to(target)
    return path


def inside(folder, name, content):
    """`content` in a file below a directory that is the input."""
    path = folder / "deep" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return folder


def table(path, columns):
    (pq.write_table if path.suffix == ".parquet" else lambda table, path: save_arrow(path, table))(columns, path)
    return path


def twice(path):
    path.write_bytes(lines("a"))
    return [path, path]


def fifo(path):
    os.mkfifo(path)
    return path


STATES = [b"[]", b"{", b"\xff", b"{}", b'{"_data_files": "a"}', b'{"_data_files": [1]}', b'{"_data_files": [{"f": 1}]}']
STATES += [b'{"_data_files": [{"filename": %s}]}' % name for name in (b"5", b'"../x.arrow"', b'"/etc/passwd"')]
SPLITS = ["[]", "{", "{}", '{"splits": []}', '{"splits": "abc"}', '{"splits": [1]}', '{"splits": ["../train"]}']
MANY_FIELDS = json.dumps(dict.fromkeys(map(str, range(999)))).encode()
THIRD_BAD = b'{"text": "a"}\n\n{\n'
INPUTS = {
    **{f"state{i}": (lambda d, s=s: dataset(d / "ds", state=s), "ds/state.json: ") for i, s in enumerate(STATES)},
    **{f"splits{i}": (lambda d, s=s: splits(d / "ds", s), "ds/dataset_dict.json: ") for i, s in enumerate(SPLITS)},
    "no split": (lambda d: splits(d / "ds", '{"splits": ["gone"]}'), "ds/gone: missing"),
    "two splits": (lambda d: splits(d / "ds", '{"splits": ["a", "b"]}'), "ds: .*a, b"),
    "no file": (lambda d: dataset(d / "ds", first=None), f"ds/{FIRST}: missing"),
    "damaged file": (lambda d: dataset(d / "ds", first=b"junk"), f"ds/{FIRST}: cannot be read"),
    "other column": (lambda d: dataset(d / "ds", first=pa.table({"b": ["a"]})), f"ds/{FIRST}: no column"),
    "null row": (lambda d: dataset(d / "ds", first=pa.table({"text": ["a", None]})), f"ds/{FIRST}:2: .*null"),
    "empty": (lambda d: inside(d / "e", "x", b""), "e: no document"),
    "unknown": (lambda d: inside(d / "e", "x.csv", b"a"), "e: no document"),
    "missing": (lambda d: d / "x.jsonl", "x.jsonl: no such"),
    "below a file": (lambda d: twice(d / "x.jsonl")[0] / "y.jsonl", "x.jsonl/y.jsonl: no such"),
    "pattern": (lambda d: d / "*.jsonl", r"\*.jsonl: no file"),
    "twice": (lambda d: twice(d / "x.jsonl"), "x.jsonl: given twice"),
    "fifo": (lambda d: fifo(d / "x.jsonl"), "x.jsonl: neither"),
    "link": (lambda d: link(d / "x.jsonl", d / "gone"), "x.jsonl: a link to "),
    "loop": (lambda d: link(d / "x.jsonl", d / "x.jsonl"), "x.jsonl: a link to "),
    "link inside": (lambda d: link(inside(d / "e", "a.txt", b"a") / "x.txt", d / "gone").parent, "e/x.txt: a link to "),
    "no text": (lambda d: inside(d / "e", "x.jsonl", b"\n"), "e: no text"),
    "many fields": (lambda d: inside(d / "e", "x.jsonl", MANY_FIELDS), "x.jsonl:1: .*979 more"),
    **{
        f"line {end}": (lambda d, end=end, f=pack: inside(d / "e", f"x.jsonl{end}", f(THIRD_BAD)), f"x.jsonl{end}:3: ")
        for end, pack in PACKED.items()
    },
    **{
        f"{form} {i}": (lambda d, f=form, t=columns: table(d / f"x{f}", pa.table(t)), f"x{form}{where}")
        for form in (".parquet", ".arrow")
        for i, (columns, where) in enumerate(TABLES)
    },
    "two columns": (lambda d: table(d / "x.arrow", pa.table([["a"], ["b"]], ["text"] * 2)), "x.arrow: more than one"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "where"), INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("command", ["tokenizer", "shards"])
def test_malformed_directories_and_tables_are_one_line(tmp_path, tok, capsys, command, build, where):
    inputs = build(tmp_path)
    inputs = inputs if isinstance(inputs, list) else [inputs]
    rest = ("--tokenizer", tok, "--workers", 1) if command == "shards" else ("--vocab-size", 290)
    capsys.readouterr()
    assert dla(command, "--input", *inputs, "--output", tmp_path / "out", *rest) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "note:" not in line)
    assert re.search(where, line) and len(line) < 1000


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


def test_options_that_cannot_be_used(tmp_path, tok, capsys):
    source = corpus(tmp_path / "corpus") / "c.jsonl"
    build = ("shards", "--input", source, "--tokenizer", tok, "--output", tmp_path / "out")
    assert dla(*build, "--workers", 1) == 0
    data = tmp_path / "out"
    cases = [
        *(((*build, "--overwrite", "--workers", n), f"workers = {n}") for n in (0, 10**9, 10**10)),
        (("verify", data, "--workers", 10**9), "workers = 1000000000"),
        (("stats", data, "--workers", 0), "workers = 0"),
        ((*build, "--overwrite", "--text-field", "\udcff"), "text_field = "),
        ((*build, "--overwrite", "--separator", "\udcff"), "separator = "),
        (("show", data, 0, "--row", "--num-streams", 0), "num_streams = 0"),
        (("show", data, 0, "--seq-len", 9), "--seq-len = 9: "),
        (("stats", data, "--out", source), str(source)),
        (("tokenizer", "--input", source, "--output", source, "--vocab-size", 290), str(source)),
    ]
    for words, shown in cases:
        capsys.readouterr()
        assert dla(*words) == 2, words
        assert shown in capsys.readouterr().err


def test_outputs_that_cannot_be_written_are_refused_before_the_work(tmp_path, tok, monkeypatch, capsys):
    """Also where it is a URL, which would make a directory named `s3:`."""
    source, data = corpus(tmp_path / "c"), tmp_path / "data"
    assert dla("shards", "--input", source, "--tokenizer", tok, "--workers", 1, "--output", data) == 0
    (tmp_path / "file").write_text("x")
    (tmp_path / "locked").mkdir()
    monkeypatch.chdir(tmp_path)
    real = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: os.path.basename(path) != "locked" and real(path, mode))
    commands = (
        ("tokenizer", "--input", source, "--output"), ("shards", "--input", source, "--tokenizer", tok, "--output"),
        ("merge", data, "--output"), ("stats", data, "--out"),
    )  # fmt: skip
    before = sorted(tmp_path.iterdir())
    for words in commands:
        for out in ("file", "file/inside", "locked/new", "s3://bucket/data"):
            capsys.readouterr()
            assert dla(*words, out) == 2, (words, out)
            shown = capsys.readouterr()
            assert len(shown.err.splitlines()) == 1 and not shown.out
            assert out.split("/")[0] in shown.err
    for words in (("shards", "--tokenizer", tok, "--input"), ("merge",)):
        assert dla(*words, "https://host/data", "--output", tmp_path / "new") == 2
        assert "https:" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["tokenizer", "shards"])
def test_that_nothing_is_left_is_said_with_the_reason(tmp_path, tok, capsys, command):
    tokenizer = ("--tokenizer", tok) if command == "shards" else ()
    words = (command, "--input", corpus(tmp_path / "c"), *tokenizer, "--output", tmp_path / "out")
    assert dla(*words, "--min-chars", 100_000) == 2
    assert "60 documents under 100000 characters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["tokenizer", "shards"])
def test_no_file_and_no_directory_is_left_of_newlines_alone(tmp_path, tok, capsys, command):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "c.jsonl").write_bytes(lines("\n", "\n\n"))
    tokenizer = ("--tokenizer", tok, "--val-fraction", 0) if command == "shards" else ()
    code = dla(command, "--input", tmp_path / "c", *tokenizer, "--output", tmp_path / "out")
    assert code == (2 if command == "tokenizer" else 0)  # newlines are text, but nothing to learn tokens from
    if code:
        shown = capsys.readouterr().err
        assert (
            "c: no text in these inputs" in shown and "sentencepiece" not in shown and not (tmp_path / "out").exists()
        )


def test_input_may_be_given_several_times(tmp_path, tok):
    source = corpus(tmp_path / "corpus")
    (source / "d.jsonl").write_bytes(lines("another one"))
    out = tmp_path / "out"
    both = ("--input", source / "c.jsonl", "--input", source / "d.jsonl")
    assert dla("shards", *both, "--tokenizer", tok, "--output", out, "--workers", 1) == 0
    assert ShardIndex.load(out).totals().documents == 61


def test_files_of_others_are_never_deleted(tmp_path, tok, capsys):
    source, out = corpus(tmp_path / "corpus"), tmp_path / "out"
    (out / "train").mkdir(parents=True)
    mine = out / "train" / "train-000001.tar"
    mine.write_bytes(b"mine")
    part = tmp_path / "part"
    build = ("shards", "--input", source, "--tokenizer", tok, "--workers", 1, "--output")
    assert dla(*build, part) == 0
    for words in ((*build, out), (*build, out, "--overwrite"), ("merge", part, "--output", out)):
        capsys.readouterr()
        assert dla(*words) == 2 and str(mine) in capsys.readouterr().err
        assert mine.read_bytes() == b"mine" and [path.name for path in out.iterdir()] == ["train"]
    assert dla(*build, part, "--overwrite") == 0  # its own are replaced
    shard = part / "train" / "copy-of-mine.tar"
    shard.write_bytes(b"mine")
    assert dla(*build, part, "--overwrite") == 2 and shard.exists()


def test_a_merge_that_failed_halfway_can_be_done_again(tmp_path, tok, monkeypatch, capsys):
    from megatron_dla.data_prep import merge

    part, out = tmp_path / "part", tmp_path / "out"
    assert dla("shards", "--input", corpus(tmp_path / "c"), "--tokenizer", tok, "--workers", 1, "--output", part) == 0
    real, calls = merge._link, []

    def full(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(merge, "_link", full)
    assert dla("merge", part, "--output", out) != 0
    assert str(calls[1]) in capsys.readouterr().err and not (out / "index.json").exists()
    assert dla("merge", part, "--output", out) == 0 and not (out / ".merging").exists()
    assert dla("verify", out) == 0


def test_one_command_at_a_time_writes_to_a_directory(tmp_path, tok, capsys):
    part, out = tmp_path / "part", tmp_path / "out"
    build = ("shards", "--input", corpus(tmp_path / "c"), "--tokenizer", tok, "--workers", 1, "--output")
    merge = ("merge", part, "--output", out)
    assert dla(*build, part) == 0
    for name in (".building", ".built-0123", ".merging"):
        folder = out / name
        folder.mkdir(parents=True)
        with lock(folder):
            for words in (merge, (*build, out)):
                capsys.readouterr()
                assert dla(*words) == 2, words
                error = capsys.readouterr().err
                assert str(folder) in error and len(error.splitlines()) == 1
        assert [path.name for path in out.iterdir()] == [name]  # nothing else is written
        # the same command goes on when the other one has ended, another does not
        other, same = ((*build, out), merge) if name == ".merging" else (merge, (*build, out))
        assert dla(*other) == 2 and str(folder) in capsys.readouterr().err
        assert dla(*same) == 0 and not folder.exists() and dla("verify", out) == 0
        shutil.rmtree(out)


def test_a_lock_needs_a_file_system_with_locks_and_a_folder_that_is_kept(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refuse)
        lock(tmp_path).close()
        assert str(tmp_path.parent) in capsys.readouterr().err

    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.setattr(fcntl, "flock", lambda *_: shutil.rmtree(folder))  # its owner ends just then
    with pytest.raises(DataError, match="work/lock"):
        lock(folder)


def test_a_full_disk_is_named_before_a_map_is_written_to(tmp_path, monkeypatch):
    from megatron_dla.data_prep import layout

    assert layout.mapped(tmp_path / "x", "<u4", 3).tolist() == [0, 0, 0] and not len(
        layout.mapped(tmp_path / "y", bool, 0)
    )

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(layout.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as caught:
        layout.mapped(tmp_path / "z", "<u4", 3)
    assert caught.value.filename == str(tmp_path / "z")


def test_a_build_on_a_disk_that_is_really_full_goes_on(tmp_path, tok, disk, capsys):
    """One line with a file each time; at last the bytes of an undisturbed build."""
    options = "--input", corpus(tmp_path / "corpus", 3000), "--tokenizer", tok, "--workers", 1, "--shard-tokens", 20_000
    assert dla("shards", *options, "--output", tmp_path / "undisturbed") == 0
    capsys.readouterr()
    room = sum(path.stat().st_size for path in (tmp_path / "undisturbed").rglob("*") if path.is_file())
    filler, failed = disk / "filler", 0
    free = shutil.disk_usage(disk).free
    for share in (0.01, 0.1, 0.4, 0.8, 1.2, 4):
        filler.write_bytes(bytes(max(0, free - int(share * room))))
        code, printed = dla("shards", *options, "--output", disk / "data"), capsys.readouterr()
        filler.unlink()
        if code == 0:
            break
        failed += 1
        (line,) = (line for line in printed.err.splitlines() if "No space" in line)
        assert code == 1 and str(disk / "data") in line and "the same command goes on" in line
    assert failed >= 3 and code == 0
    for path in (tmp_path / "undisturbed").rglob("*"):
        copy = disk / "data" / path.relative_to(tmp_path / "undisturbed")
        assert not path.is_file() or copy.read_bytes() == path.read_bytes(), copy


def test_sizes_beyond_any_use_are_refused_at_once(tmp_path, tok, capsys):
    source = corpus(tmp_path / "corpus") / "c.jsonl"
    assert dla("shards", "--input", source, "--tokenizer", tok, "--workers", 1, "--output", tmp_path / "d") == 0
    os.mkfifo(tmp_path / "pipe")
    cases = [
        (("show", tmp_path / "d", 10**15, "--row", "--seq-len", 8, "--num-streams", 1), f"row {10**15}"),
        (("show", tmp_path / "d", 0, "--row", "--seq-len", 10**10, "--num-streams", 1), f"seq_len = {10**10}"),
        (("tokenizer", "--input", source, "--output", tmp_path / "t", "--vocab-size", 10**9), f"vocab_size = {10**9}"),
        (("shards", "--input", source, "--tokenizer", tmp_path / "pipe", "--output", tmp_path / "e"), "pipe"),
    ]
    for words, shown in cases:
        capsys.readouterr()
        assert dla(*words) == 2
        assert shown in capsys.readouterr().err
