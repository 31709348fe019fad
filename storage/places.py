"""Where a cache lies: a local path, or a URL that fsspec knows (`s3://`, `gs://`, `hf://datasets/`, ...).

A RemotePath offers what this package uses of `pathlib.Path`, so that the rest of the code never asks which one it
has. Every request is tried again with growing pauses, reads are stateless ranges, and a file appears whole or not at
all: object stores show an upload only when it has ended.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import os
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from storage.contained import ContainedPath
from storage.errors import CacheError, RunError, UserError
from storage.files import HashingFile
from storage.limits import LISTING_BYTES, STORE_SECONDS
from storage.new_path import check_slashes
from storage.redact import has_user, url_without_secrets, without_secrets
from storage.store_requests import TooLateError, TooMuchError, ask, http_client, s3_session

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

TRIES = 5
FIRST_PAUSE = 0.2  # seconds; each later one is twice as long
CHUNK = 8 << 20  # bytes of one ranged request
# Bytes that a request may have besides those that were asked for.
_BESIDES = 1 << 20
# Bytes per second that any upload reaches.
_SLOWEST_UPLOAD = 100_000

# Which extra of this package brings the file system of a scheme.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# Where caches lie; this variable names further schemes of fsspec, with commas.
SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "https", "file", "local")
SCHEMES_VARIABLE = "PIPELINE_SCHEMES"
# Trying again does not help. NoCredentialsError is botocore's, which may not be installed.
_FINAL = (PermissionError, IsADirectoryError, NotADirectoryError, ValueError)


@dataclass(frozen=True)
class RemotePath:
    """A file or folder behind a URL without a trailing slash. Picklable; safe in threads and after a fork.

    Every method raises FileNotFoundError where nothing is there, and RunError, naming URL and cause, where the place
    does not answer after TRIES tries or denies access.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def resolve(self) -> RemotePath:
        return self

    def mkdir(self, **_: object) -> None:
        """Object stores have no folders."""

    def exists(self) -> bool:
        if not self._is_web():
            return bool(self._tried("exists"))
        # The file system of the web takes any trouble for absence there.
        try:
            self._tried("info")
        except FileNotFoundError:
            return False
        return True

    def stat(self) -> os.stat_result:
        """Only the size is meaningful."""
        found = self._tried("info")
        size = 0 if found.get("type") == "directory" else found.get("size")
        if size is None:
            raise RunError(f"{self.url}: the store does not say how long this file is")
        if not isinstance(size, int) or size < 0:
            raise RunError(f"{self.url}: the store says a size that is none ({str(size)[:40]})")
        return os.stat_result((0, 0, 0, 0, 0, 0, size, 0, 0, 0))

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies in this folder; nothing where it does not exist."""
        try:
            listed = self._tried("ls", most=LISTING_BYTES.value, detail=False)
        except FileNotFoundError:
            return
        for path in sorted(listed):
            name = path.rstrip("/").rpartition("/")[2]
            # Some stores list the folder itself, and a key may be any text.
            if name not in ("", ".", "..", self.name):
                yield self / name

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def read_at_most(self, limit: int, what: str) -> bytes:
        """Return the whole file. Raise CacheError, before it is read, where it is longer than `limit` bytes."""
        size = self.stat().st_size
        if size > limit:
            raise CacheError(f"{self}: has {size:,} bytes, more than the {limit:,} that {what} may have")
        return self.read_range(0, size)

    def open(self, _mode: str = "rb") -> io.RawIOBase:
        """A readable, seekable file; each read is of just that range."""
        return _RangedFile(self, self.stat().st_size)

    def read_range(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end`, which the file has, in requests of at most CHUNK bytes."""
        parts = [self._read_chunk(at, min(at + CHUNK, end)) for at in range(start, end, CHUNK)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_chunk(self, start: int, end: int) -> bytes:
        def check(data: bytes) -> None:
            if len(data) != end - start:
                raise ConnectionError(f"{len(data)} of {end - start} bytes came")

        return self._tried("cat_file", most=end - start + _BESIDES, start=start, end=end, check=check)

    def upload(self, local: Path, *, exclusive: bool = False) -> None:
        """Put a local file here, replacing what is. `exclusive`: raises FileExistsError where something is.

        S3 and GCS decide that themselves (a conditional write); elsewhere two at the same moment both succeed.
        """
        size = local.stat().st_size
        scheme = self.url.partition("://")[0]
        condition: dict[str, Any] = {"mode": "create"} if exclusive and scheme in EXTRAS else {}

        def check(_: object) -> None:
            if (found := self.stat().st_size) != size:
                raise ConnectionError(f"{found} of {size} bytes arrived")

        if exclusive and self.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.url)
        seconds = STORE_SECONDS.value + size // _SLOWEST_UPLOAD
        try:
            self._tried("put_file", str(local), seconds=seconds, check=check, **condition)
        except FileNotFoundError:
            raise RunError(f"{self.url}: cannot be written; there is no such bucket") from None

    @contextmanager
    def atomic_file(self, *, exclusive: bool = False) -> Iterator[HashingFile]:
        """Written to a temporary local file, and uploaded if the block ends without an exception."""
        with tempfile.NamedTemporaryFile(prefix="teacher-logit-cache-") as raw:
            yield HashingFile(raw)
            raw.flush()
            self.upload(Path(raw.name), exclusive=exclusive)

    def check_reachable(self) -> None:
        """Raises UserError where the bucket does not exist, before hours of work are meant for it."""
        scheme, _, rest = self.url.partition("://")
        bucket = RemotePath(f"{scheme}://{rest.partition('/')[0]}")
        if scheme in EXTRAS and not bucket.exists():
            raise UserError(f"{self.url}: there is no bucket {bucket}")

    def _tried(
        self,
        method: str,
        *args: Any,
        most: int = _BESIDES,
        seconds: float | None = None,
        check: Callable[[Any], None] = lambda answer: None,
        **named: Any,
    ) -> Any:
        """What a method of the file system returns for this path, which comes after `args`.

        most: bytes that may come. seconds: for each try. check: raises for an answer that is worth another try.
        """
        system, path = self._system()
        seconds = seconds or STORE_SECONDS.value
        for attempt in range(TRIES):
            try:
                answer = ask(system, method, *args, path, seconds=seconds, most=most, **named)
                check(answer)
                return answer
            except (UserError, FileExistsError):
                raise
            except Exception as error:  # every file system has exceptions of its own
                if isinstance(error, FileNotFoundError) and not (self._is_web() and _is_trouble(error)):
                    raise
                final = (
                    _caused_by(error, (TooMuchError, ssl.SSLCertVerificationError))
                    or isinstance(error, _FINAL)
                    or "Credentials" in type(error).__name__
                    or _refuses(_status_of(error))
                )
                if final or attempt == TRIES - 1:
                    raise RunError(f"{self.url}: {_said(error, method, seconds, final)}") from error
            system.invalidate_cache()
            time.sleep(FIRST_PAUSE * 2**attempt)
        raise AssertionError("unreachable: the last try returns or raises")

    def _is_web(self) -> bool:
        return self.url.partition("://")[0] in ("http", "https")

    def _system(self) -> tuple[AbstractFileSystem, str]:
        """The file system, one per process and thread (fsspec keeps them), and the path in its own form."""
        from fsspec.core import url_to_fs

        scheme = self.url.partition("://")[0]
        options: dict[str, Any] = {"use_listings_cache": False}
        if self._is_web():
            options["get_client"] = http_client
        if scheme in ("s3", "s3a"):
            # Without these the tries of three layers multiply, and a dead host is waited for minutes.
            options["config_kwargs"] = {
                "retries": {"total_max_attempts": 1},
                "connect_timeout": 10,
                "read_timeout": 60,
                "http_session_cls": _s3_session(self.url),
            }
        try:
            system, path = url_to_fs(self.url, **options)
        except ImportError as error:
            extra = EXTRAS.get(scheme)
            what = f"install 'teacher-logit-cache[{extra}]'" if extra else str(error)
            raise UserError(f"{self.url}: the file system of {scheme}:// is not installed; {what}") from None
        except Exception as error:  # noqa: BLE001 - whatever a file system says of a bad URL or bad settings
            raise UserError(f"{self.url}: not a place ({_cause(error)})") from None
        if scheme in ("s3", "s3a"):
            system.retries = 1
        return system, path


