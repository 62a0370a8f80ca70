"""Pages in a headless browser that reaches no network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--mute-audio",
    "--enable-logging=stderr",
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
    command = [str(PROGRAM), *FLAGS, "--virtual-time-budget=2000", *offline, *flags, "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    root = re.search(r"<html[^>]*>", done.stdout)
    assert root is not None, done.stdout[:500]
    data = dict(re.findall(r'data-(\w+)="([^"]*)"', root[0]))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Opened(done.stdout, console, data.get("error"), int(data.get("requests", -1)))


class Tab:
    """A page that stays open, driven over the DevTools protocol on two pipes."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._id, self.console = to, back, b"", 0, list[str]()
        (target,) = (t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        self.call("Runtime.enable")

    _session: str | None = None

    def call(self, method: str, **params) -> dict:
        """The result of a method. What the page logs or throws meanwhile is kept in `console`."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._back, 1 << 16)
                assert part, "the browser has ended"
                self._rest += part
            one, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(one)
            if answer.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                self.console.append(json.dumps(answer["params"]))
            if answer.get("id") == self._id:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, script: str):
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 60):
        """The first true value of `script`."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, f"{script} stayed {value!r}"
            time.sleep(0.05)
        return value


@contextmanager
def open_tab(address: str, work: Path) -> Iterator[Tab]:
    """A page of a server on this machine, open in real time. `work`: a directory for the browser."""
    read_commands, to = os.pipe()
    back, write_answers = os.pipe()
    command = [str(PROGRAM), *FLAGS, f"--user-data-dir={work / 'profile'}", "--remote-debugging-pipe", "about:blank"]
    shell = ["bash", "-c", f'exec "$@" 3<&{read_commands} 4>&{write_answers}', "bash", *command]
    with open(work / "browser.log", "wb") as log:
        browser = subprocess.Popen(shell, pass_fds=(read_commands, write_answers), stdout=log, stderr=log)
    os.close(read_commands)
    os.close(write_answers)
    try:
        tab = Tab(to, back)
        tab.call("Page.navigate", url=address)
        tab.wait(f"location.href.startsWith('{address}') && document.readyState === 'complete'")
        yield tab
    finally:
        browser.terminate()
        browser.wait(30)
        os.close(to)
        os.close(back)
