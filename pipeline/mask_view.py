"""The text of a sequence with its trained tokens marked: what a loss mask says, to be seen at a glance."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from pipeline.progress import on_terminal
from pipeline.streams import has_characters, printable_text
from storage.words import counted

if TYPE_CHECKING:
    import numpy as np

# Text and whether it is trained.
Stretch = tuple[str, bool]

# Tokens before a stretch that are decoded with it: some tokenizers drop a space where decoding begins.
_CONTEXT = 16
# Characters of a shortened view: before the first trained text, at its start, at its end, and after it.
_BEFORE, _START, _END, _AFTER = 200, 200, 150, 50
_CUT = " ... "
_MARKS = (("[[", "]]"), ("<<<", ">>>"), ("{{{", "}}}"))


def stretches(tokenizer: Any, input_ids: np.ndarray, loss_mask: np.ndarray) -> list[Stretch]:
    """Return the text of a sequence in its order, cut where the loss begins and ends.

    input_ids: integers [L]. loss_mask: bool [L-1]; its entry t is about token t + 1. A character of several tokens
    counts as trained where one of them is.
    """
    ids = input_ids.tolist()
    trained = [False, *loss_mask.tolist()]
    found: list[Stretch] = []
    for start, end in _runs(trained):
        context = max(0, start - _CONTEXT)
        before, whole = _decoded(tokenizer, ids[context:start]), _decoded(tokenizer, ids[context:end])
        same = _same(before, whole)
        text, marked = whole[same:], trained[start]
        # What the tokens before gave of a character that only these complete.
        if (unfinished := len(before) - same) and text:
            shared = _drop_last(found, unfinished)
            found.append((text[:1], marked or shared))
            text = text[1:]
        if text or marked:
            found.append((text, marked))
    return _joined(found)


def shortened(view: Sequence[Stretch]) -> list[Stretch]:
    """Return what lies around the first trained text, " ... " where something is left out."""
    lengths = [len(text) for text, _ in view]
    first = next((number for number, (_, marked) in enumerate(view) if marked), 0)
    start, total = sum(lengths[:first]), sum(lengths)
    end = start + lengths[first] if view else 0
    # A gap that is no longer than what stands in its place is no gap.
    kept = [(max(0, start - _BEFORE), start + _START), (end - _END, end + _AFTER)]
    if kept[1][0] <= kept[0][1] + len(_CUT):
        kept = [(kept[0][0], max(kept[0][1], kept[1][1]))]
    found: list[Stretch] = []
    shown = 0
    for begin, stop in kept:
        if begin > shown:
            found.append((_CUT, False))
        found += _between(view, begin, stop)
        shown = stop
    if shown < total:
        found.append((_CUT, False))
    return found


def show(view: Sequence[Stretch], what: str, input_ids: np.ndarray, loss_mask: np.ndarray, stream: TextIO) -> None:
    """Print a headline and the text: underlined on a terminal, else between marks that the headline names.

    what: begins the headline. The marks are some that the text itself does not hold.
    """
    trained = f"{counted(len(input_ids), 'token')}, {int(loss_mask.sum())} trained"
    shown = [(printable_text(text), marked) for text, marked in view]
    if on_terminal(stream):
        _print_underlined(shown, f"{what}: {trained}, underlined", stream)
        return
    text, opening, closing = between_marks(shown)
    ending = "" if text.endswith("\n") else "\n"
    stream.write(f"{what}: {trained}, between {opening} and {closing}\n{text}{ending}")
    stream.flush()


def between_marks(view: Sequence[Stretch]) -> tuple[str, str, str]:
    """Return the text with trained stretches between two marks, and the marks, which can be told from the text."""
    whole = "".join(text for text, _ in view)
    for opening, closing in (*_MARKS, _numbered(whole)):
        text = "".join(f"{opening}{part}{closing}" if marked else part for part, marked in view)
        if _parsed(text, opening, closing) == list(view):
            return text, opening, closing
    raise AssertionError("unreachable: the numbered marks are not in the text")


def _runs(trained: Sequence[bool]) -> Iterator[tuple[int, int]]:
    start = 0
    for at in range(1, len(trained) + 1):
        if at == len(trained) or trained[at] != trained[start]:
            yield start, at
            start = at


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


def _same(one: str, other: str) -> int:
    """Return the number of characters that the two begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _drop_last(found: list[Stretch], count: int) -> bool:
    """Take away the last `count` characters. Return whether some of these were trained."""
    marked = False
    while count and found:
        text, of_last = found.pop()
        marked |= of_last
        if len(text) > count:
            found.append((text[:-count], of_last))
        count -= min(count, len(text))
    return marked


def _joined(found: Iterable[Stretch]) -> list[Stretch]:
    alike = itertools.groupby(found, key=lambda stretch: stretch[1])
    return [("".join(text for text, _ in group), marked) for marked, group in alike]


def _between(view: Sequence[Stretch], begin: int, stop: int) -> Iterator[Stretch]:
    at = 0
    for text, marked in view:
        part = text[max(0, begin - at) : max(0, stop - at)]
        if part:
            yield part, marked
        at += len(text)


def _numbered(text: str) -> tuple[str, str]:
    """Marks whose number stands nowhere in the text, so that none begins within it."""
    there = {*re.findall(r"[0-9]+", text)}
    number = next(each for each in map(str, itertools.count(1)) if each not in there)
    return f"[{number}[", f"]{number}]"


def _parsed(text: str, opening: str, closing: str) -> list[Stretch]:
    """The stretches as a reader takes them: the next mark of the kind that comes next ends each."""
    found: list[Stretch] = []
    marked, start = False, 0
    while True:
        mark = closing if marked else opening
        end = text.find(mark, start)
        part = text[start:] if end < 0 else text[start:end]
        if part or marked:
            found.append((part, marked))
        if end < 0:
            return found
        marked, start = not marked, end + len(mark)


def _print_underlined(view: Sequence[Stretch], headline: str, stream: TextIO) -> None:
    from rich.console import Console
    from rich.text import Text

    # A trained end of line would not be seen.
    sign = "\u21b5\n" if has_characters(stream, "\u21b5") else "\\n\n"
    drawn = Text()
    for text, marked in view:
        drawn.append(text.replace("\n", sign) if marked else text, style="underline green" if marked else None)
    console = Console(file=stream)
    console.print(Text(headline, style="bold"), soft_wrap=True)
    console.print(drawn, soft_wrap=True)
