"""Parts built apart make one data directory; a large index is read quickly."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dla.cli import main
from megatron_dla.data import TokenLoader
from megatron_dla.data_prep import merge
from megatron_dla.data_prep.verify import verify_shards
from megatron_dla.shard_index import ShardIndex, ShardInfo
from tests.support.sources import lines

ROOT = Path(__file__).parents[2]


def dla(*words):
    return main(["data", *map(str, words)])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    (root / "text").mkdir()
    for i in range(5):
        texts = [f"Document {i} {j}. " + "one two three four " * (j % 5) for j in range(30)]
        (root / "text" / f"{i}.jsonl").write_bytes(lines(*texts, *[f"copy {j}" for j in range(4)]))
    assert dla("tokenizer", "--input", root / "text", "--output", root / "tok", "--vocab-size", 290) == 0
    for i in range(3):
        assert dla("shards", *arguments(root), "--output", root / f"part{i}", "--part", f"{i}/3") == 0
    assert dla("shards", *arguments(root), "--output", root / "whole") == 0
    return root


def arguments(root):
    sizes = ("--min-train-shards", 2, "--val-fraction", 0.2, "--workers", 1)
    return ("--input", root / "text", "--tokenizer", root / "tok", *sizes)


def documents(data):
    """{split: {source}}, from the records of its shards."""
    from megatron_dla.data.shards import read_records

    found = {}
    for shard in ShardIndex.load(data).shards:
        records = read_records((data / shard.path).read_bytes())
        found.setdefault(shard.split, []).extend(record["source"] for record in records)
    return {split: sorted(sources) for split, sources in found.items()}


def test_parts_hold_each_document_of_the_whole_in_its_split(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    capsys.readouterr()
    assert dla("merge", *(corpus / f"part{i}" for i in range(3)), "--output", out) == 0
    assert "170 documents" not in capsys.readouterr().out.splitlines()[0]  # two splits
    assert documents(out) == documents(corpus / "whole")
    assert verify_shards(out).documents == 170
    report = json.loads((out / "report.json").read_text())
    assert (report["documents"], report["parts"], report["duplicates_removed"]) == (170, 3, False)
    assert os.stat(out / "train/train-000000.tar").st_nlink == 2
    loader = TokenLoader(out, seq_len=8, global_batch_size=4, micro_batch_size=4, num_streams=4)
    loader.next_step()
    assert dla("merge", corpus / "part0", "--output", out) == 2 and "--overwrite" in capsys.readouterr().err
    assert dla("merge", corpus / "part0", "--output", out, "--overwrite") == 0
    assert verify_shards(out).documents == 68


def test_a_part_takes_the_validation_documents_of_the_whole_and_no_other(tmp_path, capsys):
    """Where one build takes 2 of 100 documents, most of 10 parts have none."""
    (tmp_path / "text").mkdir()
    for i in range(10):
        text = "".join(json.dumps({"text": f"document {i} {j}"}) + "\n" for j in range(10))
        (tmp_path / "text" / f"{i}.jsonl").write_text(text)
    assert dla("tokenizer", "--input", tmp_path / "text", "--output", tmp_path / "tok", "--vocab-size", 280) == 0
    base = ("--input", tmp_path / "text", "--tokenizer", tmp_path / "tok", "--workers", 1, "--val-fraction", 0.02)
    assert dla("shards", *base, "--output", tmp_path / "whole") == 0
    parts = [tmp_path / f"part{i}" for i in range(10)]
    for i, part in enumerate(parts):
        assert dla("shards", *base, "--output", part, "--part", f"{i}/10") == 0
    assert dla("merge", *parts, "--output", tmp_path / "out") == 0
    assert documents(tmp_path / "out") == documents(tmp_path / "whole") and documents(tmp_path / "whole")["val"]
    capsys.readouterr()
    none = [part for part in parts if "val" not in documents(part)]
    assert dla("merge", *none, "--output", tmp_path / "none") == 0 and "eval_every" in capsys.readouterr().err


def test_that_copies_in_other_parts_stay_is_said(corpus, tmp_path, capsys):
    for i in range(2):
        build = ("--output", tmp_path / f"{i}", "--part", f"{i}/2", "--dedup")
        assert dla("shards", *arguments(corpus), *build) == 0
    assert "another part" not in capsys.readouterr().err
    assert dla("merge", tmp_path / "0", tmp_path / "1", "--output", tmp_path / "both") == 0
    assert "another part" in capsys.readouterr().err
    report = json.loads((tmp_path / "both" / "report.json").read_text())
    assert (report["duplicates_removed"], report["duplicates_between_parts_removed"]) == (True, False)
    assert dla("merge", tmp_path / "both", corpus / "part0", "--output", tmp_path / "more") == 0
    report = json.loads((tmp_path / "more" / "report.json").read_text())
    assert (report["parts"], report["duplicates_removed"]) == (
        3,
        False,
    ) and "another part" not in capsys.readouterr().err


def test_that_parts_have_other_seeds_is_said(corpus, tmp_path, capsys):
    for seed in (0, 3):
        assert dla("shards", *arguments(corpus), "--output", tmp_path / f"{seed}", "--seed", seed) == 0
    capsys.readouterr()
    assert dla("merge", tmp_path / "0", tmp_path / "3", "--output", tmp_path / "both") == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "seed" in line]
    assert note.startswith("note:") and f"{tmp_path / '3'} (3)" in note and "--dedup" in note


def texts(data):
    """{split: [tokens of each document]}, of a data directory."""
    from megatron_dla.data import ShardReader

    index = ShardIndex.load(data)
    found = {}
    for split in index.splits:
        reader = ShardReader(data, split)
        found[split] = sorted(x.tobytes() for shard in reader.shards for x in reader.read(shard).split())
    return found


@pytest.mark.parametrize("before", [(), ("--dedup",)])
def test_copies_in_different_parts_are_removed(corpus, tmp_path, capsys, before):
    for i in range(3):
        assert dla("shards", *arguments(corpus), "--output", tmp_path / f"{i}", "--part", f"{i}/3", *before) == 0
    assert dla("shards", *arguments(corpus), "--output", tmp_path / "once", "--dedup") == 0
    out = tmp_path / "out"
    capsys.readouterr()
    assert dla("merge", *(tmp_path / f"{i}" for i in range(3)), "--output", out, "--dedup", "--workers", 2) == 0
    assert "another part" not in capsys.readouterr().err
    assert texts(out) == texts(tmp_path / "once") != texts(corpus / "whole")
    assert verify_shards(out).documents == 154
    assert len({source for sources in documents(out).values() for source in sources}) == 154
    report = json.loads((out / "report.json").read_text())
    # 4 texts are in each of the 5 files, of which two parts have two
    assert report["duplicates_between_parts"] == 16 - (report["duplicates"] if before else 0)
    assert report["duplicates_removed"] and report["duplicates_between_parts_removed"]
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "once").iterdir()}
    links = [os.stat(out / shard.path).st_nlink for shard in ShardIndex.load(out).shards]
    assert {1, 2} == set(links)  # written again, and linked


def test_a_shard_of_nothing_but_copies_is_left_out_and_a_damaged_one_named(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(corpus / "part0", tmp_path / "again")
    assert dla("merge", corpus / "part0", tmp_path / "again", "--output", out, "--dedup") == 0
    assert texts(out) == {split: sorted(set(found)) for split, found in texts(corpus / "part0").items()}
    shard = tmp_path / "again/train/train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    before = (out / "index.json").read_bytes()
    for place in (out, tmp_path / "new"):
        capsys.readouterr()
        assert dla("merge", tmp_path / "again", "--output", place, "--dedup", "--overwrite") == 2
        assert "again/train/train-000001.tar" in capsys.readouterr().err
    assert (out / "index.json").read_bytes() == before and not (tmp_path / "new").exists()


def test_that_a_part_is_a_copy_of_another_is_said(corpus, tmp_path, capsys):
    copy = shutil.copytree(corpus / "part1", tmp_path / "copy")
    assert dla("merge", corpus / "part0", corpus / "part1", "--output", tmp_path / "a") == 0
    assert "copies" not in capsys.readouterr().err
    assert dla("merge", corpus / "part1", copy, "--output", tmp_path / "b") == 0
    shards = len(ShardIndex.load(copy).shards)
    assert f"note: {shards} shards are copies" in capsys.readouterr().err


def test_parts_on_another_file_system_are_copied(corpus, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(merge.os, "link", no_links)
    assert dla("merge", corpus / "part0", corpus / "part1", "--output", tmp_path) == 0
    assert os.stat(tmp_path / "train/train-000000.tar").st_nlink == 1
    verify_shards(tmp_path)


def test_a_part_that_is_missing_is_named(corpus, tmp_path, capsys):
    parts = [corpus / f"part{i}" for i in range(3)]
    assert dla("merge", parts[0], parts[2], "--output", tmp_path / "two") == 0
    assert "note: parts 1/3 are not" in capsys.readouterr().err
    assert dla("merge", tmp_path / "two", parts[1], "--output", tmp_path / "all") == 0
    assert dla("merge", corpus / "whole", "--output", tmp_path / "one") == 0
    assert "are not" not in capsys.readouterr().err
    shutil.copytree(parts[0], tmp_path / "other")  # stands for part 0 of another corpus
    assert dla("merge", *parts, tmp_path / "other", "--output", tmp_path / "corpora") == 0
    assert "note: parts 1/3, 2/3 are not" in capsys.readouterr().err


@pytest.mark.parametrize("dedup", [(), ("--dedup",)])
def test_a_merge_that_is_killed_after_its_index_is_done(corpus, tmp_path, monkeypatch, capsys, dedup):
    out, parts = tmp_path / "out", [corpus / f"part{i}" for i in range(3)]

    def killed():
        with monkeypatch.context() as patch:
            patch.setattr(merge.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            assert dla("merge", *parts, "--output", out, *dedup) == 130 and (out / ".merging").exists()

    killed()
    before = (out / "index.json").read_bytes()
    assert dla("merge", *parts[:2], "--output", out, *dedup) == 2  # another merge; what was left is removed
    assert "index.json: exists" in capsys.readouterr().err and not (out / ".merging").exists()
    shutil.rmtree(out)
    killed()
    monkeypatch.setattr(merge.os, "link", None)  # nothing is done again
    assert dla("merge", *parts, "--output", out, *dedup) == 0
    assert "was complete" in capsys.readouterr().err
    assert (out / "index.json").read_bytes() == before and not (out / ".merging").exists()


def test_merge_errors(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(corpus / "part0", tmp_path / "other")
    index = json.loads((tmp_path / "other/index.json").read_text())
    cases = [
        ((corpus / "part0", tmp_path / "none"), "none"), ((corpus / "part0", corpus / "part0"), "part0: given twice"),
        ((out,), "out: "),
    ]  # fmt: skip
    (tmp_path / "other/index.json").write_text(json.dumps({**index, "tokenizer_sha256": "00"}))
    cases.append(((corpus / "part0", tmp_path / "other"), "tokenizer_sha256 = '00'"))
    shutil.copytree(corpus / "part1", tmp_path / "short")
    (tmp_path / "short/train/train-000001.tar").write_bytes(b"")
    cases.append(((corpus / "part0", tmp_path / "short"), "short/train/train-000001.tar: expected bytes"))
    for name, file, content in (("report", "report.json", b"{"), ("model", "tokenizer.model", b"x")):
        shutil.copytree(corpus / "part1", tmp_path / name)
        (tmp_path / name / file).write_bytes(content)
        cases.append(((tmp_path / name, corpus / "part0"), f"{name}/{file}: "))
    for parts, words in cases:
        capsys.readouterr()
        assert dla("merge", *parts, "--output", out) == 2
        shown = capsys.readouterr().err
        assert words in shown and len(shown.splitlines()) == 1 and not out.exists()
    assert dla("shards", *arguments(corpus), "--output", out, "--part", "5/6") == 2
    assert "5 files" in capsys.readouterr().err
    for part in ("3/3", "a", "1", "-1/3"):
        with pytest.raises(SystemExit) as stopped:
            dla("shards", *arguments(corpus), "--output", out, f"--part={part}")
        assert stopped.value.code == 2 and "--part" in capsys.readouterr().err


def test_the_slurm_array_builds_parts_and_merges_them(corpus, tmp_path):
    """With an srun that runs its command."""
    srun = tmp_path / "bin/srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\nshift\nexec "$@"\n')
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
    environment = {
        **os.environ, "PATH": f"{srun.parent}:{os.environ['PATH']}", "DLA_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip

    def submit(*words, task="0", tasks="3"):
        array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": tasks}
        script = ["bash", str(ROOT / "slurm/data.sbatch"), *map(str, words)]
        result = subprocess.run(script, env=environment | array, capture_output=True, text=True)
        return result.returncode, result.stderr

    out = tmp_path / "out"
    build = ("build", out, *arguments(corpus))
    assert submit("merge", out)[0] == 2
    for task in ("0", "1", "1"):  # the last one is requeued
        assert submit(*build, task=task)[0] == 0
    code, error = submit("merge", out)
    assert code == 2 and "1 of 3 parts" in error and "--array=2" in error and not (out / "index.json").exists()
    assert submit(*build, task="2", tasks="1")[0] == 0  # that task alone, submitted again
    assert "3" in submit(*build, task="3", tasks="4")[1] and not (out / "parts/00003").exists()
    assert submit("merge", out)[0] == 0
    assert documents(out) == documents(corpus / "whole")
    assert submit("build")[0] == 2


def test_an_index_of_100_000_shards_is_read_quickly(tmp_path):
    shard = {"split": "train", "bytes": 2_600_000, "documents": 20_000, "tokens": 10**7, "text_bytes": 4 * 10**7}
    index = ShardIndex(
        tokenizer_sha256="0" * 64, vocab_size=32_000, eos_id=2, dtype="uint16", seed=0, created_by="test",
        shards=[ShardInfo(name=f"train-{i:06d}.tar", sha256=f"{i:064x}", **shard) for i in range(100_000)],
    )  # fmt: skip
    index.save(tmp_path)
    code = (
        "import resource, sys, time\n"
        "from megatron_dla.shard_index import ShardIndex\n"
        "before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()\n"
        "index = ShardIndex.load(sys.argv[1])\n"
        "assert index.totals('train').tokens == 10**12 and len(index.fingerprint) == 64\n"
        "print(time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    seconds, megabytes = map(float, result.stdout.split())
    assert seconds < 5 and megabytes < 500, (seconds, megabytes)
