"""Keys that were renamed: the old names still work in YAML files and overrides, with a note that names the new one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_dla.errors import ConfigError

RENAMED = {  # old: new
    "parallel.tensor": "parallel.tensor_model_parallel_size",
    "parallel.sequence": "parallel.sequence_parallel",
    "optimizer.clip": "optimizer.clip_grad",
    "delta_mem.heads": "delta_mem.target_modules",
    "training.tau_gate": "tau.gate",
    "training.tau_anneal_share": "tau.anneal_share",
    "training.tau_temperature_start": "tau.temperature_start",
    "training.tau_temperature_end": "tau.temperature_end",
    "training.gate_weight": "gate_loss.weight",
    "training.gate_target": "gate_loss.target",
    "backbone.precision": "training.precision",
    "delta_mem.layers": "delta_mem.layers_to_transform",
}


def rename_keys(values: dict[str, Any]) -> None:
    """Rename the old keys of a mapping of sections, in place.

    Raises:
        ConfigError: a key is given under both names, with different values.
    """
    for old, new in RENAMED.items():
        (old_section, old_key), (section, key) = old.split("."), new.split(".")
        given = values.get(old_section)
        if not isinstance(given, dict) or old_key not in given:
            continue
        value = given.pop(old_key)
        if values.get(section) is None:
            values[section] = {}
        if isinstance(values[section], dict):  # else an error of its own, later
            _check_same(old, value, new, values[section].setdefault(key, value))
        _note(old, new)


def rename_overrides(overrides: Iterable[tuple[list[str], Any]]) -> Iterator[tuple[list[str], Any]]:
    """The same for `(["section", "key"], value)` pairs.

    Raises:
        ConfigError: a key is given under both names, with different values.
    """
    given: dict[str, Any] = {}
    for keys, value in overrides:
        key = ".".join(keys)
        given[key] = value
        new = RENAMED.get(key, key)
        for old in (old for old in RENAMED if RENAMED[old] == new and {old, new} <= set(given)):
            _check_same(old, given[old], new, given[new])
        if new != key:
            _note(key, new)
        yield new.split("."), value


def _check_same(old: str, old_value: Any, new: str, new_value: Any) -> None:
    if old_value != new_value:
        raise ConfigError(f"{new} = {new_value!r} and {old} = {old_value!r} (its old name): set {new} alone")


def _note(old: str, new: str) -> None:
    if not os.environ.get("DLA_LAUNCHED") and os.environ.get("RANK", "0") == "0":  # once a run, not once a rank
        print(f"note: config key {old} is now called {new}", file=sys.stderr)
