"""From text with marked spans to token ids, and the tokens that lie in the spans.

The ids are always those of the whole text. A long text is encoded by stretches that overlap, in bounded memory: two
neighbours are joined inside their overlap, only where they agree on it, and where the tokenizer provably treats the
text on both sides apart (see `_joined`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.seams import Seams
from storage.errors import UserError

Span = tuple[int, int]  # characters [start, end)

# Characters that are encoded at a time. A tokenizer takes some 200 bytes of memory for each.
_GROUP = 1 << 19
_STRETCH = 1 << 16
# Share of a stretch that the next one encodes again, and the tokens on which both must agree there.
_OVERLAP_SHARE = 16
_AGREE = 16
_LONGEST_PERIOD = 64
_PROBE = 1000


@dataclass(frozen=True)
class _Tokens:
    """Tokens of a text without the special ones that a tokenizer adds: ids int32 [T], characters int64 [T]."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def encode_spans(
    tokenizer: Any,
    texts: Sequence[str],
    spans: Sequence[Sequence[Span]],
    *,
    add_special_tokens: bool,
    ending: bool = True,
    limit: int | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each text: token ids int32 [L], and bool [L], True for tokens with a character in one of its spans.

    `ending`: False leaves out the special tokens that the tokenizer adds after a text.
    `limit`: ids of a text that are wanted; of a long one no more are computed, and at least these are right.
    Special tokens that the tokenizer adds at the end are marked when the token before them is. It adds none where the
    text begins, or ends, with the same ones already.
    """
    lead, trail = _added(tokenizer, texts) if add_special_tokens else ([], [])
    trail = trail if ending else []
    parts = _fast(tokenizer, texts, limit) if tokenizer.is_fast else _slow(tokenizer, texts, spans, limit)
    results = []
    special = _special_ids(tokenizer)
    for (tokens, borders, is_whole), marked in zip(parts, spans, strict=True):
        marks = np.zeros(len(tokens.ids), dtype=bool)
        for start, end in marked:
            start, end = borders.get(start, start), borders.get(end, end)
            # A special token may swallow white space behind it (rstrip), and so reach into a span that follows.
            headers = np.isin(tokens.ids, special) & (tokens.starts < start)
            marks |= (tokens.ends > start) & (tokens.starts < end) & ~headers
        results.append(_with_added(tokens.ids, marks, lead, trail if is_whole else []))
    return results


def _special_ids(tokenizer: Any) -> np.ndarray:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return np.array(sorted({index for index, token in added.items() if token.special}), dtype=np.int64)


def check_text(text: str, where: str) -> None:
    """Raise UserError when `text` holds half a surrogate pair, which cannot be tokenised."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"The text in {where} holds half of a surrogate pair at character {error.start + 1}, which is no "
            "character; mend or remove the row."
        ) from error


