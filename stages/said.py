"""Take a message apart, and look for its pieces in a rendered text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from stages.messages import REASONING_FIELDS, Message, content_text
from storage.errors import UserError

_THINK_TAGS = re.compile(r"</?think>")


def said(message: Message) -> Iterator[tuple[str, str]]:
    """Yield what a message says but the names of tools, piece by piece, and the name of each piece for errors."""
    for piece in _THINK_TAGS.split(content_text(message.get("content"))):
        yield "the content", piece
    for name in REASONING_FIELDS:
        yield "the reasoning", message.get(name) or ""
    for call in message.get("tool_calls") or []:
        function = call["function"]
        for text in _texts_in(function["arguments"]):
            yield f"an argument of the tool call {function['name']!r}", text


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(inner)


def times_named(name: str, text: str) -> int:
    """Return how often a name stands in a text as a word of its own."""
    return len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", text))


def squeezed(text: str) -> str:
    """Return the text without white space, which templates trim and add."""
    return "".join(text.split())


def is_in(piece: str, text: str) -> bool:
    """Return True where a squeezed text holds the piece, as it is or as JSON writes it."""
    if squeezed(piece) in text:
        return True
    written: Iterable[str] = (json.dumps(piece.strip(), ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return any(squeezed(form) in text for form in written)


def thought_of(content: str) -> str:
    """Return the finished thought of a content, without its tags."""
    return _THINK_TAGS.sub("", content.rpartition("</think>")[0])


def not_rendered(what: str, place: str, tools: object = True) -> UserError:
    """Return the error for a part that is not in the rendered chat. tools: None where the row has none."""
    hint = "give the row its tools, " if tools is None else ""
    return UserError(
        f"The chat template does not render {what} of {place}; {hint}use a chat template that does, or remove the row."
    )
