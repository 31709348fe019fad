"""Parquet files into rows. Only the columns that are asked for are read, so the others may be of any type.

Columns of text, and of flat lists of numbers, are copied to Arrow. Nested ones become JSON text, in which an object has
only the keys that it was given: an Arrow type gives each the keys of all.
"""

from __future__ import annotations

import datetime
import decimal
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.limited import LimitError, Send, items
from stages.rows import JSON_COLUMN, first_line
from storage.errors import UserError
from storage.limits import CORPUS_MEMORY, ROW_BYTES

if TYPE_CHECKING:
    import pyarrow as pa

UNSUPPORTED = "unsupported"  # the key under which a value that JSON has no word for names its type
_BATCH_ROWS = 1000
# Bytes of columns that are read in this process, whatever their file says of them.
_SMALL = 256 << 20


def read_schema(path: Path) -> tuple[pa.Schema, int]:
    """The schema of a file and how many rows it has. Raises UserError for one that is no Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # An open file, because Arrow takes no names that are not UTF-8.
        with path.open("rb") as source, pq.ParquetFile(source) as file:
            return file.schema_arrow, file.metadata.num_rows
    except MemoryError:
        # Arrow's own is an ArrowException besides; whoever set the limit says so.
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {_reason(error)}.") from error


def parquet_rows(path: Path, advance: Callable[[int], Any]) -> Iterator[tuple[str, Sequence[str]]]:
    """All columns of a file as JSON text, for a folder of mixed kinds; the first of two of one name."""

    def read(send: Send) -> None:
        schema, _ = read_schema(path)
        names = list(schema.names)
        for batch in _batches(path, None, send):
            columns = {name: plain_values(batch.column(names.index(name))) for name in names}
            rows = [
                json.dumps({name: values[row] for name, values in columns.items()}) for row in range(batch.num_rows)
            ]
            _check_lengths(path, max(map(len, rows), default=0))
            send((rows, names))

    for said in _guarded([path], read):
        if isinstance(said, int):
            advance(said)
        else:
            rows, names = said
            yield from ((row, names) for row in rows)


def write_columns(
    files: Sequence[Path], columns: Sequence[str], target: str, limit: int, advance: Callable[[int], Any]
) -> bool:
    """Write the first `limit` rows of the files to an Arrow file; True where they are JSON text in JSON_COLUMN.

    A column that a file lacks is null there. Raises UserError for a damaged file.
    """
    for said in _guarded(files, lambda send: _write(files, columns, target, limit, send)):
        if isinstance(said, bool):
            return said
        advance(said)
    raise AssertionError("unreachable: the writer ends with a truth value")


def _write(files: Sequence[Path], columns: Sequence[str], target: str, limit: int, send: Send) -> None:
    """Write what `write_columns` returns; sends the bytes read, then whether the rows are JSON text."""
    import pyarrow as pa

    schemas = [read_schema(file)[0] for file in files]
    schema = _flat_schema(schemas, columns)
    written = schema or pa.schema([(JSON_COLUMN, pa.large_string())])
    with pa.OSFile(target, "wb") as sink, pa.ipc.new_stream(sink, written) as writer:
        for file, own in zip(files, schemas, strict=True):
            for batch in _batches(file, [name for name in columns if name in own.names], send):
                batch = batch.slice(0, limit)
                limit -= batch.num_rows
                there = {name: _checked(file, name, batch.column(name)) for name in batch.schema.names}
                if schema is None:
                    arrays = [pa.array(_as_json(there, columns, batch.num_rows), pa.large_string())]
                else:
                    arrays = [
                        there[field.name].cast(field.type) if field.name in there else pa.nulls(len(batch), field.type)
                        for field in schema
                    ]
                _check_lengths(file, *map(_longest, arrays))
                writer.write_batch(pa.record_batch(arrays, schema=written))
                if not limit:
                    break
            if not limit:
                break
    send(schema is None)


def _longest(array: pa.Array) -> int:
    """The bytes of the longest value of an array of texts, or of lists of numbers."""
    import pyarrow.compute as pc
    import pyarrow.types as types

    if types.is_large_string(array.type):
        return pc.max(pc.binary_length(array)).as_py() or 0
    if types.is_large_list(array.type):
        return 8 * (pc.max(pc.list_value_length(array)).as_py() or 0)
    return 0


def _check_lengths(path: Path, *lengths: int) -> None:
    """Raise UserError where a value has more bytes than a row may have."""
    if max(lengths, default=0) > ROW_BYTES.value:
        raise UserError(
            f"{path} has a row that is longer than {ROW_BYTES.value:,} bytes, the most that a row may have; split it, "
            f"or set {ROW_BYTES.variable}."
        )


def _guarded(files: Sequence[Path], read: Callable[[Send], None]) -> Iterator[Any]:
    """Yield what `read` sends; in a process with limits where one of the files may unpack into more than _SMALL bytes.

    Raises the UserError that `read` raises, and one that names the files where the limits end it.
    """
    if sum(map(_most_unpacked, files)) <= _SMALL:
        found: list[Any] = []
        read(found.append)
        yield from found
        return
    try:
        yield from items(read, memory=CORPUS_MEMORY.value)
    except LimitError as error:
        names = f"{files[0]}" if len(files) == 1 else f"{files[0]} and {len(files) - 1} beside it"
        raise UserError(f"{names}: to read it {error}; write smaller rows, or {CORPUS_MEMORY.advice}.") from None


def _most_unpacked(path: Path) -> int:
    """Bytes that a file takes at most in memory; more than _SMALL where its pages do not tell."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from storage.pages import most_unpacked

    if path.stat().st_size > _SMALL:
        return _SMALL + 1
    try:
        with path.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return most_unpacked(memoryview(mapped[:]), pq.read_metadata(path))
    except (pa.ArrowException, OSError, ValueError):
        return _SMALL + 1