Place: TypeAlias = Path | RemotePath


def place(where: str | Path | RemotePath) -> ContainedPath | RemotePath:
    """The path or URL that a person named. Raises UserError for a URL that no file system serves."""
    if not isinstance(where, str) or "://" not in where:
        check_slashes(str(where))
        return where if isinstance(where, (RemotePath, ContainedPath)) else ContainedPath(where)
    check_url(where)
    scheme, _, rest = where.partition("://")
    if scheme in ("file", "local"):
        from fsspec.core import url_to_fs

        return ContainedPath(url_to_fs(where)[1])
    if not rest.strip("/"):
        raise UserError(f"{where}: names no bucket; a place is like s3://bucket/folder")
    remote = RemotePath(where.rstrip("/"))
    remote._system()
    return remote


def check_url(url: str) -> None:
    """Raise UserError, which repeats no secret, for a URL of a kind that no cache lies at.

    fsspec knows dozens of schemes: some read other files of this machine, run commands elsewhere, or wrap another URL.
    A name and a password, or a signature behind `?`, would end up in logs and files.
    """
    shown = url_without_secrets(url)
    scheme, _, rest = url.partition("://")
    if "::" in url:
        raise UserError(f"{shown}: a place inside another one; give a plain URL")
    allowed = {*SCHEMES, *os.environ.get(SCHEMES_VARIABLE, "").replace(",", " ").split()}
    if scheme not in allowed:
        raise UserError(
            f"{shown}: caches lie at {', '.join(f'{each}://' for each in SCHEMES)}; to allow {scheme}:// as well, set "
            f"{SCHEMES_VARIABLE}={scheme}"
        )
    if has_user(url) or "@" in rest.partition("/")[0]:
        raise UserError(f"{shown}: a name or key in a URL is not taken; give it as the store's own client takes it")
    if "?" in rest or "#" in rest:
        raise UserError(f"{shown}: has a part behind ? or #, which is not taken; give the URL of the folder alone")


