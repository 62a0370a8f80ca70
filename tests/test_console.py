"""What may reach a terminal, and terminals that cannot show everything."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

from megatron_dla.console import escaped, protect


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_are_shown_and_not_obeyed() -> None:
    screen = Screen()
    protect(screen).write("a\x1b[31mb\x07\x9b\r\tc\n\u202e\ud800 caf\xe9 \U0001f600\u200d")
    shown = "a\\x1b[31mb\\x07\\x9b\\r\tc\n\\u202e\\ud800 caf\xe9 \U0001f600\u200d"
    assert screen.getvalue() == shown == escaped(shown)
    assert protect(file := io.StringIO()) is file  # a file gets what is written


def run(code: str, **options) -> str:
    """What `entry` makes of standard output, of a process that runs `code`."""
    script = f"import megatron_dla.cli as cli\ncli.main = lambda: {code}\ncli.entry()"
    environment = {**os.environ, "PYTHONIOENCODING": options.pop("encoding", "utf-8")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60, **options)
    return (done.stdout or b"").decode()


def test_a_terminal_without_unicode(tmp_path: Path) -> None:
    assert run("print('caf\\xe9')", encoding="ascii", capture_output=True) == "caf\\xe9\n"
    assert run("print('caf\\xe9 \\x1b')", capture_output=True) == "caf\xe9 \x1b\n"  # as it is, to a pipe
    ours, theirs = pty.openpty()
    run("print('\\x1b[2J')", stdout=theirs)
    assert os.read(ours, 100) == b"\\x1b[2J\r\n"
    os.close(ours)
    os.close(theirs)
