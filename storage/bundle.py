"""A cache as one file for machines without a network: `pipeline bundle` and `pipeline unbundle`.

The file is a zstd-compressed tar of the cache's files in a fixed order, without times and owners, so that equal caches
give equal bundles. Its checksum lies beside it in the form that `sha256sum --check` reads.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import zstandard

from storage.cache import (
    CARD,
    MANIFEST,
    MOST_TOKENIZER_FILES,
    PARTIAL,
    PRIOR_RECEIPT,
    SHARDS,
    SKETCH,
    TAIL_PRIOR,
    TAIL_SUMS,
    TOKENIZER,
    Cache,
)
from storage.errors import CacheError, UserError
from storage.files import atomic_file, sha256_file, sync_directory, temporary_for, write_bytes
from storage.new_path import check_new_path

SUFFIX = ".tar.zst"
# The shards are compressed already.
LEVEL = 1
_CHUNK = 1 << 20
# Shards are compressed already: what unpacks to much more than its size is no bundle of ours.
MOST_TIMES = 64
MOST_BESIDES = 8 << 20
# Bytes of the header that holds a name too long or too odd for tar's own field. A long one takes tarfile minutes.
_MOST_HEADER = 2048
# Of the file's bytes, for each member but those of the tokenizer: a shard and its receipt have thousands.
_LEAST_OF_MEMBER = 256
# Characters of a member's name.
_LONGEST_NAME = 200
_MEMBER = re.compile(
    "|".join(re.escape(name) for name in (MANIFEST, PARTIAL, SKETCH, TAIL_PRIOR, PRIOR_RECEIPT, CARD))
    + rf"|{TOKENIZER}/.+|{SHARDS}/part-\d+\.(parquet|json)|{TAIL_SUMS}/part-\d+\.parquet"
)


_ODD_HEADERS = (
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.GNUTYPE_SPARSE,
)


class _Member(tarfile.TarInfo):
    """Refuses headers that no bundle of ours has, before tarfile works on them."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            if member.size > _MOST_HEADER:
                raise tarfile.ReadError(f"a header of {member.size} bytes")
            # Global ones stay for all that follow, and are copied for each.
            if member.type in _ODD_HEADERS:
                raise tarfile.ReadError("a header that this program does not write")
        return member


class _Bounded:
    """An unpacked stream that refuses to give more than `room` bytes, headers of members among them."""

    def __init__(self, stream: Any, room: int, file: Path) -> None:
        self._stream, self._room, self._file = stream, room, file

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        self._room -= len(data)
        if self._room < 0:
            raise CacheError(
                f"{self._file}: unpacks to more than {MOST_TIMES} times its size, as no bundle of ours does; "
                "nothing was unpacked"
            )
        return data


