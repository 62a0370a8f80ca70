"""The learning rates of a study and of its arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from megatron_dla.config.load import fill
from megatron_dla.errors import ConfigError
from megatron_dla.study.generators import NotBool

Rate = Annotated[float, NotBool, Field(gt=0, le=1e3)]
KEY = "learning_rates"


@dataclass
class _Own:
    learning_rates: tuple[Rate, ...] = ()


def rate_name(rate: float) -> str:
    """The directory of the cells with a learning rate."""
    return f"lr_{rate:g}"


def check_rates(key: str, rates: Sequence[float]) -> None:
    """Raises ConfigError where a learning rate is given twice, or two have the same directory."""
    names: dict[str, float] = {}
    for rate in rates:
        other = names.get(rate_name(rate))
        if other == rate:
            raise ConfigError(f"{key} = {list(rates)}: a value is given twice")
        if other is not None:
            raise ConfigError(
                f"{key} = {list(rates)}: {other!r} and {rate!r} share the directory {rate_name(rate)}: "
                "give rates that differ in their first six digits"
            )
        names[rate_name(rate)] = rate


def split_rates(where: str, keys: dict[str, Any]) -> tuple[tuple[float, ...], dict[str, Any]]:
    """(learning rates of an arm's own, or (), what it changes in its config). Raises ConfigError."""
    if KEY not in keys:
        return (), keys
    rates = fill(_Own, {KEY: keys[KEY]}, where).learning_rates
    if not rates:
        raise ConfigError(f"{where}.{KEY} = {keys[KEY]!r}: give at least one, or leave the key out")
    check_rates(f"{where}.{KEY}", rates)
    return rates, {key: value for key, value in keys.items() if key != KEY}
