"""Local copies of remote shards: bounded in bytes, shared by all processes of a machine, fetched ahead of need.

A copy is named by its sha256 and was compared with it when it came, so it can never be stale or of another cache.
The least recently used ones give way. `PIPELINE_COPIES` names the folder (default `~/.cache/teacher-logit-cache`),
`PIPELINE_COPIES_BYTES` its size.
"""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

from storage.errors import CacheError, UserError
from storage.files import HashingFile, is_temporary, remove_temporaries, temporary_for
from storage.limits import COPIES_BYTES
from storage.places import CHUNK, RemotePath
from storage.words import counted

FOLDER_VARIABLE = "PIPELINE_COPIES"
_NAME = re.compile("[0-9a-f]{64}")
# Shards fetched at a time ahead of the reader.
PREFETCHERS = 2

_prefetchers: dict[int, ThreadPoolExecutor] = {}  # by process id: threads do not survive a fork


def folder() -> Path:
    """Return where the copies lie; made where it is missing, for this user alone.

    Raises UserError where others can write into it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get(FOLDER_VARIABLE) or Path(home) / "teacher-logit-cache")
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    # A copy is known by its name and length, so nobody else may put one there.
    there = path.stat()
    if hasattr(os, "getuid") and (there.st_uid != os.getuid() or there.st_mode & 0o022):
        raise UserError(
            f"{path}: holds the local copies of remote shards, and others can write into it; let {FOLDER_VARIABLE} "
            "name a folder that belongs to you and that nobody else can write into"
        )
    return path


def open_copy(remote: RemotePath, sha256: str, size: int, *, fresh: bool = False) -> IO[bytes]:
    """The local copy, open for reading (so that nobody can take it away meanwhile), fetched where it is missing.

    fresh: fetch it even where a copy is there. Raises FileNotFoundError, CacheError where the remote file has another
    length or checksum, RunError where the place does not answer.
    """
    path = folder() / sha256
    if not fresh:
        with suppress(FileNotFoundError):
            file = path.open("rb")
            if os.fstat(file.fileno()).st_size == size:
                os.utime(path)
                return file
            file.close()
    if (there := remote.stat().st_size) != size:
        raise CacheError(f"{remote}: {counted(there, 'byte')}, its receipt says {size}")
    _make_room(path.parent, size)
    temporary = temporary_for(path)
    try:
        with open(temporary, "xb") as raw:
            copying = HashingFile(raw)
            with remote.open() as source:
                shutil.copyfileobj(source, copying, CHUNK)
        if copying.sha256 != sha256:
            raise CacheError(f"{remote}: its bytes have changed since it was written (sha256 differs)")
        file = temporary.open("rb")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return file


def prefetch(remote: RemotePath, sha256: str, size: int) -> Future[None]:
    """Fetch in the background. A failure is left to the reader, who meets it again and says so."""

    def fetch() -> None:
        with suppress(UserError, OSError):
            open_copy(remote, sha256, size).close()

    if os.getpid() not in _prefetchers:
        _prefetchers[os.getpid()] = ThreadPoolExecutor(PREFETCHERS, thread_name_prefix="prefetch")
    return _prefetchers[os.getpid()].submit(fetch)


def _make_room(path: Path, size: int) -> None:
    """Remove the least recently used copies until `size` more bytes fit; what is being fetched counts and stays."""
    remove_temporaries(path)
    found: list[tuple[float, int, Path]] = []
    for entry in os.scandir(path):
        with suppress(FileNotFoundError):
            # Whatever else lies in the folder that a person named is not ours.
            if entry.is_file(follow_symlinks=False) and (_NAME.fullmatch(entry.name) or is_temporary(entry.name)):
                found.append((entry.stat().st_mtime, entry.stat().st_size, Path(entry.path)))
    total = size + sum(each[1] for each in found)
    for _, bytes_, copy in sorted(found):
        if total <= COPIES_BYTES.value:
            return
        if not is_temporary(copy.name):
            copy.unlink(missing_ok=True)
            total -= bytes_