def checksum_path(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def files_of(cache: Cache) -> list[Path]:
    """The files of a finished local cache in the order of a bundle: the manifest first, the card last.

    Raises CacheError for a remote or unfinished cache.
    """
    if not isinstance(cache.path, Path):
        raise CacheError(f"{cache.path}: only a local cache can be bundled; `pipeline pull` it first")
    cache.receipts(partial=True)
    names = [cache.path / MANIFEST, cache.path / PARTIAL, cache.path / SKETCH]
    if (cache.path / TOKENIZER).exists():
        names += [cache.path / TOKENIZER / name for name in cache.tokenizer_files()]
    for index in cache.shards_here:
        for path in (cache.shard_path(index), cache.tail_sum_path(index), cache.receipt_path(index)):
            assert isinstance(path, Path)
            names.append(path)
    names += [cache.path / TAIL_PRIOR, cache.path / PRIOR_RECEIPT, cache.path / CARD]
    return [path for path in names if path.exists()]


def bundle(cache: Cache, file: Path, progress: Callable[[int], None] = lambda shard: None) -> str:
    """Write a checked cache to `file` and its checksum beside it; returns the sha256.

    progress gets the number of each shard that was checked. Raises CacheError for a damaged cache.
    """
    paths = files_of(cache)
    cache.check_sketch()
    for index in cache.shards_here:
        cache.check_file(index)
        progress(index)
    with atomic_file(file) as written:
        compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
        with (
            compressor.stream_writer(written, closefd=False) as stream,  # type: ignore[arg-type]
            tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            for path in paths:
                member = tarfile.TarInfo(path.relative_to(cache.path).as_posix())  # type: ignore[arg-type]
                member.size = path.stat().st_size
                with path.open("rb") as source:
                    tar.addfile(member, source)
    write_bytes(checksum_path(file), f"{written.sha256}  {file.name}\n".encode())
    return written.sha256


def unbundle(file: Path, target: Path) -> Cache:
    """Unpack `file` beside `target`, check every shard, and only then give it its name.

    Raises UserError or CacheError, and leaves nothing, where the target exists, the checksum beside the file differs,
    the file is damaged, or a member is not a plain file inside the target.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already; name a new directory")
    check_new_path(target, "a cache is a directory")
    _check_sum(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(target)
    temporary.mkdir()
    try:
        try:
            _extract(file, temporary)
        except CacheError:
            raise
        except (tarfile.TarError, zstandard.ZstdError, EOFError, ValueError, RecursionError, OverflowError) as error:
            # tarfile lets through what odd headers make of numbers, texts and nesting.
            raise CacheError(f"{file}: damaged or no bundle ({str(error)[:120]})") from None
        try:
            cache = Cache.open(temporary)
            cache.receipts(partial=True)
            if (cache.path / TOKENIZER).exists():
                cache.tokenizer_files()
            cache.check_sketch()
            for index in cache.shards_here:
                cache.check_file(index)
        except CacheError as error:
            raise CacheError(
                f"{file}: {str(error).replace(f'{temporary}{os.sep}', '').replace(str(temporary), str(target))}"
            ) from None
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_directory(target.parent)
    return Cache(target, cache.manifest)


def _check_sum(file: Path) -> None:
    beside = checksum_path(file)
    if not beside.is_file():
        return
    named = beside.read_text(errors="replace").split()
    if not named or sha256_file(file) != named[0]:
        raise CacheError(f"{file}: its sha256 is not the one in {beside.name}; copy it again")


def _extract(file: Path, target: Path) -> None:
    room = MOST_TIMES * file.stat().st_size + MOST_BESIDES
    bounded: Any
    with (
        open(file, "rb") as raw,
        zstandard.ZstdDecompressor().stream_reader(raw) as stream,
        contextlib.nullcontext(_Bounded(stream, room, file)) as bounded,
        tarfile.open(fileobj=bounded, mode="r|", tarinfo=_Member) as tar,
    ):
        tokenizer_files = 0
        most_members = MOST_TOKENIZER_FILES + file.stat().st_size // _LEAST_OF_MEMBER
        for number, member in enumerate(tar):
            if number > most_members:
                raise CacheError(f"{file}: holds more files than its size allows; nothing was unpacked")
            # tarfile keeps each, with its headers.
            tar.members = []  # type: ignore[attr-defined]
            name = PurePosixPath(member.name)
            # A backslash or a colon separates on other systems.
            if name.is_absolute() or ".." in name.parts or not name.parts or set(member.name) & set("\\:\0"):
                raise CacheError(f"{file}: member {member.name!r} leaves the directory; nothing was unpacked")
            if not member.isreg() or member.issparse():
                raise CacheError(f"{file}: member {member.name!r} is no plain file; nothing was unpacked")
            if len(member.name) > _LONGEST_NAME or not _MEMBER.fullmatch(name.as_posix()):
                raise CacheError(f"{file}: member {member.name[:100]!r} is no file of a cache; nothing was unpacked")
            tokenizer_files += name.parts[0] == TOKENIZER
            if tokenizer_files > MOST_TOKENIZER_FILES:
                raise CacheError(
                    f"{file}: has more than {MOST_TOKENIZER_FILES} files of a tokenizer; nothing was unpacked"
                )
            room -= member.size + tarfile.BLOCKSIZE
            if room < 0:
                raise CacheError(
                    f"{file}: unpacks to more than {MOST_TIMES} times its size, as no bundle of ours does; "
                    "nothing was unpacked"
                )
            path = target.joinpath(*name.parts)
            if path.exists():
                raise CacheError(f"{file}: member {member.name!r} stands twice; nothing was unpacked")
            path.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None
            with open(path, "xb") as written:
                shutil.copyfileobj(source, written, _CHUNK)
                written.flush()
                if member.size:
                    os.fsync(written.fileno())
        # To the end, where zstd's own checksum stands.
        while data := stream.read(_CHUNK):
            room -= len(data)
            if room < 0:
                raise CacheError(f"{file}: holds more than its members; nothing was unpacked")
