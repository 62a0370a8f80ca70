"""Leaving autocast, for what must be computed in the dtype that it is written in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """`function` with autocast off on the device of its first tensor.

    A matrix product under autocast is bf16: a score would move across tau, and backward would meet two dtypes.
    """

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if device == "meta" or not torch.is_autocast_enabled(device):  # there is no autocast of shapes alone
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


__all__ = ["without_autocast"]
