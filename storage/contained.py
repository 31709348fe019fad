"""Local paths inside a cache, behind which no link leads out of it.

A cache may be somebody else's: unpacked from a bundle, pulled, or on a shared disk. A link in it would let a command
read a file of this machine into a bundle, or write over a directory elsewhere; a pipe or a device in the place of a
file would hang it. So below its own directory, which is the user's word and may be a link, no link is followed at any
level, and only regular files are opened. Each level is opened from the one above, so that nothing can be swapped on the
way.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage.errors import CacheError

# Windows has neither; there each level is looked at before it is used.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
# Folders in folders; those of a cache are two.
_DEEPEST = 32
_HAS_FOLDERS = os.open in os.supports_dir_fd and bool(_NO_LINK)


class ContainedPath(type(Path())):  # type: ignore[misc]
    """A local path whose own directory, the root, is trusted and whose inside is not.

    `ContainedPath(root) / "shards" / "part-00000.parquet"`. Every method raises CacheError, naming the path, where a
    link lies at or before it below the root, and `open` where it is no regular file.
    """

    _depth = 0  # parts below the root

    def __truediv__(self, name: Any) -> ContainedPath:
        # Not through the parent's, which in some versions calls `joinpath`.
        child = type(self)(os.path.join(self, name))
        child._depth = self._depth + len(child.parts) - len(self.parts)
        return child

    def joinpath(self, *names: Any) -> ContainedPath:
        path = self
        for name in names:
            path = path / name
        return path

    def with_name(self, name: str) -> ContainedPath:
        path = super().with_name(name)
        path._depth = self._depth
        return path

    @property
    def parent(self) -> ContainedPath:
        path = super().parent
        if isinstance(path, ContainedPath):
            path._depth = max(0, self._depth - 1)
        return path

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (os.fspath(self), self._depth)

    # ---- looking ------------------------------------------------------------------------------------------

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        if not self._depth:
            return super().stat(follow_symlinks=follow_symlinks)
        with self.folder() as above:
            found = os.stat(self.name, dir_fd=above, follow_symlinks=False) if _HAS_FOLDERS else os.lstat(self)
        if stat.S_ISLNK(found.st_mode):
            raise _link(self)
        return found

    # Of the standard library some versions ask the system by name.
    def exists(self, **_: Any) -> bool:
        return self._kind() is not None

    def is_dir(self, **_: Any) -> bool:
        return stat.S_ISDIR(self._kind() or 0)

    def is_file(self, **_: Any) -> bool:
        return stat.S_ISREG(self._kind() or 0)

    def _kind(self) -> int | None:
        try:
            return self.stat().st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return None

    def iterdir(self) -> Iterator[ContainedPath]:
        if not self._depth or not _HAS_FOLDERS:
            self.stat()
            names = os.listdir(self)
        else:
            with (self / "_").folder() as here:
                names = os.listdir(here)
        return (self / name for name in names)

    def glob(self, pattern: str, **_: Any) -> Iterator[ContainedPath]:
        """Names in this very folder; nothing where it is missing."""
        try:
            return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))
        except (FileNotFoundError, NotADirectoryError):
            return iter(())

    def files(self, depth: int = _DEEPEST) -> Iterator[ContainedPath]:
        """Every file below this folder, whatever its kind, in the order of their paths.

        Raises CacheError for folders in folders, more than `depth` of them.
        """
        for path in sorted(self.iterdir()):
            if stat.S_ISDIR(path.stat().st_mode):
                if not depth:
                    raise CacheError(f"{path}: lies deeper than any folder of a cache")
                yield from path.files(depth - 1)
            else:
                yield path

    # ---- opening ------------------------------------------------------------------------------------------

    def open(self, mode: str = "r", *args: Any, **named: Any) -> Any:
        if not self._depth:
            return super().open(mode, *args, **named)

        def opener(_name: str, flags: int) -> int:
            with self.folder() as above:
                return _regular(self, flags, above)

        builtin: Any = io.open
        return builtin(os.fspath(self), mode, *args, opener=opener, **named)

    def read_at_most(self, limit: int, what: str) -> bytes:
        """Return the whole file. Raise CacheError, before it is read, where it is longer than `limit` bytes."""
        with self.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise CacheError(f"{self}: has {size:,} bytes, more than the {limit:,} that {what} may have")
            # A buffer of this length is made at once.
            return file.read(size)

    @contextmanager
    def folder(self) -> Iterator[int | None]:
        """The folder that this path lies in, as a file descriptor; None where the system has no such thing."""
        above = self.parts[len(self.parts) - self._depth : -1]
        root = os.path.join(*self.parts[: len(self.parts) - self._depth], "") or os.curdir
        if not _HAS_FOLDERS:
            for part in above:
                root = os.path.join(root, part)
                if os.path.islink(root):
                    raise _link(root)
            yield None
            return
        handle = os.open(root, _FOLDER)
        try:
            for part in above:
                try:
                    below = os.open(part, _FOLDER | _NO_LINK, dir_fd=handle)
                except OSError as error:
                    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK) and _is_link(part, handle):
                        raise _link(os.path.join(root, *above[: above.index(part) + 1])) from None
                    raise
                os.close(handle)
                handle = below
            yield handle
        finally:
            os.close(handle)

    # ---- changing -----------------------------------------------------------------------------------------

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if not self._depth or not _HAS_FOLDERS:
            super().mkdir(mode, parents, exist_ok)
            return
        try:
            with self.folder() as above:
                os.mkdir(self.name, mode, dir_fd=above)
        except FileExistsError:
            if not exist_ok or not stat.S_ISDIR(self.stat().st_mode):
                raise

    def unlink(self, missing_ok: bool = False) -> None:
        if not self._depth or not _HAS_FOLDERS:
            super().unlink(missing_ok)
            return
        try:
            with self.folder() as above:
                os.unlink(self.name, dir_fd=above)
        except FileNotFoundError:
            if not missing_ok:
                raise


def _again(path: str, depth: int) -> ContainedPath:
    made = ContainedPath(path)
    made._depth = depth
    return made


def _regular(path: Path, flags: int, above: int | None) -> int:
    """Open a regular file in a folder. Raises CacheError for anything else, OSError as os.open does."""
    where = path.name if above is not None else os.fspath(path)
    try:
        there: int | None = os.stat(where, dir_fd=above, follow_symlinks=False).st_mode
    except FileNotFoundError:
        there = None
    if there is not None and stat.S_ISLNK(there):
        raise _link(path)
    if there is not None and not stat.S_ISREG(there):
        raise _odd(path)
    # A pipe that came in its place would keep us waiting.
    handle = os.open(where, flags | _NO_LINK | getattr(os, "O_NONBLOCK", 0), 0o666, dir_fd=above)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _odd(path)
    return handle


def _is_link(name: str, above: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _link(path: object) -> CacheError:
    return CacheError(
        f"{path}: is a link, and may lead to a file that is no part of the cache; put the file itself in its place"
    )


def _odd(path: object) -> CacheError:
    return CacheError(f"{path}: is no regular file, as those of a cache are")
