"""One Parquet file: writing it, reading it, and the invariants that hold in it.

Encodings: ids and float32 are byte-stream-split, which sets upper bytes and exponents side by side for zstd (float16
is not: DuckDB cannot read it so; codes of one byte are int32 to Parquet); everything is zstd-compressed and every page
carries a CRC that reading checks. What other encodings would cost: docs/storage.md.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import RawIOBase
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage import pages, schema
from storage.errors import CacheError
from storage.files import atomic_file
from storage.limits import SHARD_BYTES, UNPACKED_PER_BYTE
from storage.manifest import Manifest
from storage.places import Place
from storage.quantization import LOGPROB_STEP, rounding
from storage.rows import Ragged, Rows
from storage.words import counted

_ZSTD_LEVEL = 3
# A uint8 is an int32 to Parquet: split, its three zero bytes cost nothing.
_SPLIT = (pa.int32(), pa.float32(), pa.uint8())
# Offsets into a column of a shard are int32.
MOST_VALUES = 2**31 - 1
# Bytes of a column that are not its values: dictionaries, headers.
_OVERHEAD = 1 << 20
# What a value of any kind is counted with, in memory.
_VALUE_BYTES = 8
# Entries whose values are checked at a time: their float64 stays in a core's cache.
_CHECKED_ENTRIES = 1 << 16
_WIDEST_TABLE = 1 << 23


@dataclass(frozen=True)
class Written:
    """A file that was written: its length in bytes and its checksum."""

    bytes: int
    sha256: str


def write_shard(path: Place, rows: Rows, manifest: Manifest, index: int) -> Written:
    """Write `rows` to `path`, atomically and durably. Raises CacheError for a shard that no reader would unpack."""
    columns = manifest.columns
    written = write_table(path, rows.to_table(columns, shard_metadata(manifest, index)), split_leaves(columns))
    values = sum(max(len(ragged.values), len(rows)) for ragged in rows.lists.values()) + len(columns) * len(rows)
    if _VALUE_BYTES * values > _allowed(written.bytes):
        raise CacheError(
            f"{path}: its {values:,} values take {written.bytes:,} bytes, and readers refuse what unpacks so far; "
            f"choose fewer --shard-tokens, or set {SHARD_BYTES.variable} here and for every reader"
        )
    return written


def _allowed(size: int) -> int:
    """Bytes that the values of a file of `size` bytes may take in memory."""
    return SHARD_BYTES.value + UNPACKED_PER_BYTE * size


def split_leaves(columns: Sequence[schema.Column]) -> list[str]:
    """The leaves of a shard that are byte-stream-split."""
    return [f"{column.name}.list.element" for column in columns if column.element in _SPLIT]


def write_table(path: Place, table: pa.Table, split_bytes: Sequence[str]) -> Written:
    """Write a table with this project's encodings; `split_bytes` are the leaves to byte-stream-split."""
    with atomic_file(path) as file:
        pq.write_table(
            table,
            pa.PythonFile(file, "w"),
            compression="zstd",
            compression_level=dict(map(_zstd_level, table.schema)),
            use_dictionary=False,
            use_byte_stream_split=list(split_bytes) or False,
            # The least and the most of a list's values help nobody, and to find them is a tenth of the writing.
            write_statistics=[field.name for field in table.schema if not pa.types.is_list(field.type)] or False,
            write_page_checksum=True,
            store_schema=True,
        )
    return Written(file.size, file.sha256)


def _zstd_level(field: pa.Field) -> tuple[str, int]:
    """The leaf of a column and its level."""
    if not pa.types.is_list(field.type):
        return field.name, _ZSTD_LEVEL
    level = _ZSTD_LEVEL
    if field.name == schema.TOP_IDS.name:
        level = 1  # in the order of their probability, ids gain nothing from a higher one
    elif field.name == schema.TOP_LOGPROBS.name and field.type.value_type == pa.float16():
        level = 2  # 3 would take an eighth less of this column, and at N=64 a quarter off the speed of writing
    return f"{field.name}.list.element", level


