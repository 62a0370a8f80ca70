"""YAML plus `section.key=value` overrides -> a typed config; pydantic checks types and ranges."""

from __future__ import annotations

import dataclasses
import difflib
import json
import reprlib
import typing
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_dla.config.adapter import AdapterRunConfig
from megatron_dla.config.aliases import rename_keys, rename_overrides
from megatron_dla.config.schema import RunConfig
from megatron_dla.config.yaml_text import parse_yaml, read_yaml
from megatron_dla.errors import ConfigError
from megatron_dla.masking import mask_text
from megatron_dla.resources import find_yaml

_RULES = ConfigDict(allow_inf_nan=False, coerce_numbers_to_str=True)
_WORDS = {"a valid tuple": "a list", "a valid dictionary": "a mapping", "Field required": "one more is needed"}
_shown = reprlib.Repr()  # of a value in a message: YAML's aliases make gigabytes of a few lines
_shown.maxstring = _shown.maxother = _shown.maxlong = 250
_shown.maxlist = _shown.maxdict = _shown.maxtuple = 12
_shown.maxlevel = 2


@lru_cache
def _fields(cls: Any) -> dict[str, tuple[Any, TypeAdapter[Any] | None]]:
    """Name -> (type, its validator) of each field of the dataclass `cls`; no validator for a section."""
    plain, full = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
    return {
        f.name: (plain[f.name], None if _is_section(plain[f.name]) else TypeAdapter(full[f.name], config=_RULES))
        for f in dataclasses.fields(cls)
    }


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _value(kind: Any, adapter: TypeAdapter[Any], value: Any, key: str) -> Any:
    """`value` as its field's type: 3 is a float, 1e-3 (a string to YAML) too; 3.5 is not an int, 1 not a bool."""
    if kind in (bool, int, float, str) and isinstance(value, bool) != (kind is bool):
        raise ConfigError(f"{key} = {_shown.repr(value)}: must be {kind.__name__}, got {type(value).__name__}")
    number: Any = value
    if kind in (int, float) and isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise ConfigError(f"{key} = {_shown.repr(value)}: must be {kind.__name__}, got str") from None
    try:
        return adapter.validate_python(number)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        bad = first["input"] if at else value
        bad = mask_text(bad) if isinstance(bad, str) else bad
        reason = first["msg"].replace("Input should", "must").removeprefix("Value error, ")
        for theirs, ours in _WORDS.items():
            reason = reason.replace(theirs, ours)
        raise ConfigError(f"{key}{at} = {_shown.repr(bad)}: {reason}") from None


def fill(cls: type, values: Any, path: str = "", defaults: Any = None) -> Any:
    """A section (or a whole config) from nested dictionaries.

    Args:
        path: key of the section, for messages. defaults: values of the keys that are not given; None = those of `cls`.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type or out of range.
    """
    defaults = cls() if defaults is None else defaults
    if values is None:
        return defaults
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'the config'} = {_shown.repr(values)}: must be a mapping of keys")
    fields, done = _fields(cls), {}
    for key, value in values.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in fields:
            raise ConfigError(f"unknown config key {full!r}: {_suggest(str(key), fields)}")
        kind, adapter = fields[key]
        if value is None and getattr(cls, key, None) == "":
            value = ""  # null, for a default that docs/config.md calls (none)
        done[key] = (
            fill(kind, value, full, getattr(defaults, key)) if adapter is None else _value(kind, adapter, value, full)
        )
    return dataclasses.replace(defaults, **done)


def check_ranges(section: Any, path: str = "") -> None:
    """The types and ranges of a section or config that was not read from YAML.

    Raises:
        ConfigError: the key, its value and what it must be.
    """
    for key, (kind, adapter) in _fields(section.__class__).items():
        value, full = getattr(section, key), f"{path}.{key}" if path else key
        if adapter is None:
            check_ranges(value, full)
        else:
            _value(kind, adapter, value, full)


