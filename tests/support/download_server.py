"""A local HTTP server with range requests, and with the faults that a download must survive."""

from __future__ import annotations

import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves `files`. It breaks a connection after so many bytes as the next entry of `cuts` says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges: list[str | None] = []
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.knows_range = True

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/zips/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.ranges.append(wanted)
        if self.server.statuses:
            self.send_error(self.server.statuses.pop(0))
            return
        body = self.server.files[self.path.rpartition("/")[2]]
        start = 0
        if wanted and self.server.knows_range:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = start + self.server.cuts.pop(0) if self.server.cuts else len(body)
        self.wfile.write(body[start:end])
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        """The requests are in Server.ranges."""
