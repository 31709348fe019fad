"""Rows whose text was cut when it was written: no token that ends them may have a loss.

A model that ran into its limit of tokens did not stop. A student that is trained on an end token there learns to stop
in the middle of an answer. `generate` and the vendors' APIs say so in a column beside the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from storage.errors import UserError

# The columns that are read where they are there.
COLUMNS = ("finish_reason", "stop_reason", "truncated")
# What they say of a text that was cut, in lower case with underscores: of OpenAI and vLLM, Mistral, Anthropic, Google.
_CUT = frozenset(
    {
        *("length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "model_length"),
        *("model_context_window_exceeded", "content_filter", "content_filtered", "safety", "abort", "aborted"),
        *("incomplete", "truncated"),
    }
)


# What a column `truncated` says, in lower case.
_TRUE, _FALSE = frozenset({"true", "1", "yes"}), frozenset({"false", "0", "no", "", "none", "null"})


def was_cut(said: Mapping[str, Any], where: str = "the row") -> bool:
    """Return True if one of the columns COLUMNS of a row says that its text was cut.

    Raises UserError for a column `truncated` that says neither yes nor no.
    """
    return any(_truncated(value, where) if name == "truncated" else _is_limit(value) for name, value in said.items())


def _truncated(value: Any, where: str) -> bool:
    word = str(int(value) if isinstance(value, (bool, float)) and value in (0, 1) else value).strip().lower()
    if word not in _TRUE | _FALSE:
        raise UserError(f"The column 'truncated' of {where} is {str(value)[:40]!r}; give true or false.")
    return word in _TRUE


def _is_limit(value: Any) -> bool:
    """Return True for a word of _CUT; enumerations may be written with their name before it."""
    if not isinstance(value, str):
        return value is True
    return value.strip().lower().rpartition(".")[2].replace("-", "_").replace(" ", "_") in _CUT


def ends(ids: np.ndarray, stops: frozenset[int], tokenizer: Any) -> bool:
    """Return True where the ids end in a token of `stops`; white space, which templates write, may follow."""
    for token in ids[::-1].tolist():
        if token in stops:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def until_stop(ids: np.ndarray, mask: np.ndarray, stops: frozenset[int]) -> np.ndarray:
    """Return the loss mask of a completion without what follows the first token of `stops` that has a loss.

    ids: [L]. mask: bool [L-1]. A teacher generates nothing after that token.
    """
    found = np.flatnonzero(mask & np.isin(ids[1:], list(stops)))
    if not len(found):
        return mask
    without = mask.copy()
    without[found[0] + 1 :] = False
    return without


def without_last_end(ids: np.ndarray, mask: np.ndarray, eos: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return a text without the end-of-sequence tokens at its end and mask, of ids [L] and mask bool [L-1]."""
    length = len(ids)
    while length and ids[length - 1] == eos:
        length -= 1
    return ids[:length], mask[: max(0, length - 1)]
