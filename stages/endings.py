"""Rows whose text was cut when it was written: no token that ends them may have a loss.

A model that ran into its limit of tokens did not stop. A student that is trained on an end token there learns to stop
in the middle of an answer. `generate` and the vendors' APIs say so in a column beside the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

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


def was_cut(values: Iterable[Any]) -> bool:
    """Return True if one of the values of COLUMNS in a row says that its text was cut: a word of _CUT, or true."""
    return any(
        value is True or (isinstance(value, str) and value.strip().lower().replace("-", "_").replace(" ", "_") in _CUT)
        for value in values
    )


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
