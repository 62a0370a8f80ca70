"""YAML plus `section.key=value` overrides -> `RunConfig`; unknown keys and wrong types are named with the fix."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from megatron_dla.config.adapter import AdapterRunConfig
from megatron_dla.config.aliases import rename_keys, rename_overrides
from megatron_dla.config.schema import RunConfig
from megatron_dla.errors import ConfigError


def _suggest(key: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type; 3 is a float, 1e-3 (a YAML string) too, 3.5 is not an int."""
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{key} = {value!r}: must be one of {', '.join(map(str, choices))}")
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-3 as a string
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number) and (hint is float or number.is_integer()):
            return hint(number)
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and type(None) in typing.get_args(hint):
        (inner,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
        return None if value is None else _coerce(value, inner, key)
    if typing.get_origin(hint) in (tuple, list) and isinstance(value, (list, tuple)):
        kind = typing.get_args(hint)[0]
        return typing.get_origin(hint)(_coerce(item, kind, f"{key}[{n}]") for n, item in enumerate(value))
    if hint == dict[str, str] and isinstance(value, dict):
        return {str(name): _coerce(item, str, f"{key}.{name}") for name, item in value.items()}
    raise ConfigError(f"{key} = {value!r}: expected {getattr(hint, '__name__', hint)}, got {type(value).__name__}")


def fill(cls: type, values: Any, path: str = "") -> Any:
    """A section (or a whole config) from nested dictionaries; `path` leads the keys in messages.

    Raises:
        ConfigError: an unknown key or a value of the wrong type.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'the config'} must be a mapping of keys, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    done = {}
    for key, value in values.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in fields:
            raise ConfigError(f"unknown config key {full!r}: {_suggest(str(key), fields)}")
        hint = hints[key]
        is_section = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        done[key] = fill(hint, value, full) if is_section else _coerce(value, hint, full)
    return cls(**done)


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b=value` -> (["a", "b"], value); the value is read as YAML."""
    key, sep, value = text.partition("=")
    if not sep or not key.strip():
        raise ConfigError(f"override {text!r}: write section.key=value")
    try:
        return key.strip().split("."), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML ({error})") from error


def from_dict(values: dict[str, Any]) -> RunConfig:
    """A `RunConfig` from nested dictionaries (what `to_dict` gives)."""
    return fill(RunConfig, values)


def to_dict(config: RunConfig | AdapterRunConfig) -> dict[str, Any]:
    """The resolved config: alone it reproduces the run."""
    return dataclasses.asdict(config)


def load_any(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig | AdapterRunConfig:
    """As `load_config`; a file with a `delta_mem` section is a run that trains an adapter."""
    values = _read(path, overrides)
    return fill(AdapterRunConfig, values) if "delta_mem" in values else from_dict(values)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML config and apply `section.key=value` overrides.

    Raises:
        ConfigError: no such file, invalid YAML, an unknown key or a value of the wrong type.
    """
    return from_dict(_read(path, overrides))


def _read(path: str | Path, overrides: Iterable[str]) -> dict[str, Any]:
    """The mapping of sections in a YAML file, with overrides.

    Raises:
        ConfigError: no such file, invalid YAML, an unknown key or a value of the wrong type.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(
            f"config {str(path)!r} cannot be read ({error.strerror}): give the path of a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {str(path)!r} is not UTF-8 text ({error}): save it as UTF-8") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"config {str(path)!r} is not valid YAML: {str(error).replace(chr(10), ' ')}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {str(path)!r} must be a mapping of sections, got {type(values).__name__}")
    rename_keys(values)
    for keys, value in rename_overrides(map(parse_override, overrides)):
        node = values
        for key in keys[:-1]:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
            if not isinstance(node, dict):
                raise ConfigError(f"override {'.'.join(keys)}={value}: {key!r} is a value, not a section")
        node[keys[-1]] = value
    return values


def dump_config(config: RunConfig | AdapterRunConfig, path: str | Path) -> None:
    """Write the resolved config as YAML."""
    plain = json.loads(json.dumps(to_dict(config)))  # tuples as lists
    Path(path).write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
