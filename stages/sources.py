"""Where the rows of a corpus come from: local files, a folder of them, or a data set that `datasets` knows.

Rows never have to fit into memory. Local files are streamed once into an Arrow file in a private scratch
folder, which is memory-mapped and goes away with the `Rows` object. So nothing is written beside the source,
nothing can be served stale from an earlier run, and a read-only Hugging Face cache does no harm.
A row of a JSON or text file is kept as its JSON text in one column (`JSON_COLUMN`) and parsed where it is
used: columns that differ from row to row, or hold mixed types, then cost nothing and are never coerced.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.hub import offline_reason
from storage.errors import RunError, UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

ENDINGS = (".jsonl", ".jsonl.zst", ".json", ".parquet", ".txt")
JSON_COLUMN = "json"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^/\\]+)?")
_IGNORED_IN_FOLDERS = re.compile(r"[._].*|readme.*|licen[cs]e.*|.*\.md", re.IGNORECASE)
_CHUNK_BYTES = 1 << 18
_FLUSH_ROWS = 1000
_FLUSH_BYTES = 8 << 20


@dataclass(frozen=True)
class Origin:
    """Says for a row number (from 0) which file it came from; small enough to be sent to worker processes."""

    source: str
    paths: tuple[str, ...] = ()
    first_rows: tuple[int, ...] = ()

    def where(self, row: int) -> str:
        """`row 3 of data.jsonl`, counted from 1 within its file (blank lines do not count)."""
        if not self.paths:
            return f"row {row + 1} of {self.source}"
        at = bisect.bisect_right(self.first_rows, row) - 1
        return f"row {row - self.first_rows[at] + 1} of {self.paths[at]}"


@dataclass
class Rows:
    """The rows of a source in order: `len(rows)`, `rows[i] -> dict`, and the Arrow data set below them."""

    dataset: Dataset
    column_names: tuple[str, ...]
    origin: Origin
    encoded: bool  # True: `dataset` has the one column JSON_COLUMN, the row's JSON text
    scratch: tempfile.TemporaryDirectory[str]
    columns_by_file: dict[str, frozenset[str]] = field(default_factory=dict)  # of JSON rows; first file per set

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        values = self.dataset[int(row)]
        return json.loads(values[JSON_COLUMN]) if self.encoded else values

    def require(self, columns: Iterable[str]) -> None:
        """Raise UserError naming the first file in which no row has one of `columns`."""
        for path, present in self.columns_by_file.items():
            for column in columns:
                if column not in present:
                    raise UserError(
                        f"{path} has no column '{column}', which other files of {self.origin.source} have "
                        f"(it has {', '.join(sorted(present)) or 'none'}); rename its column or move it away."
                    )

    def close(self) -> None:
        """Remove the scratch folder. Arrow data already mapped stays readable until it is let go."""
        self.scratch.cleanup()


def load_rows(source: str, *, split: str | None = None, limit: int | None = None) -> Rows:
    """The rows of `source` in a fixed order, at most `limit` of them; never all in memory.

    `source` is a file (`.jsonl`, `.jsonl.zst`; `.json` holding a list of objects, one object, or JSON lines;
    `.parquet`; `.txt`, which is one document, so one row with the column `text`), a folder of such files
    (recursive, sorted by path, mixed kinds allowed; hidden files, READMEs and licences are passed over), a
    folder written by `Dataset.save_to_disk`, or a name for `datasets.load_dataset`: `name` or `name:config`.
    `split` defaults to `train`, which is the only split of local files. A `.json` list is read as a whole.
    Raises UserError (missing, empty, broken or unsupported, naming file and line), RunError (disk full).
    """
    if limit is not None and limit < 1:
        raise UserError(f"The row limit is {limit}; give at least 1, or leave it out to use every row.")
    path = Path(source).expanduser()
    scratch = scratch_folder()
    with full_disk_as_run_error(scratch.name):
        if not path.exists():
            rows = _hub_rows(source, split, scratch)
        elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            rows = _saved_rows(path, split, scratch)
        else:
            rows = _local_rows(path, split, limit, scratch)
    if limit is not None and len(rows) > limit:
        rows.dataset = rows.dataset.select(range(limit))
    if not len(rows):
        raise UserError(f"The data set {source} has no rows; give one that has.")
    return rows


def decode_columns(batch: dict[str, list[Any]], columns: Iterable[str], encoded: bool) -> list[list[Any]]:
    """The values of `columns` in a batch of `Rows.dataset`; a column that a JSON row lacks is None there."""
    if not encoded:
        return [list(batch[column]) for column in columns]
    rows = [json.loads(text) for text in batch[JSON_COLUMN]]
    return [[row.get(column) for row in rows] for column in columns]


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A private folder for Arrow files: in $TMPDIR if set, else the Hugging Face cache, else the system's."""
    from datasets import config

    candidates = [tempfile.gettempdir()] if os.environ.get("TMPDIR") else []
    for parent in (*candidates, str(config.HF_DATASETS_CACHE), tempfile.gettempdir()):
        with contextlib.suppress(OSError):
            os.makedirs(parent, exist_ok=True)
            return tempfile.TemporaryDirectory(dir=parent, prefix="corpus-", ignore_cleanup_errors=True)
    raise RunError("No folder for temporary files can be written; set TMPDIR to one that can.")


