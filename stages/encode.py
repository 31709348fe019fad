"""From text with marked spans to token ids, and the tokens that lie in the spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from storage.errors import UserError

Span = tuple[int, int]  # characters [start, end)


def encode_spans(
    tokenizer: Any, texts: Sequence[str], spans: Sequence[Sequence[Span]], *, add_special_tokens: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each text: token ids int32 [L], and bool [L], True for tokens with a character in one of its spans.

    Special tokens that the tokenizer adds at the end are marked when the token before them is. A tokenizer
    without offsets encodes the stretches inside and outside the spans separately.
    """
    if not tokenizer.is_fast:
        return [
            _encode_separately(tokenizer, text, marked, add_special_tokens)
            for text, marked in zip(texts, spans, strict=True)
        ]
    encoded = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    results = []
    for row, marked in enumerate(spans):
        ids = np.asarray(encoded["input_ids"][row], dtype=np.int32)
        offsets = np.asarray(encoded["offset_mapping"][row], dtype=np.int64).reshape(-1, 2)
        ends = offsets[:, 1]
        # Byte-level tokenizers trim spaces from offsets: a token of spaces only is (end, end).
        starts = np.minimum(offsets[:, 0], ends - 1)
        marks = np.zeros(len(ids), dtype=bool)
        for start, end in marked:
            marks |= (ends > start) & (starts < end)
        if add_special_tokens:
            _mark_trailing(marks, np.asarray(encoded["special_tokens_mask"][row], dtype=bool) & (ends == 0))
        results.append((ids, marks))
    return results


def check_text(text: str, where: str) -> None:
    """Raise UserError when `text` holds half a surrogate pair, which cannot be tokenised."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"The text in {where} holds half of a surrogate pair at character {error.start + 1}, which is no "
            "character; mend or remove the row."
        ) from error


def _mark_trailing(marks: np.ndarray, added: np.ndarray) -> None:
    """Mark in place the added special tokens at the end, if the token before them is marked."""
    last = len(marks) - 1
    while last >= 0 and added[last]:
        last -= 1
    if last >= 0 and marks[last]:
        marks[last + 1 :] = True


def _encode_separately(
    tokenizer: Any, text: str, spans: Sequence[Span], add_special_tokens: bool
) -> tuple[np.ndarray, np.ndarray]:
    """`encode_spans` for one text and a tokenizer that knows no offsets."""

    def encode(part: str, special: bool = False) -> list[int]:
        return list(tokenizer(part, add_special_tokens=special, verbose=False)["input_ids"])

    ids: list[int] = []
    marks: list[bool] = []
    at = 0
    for start, end in [*spans, (len(text), len(text))]:
        for part, marked in ((text[at:start], False), (text[start:end], True)):
            tokens = encode(part) if part else []
            ids += tokens
            marks += [marked] * len(tokens)
        at = end
    if add_special_tokens:
        plain, full = encode(text), encode(text, special=True)
        fits = (k for k in range(len(full) - len(plain) + 1) if full[k : k + len(plain)] == plain)
        lead = next(fits, 0)
        trail = full[lead + len(plain) :]
        marks = [False] * lead + marks + [bool(marks) and marks[-1]] * len(trail)
        ids = full[:lead] + ids + trail
    return np.asarray(ids, dtype=np.int32), np.asarray(marks, dtype=bool)
