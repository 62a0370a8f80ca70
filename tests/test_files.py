"""Atomic writes, checksums and safetensors files: `megatron_dla.files`."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from megatron_dla import files
from megatron_dla.errors import UserError
from megatron_dla.files import (
    TensorWriter,
    atomic_path,
    check_out,
    create_json,
    file_sha256,
    load_tensors,
    save_tensors,
    write_bytes,
    write_json,
    write_text,
)

WRITERS = {
    "bytes": (lambda path: write_bytes(path, b"\x00\xff"), b"\x00\xff"),
    "text": (lambda path: write_text(path, "δ\n"), "δ\n".encode()),
    "json": (lambda path: write_json(path, {"a": [1, None]}), b'{"a": [1, null]}\n'),
    "indented json": (lambda path: write_json(path, {"a": 1}, indent=2), b'{\n  "a": 1\n}\n'),
}


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("name", WRITERS)
def test_content_and_nothing_beside_it(name, tmp_path) -> None:
    write, content = WRITERS[name]
    path = tmp_path / "file"
    path.write_bytes(b"a longer text that was there before")
    write(path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", WRITERS)
def test_permissions_follow_the_umask(name, umask, tmp_path) -> None:
    WRITERS[name][0](tmp_path / "file")
    assert mode(tmp_path / "file") == 0o666 & ~umask


def test_safetensors_permissions_follow_the_umask_unless_private(umask, tmp_path) -> None:
    save_tensors({"x": torch.ones(2)}, tmp_path / "shared")
    save_tensors({"x": torch.ones(2)}, tmp_path / "private", private=True)
    assert mode(tmp_path / "shared") == 0o666 & ~umask
    assert mode(tmp_path / "private") == 0o600


def test_a_body_that_fails_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as part:
        part.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_before_the_rename_leaves_the_old_file(step, tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_process_killed_before_the_rename_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import os, signal, sys\n"
        "from megatron_dla import files\n"
        "from pathlib import Path\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_text(Path(sys.argv[1]), 'new')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60)
    assert done.returncode == -9 and path.read_text() == "old"
    assert all(name == "file" or name.startswith(".file.") for name in os.listdir(tmp_path))


@pytest.mark.parametrize("fsync", [True, False])
def test_the_content_is_synced_before_the_rename_and_the_name_after_it(fsync, tmp_path, monkeypatch) -> None:
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def sync(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append(("fsync", tmp_path if folder else os.pread(descriptor, 100, 0)))
        real_fsync(descriptor)

    def replace(source, target):
        events.append(("replace", Path(source).read_bytes()))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write_bytes(tmp_path / "file", b"new", fsync=fsync)
    replaced = [("replace", b"new")]
    assert events == ([("fsync", b"new"), *replaced, ("fsync", tmp_path)] if fsync else replaced)


def test_tensors_are_synced(tmp_path, monkeypatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    save_tensors({"x": torch.ones(2)}, tmp_path / "file")
    assert synced == [(tmp_path / "file").stat().st_ino]


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path) -> None:
    path, texts = tmp_path / "file", [str(n) * 10_000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: [write_text(path, text) for _ in range(10)], texts))
    assert path.read_text() in texts and os.listdir(tmp_path) == ["file"]


def test_one_of_many_creates_a_file(tmp_path) -> None:
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        mine = list(pool.map(lambda n: create_json(path, {"n": n}), range(8)))
    assert mine.count(True) == 1 and path.read_text() == f'{{"n": {mine.index(True)}}}'
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_names_the_file_and_the_bytes(tmp_path) -> None:
    (tmp_path / "x").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        save_tensors({"x": torch.ones(1000)}, tmp_path / "x")
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "x")
    assert "4,0" in error.value.strerror  # 4,000 bytes and the header
    with pytest.raises(OSError) as error, TensorWriter(tmp_path / "x", ["a"]) as writer:
        writer.add("a", torch.ones(100_000))
    assert error.value.filename == str(tmp_path / "x") and "400,2" in error.value.strerror


def test_tensors_are_written_in_pieces_and_hashed(tmp_path, monkeypatch) -> None:
    """As safetensors' own writer would: of every dtype and form, also larger than a piece."""
    monkeypatch.setattr(files, "CHUNK", 64)
    tensors = {
        "z": torch.randn(5, 7).T, "a": torch.arange(9, dtype=torch.uint8)[::2], "b": torch.tensor(True),
        "c": torch.randn(33).bfloat16(), "d": torch.zeros(0, 3, dtype=torch.int64), "e": torch.randn(2)[1],
    }  # fmt: skip
    digest = save_tensors(tensors, tmp_path / "x")
    assert digest == file_sha256(tmp_path / "x")
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype and torch.equal(found[name], x), name