def shard_metadata(manifest: Manifest, index: int) -> dict[bytes, bytes]:
    """What a shard says of itself, so that a swapped, renamed or foreign one is recognised."""
    found = {
        schema.META_FORMAT: str(schema.FORMAT_VERSION).encode(),
        schema.META_CACHE_ID: manifest.cache_id.encode(),
        schema.META_SHARD: str(index).encode(),
    }
    if manifest.scoring.logprob_bits == 8:
        found[schema.META_STEP] = str(LOGPROB_STEP).encode()
    return found


def read_shard(
    path: Place,
    manifest: Manifest,
    index: int,
    columns: Sequence[str] | None = None,
    file: IO[bytes] | RawIOBase | None = None,
    *,
    page_checksums: bool = True,
) -> Rows:
    """Rows of a shard; `columns` None for all. Raises CacheError on anything but the shard that belongs here.

    file: where the bytes are read from, if not from `path` itself. page_checksums: compare those of the pages read.
    """
    wanted = {column.name: column for column in manifest.columns}
    names = list(wanted) if columns is None else list(dict.fromkeys(["sequence_id", *columns]))
    for name in names:
        if name not in wanted:
            raise CacheError(f"{path}: this cache holds no column {name}; it has {', '.join(wanted)}")
    try:
        with ExitStack() as stack:
            source: Any = stack.enter_context(path.open("rb")) if file is None else file
            parquet = stack.enter_context(
                pq.ParquetFile(source, page_checksum_verification=page_checksums, pre_buffer=file is not None)
            )
            stored = parquet.schema_arrow
            metadata = stored.metadata or {}
            for key, value in shard_metadata(manifest, index).items():
                if metadata.get(key) != value:
                    found = metadata.get(key, b"nothing").decode(errors="replace")[:40]
                    label = key.decode().rpartition(".")[2]
                    raise CacheError(f"{path}: this shard belongs elsewhere: {label} is {found}, not {value.decode()}")
            for name in names:
                if stored.names.count(name) > 1:
                    raise CacheError(f"{path}: column {name} stands there more than once")
                if name not in stored.names or stored.field(name).type != wanted[name].type:
                    raise CacheError(f"{path}: column {name} is missing or not {wanted[name].type}")
            if parquet.metadata.num_rows != manifest.shards[index].sequences:
                raise CacheError(
                    f"{path}: {counted(parquet.metadata.num_rows, 'row')}, "
                    f"the plan says {manifest.shards[index].sequences}"
                )
            table = read_checked(parquet, source, most_values(manifest, index), names)
    except FileNotFoundError:
        raise CacheError(f"{path}: shard {index} is missing") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CacheError(f"{path}: unreadable as Parquet ({reason[:200]})") from None
    try:
        rows = Rows.from_table(table)
    except CacheError as error:
        raise CacheError(f"{path}: {error}") from None
    for problem in structure_problems(rows, manifest, index):
        raise CacheError(f"{path}: {problem}")
    return rows


def most_values(manifest: Manifest, index: int) -> dict[str, int]:
    """How many values each column of a shard may hold at most, an empty list counted as one, by the plan alone."""
    planned, scoring = manifest.shards[index], manifest.scoring
    each = {"row": 0, "L": 1, "L-1": 1, "E": scoring.top_n}
    stored = scoring.per_stored_position
    found = {}
    for column in manifest.columns:
        values = stored[column.name] if column.name in stored else each[column.per]
        found[column.name] = min(MOST_VALUES, planned.sequences + planned.tokens * values)
    return found


