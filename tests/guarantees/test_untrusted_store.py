"""A store of somebody else: what it sends is bounded in time and bytes, whatever it says. Loopback alone."""

from __future__ import annotations

import os
import re
import resource
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from storage import places
from storage.cache import _remote_files
from storage.errors import CacheError, RunError
from storage.manifest import read_manifest
from storage.places import CHUNK, RemotePath
from tests.http_server import LocalServer
from tests.stages.test_teacher_server import self_signed

s3fs = pytest.importorskip("s3fs")
SECONDS = 2
MIB = 1 << 20
XML = (
    '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>'
    "<Prefix>c/shards/</Prefix><KeyCount>{count}</KeyCount><MaxKeys>1000</MaxKeys><Delimiter>/</Delimiter>"
    "<IsTruncated>{more}</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>{keys}</ListBucketResult>"
)
KEY = (
    "<Contents><Key>c/shards/{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
    "<Size>1</Size><StorageClass>STANDARD</StorageClass></Contents>"
)
Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers HEAD with `said` bytes, a list with `listing`, and GET with `body`."""

    protocol_version = "HTTP/1.1"
    said = 10
    body: Answer
    listing: Answer

    def log_message(self, *_: object) -> None:
        pass

    def head(self, length: int | None, status: int = 200, **more: str) -> None:
        self.send_response(status)
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", formatdate(0, usegmt=True))
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def do_HEAD(self) -> None:
        self.head(self.said, Accept_Ranges="bytes")

    def do_GET(self) -> None:
        self.close_connection = True
        (type(self).listing if "list-type" in self.path else type(self).body)(self)


def flood(handler: Handler, piece: bytes = b" " * 65536) -> None:
    while True:
        handler.wfile.write(piece)


def drip(handler: Handler) -> None:
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def floods(handler: Handler) -> None:
    handler.head(1 << 60, 206, Content_Range=f"bytes 0-9/{1 << 60}")
    flood(handler)


def floods_until_closed(handler: Handler) -> None:
    handler.head(None, 206)
    flood(handler)


def floods_in_chunks(handler: Handler) -> None:
    handler.head(None, 206, Transfer_Encoding="chunked")
    flood(handler, b"10000\r\n" + b" " * 65536 + b"\r\n")


def floods_in_an_error(handler: Handler) -> None:
    handler.head(1 << 60, 400)
    flood(handler)


def drips(handler: Handler) -> None:
    handler.head(1000, 206)
    drip(handler)


def drips_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 206 OK\r\nX-A: ")
    drip(handler)


def continues(handler: Handler) -> None:
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 10)
        time.sleep(0.01)


def sends_more(handler: Handler) -> None:
    handler.head(20, 206)
    handler.wfile.write(b"x" * 20)


def sends_less(handler: Handler) -> None:
    handler.head(5, 206)
    handler.wfile.write(b"x" * 5)


def lists_pages_without_end(handler: Handler) -> None:
    number = re.search(r"continuation-token=(\d+)", handler.path)
    token = int(number[1]) + 1 if number else 1
    keys = "".join(KEY.format(name=f"{token:09}-{i:03}.json") for i in range(1000))
    text = XML.format(count=1000, more="true", token=token, keys=keys).encode()
    handler.head(len(text), Content_Type="application/xml")
    handler.wfile.write(text)
    handler.close_connection = False


def lists_one_page_without_end(handler: Handler) -> None:
    handler.head(None, Content_Type="application/xml")
    handler.wfile.write(XML.partition("{count}")[0].encode())
    flood(handler, KEY.format(name="x").encode() * 200)


@contextmanager
def store(**answers: object) -> Iterator[str]:
    server = LocalServer(type("Own", (Handler,), answers))
    try:
        yield server.url
    finally:
        server.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_STORE_SECONDS", str(SECONDS))
    monkeypatch.setattr(places, "TRIES", 2)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@contextmanager
def bounded(monkeypatch: pytest.MonkeyPatch, url: str, memory: int = 300 * MIB) -> Iterator[RemotePath]:
    """A file of the store; all that is done with it takes bounded time and memory."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    s3fs.S3FileSystem.clear_instance_cache()
    path = RemotePath("s3://b/c/shards/part-00000.json")
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield path
    assert time.monotonic() - begin < 4 * SECONDS + 3
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < memory


