"""The rows of a source, wherever they come from: in order, memory-mapped, never all in memory."""

from __future__ import annotations

import bisect
import contextlib
import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from storage.errors import RunError, UserError
from storage.words import listed_briefly

if TYPE_CHECKING:
    from datasets import Dataset

JSON_COLUMN = "json"


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
    """The rows of a source in order: `len(rows)`, `rows[i] -> dict`, and the Arrow data set below them.

    Where files can be read by columns, none is read until `read` names them, or the rows are asked for.
    """

    origin: Origin
    column_names: tuple[str, ...]
    scratch: tempfile.TemporaryDirectory[str]
    count: int
    # The data set with these columns; True: it has the one column JSON_COLUMN, the row's JSON text.
    opened: Callable[[Sequence[str]], tuple[Dataset, bool]]
    columns_by_file: dict[str, frozenset[str]] = field(default_factory=dict)  # the first file of each set
    doubled: dict[str, str] = field(default_factory=dict)  # columns that stand twice in a file, and that file
    notes: tuple[str, ...] = ()  # sentences on what was passed over
    _data: tuple[Dataset, bool] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        values = self.dataset[int(row) % len(self)]
        if self.encoded:
            return json.loads(values[JSON_COLUMN])
        return {column: without_nulls(value, self.features[column]) for column, value in values.items()}

    @property
    def dataset(self) -> Dataset:
        return self._opened()[0]

    @property
    def encoded(self) -> bool:
        """True where `dataset` has the one column JSON_COLUMN, the row's JSON text."""
        return self._opened()[1]

    @property
    def features(self) -> dict[str, Any]:
        """The types of the columns of `dataset`, as `datasets` has them."""
        return dict(self.dataset.features)

    def _opened(self) -> tuple[Dataset, bool]:
        if self._data is None:
            self.read(self.column_names)
        assert self._data is not None
        return self._data

    def read(self, columns: Sequence[str]) -> None:
        """Read these columns, and where the kind of source allows no others. Raises UserError for doubled ones."""
        for column in columns:
            if column in self.doubled:
                raise UserError(
                    f"{self.doubled[column]} has more than one column '{column}'; rename or remove all but one."
                )
        self._data = self.opened(columns)

    def require(self, columns: Iterable[str]) -> None:
        """Raise UserError naming the first file in which no row has one of `columns`."""
        for path, present in self.columns_by_file.items():
            for column in columns:
                if column not in present:
                    raise UserError(
                        f"{path} has no column '{column}', which other files of {self.origin.source} have "
                        f"(it has {listed_briefly(sorted(present)) or 'none'}); rename its column or move it away."
                    )

    def close(self) -> None:
        """Remove the scratch folder. Arrow data already mapped stays readable until it is let go."""
        self.scratch.cleanup()


def decode_columns(
    batch: Mapping[str, list[Any]],
    columns: Iterable[str],
    encoded: bool,
    features: Mapping[str, Any] | None = None,
) -> list[list[Any]]:
    """The values of `columns` in a batch of `Rows.dataset`; a column that a JSON row lacks is None there.

    `features`: the types of columns that are not JSON. What a type put into an object is removed: see `without_nulls`.
    """
    if not encoded:
        types = features or {}
        return [[without_nulls(value, types.get(column)) for value in batch[column]] for column in columns]
    rows = [json.loads(text) for text in batch[JSON_COLUMN]]
    return [[row.get(column) for row in rows] for column in columns]


def without_nulls(value: Any, kind: Any) -> Any:
    """Return a column's `value` without the keys of nested objects that are null only because others have them.

    An Arrow type gives every object the keys of all, with null where it had none. `kind`: the type as `datasets` has
    it. A value of the type Json keeps its nulls, which are its own.
    """
    if isinstance(kind, dict) and isinstance(value, dict):
        return {key: without_nulls(inner, kind.get(key)) for key, inner in value.items() if inner is not None}
    of_list = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", None)
    if isinstance(value, list) and of_list is not None:
        return [without_nulls(inner, of_list) for inner in value]
    return value


def first_line(error: Exception) -> str:
    """The first line of an error's text, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".")


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
