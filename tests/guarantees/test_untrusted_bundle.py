"""Bundles of somebody else: odd headers end in a sentence."""

from __future__ import annotations

import tarfile
import time
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
import zstandard

from storage.bundle import bundle, unbundle
from storage.errors import CacheError
from tests.storage.synthetic import make_manifest, write_cache

MANIFEST = make_manifest().model_dump_json().encode()
END = bytes(2 * tarfile.BLOCKSIZE)


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **fields: object) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.USTAR_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def record(key: str, value: str) -> bytes:
    length = len(key) + len(value) + 3
    while length != (longer := len(key) + len(value) + 3 + len(str(length))):
        length = longer
    return f"{length} {key}={value}\n".encode()


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header("x", len(records), kind) + padded(records)


def manifest(*before: bytes) -> bytes:
    return b"".join(before) + header("manifest.json", len(MANIFEST)) + padded(MANIFEST)


def test_a_tokenizer_file_with_a_long_name_travels(tmp_path: Path) -> None:
    """Of all that this program bundles these alone need a header of their own."""
    cache = write_cache(tmp_path / "cache", make_manifest())
    (tmp_path / "cache" / "tokenizer" / "größe").mkdir(parents=True)
    names = ["größe/" + "ö" * 120 + ".json", "a" * 180 + ".txt", "vocab.json"]
    for name in names:
        (tmp_path / "cache" / "tokenizer" / name).write_text("{}")
    bundle(cache, tmp_path / "a.tar.zst")
    unbundle(tmp_path / "a.tar.zst", tmp_path / "again")
    assert all((tmp_path / "again" / "tokenizer" / name).read_text() == "{}" for name in names)


def packed(path: Path, pieces: Iterable[bytes]) -> Path:
    with path.open("wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as stream:
        for piece in pieces:
            stream.write(piece)
    return path


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9", "GNU.sparse.name": "x"}
ODD = {
    "a chain of headers": [pax(record("comment", "x")) * 2000, manifest(), END],
    "a chain of global headers": [pax(record("comment", "x"), tarfile.XGLTYPE) * 2000, manifest(), END],
    "a chain of long names": [(header("x", 8, tarfile.GNUTYPE_LONGNAME) + padded(b"manifest")) * 2000, manifest(), END],
    "a deep name": [pax(record("path", "tokenizer/" + "a/" * 20_000 + "b")), manifest(), END],
    "sparse without numbers": [manifest(pax(b"".join(record(*each) for each in SPARSE.items()))), END],
    "sparse of no number": [manifest(pax(record("GNU.sparse.map", "x,y") + record("GNU.sparse.size", "1"))), END],
    "sparse of half a number": [manifest(pax(record("GNU.sparse.offset", "x"))), END],
    "a size of text": [pax(record("size", "x")), manifest(), END],
    "a size below 0": [pax(record("size", "-512")), manifest(), END],
    "a time that is none": [pax(record("mtime", "nan")), manifest(), END],
    "a user of many digits": [pax(record("uid", "9" * 5000)), manifest(), END],
    "a name that is no text": [pax(b"20 path=\xff\xfe\xff\xfe\xff\xfe\n"), manifest(), END],
    "a record of no length": [pax(b"x path=a\n"), manifest(), END],
    "a record of length 0": [pax(b"0 path=a\n"), manifest(), END],
    "another character set": [pax(record("hdrcharset", "utf-77") + record("path", "a")), manifest(), END],
    "a header of digits": [pax(b"9" * 65_000), manifest(), END],
    "many headers of digits": [*[pax(b"9" * 2000) + header("shards/part-1.json")] * 4000, manifest(), END],
    "a global header for many members": [
        pax(b"".join(record(f"k{i}", "x") for i in range(4500)), tarfile.XGLTYPE),
        *(header(f"shards/part-{i}.json") for i in range(45_000)),
        END,
    ],
    "a small global header for many members": [
        pax(record("comment", "x"), tarfile.XGLTYPE),
        *(header(f"shards/part-{i}.json") for i in range(45_000)),
        END,
    ],
    "8 MB of headers": [
        *(pax(record("comment", "x" * 60_000)) + header(f"shards/part-{i}.json") for i in range(130)),
        END,
    ],
    "many members": [manifest(), *(header(f"shards/part-{i}.json") for i in range(120_000)), END],
    "many members of one byte": [*(header(f"shards/part-{i}.json", 1) + padded(b"x") for i in range(60_000)), END],
    "many members with a header": [
        *(pax(record("path", f"shards/part-{i}.json")) + header("x") for i in range(60_000)),
        END,
    ],
    "a long name of GNU": [header("x", 60_000, tarfile.GNUTYPE_LONGNAME) + padded(b"a" * 60_000), manifest(), END],
    "no end": [manifest()],
    "nothing": [END],
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_headers_end_in_a_sentence(kind: str, tmp_path: Path) -> None:
    """Where tarfile takes them they are of no file of a cache, or of one without its shards."""
    file = packed(tmp_path / "a.tar.zst", ODD[kind])
    started = time.monotonic()
    tracemalloc.start()
    with pytest.raises(CacheError) as caught:
        unbundle(file, tmp_path / "cache")
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Seconds and megabytes where minutes and gigabytes were; not a measurement.
    assert time.monotonic() - started < 60 and memory < 100 << 20
    said = str(caught.value)
    assert said.startswith(str(file)) and "\n" not in said and ".tmp-" not in said, said
    assert list(tmp_path.iterdir()) == [file]
