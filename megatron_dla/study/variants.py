"""What a study and an ablation share: variants of one config, their names and seeds, the words of their commands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from megatron_dla.config import AdapterRunConfig, RunConfig, load_config
from megatron_dla.errors import ConfigError, UserError

Config = TypeVar("Config", RunConfig, AdapterRunConfig)
OWN = ("run.dir", "run.name", "run.seed")
"""Keys of a run that the keys dir, name and seeds of the study or ablation set."""


def check_names(names: Mapping[str, Iterable[str]]) -> None:
    """Raises ConfigError for a name, under the key that has it, that cannot be that of a directory."""
    for key, found in names.items():
        for name in found:
            if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
                raise ConfigError(f"{key}: {name!r} names a directory: use letters, digits and . _ + -")


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
    values = {**overrides, **changes}
    try:
        config = load_config(base, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if not isinstance(config, kind):
        found = "adapters, which `dla ablate`" if kind is RunConfig else "pretraining, which `dla study`"
        raise ConfigError(f"base = {base!r}: is a config of {found} compares")
    return config


def split_words(command: str, words: Sequence[str]) -> tuple[bool, str]:
    """(whether only the report is wanted, the config) of `dla COMMAND [report] CONFIG`. Raises UserError."""
    *before, path = words
    if before not in ([], ["report"]):
        raise UserError(f"{command} {' '.join(words)}: write `dla {command} CONFIG` or `dla {command} report CONFIG`")
    return bool(before), path
