"""An HTTP server of a directory that fails in the ways that networks and stores do."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer(ThreadingHTTPServer):
    """Serves the files below `root` at `url`.

    Attributes:
        faults: {path: what happens to the next requests for it}. always: {path: what happens to all others}.
            An answer code; "drop" (the connection ends inside the body), "short" (half a file), "wrong" (other bytes),
            "delay", "stall" (no end of the body until `released` is set).
        requests: paths in the order of the requests. logins: their Authorization headers.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: defaultdict[str, list[str]] = defaultdict(list)
        self.always: dict[str, str] = {}
        self.requests: list[str] = []
        self.logins: list[str | None] = []
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that has gone away is part of the tests."""

    def wait_for(self, path: str, count: int = 1) -> None:
        end = time.monotonic() + 30
        while self.requests.count(path) < count:
            assert time.monotonic() < end, f"{path} was not asked for: {self.requests}"
            time.sleep(0.01)


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def do_GET(self) -> None:
        name = self.path.removeprefix("/")
        server = self.server
        server.requests.append(name)
        server.logins.append(self.headers.get("Authorization"))
        fault = server.faults[name].pop(0) if server.faults[name] else server.always.get(name, "")
        file = server.root / name
        if fault.isdecimal() or not file.is_file():
            self.send_error(int(fault or 404))
            return
        body = file.read_bytes()
        half = body[: len(body) // 2]
        if fault == "delay":
            time.sleep(0.2)
        if fault == "wrong":
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(200)
        self.send_header("Content-Length", str(len(half if fault == "short" else body)))
        self.end_headers()
        self.wfile.write(half if fault in ("short", "drop", "stall") else body)
        if fault == "stall":
            server.released.wait()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""
