"""Match paths with the patterns of a card: `*` within a name, `**` over folders, `?`, `[a-z]` and `[!a-z]`.

In time that grows with pattern and path alone: a card may be somebody else's, and what a regular expression makes of
`**/*a**/*a**/*b` takes for ever.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

_PARTS = re.compile(r"\*\*/|\*\*|\*|\?|\[(?:![^\]/]+|[^\]/!][^\]/]*)\]|.", re.DOTALL)
# Stands before the `**` and `/` of a `**/`, which may be passed by together.
_OPTIONAL = ""
# Steps that are remembered; a pattern and the names of a folder have a few hundred.
_MOST_STEPS = 100_000


class GlobPattern:
    """A pattern for whole paths. Raises re.error for a set of characters that cannot be read.

    All ways to match are followed at a time: a state is the place before a part of the pattern.
    """

    def __init__(self, pattern: str) -> None:
        self._parts: list[str] = []
        for part in _PARTS.findall(pattern):
            self._parts += [_OPTIONAL, "**", "/"] if part == "**/" else [part]
        self._tests = [_test(part) for part in self._parts]
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def matches(self, path: str) -> bool:
        """Tell whether the pattern matches the whole path."""
        states = self._reached([0])
        for character in path:
            key = states, character
            if key not in self._steps:
                if len(self._steps) >= _MOST_STEPS:
                    self._steps.clear()
                self._steps[key] = self._reached(self._step(states, character))
            states = self._steps[key]
        return len(self._parts) in states

    def _step(self, states: frozenset[int], character: str) -> Iterator[int]:
        for state in states:
            if state < len(self._parts) and self._tests[state](character):
                yield state if self._parts[state] in ("*", "**") else state + 1

    def _reached(self, states: Iterator[int] | list[int]) -> frozenset[int]:
        """The states, and those behind parts that may stand for nothing."""
        found: set[int] = set()
        waiting = list(states)
        while waiting:
            state = waiting.pop()
            if state in found:
                continue
            found.add(state)
            part = self._parts[state] if state < len(self._parts) else None
            if part in ("*", "**", _OPTIONAL):
                waiting.append(state + 1)
            if part == _OPTIONAL:
                waiting.append(state + 3)
        return frozenset(found)


def _test(part: str) -> Callable[[str], bool]:
    if part == _OPTIONAL:
        return lambda character: False
    if part == "**":
        return lambda character: True
    if part in ("*", "?"):
        return lambda character: character != "/"
    if len(part) == 1:
        return part.__eq__
    compiled = re.compile(_set(part))
    return lambda character: compiled.fullmatch(character) is not None


def _set(part: str) -> str:
    """Return the set of characters `[a-z]` or `[!a-z]` as a regular expression."""
    inside = part[1:-1].replace("\\", "\\\\")
    if inside.startswith("!"):
        return f"[^{inside[1:]}]"
    return f"[\\{inside}]" if inside[0] in "^[" else f"[{inside}]"
