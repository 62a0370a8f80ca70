"""Numbers, tables and plots, as the parts of a study's report write them."""

from __future__ import annotations

import html
from typing import Any


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def show_difference(found: dict[str, Any] | None, digits: int) -> str:
    """A paired difference with its interval."""
    if found is None:
        return "-"
    mean, low, high = (number(found[key], f"+.{digits}f") for key in ("mean", "low", "high"))
    return mean if found["low"] is None else f"{mean} [{low}, {high}]"


def html_table(rows: list[list[str]]) -> str:
    """A table of plain texts; the first row is its header."""
    head, *others = rows
    cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in others)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def plots() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
