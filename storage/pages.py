"""The pages of a Parquet column, before Arrow reads them: do they hold what the footer says, and no more?

Arrow trusts a footer to say how many values the pages of a column hold. Where it says too few, Arrow unpacks all of
them all the same, or crashes the process. So the header of every page that will be read is parsed here first: pages
must fill their column exactly, hold as many values and bytes as the footer says, and be encoded as this project writes
them, in ways whose values take up bytes (a dictionary or a run may claim billions in a few).

Page headers are Thrift structs in the compact protocol: https://github.com/apache/parquet-format/blob/master/README.md,
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow.parquet as pq

_DATA_PAGE = 0
# Fields of PageHeader and of its DataPageHeader.
_TYPE, _UNPACKED, _PACKED, _OF_DATA = 1, 2, 3, 5
_VALUES, _ENCODING = 1, 2
_PLAIN, _RLE, _BYTE_STREAM_SPLIT = 0, 3, 9
_MOST_DEPTH = 8
# Of other writers' files: kinds of pages, and bytes of the widest value that is no text, with its levels.
_DICTIONARY_PAGE, _OF_DATA_2 = 2, 8
_WIDEST = 24
# Bits that a value takes at least.
_BITS = {"BOOLEAN": 1, "INT32": 32, "INT64": 64, "FLOAT": 32, "DOUBLE": 64, "FIXED_LEN_BYTE_ARRAY": 16}


@dataclass(frozen=True)
class Extent:
    """Where the pages of one column of one row group lie, and what the footer says they hold."""

    start: int
    length: int
    values: int
    unpacked: int
    type: str

    @classmethod
    def of(cls, chunk: pq.ColumnChunkMetaData) -> Extent:
        return cls(
            chunk.data_page_offset,
            chunk.total_compressed_size,
            chunk.num_values,
            chunk.total_uncompressed_size,
            chunk.physical_type,
        )


def extents(metadata: pq.FileMetaData, columns: list[str]) -> Iterator[tuple[str, Extent]]:
    """Each column of `columns` with its place in each row group. Raises ValueError for a column with a dictionary."""
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            chunk = row_group.column(index)
            name = chunk.path_in_schema.partition(".")[0]
            if name in columns:
                if chunk.has_dictionary_page or chunk.physical_type not in _BITS:
                    raise ValueError(f"column {name} is encoded in a way that is not ours")
                extent = Extent.of(chunk)
                if min(extent.start, extent.length, extent.values, extent.unpacked) < 0:
                    raise ValueError(f"column {name} lies outside the file")
                yield name, extent


def check_pages(data: memoryview, extent: Extent) -> None:
    """data: the bytes of the extent. Raises ValueError where its pages are not what the footer says."""
    if len(data) != extent.length:
        raise ValueError("a column lies outside the file")
    at = values = unpacked = 0
    while at < len(data):
        header, begin = _Struct(data).read(at)
        of_data = header.get(_OF_DATA)
        if header.get(_TYPE) != _DATA_PAGE or not isinstance(of_data, dict):
            raise ValueError("a page is no plain data page")
        count, size, packed = _number(of_data, _VALUES), _number(header, _UNPACKED), _number(header, _PACKED)
        encoding = of_data.get(_ENCODING)
        bits = _BITS[extent.type]
        if encoding not in (_PLAIN, _BYTE_STREAM_SPLIT) and not (encoding == _RLE and bits == 1):
            raise ValueError("a page is encoded in a way that is not ours")
        values += count
        unpacked += size + begin - at
        at = begin + packed
    if at != len(data) or values != extent.values or unpacked != extent.unpacked:
        raise ValueError(f"a column's pages hold {values} values in {unpacked} bytes, not what the footer says")


def most_unpacked(data: memoryview, metadata: pq.FileMetaData) -> int:
    """Return bytes that the columns of any Parquet file take at most in memory, by the headers of its pages.

    data: the file. Each value of a page counts as the longest that it can be: one with a dictionary may repeat an entry
    as long as the whole dictionary, one of prefixes all that came before. Raises ValueError for damaged pages.
    """
    total = 0
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < start:
                start = chunk.dictionary_page_offset
            at, end = start, start + chunk.total_compressed_size
            if not 0 <= start <= end <= len(data):
                raise ValueError("a column lies outside the file")
            of_text = chunk.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
            longest = 0
            while at < end:
                header, begin = _Struct(data).read(at)
                size, packed = _number(header, _UNPACKED), _number(header, _PACKED)
                of_data = header.get(_OF_DATA) or header.get(_OF_DATA_2)
                if header.get(_TYPE) == _DICTIONARY_PAGE:
                    longest = size
                elif isinstance(of_data, dict):
                    # In the second kind of page the encoding is the fourth field.
                    encoding = of_data.get(_ENCODING if _OF_DATA in header else 4)
                    widest = _WIDEST
                    if of_text and encoding != _PLAIN:
                        widest += longest if encoding in (2, 8) else size
                    total += _number(of_data, _VALUES) * widest
                total += size
                at = begin + packed
    return total


def _number(struct: dict[int, object], field: int) -> int:
    value = struct.get(field)
    if not isinstance(value, int) or value < 0:
        raise ValueError("a page's header is damaged")
    return value


class _Struct:
    """A Thrift struct in the compact protocol, as a dict by field number; what is no number or struct is skipped."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def read(self, at: int, depth: int = 0) -> tuple[dict[int, object], int]:
        """The struct that starts at `at`, and where it ends. Raises ValueError."""
        try:
            return self._struct(at, depth)
        except IndexError:
            raise ValueError("a page's header is cut short") from None

    def _struct(self, at: int, depth: int) -> tuple[dict[int, object], int]:
        if depth > _MOST_DEPTH:
            raise ValueError("a page's header is nested too deep")
        found: dict[int, object] = {}
        field = 0
        while (byte := self._data[at]) != 0:
            at += 1
            if byte >> 4:
                field += byte >> 4
            else:
                field, at = self._zigzag(at)
            found[field], at = self._value(byte & 15, at, depth)
        return found, at + 1

    def _value(self, kind: int, at: int, depth: int) -> tuple[object, int]:
        if kind in (1, 2):  # true, false
            return kind == 1, at
        if kind == 3:  # a byte
            return None, at + 1
        if kind in (4, 5, 6):  # integers
            return self._zigzag(at)
        if kind == 7:  # a double
            return None, at + 8
        if kind == 8:  # bytes
            length, at = self._varint(at)
            return None, at + length
        if kind == 12:
            return self._struct(at, depth + 1)
        raise ValueError("a page's header holds what no page's header holds")

    def _varint(self, at: int) -> tuple[int, int]:
        number = shift = 0
        while True:
            byte = self._data[at]
            at += 1
            number |= (byte & 127) << shift
            if not byte & 128:
                return number, at
            shift += 7
            if shift > 63:
                raise ValueError("a page's header holds too long a number")

    def _zigzag(self, at: int) -> tuple[int, int]:
        number, at = self._varint(at)
        return (number >> 1) ^ -(number & 1), at
