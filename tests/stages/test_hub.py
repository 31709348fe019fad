"""Without a network, a name that is no directory is answered at once."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from stages import hub, pretrained, sources
from storage.errors import UserError


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a process begins where nobody said HF_HUB_OFFLINE; put back as the tests have it."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub.offline_reason.cache_clear()
    yield
    hub.offline_reason.cache_clear()


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("load", "what"),
    [
        (pretrained.load_config, "no model configuration of that name was downloaded before"),
        (pretrained.load_tokenizer, "no tokenizer of that name was downloaded before"),
        (sources.load_rows, "no data set of that name could be fetched"),
    ],
)
def test_no_request_is_sent_into_a_dead_line(
    load: Callable[[str], Any], what: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{dead}")
    connected = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: connected.append(to) or connect(self, to))
    with pytest.raises(UserError) as caught:
        load("no-such/name")
    assert what in str(caught.value) and "127.0.0.1 cannot be reached from here" in str(caught.value)
    assert "network" in str(caught.value) and "\n" not in str(caught.value)
    assert connected == [("127.0.0.1", dead)]


def test_a_hub_that_answers_is_used(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert hub.offline_reason() is None and not constants.HF_HUB_OFFLINE


def test_a_proxy_may_know_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://nowhere.invalid")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert hub.offline_reason() is None


def test_offline_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"none can be now \(HF_HUB_OFFLINE is set\)"):
        pretrained.load_config("no-such/name")
