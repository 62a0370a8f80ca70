"""A build that is killed goes on where it was, with the bytes of an undisturbed one; the layout needs little memory."""

import errno
import gzip
import heapq
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dla.data_prep import layout, readers, shard_file, shards, spool, tokenise
from megatron_dla.data_prep.shards import build_shards
from megatron_dla.data_prep.sources import ReadOptions
from megatron_dla.data_prep.tokenizer import train_tokenizer
from megatron_dla.errors import DataError

SLOW = """
import sys, time
from megatron_dla.cli import main
from megatron_dla.data_prep import shards, tokenise
tokenise._CHUNK_BYTES, tokenise.COMMIT_S, real = 1500, 0, shards.write_shard
shards.write_shard = lambda *values: time.sleep(0.03) or real(*values)
main(sys.argv[1:])
"""
WORDS = ["alpha", "beta", "\xe9t\xe9", "42", "tab\t", "\n"]
ROOT = Path(__file__).parents[2]
FORK = multiprocessing.get_context("fork")


def write(path, n, seed=0, bad=()):
    rng = random.Random(seed)
    with path.open("w") as file:
        for i in range(n):
            text = None if i in bad else f"{i % 50} " + " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 60)))
            file.write(json.dumps({"text": text}) + "\n")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for name in "abc":
        write(root / f"{name}.jsonl", 150, seed=ord(name))
    (root / "d.txt").write_text("the end")
    texts = [json.loads(line)["text"] for name in "abc" for line in (root / f"{name}.jsonl").open()]
    pq.write_table(pa.table({"text": texts[:300], "n": range(300)}), root / "e.parquet", row_group_size=40)
    pq.write_table(pa.table({"text": texts[300:]}), root / "f.parquet")
    train_tokenizer([root / "a.jsonl"], root / "tok", 290)
    return root


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(tokenise, "COMMIT_S", 0)
    monkeypatch.setattr(tokenise, "_CHUNK_BYTES", 1500)
    monkeypatch.setattr(layout, "_BLOCK", 64)
    monkeypatch.setattr(layout, "_BUCKET", 100)


LINES, TABLES = ("a.jsonl", "b.jsonl", "c.jsonl", "d.txt"), ("e.parquet", "f.parquet")


def build(corpus, out, inputs=LINES, **options):
    return build_shards(
        [corpus / name for name in inputs], corpus / "tok", out,
        **{"workers": 1, "shard_tokens": 500, "min_train_shards": 8, "val_fraction": 0.1, **options},
    )  # fmt: skip


def tree(root):
    files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items()}


def killed(corpus, out, owner, name, calls, **options):
    """Whether a build was killed at the nth call of a function, before it did anything (negative: after)."""
    real, left = getattr(owner, name), [abs(calls)]

    def function(*args, **kwargs):
        left[0] -= 1
        if not left[0] and calls > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def child():
        setattr(owner, name, function)
        build(corpus, out, **options)

    process = FORK.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    build(corpus, out)
    return tree(out)


@pytest.mark.parametrize(
    "kills",
    [
        [(spool.Spool, "add", 3), (spool.Spool, "add", 5), (spool.Spool, "commit", 4), (spool.Spool, "commit", -2)],
        [(spool.json, "dumps", 12), (os, "fsync", 11)],
        [(layout, "_sorted_by_shard", 1), (shards, "mark_copies", -1), (shards, "assign", -1)],
        [
            (shard_file, "_npy", 9),
            (shards, "write_shard", -4),
            (shard_file, "file_sha256", 9),
            (shard_file, "_npy", 60),
        ],
        [(os, "replace", 5), (os, "replace", 4), (shards, "write_bytes", 1), (shards.ShardIndex, "save", 1)],
        [(spool.Spool, "add", 20), (shards, "write_shard", 7), (os, "replace", 8)],
    ],
)
def test_a_killed_build_goes_on_with_the_same_bytes(corpus, undisturbed, tmp_path, kills):
    for owner, name, calls in kills:
        assert killed(corpus, tmp_path, owner, name, calls)
        assert not (tmp_path / "index.json").exists()
    build(corpus, tmp_path)
    assert tree(tmp_path) == undisturbed


