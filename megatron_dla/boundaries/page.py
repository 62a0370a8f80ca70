"""The page: one HTML file that asks the network for nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from megatron_dla import __version__
from megatron_dla.boundaries.collect import Head, Record
from megatron_dla.errors import UserError
from megatron_dla.files import write_text
from megatron_dla.report.page import esc, head
from megatron_dla.resources import resource


def choose(record: Record, wanted: tuple[int, int] | None) -> Head:
    """The head to show: (layer, head), or the median by boundary rate.

    Raises:
        UserError: there is no such head.
    """
    by_rate = sorted(record.heads, key=lambda one: one.counts["boundaries"])
    if wanted is None:
        return by_rate[len(by_rate) // 2]
    for one in record.heads:
        if (one.layer, one.head) == wanted:
            return one
    layers = sorted({one.layer for one in record.heads})
    raise UserError(
        f"--head {wanted[0]},{wanted[1]}: layers {', '.join(map(str, layers))} open slots, with heads 0 to "
        f"{max(one.head for one in record.heads)}"
    )


def write_page(record: Record, shown: Head, out: Path, model: str, text: str) -> Path:
    """Write the page; `model` and `text` name what it is about. Raises OSError."""
    data = {
        "tokens": record.tokens,
        "capacity": record.capacity,
        "shown": record.heads.index(shown),
        "heads": [asdict(one) for one in record.heads],
    }
    # no "<" can end the script element early
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    script = resource("boundaries/script.js").read_text()
    rows = "".join(_row(one, i, len(record.tokens)) for i, one in enumerate(record.heads))
    page = f"""{head("boundaries", f"{esc(model)}: boundaries in {esc(text)}")}
<body>
<main>
<h1>Where {esc(model)} opens slots in {esc(text)}</h1>
<p>{len(record.tokens)} tokens, up to {record.capacity} slots a head; {esc(record.rule)}. A slot opens where a token
differs from what the newest slot holds; when all are in use, two neighbours merge first. Choose a head in the table or
the overview.</p>
<div class="two">
<figure><figcaption>All heads: tokens that open a slot</figcaption><canvas id="overview"></canvas></figure>
<figure><figcaption>Slot of each token (down) as the text is read (across); a colour is a slot</figcaption>
<canvas id="history"></canvas></figure>
</div>
<h2 id="title"></h2>
<p id="text" class="text"></p>
<div class="two">
<figure><figcaption>Tokens in a slot, mean, newest first</figcaption><div class="bars" id="sizes"></div></figure>
<figure><figcaption>Readout weight, mean, newest first</figcaption><div class="bars" id="weights"></div></figure>
</div>
<h2>Heads</h2>
<table id="heads"><tr><th>layer</th><th>head</th><th>boundaries</th><th>of tokens</th><th>merges</th>
<th>of the newest two</th><th>slots at the end (tokens)</th></tr>{rows}</table>
<footer>Written by <code>dla boundaries</code> (megatron-dla {__version__}).</footer>
</main>
<script type="application/json" id="data">{embedded}</script>
<script>
{script}</script>
</body>
</html>
"""
    write_text(out, page, fsync=False)
    return out


def _row(one: Head, number: int, tokens: int) -> str:
    counts = one.counts
    newest = f"{counts['newest'] / counts['merges']:.0%}" if counts["merges"] else "-"
    cells = (
        one.layer, one.head, counts["boundaries"], f"{counts['boundaries'] / tokens:.1%}", counts["merges"], newest,
        " ".join(map(str, one.final)),
    )  # fmt: skip
    return f'<tr data-head="{number}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
