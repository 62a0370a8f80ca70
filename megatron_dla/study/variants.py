"""What a study and an ablation share: variants of one config, their names and seeds, the words of their commands."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from megatron_dla.config import AdapterRunConfig, RunConfig, load_config
from megatron_dla.config.yaml_text import read_yaml
from megatron_dla.errors import ConfigError, UserError
from megatron_dla.resources import find_yaml

Config = TypeVar("Config", RunConfig, AdapterRunConfig)
Name = TypeVar("Name")
OWN = ("run.dir", "run.name", "run.seed")
"""Keys of a run that the keys dir, name and seeds of the study or ablation set."""


_LONGEST = 100  # of a name
_TAKEN = re.compile(r"synthetic|.*\.(json|html|png|yaml|log)", re.IGNORECASE)  # what else lies beside the directories


def read_file(path: str | Path, what: str) -> dict[str, Any]:
    """The content of a YAML file, or of a shipped one by its name. `what`: study or ablation. Raises ConfigError."""
    values = read_yaml(find_yaml(path, "configs", what, pattern=f"{what}_*.yaml"), what)
    check_plain(values, "", (), set())
    return values


def check_plain(value: Any, key: str, above: tuple[int, ...], seen: set[int]) -> None:
    """Raises ConfigError for what YAML has and JSON has not: the records of a study are JSON.

    Args:
        key: of the value, for messages. above: ids of what holds it. seen: of lists and mappings that are done.
    """
    if id(value) in above:
        raise ConfigError(f"{key} = {reprlib.repr(value)}: holds itself through an alias: write the value out")
    if isinstance(value, dict | list | tuple):
        if id(value) in seen:
            return
        seen.add(id(value))
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict) and not isinstance(name, str):
                kind = type(name).__name__
                raise ConfigError(f"{key or 'the file'}: the key {reprlib.repr(name)} is {kind}: put it in quotes")
            inner = f"[{name}]" if not isinstance(value, dict) else f".{name}" if key else str(name)
            check_plain(part, key + inner, (*above, id(value)), seen)
    elif not isinstance(value, str | int | float | None):
        raise ConfigError(
            f"{key} = {reprlib.repr(value)}: is {type(value).__name__}: use a text, a number, a list or a mapping"
        )


def check_names(names: Mapping[str, Iterable[str]]) -> None:
    """Raises ConfigError for a name, under the key that has it, that cannot be that of a directory."""
    for key, found in names.items():
        for name in found:
            if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
                raise ConfigError(f"{key}: {name!r} names a directory: use letters, digits and . _ + -")
            if len(name) > _LONGEST or _TAKEN.fullmatch(name):
                why = f"has {len(name)} letters" if len(name) > _LONGEST else "is the name of another file there"
                raise ConfigError(f"{key}: {reprlib.repr(name)} names a directory and {why}: use another name")


def check_seeds(key: str, seeds: Sequence[int]) -> None:
    """Raises ConfigError for none, or for one that is given twice."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{key} = {list(seeds)}: give at least one, none twice")


def load_variant(
    kind: type[Config], base: str, overrides: dict[str, Any], changes: dict[str, Any], where: str
) -> Config:
    """`base` with the keys that all variants change, and its own ({section.key: value}).

    Raises:
        ConfigError: a wrong key or value, named with `where` where it is the variant's; a base of another kind.
    """
    for place, keys in (("overrides", overrides), (where, changes)):
        if own := next((key for key in OWN if key in keys), None):
            raise ConfigError(f"{place}: {own} = {keys[own]!r}: follows from the keys dir, name and seeds of this file")
    try:
        config = _load(base, {**overrides, **changes})
    except ConfigError as error:
        raise ConfigError(f"{_culprit(base, overrides, str(error)) or where}: {error}") from error
    if not isinstance(config, kind):
        found = "adapters, which `dla ablate`" if kind is RunConfig else "pretraining, which `dla study`"
        raise ConfigError(f"base = {base!r}: is a config of {found} compares")
    return config


def _load(base: str, values: dict[str, Any]) -> RunConfig | AdapterRunConfig:
    return load_config(base, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def _culprit(base: str, overrides: dict[str, Any], message: str) -> str:
    """The key that brings `message` without the variant's own keys; "" where none does."""
    for key, values in (("base", {}), ("overrides", overrides)):
        try:
            _load(base, values)
        except ConfigError as error:
            if str(error) == message:
                return key
    return ""


def split_words(command: str, words: Sequence[str]) -> tuple[bool, str]:
    """(whether only the report is wanted, the config) of `dla COMMAND [report] CONFIG`. Raises UserError."""
    *before, path = words
    if before not in ([], ["report"]):
        raise UserError(f"{command} {' '.join(words)}: write `dla {command} CONFIG` or `dla {command} report CONFIG`")
    return bool(before), path


def split_task(text: str, *, report: bool, out: Path | None) -> tuple[int, int]:
    """(I, N) of --task I/N. Raises UserError, also where an option would not count: a part makes no report."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    part = (int(match[1]), int(match[2])) if match else (0, 0)
    if part[0] >= part[1]:
        raise UserError(f"--task {text}: write I/N with 0 <= I < N")
    if part != (0, 1) and (report or out is not None):
        raise UserError(f"--task {text}: a report is of all tasks; leave out {'--task' if report else '--out'}")
    return part


@contextmanager
def named(key: str) -> Iterator[None]:
    """Puts the key of a variant before the message of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def of_part(names: Iterable[Name], part: tuple[int, int]) -> list[Name]:
    """The arms or recipes of task i of n: no two tasks share one, since its later runs depend on its first ones."""
    return [name for number, name in enumerate(names) if number % part[1] == part[0]]
