"""Encoded rows as records: sequences of at most the maximum length, and what became of the rows that make none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

KEPT, EMPTY, TOO_SHORT, WITHOUT_LOSS = range(4)


class Encoded(NamedTuple):
    """One sequence of L ids before it is cut. without_end, open_thoughts: as in `stages.chat.Rendered`.

    unfinished: its text was cut when it was written.
    """

    ids: np.ndarray  # int32 [L]
    mask: np.ndarray  # bool [L-1]
    without_end: int = 0
    open_thoughts: int = 0
    unfinished: bool = False


EncodedRow = Encoded | list[Encoded] | None  # one sequence, several, or none where the row is empty


def records(rows: Iterable[EncodedRow], special: Iterable[bool], max_length: int, split: bool) -> pa.Table:
    """A table of records: ids and mask of each sequence, empty lists for what is left out, and why it is.

    What is said of a row stands on its first record, which has `begins`: `overlong` where it was cut or split,
    `special` as it is given for each row, the counts of its turns, and `unfinished`.
    """
    import pyarrow as pa

    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    outcomes: list[int] = []
    said: list[tuple[bool, bool, int, int, bool, bool]] = []
    nothing = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool)
    for row, has_special in zip(rows, special, strict=True):
        parts = row if isinstance(row, list) else [row]
        found: list[tuple[np.ndarray, np.ndarray, int]] = []
        for part in parts:
            if part is None or len(part.ids) < 2:
                found.append((*nothing, EMPTY if part is None else TOO_SHORT))
                continue
            for piece in _pieces(part.ids, part.mask, max_length, split):
                found.append((*piece, KEPT) if piece[1].any() else (*nothing, WITHOUT_LOSS))
        there = [part for part in parts if part is not None]
        for piece_ids, mask, outcome in found:
            ids.append(piece_ids)
            masks.append(mask)
            outcomes.append(outcome)
        if found:
            said.append(
                (
                    any(len(part.ids) > max_length for part in there),
                    has_special,
                    sum(part.without_end for part in there),
                    sum(part.open_thoughts for part in there),
                    any(part.unfinished for part in there),
                    True,
                )
            )
            said += [(False, False, 0, 0, False, False)] * (len(found) - 1)
    arrays = [_lists(ids, np.int32), _lists(masks, bool), pa.array(outcomes, pa.int8())]
    for number, kind in enumerate((pa.bool_(), pa.bool_(), pa.int32(), pa.int32(), pa.bool_(), pa.bool_())):
        arrays.append(pa.array([each[number] for each in said], kind))
    return pa.Table.from_arrays(arrays, schema=record_schema())


def record_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("loss_mask", pa.list_(pa.bool_())),
            ("outcome", pa.int8()),
            ("overlong", pa.bool_()),
            ("special", pa.bool_()),
            ("turns_without_end", pa.int32()),
            ("open_thoughts", pa.int32()),
            ("unfinished", pa.bool_()),
            ("begins", pa.bool_()),
        ]
    )


def _pieces(ids: np.ndarray, mask: np.ndarray, longest: int, split: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The row cut to `longest`, or split so that every scored position falls into exactly one piece.

    Each piece after the first starts with the last token of the one before: its first scored position is the
    next one, and no piece is shorter than two tokens.
    """
    if len(ids) <= longest or not split:
        yield ids[:longest], mask[: longest - 1]
        return
    for start in range(0, len(ids) - 1, longest - 1):
        yield ids[start : start + longest], mask[start : start + longest - 1]


def _lists(arrays: list[np.ndarray], dtype: type) -> pa.Array:
    import pyarrow as pa

    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    values = np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(dtype, copy=False)))
