"""Pages in a headless browser that reaches no network."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--mute-audio",
    "--enable-logging=stderr", "--virtual-time-budget=2000",
]  # fmt: skip
# before anything of the page: what its scripts throw, and what it asks for
WATCH = """<script>
addEventListener("error", (event) => { document.documentElement.dataset.error = event.message || "a resource"; }, true);
addEventListener("load", () => {
  document.documentElement.dataset.requests = performance.getEntriesByType("resource").length;
});
</script>"""

needs_chromium = pytest.mark.skipif(
    PROGRAM is None, reason="Chromium is not installed here: tests/support/install_chromium.sh (Debian, root)"
)


@dataclass
class Opened:
    """`dom`: after the scripts have run. `console`: lines of the page's console. `requests`: for other files."""

    dom: str
    console: list[str]
    error: str | None
    requests: int


def open_page(path: Path, work: Path, *flags: str) -> Opened:
    """Open a copy of a page that watches itself. `work`: an empty directory for the browser."""
    text = path.read_text()
    assert text.count("<head>") == 1
    copy = work / "page.html"
    copy.write_text(text.replace("<head>", f"<head>{WATCH}"))
    offline = f"--user-data-dir={work / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"
    command = [str(PROGRAM), *FLAGS, *offline, *flags, "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    root = re.search(r"<html[^>]*>", done.stdout)
    assert root is not None, done.stdout[:500]
    data = dict(re.findall(r'data-(\w+)="([^"]*)"', root[0]))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Opened(done.stdout, console, data.get("error"), int(data.get("requests", -1)))
