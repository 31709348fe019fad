"""Whether the hub of models and data sets can be reached; where it cannot, only what was downloaded before is used.

The hub's client tries a dead line for about 25 seconds for each file it looks for. One connection tells in far less.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import urllib.request
from urllib.parse import urlsplit

CONNECT_SECONDS = 5.0


@functools.cache
def offline_reason() -> str | None:
    """Why nothing can be fetched from the hub, in words; None where it can be. Asked once in a process.

    Where the hub does not answer, its libraries are switched offline in this process and its children, as by
    HF_HUB_OFFLINE=1: they then take what is in their cache, and fail at once where nothing is.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if not _unreachable(constants.ENDPOINT):
        return None
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return f"{urlsplit(constants.ENDPOINT).hostname} cannot be reached from here"


def _unreachable(endpoint: str) -> bool:
    url = urlsplit(endpoint)
    if not url.hostname or _through_proxy(url.scheme, url.hostname):
        # Whatever names and lines say here, the proxy may know better.
        return False
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname, port), CONNECT_SECONDS).close()
    except OSError:
        return True
    return False


def _through_proxy(scheme: str, host: str) -> bool:
    proxies = urllib.request.getproxies()
    return bool({scheme, "all"} & set(proxies)) and not urllib.request.proxy_bypass(host)
