"""Text without the secrets that may stand in it: on its way to a terminal, a log or a file."""

from __future__ import annotations

import os
import re

# Variables whose values are secrets, by their names.
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(_ID)?$", re.IGNORECASE)
# Shorter values would stand in words by chance.
_SHORTEST = 8
HIDDEN = "***"


def without_secrets(text: str) -> str:
    """Return a text with no name, password, query or fragment in the URLs that it holds, and no value of a variable
    whose name says that it is a secret (PIPELINE_SERVER_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY, ...).
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    text = re.sub(r"(?<=://)[^/\s@]+@", f"{HIDDEN}@", text)
    return re.sub(r"(\b[A-Za-z][A-Za-z0-9+.-]*://[^\s?#'\"<>]*)[?#][^\s'\"<>]+", rf"\1?{HIDDEN}", text)