def special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Return a pattern for text that the tokenizer reads as a special token, such as `<|im_end|>`; None for none.

    Text of a user that holds such a word becomes a control token, which no chat template wrote.
    """
    if getattr(tokenizer, "split_special_tokens", False):
        return None
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special}
    found = sorted(special - {""}, key=lambda text: (-len(text), text))
    if not found:
        return None
    encoded = tokenizer(found, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    ids = tokenizer.convert_tokens_to_ids(found)
    read = [text for text, own, id in zip(found, encoded, ids, strict=True) if id in own and len(own) <= 2]
    return re.compile("|".join(map(re.escape, read))) if read else None


def has_special_text(pattern: re.Pattern[str] | None, value: Any) -> bool:
    """Return True where `pattern` finds something in `value`: a text, or messages with texts at any depth."""
    if pattern is None:
        return False
    left = [value]
    while left:  # not a recursion: a row may be nested deeply
        value = left.pop()
        if isinstance(value, str) and pattern.search(value):
            return True
        left += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return False


# ---- the special tokens that a tokenizer adds -------------------------------------------------------------


def _added(tokenizer: Any, texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after every text. Raises UserError where that depends on it."""
    plain: list[int] = []
    full: list[int] = []
    # A letter is enough, but for a vocabulary that has none.
    for probe in ("a", "1", *(text[:_PROBE] for text in texts[:1])):
        plain, full = (
            list(tokenizer(probe, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"])
            for special in (False, True)
        )
        if plain:
            break
    at = next((k for k in range(len(full) - len(plain) + 1) if full[k : k + len(plain)] == plain), None)
    if at is None:
        raise UserError(
            "The tokenizer encodes a text otherwise when it adds its special tokens, so the places of those cannot be "
            "told; supply input_ids."
        )
    return (full[:at], full[at + len(plain) :]) if plain else (full, [])


def _with_added(ids: np.ndarray, marks: np.ndarray, lead: list[int], trail: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and marks with the added special tokens, but for those that the text itself begins or ends with."""
    if lead and ids[: len(lead)].tolist() == lead:
        lead = []
    if trail and ids[-len(trail) :].tolist() == trail:
        trail = []
    if not lead and not trail:
        return ids, marks
    last = bool(len(marks)) and bool(marks[-1])
    whole = np.concatenate([np.asarray(lead, np.int32), ids, np.asarray(trail, np.int32)])
    return whole, np.concatenate([np.zeros(len(lead), bool), marks, np.full(len(trail), last)])


# ---- tokenizers with offsets ------------------------------------------------------------------------------

_Part = tuple[_Tokens, dict[int, int], bool]  # the places of characters among the tokens; True: of the whole text


def _fast(tokenizer: Any, texts: Sequence[str], limit: int | None) -> Iterator[_Part]:
    """The tokens of each text, in groups that bound the memory."""
    group: list[str] = []
    held = 0
    for text in texts:
        is_long = len(text) > 2 * _STRETCH
        if group and (is_long or held + len(text) > _GROUP):
            yield from ((tokens, {}, True) for tokens in _encoded(tokenizer, group))
            group, held = [], 0
        if is_long:
            yield _long(tokenizer, text, limit)
        else:
            group.append(text)
            held += len(text)
    if group:
        yield from ((tokens, {}, True) for tokens in _encoded(tokenizer, group))


def _encoded(tokenizer: Any, texts: Sequence[str], at: int = 0) -> list[_Tokens]:
    """The tokens of each text at once; `at` is the character of a whole at which they begin."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    results = []
    for ids, places in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        offsets = np.asarray(places, dtype=np.int64).reshape(-1, 2) + at
        # Byte-level tokenizers trim spaces from offsets: a token of spaces only is (end, end).
        starts = np.minimum(offsets[:, 0], offsets[:, 1] - 1)
        results.append(_Tokens(np.asarray(ids, dtype=np.int32), starts, offsets[:, 1]))
    return results


def _long(tokenizer: Any, text: str, limit: int | None) -> _Part:
    """The tokens of a long text, by stretches; larger ones where neighbours do not agree, at last the whole."""
    size = _STRETCH
    seams = Seams(tokenizer)
    while seams.known and 2 * size < len(text):
        parts: list[_Tokens] = []
        count = 0
        for part in _stretches(tokenizer, text, size, seams):
            if part is None:
                break
            parts.append(part)
            count += len(part.ids)
            if limit is not None and count >= limit:
                return _concatenated(parts), {}, False
        else:
            return _concatenated(parts), {}, True
        size *= 4
    return _encoded(tokenizer, [text])[0], {}, True


def _stretches(tokenizer: Any, text: str, size: int, seams: Seams) -> Iterator[_Tokens | None]:
    """The tokens of consecutive stretches of about `size` characters; None, and no more, where two cannot be joined."""
    overlap = size // _OVERLAP_SHARE
    stop = size
    left = _encoded(tokenizer, [text[:stop]])[0]
    while stop < len(text):
        # A stretch that begins where a token begins is read as the whole is, but for a few tokens.
        before = np.searchsorted(left.starts, stop - overlap, side="right") - 1
        begin = int(left.starts[before]) if before >= 0 else -1
        if begin < stop - 2 * overlap:
            yield None
            return
        next_stop = min(begin + size, len(text))
        # The last one is never so short that nothing lies beyond the overlap.
        next_stop = len(text) if len(text) - next_stop < overlap else next_stop
        right = _encoded(tokenizer, [text[begin:next_stop]], begin)[0]
        seam = _joined(text, left, right, (begin + overlap // 4, stop - overlap // 4), seams)
        if seam is None:
            yield None
            return
        yield _Tokens(left.ids[: seam[0]], left.starts[: seam[0]], left.ends[: seam[0]])
        left = _Tokens(right.ids[seam[1] :], right.starts[seam[1] :], right.ends[seam[1] :])
        stop = next_stop
    yield left


def _joined(text: str, left: _Tokens, right: _Tokens, between: tuple[int, int], seams: Seams) -> tuple[int, int] | None:
    """The token of `left`, and the same one of `right`, at which the two are joined; None where that is not safe.

    It is safe where both, which see other text around them, agree on every token between two characters, those are
    enough, and the text there neither repeats itself nor is of one class of characters. Otherwise the agreement proves
    nothing: in a run of one letter, or of digits, what stands far away decides where tokens begin. `seams` then proves
    the place.
    """
    low, high = between
    zone = text[low:high]
    if any(zone[period:] == zone[:-period] for period in range(1, min(_LONGEST_PERIOD, len(zone) // 2) + 1)):
        return None
    ours = np.flatnonzero((left.starts >= low) & (left.ends <= high))
    theirs = np.flatnonzero((right.starts >= low) & (right.ends <= high))
    if len(ours) != len(theirs) or len(ours) < _AGREE:
        return None
    for one, other in ((left.ids, right.ids), (left.starts, right.starts), (left.ends, right.ends)):
        if not np.array_equal(one[ours], other[theirs]):
            return None
    middle = len(ours) // 2
    for place in sorted(range(len(ours) // 4, 3 * len(ours) // 4), key=lambda place: abs(place - middle)):
        token = int(ours[place])
        end, start = int(left.ends[token - 1]), int(left.starts[token])
        # Spaces between the two places belong to one of the tokens, but offsets do not say to which.
        for at in sorted({end, start}) if end <= start else ():
            beside = {_class(text[at - 1]), _class(text[at])}
            if len(beside) == 2 and seams.safe(text, at, left.ids, left.starts, token):
                return token, int(theirs[place])
    return None


def _class(character: str) -> str:
    if character.isspace():
        return "space"
    return "letter" if character.isalpha() else "digit" if character.isnumeric() else "other"


def _concatenated(parts: list[_Tokens]) -> _Tokens:
    columns = ("ids", "starts", "ends")
    return _Tokens(*(np.concatenate([getattr(part, column) for part in parts]) for column in columns))


# ---- tokenizers without offsets ---------------------------------------------------------------------------


def _slow(tokenizer: Any, texts: Sequence[str], spans: Sequence[Sequence[Span]], limit: int | None) -> Iterator[_Part]:
    """The tokens of each text, and where the borders of its spans lie among them.

    The pieces of a token say how long it is, in a spelling of the tokenizer's own (`▁` for a space, `<0xE4>` for a
    byte). The text before a border has the same spelling, as far as it goes, so its length there is the border's place.
    A token into which a border falls then lies on both sides of it.
    """
    for text, marked in zip(texts, spans, strict=True):
        text, ids, is_whole = _slow_ids(tokenizer, text, limit)
        spelling = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
        ends = np.cumsum([len(piece) for piece in spelling], dtype=np.int64)
        starts = ends - np.asarray([len(piece) for piece in spelling], dtype=np.int64)
        whole = "".join(spelling)
        borders = {0: 0}
        for border in {border for span in marked for border in span} - {0}:
            before = whole
            if border < len(text):
                before = "".join(map(str, tokenizer.convert_ids_to_tokens(_plain_ids(tokenizer, text[:border]))))
            borders[border] = len(os.path.commonprefix([before, whole]))  # noqa: RUF071 - of characters
        yield _Tokens(np.asarray(ids, dtype=np.int32), starts, ends), borders, is_whole


def _slow_ids(tokenizer: Any, text: str, limit: int | None) -> tuple[str, list[int], bool]:
    """The ids of the text; of a long one as many characters as the first `limit` ids need, and those."""
    size = _STRETCH
    known: list[int] = []
    while limit is not None and size < len(text):
        ids = _plain_ids(tokenizer, text[:size])
        # Ids that twice as much text leaves as they were are those of the whole.
        if known[:limit] == ids[:limit] and len(known) >= limit:
            return text[:size], ids[:limit], False
        known, size = ids, 2 * size
    return text, _plain_ids(tokenizer, text), True


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
