"""Files of text into rows as JSON text: JSON lines, JSON, CSV, TSV and plain text, compressed or not.

A row is kept as its JSON text and parsed where it is used: columns that differ from row to row, or hold mixed types,
then cost nothing and are never coerced.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.messages import kind_of
from stages.rows import first_line
from storage.errors import UserError
from storage.limits import ROW_BYTES
from storage.words import counted

# JSON text and the row's columns; a list of columns is that of the whole file, and may name one twice.
Row = tuple[str, Sequence[str]]
Advance = Callable[[int], Any]

_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_COMPRESSED = ("", ".gz", ".zst")
TEXT_ENDINGS = tuple(kind + packed for kind in _KINDS for packed in _COMPRESSED)
_CHUNK_BYTES = 1 << 18
# Compressed bytes that are unpacked at a time; zstd and gzip make at most some 100 MiB of so many.
_PACKED_BYTES = 4096
# A JSON document is read whole; it may be as long as so many of the longest rows.
_ROWS_OF_A_DOCUMENT = 16


def text_rows(path: Path, ending: str, advance: Advance) -> Iterator[Row]:
    """The rows of a file that ends in one of TEXT_ENDINGS, in order. Raises UserError naming the line."""
    chunks = _chunks(path, advance)
    kind = ending.removesuffix(".gz").removesuffix(".zst")
    if kind != ending:
        chunks = _unpacked(chunks, _gzip_frame if ending.endswith(".gz") else _zstandard_frame)
    if kind in (".jsonl", ".ndjson"):
        yield from _json_lines(path, _lines(chunks))
    elif kind in (".csv", ".tsv"):
        yield from _table(path, _lines(chunks), "\t" if kind == ".tsv" else ",")
    elif kind == ".txt":
        yield json.dumps({"text": _decoded(_all(path, chunks, ROW_BYTES.value), f"{path}", first=True)}), ("text",)
    else:
        yield from _json_document(path, _all(path, chunks, _ROWS_OF_A_DOCUMENT * ROW_BYTES.value))


# ---- kinds of text ----------------------------------------------------------------------------------------


def _json_document(path: Path, data: bytes) -> Iterator[Row]:
    """Rows of a `.json` file: a list of objects, JSON lines, or one object."""
    text = _decoded(data, f"{path}", first=True)
    lines = text.strip().split("\n")
    as_lines = not text.lstrip().startswith("[") and (len(lines) == 1 or _parses(lines[0]))
    if as_lines:
        yield from _json_lines(path, iter(data.split(b"\n")))
        return
    document = _parsed(text, path)
    for number, row in enumerate(document if isinstance(document, list) else [document], 1):
        if not isinstance(row, dict):
            raise UserError(_not_an_object(f"row {number} of {path}", row))
        yield json.dumps(row), tuple(row)


def _json_lines(path: Path, lines: Iterator[bytes]) -> Iterator[Row]:
    """Rows of JSON lines, blank ones passed over. Raises UserError (broken, not an object, cut short)."""
    rows = [0]
    for number, text in _numbered(path, lines, rows):
        if not text.strip():
            continue
        row = _parsed(text.strip(), path, number)
        if not isinstance(row, dict):
            raise UserError(_not_an_object(f"{path}, line {number}", row))
        rows[0] += 1
        yield text.strip(), tuple(row)


def _table(path: Path, lines: Iterator[bytes], delimiter: str) -> Iterator[Row]:
    """Rows of a table whose first line names the columns. Every value is text, as it stands there.

    Raises UserError (a row with too few or too many values, a quote that does not end, no columns).
    """
    csv.field_size_limit(min(sys.maxsize, (1 << 31) - 1))
    rows = [0]
    texts = (text + "\n" for _, text in _numbered(path, lines, rows))
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    try:
        names = next(reader, None)
        while names == []:
            names = next(reader, None)
        for values in reader:
            if not values:
                continue
            assert names is not None
            if len(values) != len(names):
                raise UserError(
                    f"{path}, line {reader.line_num} has {counted(len(values), 'value')} where the first line names "
                    f"{len(names)}; mend the row, or put quotes around values that hold the separator."
                )
            rows[0] += 1
            # The first of two columns of one name; whoever asks for it is refused.
            yield json.dumps(dict(zip(reversed(names), reversed(values), strict=True))), names
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not a valid row ({first_line(error)}); mend it.") from error


class _TooLongError(Exception):
    """A line has more bytes than a row may have."""


def _numbered(path: Path, lines: Iterator[bytes], rows: list[int]) -> Iterator[tuple[int, str]]:
    """The lines as text, without line ends, counted from 1. `rows`: holds how many rows were read, for the error of a
    file that breaks off.
    """
    number = 0
    while True:
        try:
            line = next(lines, None)
        except EOFError as error:
            raise UserError(
                f"{path} breaks off after row {rows[0]}: {error}; copy or download the file again."
            ) from error
        except _TooLongError:
            raise UserError(
                f"{path}, line {number + 1} is longer than {ROW_BYTES.value:,} bytes, the most that a row may have; "
                f"split it, or set {ROW_BYTES.variable}."
            ) from None
        if line is None:
            return
        number += 1
        yield number, _decoded(line, f"{path}, line {number}", first=number == 1)


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """The value of a line of JSON lines, or of a whole document, whose errors know their own line."""
    try:
        return _DECODER.decode(text)
    except _KeyTwiceError as error:
        where = f"{path}, line {line}" if line else f"{path}"
        raise UserError(
            f"{where} has an object that gives the key {json.dumps(error.key, ensure_ascii=False)[:100]} twice, of "
            "which one would be lost; mend or remove it."
        ) from error
    except (ValueError, RecursionError) as error:
        place, reason = f"line {line or 1}", first_line(error)
        if isinstance(error, json.JSONDecodeError):
            place, reason = f"line {line or error.lineno}, column {error.colno}", error.msg
        elif "digits" in reason:
            reason = "it has a number of more digits than a program reads"
        raise UserError(f"{path}, {place} is not valid JSON ({reason}); mend or remove it.") from error


class _KeyTwiceError(Exception):
    """An object gives a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of its keys and values. Raises _KeyTwiceError."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _KeyTwiceError(next(key for key in keys if keys.count(key) > 1))
    return made


