"""Finds the files of the inputs: files, directories, glob patterns, links and saved Hugging Face datasets."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_dla.data_prep.readers import Kind, holds_lines, kind_of, known_formats, refuse_url, shown
from megatron_dla.errors import DataError
from megatron_dla.files import parse_json

_Seen = tuple[set[tuple[int, int]], set[Path]]  # directories (device, inode) and files of one input, without links
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


@dataclass(frozen=True)
class SourceFile:
    """One input file. `name`: recorded in the shards, the same on every machine. `bytes`: size on disk."""

    path: Path
    name: str
    input: str
    bytes: int
    kind: Kind


@dataclass
class Listing:
    """The files of all inputs in reading order, and what was left out of directories.

    `ignored`: files that no reader takes. `hidden`: files and directories in directories whose names begin with a dot
    (.ipynb_checkpoints, ._a.jsonl). `repeated`: files and directories that a link names a second time.

    Raises DataError for a missing or unreadable input, an input given twice, an unknown format, a link to nothing, a
    damaged dataset, or a directory or pattern without documents.
    """

    inputs: Sequence[str | os.PathLike[str]]
    files: list[SourceFile] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    repeated: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.inputs:
            raise DataError("inputs is empty: give at least one file or directory (--input PATH)")
        for item in self.inputs:
            try:
                self._add(Path(item))
            except OSError as error:
                where = item if error.filename is None else error.filename
                raise DataError(f"{shown(where)}: cannot be read ({error.strerror}); check --input") from error
        seen: set[Path] = set()
        for file in self.files:
            real = file.path.resolve()
            if real in seen:
                raise DataError(
                    f"{shown(file.path)}: given twice as input; its documents would count twice, name it once"
                )
            seen.add(real)

    def _add(self, path: Path) -> None:
        if path.is_file():
            self._add_file(path, shown(path.name), shown(path.name))
        elif path.is_dir():
            name = shown(path.resolve().name or "root")
            self._add_tree(path, path, (name, name), (set(), set()))
        elif glob.has_magic(str(path)):
            self._add_pattern(path)
        elif path.is_symlink():
            raise DataError(f"{shown(path)}: a link to {shown(os.readlink(path))!r}, which does not exist; restore it")
        else:
            refuse_url(path)
            what = "neither a file nor a directory" if path.exists() else "no such file or directory"
            raise DataError(f"{shown(path)}: {what}; check --input")

    def _add_pattern(self, pattern: Path) -> None:
        fixed = list(pattern.parts)
        fixed = fixed[: next(i for i, part in enumerate(fixed) if glob.has_magic(part))]
        base = Path(*fixed)
        found = sorted(_below(base, pattern) if "**" in pattern.parts else _matches(base, pattern.parts[len(fixed) :]))
        if not found:
            raise DataError(f"{shown(pattern)}: no file or directory matches this pattern; check --input")
        name = shown(base.resolve().name or "root")
        given = f"{name}/{shown(pattern.relative_to(base))}"
        before, inside = len(self.files), set(found)
        seen: _Seen = (set(), set())
        for path in found:
            if inside & set(path.parents):
                continue  # `**` matches a directory and what is in it
            if path.is_dir():
                self._add_tree(path, base, (name, given), seen)
            else:
                self._add_once(path, base, (name, given), seen)
        if len(self.files) == before:
            raise DataError(f"{shown(pattern)}: no document in what matches this pattern; must be {known_formats()}")

    def _add_file(self, path: Path, name: str, given: str) -> None:
        kind = kind_of(path)
        if kind is None:
            raise DataError(f"{shown(path)}: unknown format; must be {known_formats()}")
        if kind.format == ".json" and not _is_jsonl(path, kind):
            if ".json" not in path.name.lower():  # a compressed file whose name says no more
                raise DataError(f"{shown(path)}: unknown format, no JSONL in it; must be {known_formats()}")
            raise DataError(
                f"{shown(path)}: not JSONL, an object on each line; convert it (`jq -c .` for objects, "
                "`jq -c '.[]'` for an array)"
            )
        self.files.append(SourceFile(path, name, given, path.stat().st_size, kind))

    def _takes(self, path: Path) -> bool:
        """Whether a file found in a directory is to be read; otherwise it is noted as ignored."""
        kind = kind_of(path)
        if path.is_symlink() and not path.exists():
            if kind is None:
                self.ignored.append(path)
                return False
            raise DataError(f"{shown(path)}: a link to {shown(os.readlink(path))!r}, which does not exist; restore it")
        if kind is None or not path.is_file() or (kind.format == ".json" and not _is_jsonl(path, kind)):
            self.ignored.append(path)
            return False
        return True

    def _add_once(self, path: Path, base: Path, names: tuple[str, str], seen: _Seen) -> None:
        """Add a file found in a directory or by a pattern, if it is one to read and no link has named it before."""
        if not self._takes(path):
            return
        if (real := path.resolve()) in seen[1]:
            self.repeated.append(path)
            return
        seen[1].add(real)
        self._add_file(path, f"{names[0]}/{shown(path.relative_to(base).as_posix())}", names[1])

    def _add_tree(self, top: Path, base: Path, names: tuple[str, str], seen: _Seen) -> None:
        before = len(self.files) + len(self.repeated)
        self._walk(top, base, names, seen)
        if len(self.files) + len(self.repeated) == before:
            raise DataError(f"{shown(top)}: no document in this directory; must be {known_formats()}")

    def _walk(self, folder: Path, base: Path, names: tuple[str, str], seen: _Seen) -> None:
        """Files of a directory in sorted order, then its subdirectories, through links, each once."""
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen[0]:
            self.repeated.append(folder)
            return
        seen[0].add((status.st_dev, status.st_ino))
        entries = sorted(os.listdir(folder))
        if _SPLITS in entries:
            entries = [_one_split(folder)]
        elif _STATE in entries and _INFO in entries:
            entries = _dataset_files(folder)
        self.hidden += [folder / entry for entry in entries if entry.startswith(".")]
        entries = [entry for entry in entries if not entry.startswith(".")]
        for path in (folder / entry for entry in entries):
            if not path.is_dir():
                self._add_once(path, base, names, seen)
        for path in (folder / entry for entry in entries):
            if path.is_dir():
                self._walk(path, base, names, seen)

    def notes(self) -> list[str]:
        """What was left out, one line each."""
        notes = []
        for paths, why in (
            (self.ignored, "of other formats"), (self.hidden, "and directories whose names begin with a dot"),
            (self.repeated, "that links name a second time"),
        ):  # fmt: skip
            if paths:
                first = ", ".join(map(shown, paths[:3])) + ("..." if len(paths) > 3 else "")
                notes.append(f"note: ignored {len(paths)} files {why}: {first}")
        return notes


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """What matches a pattern below `folder`, as `glob.glob` finds it, which hides directories that cannot be read."""
    if not parts:
        yield folder
    elif folder.is_dir():
        first, rest = parts[0], parts[1:]
        if not glob.has_magic(first):
            names = [first] if os.path.lexists(folder / first) else []
        else:
            names = [
                name for name in sorted(os.listdir(folder))
                if fnmatch.fnmatchcase(name, first) and (first.startswith(".") or not name.startswith("."))
            ]  # fmt: skip
        for name in names:
            yield from _matches(folder / name, rest)


def _raise(error: OSError) -> None:
    raise error


def _below(base: Path, pattern: Path) -> Iterator[Path]:
    """What matches a pattern with `**`, as `glob.glob` finds it, but each directory once: links may form a circle."""
    parts = pattern.parts[len(base.parts) :]
    hidden = any(part.startswith(".") for part in parts)
    seen: set[tuple[int, int]] = set()
    if _fits((), parts):
        yield base
    for folder, folders, files in os.walk(base, followlinks=True, onerror=_raise):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        for name in (*folders, *(name for name in files if hidden or not name.startswith("."))):
            path = Path(folder, name)
            if _fits(path.relative_to(base).parts, parts):
                yield path


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    if parts and parts[0] == "**":
        return any(_fits(names[i:], parts[1:]) for i in range(len(names) + 1))
    if not (names and parts):
        return not (names or parts)
    return fnmatch.fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _is_jsonl(path: Path, kind: Kind) -> bool:
    try:
        return holds_lines(path, kind)
    except Exception:  # damaged: it is read, and then the error names the damage
        return True


def _one_split(folder: Path) -> str:
    splits = _json_names(folder / _SPLITS, "splits")
    if len(splits) != 1:
        raise DataError(
            f"{shown(folder)}: a dataset with the splits {', '.join(splits)}; name those to read: "
            f"--input {shown(folder / splits[0])}"
        )
    if not (folder / splits[0]).is_dir():
        raise DataError(f"{shown(folder / splits[0])}: missing, but named in {_SPLITS}; copy the dataset again")
    return splits[0]


def _dataset_files(folder: Path) -> list[str]:
    """The arrow files of a dataset saved by `save_to_disk`, in its order. Raises DataError if one is missing."""
    if _json_names(folder / _STATE, "_indices_data_files", may_be_empty=True):
        raise DataError(
            f"{shown(folder)}: this dataset was saved with a selection of its rows; save it again with "
            "dataset.flatten_indices().save_to_disk(...)"
        )
    names = _json_names(folder / _STATE, "_data_files")
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{shown(folder / name)}: missing, but named in {_STATE}; copy the dataset again")
    return names


def _json_names(path: Path, key: str, may_be_empty: bool = False) -> list[str]:
    """Names of files or directories beside a file of `save_to_disk`, which lists them under `key`."""
    try:
        values = parse_json(path.read_bytes()).get(key) or []
        names = [value["filename"] if isinstance(value, dict) else value for value in values]
        if not isinstance(values, list) or any(Path(name).name != name for name in names):
            raise ValueError(f"{names} are not names of files here")
        if not names and not may_be_empty:
            raise ValueError("there are none")
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{shown(path)}: not the {key} of a saved dataset ({error}); copy the dataset again") from error
    return names
