"""Find the parts of a chat that a chat template leaves out, by rendering unmistakable words in their place.

A content may stand in a rendered chat by chance, as a part of another one, so looking for the content itself proves
little. A word that nobody writes proves that the template renders the place where it stands. Chats of one shape have
the same gaps, so each shape is rendered once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from stages.chat_template import CLOSE_THINK, THINK, ChatTemplate, Tools
from stages.messages import REASONING_FIELDS, Message

# The number of a message, or of a tool, and the part of it that is left out.
Part = Literal["content", "thought", "reasoning", "call", "tool"]
Gap = tuple[int, Part]

_TAGS = re.compile(f"({THINK}|{CLOSE_THINK})")
_MOST_SHAPES = 4096


class TemplateGaps:
    """Finds the gaps of one template."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._known: dict[Any, frozenset[Gap] | None] = {}

    def find(self, messages: Sequence[Message], tools: Tools, *, prompt: bool = False) -> frozenset[Gap] | None:
        """Return the gaps of a chat as it is rendered; None where the template refuses a chat of other words.

        prompt: with the generation prompt, for a chat that is to be answered.
        """
        worded = [worded_message(message, number) for number, message in enumerate(messages)]
        key = (tuple(shape for _, _, shape in worded), len(tools or []), prompt)
        if key not in self._known:
            if len(self._known) >= _MOST_SHAPES:
                self._known.clear()
            self._known[key] = self._render(worded, tools, prompt)
        return self._known[key]

    def _render(self, worded: list[tuple[Message, dict[str, Gap], Any]], tools: Tools, prompt: bool) -> Any:
        words = {word: gap for _, own, _ in worded for word, gap in own.items()}
        others = None if tools is None else [_renamed(tool, f"qvztool{n}qvz") for n, tool in enumerate(tools)]
        words |= {f"qvztool{number}qvz": (number, "tool") for number in range(len(tools or []))}
        try:
            text = self._template.render([message for message, _, _ in worded], others, prompt=prompt)
        except Exception:  # noqa: BLE001 - a template may refuse contents that mean nothing
            return None
        return frozenset(gap for word, gap in words.items() if word not in text)


def has_thought(content: str) -> bool:
    """Return True for a content with a finished thought, whose opening tag may be missing."""
    return CLOSE_THINK in content


def worded_message(message: Message, number: int) -> tuple[Message, dict[str, Gap], Any]:
    """Return a message of words, the gap that each missing word means, and the shape that decides what is rendered."""
    words: dict[str, Gap] = {}

    def word(part: Part) -> str:
        new = f"qvz{number}w{len(words)}qvz"
        words[new] = (number, part)
        return new

    def spoken(text: str) -> tuple[str, tuple[str, ...]]:
        pieces, closed = _TAGS.split(text), text.rfind(CLOSE_THINK)
        inside = has_thought(text) and not text[:closed].lstrip().startswith(THINK) and THINK not in text[:closed]
        said, shape, at = [], [], 0
        for piece in pieces:
            thought = inside and at < closed
            if piece in (THINK, CLOSE_THINK):
                inside = piece == THINK
            elif thought or piece.strip():
                # An empty thought gets a word too: the template may strip it as it strips others.
                lead = piece[: len(piece) - len(piece.lstrip())] or "\n" * thought
                said.append(lead + word("thought" if thought else "content") + piece[len(piece.rstrip()) :])
                shape.append("thought" if thought else "content")
                at += len(piece)
                continue
            said.append(piece)
            shape.append(piece if piece in (THINK, CLOSE_THINK) else "")
            at += len(piece)
        return "".join(said), tuple(shape)

    new = dict(message)
    shapes: list[Any] = [message["role"]]
    content = message.get("content")
    if isinstance(content, list):
        parts = [(part, *spoken(part["text"])) for part in content]
        new["content"] = [{**part, "text": text} for part, text, _ in parts]
        shapes.append(tuple(shape for _, _, shape in parts))
    elif isinstance(content, str):
        new["content"], shape = spoken(content)
        shapes.append(shape)
    else:
        shapes.append(None)
    for name in REASONING_FIELDS:
        if message.get(name):
            new[name] = word("reasoning")
            shapes.append(name)
    if calls := message.get("tool_calls"):
        new["tool_calls"] = [{**call, "function": {**call["function"], "name": word("call")}} for call in calls]
        shapes.append(len(calls))
    return new, words, tuple(shapes)


def _renamed(tool: dict[str, Any], name: str) -> dict[str, Any]:
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name}
