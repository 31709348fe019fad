"""Requests to one server: connections that stay open, one per thread, and patience. The standard library alone.

A question at the start (`once`) ends in a UserError where it stays without an answer; a request of the run
(`patiently`) is tried again while its trouble may pass, and ends in a RunError.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from storage.errors import RunError, UserError
from storage.limits import ANSWER_BYTES, ANSWER_SECONDS
from storage.redact import without_secrets

# Where the key of a server that asks for one is taken from.
KEY_VARIABLE = "PIPELINE_SERVER_KEY"
# Worth another try: the server is busy, restarting, or behind a proxy that is.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 30.0  # seconds between two tries
# Bytes of what a server says of itself, and of an error.
_SHORT = 1 << 20
# Bytes of an answer that many may have at a time. Longer ones come and are used one after another.
_LARGE = 16 << 20
_T = TypeVar("_T")


@dataclass(frozen=True)
class Patience:
    """Limits the waiting for the server. Seconds; `attempts` per request, the first one included."""

    attempts: int = 6
    timeout: float = field(default_factory=lambda: float(ANSWER_SECONDS.value))  # of one answer
    connect_timeout: float = 10.0  # of the questions at the start
    most_bytes: int = field(default_factory=lambda: ANSWER_BYTES.value)  # of one answer
    first_wait: float = 0.5  # doubled after each try


class HttpClient:
    """Asks the server at `url`, `http://host:port` with or without `/v1` and a path before it. `api_key`: a bearer
    token. Raises UserError for what is no such address.
    """

    def __init__(self, url: str, api_key: str | None, patience: Patience) -> None:
        parts = _split(url)
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port
        # Of vLLM itself: a proxy speaks TLS.
        self.port = None if self._secure else parts.port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self._prefix}"
        self._tls = ssl.create_default_context()
        self._headers = {"Content-Type": "application/json", "Accept": "*/*"}
        self._has_key = bool(api_key)
        if api_key:
            if not api_key.isascii() or not api_key.isprintable():
                raise UserError(f"{KEY_VARIABLE}: a key has no line ends and no letters beyond ASCII")
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.patience = patience
        self._local = threading.local()
        self._lock = threading.Lock()
        self._one_large = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()

    def once(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """Status and answer of one question at the start, asked again only while the server is busy.

        Raises UserError without an answer, and for one that no other question would change: a redirection, a refused
        key.
        """
        status, answer = 0, b""
        # The first forward pass of a server may compile.
        timeout = self.patience.connect_timeout if method == "GET" else self.patience.timeout
        for attempt in range(3):
            try:
                with contextlib.ExitStack() as held:
                    status, answer, headers = self._exchange(method, path, body, timeout, held)
            except TimeoutError:
                raise UserError(
                    f"{self.url}{path}: no answer within {timeout:g} s; is it up, and is this a vLLM server?"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                raise UserError(f"{self.url}: no server answers ({_cause(error)}); {self._remedy(error)}") from None
            if 300 <= status < 400:
                elsewhere = without_secrets(headers.get("Location") or "another address")[:200]
                raise UserError(f"{self.url}{path}: sends on to {elsewhere}; give the address of the server itself")
            if status in (401, 403):
                raise UserError(f"{self.url}{path}: {self._refused(status)}")
            if status not in PASSING:
                break
            time.sleep(min(self.patience.first_wait * 2**attempt, _LONGEST_WAIT))
        return status, answer

    def _refused(self, status: int) -> str:
        if self._has_key:
            return f"refuses the key that {KEY_VARIABLE} holds ({status})"
        return f"wants a key ({status}); put the one that the server was started with into {KEY_VARIABLE}"

    def _remedy(self, error: BaseException) -> str:
        if isinstance(error, ssl.SSLCertVerificationError):
            return "for a certificate of your own, let SSL_CERT_FILE name its authority's"
        if isinstance(error, ssl.SSLError):
            return "is it an http:// address?"
        return "start it, or correct --server-url"

    def patiently(self, path: str, body: dict[str, Any], stop: threading.Event, use: Callable[[bytes], _T]) -> _T:
        """Return what `use` makes of the body of a successful POST; of large ones, one at a time.

        Raises RunError after the last attempt, UserError for a refusal, and what `use` raises.
        """
        trouble = ""
        for attempt in range(self.patience.attempts):
            if stop.is_set():
                raise RunError("stopped")
            retry_after = 0.0
            with contextlib.ExitStack() as held:
                try:
                    status, answer, headers = self._exchange("POST", path, body, self.patience.timeout, held)
                except TimeoutError:
                    status, answer = 0, b""
                    trouble = f"no answer within {self.patience.timeout:g} s, which {ANSWER_SECONDS.variable} sets"
                except (OSError, http.client.HTTPException) as error:
                    status, answer = 0, b""
                    trouble = _cause(error)
                if status == 200:
                    return use(answer)
            if status:
                if status in (401, 403):
                    raise UserError(f"{self.url}{path}: {self._refused(status)}")
                trouble = f"{status} {message_of(answer)}".strip()
                if status not in PASSING:
                    raise UserError(f"{self.url}{path}: refuses a sequence with {trouble}")
                with contextlib.suppress(ValueError):
                    retry_after = float(headers.get("Retry-After", ""))
            if attempt + 1 < self.patience.attempts:
                pause = min(self.patience.first_wait * 2**attempt, _LONGEST_WAIT) * random.uniform(0.75, 1.25)
                stop.wait(max(pause, min(retry_after, _LONGEST_WAIT)))
        raise RunError(
            f"{self.url}: still failing after {self.patience.attempts} attempts (last: {trouble}); once the server is "
            "up, start the same command again to go on"
        )

    def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None, timeout: float, held: contextlib.ExitStack
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        """Status, answer and headers. While `held` is open, no other large answer is read."""
        connection = self._connection(timeout)
        # One deadline for all of it: a socket's own is for each piece that comes, and a server may drip.
        until = time.monotonic() + timeout
        ended = threading.Event()
        # Its own, for a connection lets go of one that is to be closed after the answer, which is then still read.
        sockets: list[socket.socket] = []
        clock = threading.Timer(timeout, _end, (sockets, ended))
        clock.daemon = True
        clock.start()
        try:
            payload = None if body is None else json.dumps(body, separators=(",", ":")).encode()
            if connection.sock is None:
                self._connect(connection, until, sockets)
            else:
                sockets.append(connection.sock)
            if ended.is_set():
                raise TimeoutError
            connection.request(method, self._prefix + path, payload, self._headers)
            response = connection.getresponse()
            short = method == "GET" or response.status != 200
            most = min(_SHORT, self.patience.most_bytes) if short else self.patience.most_bytes
            answer = response.read(min(most, _LARGE) + 1)
            if len(answer) > _LARGE:
                if not self._one_large.acquire(timeout=max(0.0, until - time.monotonic())):
                    raise TimeoutError
                held.callback(self._one_large.release)
                answer += response.read(most + 1 - len(answer))
            if ended.is_set():
                raise TimeoutError
            if response.length and len(answer) <= most:
                # Read in one piece, it would have said so itself.
                raise http.client.IncompleteRead(answer, response.length)
        except BaseException as error:
            self._drop(connection)
            if ended.is_set() and isinstance(error, (OSError, http.client.HTTPException, ValueError)):
                raise TimeoutError from None
            raise
        finally:
            clock.cancel()
        if len(answer) > most:
            self._drop(connection)
            if response.status != 200:
                return response.status, answer[:most], response.headers
            advice = f"; give fewer --top-n or shorter sequences, or set {ANSWER_BYTES.variable}"
            raise UserError(
                f"{self.url}{path}: answers with more than {most:,} bytes, the most that is read of one answer"
                f"{'; is this a vLLM server?' if short else advice}"
            )
        if response.will_close:
            self._drop(connection)
        return response.status, answer, response.headers

    def _connect(self, connection: http.client.HTTPConnection, until: float, sockets: list[socket.socket]) -> None:
        """Connect, each step within what is left of the deadline; `sockets` gets what may be waited for."""
        port = self._port or connection.default_port
        error: OSError = TimeoutError()
        for family, kind, protocol, _, address in socket.getaddrinfo(self._host, port, type=socket.SOCK_STREAM):
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(left)
                sock.connect(address)
            except OSError as each:
                error = each
                sock.close()
                continue
            sockets.append(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if isinstance(connection, http.client.HTTPSConnection):
                secure = self._tls.wrap_socket(sock, server_hostname=self._host, do_handshake_on_connect=False)
                sockets[:] = [secure]
                secure.do_handshake()
                sock = secure
            connection.sock = sock
            return
        raise error

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
            connection = kind(self._host, self._port, timeout=timeout)
            self._local.connection = connection
            with self._lock:
                self._open.add(connection)
        connection.timeout = timeout
        if connection.sock is not None:
            connection.sock.settimeout(timeout)
        return connection

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        connection.close()
        self._local.connection = None
        with self._lock:
            self._open.discard(connection)

    def close(self) -> None:
        """Close every connection; a thread that waits on one gets an error at once."""
        with self._lock:
            connections, self._open = list(self._open), set()
        for connection in connections:
            sock = connection.sock
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()


def _end(sockets: list[socket.socket], ended: threading.Event) -> None:
    """End an exchange whose time is up, wherever it is: whoever waits for the socket hears of it at once."""
    ended.set()
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _split(url: str) -> SplitResult:
    """The parts of a server's address. Raises UserError, which never repeats a password."""
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if "@" in url:
            raise UserError(f"--server-url: no name and password in it; a key goes into {KEY_VARIABLE}")
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        # A name that no resolver can be asked for.
        (parts.hostname or "").encode("idna")
    except ValueError:
        sound = False
    if not sound:
        # Not repeated: nothing tells where a secret begins in what is no address.
        raise UserError("--server-url: expected http://host:port")
    if parts.query or parts.fragment:
        raise UserError("--server-url: expected http://host:port, without ? and #")
    return parts


def message_of(body: bytes) -> str:
    """Return the text of an error answer, in one short line."""
    text = body[:_SHORT].decode("utf-8", "replace")
    try:
        answer = json.loads(text)
        answer = answer.get("error", answer) if isinstance(answer, dict) else answer
        said = answer.get("message", answer.get("detail", text)) if isinstance(answer, dict) else answer
        text = said if isinstance(said, str) else json.dumps(said)
    except (ValueError, RecursionError):
        pass
    return without_secrets(" ".join(text[:4000].split()))[:300]


def _cause(error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return without_secrets(" ".join(str(reason).split()))[:200]