def test_a_missing_directory_is_an_os_error(tmp_path) -> None:
    for where in (tmp_path / "none" / "file", tmp_path / "other" / "file"):
        (tmp_path / "other").touch()
        with pytest.raises(OSError):
            write_text(where, "x")


def test_checksum_of_a_file(tmp_path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(data)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "none")


def test_tensors_come_back_and_do_not_depend_on_the_file(tmp_path) -> None:
    path, x = tmp_path / "file", torch.randn(1000)
    save_tensors({"x": x, "y": torch.zeros(0, dtype=torch.int64)}, path, {"a": "b"})
    tensors, metadata = load_tensors(path)
    with path.open("r+b") as file:  # the same inode, as a memory map would show
        file.write(bytes(path.stat().st_size))
    assert tensors["x"].equal(x) and tensors["y"].dtype == torch.int64 and metadata == {"a": "b"}
    with pytest.raises(SafetensorError):
        load_tensors(path)
    save_tensors({"x": x}, path)
    assert load_tensors(path)[1] == {}


def test_launchers_can_import_it_without_torch() -> None:
    code = "import sys, megatron_dla.files; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_tensors_written_one_by_one_are_a_safetensors_file(tmp_path: Path) -> None:
    given = {
        "a": torch.randn(3, 5), 'b "quoted" \u03b4': torch.randn(4, 6).T, "c": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3.5, dtype=torch.float16), "empty": torch.zeros(0, 4), "ids": torch.arange(3),
    }  # fmt: skip
    with TensorWriter(tmp_path / "x.safetensors", [*given, "never added"]) as writer:
        for name, x in given.items():
            writer.add(name, x)
    assert writer.nbytes == sum(x.nbytes for x in given.values())
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == given.keys()
    for name, x in given.items():
        assert found[name].dtype == x.dtype and torch.equal(found[name], x), name
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_file_whose_writer_failed_is_not_readable(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TensorWriter(tmp_path / "x.safetensors", ["a", "b"]) as writer:
        writer.add("a", torch.ones(3))
        raise RuntimeError
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "x.safetensors")


IN_MEMORY = {"config/load.py", "checkpoint/writer.py", "study/run.py", "data_prep/encoders.py", "files.py"}


def test_files_are_parsed_by_what_names_deep_nesting_a_value_error() -> None:
    """json.loads raises RecursionError for it, which callers that name a damaged file do not expect."""
    package = Path(files.__file__).parent
    places = (package, package / "data_prep", package / "launch")  # the last two are links in a checkout
    paths = {path for place in places for path in place.rglob("*.py")}
    found = {str(path.relative_to(package)) for path in paths if "json.loads(" in path.read_text()}
    assert {name for name in found if not name.startswith("kernels/")} == IN_MEMORY
    for text in ("[" * 100_000, b'{"a":' * 50_000, b"\xff", "9" * 5000):
        with pytest.raises(ValueError):
            files.parse_json(text)


def test_where_a_directory_can_be_written_to(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    for good in (None, tmp_path, tmp_path / "new" / "below"):
        check_out(good)
    assert sorted(os.listdir(tmp_path)) == ["dead", "file"]  # nothing is made
    for wrong, named in (("file", "file"), ("dead", "dead"), ("file/below", "file")):
        with pytest.raises(UserError, match=rf"--place .*{named}"):
            check_out(tmp_path / wrong, "--place")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(UserError, match=str(tmp_path)):
        check_out(tmp_path / "new")
