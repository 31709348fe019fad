"""Text without the secrets that may stand in it: on its way to a terminal, a log or a file."""

from __future__ import annotations

import os
import re

# Variables whose values are secrets, by their names.
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(_ID)?$", re.IGNORECASE)
# Shorter values would stand in words by chance.
_SHORTEST = 8
HIDDEN = "***"
_SLASHES = r"(?<![\w/.])(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:|)(?P<slashes>/{2,3})"
# Up to the last @: a key may hold `/` and `@` itself.
_USER = re.compile(_SLASHES + r"(?P<user>[^\s'\"<>]*)@")
_QUERY = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://[^\s?#'\"<>]*)[?#][^\s'\"<>]+")
_SECRET_QUERY = re.compile(r"[?&#][^=&\s]*(sig|signature|token|key|secret|password|credential)[^=&\s]*=", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Return a text with no name, password, query or fragment in the URLs that it holds, and no value of a variable
    whose name says that it is a secret (PIPELINE_SERVER_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY, ...), nor half of one.
    """
    return _QUERY.sub(rf"\1?{HIDDEN}", _USER.sub(_hide_user, _without_values(text)))


def url_without_secrets(url: str) -> str:
    """Return the same of what is one URL as a whole, whose name and password may hold any letter."""
    if has_user(url):
        scheme, slashes, rest = url.partition("//")
        url = f"{scheme}{slashes}{HIDDEN}@{rest.rpartition('@')[2]}"
    return without_secrets(url)


def holds_secret(text: str) -> bool:
    """Tell whether a text holds a key: in a URL, or that of a variable. An address with a plain query holds none."""
    return _USER.sub(_hide_user, _without_values(text)) != text or bool(_SECRET_QUERY.search(text))


def has_user(url: str) -> bool:
    """Tell whether a URL has a name or a key before its host."""
    user, at, _ = url.partition("//")[2].rpartition("@")
    return bool(at) and _is_secret(user)


def _hide_user(found: re.Match[str]) -> str:
    return f"{found['scheme']}{found['slashes']}{HIDDEN}@" if _is_secret(found["user"]) else found[0]


def _is_secret(user: str) -> bool:
    """Tell a name and a key from a path with an @ in it: `hf://datasets/owner/name@revision`, `s3://b/me@here.org`."""
    return ":" in user or "/" not in user


def _without_values(text: str) -> str:
    for name, value in os.environ.items():
        if len(value) < _SHORTEST or not _SECRET_NAME.search(name):
            continue
        # A message may have been cut within it. A path is no secret, and others begin as it does.
        begin = value if value[0] in "/~." else value[: max(_SHORTEST, len(value) // 2)]
        if begin in text:
            text = text.replace(value, HIDDEN)
            if begin != value:
                text = re.sub(re.escape(begin) + r"[^\s'\"<>]*", HIDDEN, text)
    return text