def _suggest(key: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b=value` -> (["a", "b"], value); the value is read as YAML."""
    key, sep, value = text.partition("=")
    if not sep or not key.strip():
        raise ConfigError(f"override {text!r}: write section.key=value")
    try:
        return key.strip().split("."), parse_yaml(value)
    except ConfigError as error:
        raise ConfigError(f"override {mask_text(text)!r}: {mask_text(str(error))}") from error


def from_dict(values: dict[str, Any]) -> RunConfig:
    """A `RunConfig` from nested dictionaries (what `to_dict` gives)."""
    return fill(RunConfig, values)


def to_dict(config: RunConfig | AdapterRunConfig) -> dict[str, Any]:
    """The resolved config: alone it reproduces the run."""
    return dataclasses.asdict(config)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig | AdapterRunConfig:
    """Read a YAML config and apply `section.key=value` overrides; one with a `delta_mem` section trains an adapter.

    A config may name another one as its `base` and give only the keys that differ.

    Raises:
        ConfigError: no such file, invalid YAML, an unknown key, or a value of the wrong type or out of range.
    """
    values = _read(path, overrides)
    return fill(AdapterRunConfig, values) if "delta_mem" in values else from_dict(values)


def _nested_sections() -> frozenset[str]:
    """Names of sections inside of sections."""
    found = set()
    for kind in (RunConfig, AdapterRunConfig):
        for name, section in typing.get_type_hints(kind).items():
            inner = typing.get_type_hints(section)
            found |= {f"{name}.{key}" for key, value in inner.items() if dataclasses.is_dataclass(value)}
    return frozenset(found)


_NESTED = _nested_sections()


def _read(path: str | Path, overrides: Iterable[str]) -> dict[str, Any]:
    """The mapping of sections in a YAML file, with overrides."""
    values = _read_file(find_yaml(path, "configs", "config"), ())
    for keys, value in rename_overrides(map(parse_override, overrides)):
        if len(keys) == 1:  # it would reset all other keys of the section
            raise ConfigError(f"override {keys[0]}={_shown.repr(value)}: give one key of it, {keys[0]}.key=value")
        node = values
        for key in keys[:-1]:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
            if not isinstance(node, dict):
                raise ConfigError(f"override {'.'.join(keys)}={_shown.repr(value)}: {key!r} is a value, not a section")
        if ".".join(keys) in _NESTED or (value is None and isinstance(node.get(keys[-1]), dict)):  # likewise
            name = ".".join(keys)
            raise ConfigError(f"override {name}={_shown.repr(value)}: give one key of it, {name}.key=value")
        node[keys[-1]] = value
    return values


def _read_file(path: Path, derived: tuple[Path, ...]) -> dict[str, Any]:
    """The sections of a config file over those of its `base`; `derived`: the files that it is a base of."""
    values = read_yaml(path, "config")
    rename_keys(values)
    if "base" not in values:
        return values
    where, base = f"config {str(path)!r}: base", values.pop("base")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{where} = {_shown.repr(base)}: give the path of a YAML file, or the name of a shipped config"
        )
    beside, files = path.parent / base, (*derived, path.resolve())
    try:
        found = beside if beside.is_file() else find_yaml(base, "configs", "config")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if found.resolve() in files:
        raise ConfigError(f"{where} = {base!r}: a config cannot be a base of itself")
    merged = _read_file(found, files)
    for section, keys in values.items():
        old = merged.get(section)
        merged[section] = {**old, **keys} if isinstance(old, dict) and isinstance(keys, dict) else keys or old
    return merged


def to_yaml(config: RunConfig | AdapterRunConfig) -> str:
    """The resolved config as `load_config` reads it."""
    plain = json.loads(json.dumps(to_dict(config)))  # tuples as lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def dump_config(config: RunConfig | AdapterRunConfig, path: str | Path) -> None:
    """Write the resolved config as YAML."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")
