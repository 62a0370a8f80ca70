"""Documents from files: what is read, what is left out and why, and the list of bad records."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from megatron_dla.data_prep.listing import Listing, SourceFile
from megatron_dla.data_prep.readers import Problem, UnreadableError, read_records, shown
from megatron_dla.errors import DataError

_LISTED = 100  # bad records that an error or a report names; the others are counted
_HOPELESS = 100, 10_000  # reading stops where so many records come first and all are bad; the second: with skip_bad
_STORY_END = "<|endoftext|>"


class Document(NamedTuple):
    """One document: its text, its bytes of UTF-8, and where it is from: see `DocumentSource.name`."""

    text: str
    n_bytes: int
    file: int
    number: int


@dataclass(frozen=True)
class ReadOptions:
    """How inputs are read.

    Attributes:
        text_field: field of JSONL lines, column of tables; a dotted path reaches nested ones.
        separator: stands between the documents of a .txt file; empty: a file is one document.
        skip_bad: leave bad records out while they are at most this share of all records; None: they are an error.
        min_chars, max_chars: leave out shorter and longer documents (None: no limit).

    Raises DataError for values out of range.
    """

    text_field: str = "text"
    separator: str = ""
    skip_bad: float | None = None
    min_chars: int = 0
    max_chars: int | None = None

    def __post_init__(self) -> None:
        if not self.text_field:
            raise DataError("text_field = '': name the field that holds the text (--text-field)")
        for name in ("text_field", "separator"):
            value: str = getattr(self, name)
            if not value.isascii() and value.encode(errors="ignore").decode() != value:
                raise DataError(f"{name} = {shown(value)!r}: not valid UTF-8 (--{name.replace('_', '-')})")
        if self.skip_bad is not None and not 0 <= self.skip_bad <= 1:
            raise DataError(f"skip_bad = {self.skip_bad}: must be a share from 0 to 1 (--skip-bad)")
        if self.min_chars < 0:
            raise DataError(f"min_chars = {self.min_chars}: must be at least 0 (--min-chars)")
        if self.max_chars is not None and self.max_chars < max(self.min_chars, 1):
            least = max(self.min_chars, 1)
            raise DataError(f"max_chars = {self.max_chars}: must be at least {least}, or not given (--max-chars)")


@dataclass
class Counts:
    """Records by what became of them. `documents`: handed on. `blank_lines`: of JSONL files, no records."""

    documents: int = 0
    empty: int = 0
    too_short: int = 0
    too_long: int = 0
    bad: int = 0
    blank_lines: int = 0

    @property
    def records(self) -> int:
        return self.documents + self.empty + self.too_short + self.too_long + self.bad


@dataclass
class Progress:
    """What was read so far, and what was found there.

    Attributes:
        file, record: files read to their end, and records read of the next one.
        bad, damaged: where and what, of records (the first ones) and of files. fix: of the first bad record.
        texts: .txt files read to their end. separated: of their documents, those after a separator. stories: those that
            contain the end of a story.
    """

    file: int = 0
    record: int = 0
    counts: Counts = field(default_factory=Counts)
    bad: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    fix: str = ""
    texts: int = 0
    separated: int = 0
    stories: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """From what `dataclasses.asdict` made of it."""
        return cls(**{**values, "counts": Counts(**values["counts"])})


class DocumentSource:
    """Streams the documents of files and directories and counts the bytes read from disk.

    Attributes: `files` (in reading order), `total_bytes` (on disk), `bytes_read` (of `total_bytes`, updated record by
    record; compressed bytes for compressed files), `progress`, `counts` (its counts), `failed` (why reading stopped
    before the end: the system could not read a file, so `progress` does not say that it was read).

    Args:
        part: (i, n): only every nth file, from the ith on.

    Raises DataError for inputs that cannot be found or read (see `Listing`) and a part without files. Iterating raises
    at its end, with all bad records and damaged files named: `documents()` does not raise, and `check()` does it later.
    """

    def __init__(
        self,
        inputs: Sequence[str | os.PathLike[str]],
        options: ReadOptions | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.options, self.part = options or ReadOptions(), part
        self.listing = Listing(inputs)
        self.files: list[SourceFile] = self.listing.files[part[0] :: part[1]]
        if not self.files:
            found = len(self.listing.files)
            raise DataError(f"part = {part[0]}/{part[1]}: the inputs are {found} files; use at most {found} parts")
        self.total_bytes = sum(file.bytes for file in self.files)
        self.bytes_read = 0
        self.progress = Progress()
        self.failed: UnreadableError | None = None

    @property
    def counts(self) -> Counts:
        return self.progress.counts

    def name(self, file: int, number: int) -> str:
        """The source of a document as shards record it: `file`, or `file:number` of a line, row or story."""
        return f"{self.files[file].name}:{number}" if number else self.files[file].name

    def __iter__(self) -> Iterator[Document]:
        yield from self.documents()
        self.check()

    def documents(self, after: Progress | None = None) -> Iterator[Document]:
        """The documents `after` some (None: all); bad records and damaged files are noted for `check()`."""
        self.progress, self.failed = after or Progress(), None
        done = sum(file.bytes for file in self.files[: self.progress.file])
        for file in self.files[self.progress.file :]:
            try:
                yield from self._read(file, done)
            except UnreadableError as error:
                self.failed = error
                return
            except DataError as error:
                self.progress.damaged.append(str(error))
            done += file.bytes
            self.bytes_read = done
            if self._hopeless:
                return
            self.progress.texts += file.kind.format == ".txt"
            self.progress.file, self.progress.record = self.progress.file + 1, 0

    @property
    def _hopeless(self) -> bool:
        limit = self.options.skip_bad
        return limit != 1 and self.counts.bad == self.counts.records >= _HOPELESS[limit is not None]

    def _read(self, file: SourceFile, done: int) -> Iterator[Document]:
        at, counts, text_file = self.progress, self.counts, file.kind.format == ".txt"
        least, most = max(self.options.min_chars, 1), self.options.max_chars or sys.maxsize
        records = read_records(file.path, file.kind, self.options.text_field, self.options.separator)
        for number, text, position in islice(records, at.record, None):
            self.bytes_read = done + position
            at.record += 1
            if text_file:
                at.separated += number > 1
                at.stories += isinstance(text, str) and _STORY_END in text
            if isinstance(text, str) and least <= len(text) <= most:
                counts.documents += 1
                n_bytes = len(text) if text.isascii() else len(text.encode("utf-8"))
                yield Document(text, n_bytes, at.file, number)
            else:
                self._leave_out(number, text, file)
                if self._hopeless:
                    return

    def _leave_out(self, number: int, text: str | Problem | None, file: SourceFile) -> None:
        counts = self.counts
        if text is None:
            counts.blank_lines += 1
        elif isinstance(text, Problem):
            counts.bad += 1
            if len(self.progress.bad) < _LISTED:
                where = shown(file.path) + (f":{number}" if number else "")
                self.progress.bad.append(f"{where}: {text.what}")
                self.progress.fix = self.progress.fix or text.fix
        elif not text:
            counts.empty += 1
        elif len(text) < self.options.min_chars:
            counts.too_short += 1
        else:
            counts.too_long += 1

    def check(self) -> None:
        """Raises DataError that names all damaged files and, unless they may be skipped, all bad records.

        Where reading stopped, it raises why: the records before it are named after the rest is read.
        """
        if self.failed:
            raise self.failed
        if len(self.progress.damaged) == 1 and not self.counts.bad:
            raise DataError(self.progress.damaged[0])
        counts, limit = self.counts, self.options.skip_bad
        share = counts.bad / max(counts.records, 1)
        if self.progress.damaged or (counts.bad and (limit is None or share > limit)):
            rest = counts.bad - len(self.progress.bad)
            raise DataError(
                self._headline(share)
                + "".join(f"\n  {line}" for line in (*self.progress.damaged, *_in_runs(self.progress.bad)))
                + (f"\n  and {rest} more" if rest else "")
                if len(self.progress.damaged) + counts.bad > 1 or limit is not None
                else f"{self.progress.bad[0]}; {self.progress.fix}, or leave it out with --skip-bad"
            )

    def _headline(self, share: float) -> str:
        counts, limit = self.counts, self.options.skip_bad
        parts = [f"{len(self.progress.damaged)} files cannot be read"] if self.progress.damaged else []
        if counts.bad:
            parts.append(f"{counts.bad} of {counts.records} records are bad")
        text = " and ".join(parts)
        if self._hopeless:
            return f"{text}, the first ones, and reading stopped there; {self.progress.fix}:"
        if self.progress.damaged or not counts.bad:
            return f"{text}; repair them:"
        if limit is None:
            return f"{text}; fix them, or leave them out with --skip-bad:"
        fix = self.progress.fix if counts.bad == counts.records else "fix them, or raise it"
        return f"{text}, a share of {share:.2%}, above --skip-bad {limit:g}; {fix}:"

    def _skipped(self) -> list[str]:
        counts = self.counts
        reasons = {
            "blank lines in JSONL files": counts.blank_lines,
            "bad records": counts.bad,
            "empty documents": counts.empty,
            f"documents under {self.options.min_chars} characters": counts.too_short,
            f"documents above {self.options.max_chars} characters": counts.too_long,
        }
        return [f"{number} {what}" for what, number in reasons.items() if number]

    def nothing(self) -> DataError:
        """The error of inputs without a document, after they were read."""
        why = f" but {', '.join(self._skipped())}, which are left out" if self._skipped() else ""
        return DataError(f"{', '.join(map(shown, self.listing.inputs))}: no text in these inputs{why}")

    def notes(self) -> list[str]:
        """What was left out of what was read, one line each; `listing.notes()` are the files that are not read."""
        notes = [f"note: skipped {what}" for what in self._skipped()]
        if stories := self.progress.stories:
            notes.append(
                f"note: {stories} .txt documents contain {_STORY_END!r}; if it stands between documents, build again "
                f"with --separator {_STORY_END!r}"
            )
        if self.options.separator and self.progress.texts and not self.progress.separated:
            notes.append(f"note: --separator {self.options.separator!r} is in none of the .txt files")
        if self.options.separator and not self.progress.texts:
            notes.append(f"note: --separator {self.options.separator!r} has no effect without .txt files")
        return notes

    def report(self) -> dict[str, Any]:
        """Counts and the first bad records, for `report.json`. Files that are not read are counted in one part."""
        ignored = 0 if self.part[0] else len(self.listing.ignored) + len(self.listing.hidden)
        return {**asdict(self.counts), "bad_records": self.progress.bad, "ignored_files": ignored}


def _in_runs(bad: Sequence[str]) -> Iterator[str]:
    """Bad records, `file:number: what`, with those that follow one another and have the same fault in one line."""
    run: list[tuple[str, int, str]] = []
    for line in (*bad, ""):
        match = re.fullmatch(r"(.+?):(\d+): (.*)", line, re.DOTALL)
        this = (match[1], int(match[2]), match[3]) if match else None
        if run and this != (run[-1][0], run[-1][1] + 1, run[-1][2]):
            where, first, what = run[0]
            yield f"{where}:{first}{f' to {run[-1][1]}' if run[1:] else ''}: {what}"
            run = []
        if this:
            run.append(this)
        elif line:
            yield line