def read_checked(
    parquet: pq.ParquetFile, source: IO[bytes] | RawIOBase, most: Mapping[str, int], names: list[str]
) -> pa.Table:
    """The columns `names`, none of which may claim more than `most` values.

    parquet: opened from `source`. Raises ValueError, before anything is decompressed, for columns whose pages are not
    what the footer says: a few kilobytes of zstd may stand for gigabytes, and Arrow may crash.
    """
    values = dict.fromkeys(names, 0)
    size = source.seek(0, os.SEEK_END)
    allowed = _allowed(size)
    places = list(pages.extents(parquet.metadata, names))
    for name, extent in places:
        values[name] += extent.values
        if values[name] > most[name]:
            raise ValueError(f"column {name} claims {values[name]} values, the plan allows {most[name]}")
        if _VALUE_BYTES * sum(values.values()) > allowed:
            raise ValueError(
                f"its {size:,} bytes claim {sum(values.values()):,} values and more, too many for its length; "
                f"{SHARD_BYTES.advice}"
            )
        # Eight bytes are the widest value; levels and headers of pages come to far less than as much again.
        if extent.unpacked > 16 * most[name] + _OVERHEAD:
            raise ValueError(f"column {name} claims {extent.unpacked} bytes for {extent.values} values")
    with _bytes_of(source) as bytes_of:
        for _, extent in places:
            pages.check_pages(bytes_of(extent.start, extent.length), extent)
    return parquet.read(columns=names, use_threads=False)


@contextmanager
def _bytes_of(source: IO[bytes] | RawIOBase) -> Iterator[Callable[[int, int], memoryview]]:
    """Start and length -> those bytes of an open file, mapped where that can be."""
    try:
        mapped = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):

        def read(start: int, length: int) -> memoryview:
            source.seek(start)
            return memoryview(source.read(length) or b"")

        yield read
        return
    # Closed with its last view: an error on its way may hold one.
    yield lambda start, length: memoryview(mapped)[start : start + length]


def structure_problems(rows: Rows, manifest: Manifest, index: int) -> Iterator[str]:
    """Breaks of the shapes: what must hold before any array is indexed by another. Yields one sentence each."""
    first = manifest.shards[index].first
    if not np.array_equal(rows.sequence_id, np.arange(first, first + len(rows))):
        yield f"sequence_id does not count from {first}"
    rows_of_data = rows.source_row
    if rows_of_data is not None and len(rows_of_data):
        most = (manifest.corpus.source_rows or 0) - 1
        if (row := _first((rows_of_data < 0) | (rows_of_data > most))) is not None:
            yield f"row {row}: source_row {rows_of_data[row]} is outside 0..{most}"
    columns = {column.name: column for column in manifest.columns}
    ids = rows.lists.get("input_ids")
    if ids is not None:
        positions = ids.lengths - 1
        if (row := _first(positions < 1)) is not None:
            yield f"row {row}: fewer than two token ids"
        if (at := _first((ids.values < 0) | (ids.values >= manifest.vocabulary_size))) is not None:
            yield f"row {_row(ids, at)}: token id {ids.values[at]} is outside 0..{manifest.vocabulary_size - 1}"
    else:
        # Columns read without the ids still index one another.
        lengths = [ragged.lengths for name, ragged in rows.lists.items() if columns[name].per == "L-1"]
        if not lengths:
            return
        positions = lengths[0]
    stored = counts = None
    if "loss_mask" in rows.lists and len(rows["loss_mask"].values) == positions.sum():
        stored = _sums(rows["loss_mask"].values, rows["loss_mask"].offsets)
    if "top_count" in rows.lists:
        counts = _sums(rows["top_count"].values.astype(np.int64), rows["top_count"].offsets)
    per_position = manifest.scoring.per_stored_position
    for name, ragged in rows.lists.items():
        expected = {
            "L": positions + 1,
            "L-1": positions,
            "E": counts,
        }.get(columns[name].per)
        if stored is not None and name in per_position:
            expected = stored * per_position[name]
        if expected is not None and (row := _first(ragged.lengths != expected)) is not None:
            yield (
                f"row {row}: {name} holds {ragged.lengths[row]} values, "
                f"{expected[row]} ({columns[name].per}) belong there"
            )