@pytest.mark.parametrize(
    "kills",
    [
        [(spool.Spool, "add", 4), (spool.json, "dumps", 20), (spool.Spool, "commit", -9), (shards, "assign", 1)],
        [(shards, "write_shard", 3), (shards, "write_shard", -5), (shard_file, "_npy", 7), (os, "replace", 9)],
    ],
)
def test_a_killed_build_of_parquet_goes_on_with_the_same_bytes(corpus, tmp_path, kills):
    build(corpus, tmp_path / "undisturbed", TABLES)
    out = tmp_path / "out"
    for owner, name, calls in kills:
        assert killed(corpus, out, owner, name, calls, inputs=TABLES)
        assert not (out / "index.json").exists()
    build(corpus, out, TABLES)
    assert tree(out) == tree(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "calls", [[(shutil, "rmtree", 1)], [(os, "rmdir", 1)], [(shutil, "rmtree", 1), (os, "rmdir", 2)]]
)
def test_a_build_that_is_killed_after_its_index_is_done(corpus, undisturbed, tmp_path, monkeypatch, capsys, calls):
    for owner, name, call in calls:
        assert killed(corpus, tmp_path, owner, name, call)
    (left,) = tmp_path.glob(".b*")
    encoded = count_encoded(monkeypatch)
    index = build(corpus, tmp_path)
    assert encoded == [] and "was complete" in capsys.readouterr().err
    assert index.totals().documents == 451 and tree(tmp_path) == undisturbed and not left.exists()
    with pytest.raises(DataError, match=r"index.json: exists"):
        build(corpus, tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_build_left_after_its_index_is_removed(corpus, undisturbed, tmp_path, overwrite):
    assert killed(corpus, tmp_path, shutil, "rmtree", 1, seed=1)
    if not overwrite:
        with pytest.raises(DataError, match=r"index.json: exists"):
            build(corpus, tmp_path)
        assert not list(tmp_path.glob(".b*"))
    build(corpus, tmp_path, overwrite=True)
    assert tree(tmp_path) == undisturbed


@pytest.mark.parametrize("inputs", [LINES, TABLES])
def test_process_groups_killed_while_they_read_and_while_they_write_shards(corpus, tmp_path, inputs):
    build(corpus, tmp_path / "undisturbed", inputs)
    out = tmp_path / "out"
    words = ["--output", out, "--tokenizer", corpus / "tok", "--val-fraction", 0.1, "--shard-tokens", 500]
    words += ["--min-train-shards", 8, "--workers", 2, "--input", *(corpus / name for name in inputs)]
    building = out / ".building"
    for log, lines in (("progress.jsonl", 3), ("shards.jsonl", 6), ("shards.jsonl", 12)):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *map(str, ["data", "shards", *words])], start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        while not (building / log).exists() or (building / log).read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "index.json").exists()
    build(corpus, out, inputs)
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_control_c_says_how_to_go_on(corpus, undisturbed, tmp_path, monkeypatch, capsys):
    def interrupted(self, *rest):
        real(self, *rest)
        if self.documents > 100:
            raise KeyboardInterrupt

    real = spool.Spool.add
    monkeypatch.setattr(spool.Spool, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(corpus, tmp_path)
    monkeypatch.undo()
    number = re.search(r"the same command goes on after (\d+) documents", capsys.readouterr().err)[1]
    build(corpus, tmp_path)
    assert f"going on after {number} documents" in capsys.readouterr().err
    assert tree(tmp_path) == undisturbed


def test_what_was_read_ahead_is_not_lost(corpus, undisturbed, tmp_path, monkeypatch):
    """Worker processes let reading run ahead of the spool."""

    def encoded(chunks, tokenizer, workers, seed):
        for documents, position in list(chunks):
            yield tokenise._encode(tokenizer, documents, seed), position

    monkeypatch.setattr(tokenise, "_encoded", encoded)
    assert killed(corpus, tmp_path, spool.Spool, "add", 5) and killed(corpus, tmp_path, spool.Spool, "add", 9)
    build(corpus, tmp_path)
    assert tree(tmp_path) == undisturbed


def test_kills_while_existing_data_is_replaced(corpus, undisturbed, tmp_path):
    build(corpus, tmp_path, seed=1, shard_tokens=200)
    before = tree(tmp_path)
    assert killed(corpus, tmp_path, shards, "write_shard", 3, overwrite=True)
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    assert killed(corpus, tmp_path, os, "replace", 6, overwrite=True)
    build(corpus, tmp_path, overwrite=True)
    assert tree(tmp_path) == undisturbed


def test_a_file_that_changed_is_read_again_with_those_after_it(corpus, tmp_path, monkeypatch):
    copy = tmp_path / "corpus"
    copy.mkdir()
    for path in corpus.iterdir():
        (copy / path.name).symlink_to(path)
    for name in "bc":
        (copy / f"{name}.jsonl").unlink()
        write(copy / f"{name}.jsonl", 150, seed=ord(name))
    assert killed(copy, tmp_path / "out", spool.Spool, "add", 30)  # in c.jsonl
    write(copy / "b.jsonl", 160, seed=9)
    encoded = count_encoded(monkeypatch)
    build(copy, tmp_path / "out")
    assert 310 <= len(encoded) < 340
    build(copy, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def count_encoded(monkeypatch):
    real, texts = tokenise._encode, []

    def encode(tokenizer, documents, seed):
        texts.extend(document.text for document in documents)
        return real(tokenizer, documents, seed)

    monkeypatch.setattr(tokenise, "_encode", encode)
    return texts


def test_bad_records_cost_no_work(corpus, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "corpus"
    copy.mkdir()
    for path in corpus.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "c.jsonl").unlink()
    write(copy / "c.jsonl", 100, bad=(7, 99))
    with pytest.raises(DataError, match=r"c.jsonl:8: (.|\n)*c.jsonl:100: (.|\n)*\.building"):
        build(copy, tmp_path / "out")
    encoded = count_encoded(monkeypatch)
    build(copy, tmp_path / "out", options=ReadOptions(skip_bad=0.1))
    assert encoded == []
    assert json.loads((tmp_path / "out" / "report.json").read_text())["bad"] == 2
    build(copy, tmp_path / "fresh", options=ReadOptions(skip_bad=0.1))
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


class Flaky:
    """A file that gives at most 500 bytes a read, and from the nth on an error."""

    def __init__(self, file, reads):
        self.file, self.left = file, reads

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def read(self, size=-1):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.EIO, "Input/output error")
        return self.file.read(min(size, 500) if size > 0 else size)


@pytest.mark.parametrize("form", ["c.txt", "c.jsonl.xz", "c.jsonl.gz", "c.parquet"])
@pytest.mark.parametrize("reads", [0, 2])
def test_a_read_error_that_passes_is_not_kept(corpus, tmp_path, monkeypatch, capsys, form, reads):
    text = (corpus / "c.jsonl").read_bytes()
    stories = [json.loads(line)["text"] for line in text.splitlines()]
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(form).suffix, bytes)
    (tmp_path / form).write_bytes(pack(text if "jsonl" in form else "##".join(stories).encode()))
    if form == "c.parquet":
        pq.write_table(pa.table({"text": stories}), tmp_path / form, row_group_size=40)
    inputs = [corpus / "a.jsonl", tmp_path / form, corpus / "b.jsonl"]
    options = ReadOptions(separator="##")
    build(corpus, tmp_path / "fresh", inputs, options=options)
    capsys.readouterr()

    def opened(path, mode="r"):
        return Flaky(open(path, mode), reads) if path == inputs[1] else open(path, mode)

    def cells(batch, column):  # pyarrow reads by itself
        batches.append(1)
        if len(batches) > reads:
            raise OSError(errno.EIO, "Input/output error")
        yield from real(batch, column)

    monkeypatch.setattr(readers, "_STORIES", 900)
    real, batches = readers._cells, []
    with monkeypatch.context() as patch:
        patch.setattr(readers, "open", opened, raising=False)
        patch.setattr(readers, "_cells", cells)
        for _ in range(2):
            with pytest.raises(DataError, match=rf"{form}: cannot be read.*Input/output error.*(.|\n)*\.building"):
                build(corpus, tmp_path / "out", inputs, options=options)
    encoded = count_encoded(monkeypatch)
    build(corpus, tmp_path / "out", inputs, options=options)
    assert 150 <= len(encoded) <= 300 - (80 if reads and form == "c.parquet" else 0)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_other_settings_start_over_and_other_sizes_do_not(corpus, undisturbed, tmp_path, monkeypatch, capsys):
    assert killed(corpus, tmp_path, shards, "write_shard", 9)
    encoded = count_encoded(monkeypatch)
    assert killed(corpus, tmp_path, shards, "write_shard", 5, shard_tokens=900)
    build(corpus, tmp_path, shard_tokens=700)
    assert encoded == [] and "going on after 451 documents" in capsys.readouterr().err
    build(corpus, tmp_path / "fresh", shard_tokens=700)
    fresh = tree(tmp_path / "fresh")
    assert {name: content for name, content in tree(tmp_path).items() if not name.startswith("fresh")} == fresh
    assert killed(corpus, tmp_path, spool.Spool, "add", 5, seed=1, overwrite=True)
    build(corpus, tmp_path, overwrite=True)
    assert "starting over, with another seed" in capsys.readouterr().err
    assert {name: content for name, content in tree(tmp_path).items() if not name.startswith("fresh")} == undisturbed


