"""Options that a command takes over from another, so that both say and mean the same."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.config_file import key_value_option
from storage.errors import UserError

if TYPE_CHECKING:
    from stages.chat_settings import ChatSettings
    from stages.engines import EngineOptions

_CHAT_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--chat-template",
        type=click.Path(),
        metavar="FILE",
        show_default="the tokenizer's own",
        help="A Jinja chat template in place of the tokenizer's own.",
    ),
    key_value_option(
        "--template-arg",
        "template_args",
        help="Variable of the chat template, e.g. enable_thinking=false; may be repeated.",
    ),
    click.option(
        "--template-time",
        metavar="DATE",
        show_default="the day when the output is begun",
        help="Date or time that a chat template is told which writes one, e.g. 2026-11-26.",
    ),
)

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


def chat_options(function: _Function) -> _Function:
    """Give the decorated command the options of the chat template; `chat_settings` reads them."""
    for option in reversed(_CHAT_OPTIONS):
        function = option(function)
    return function


def chat_settings(given: dict[str, Any]) -> ChatSettings:
    """Return how the chat template is used, taken out of a command's parameters."""
    from stages.chat_settings import ChatSettings

    return ChatSettings(given.pop("chat_template"), given.pop("template_args"), given.pop("template_time"))


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
