"""Secrets are left out of files and output. Standard library only: launchers import this."""

from __future__ import annotations

import re
from typing import Any

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|(?<![A-Z])KEY|KEY(?![A-Z])", re.IGNORECASE)
_USER = re.compile(r"(://[^/\s:@]*):[^@/\s]+@")
_QUERY = re.compile(
    r"([?&][\w.-]*(?:token|secret|signature|credential|passw\w*|key|sig)[\w.-]*=)[^&\s'\"]+", re.IGNORECASE
)


def mask_text(text: str) -> str:
    """Passwords in URLs, and the values of signed queries, as ***."""
    return _QUERY.sub(r"\1***", _USER.sub(r"\1:***@", text))


def mask_environment(env: dict[str, str]) -> dict[str, str]:
    """*** for the values of variables such as HF_TOKEN; the other values by `mask_text`."""
    return {name: "***" if SECRET_NAME.search(name) else mask_text(value) for name, value in env.items()}


def mask_values(value: Any) -> Any:
    """Nested lists and mappings with every text by `mask_text`. Keys decide nothing: `key_dim` is no secret."""
    if isinstance(value, dict):
        return {key: mask_values(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_values(x) for x in value]
    return mask_text(value) if isinstance(value, str) else value
