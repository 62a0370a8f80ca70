"""Data at URLs: the same batches as from a disk, whatever the network does; the cache holds whole shards only."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_dla.cli import main
from megatron_dla.data import ShardReader, remote, validation_batches
from megatron_dla.data.remote import RemoteDirectory, local_directory, open_directory
from megatron_dla.errors import DataError
from megatron_dla.shard_index import ShardIndex
from tests.support.http_faults import FaultyServer
from tests.support.rows import global_steps, loader, ranks

FAULTS = ["500", "503", "429", "drop", "short", "wrong", "stall"]


@pytest.fixture
def server(made, monkeypatch):
    monkeypatch.setattr(remote, "_WAIT_S", 0.001)
    one = FaultyServer(made)
    yield one
    one.close()


def opened(server: FaultyServer, cache: Path, gb: float = 1.0) -> RemoteDirectory:
    directory = open_directory(server.url, cache, gb)
    assert isinstance(directory, RemoteDirectory)
    return directory


def held(cache: Path) -> list[str]:
    """All files of the shard cache but the lock of the whole."""
    return sorted(path.name for path in (cache / "shards").iterdir() if path.name != "lock")


def shards_of(directory) -> list:
    return ShardIndex.load(directory).split("train")


def test_the_same_batches_as_from_a_disk_and_exact_resume(made, server, tmp_path):
    directory = opened(server, tmp_path)
    ours, want = ranks(directory, 2), global_steps(ranks(made, 2), 30)
    assert torch.equal(global_steps(ours, 12), want[:12])
    state = ours[0].merge_states([one.state_dict() for one in ours])
    for data in (opened(server, tmp_path / "empty"), made):
        again = loader(data, prefetch_rows=16)
        again.load_state_dict(state)
        assert torch.equal(global_steps([again], 18), want[12:])
    pairs = zip(validation_batches(directory, 16, 2), validation_batches(made, 16, 2), strict=True)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in pairs)
    assert directory.retries == 0 and directory.fetched == len(held(tmp_path))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_shard_arrives_whole_after_a_fault(made, server, tmp_path, monkeypatch, capsys, fault):
    directory = opened(server, tmp_path)
    if fault == "stall":
        monkeypatch.setattr(remote, "_TIMEOUT_S", 0.5)
    shard = shards_of(made)[0]
    server.faults[shard.path] = [fault, "delay" if fault == "500" else fault]
    with directory.open(shard) as file:
        assert file.read() == (made / shard.path).read_bytes()
    assert held(tmp_path) == [f"{shard.sha256}.tar"] and directory.fetched == 1
    failed = directory.retries
    assert server.requests.count(shard.path) == failed + 1
    assert failed == {"500": 1}.get(fault, 2) or (fault == "stall" and failed > 2)  # a slow machine stalls by itself
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == failed and all(f"{server.url}/{shard.path}: " in note for note in notes)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_shard_that_never_arrives_is_one_error_and_no_file(made, server, tmp_path, monkeypatch, fault):
    directory = opened(server, tmp_path)
    monkeypatch.setattr(remote, "_TRIES", 3)
    if fault == "stall":
        monkeypatch.setattr(remote, "_TIMEOUT_S", 0.3)
    server.always = {shard.path: fault for shard in shards_of(made)}
    with pytest.raises(DataError) as caught:
        loader(directory, num_streams=1).next_step()
    message = str(caught.value)
    assert f"{server.url}/train/train-00000" in message and "3 tries" in message and len(message.splitlines()) == 1
    asked = [path for path in server.requests if path.endswith(".tar")]
    assert (len(asked) == 3 or fault == "stall") and held(tmp_path) == []


@pytest.mark.parametrize("code", ["404", "403"])
def test_what_is_not_there_is_not_tried_again(made, server, tmp_path, code):
    directory = opened(server, tmp_path)
    shard = shards_of(made)[0]
    server.always[shard.path] = code
    with pytest.raises(DataError, match=f"{shard.path}: .*data.dir"):
        ShardReader(directory, "train").read(shard)
    assert server.requests.count(shard.path) == 1 and held(tmp_path) == []


def test_index_and_tokenizer_are_fetched_with_checks(made, server, tmp_path):
    server.faults |= {"index.json": ["drop", "short"], "tokenizer.model": ["wrong", "503"]}
    directory = opened(server, tmp_path)
    assert directory.retries == 4 and str(directory) == server.url
    assert local_directory(f"{server.url}/", str(tmp_path)) == Path(directory) and local_directory("a") == Path("a")
    for name in ("index.json", "tokenizer.model"):
        assert Path(directory, name).read_bytes() == (made / name).read_bytes()
    server.always["tokenizer.model"] = "404"
    with pytest.raises(DataError, match=r"tokenizer.json: .*tokenizer.model"):
        opened(server, tmp_path)
    server.always["index.json"] = "404"
    with pytest.raises(DataError, match=r"index.json: .*data.dir"):
        opened(server, tmp_path)


def test_a_damaged_copy_is_fetched_again(made, server, tmp_path):
    reader = ShardReader(opened(server, tmp_path), "train")
    shard = reader.shards[0]
    reader.read(shard)
    copy = tmp_path / "shards" / f"{shard.sha256}.tar"
    for damaged in (b"x" * shard.bytes, b"short"):
        copy.write_bytes(damaged)
        os.utime(copy, ns=(0, len(damaged)))
        assert len(reader.read(shard).tokens) == shard.tokens
        assert copy.read_bytes() == (made / shard.path).read_bytes()
    copy.write_bytes(b"short")
    assert len(ShardReader(reader.root, "train", verify="none").read(shard).tokens) == shard.tokens
    assert server.requests.count(shard.path) == 4


def test_shards_that_were_not_used_for_longest_make_room_but_none_in_use(made, server, tmp_path, capsys):
    shards = shards_of(made)[:6]
    size = max(shard.bytes for shard in shards)
    directory = opened(server, tmp_path, gb=(3 * size + 100) / 1e9)

    def use(*numbers):
        for number in numbers:
            directory.open(shards[number]).close()

    def kept():
        return [i for i, shard in enumerate(shards) if f"{shard.sha256}.tar" in held(tmp_path)]

    use(0, 1, 2, 0, 3)
    assert kept() == [0, 2, 3]
    with directory.open(shards[2]):
        use(0, 3, 4, 5)
        assert kept() == [2, 4, 5]
        with directory.open(shards[4]), directory.open(shards[5]):
            use(0)
            assert kept() == [0, 2, 4, 5] and "data.cache_gb" in capsys.readouterr().err
    use(1)
    assert len(kept()) == 3 and 1 in kept()
    (tmp_path / "shards" / ".x.tar.0.part").write_bytes(b"of a process that was killed")
    use(3)
    assert len(held(tmp_path)) == 3


def test_a_full_disk_is_named_and_leaves_no_half_file(made, server, tmp_path, monkeypatch):
    directory, shard = opened(server, tmp_path), shards_of(made)[0]
    real = Path.write_bytes

    def write_half(path, content):
        real(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(DataError, match=r"data.cache_dir = .*No space left"):
        directory.open(shard)
    assert held(tmp_path) == []
    monkeypatch.setattr(Path, "write_bytes", real)
    directory.open(shard).close()
    assert held(tmp_path) == [f"{shard.sha256}.tar"]


def _read_all(directory, shards, root, queue):
    good = 0
    for shard in shards:
        with directory.open(shard) as file:
            good += file.read() == (root / shard.path).read_bytes()
    queue.put(good)


def test_two_processes_fetch_each_shard_once(made, server, tmp_path):
    fork = multiprocessing.get_context("fork")  # spawned ones would import torch first
    queue, shards = fork.Queue(), shards_of(made)
    server.always = dict.fromkeys((shard.path for shard in shards), "delay")
    directory = opened(server, tmp_path)
    both = [fork.Process(target=_read_all, args=(directory, shards[:4], made, queue)) for _ in range(2)]
    for process in both:
        process.start()
    assert [queue.get(timeout=60) for _ in both] == [4, 4]
    for process in both:
        process.join(60)
    assert sorted(path for path in server.requests if "train/" in path) == sorted(shard.path for shard in shards[:4])
    assert held(tmp_path) == sorted(f"{shard.sha256}.tar" for shard in shards[:4])


def test_a_process_that_is_killed_leaves_its_shard_to_the_others(made, server, tmp_path, monkeypatch):
    directory, shard = opened(server, tmp_path), shards_of(made)[0]
    monkeypatch.setattr(remote, "_TIMEOUT_S", 60)
    server.faults[shard.path] = ["stall"]
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_read_all, args=(directory, [shard], made, fork.Queue()))
    process.start()
    server.wait_for(shard.path)
    directory.expect(shard)
    time.sleep(0.2)
    assert server.requests.count(shard.path) == 1  # it waits for the other process
    os.kill(process.pid, signal.SIGKILL)
    with directory.open(shard) as file:
        assert file.read() == (made / shard.path).read_bytes()
    process.join(60)
    assert held(tmp_path) == [f"{shard.sha256}.tar"]


def test_the_next_shard_is_fetched_while_this_one_is_read_and_kept(made, server, tmp_path):
    one = loader(opened(server, tmp_path), num_streams=1, global_batch_size=1)
    stream = one.streams[0].sources["data"]
    order = stream.reader.order(stream.seed, 0)
    first, second = (stream.reader.shards[i] for i in order[:2])
    one.next_step()
    server.wait_for(second.path)
    assert [path for path in server.requests if path.endswith(".tar")] == [first.path, second.path]
    copy = tmp_path / "shards" / f"{second.sha256}.tar"
    end = time.monotonic() + 30
    while not copy.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.1)
    with open(copy, "rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_cache_settings(made, server, tmp_path):
    with pytest.raises(DataError, match=r"data.cache_gb = 1e-07: must be at least"):
        opened(server, tmp_path, 1e-7)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir = '.*file': "):
        opened(server, tmp_path / "file")
    assert open_directory(made) == made


def test_other_protocols_are_read_with_fsspec(made, tmp_path, monkeypatch):
    import fsspec

    fsspec.filesystem("memory").put(str(made), "/bucket/corpus", recursive=True)
    directory = open_directory("memory://bucket/corpus", tmp_path)
    assert torch.equal(global_steps([loader(directory)], 5), global_steps([loader(made)], 5))
    with pytest.raises(DataError, match=r"index.json: no such file"):
        open_directory("memory://bucket/nothing", tmp_path)
    with pytest.raises(DataError, match=r"data.dir = 'x3://b': .*s3://"):
        open_directory("x3://b", tmp_path)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r"data.dir = 's3://b/c': .*pip install fsspec s3fs"):
        open_directory("s3://b/c", tmp_path)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("private", [True, False])
def test_a_login_comes_from_netrc(made, server, tmp_path, monkeypatch, private):
    file = tmp_path / ".netrc"
    file.write_text("machine 127.0.0.1 login me password pw\n" if private else "machine")
    monkeypatch.setenv("NETRC", str(file))
    if private:
        opened(server, tmp_path)
        assert set(server.logins) == {"Basic bWU6cHc="}
    else:
        with pytest.raises(DataError, match="netrc"):
            opened(server, tmp_path)


@pytest.mark.parametrize(
    "url",
    ["https://me:hidden@host/a", "https://hidden@host/a", "s3://b/a?X-Amz-Signature=hidden", "ftp://u:hidden@h/a"],
)
def test_credentials_in_a_url_are_refused_and_not_shown(url, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(f"run: {{dir: {tmp_path / 'runs'}}}")
    for argv in (
        ["train", str(config), f"data.dir={url}"],
        ["run", str(config), "--nproc", "1", f"data.sources={{a: {{dir: '{url}'}}}}"],
        ["submit", str(config), "--profile", "cpu", "--nodes", "1", f"data.dir={url}"],
        ["data", "stats", url],
        ["data", "verify", url],
    ):
        assert main(argv) == 2
        out = capsys.readouterr()
        assert "hidden" not in out.err + out.out and "***" in out.err and "netrc" in out.err
    with pytest.raises(DataError, match="netrc"):
        open_directory(url)
    assert not (tmp_path / "runs").exists()


def test_credentials_in_a_variable_are_refused_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("URL", "https://me:hidden@host/a")
    (tmp_path / "c.yaml").write_text("data: {dir: $URL}")
    assert main(["train", str(tmp_path / "c.yaml")]) == 2
    assert "hidden" not in (error := capsys.readouterr().err) and "data.dir = '$URL'" in error
