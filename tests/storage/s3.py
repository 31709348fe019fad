"""A real S3 API server on loopback, and a proxy before it that fails on request."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.http_server import LocalServer

Matches = Callable[[str, str], bool]  # of method and path


@dataclass
class Fault:
    """What happens to the next `times` requests that match: `500`, `403`, `cut` (half the answer), `slow`, `drop`."""

    kind: str
    times: int = 1
    matches: Matches = lambda method, path: True
    hit: int = 0


@dataclass
class Proxy:
    """url: where clients go. faults: consumed in order; seen: (method, path, Range header) of every request."""

    url: str
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, method: str, path: str) -> str | None:
        with self.lock:
            for fault in self.faults:
                if fault.hit < fault.times and fault.matches(method, path):
                    fault.hit += 1
                    return fault.kind
        return None

    def requests(self, method: str, part: str = "") -> int:
        return sum(seen[0] == method and part in seen[1] for seen in self.seen)


@contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    """A proxy before 127.0.0.1:port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 20  # headers and body in one packet

        def log_message(self, *_: object) -> None:
            pass

        def handle_expect_100(self) -> bool:
            super().handle_expect_100()
            self.wfile.flush()
            return True

        def pass_on(self) -> None:
            body = self.read_body()
            proxy.seen.append((self.command, self.path, self.headers.get("Range", "")))
            kind = proxy.take(self.command, self.path)
            if kind == "drop":
                self.close_connection = True
                return
            if kind in ("500", "403"):
                self.send_response(int(kind))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            upstream = http.client.HTTPConnection("127.0.0.1", port)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "expect")}
            headers["Content-Length"] = str(len(body))
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            data = answer.read()
            upstream.close()
            if kind == "slow":
                time.sleep(0.3)
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(key, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if kind == "cut":
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return
            self.wfile.write(data)

        def read_body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
            return b"".join(parts)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on

    server = LocalServer(Handler)
    proxy = Proxy(server.url)
    try:
        yield proxy
    finally:
        server.close()


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
