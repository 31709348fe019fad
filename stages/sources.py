"""Where the rows of a corpus come from: local files, a folder of them, or a data set that `datasets` knows.

Rows never have to fit into memory. Local files are streamed once into an Arrow file in a private scratch
folder, which is memory-mapped and goes away with the `Rows` object. So nothing is written beside the source,
nothing can be served stale from an earlier run, and a read-only Hugging Face cache does no harm.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.counting import counting
from stages.hub import offline_reason
from stages.local_files import ENDINGS, LocalFiles, ending_of, find_files, refuse_outside
from stages.parquet_files import parquet_rows, read_schema, write_columns
from stages.rows import (
    JSON_COLUMN,
    Origin,
    Rows,
    decode_columns,
    first_line,
    full_disk_as_run_error,
    quiet_unless_terminal,
    scratch_folder,
)
from stages.text_files import text_rows
from storage.errors import UserError
from storage.json_text import parse_json
from storage.words import listed_briefly

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Rows", "decode_columns", "load_rows"]

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^/\\]+)?")
_FLUSH_ROWS = 1000
_FLUSH_BYTES = 8 << 20


def load_rows(source: str, *, split: str | None = None, limit: int | None = None) -> Rows:
    """The rows of `source` in a fixed order, at most `limit` of them; never all in memory.

    `source` is a file (`.jsonl`, `.ndjson`; `.json` holding a list of objects, one object, or JSON lines; `.csv` and
    `.tsv`, whose first line names the columns and whose values are text; `.txt`, which is one document, so one row with
    the column `text`; each also with `.gz` or `.zst`; `.parquet`), a folder of such files (recursive, sorted by path,
    mixed kinds allowed; see `find_files`), a folder written by `Dataset.save_to_disk`, or a name for
    `datasets.load_dataset`: `name` or `name:config`. `split` defaults to `train`. A `.json` list is read as a whole.
    Raises UserError (missing, empty, broken or unsupported, naming file and line), RunError (disk full).
    """
    if limit is not None and limit < 1:
        raise UserError(f"The row limit is {limit}; give at least 1, or leave it out to use every row.")
    if not source.strip():
        raise UserError("The name of the data set is empty; give a file, a folder or a name on the hub.")
    path = _expanded(source)
    scratch = scratch_folder()
    with full_disk_as_run_error(scratch.name):
        if not _exists(path, source):
            rows = _hub_rows(source, split, limit, scratch)
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            rows = _saved_rows(path, split, limit, scratch)
        else:
            rows = _local_rows(path, split, limit, scratch)
    if not len(rows):
        raise UserError(f"The data set {source} has no rows; give one that has.")
    return rows


def _expanded(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError:  # no such user
        return Path(source)


def _exists(path: Path, source: str) -> bool:
    """Raise UserError for a path that cannot be looked at, and a link that leads nowhere."""
    try:
        there = path.exists()
        linked = path.is_symlink() and not there
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise UserError(f"{source} cannot be read: {reason}.") from error
    if linked:
        raise UserError(f"{source} is a link to {os.readlink(path)}, which is not there; mend the link.")
    return there


def _whole(dataset: Dataset, source: str, limit: int | None, scratch: tempfile.TemporaryDirectory[str]) -> Rows:
    """Rows of a data set that `datasets` opened, whose columns can be taken one by one."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    dataset = dataset.select(range(count)) if count < len(dataset) else dataset

    def opened(columns: Sequence[str]) -> tuple[Dataset, bool]:
        return dataset.select_columns(list(columns)), False

    return Rows(Origin(source), tuple(dataset.column_names), scratch, count, opened)


# ---- data sets that `datasets` opens ----------------------------------------------------------------------


def _hub_rows(source: str, split: str | None, limit: int | None, scratch: tempfile.TemporaryDirectory[str]) -> Rows:
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
        with quiet_unless_terminal(), counting(f"loading {name}", None, "rows"):
            dataset = datasets.load_dataset(
                name, config or None, split=split or "train", cache_dir=_hub_cache(scratch.name)
            )
    except (FileNotFoundError, ConnectionError) as error:
        raise UserError(
            f"{source} is no file or folder here, and no data set of that name could be fetched from the "
            f"Hugging Face Hub ({offline or first_line(error)}); check the path or name, and the network."
        ) from error
    except PermissionError as error:
        raise UserError(
            f"The Hugging Face cache cannot be written ({error}); set HF_HOME to a folder that can."
        ) from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(_explain(source, split or "train", error)) from error
    finally:
        hub_logging.set_verbosity(verbosity)
    return _whole(dataset, source, limit, scratch)


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
    return f"The data set {source} cannot be loaded: {first_line(error)}."


def _saved_rows(path: Path, split: str | None, limit: int | None, scratch: tempfile.TemporaryDirectory[str]) -> Rows:
    """Rows of a folder that `save_to_disk` wrote, of a single data set or of a dict of splits."""
    import datasets

    _refuse_leading_out(path)
    try:
        dataset = datasets.load_from_disk(str(path))
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise UserError(f"{path} is a saved data set that cannot be opened: {first_line(error)}.") from error
    if isinstance(dataset, datasets.DatasetDict):
        if (split or "train") not in dataset:
            raise UserError(f"{path} has no split '{split or 'train'}'; choose one of: {listed_briefly(dataset)}.")
        dataset = dataset[split or "train"]
    elif split not in (None, "train", str(dataset.split)):
        raise UserError(f"{path} has no split '{split}'; choose one of: {dataset.split or 'train'}.")
    return _whole(dataset, str(path), limit, scratch)