LATE = rf"no answer within {SECONDS} s after 2 tries; set PIPELINE_STORE_SECONDS"
MUCH = "the store sends more than was asked for"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (floods, MUCH),
        (floods_until_closed, MUCH),
        (floods_in_chunks, MUCH),
        (floods_in_an_error, MUCH),
        (drips, LATE),
        (drips_headers, LATE),
        (continues, LATE),
        (sends_more, "20 of 10 bytes came"),
        (sends_less, "5 of 10 bytes came"),
    ],
)
def test_a_file_is_read_within_time_and_bytes(body: Answer, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with store(body=body) as url, bounded(monkeypatch, url) as path, pytest.raises(RunError, match=sentence):
        path.read_at_most(1000, "a receipt")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("listing", [lists_pages_without_end, lists_one_page_without_end])
def test_a_list_without_end_is_refused(listing: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_LISTING_BYTES", str(8 * MIB))
    monkeypatch.setenv("PIPELINE_STORE_SECONDS", "60")
    sentence = "a list of more than 8,388,608 bytes; set PIPELINE_LISTING_BYTES for another limit"
    with store(listing=listing) as url, bounded(monkeypatch, url) as path, pytest.raises(RunError, match=sentence):
        list(RemotePath(path.url.rpartition("/")[0]).iterdir())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("keys", [KEY.format(name="x") * 80_000, "<Contents/>" * 2_000_000])
def test_a_page_of_a_list_is_bounded(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def listing(handler: Handler) -> None:
        text = XML.format(count=1, more="false", token="", keys=keys).encode()
        handler.head(len(text), Content_Type="application/xml")
        handler.wfile.write(text)

    with store(listing=listing) as url, bounded(monkeypatch, url) as path, pytest.raises(RunError, match="a list of"):
        list(RemotePath(path.url.rpartition("/")[0]).iterdir())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("keys", ["<Contents/>", "<Contents><Key>c/x</Key></Contents>", "<Oops", "</b>", "<Contents>x"])
def test_a_list_that_is_none_is_refused_in_a_sentence(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def listing(handler: Handler) -> None:
        text = XML.format(count=1, more="false", token="", keys=keys).encode()
        handler.head(len(text), Content_Type="application/xml")
        handler.wfile.write(text)

    sentence = "the store's answer is not one of its protocol|Internal Server Error"
    with store(listing=listing) as url, bounded(monkeypatch, url) as path, pytest.raises(RunError, match=sentence):
        list(RemotePath(path.url.rpartition("/")[0]).iterdir())


@pytest.mark.usefixtures("quick")
def test_folders_of_a_tokenizer_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each folder holds folders and empty files, none of which is ever a file to read."""

    def listing(handler: Handler) -> None:
        prefix = re.search(r"prefix=([^&]*)", handler.path)[1].replace("%2F", "/")  # type: ignore[index]
        keys = "".join(f"<CommonPrefixes><Prefix>{prefix}d{i}/</Prefix></CommonPrefixes>" for i in range(8))
        text = XML.format(count=1, more="false", token="", keys=keys).encode()
        handler.head(len(text), Content_Type="application/xml")
        handler.wfile.write(text)
        handler.close_connection = False

    class Absent(Handler):
        def do_HEAD(self) -> None:
            self.head(0, 404)

    monkeypatch.setattr(sys.modules[__name__], "Handler", Absent)
    either = pytest.raises((CacheError, RunError), match=r"more than 1000 files|are not listed within 2 s")
    with store(listing=listing) as url, bounded(monkeypatch, url), either:
        _remote_files(RemotePath("s3://b/c/tokenizer"))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, "access denied"),
        (403, "access denied"),
        (429, "it answers 429 after 2 tries"),
        (500, "it answers 500 after 2 tries"),
        (302, "it sends on and on"),
        (404, None),
        (410, None),
    ],
)
def test_a_web_server_in_trouble_is_no_missing_file(
    status: int, sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_SCHEMES", "http")

    class Trouble(Handler):
        def do_HEAD(self) -> None:
            self.head(0, status, Location=self.path)

        do_GET = do_HEAD

    monkeypatch.setattr(sys.modules[__name__], "Handler", Trouble)
    with store() as url:
        path = RemotePath(f"{url}/manifest.json")
        for act in (path.exists, path.stat, lambda: read_manifest(path)):
            if sentence is None and act == path.exists:
                assert not act()
                continue
            kind = RunError if sentence else (FileNotFoundError, CacheError)
            with pytest.raises(kind, match=sentence or "manifest"):
                act()


@pytest.mark.usefixtures("quick")
def test_a_web_server_that_is_not_there_is_no_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_SCHEMES", "http")
    with store() as url:
        pass
    with pytest.raises(RunError, match=r"Cannot connect to host .* after 2 tries"):
        RemotePath(f"{url}/manifest.json").exists()


@pytest.mark.usefixtures("quick")
def test_a_certificate_that_nobody_vouches_for_is_said(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    server = LocalServer(Handler)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self_signed(tmp_path))
        server.socket = context.wrap_socket(server.socket, server_side=True)
        with pytest.raises(RunError, match="its certificate is not trusted") as raised:
            RemotePath(f"{server.url.replace('http', 'https')}/manifest.json").exists()
        assert "tries" not in str(raised.value)
    finally:
        server.close()


@pytest.mark.usefixtures("quick")
def test_a_file_whose_length_nobody_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Handler):
        def do_HEAD(self) -> None:
            self.head(None)
            self.close_connection = True

        def do_GET(self) -> None:
            self.head(None)
            self.close_connection = True

    monkeypatch.setattr(sys.modules[__name__], "Handler", Silent)
    monkeypatch.setenv("PIPELINE_SCHEMES", "http")
    with store() as url:
        with pytest.raises(RunError, match="does not say how long this file is"):
            RemotePath(f"{url}/manifest.json").stat()
        with bounded(monkeypatch, url) as path, pytest.raises(RunError, match=r"does not say|not one of its protocol"):
            path.stat()


def test_a_read_that_is_stopped_leaves_one_line() -> None:
    """SIGTERM while a remote file drips: no traceback of a coroutine that was left behind."""
    script = (
        "import os, signal, threading, sys\n"
        "from storage.places import RemotePath\n"
        "def stop(*_): raise SystemExit(9)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "RemotePath('s3://b/c/x').read_at_most(1000, 'a receipt')\n"
    )
    with store(body=drips) as url:
        environment = os.environ | {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 9 and done.stderr == "", done.stderr


@pytest.mark.usefixtures("quick")
def test_a_list_that_drips_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with store(listing=drips) as url, bounded(monkeypatch, url) as path, pytest.raises(RunError, match=LATE):
        list(RemotePath(path.url.rpartition("/")[0]).iterdir())


@pytest.mark.usefixtures("quick")
def test_a_size_beyond_the_limit_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        store(said=1 << 60, body=floods) as url,
        bounded(monkeypatch, url) as path,
        pytest.raises(CacheError, match=r"has 1,152,921,504,606,846,976 bytes, more than the 1,000 that a receipt may"),
    ):
        path.read_at_most(1000, "a receipt")


@pytest.mark.usefixtures("quick")
def test_a_large_range_is_asked_for_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def body(handler: Handler) -> None:
        asked.append(handler.headers["Range"])
        start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked[-1]).groups())  # type: ignore[union-attr]
        handler.head(end - start + 1, 206)
        handler.wfile.write(bytes([len(asked)]) * (end - start + 1))

    size = 2 * CHUNK + 5
    with store(said=size, body=body) as url, bounded(monkeypatch, url) as path:
        found = path.read_at_most(size, "a receipt")
    assert found == b"\1" * CHUNK + b"\2" * CHUNK + b"\3" * 5
    assert asked == [f"bytes=0-{CHUNK - 1}", f"bytes={CHUNK}-{2 * CHUNK - 1}", f"bytes={2 * CHUNK}-{size - 1}"]