@contextlib.contextmanager
def full_disk_as_run_error(folder: str) -> Iterator[None]:
    """Turn the OSError of a full disk into a RunError that names the scratch folder."""
    try:
        yield
    except (OSError, ValueError) as error:
        # `datasets` closes its writer after a failed write, and the error of that hides the first one.
        disk = error if isinstance(error, OSError) else error.__context__
        if not isinstance(disk, OSError) or disk.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(
            f"The disk under {folder} is full while preparing the corpus; free some space or set TMPDIR to a "
            "folder on a larger disk."
        ) from error


# ---- data sets that `datasets` opens ----------------------------------------------------------------------


def _hub_rows(source: str, split: str | None, scratch: tempfile.TemporaryDirectory[str]) -> Rows:
    """Rows of `datasets.load_dataset(name, config)`. Raises UserError for whatever that raises."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    if not _HUB_NAME.fullmatch(source) or source.lower().endswith(ENDINGS):
        raise UserError(f"There is no file or folder {source}; check the path.")
    name, _, config = source.partition(":")
    offline = offline_reason()
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # its retries are not news: what failed is said below
    try:
        with quiet_unless_terminal():
            dataset = datasets.load_dataset(
                name, config or None, split=split or "train", cache_dir=_hub_cache(scratch.name)
            )
    except (FileNotFoundError, ConnectionError) as error:
        raise UserError(
            f"{source} is no file or folder here, and no data set of that name could be fetched from the "
            f"Hugging Face Hub ({offline or _first_line(error)}); check the path or name, and the network."
        ) from error
    except PermissionError as error:
        raise UserError(
            f"The Hugging Face cache cannot be written ({error}); set HF_HOME to a folder that can."
        ) from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(_explain(source, split or "train", error)) from error
    finally:
        hub_logging.set_verbosity(verbosity)
    return Rows(dataset, tuple(dataset.column_names), Origin(source), False, scratch)


def _hub_cache(scratch: str) -> str | None:
    """None (the usual cache) when it can be written, else a folder in the scratch folder."""
    from datasets import config

    try:
        os.makedirs(config.HF_DATASETS_CACHE, exist_ok=True)
        writable = os.access(config.HF_DATASETS_CACHE, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    return None if writable else os.path.join(scratch, "hub")


def _explain(source: str, split: str, error: Exception) -> str:
    """One sentence for an error of `load_dataset`: the split or config to choose, or what it said."""
    text = " ".join(str(error).split())
    names = re.search(r"(?:Should be one of|Available splits:|available configs:|Available:)\s*\[([^\]]*)\]", text)
    listed = names[1].replace("'", "") if names else ""
    if names and "split" in text:
        return f"The data set {source} has no split '{split}'; choose one of: {listed}."
    if names:
        return f"The data set {source} needs one of its configs, as NAME:CONFIG; choose one of: {listed}."
    return f"The data set {source} cannot be loaded: {_first_line(error)}."


def _saved_rows(path: Path, split: str | None, scratch: tempfile.TemporaryDirectory[str]) -> Rows:
    """Rows of a folder that `save_to_disk` wrote, of a single data set or of a dict of splits."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path} is a saved data set that cannot be opened: {_first_line(error)}.") from error
    if isinstance(dataset, datasets.DatasetDict):
        if (split or "train") not in dataset:
            raise UserError(f"{path} has no split '{split or 'train'}'; choose one of: {', '.join(dataset)}.")
        dataset = dataset[split or "train"]
    elif split not in (None, "train", str(dataset.split)):
        raise UserError(f"{path} has no split '{split}'; choose one of: {dataset.split or 'train'}.")
    return Rows(dataset, tuple(dataset.column_names), Origin(str(path)), False, scratch)


# ---- local files ------------------------------------------------------------------------------------------


def _local_rows(path: Path, split: str | None, limit: int | None, scratch: tempfile.TemporaryDirectory[str]) -> Rows:
    """Stream one file or a folder of files into one Arrow file, and map it."""
    from datasets import Dataset

    files = _files_of(path)
    if split not in (None, "train"):
        raise UserError(f"{path} has no split '{split}'; choose one of: train (the only split of local files).")
    target = os.path.join(scratch.name, "rows.arrow")
    native = all(_ending(file) == ".parquet" for file in files)
    with _reading_bar(files) as advance:
        if native:
            names, firsts = _write_parquet(files, target, limit, advance)
            columns_by_file: dict[str, frozenset[str]] = {}
        else:
            names, firsts, columns_by_file = _write_json(files, target, limit, advance)
    dataset = Dataset.from_file(target)
    origin = Origin(str(path), tuple(map(str, files[: len(firsts)])), tuple(firsts))
    return Rows(dataset, tuple(names), origin, not native, scratch, columns_by_file)


