"""A server of somebody else: what it sends is bounded in time and bytes, whatever it does. Loopback alone."""

from __future__ import annotations

import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from stages.http_client import HttpClient, Patience
from stages.serve_command import Serving
from storage.errors import RunError, UserError

SECONDS = 1.0
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def drip(peer: socket.socket, head: bytes, each: bytes) -> None:
    """A little at a time, for ever, so that no pause is ever long."""
    peer.sendall(head)
    while True:
        peer.sendall(each)
        time.sleep(0.05)


def flood(peer: socket.socket, head: bytes, each: bytes) -> None:
    peer.sendall(head)
    while True:
        peer.sendall(each)


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def one(peer: socket.socket) -> None:
        with suppress(OSError), peer:
            peer.recv(65536)
            answer(peer)

    def accept() -> None:
        while not stop.is_set():
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(peer,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        listener.close()


SLOW = {
    "says nothing": lambda peer: time.sleep(30),
    "drips its status line": lambda peer: drip(peer, b"HTTP/1.1 200 ", b"O"),
    "drips its headers": lambda peer: drip(peer, OK, b"X-A: b\r\n"),
    "drips one header": lambda peer: drip(peer, OK + b"X-A: ", b"b"),
    "continues without end": lambda peer: drip(peer, b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "floods with continues": lambda peer: flood(peer, b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "drips its body": lambda peer: drip(peer, OK + b"Content-Length: 1000000\r\n\r\n", b" "),
    "drips chunks": lambda peer: drip(peer, OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "drips until it closes": lambda peer: drip(peer, OK + b"\r\n", b" "),
}
LARGE = {
    "says that much comes": lambda peer: flood(peer, OK + b"Content-Length: 1152921504606846976\r\n\r\n", b" " * 65536),
    "ends by closing, and does not": lambda peer: flood(peer, OK + b"\r\n", b" " * 65536),
    "chunks without end": lambda peer: flood(
        peer, OK + b"Transfer-Encoding: chunked\r\n\r\n", b"400\r\n" + b" " * 1024 + b"\r\n"
    ),
}


@pytest.mark.parametrize("how", SLOW)
def test_an_exchange_has_one_deadline(how: str) -> None:
    patience = Patience(attempts=2, timeout=SECONDS, connect_timeout=SECONDS, first_wait=0.01)
    with serving(SLOW[how]) as url:
        client = HttpClient(url, None, patience)
        started = time.monotonic()
        with pytest.raises(UserError):
            client.once("GET", "/v1/models")
        assert time.monotonic() - started < 3 * SECONDS + 3
        started = time.monotonic()
        with pytest.raises((RunError, UserError)):
            client.patiently("/v1/completions", {}, threading.Event(), bytes)
        assert time.monotonic() - started < 3 * SECONDS + 3
        client.close()


@pytest.mark.parametrize("how", LARGE)
def test_an_answer_is_read_up_to_its_limit(how: str) -> None:
    patience = Patience(attempts=1, timeout=20.0, connect_timeout=20.0, most_bytes=1 << 20)
    with serving(LARGE[how]) as url:
        client = HttpClient(url, None, patience)
        for ask in (
            lambda: client.once("GET", "/v1/models"),
            lambda: client.patiently("/v1/completions", {}, threading.Event(), bytes),
        ):
            with pytest.raises(UserError, match="answers with more than 1,048,576 bytes, the most that is read of one"):
                ask()
        client.close()


def test_an_answer_at_the_limit_is_taken_and_the_connection_stays() -> None:
    body = b"[" + b" " * ((1 << 20) - 2) + b"]"
    seen: list[int] = []

    def twice(peer: socket.socket) -> None:
        for _ in range(2):
            seen.append(id(peer))
            peer.sendall(OK + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            peer.recv(65536)

    with serving(twice) as url:
        client = HttpClient(url, None, Patience(most_bytes=1 << 20))
        assert client.once("GET", "/")[1] == body and client.once("GET", "/")[1] == body
        client.close()
    assert len({*seen}) == 1


def test_a_redirection_shows_no_signature() -> None:
    location = b"http://u:hunter2@127.0.0.1/x?X-Amz-Signature=0badc0de"
    where = b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"
    with serving(lambda peer: peer.sendall(where)) as url, pytest.raises(UserError, match="sends on to") as raised:
        HttpClient(url, None, Patience()).once("GET", "/v1/models")
    assert "hunter2" not in str(raised.value) and "0badc0de" not in str(raised.value)


def test_a_connection_that_takes_the_whole_deadline_is_not_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: socket.socket, address: object) -> None:
        time.sleep(SECONDS + 0.3)
        connect(self, address)

    connect = socket.socket.connect
    with serving(SLOW["drips its body"]) as url:
        client = HttpClient(url, None, Patience(attempts=1, timeout=SECONDS, connect_timeout=SECONDS))
        monkeypatch.setattr(socket.socket, "connect", slow)
        started = time.monotonic()
        with pytest.raises(UserError, match="no answer within 1 s"):
            client.once("GET", "/v1/models")
        assert time.monotonic() - started < 2 * SECONDS + 2
        client.close()


def test_a_handshake_has_the_same_deadline() -> None:
    with serving(lambda peer: drip(peer, b"", b"\x16")) as url:
        client = HttpClient(url.replace("http:", "https:"), None, Patience(connect_timeout=SECONDS))
        started = time.monotonic()
        with pytest.raises(UserError):
            client.once("GET", "/v1/models")
        assert time.monotonic() - started < 2 * SECONDS + 2
        client.close()


@pytest.mark.parametrize("status", [b"400 Bad Request", b"503 Busy"])
def test_an_error_is_read_up_to_a_mebibyte(status: bytes) -> None:
    head = b"HTTP/1.1 " + status + b"\r\nContent-Length: 314572800\r\n\r\n"
    with serving(lambda peer: flood(peer, head, b"[" * 65536)) as url:
        client = HttpClient(url, None, Patience(attempts=2, timeout=20.0, first_wait=0.01))
        tracemalloc.start()
        with pytest.raises(UserError) as raised:
            client.patiently("/v1/completions", {}, threading.Event(), bytes)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
        tracemalloc.stop()
        assert len(str(raised.value)) < 700
        client.close()


def test_large_answers_come_and_are_used_one_after_another() -> None:
    size, using, most = 20 << 20, [0], [0]
    lock = threading.Lock()

    def use(answer: bytes) -> int:
        with lock:
            using[0] += 1
            most[0] = max(most[0], using[0])
        time.sleep(0.2)
        with lock:
            using[0] -= 1
        return len(answer)

    head = OK + f"Content-Length: {size}\r\n\r\n".encode()
    with serving(lambda peer: peer.sendall(head + b" " * size)) as url:
        client = HttpClient(url, None, Patience())
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: client.patiently("/pooling", {}, threading.Event(), use), range(4)))
        client.close()
    assert found == [size] * 4 and most == [1]


@pytest.mark.parametrize(
    ("root", "shown"),
    [
        ("/models/Teacher-7B", "serve /models/Teacher-7B"),
        ("--trust-remote-code", "serve org/Teacher-7B"),
        ("/models/other", "serve org/Teacher-7B"),
        ("evil/Teacher-7B", "serve org/Teacher-7B"),
        ("$(id)", "serve org/Teacher-7B"),
    ],
)
def test_a_server_puts_no_word_of_its_own_into_the_command_that_is_shown(root: str, shown: str) -> None:
    serving_there = Serving("org/Teacher-7B", "LlamaForCausalLM").as_served(root, "--api-key")
    command = serving_there.stock(20)
    assert shown in command.replace("python -m vllm.entrypoints.openai.api_server --model", "vllm serve")
    assert command.count("--api-key") == 1 and "trust" not in command


@pytest.mark.parametrize(
    "url", ["htp:/u:hunter2@h", "u:hunter2@h:x", "http//u:hunter2@h", "http://[hunter2", "hunter2/?x"]
)
def test_an_address_that_is_none_is_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match=r"--server-url") as raised:
        HttpClient(url, None, Patience())
    assert "hunter2" not in str(raised.value)
