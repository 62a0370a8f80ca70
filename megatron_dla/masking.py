"""Secrets are left out of files and output. Standard library only: launchers import this."""

from __future__ import annotations

import re
from typing import Any

SECRET_NAME = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|CREDENTIAL|AUTH|(?<![A-Z])KEY|KEY(?![A-Z])|(?<![A-Z])(PASS|PAT|PWD)(?![A-Z])",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?<![\w./])([A-Za-z_]\w*)=")  # of --env NAME=value
_END = re.compile(r"[\s,;\"']|$")
_USER = re.compile(r"(://[^/\s:@]*):[^@/\s]+@")
_LOGIN = re.compile(r"(https?://)[^/\s:@]+@", re.IGNORECASE)  # a token; other protocols name a bucket so
_QUERY = re.compile(
    r"([?&][\w.-]*(?:token|secret|signature|credential|passw\w*|key|sig)[\w.-]*=)[^&\s'\"]+", re.IGNORECASE
)


def mask_text(text: str) -> str:
    """Passwords in URLs, and the values of signed queries, as ***."""
    return _QUERY.sub(r"\1***", _USER.sub(r"\1:***@", _LOGIN.sub(r"\1***@", text)))


def check_url(text: str) -> str:
    """`text`, unless it is a URL with a password, a token or a signature in it.

    Raises:
        ValueError: it is. Configs, commands and messages are written to files; the environment is not.
    """
    if "://" in text and mask_text(text) != text:
        raise ValueError(
            "a URL with credentials would be written to files: take them out; s3, gs, hf and the other protocols of "
            "fsspec read theirs from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, HF_TOKEN, FSSPEC_*) "
            "or their own files, http and https from ~/.netrc"
        )
    return text


def mask_command(text: str) -> str:
    """`mask_text`, and *** for the values of words such as HF_TOKEN=value."""
    text, shown, at = mask_text(text), "", 0
    for found in _NAME.finditer(text):
        if found.start() >= at and SECRET_NAME.search(found[1]):
            end = _END.search(text, found.end())
            assert end is not None
            shown, at = f"{shown}{text[at : found.end()]}***", end.start()
    return shown + text[at:]


def mask_environment(env: dict[str, str]) -> dict[str, str]:
    """*** for the values of variables such as HF_TOKEN; the other values by `mask_command`."""
    return {name: "***" if SECRET_NAME.search(name) else mask_command(value) for name, value in env.items()}


def mask_values(value: Any) -> Any:
    """Nested lists and mappings with every text by `mask_text`. Keys decide nothing: `key_dim` is no secret."""
    if isinstance(value, dict):
        return {key: mask_values(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_values(x) for x in value]
    return mask_text(value) if isinstance(value, str) else value