def _files_of(path: Path) -> list[Path]:
    """The file itself, or the folder's files sorted by path. Raises UserError (unsupported ending, none)."""
    known = ", ".join(ENDINGS)
    if path.is_file():
        if _ending(path) is None:
            raise UserError(f"{path} has an ending that is not supported; give a file that ends in one of: {known}.")
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and not _IGNORED_IN_FOLDERS.fullmatch(file.name)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    for file in found:
        if _ending(file) is None:
            raise UserError(
                f"{file} has an ending that is not supported; move it out of the folder, or convert it to "
                f"one of: {known}."
            )
    if not found:
        raise UserError(f"The folder {path} has no data files; it needs files that end in one of: {known}.")
    return found


def _ending(path: Path) -> str | None:
    """Which of ENDINGS the name has, or None."""
    return next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)


def _write_json(
    files: list[Path], target: str, limit: int | None, advance: Callable[[int], Any]
) -> tuple[list[str], list[int], dict[str, frozenset[str]]]:
    """Write every row as JSON text.

    Returns the columns in order of appearance, each file's first row, and the columns of each file (one file
    for each set of columns).
    """
    import pyarrow as pa

    schema = pa.schema([(JSON_COLUMN, pa.large_string())])
    names: dict[str, None] = {}
    firsts: list[int] = []
    by_columns: dict[frozenset[str], str] = {}
    pending: list[str] = []
    count = held = 0
    with pa.OSFile(target, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

        def flush() -> None:
            writer.write_batch(pa.record_batch([pa.array(pending, pa.large_string())], schema=schema))
            pending.clear()

        for file in files:
            if count == limit:
                break
            firsts.append(count)
            present: dict[str, None] = {}
            for text, columns in _json_rows(file, advance):
                present.update(dict.fromkeys(columns))
                pending.append(text)
                count, held = count + 1, held + len(text)
                if len(pending) >= _FLUSH_ROWS or held >= _FLUSH_BYTES:
                    flush()
                    held = 0
                if count == limit:
                    break
            if count > firsts[-1]:
                by_columns.setdefault(frozenset(present), str(file))
                names.update(present)
        flush()
    return list(names), firsts, {path: columns for columns, path in by_columns.items()}


def _json_rows(path: Path, advance: Callable[[int], Any]) -> Iterator[tuple[str, Iterable[str]]]:
    """(JSON text, columns) of each row of a file of any kind. Raises UserError naming the line."""
    ending = _ending(path)
    if ending == ".parquet":
        yield from _parquet_rows(path, advance)
    elif ending == ".jsonl":
        yield from _json_lines(path, _lines(_chunks(path, advance)))
    elif ending == ".jsonl.zst":
        yield from _json_lines(path, _lines(_decompressed(path, _chunks(path, advance))))
    elif ending == ".txt":
        text = _decoded(b"".join(_chunks(path, advance)), f"{path}", first=True)
        yield json.dumps({"text": text}), ("text",)
    else:
        yield from _json_document(path, b"".join(_chunks(path, advance)))


def _json_document(path: Path, data: bytes) -> Iterator[tuple[str, Iterable[str]]]:
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
        yield json.dumps(row), row


def _json_lines(path: Path, lines: Iterator[bytes]) -> Iterator[tuple[str, Iterable[str]]]:
    """Rows of JSON lines, blank ones passed over. Raises UserError (broken, not an object, cut short)."""
    number = 0
    while True:
        try:
            line = next(lines, None)
        except EOFError as error:
            raise UserError(
                f"{path} breaks off after row {number}: {error}; copy or download the file again."
            ) from error
        if line is None:
            return
        number += 1
        where = f"{path}, line {number}"
        text = _decoded(line, where, first=number == 1).strip()
        if not text:
            continue
        row = _parsed(text, path, number)
        if not isinstance(row, dict):
            raise UserError(_not_an_object(where, row))
        yield text, row


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """The value of a line of JSON lines, or of a whole document, whose errors know their own line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place, reason = f"line {line or 1}", _first_line(error)
        if isinstance(error, json.JSONDecodeError):
            place, reason = f"line {line or error.lineno}, column {error.colno}", error.msg
        raise UserError(f"{path}, {place} is not valid JSON ({reason}); mend or remove it.") from error


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _not_an_object(where: str, row: Any) -> str:
    kind = {list: "a list", str: "text", type(None): "null", bool: "a boolean"}.get(type(row), "a number")
    return f'{where} is {kind}, not an object; write each row as an object such as {{"text": "..."}}.'


def _decoded(data: bytes, where: str, *, first: bool) -> str:
    """UTF-8 text, without a byte order mark when it is the first of its file."""
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        line = "" if b"\n" not in data else f", line {data.count(bytes([10]), 0, error.start) + 1}"
        raise UserError(f"{where}{line} is not UTF-8 text (byte {error.start}); convert the file to UTF-8.") from error


def _chunks(path: Path, advance: Callable[[int], Any]) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                advance(len(chunk))
                yield chunk
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _decompressed(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress Zstandard frames. Raises EOFError when they are broken or end early, which
    `zstandard`'s own stream reader would pass off as the end of the file."""
    import zstandard

    def new_frame() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    frame, started = new_frame(), False
    complete = 0
    for chunk in chunks:
        while chunk:
            started = True
            try:
                data = frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise EOFError(f"its compressed data is damaged ({error})") from error
            if data:
                yield data
            chunk = b""
            if frame.eof:
                chunk, frame, started = frame.unused_data, new_frame(), False
                complete += 1
    if started or not complete:
        raise EOFError("its compressed data is cut short")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Split at newlines, across chunks."""
    rest: list[bytes] = []
    for chunk in chunks:
        first, *more = chunk.split(b"\n")
        rest.append(first)
        if more:
            yield b"".join(rest)
            yield from more[:-1]
            rest = [more[-1]]
    if last := b"".join(rest):
        yield last


# ---- Parquet ----------------------------------------------------------------------------------------------


def _write_parquet(
    files: list[Path], target: str, limit: int | None, advance: Callable[[int], Any]
) -> tuple[list[str], list[int]]:
    """Copy Parquet row groups to Arrow under one schema. Returns its columns and each file's first row."""
    import pyarrow as pa

    schema = _common_schema(files)
    firsts: list[int] = []
    count = 0
    with pa.OSFile(target, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for file in files:
            if count == limit:
                break
            firsts.append(count)
            for table in _parquet_tables(file, advance):
                table = table if limit is None else table.slice(0, limit - count)
                try:
                    writer.write_table(table.select(schema.names).cast(schema))
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
                    raise UserError(
                        f"The columns of {file} do not fit those of {files[0]}: {_first_line(error)}."
                    ) from error
                count += len(table)
                if count == limit:
                    break
    return schema.names, firsts


def _common_schema(files: list[Path]) -> pa.Schema:
    """The schema all files can be cast to; dictionary columns become plain. Raises UserError if none is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = None
    for file in files:
        try:
            own = pq.read_schema(file).remove_metadata()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} is not a readable Parquet file: {_first_line(error)}.") from error
        own = pa.schema([(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in own])
        if schema is None:
            schema = own
        elif set(own.names) != set(schema.names):
            raise UserError(
                f"{file} has the columns {', '.join(own.names)} but {files[0]} has "
                f"{', '.join(schema.names)}; give files whose columns agree."
            )
        else:
            try:
                schema = pa.unify_schemas([schema, own], promote_options="permissive")
            except pa.ArrowException as error:
                raise UserError(
                    f"The columns of {file} do not fit those of {files[0]}: {_first_line(error)}."
                ) from error
    assert schema is not None
    return schema


def _parquet_tables(path: Path, advance: Callable[[int], Any]) -> Iterator[pa.Table]:
    """Tables of at most `_FLUSH_ROWS` rows. Raises UserError for a damaged file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_FLUSH_ROWS):
                advance(int(share * batch.num_rows))
                yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {_first_line(error)}.") from error


def _parquet_rows(path: Path, advance: Callable[[int], Any]) -> Iterator[tuple[str, Iterable[str]]]:
    """Parquet rows as JSON text, for a folder of mixed kinds; what JSON has no word for becomes an object."""
    for table in _parquet_tables(path, advance):
        for row in table.to_pylist():
            yield json.dumps(row, default=lambda value: {"unsupported": type(value).__name__}), row


# ---- the terminal -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """Switch the progress bars of `datasets` off while stderr is no terminal."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    switch = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if switch:
        disable_progress_bars()
    try:
        yield
    finally:
        if switch:
            enable_progress_bars()


@contextlib.contextmanager
def _reading_bar(files: list[Path]) -> Iterator[Callable[[int], Any]]:
    """A bar over the bytes of `files`, on a terminal and only if reading takes more than a second."""
    from tqdm import tqdm

    total = sum(file.stat().st_size for file in files)
    disable = not sys.stderr.isatty()
    with tqdm(total=total, desc="Reading", unit="B", unit_scale=True, delay=1, disable=disable) as bar:
        yield bar.update


def _first_line(error: Exception) -> str:
    """The first line of an error's text, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".")
