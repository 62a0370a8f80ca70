"""Numbers in environment variables. Standard library only: launchers import this."""

from __future__ import annotations

import os
import re

from megatron_dla.errors import UserError


def shown(text: str) -> str:
    """A value for a message, the middle of a long one left out."""
    return repr(text if len(text) <= 80 else f"{text[:40]}...{text[-20:]}")


def environment_number(name: str, default: int, fix: str, least: int = 0, most: int = 2**31 - 1) -> int:
    """The whole number in an environment variable, `default` where it is not set.

    Raises:
        UserError: it is none, or not in [least, most]; the message ends with `fix`.
    """
    if (text := os.environ.get(name)) is None:
        return default
    number = int(text) if re.fullmatch(r"[0-9]{1,18}", text.strip()) else -1
    if not least <= number <= most:
        raise UserError(f"{name} = {shown(text)} in the environment: want a number from {least} to {most}: {fix}")
    return number