class _RangedFile(io.RawIOBase):
    """A remote file read by ranges, each of which is tried again by itself."""

    def __init__(self, path: RemotePath, size: int) -> None:
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._at)
        if length <= 0:
            return 0
        buffer[:length] = self._path.read_range(self._at, self._at + length)
        self._at += length
        return length


def _s3_session(url: str) -> type:
    try:
        return s3_session()
    except ImportError:
        raise UserError(
            f"{url}: the file system of s3:// is not installed; install 'teacher-logit-cache[s3]'"
        ) from None


def _said(error: Exception, method: str, seconds: float, final: bool) -> str:
    """The cause of a failed request, and what to do where a limit of ours ended it."""
    tries = "" if final else f" after {TRIES} tries"
    if _caused_by(error, TooLateError):
        return f"no answer within {seconds:g} s{tries}; set {STORE_SECONDS.variable} for another limit"
    if _caused_by(error, TooMuchError):
        if method == "ls":
            return f"a list of more than {LISTING_BYTES.value:,} bytes; {LISTING_BYTES.advice}"
        return "the store sends more than was asked for; a server of files must serve ranges of them"
    return f"{_cause(error)}{tries}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised because of: file systems wrap what their connection raises."""
    for _ in range(10):
        if error is None:
            break
        yield error
        error = getattr(error, "kwargs", {}).get("error") or error.__cause__ or error.__context__


def _caused_by(error: BaseException, kinds: type[BaseException] | tuple[type[BaseException], ...]) -> bool:
    return any(isinstance(each, kinds) for each in _causes(error))


def _status_of(error: BaseException) -> int | None:
    """The status of HTTP that a web server answered with; None where it did not."""
    found = (getattr(each, "status", None) for each in _causes(error))
    return next((status for status in found if isinstance(status, int)), None)


def _is_trouble(error: FileNotFoundError) -> bool:
    """Whether a file of the web that is "not found" is kept from us: by its server, or by the way there."""
    if error.__cause__ is None:
        return False
    return _status_of(error) not in (404, 410)


def _refuses(status: int | None) -> bool:
    """Whether a status says that another try changes nothing."""
    return status is not None and 400 <= status < 500 and status not in (408, 425, 429)


def _cause(error: BaseException) -> str:
    if isinstance(error, PermissionError) or _status_of(error) in (401, 403):
        return "access denied; check the credentials and the bucket's policy"
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if _caused_by(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({without_secrets(_one_line(error))[:160]})"
    if (status := _status_of(error)) is not None:
        # Of a chain without end aiohttp gives no status.
        return f"it answers {status}" if status else "it sends on and on to other addresses"
    if isinstance(error, (KeyError, AttributeError, TypeError, IndexError)) or "Parser" in type(error).__name__:
        return f"the store's answer is not one of its protocol ({without_secrets(_one_line(error))[:80]})"
    if "Credentials" in type(error).__name__:
        return "no credentials found; set those of the store (for s3:// e.g. AWS_ACCESS_KEY_ID, AWS_PROFILE)"
    return without_secrets(_one_line(error))[:200]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
