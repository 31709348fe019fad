"""Check that something can be made at a local path, before the work that is meant for it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from storage.errors import UserError


def check_new_path(path: Path, wants: str = "--output wants a directory") -> None:
    """Raise UserError unless `path` is there, or can be made with the folders above it.

    Refused: a link to nothing or to itself, a file above the path, a folder that may not be written, a name that is
    too long or no UTF-8. wants: ends the sentence about a file in the way.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: the name is not UTF-8, and libraries that write there take no other") from None
    for place in (path, *path.parents):
        try:
            place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"{_short(path)}: {(error.strerror or 'cannot be read').lower()}; name another") from None
        if not place.exists():
            raise UserError(f"{place}: is a link that leads to nothing ({os.readlink(place)}); remove or mend the link")
        if place == path:
            return
        if not place.is_dir():
            raise UserError(f"{place}: is a file; {wants}")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"{place}: nothing can be written in this folder; name another or change its permissions")
        return


def local_path(where: str | Path, what: str) -> Path:
    """Return the local path that a person named. Raise UserError for a URL, which would become an odd folder here.

    what: begins the sentence, e.g. "a bundle".
    """
    text = os.fspath(where)
    if "://" in text:
        raise UserError(f"{text}: {what} is written to this machine; name a local path")
    check_slashes(text)
    return Path(text)


def check_slashes(where: str) -> None:
    """Raise UserError for a URL that lost slashes, such as `s3:/bucket/cache`: it would be a folder named `s3:`."""
    if found := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/(?!/)", where):
        scheme, rest = found[1], where[found.end() :]
        place = f"/{rest}" if scheme == "file" else rest
        raise UserError(
            f"{where}: is no URL, which has two slashes ({scheme}://{place}), and no local path (./{where})"
        )


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 300 else f"{text[:200]}...{text[-50:]}"
