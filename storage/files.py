"""Files that are either whole or absent.

A file is written under a temporary name, flushed to the disk, renamed, and the folder is flushed too, so that
neither a killed process nor a power cut leaves half a file under a final name.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from storage.contained import ContainedPath

if TYPE_CHECKING:
    from storage.places import Place

_TEMPORARY = ".tmp-"
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_NEW_FILE |= getattr(os, "O_BINARY", 0)
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
# A writer on another machine that has not touched its file for a day is taken for dead.
_ABANDONED_SECONDS = 86_400


class HashingFile(io.RawIOBase):
    """A writable file that knows the sha256 and the length of what went through it."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._raw.write(view)
        self._digest.update(view)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable (a no-op where folders cannot be opened, as on Windows)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_for(path: Path) -> Path:
    """A name beside `path` that `remove_temporaries` clears once this process is gone."""
    return path.with_name(f"{_TEMPORARY}{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.{path.name}")


@contextmanager
def atomic_file(path: Place, *, exclusive: bool = False) -> Iterator[HashingFile]:
    """A file that appears at `path`, complete and durable, only if the block ends without an exception.

    `exclusive`: raises FileExistsError where another process was first, instead of replacing its file.
    """
    if not isinstance(path, Path):
        with path.atomic_file(exclusive=exclusive) as file:
            yield file
        return
    temporary = temporary_for(path)
    # The folder is held from the first byte to the name, so that no link can take its place meanwhile.
    with path.folder() if isinstance(path, ContainedPath) else nullcontext() as folder:
        names: tuple[Any, Any] = (temporary, path) if folder is None else (temporary.name, path.name)
        there: dict[str, Any] = {} if folder is None else {"src_dir_fd": folder, "dst_dir_fd": folder}
        try:
            handle = os.open(names[0], _NEW_FILE, 0o666, dir_fd=folder)
            with open(handle, "wb") as raw:
                hashing = HashingFile(raw)
                yield hashing
                raw.flush()
                os.fsync(raw.fileno())
            _link(*names, there, path) if exclusive else os.replace(*names, **there)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(names[0], dir_fd=folder)
            raise
        sync_directory(path.parent) if folder is None else os.fsync(folder)


def _link(temporary: Any, name: Any, there: dict[str, Any], path: Path) -> None:
    """Rename that does not replace. Raises FileExistsError."""
    try:
        os.link(temporary, name, **there)
    except FileExistsError:
        raise
    except OSError:
        # No hard links on this file system: then only the short moment between these lines is open.
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, name, **there)
    else:
        os.unlink(temporary, dir_fd=there.get("src_dir_fd"))


def write_bytes(path: Place, data: bytes, *, exclusive: bool = False) -> None:
    with atomic_file(path, exclusive=exclusive) as file:
        file.write(data)


def write_json(path: Place, value: Any, *, exclusive: bool = False) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), exclusive=exclusive)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is still being written, or was left by a killed writer."""
    return name.startswith(_TEMPORARY)


def remove_temporaries(directory: Path) -> None:
    """Remove the files and folders that killed writers left, never one of a writer that may still be at work."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        with suppress(OSError, ValueError, OverflowError):
            host, pid = path.name.removeprefix(_TEMPORARY).split(".")[:2]
            dead = host == _HOST and not _is_running(int(pid))
            if dead or time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                # Of a folder that is a link, rmtree removes nothing.
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def open_to_umask(folder: Path) -> None:
    """Give the files of a folder the permissions that this process gives new files.

    Some libraries write through a temporary file that is for its owner alone, and leave it so.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def sha256_file(path: Place) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