def _as_json(there: dict[str, pa.Array], columns: Sequence[str], rows: int) -> list[str]:
    values = {name: plain_values(there[name]) if name in there else [None] * rows for name in columns}
    return [json.dumps({name: column[row] for name, column in values.items()}) for row in range(rows)]


def _flat_schema(schemas: Sequence[pa.Schema], columns: Sequence[str]) -> pa.Schema | None:
    """The types of `columns` that hold the files' own; None where one is nested, or no type holds all exactly."""
    import pyarrow as pa

    fields = []
    for name in columns:
        try:
            found = [pa.schema([(name, _flat(schema.field(name).type))]) for schema in schemas if name in schema.names]
            numbers = [_value_type(one.field(name).type) or one.field(name).type for one in found]
            if any(map(pa.types.is_integer, numbers)) and any(map(pa.types.is_floating, numbers)):
                return None  # as floats, the whole numbers of one file would look like those of the other
            fields.append(pa.unify_schemas(found, promote_options="permissive").field(name))
        except (pa.ArrowException, ValueError):
            return None
    return pa.schema(fields)


def _flat(kind: pa.DataType) -> pa.DataType:
    """The plain type of text, of a number, of a boolean, or of a list of those. Raises ValueError for another."""
    import pyarrow as pa
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _flat(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.large_string()
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind):
        return kind
    # Arrow does not cast every kind of list view.
    inner = None if types.is_list_view(kind) or types.is_large_list_view(kind) else _value_type(kind)
    if inner is not None and (types.is_integer(inner) or types.is_floating(inner) or types.is_boolean(inner)):
        return pa.large_list(inner)
    raise ValueError(f"{kind} is nested")


def _value_type(kind: pa.DataType) -> pa.DataType | None:
    """The type of what a list of any kind holds; None for what is no list."""
    import pyarrow.types as types

    is_list = (
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )
    return kind.value_type if is_list else None


def _checked(path: Path, name: str, array: pa.Array) -> pa.Array:
    """Raise UserError where the column is damaged, such as text that is not UTF-8."""
    import pyarrow as pa

    try:
        array.validate(full=True)
    except pa.ArrowException as error:
        raise UserError(f"Column '{name}' of {path} is damaged: {first_line(error)}; write the file again.") from error
    return array


def _batches(path: Path, columns: list[str] | None, advance: Callable[[int], Any]) -> Iterator[pa.RecordBatch]:
    """Batches of at most `_BATCH_ROWS` rows; None for all columns. Raises UserError for a damaged file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as source, pq.ParquetFile(source) as file:
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                advance(int(share * batch.num_rows))
                # A name with a dot in it selects nested columns, too.
                yield batch if columns is None else batch.select(columns)
    except MemoryError:
        # Arrow's own is an ArrowException besides; whoever set the limit says so.
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


# ---- Arrow values as JSON has them ------------------------------------------------------------------------


def plain_values(array: pa.Array) -> list[Any]:
    """The values of an Arrow array as JSON has them; one that it has no word for becomes an object that says so."""
    import pyarrow as pa

    try:
        values = array.to_pylist()
    except (pa.ArrowException, ValueError, TypeError, NotImplementedError, OverflowError):
        return [{UNSUPPORTED: f"damaged {array.type}"}] * len(array)
    return [_plain(value, array.type) for value in values]


def _plain(value: Any, kind: pa.DataType) -> Any:
    import pyarrow as pa
    import pyarrow.types as types

    if value is None:
        return None
    if types.is_dictionary(kind):
        return _plain(value, kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _json(value) if kind.extension_name == "arrow.json" else _plain(value, kind.storage_type)
    if types.is_struct(kind):
        return {field.name: _plain(value[field.name], field.type) for field in kind if value[field.name] is not None}
    if types.is_map(kind):
        return {str(key): _plain(inner, kind.item_type) for key, inner in value}
    inner_type = _value_type(kind)
    if inner_type is not None:
        return [_plain(inner, inner_type) for inner in value]
    if isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal) else {UNSUPPORTED: type(value).__name__}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
