"""Options that a command takes over from another, so that both say and mean the same."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

import click

from storage.errors import UserError

if TYPE_CHECKING:
    from stages.engines import EngineOptions

_Function = TypeVar("_Function", bound=Callable[..., object])


def options_of(command: click.Command, names: Collection[str]) -> Callable[[_Function], _Function]:
    """Give the decorated function the parameters `names` of `command`, in its order. Raises KeyError for another."""
    there = {param.name: param for param in command.params}
    chosen = [there[name] for name in there if name in names]
    if missing := set(names) - set(there):
        raise KeyError(f"{command.name} has no options {', '.join(sorted(missing))}")

    def give(function: _Function) -> _Function:
        # What click's own decorators leave behind, last option first.
        function.__click_params__ = [*getattr(function, "__click_params__", []), *reversed(chosen)]  # type: ignore[attr-defined]
        return function

    return give


def engine_options(given: dict[str, Any]) -> EngineOptions:
    """The teacher and what runs it, taken out of a command's parameters."""
    from dataclasses import fields

    from stages.engines import EngineOptions

    _check_url(given["server_url"])
    return EngineOptions(**{field.name: given.pop(field.name) for field in fields(EngineOptions)})


def _check_url(url: str | None) -> None:
    """Raise UserError for a server's URL that no client can read. None: no server."""
    from urllib.parse import urlsplit

    if url is None:
        return
    try:
        (urlsplit(url if "//" in url else f"http://{url}").hostname or "").encode("idna")
    except ValueError:
        raise UserError(f"--server-url {url}: expected http://host:port") from None
