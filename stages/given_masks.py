"""Rows of token ids with the masks that trainers keep beside them -> ids without padding, and the loss mask.

Several masks in one row hold together: a position has a loss where each of them says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from storage.errors import UserError

IGNORED_LABEL = -100  # what losses of `torch` and `transformers` leave out
# One entry per token: 1 where the token is to be learned.
TOKEN_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "assistant_tokens_mask")
# Columns that trainers read for the same purpose, in forms that differ from one to the other.
NOT_SUPPORTED = frozenset(
    {
        *("response_mask", "prompt_mask", "target_mask", "label_mask", "mask", "label", "label_ids", "targets"),
        *("loss_weights", "loss_weight", "weights", "weight", "prompt_length", "prompt_len", "response_length"),
        *("seq_lengths", "sequence_lengths", "cu_seqlens"),
    }
)
COLUMNS = ("loss_mask", "labels", "attention_mask", "position_ids", *TOKEN_MASKS)


def apply_masks(
    ids: np.ndarray, given: Mapping[str, Any], place: Callable[[str], str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids [L] without padding and the loss mask bool [L-1].

    ids: integers [L]. given: the columns of COLUMNS that the row has, None where they are null. place: names a column
    of the row in errors. Raises UserError.
    """
    length = len(ids)
    mask = np.ones(max(0, length - 1), dtype=bool)
    for name, value in given.items():
        if value is None or name in ("attention_mask", "position_ids"):
            continue
        if name == "loss_mask":
            mask &= _loss_mask(value, length, place(name))
        elif name == "labels":
            mask &= _from_labels(value, ids, place(name))
        else:
            mask &= _flags(value, length, place(name))[1:]
    start, stop = 0, length
    if given.get("attention_mask") is not None:
        start, stop = _content(given["attention_mask"], length, place("attention_mask"))
    if given.get("position_ids") is not None:
        _refuse_packed(given["position_ids"], start, stop, length, place("position_ids"))
    return ids[start:stop], mask[start : max(start, stop - 1)]


def _booleans(value: Any) -> np.ndarray | None:
    """Return a list of 0 and 1 as bool; None for anything else."""
    given = value if isinstance(value, (list, np.ndarray)) else None
    if given is None or any(entry not in (0, 1) or isinstance(entry, float) for entry in given):
        return None
    return np.asarray(given, dtype=bool)


def _flags(value: Any, length: int, where: str) -> np.ndarray:
    """Return one bool per token."""
    given = _booleans(value)
    if given is None:
        raise UserError(f"The mask in {where} is not a list of 0 and 1; mend or remove the row.")
    if len(given) != length:
        raise UserError(f"The mask in {where} has {len(given)} entries for {length} ids; give one for each id.")
    return given


def _loss_mask(value: Any, length: int, where: str) -> np.ndarray:
    """Return a loss mask as this program writes it: one entry per scored position."""
    given = _booleans(value)
    if given is None:
        raise UserError(f"The loss mask in {where} is not a list of true and false; mend or remove the row.")
    if len(given) != max(0, length - 1):
        hint = "; name a mask with one entry per id completion_mask" if len(given) == length else ""
        raise UserError(
            f"The loss mask in {where} has {len(given)} entries where {length} ids need {max(0, length - 1)}; give one "
            f"for each scored position, the first about the prediction of the second id{hint}."
        )
    return given


def _from_labels(value: Any, ids: np.ndarray, where: str) -> np.ndarray:
    """Return the loss mask that labels say: label t+1 is about the prediction of id t+1."""
    try:
        labels = np.asarray(value)
    except (ValueError, OverflowError):
        labels = np.zeros(0)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"The labels in {where} are not a list of whole numbers; mend or remove the row.")
    if len(labels) != len(ids):
        raise UserError(f"The labels in {where} have {len(labels)} entries for {len(ids)} ids; give one for each id.")
    kept = labels != IGNORED_LABEL
    if (labels[kept] != ids[kept]).any():
        shifted = np.array_equal(labels[:-1][kept[:-1]], ids[1:][kept[:-1]])
        said = "are shifted by one place" if shifted else "differ from the ids"
        raise UserError(
            f"The labels in {where} {said}; give labels that repeat each id, or {IGNORED_LABEL} where it has no loss."
        )
    return kept[1:]


def _content(value: Any, length: int, where: str) -> tuple[int, int]:
    """Return the range of ids that an attention mask leaves: padding stands before or after it."""
    there = np.flatnonzero(_flags(value, length, where))
    if not len(there):
        return 0, 0
    start, stop = int(there[0]), int(there[-1]) + 1
    if stop - start != len(there):
        raise UserError(f"The attention mask in {where} leaves out ids in the middle; mend or remove the row.")
    return start, stop


def _refuse_packed(value: Any, start: int, stop: int, length: int, where: str) -> None:
    """Raise UserError for positions that do not count up by one: the row holds several sequences."""
    try:
        positions = np.asarray(value)
    except (ValueError, OverflowError):
        positions = np.zeros(0)
    if positions.shape != (length,) or positions.dtype.kind not in "iu":
        raise UserError(f"The positions in {where} are not one whole number per id; mend or remove the row.")
    if (np.diff(positions[start:stop]) != 1).any():
        raise UserError(
            f"The positions in {where} start again within the row, so the row packs several sequences; give each "
            "sequence a row of its own."
        )