def value_problems(rows: Rows, manifest: Manifest) -> list[str]:
    """Breaks of the invariants of the values, one sentence each, naming the first bad row of its kind.

    The alignment check is here: where gold is among the top-N its own entry must say the same as `gold_logprob`,
    and elsewhere `gold_logprob` may not exceed the last entry. Numbers shifted by one position break it.
    Optional columns and the entropy are checked where they were read.
    """
    # Damaged numbers may overflow or be no numbers at all: every comparison below is written to find those.
    with np.errstate(all="ignore"):
        # In parts, which is faster; where one is bad, the whole again for the first bad row of every kind.
        if any(True for part in _parts(rows) for _ in _value_problems(part, manifest)):
            return list(_value_problems(rows, manifest))
        return []


def _parts(rows: Rows) -> Iterator[Rows]:
    """The rows, about `_CHECKED_ENTRIES` entries or positions at a time."""
    sizes = np.maximum(rows["top_ids"].offsets, rows["loss_mask"].offsets)
    start = 0
    while start < len(rows):
        stop = int(np.searchsorted(sizes, sizes[start] + _CHECKED_ENTRIES, side="right")) - 1
        stop = min(max(stop, start + 1), len(rows))
        yield rows.part(start, stop)
        start = stop


def _value_problems(rows: Rows, manifest: Manifest) -> Iterator[str]:
    mask = rows["loss_mask"]
    counts = rows["top_count"].values.astype(np.int64)
    top_ids, top_logprobs = rows["top_ids"].values, rows["top_logprobs"].values.astype(np.float64)
    gold_logprob = rows["gold_logprob"].values.astype(np.float64)
    tail = rows["tail_logmass"].values.astype(np.float64)

    def row_of(position: int) -> str:
        row = _row(mask, position)
        return f"row {row}, position {position - mask.offsets[row]}"

    for name, values in [("gold_logprob", gold_logprob), ("tail_logmass", tail)]:
        # The tail alone may be empty: gold was seen.
        lowest = -np.inf if name == "gold_logprob" else np.nan
        if (at := _first(~(values <= 1e-4) | (values == lowest))) is not None:
            yield f"{row_of(at)}: {name} is {values[at]:g}, not a log-probability"
    if "entropy" in rows.lists:
        entropy = rows["entropy"].values.astype(np.float64)
        highest = np.log(manifest.vocabulary_size) * (1 + 2.0**-9)
        # NaN where the engine could not tell.
        if (at := _first((entropy < 0) | (entropy > highest))) is not None:
            yield f"{row_of(at)}: entropy is {entropy[at]:g}, not between 0 and the logarithm of the vocabulary"
    for name in rows.lists:
        if schema.column_temperature(name) is not None:
            at_temperature = rows[name].values
            if (at := _first(~(at_temperature < np.inf))) is not None:
                yield f"{row_of(at)}: {name} is {at_temperature[at]:g}, not the logarithm of a sum"
    if (at := _first((counts > 0) != mask.values)) is not None:
        yield f"{row_of(at)}: top_count is {counts[at]} where the loss mask is {bool(mask.values[at])}"
    scoring = manifest.scoring
    fewest = scoring.min_n if scoring.tail_epsilon else scoring.top_n
    if (at := _first((counts > scoring.top_n) | ((counts > 0) & (counts < fewest)))) is not None:
        keeps = f"{fewest}..{scoring.top_n}" if fewest < scoring.top_n else scoring.top_n
        yield f"{row_of(at)}: top_count is {counts[at]}, this cache keeps {keeps}"
    starts = np.concatenate([[0], np.cumsum(counts)])
    position_of_entry = np.repeat(np.arange(len(counts)), counts)
    if (at := _first((top_ids < 0) | (top_ids >= manifest.vocabulary_size))) is not None:
        yield (
            f"{row_of(int(position_of_entry[at]))}: top-N id {top_ids[at]} is outside 0..{manifest.vocabulary_size - 1}"
        )
    if "tail_samples" in rows.lists:
        samples = rows["tail_samples"].values.astype(np.int64)
        position_of_sample = np.repeat(np.flatnonzero(mask.values), manifest.scoring.tail_samples)
        if (at := _first((samples < -1) | (samples >= manifest.vocabulary_size))) is not None:
            yield (
                f"{row_of(int(position_of_sample[at]))}: tail sample {samples[at]} is outside "
                f"-1..{manifest.vocabulary_size - 1}"
            )
        if _repeats(counts[mask.values], top_ids, samples):
            # One number for a position and an id.
            kept = position_of_entry * manifest.vocabulary_size + top_ids
            drawn = position_of_sample * manifest.vocabulary_size + samples
            if (at := _first(np.isin(drawn, kept) & (samples >= 0))) is not None:
                yield f"{row_of(int(position_of_sample[at]))}: tail sample {samples[at]} is in the top-N"
    if "sketch_codes" in rows.lists and (at := _first(rows["sketch_codes"].values == 0)) is not None:
        position = int(np.flatnonzero(mask.values)[at // manifest.scoring.per_stored_position["sketch_codes"]])
        yield f"{row_of(position)}: a sketch code is 0, they are 1..255"
    if "residual_samples" in rows.lists and "residual_mass" in rows.lists:
        yield from _residual_problems(rows, manifest, position_of_entry * manifest.vocabulary_size + top_ids, row_of)
    ascending = np.diff(top_logprobs) > 0
    ascending &= position_of_entry[1:] == position_of_entry[:-1] if len(position_of_entry) else False
    if (at := _first(ascending)) is not None:
        yield f"{row_of(int(position_of_entry[at]))}: top_logprobs do not descend"
    if not counts.any():
        return
    if _repeats(counts[counts > 0], top_ids):
        order = np.lexsort((top_ids, position_of_entry))
        repeated = (np.diff(top_ids[order]) == 0) & (np.diff(position_of_entry[order]) == 0)
        if (at := _first(repeated)) is not None:
            yield f"{row_of(int(position_of_entry[order[at]]))}: id {top_ids[order[at]]} stands twice in the top-N"

    gold = gold_ids(rows)
    is_gold = top_ids == gold[position_of_entry]
    entry_position = position_of_entry[is_gold]
    above = gold_logprob[entry_position] - top_logprobs[is_gold]
    gap = np.abs(above)
    error = rounding(top_logprobs, scoring.logprob_bits)
    # The last code stands for all below it, but not for more.
    upward = np.where(np.isinf(error), 1.0, error)
    wrong = ~(gap <= 1e-4 + error[is_gold]) | (above > 1e-4 + upward[is_gold])
    if (at := _first(wrong)) is not None:
        yield (
            f"{row_of(int(entry_position[at]))}: gold_logprob disagrees with gold's own entry by {gap[at]:.3g} nats "
            "(positions shifted?)"
        )
    gold_in_top = np.zeros(len(counts), bool)
    gold_in_top[entry_position] = True
    stored = counts > 0
    if epsilon := scoring.tail_epsilon:
        heavy = stored & (counts < scoring.top_n) & ~(np.exp(tail) <= epsilon * (1 + 1e-5))
        if (at := _first(heavy)) is not None:
            yield (
                f"{row_of(at)}: {counts[at]} entries leave a tail of {np.exp(tail[at]):.3g}, this cache stops below "
                f"{scoring.top_n} entries only where less than {epsilon:g} is left"
            )
    last = np.full(len(counts), np.inf)
    at_end = starts[1:][stored] - 1
    last[stored] = top_logprobs[at_end] + upward[at_end]
    outside = stored & ~gold_in_top & (gold_logprob > last + 1e-4)
    if (at := _first(outside)) is not None:
        yield f"{row_of(at)}: gold is outside the top-N yet more probable than its last entry (positions shifted?)"
    p = np.append(np.exp(top_logprobs), 0.0)
    total = np.add.reduceat(p, starts[:-1])
    total = np.where(stored, total, 0.0) + np.exp(tail) + np.where(gold_in_top, 0.0, np.exp(gold_logprob))
    slack = np.full(len(counts), 8e-3 if scoring.logprob_bits == 16 else 1e-3)
    if scoring.logprob_bits == 8:
        slack += np.add.reduceat(p * np.expm1(np.append(np.minimum(error, 1.0), 0.0)), starts[:-1])
    if (at := _first(stored & ~(np.abs(total - 1.0) <= slack))) is not None:
        yield f"{row_of(at)}: the kept set and the tail sum to {total[at]:.5f}, not 1"


def gold_ids(rows: Rows) -> np.ndarray:
    """The gold token of every position, flat: of position t it is input_ids[t+1], so the first id of a row is none."""
    ids = rows["input_ids"]
    keep = np.ones(len(ids.values), bool)
    keep[ids.offsets[:-1]] = False
    return ids.values[keep]


def _residual_problems(rows: Rows, manifest: Manifest, kept: np.ndarray, row_of: Callable[[int], str]) -> Iterator[str]:
    """kept: int64 `[E]`, position times the vocabulary plus id of every entry."""
    stored = np.flatnonzero(rows["loss_mask"].values)
    mass = rows["residual_mass"].values.astype(np.float64)
    # float16 may round up what is at most 2.
    if (at := _first(~((mass >= 0) & (mass <= 2.0 + 2.0**-9)))) is not None:
        yield f"{row_of(int(stored[at]))}: residual_mass is {mass[at]:g}, not between 0 and 2"
    samples = rows["residual_samples"].values.astype(np.int64)
    per_position = manifest.scoring.per_stored_position["residual_samples"]
    positions = np.repeat(stored, per_position)
    if (at := _first((samples < 0) | (samples >= manifest.vocabulary_size))) is not None:
        yield (
            f"{row_of(int(positions[at]))}: residual sample {samples[at]} is outside 0..{manifest.vocabulary_size - 1}"
        )
    inside = np.isin(positions * manifest.vocabulary_size + samples, kept) & np.repeat(mass > 0, per_position)
    if (at := _first(inside)) is not None:
        yield f"{row_of(int(positions[at]))}: residual sample {samples[at]} is in the top-N"


def _repeats(counts: np.ndarray, ids: np.ndarray, drawn: np.ndarray | None = None) -> bool:
    """Say whether an id may stand twice at a position, or `drawn` there too. Sorts small integers, row by row.

    counts `[P]`, of `ids` `[E]`; drawn: as many at each of the P positions, which may repeat one another.
    """
    widest = int(counts.max(initial=0))
    if not widest:
        return False
    # Damaged counts must not ask for memory.
    if widest * len(counts) > _WIDEST_TABLE:
        return True
    table = np.broadcast_to(-2 * np.arange(2, 2 + widest), (len(counts), widest)).astype(np.int64)
    taken = np.arange(widest) < counts[:, None]
    if int(taken.sum()) != len(ids):
        return True
    table[taken] = 2 * ids.astype(np.int64)
    if drawn is not None:
        if not len(drawn) or len(drawn) % len(counts):
            return bool(len(drawn))
        # Odd numbers, each behind the even one of the same id.
        table = np.concatenate([table, 2 * drawn.reshape(len(counts), -1) + 1], axis=1)
    table.sort(axis=1)
    step = np.diff(table, axis=1)
    return bool(((step == 0) & (table[:, 1:] % 2 == 0)).any() or ((step == 1) & (table[:, 1:] % 2 == 1)).any())


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of each row of a ragged array."""
    cumulative = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return cumulative[offsets[1:]] - cumulative[offsets[:-1]]


def _first(wrong: np.ndarray) -> int | None:
    """Index of the first True, or None."""
    return int(np.argmax(wrong)) if wrong.any() else None


def _row(ragged: Ragged, position: int) -> int:
    """The row that a flat index belongs to."""
    return int(np.searchsorted(ragged.offsets, position, side="right")) - 1
