"""Read from a pattern the characters that one match of it may hold side by side.

The patterns are those of pre-tokenizers and normalizers, in the syntax of Oniguruma. Between two characters that no
match holds side by side, no match and no attempt at one looks across: so the text behind does not depend on the text
before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

_SIMPLE_ESCAPES = set("dDwWsShHrntfvae")
_REPEAT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_GROUP = re.compile(r"\(\?(?::|=|!|>|([im]+):)")
_PROPERTY = re.compile(r"\\[pP]\{\^?[\w ]+\}|\\x\{[0-9A-Fa-f]+\}|\\x[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}")


class NotUnderstood(Exception):
    """The pattern has syntax whose reach this module cannot tell."""


@dataclass(frozen=True)
class _Node:
    """A part of a pattern: atoms that may come first and last in a match of it, and whether it may match nothing."""

    first: frozenset[int]
    last: frozenset[int]
    empty: bool


_NOTHING = _Node(frozenset(), frozenset(), True)


@dataclass
class Reach:
    """The atoms of a pattern, each a pattern for one character, and the pairs of them that a match may put in a row."""

    pattern: str
    atoms: list[str] = field(default_factory=list)
    follow: set[tuple[int, int]] = field(default_factory=set)
    _at: int = 0
    _matches: dict[tuple[str, str], bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the pattern. Raises NotUnderstood."""
        flags = ""
        if found := re.match(r"\(\?([im]+)\)", self.pattern):
            flags, self._at = found[1], found.end()
        self._alternatives(flags)
        if self._at < len(self.pattern):
            raise NotUnderstood(self.pattern)
        # Without regard to case, one letter may match several: ß is ss.
        if any("i" in atom[: atom.find(":")] and not atom.isascii() for atom in self.atoms if atom.startswith("(?")):
            raise NotUnderstood(self.pattern)

    def crosses(self, before: str, behind: str, matches: Callable[[str, str], bool]) -> bool:
        """Return True where one match, or an attempt at one, may hold the two characters side by side.

        matches: tells whether an atom matches a character.
        """

        def holds(atom: int, character: str) -> bool:
            key = (self.atoms[atom], character)
            if key not in self._matches:
                self._matches[key] = matches(*key)
            return self._matches[key]

        return any(holds(one, before) and holds(other, behind) for one, other in self.follow)

    # ---- the parser: each method reads on from self._at ------------------------------------------------------

    def _next(self, length: int = 1) -> str:
        return self.pattern[self._at : self._at + length]

    def _alternatives(self, flags: str) -> _Node:
        nodes = [self._sequence(flags)]
        while self._next() == "|":
            self._at += 1
            nodes.append(self._sequence(flags))
        return _Node(
            frozenset().union(*(node.first for node in nodes)),
            frozenset().union(*(node.last for node in nodes)),
            any(node.empty for node in nodes),
        )

    def _sequence(self, flags: str) -> _Node:
        whole = _NOTHING
        while self._at < len(self.pattern) and self._next() not in "|)":
            node = self._repeated(flags)
            self._link(whole.last, node.first)
            whole = _Node(
                whole.first | node.first if whole.empty else whole.first,
                whole.last | node.last if node.empty else node.last,
                whole.empty and node.empty,
            )
        return whole

    def _link(self, last: Iterable[int], first: Iterable[int]) -> None:
        self.follow |= {(one, other) for one in last for other in first}

    def _repeated(self, flags: str) -> _Node:
        node = self._item(flags)
        while self._at < len(self.pattern):
            found = _REPEAT.match(self.pattern, self._at)
            if self._next() in "?*+":
                # Behind another quantifier, + and ? say how, not how often; to read them as more is safe.
                least, most = (1 if self._next() == "+" else 0), (1 if self._next() == "?" else 2)
                self._at += 1
            elif found and (found[1] or found[3]):
                least = int(found[1] or 0)
                most = least if not found[2] else int(found[3]) if found[3] else 2
                self._at = found.end()
            else:
                break
            if most > 1:
                self._link(node.last, node.first)
            node = _Node(node.first, node.last, node.empty or least == 0)
        return node

    def _item(self, flags: str) -> _Node:
        character = self._next()
        if character == "(":
            return self._group(flags)
        if character == "[":
            return self._atom(self._class(), flags)
        if character in "^$":
            self._at += 1
            return _NOTHING
        if character == "\\":
            return self._escape(flags)
        if character in "?*+)":
            raise NotUnderstood(self.pattern)
        self._at += 1
        return self._atom("." if character == "." else _quoted(character), flags)

    def _atom(self, text: str, flags: str) -> _Node:
        self.atoms.append(f"(?{flags}:{text})" if flags else text)
        own = frozenset({len(self.atoms) - 1})
        return _Node(own, own, False)

    def _group(self, flags: str) -> _Node:
        found = _GROUP.match(self.pattern, self._at)
        if found is None and self._next(2) == "(?":
            raise NotUnderstood(self.pattern)  # it looks behind, has a name, a comment, a condition
        self._at = found.end() if found else self._at + 1
        is_ahead = found is not None and found[0][-1] in "=!"
        node = self._alternatives("".join(sorted({*flags, *found[1]})) if found and found[1] else flags)
        if self._next() != ")":
            raise NotUnderstood(self.pattern)
        self._at += 1
        # What a look ahead reads counts as read; the rest of the pattern goes on as if it were not there.
        return _Node(node.first, node.last, True) if is_ahead else node

    def _escape(self, flags: str) -> _Node:
        found = _PROPERTY.match(self.pattern, self._at)
        if found:
            self._at = found.end()
            return self._atom(found[0], flags)
        name = self._next(2)[1:]
        if name in ("b", "B"):
            self._at += 2
            return _NOTHING
        if not name or (name.isalnum() and name not in _SIMPLE_ESCAPES):
            raise NotUnderstood(self.pattern)
        self._at += 2
        return self._atom("\\" + name, flags)

    def _class(self) -> str:
        """Return the text of a class in brackets, which may hold others."""
        start, depth = self._at, 0
        while self._at < len(self.pattern):
            if self._next() == "\\":
                self._at += 2
                continue
            if self._next() == "[":
                depth += 1
                self._at += 2 if self._next(2) == "[^" else 1
                if self._next() == "]":  # the first one is a character
                    raise NotUnderstood(self.pattern)
                continue
            self._at += 1
            if self.pattern[self._at - 1] == "]":
                depth -= 1
                if depth == 0:
                    return self.pattern[start : self._at]
        raise NotUnderstood(self.pattern)


def literal(text: str) -> Reach:
    """Return the reach of a pattern that is plain text."""
    return Reach("".join(map(_quoted, text)))


def _quoted(character: str) -> str:
    # Oniguruma has no escape for letters of other scripts, and needs none.
    return re.escape(character) if character.isascii() else character
