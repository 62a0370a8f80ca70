"""Damage to a checkpoint is found before anything is read from it: `checkpoint.integrity`."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from megatron_dla.checkpoint.find import COMPLETE, LAYOUT, half_deleted, remove, remove_leftovers, step_directories
from megatron_dla.checkpoint.integrity import DATA_STATE, FORMAT_VERSION, find_faults, newest_whole, seal
from megatron_dla.errors import CheckpointError
from megatron_dla.files import write_text

FILES = (
    "weights/tp_00.safetensors", "weights/tp_01.safetensors", "optimizer/tp_00_dp_0000.safetensors",
    "optimizer/tp_01_dp_0000.safetensors", "random_00000.pt", "random_00001.pt", "config.yaml",
)  # fmt: skip


def write_step(run: Path, step: int) -> Path:
    """A checkpoint as far as checksums see it: a few hundred bytes a file, the same sizes in every step."""
    rnd, directory = random.Random(step), run / "checkpoints" / f"step_{step}"
    for name in FILES:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(rnd.randbytes(200))
    state = {"format_version": FORMAT_VERSION, "step": step, "seq_len": 64, "model": {"capacity": 3, "tau": 0.6}}
    (directory / LAYOUT).write_text(json.dumps(state))
    (directory / DATA_STATE).write_text(json.dumps({"steps": step, "streams": [{"offset": step * 7}] * 2}))
    seal(directory, {"step": step, "tensor_parallel": 2, "optimizer_updates": step})
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    for step in (2, 4, 6):
        write_step(run, step)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def content(directory: Path) -> dict[str, bytes]:
    """All that a run reads; JSON by value."""
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    return {
        name: json.dumps(json.loads(data), sort_keys=True).encode() if name.endswith(".json") else data
        for name, data in found.items()
    }


def edit(value, rnd: random.Random):
    """The JSON value with one entry somewhere in it changed or removed."""
    if isinstance(value, dict) and value:
        key = rnd.choice(sorted(value))
        if rnd.random() < 0.3:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: edit(value[key], rnd)}
    if isinstance(value, list) and value:
        return [edit(value[0], rnd), *value[1:]]
    return rnd.choice([None, -1, 10**9, "4", [], {}, True, value])


def damage(run: Path, seed: int) -> str:
    """Do something to the newest checkpoint of a run; returns what."""
    *others, newest = step_directories(run)
    rnd, files = random.Random(seed), sorted(path for path in newest.rglob("*") if path.is_file())
    path = rnd.choice(files)
    data = path.read_bytes()
    kind = ("flip", "truncate", "zero", "swap", "delete", "edit")[seed % 6]
    if kind == "edit" and path.suffix != ".json":
        path = newest / rnd.choice([LAYOUT, DATA_STATE, COMPLETE])
    place = rnd.randrange(len(data))
    if kind == "flip":
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << rnd.randrange(8))]) + data[place + 1 :])
    elif kind == "truncate":
        path.write_bytes(data[:place])
    elif kind == "zero":
        path.write_bytes(data[:place] + bytes(len(data) - place))
    elif kind == "swap":
        other = rnd.choice(others) / path.relative_to(newest)
        theirs = other.read_bytes()
        other.write_bytes(data)
        path.write_bytes(theirs)
    elif kind == "delete":
        path.unlink()
    else:
        path.write_text(json.dumps(edit(json.loads(path.read_text()), rnd)))
    return f"{kind} {path.relative_to(run)}"


def test_what_is_read_after_any_damage_is_what_was_written(run: Path) -> None:
    check_damages(run, 120)


def check_damages(run: Path, count: int) -> None:
    """So many seeds: the start takes a checkpoint whose every file has the content that it was saved with."""
    newest = step_directories(run)[-1].name
    written = {path.name: content(path) for path in step_directories(run)}
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found: set[str] = set()
    for seed in range(count):
        what = damage(run, seed)

        def agreed(path: Path, ranks: int = 1 + seed % 3) -> list[str]:
            return [fault for rank in range(ranks) for fault in find_faults(path, rank=rank, size=ranks)]

        path, damaged = newest_whole(step_directories(run), True, agreed)
        assert path is not None and content(path) == written[path.name], what
        assert all(fault for faults in damaged.values() for fault in faults)
        if path.name != newest:
            found.add(what.split()[0])
            with pytest.raises(CheckpointError):
                newest_whole(step_directories(run), False, agreed)
        for file, data in before.items():
            if not file.exists() or file.read_bytes() != data:
                file.write_bytes(data)
    assert found == {"flip", "truncate", "zero", "swap", "delete", "edit"}


def test_the_share_of_every_rank_together_is_all_files(run: Path) -> None:
    path = run / "checkpoints" / "step_6"
    for name in FILES:
        (path / name).write_bytes(b"x" * 200)
    shares = [find_faults(path, rank=rank, size=3) for rank in range(3)]
    assert all(shares) and sum(map(len, shares)) == len(FILES) == len(find_faults(path))


@pytest.mark.parametrize("name", ["optimizer/tp_00_dp_0001.safetensors", "random_00007.pt"])
def test_a_file_that_was_not_saved_is_a_fault(run: Path, name: str) -> None:
    path = run / "checkpoints" / "step_6"
    (path / ".nfs0001").touch()
    (path / "notes.txt").touch()
    assert not find_faults(path)
    (path / name).touch()
    (fault,) = find_faults(path)
    assert name in fault


def test_a_marker_that_lost_its_checksums_is_not_an_old_one(run: Path) -> None:
    path = run / "checkpoints" / "step_6"
    marker = json.loads((path / COMPLETE).read_text())
    (path / COMPLETE).write_text(json.dumps({k: v for k, v in marker.items() if k not in ("files", "sha256")}))
    assert find_faults(path)
    layout = json.loads((path / LAYOUT).read_text())
    (path / LAYOUT).write_text(json.dumps(layout | {"format_version": 1}))
    assert not find_faults(path)  # what a version without checksums wrote
    (path / COMPLETE).write_text(json.dumps({"step": 10**9}))
    assert "1000000000" in find_faults(path)[0]


@pytest.mark.parametrize("step", ["4", -1, 10**10, True, None, 6.0])
def test_a_step_that_is_no_step_is_a_fault(run: Path, step) -> None:
    path = run / "checkpoints" / "step_6"
    (path / COMPLETE).write_text(json.dumps({"step": step}))
    assert "step" in find_faults(path)[0]


def test_without_a_whole_checkpoint_nothing_starts_anew(run: Path) -> None:
    for step in (2, 4, 6):
        (run / "checkpoints" / f"step_{step}" / DATA_STATE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"step_6.*data_state\.json"):
        newest_whole(step_directories(run), True, find_faults)
    assert newest_whole([], True, find_faults) == (None, {})


def test_directories_renamed_to_another_step(run: Path) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / "step_6").rename(checkpoints / "step_8")
    assert "step 6" in find_faults(checkpoints / "step_8")[0]


def test_leftovers_are_removed_and_nothing_else(run: Path) -> None:
    """Of a save that died, of a version that deleted the marker first; a newest one without marker is damage."""
    checkpoints = run / "checkpoints"
    write_step(run, 8)
    for step in (2, 8):
        (checkpoints / f"step_{step}" / COMPLETE).unlink()
    (checkpoints / "step_9.1.0.partial").mkdir()
    (checkpoints / "step_3.damaged").mkdir()
    assert half_deleted(run) == [checkpoints / "step_2"]
    remove_leftovers(run)
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"step_3.damaged", "step_4", "step_6", "step_8"}
    path, damaged = newest_whole(step_directories(run), True, find_faults)
    assert path == checkpoints / "step_6" and list(damaged) == [checkpoints / "step_8"]


def test_a_link_is_removed_and_not_what_it_points_to(run: Path, tmp_path: Path) -> None:
    path = run / "checkpoints" / "step_2"
    path.rename(tmp_path / "archive")
    path.symlink_to(tmp_path / "archive")
    assert remove(path) == "" and not path.is_symlink() and not find_faults(tmp_path / "archive")


def test_what_cannot_be_deleted_is_said(run: Path, monkeypatch) -> None:
    def busy(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))

    path = run / "checkpoints" / "step_2"
    monkeypatch.setattr(shutil, "rmtree", busy)
    assert "busy" in remove(path) and not path.exists()  # its name is free: no start takes half of it


def test_names_are_synced_before_the_marker(run: Path, monkeypatch) -> None:
    synced = []
    monkeypatch.setattr("megatron_dla.checkpoint.integrity.fsync_file", lambda path: synced.append(path.name))
    monkeypatch.setattr("megatron_dla.checkpoint.integrity.fsync_directory", lambda path: synced.append(path.name))
    marker = "megatron_dla.checkpoint.integrity.write_text"
    monkeypatch.setattr(marker, lambda path, text: [synced.append(path.name), write_text(path, text)])
    path = run / "checkpoints" / "step_6"
    seal(path, {"step": 6})
    assert synced[-1] == COMPLETE and {"weights", "optimizer", "step_6", "random_00000.pt", LAYOUT} <= set(synced)
    assert not find_faults(path)
