"""Paths in configs and profiles: `~` and environment variables."""

from __future__ import annotations

import os
import re

from megatron_dla.masking import check_url


def expand(path: str) -> str:
    """`path` with a leading `~` or `~user` and all `$NAME` and `${NAME}` replaced.

    Raises:
        ValueError: a variable is not set, there is no such user, or it is a URL with credentials.
    """
    full = os.path.expanduser(os.path.expandvars(path))
    if unset := [name for name in re.findall(r"\$\{?([A-Za-z_]\w*)", path) if name not in os.environ]:
        raise ValueError(f"the environment variable {unset[0]} is not set: set it, or write the path out")
    if full.startswith("~"):
        raise ValueError(f"there is no home directory {full.split('/')[0]}: write the path out")
    return check_url(full)