# One for all rows: to make one costs more than to parse a short row.
_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _not_an_object(where: str, row: Any) -> str:
    return f'{where} is {kind_of(row)}, not an object; write each row as an object such as {{"text": "..."}}.'


def _decoded(data: bytes, where: str, *, first: bool) -> str:
    """UTF-8 text, without a byte order mark when it is the first of its file."""
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        line = "" if b"\n" not in data else f", line {data.count(bytes([10]), 0, error.start) + 1}"
        is_utf16 = first and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        what = "is UTF-16 or UTF-32 text" if is_utf16 else f"is not UTF-8 text (byte {error.start})"
        raise UserError(f"{where}{line} {what}; convert the file to UTF-8.") from error


# ---- bytes ------------------------------------------------------------------------------------------------


def _chunks(path: Path, advance: Advance) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                advance(len(chunk))
                yield chunk
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _all(path: Path, chunks: Iterator[bytes], most: int) -> bytes:
    """All of a file, unpacked. Raises UserError for one that breaks off, or has more than `most` bytes."""
    found: list[bytes] = []
    held = 0
    try:
        for chunk in chunks:
            found.append(chunk)
            held += len(chunk)
            if held > most:
                raise UserError(
                    f"{path} is longer than {most:,} bytes, the most that is read at once; write it as JSON lines, or "
                    f"set {ROW_BYTES.variable}."
                )
    except EOFError as error:
        raise UserError(f"{path} breaks off: {error}; copy or download the file again.") from error
    return b"".join(found)


def _zstandard_frame() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _gzip_frame() -> Any:
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)


def _unpacked(chunks: Iterator[bytes], new_frame: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress frames one after another. Raises EOFError when they are broken or end early, which the stream readers
    of the libraries would pass off as the end of the file in places.
    """
    import zstandard

    frame, started = new_frame(), False
    complete = 0
    for chunk in chunks:
        while chunk:
            # Some writers fill the end of a file with zeros.
            if not started and complete and not chunk.strip(b"\0"):
                break
            started = True
            unused = b""
            # A little at a time: a few kilobytes may stand for gigabytes.
            for start in range(0, len(chunk), _PACKED_BYTES):
                try:
                    data = frame.decompress(chunk[start : start + _PACKED_BYTES])
                except (zstandard.ZstdError, zlib.error) as error:
                    raise EOFError(f"its compressed data is damaged ({first_line(error)})") from error
                if data:
                    yield data
                if frame.eof:
                    unused = frame.unused_data + chunk[start + _PACKED_BYTES :]
                    frame, started = new_frame(), False
                    complete += 1
                    break
            chunk = unused
    if started or not complete:
        raise EOFError("its compressed data is cut short")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Split at newlines, across chunks. Raises _TooLongError before more than a row's bytes are held."""
    rest: list[bytes] = []
    most, held = ROW_BYTES.value, 0
    for chunk in chunks:
        first, *more = chunk.split(b"\n")
        rest.append(first)
        held = len(more[-1]) if more else held + len(first)
        if max(held, *map(len, more), sum(map(len, rest)) if more else 0) > most:
            raise _TooLongError
        if more:
            yield b"".join(rest)
            yield from more[:-1]
            rest = [more[-1]]
    if last := b"".join(rest):
        yield last
