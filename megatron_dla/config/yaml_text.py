"""YAML that people write: keys that are given twice are refused, and a text key gets its number as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_dla.errors import ConfigError

MAX_DIGITS = 400  # of a number; Python itself refuses to print integers of more than 4300 digits


class _Int(int):
    """An integer that knows how it was written: 0123456 is an account, 24:00:00 a time limit."""

    written: str

    def __str__(self) -> str:
        return self.written


class _Float(float):
    """The same of a decimal number."""

    written: str

    def __str__(self) -> str:
        return self.written


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
                raise ConfigError(
                    f"key {key.value!r} is given twice, in lines {lines[key.value]} and {line}: keep one of them"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_text(self, node: Any) -> str:
        text = self.construct_scalar(node)
        if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in text):
            raise ConfigError(f"line {node.start_mark.line + 1}: {text[:80]!r} has a NUL character or half a character")
        return text

    def construct_int(self, node: Any) -> Any:
        return self._written(_Int, self.construct_yaml_int, node)

    def construct_float(self, node: Any) -> Any:
        return self._written(_Float, self.construct_yaml_float, node)

    def _written(self, kind: type, construct: Any, node: Any) -> Any:
        text = self.construct_scalar(node)
        if len(text) > MAX_DIGITS:
            raise ConfigError(f"line {node.start_mark.line + 1}: a number of {len(text)} characters")
        value = kind(construct(node))
        value.written = text
        return value


# dates stay text: no key is one
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_float)


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ConfigError: it is not valid YAML, nested too deeply, or gives a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError("nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: !!int of a word, and the like
        raise ConfigError(f"not valid YAML: {str(error).replace(chr(10), ' ')}") from error


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one.

    Args:
        what: `config` or `profile`, for messages.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or is not such a mapping.
    """
    where = f"{what} {str(path)!r}"
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where} cannot be read ({error.strerror}): give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text ({error}): save it as UTF-8") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if not isinstance(values, dict | None):
        raise ConfigError(f"{where} must be a mapping of keys, got {type(values).__name__}")
    return values or {}
