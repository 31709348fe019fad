"""The contents of a shard in memory: flat numpy arrays and offsets, no Python object per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from storage import quantization, schema
from storage.errors import CacheError


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths as one array: row i is `values[offsets[i]:offsets[i+1]]`."""

    values: np.ndarray  # [sum of lengths]
    offsets: np.ndarray  # int64 [rows + 1], offsets[0] == 0

    @classmethod
    def from_lists(cls, lists: Sequence[np.ndarray], dtype: np.dtype | type) -> Ragged:
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(item) for item in lists], out=offsets[1:])
        values = np.empty(offsets[-1], dtype)
        if lists:
            np.concatenate(lists, out=values, casting="unsafe")
        return cls(values, offsets)

    @classmethod
    def concatenated(cls, parts: Sequence[Ragged]) -> Ragged:
        starts = np.cumsum([0, *(part.offsets[-1] for part in parts)])
        offsets = [part.offsets[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(np.concatenate([part.values for part in parts]), np.concatenate([[0], *offsets]))

    def take(self, rows: np.ndarray) -> Ragged:
        """Some of the rows, by index."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # Where each value lies: from its row's start, as far as it is from its row's start here.
        at = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(self.values[at], offsets)

    def part(self, start: int, stop: int) -> Ragged:
        """Rows `start` to `stop`, their values a view."""
        first, end = self.offsets[start], self.offsets[stop]
        return Ragged(self.values[first:end], self.offsets[start : stop + 1] - first)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Rows:
    """The sequences of one shard.

    `sequence_id`: int64 `[S]`; `lists`: one Ragged of S rows per list column, keyed by its name in the schema.
    `source_row`: int64 `[S]`, the row of the data that each was made from; None where it was not kept or read.
    """

    sequence_id: np.ndarray
    lists: Mapping[str, Ragged]
    source_row: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sequence_id)

    def __getitem__(self, name: str) -> Ragged:
        return self.lists[name]

    @property
    def tokens(self) -> int:
        return len(self.lists["input_ids"].values)

    def take(self, rows: np.ndarray) -> Rows:
        """These rows (int `[K]`), in this order, as arrays of their own."""
        lists = {name: ragged.take(rows) for name, ragged in self.lists.items()}
        return Rows(self.sequence_id[rows], lists, None if self.source_row is None else self.source_row[rows])

    def part(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`, as views."""
        lists = {name: ragged.part(start, stop) for name, ragged in self.lists.items()}
        source_row = None if self.source_row is None else self.source_row[start:stop]
        return Rows(self.sequence_id[start:stop], lists, source_row)

    @classmethod
    def concatenated(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of all `parts` (one at least, of the same columns), one after the other."""
        lists = {name: Ragged.concatenated([part[name] for part in parts]) for name in parts[0].lists}
        source_rows = [part.source_row for part in parts if part.source_row is not None]
        source_row = np.concatenate(source_rows) if len(source_rows) == len(parts) else None
        return cls(np.concatenate([part.sequence_id for part in parts]), lists, source_row)

    def to_table(self, columns: Sequence[schema.Column], metadata: Mapping[bytes, bytes]) -> pa.Table:
        """An Arrow table with exactly `columns`; values are cast to the columns' types, or made codes."""
        arrays: list[pa.Array] = []
        for column in columns:
            if not column.is_list:
                values = self.source_row if column == schema.SOURCE_ROW else self.sequence_id
                if values is None:
                    raise ValueError(f"these rows have no {column.name}")
                arrays.append(pa.array(values, column.element))
                continue
            ragged = self.lists[column.name]
            stored = quantization.encode(ragged.values) if column.is_quantized else ragged.values
            values = pa.array(stored.astype(column.element.to_pandas_dtype(), copy=False), column.element)
            if ragged.offsets[-1] > np.iinfo(np.int32).max:
                raise CacheError(f"column {column.name} of one shard has over 2^31 values; use smaller shards")
            arrays.append(pa.ListArray.from_arrays(pa.array(ragged.offsets.astype(np.int32)), values, type=column.type))
        table_schema = pa.schema([column.field for column in columns], metadata=dict(metadata))
        return pa.Table.from_arrays(arrays, schema=table_schema)

    @classmethod
    def from_table(cls, table: pa.Table) -> Rows:
        """Views (copies only where Arrow holds bits, codes or several chunks) of a table's columns."""
        lists: dict[str, Ragged] = {}
        sequence_id, source_row = np.arange(len(table), dtype=np.int64), None
        for name in table.column_names:
            array = table.column(name).combine_chunks()
            if isinstance(array, pa.ChunkedArray):
                array = array.chunk(0)
            if array.null_count:
                raise CacheError(f"column {name} has {array.null_count} nulls")
            if not pa.types.is_list(array.type) and not pa.types.is_large_list(array.type):
                if name == schema.SOURCE_ROW.name:
                    source_row = array.to_numpy(zero_copy_only=False)
                else:
                    sequence_id = array.to_numpy(zero_copy_only=False)
                continue
            offsets = array.offsets.to_numpy().astype(np.int64)
            values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
            if values.null_count:
                raise CacheError(f"column {name} has nulls inside its lists")
            numbers = values.to_numpy(zero_copy_only=False)
            if schema.quantized(name, array.type.value_type):
                numbers = quantization.decode(numbers, float(table.schema.metadata[schema.META_STEP]))
            lists[name] = Ragged(numbers, offsets - offsets[0])
        return cls(sequence_id, lists, source_row)