CHANGES = {
    "content": {},
    "name": {"inputs": ["b.jsonl", "renamed.jsonl"]},
    "another file": {"inputs": ["b.jsonl", "c.jsonl"]},
    "order": {"inputs": ["a.jsonl", "b.jsonl"]},
    "tokenizer": {"tokenizer": "tok2"},
    "seed": {"seed": 3},
    "min_chars": {"options": ReadOptions(min_chars=60)},
    "max_chars": {"options": ReadOptions(max_chars=200)},
    "text_field": {"options": ReadOptions(text_field="other")},
    "part": {"part": (1, 2)},
    "part of the same files": {"inputs": ["a.jsonl"]},
    "val_docs": {"val_docs": 7},
    "dedup": {"dedup": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_shards_of_another_build_are_not_kept(corpus, tmp_path, change):
    """Killed while it wrote shards, with sizes that the other build may well write too."""
    place = tmp_path / "in"
    place.mkdir()
    texts = [json.loads(line)["text"] for line in (corpus / "a.jsonl").open()]
    rows = [json.dumps({"text": text, "other": text[::-1]}) + "\n" for text in texts]
    for name in ("a", "b", "c"):
        (place / f"{name}.jsonl").write_text("".join(rows[: {"a": 100, "b": 120, "c": 140}[name]]))
    (place / "renamed.jsonl").write_text((place / "a.jsonl").read_text())
    for name in ("tok", "tok2"):
        train_tokenizer([str(place / "c.jsonl")], str(place / name), vocab_size=300 if name == "tok" else 310)

    def run(out, inputs=("b.jsonl", "a.jsonl"), tokenizer="tok", **options):
        sizes = {"workers": 1, "shard_tokens": 500, "min_train_shards": 20, "val_fraction": 0.1}
        build_shards([place / name for name in inputs], place / tokenizer, out, **sizes | options)

    def first():
        real, left = shards.write_shard, iter(range(12))
        shards.write_shard = lambda *values: real(*values) if next(left) < 9 else os.kill(os.getpid(), signal.SIGKILL)
        run(tmp_path / "out", **({"inputs": ["a.jsonl"], "part": (0, 2), "val_fraction": 1e-12} if one else {}))

    one = change.startswith("part of")
    process = FORK.Process(target=first)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(list((tmp_path / "out/.building").rglob("*.tar"))) == 9
    if change == "content":
        (place / "a.jsonl").write_text("".join(reversed(rows[:100])))
    options = CHANGES[change] | ({"val_fraction": 1e-12} if one else {})
    run(tmp_path / "out", **options)
    run(tmp_path / "fresh", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_damaged_remains_are_not_trusted(corpus, undisturbed, tmp_path):
    assert killed(corpus, tmp_path, spool.Spool, "add", 9)
    building = tmp_path / ".building"
    (building / "tokens").write_bytes((building / "tokens").read_bytes()[:100])  # less than was committed
    assert killed(corpus, tmp_path, spool.Spool, "add", 9)
    with open(building / "progress.jsonl", "a") as log:
        log.write('{"documents": 5')
    assert killed(corpus, tmp_path, spool.Spool, "add", 9)
    (building / "plan.json").write_text("[")
    build(corpus, tmp_path)
    assert tree(tmp_path) == undisturbed


def test_two_builds_of_one_directory(corpus, tmp_path):
    held = spool.Spool(tmp_path / ".building", np.dtype("<u2"), {}, [])
    with pytest.raises(DataError, match="another process"):
        build(corpus, tmp_path)
    held.close()
    build(corpus, tmp_path)


def random_records(n, seed):
    rng = np.random.default_rng(seed)
    records = np.zeros(n, dtype=spool.DOCUMENT)
    records["hash"] = rng.integers(0, 2**64, n, dtype=np.uint64)
    records["hash"][rng.integers(0, n, n // 4)] = records["hash"][rng.integers(0, n, n // 4)]
    records["n_tokens"] = rng.integers(1, 300, n)
    return records


def naive(records, dedup, val_fraction, val_docs, shard_tokens, least):
    """Documents of each shard by split: lists in memory."""
    hashes, seen, kept = records["hash"].tolist(), set(), []
    for i, value in enumerate(hashes):
        if not (dedup and value in seen):
            kept.append(i)
        seen.add(value)
    chosen = sum(hashes[i] < int(val_fraction * 2.0**64) for i in kept)
    chosen = val_docs if val_docs is not None else max(chosen, 1) if val_fraction > 0 else 0
    val = set(sorted(kept, key=lambda i: (hashes[i], i))[:chosen])
    out = {}
    for split, documents, at_least in (("train", [i for i in kept if i not in val], least), ("val", sorted(val), 1)):
        total = sum(int(records["n_tokens"][i]) for i in documents)
        shards = [[] for _ in range(min(max(math.ceil(total / shard_tokens), at_least, 1), len(documents)))]
        heap = [(0, shard) for shard in range(len(shards))]
        for i in documents:
            size, shard = heap[0]
            shards[shard].append(i)
            heapq.heapreplace(heap, (size + int(records["n_tokens"][i]), shard))
        if shards:
            out[split] = shards
    return out, len(hashes) - len(set(hashes))


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize(
    ("val_fraction", "val_docs"), [(0.1, None), (0, None), (1e-12, None), (0.5, None), (0.1, 0), (0.1, 1), (0.1, 37)]
)
@pytest.mark.parametrize("n", [3, 64, 65, 700])
def test_layout_is_that_of_lists_in_memory(tmp_path, dedup, val_fraction, val_docs, n):
    records = random_records(n, seed=n)
    if val_docs is not None and val_docs >= n:
        with pytest.raises(DataError, match=f"val_docs = {val_docs}"):
            layout.choose_validation(records, None, val_fraction, val_docs)
        return
    copies, count = layout.mark_copies(records, tmp_path)
    left_out = copies if dedup else None
    validation = layout.choose_validation(records, left_out, val_fraction, val_docs)
    made = layout.assign(records, left_out, validation, tmp_path, 500, 8)
    want, want_count = naive(records, dedup, val_fraction, val_docs, 500, 8)
    assert count == want_count and list(made.sizes) == list(want)
    assert [size for sizes in made.sizes.values() for size in sizes] == [len(s) for part in want.values() for s in part]
    assert made.members.tolist() == [i for part in want.values() for shard in part for i in shard]


def test_mapped_files_do_not_stay_in_memory(tmp_path):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    records = np.memmap(tmp_path / "documents", spool.DOCUMENT, "w+", shape=(1 << 19,))
    before = resident()
    records["hash"] = np.arange(len(records))
    written = resident()
    layout.release(records)
    assert written - before > records.nbytes / 2 > resident() - before
    assert int(records["hash"][-1]) == len(records) - 1
    for _ in layout._blocks(records):
        pass
    assert resident() - before < records.nbytes / 2


@pytest.mark.parametrize(("how", "early"), [(signal.SIGKILL, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_workers_end_with_a_killed_build(corpus, tmp_path, how, early):
    """Also with Ctrl-C, which a terminal sends to all of them: without their tracebacks. `early`: as they start."""
    code = "import signal, sys; from megatron_dla.cli import main\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main(sys.argv[1:]))"
    write(tmp_path / "a.jsonl", 20_000)
    arguments = ["data", "shards", "--input", tmp_path / "a.jsonl", "--tokenizer", corpus / "tok"]
    arguments += ["--output", tmp_path / "out", "--workers", "2"]
    slow = "import megatron_dla.data_prep.tokenise as t; t._CHUNK_BYTES = 50\n"
    path = [str(ROOT)]
    if early:  # a worker says that it has started, and takes a while to import
        at_start = "if any('spawn_main' in argument for argument in sys.orig_argv):\n"
        at_start += f"    pathlib.Path({str(tmp_path / 'started')!r}).touch()\n    time.sleep(3)\n"
        (tmp_path / "sitecustomize.py").write_text("import pathlib, sys, time\n" + at_start)
        path.insert(0, str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", slow + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "out/.building/documents"
    while not ((tmp_path / "started").exists() if early else log.exists() and log.stat().st_size):
        assert process.poll() is None
        time.sleep(0.02)
    assert early != bool(log.exists() and log.stat().st_size)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    for one in (*children, process) if how == signal.SIGINT else (process,):
        one.send_signal(how)
    error = process.communicate(timeout=60)[1]
    if how == signal.SIGINT:
        assert process.returncode == 130 and "goes on" in error and "Traceback" not in error, error
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    assert not alive
