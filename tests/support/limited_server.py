"""A server of files over HTTP with a limited rate, in a process of its own.

``python -m tests.support.limited_server FOLDER RATE`` prints its port, then serves until its stdin ends. All
connections together send at most RATE bytes per second. Supports ranges, also from the end.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_STEP = 1 << 18  # bytes that are sent at a time
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class _Rate:
    """Makes callers wait, so that all together do not exceed a rate."""

    def __init__(self, rate: float) -> None:
        self._rate, self._free_at, self._lock = rate, 0.0, threading.Lock()

    def wait(self, size: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - 0.02) + size / self._rate
            pause = self._free_at - now
        if pause > 0:
            time.sleep(pause)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    rate: _Rate

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.folder / self.path.strip("/")
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            start, stop, wanted = 0, length, _RANGE.fullmatch(self.headers.get("Range", ""))
            if wanted is not None:
                first, last = wanted.groups()
                start = int(first) if first else max(length - int(last), 0)
                stop = min(int(last) + 1, length) if first and last else length
            self.send_response(200 if wanted is None else 206)
            self.send_header("ETag", f'"{length}"')
            self.send_header("Content-Length", str(stop - start))
            if wanted is not None:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{length}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.flush()
                while start < stop:
                    self.rate.wait(min(_STEP, stop - start))
                    start += os.sendfile(
                        self.connection.fileno(), file.fileno(), start, min(_STEP, stop - start)
                    )

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the default, 5, concurrent connections wait a second


def main() -> None:
    """Serves a folder until stdin ends."""
    _Handler.folder, _Handler.rate = Path(sys.argv[1]), _Rate(float(sys.argv[2]))
    server = _Server(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    server.shutdown()


if __name__ == "__main__":
    main()