def _refuse_leading_out(path: Path) -> None:
    """Raise UserError for a saved data set that names files outside its folder, or reaches them through links."""
    refuse_outside(path, (file for file in path.rglob("*") if file.is_symlink()))
    for file in [*path.glob("state.json"), *path.glob("*/state.json"), *path.glob("dataset_dict.json")]:
        try:
            said = parse_json(file.read_bytes())
            if file.name == "state.json":
                named = [each["filename"] for each in said["_data_files"]]
            else:
                named = list(said["splits"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # It is refused where it is opened.
        for name in named:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(
                    f"{file} names the file {str(name)[:100]!r}, which is not of its folder; mend or remove it."
                )


# ---- local files ------------------------------------------------------------------------------------------


def _local_rows(path: Path, split: str | None, limit: int | None, scratch: tempfile.TemporaryDirectory[str]) -> Rows:
    """Rows of one file or of a folder's split. Text is streamed into one Arrow file; Parquet waits for its columns."""
    found = find_files(path, split)
    if all(ending_of(file) == ".parquet" for file in found.files):
        return _parquet_columns(path, found, limit, scratch)
    target = os.path.join(scratch.name, "rows.arrow")
    with counting("reading", _bytes(found.files), "B") as advance:
        text = _TextWriter(limit)
        text.write(found.files, target, advance)
    data = _mapped(target)
    return Rows(
        Origin(str(path), tuple(map(str, found.files[: len(text.firsts)])), tuple(text.firsts)),
        tuple(text.names),
        scratch,
        text.count,
        lambda columns: (data, True),
        {file: columns for columns, file in text.by_columns.items()},
        text.doubled,
        found.notes,
    )


def _parquet_columns(
    path: Path, found: LocalFiles, limit: int | None, scratch: tempfile.TemporaryDirectory[str]
) -> Rows:
    names: dict[str, None] = {}
    doubled: dict[str, str] = {}
    by_columns: dict[frozenset[str], str] = {}
    files: list[Path] = []
    firsts: list[int] = []
    count = 0
    for file in found.files:
        schema, rows = read_schema(file)
        if limit is not None and count >= limit:
            continue
        files.append(file)
        firsts.append(count)
        count += rows
        if rows:
            names.update(dict.fromkeys(schema.names))
            by_columns.setdefault(frozenset(schema.names), str(file))
            doubled.update((name, str(file)) for name in _doubled(schema.names))
    count = count if limit is None else min(limit, count)

    def opened(columns: Sequence[str]) -> tuple[Dataset, bool]:
        target = os.path.join(scratch.name, "columns.arrow")
        with counting("reading", _bytes(files), "B") as advance:
            encoded = write_columns(files, columns, target, count, advance)
        return _mapped(target), encoded

    return Rows(
        Origin(str(path), tuple(map(str, files)), tuple(firsts)),
        tuple(names),
        scratch,
        count,
        opened,
        {file: columns for columns, file in by_columns.items()},
        doubled,
        found.notes,
    )


def _doubled(names: Sequence[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def _mapped(target: str) -> Dataset:
    from datasets import Dataset

    return Dataset.from_file(target)


def _bytes(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


class _TextWriter:
    """Writes every row as JSON text, at most `limit` of them, and learns what the rows have.

    names: the columns in order of appearance. firsts: the first row of each file. by_columns: one file for each set of
    columns. doubled: as in Rows.
    """

    def __init__(self, limit: int | None) -> None:
        self.names: dict[str, None] = {}
        self.firsts: list[int] = []
        self.by_columns: dict[frozenset[str], str] = {}
        self.doubled: dict[str, str] = {}
        self.count = 0
        self._limit = limit

    def write(self, files: Sequence[Path], target: str, advance: Callable[[int], Any]) -> None:
        import pyarrow as pa

        schema = pa.schema([(JSON_COLUMN, pa.large_string())])
        pending: list[str] = []
        held = 0
        with pa.OSFile(target, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

            def flush() -> None:
                writer.write_batch(pa.record_batch([pa.array(pending, pa.large_string())], schema=schema))
                pending.clear()

            for text in self._texts(files, advance):
                pending.append(text)
                held += len(text)
                if len(pending) >= _FLUSH_ROWS or held >= _FLUSH_BYTES:
                    flush()
                    held = 0
            flush()

    def _texts(self, files: Sequence[Path], advance: Callable[[int], Any]) -> Iterator[str]:
        for file in files:
            if self.count == self._limit:
                return
            self.firsts.append(self.count)
            present: dict[str, None] = {}
            known: Sequence[str] = ()
            for text, columns in _rows_of(file, advance):
                if columns is not known:  # most rows of a file have the columns of the one before
                    known = columns
                    present.update(dict.fromkeys(columns))
                    if isinstance(columns, list):
                        self.doubled.update((name, str(file)) for name in _doubled(columns))
                self.count += 1
                yield text
                if self.count == self._limit:
                    break
            if self.count > self.firsts[-1]:
                self.by_columns.setdefault(frozenset(present), str(file))
                self.names.update(present)


def _rows_of(path: Path, advance: Callable[[int], Any]) -> Iterator[tuple[str, Sequence[str]]]:
    """JSON text and columns of each row of a file of any kind."""
    ending = ending_of(path)
    assert ending is not None
    return parquet_rows(path, advance) if ending == ".parquet" else text_rows(path, ending, advance)
