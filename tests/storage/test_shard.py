"""A shard says what is wrong with it, and where: shapes, values, and bytes that changed."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import schema, shard
from storage.cache import Cache
from storage.errors import CacheError
from storage.manifest import Manifest
from storage.rows import Ragged, Rows
from storage.shard import read_shard, shard_metadata, structure_problems, value_problems, write_shard
from tests.storage.synthetic import LENGTHS, make_manifest, make_rows, replaced, write_cache

# One shard of all sequences, every position stored, wide enough a top-N that gold is mostly in it.
MANIFEST = make_manifest(shard_tokens=1000, vocabulary=40, top_n=16)
ROWS, _ = make_rows(MANIFEST, 0, masked=False)
POSITIONS = sum(LENGTHS) - len(LENGTHS)


def at(position: int) -> str:
    """How a flat position is named in a sentence."""
    row = int(np.searchsorted(ROWS["loss_mask"].offsets, position, side="right")) - 1
    return f"row {row}, position {position - ROWS['loss_mask'].offsets[row]}:"


def values(name: str) -> np.ndarray:
    return ROWS[name].values.copy()


def with_value(name: str, index: int, value: float) -> Rows:
    changed = values(name)
    changed[index] = value
    return replaced(ROWS, **{name: changed})


def with_lists(**lists: Ragged) -> Rows:
    return Rows(ROWS.sequence_id, {**ROWS.lists, **lists})


def test_sound_rows_have_no_problem() -> None:
    assert list(structure_problems(ROWS, MANIFEST, 0)) == []
    assert list(value_problems(ROWS, MANIFEST)) == []


# ---- values -----------------------------------------------------------------------------------------------


def shifted(*names: str, by: int = 1) -> Rows:
    """The teacher's numbers of these columns moved by `by` positions along each row, as an off-by-one would."""
    changed: dict[str, np.ndarray] = {}
    for name in names:
        flat, ragged = values(name), ROWS[name]
        for row in range(len(ragged)):
            width = (MANIFEST.scoring.top_n if name.startswith("top_") and name != "top_count" else 1) * by
            flat[ragged.offsets[row] : ragged.offsets[row + 1]] = np.roll(ragged[row], width)
        changed[name] = flat
    return replaced(ROWS, **changed)


TEACHER = ("gold_logprob", "tail_logmass", "top_ids", "top_logprobs")


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize(
    "names",
    [TEACHER, ("top_ids", "top_logprobs"), ("gold_logprob",), ("top_logprobs",), ("top_ids",), ("input_ids",)],
    ids=" ".join,
)
def test_a_shift_by_one_is_found(names: tuple[str, ...], by: int) -> None:
    problems = list(value_problems(shifted(*names, by=by), MANIFEST))
    assert any("positions shifted?" in problem for problem in problems), problems
    assert all(problem.startswith("row ") for problem in problems)


def test_a_shift_is_found_from_one_row_on_and_that_row_is_named() -> None:
    ids = values("input_ids")
    start, stop = ROWS["input_ids"].offsets[4:6]
    ids[start:stop] = np.roll(ids[start:stop], 1)
    problems = list(value_problems(replaced(ROWS, input_ids=ids), MANIFEST))
    assert problems and all(problem.startswith("row 4, position ") for problem in problems)


@pytest.mark.parametrize("position", [0, 3, 4, POSITIONS - 1])
@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
@pytest.mark.parametrize("name", ["gold_logprob", "tail_logmass"])
def test_what_is_no_log_probability(name: str, value: float, position: int) -> None:
    problems = list(value_problems(with_value(name, position, value), MANIFEST))
    assert any(problem.startswith(f"{at(position)} {name} is {value:g}") for problem in problems), problems


def test_gold_was_seen() -> None:
    """Its log-probability is finite; a tail may be empty."""
    problems = value_problems(with_value("gold_logprob", 5, -np.inf), MANIFEST)
    assert f"{at(5)} gold_logprob is -inf, not a log-probability" in problems
    assert not any(
        "tail_logmass" in problem for problem in value_problems(with_value("tail_logmass", 5, -np.inf), MANIFEST)
    )


@pytest.mark.parametrize("entries", [1, 40, 1000, 1 << 30])
def test_checking_in_parts_says_what_checking_the_whole_says(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "_CHECKED_ENTRIES", entries)
    last, counts = POSITIONS - 1, values("top_count")
    counts[3] += 1
    counts[4] -= 1
    bad = [
        with_value("gold_logprob", last, 1.0),
        with_value("top_ids", last * MANIFEST.scoring.top_n + 2, 40),
        with_value("top_ids", 2, ROWS["top_ids"].values[5]),
        replaced(ROWS, top_count=counts),
        shifted(*TEACHER),
    ]
    for rows in bad:
        assert value_problems(rows, MANIFEST) == list(shard._value_problems(rows, MANIFEST)) != []
    assert value_problems(ROWS, MANIFEST) == []
    empty = Rows(
        ROWS.sequence_id[:0],
        {name: Ragged(ragged.values[:0], np.zeros(1, np.int64)) for name, ragged in ROWS.lists.items()},
    )
    assert value_problems(empty, MANIFEST) == []


@pytest.mark.parametrize("position", [0, 4, POSITIONS - 1])
def test_entries_out_of_order(position: int) -> None:
    first = position * MANIFEST.scoring.top_n
    logprobs, ids = values("top_logprobs"), values("top_ids")
    for array in (logprobs, ids):
        array[[first, first + 3]] = array[[first + 3, first]]
    problems = list(value_problems(replaced(ROWS, top_logprobs=logprobs, top_ids=ids), MANIFEST))
    assert problems == [f"{at(position)} top_logprobs do not descend"]


def test_the_step_to_the_next_position_is_no_disorder() -> None:
    logprobs = ROWS["top_logprobs"].values
    n = MANIFEST.scoring.top_n
    assert (logprobs[n::n] > logprobs[n - 1 : -1 : n]).all()


@pytest.mark.parametrize("position", [0, 4, POSITIONS - 1])
def test_an_id_that_stands_twice(position: int) -> None:
    first = position * MANIFEST.scoring.top_n
    changed = with_value("top_ids", first + 2, ROWS["top_ids"].values[first + 5])
    problems = list(value_problems(changed, MANIFEST))
    assert f"{at(position)} id {ROWS['top_ids'].values[first + 5]} stands twice in the top-N" in problems


@pytest.mark.parametrize("bad", [-1, 40, 2**31 - 1, -(2**31)])
def test_an_entry_outside_the_vocabulary(bad: int) -> None:
    problems = list(value_problems(with_value("top_ids", 21, bad), MANIFEST))
    assert f"{at(1)} top-N id {bad} is outside 0..39" in problems


@pytest.mark.parametrize("position", [0, 4, POSITIONS - 1])
@pytest.mark.parametrize("change", [-0.05, 0.05])
def test_mass_that_does_not_sum_to_one(position: int, change: float) -> None:
    tail = np.exp(float(ROWS["tail_logmass"].values[position]))
    changed = with_value("tail_logmass", position, np.log(max(tail + change, 1e-3) if change > 0 else 1e-30))
    if change < 0:
        # Take the mass from the first entry instead: the tail may be too small to take it from.
        first = position * MANIFEST.scoring.top_n
        entry = float(ROWS["top_logprobs"].values[first])
        changed = with_value("top_logprobs", first, entry - 0.2)
    problems = list(value_problems(changed, MANIFEST))
    assert any(p.startswith(at(position)) and "sum to" in p for p in problems), problems


def test_nan_among_the_entries() -> None:
    problems = list(value_problems(with_value("top_logprobs", 16 * 4 + 7, np.nan), MANIFEST))
    assert any(problem.startswith(at(4)) for problem in problems), problems


def test_gold_that_is_outside_the_top_n_but_above_its_end() -> None:
    narrow = make_manifest(shard_tokens=1000, vocabulary=40, top_n=2)
    rows, _ = make_rows(narrow, 0, masked=False)
    last = rows["top_logprobs"].values[1::2].astype(np.float32)
    outside = np.flatnonzero(rows["gold_logprob"].values < last - 1)
    gold = rows["gold_logprob"].values.copy()
    gold[outside[1]] = last[outside[1]] + 0.1
    problems = list(value_problems(replaced(rows, gold_logprob=gold), narrow))
    assert any(p.startswith(at(outside[1])) and "gold is outside the top-N" in p for p in problems), problems


def test_a_mask_that_disagrees_with_the_counts() -> None:
    mask = values("loss_mask")
    mask[5] = False
    problems = list(value_problems(replaced(ROWS, loss_mask=mask), MANIFEST))
    assert problems == [f"{at(5)} top_count is 16 where the loss mask is False"]


def test_a_position_with_a_loss_and_no_entries() -> None:
    counts = values("top_count")
    counts[5] = 0
    n = MANIFEST.scoring.top_n
    keep = np.ones(len(ROWS["top_ids"].values), bool)
    keep[5 * n : 6 * n] = False
    lengths = np.add.reduceat(counts.astype(np.int64), ROWS["loss_mask"].offsets[:-1])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    changed = with_lists(
        top_count=Ragged(counts, ROWS["top_count"].offsets),
        top_ids=Ragged(ROWS["top_ids"].values[keep], offsets),
        top_logprobs=Ragged(ROWS["top_logprobs"].values[keep], offsets),
    )
    assert list(structure_problems(changed, MANIFEST, 0)) == []
    assert list(value_problems(changed, MANIFEST)) == [f"{at(5)} top_count is 0 where the loss mask is True"]


def test_more_entries_than_the_cache_keeps() -> None:
    smaller = Manifest.model_validate(
        {**MANIFEST.model_dump(), "scoring": {**MANIFEST.scoring.model_dump(), "top_n": 15}}
    )
    assert list(value_problems(ROWS, smaller)) == [f"{at(0)} top_count is 16, this cache keeps 15"]


@pytest.mark.parametrize("value", [-np.inf, -1.0, 4.0, np.inf])
def test_an_entropy_that_cannot_be(value: float) -> None:
    assert list(value_problems(with_value("entropy", 6, value), MANIFEST)) == [
        f"{at(6)} entropy is {value:g}, not between 0 and the logarithm of the vocabulary"
    ]


def test_an_engine_that_cannot_tell_the_entropy_says_so() -> None:
    assert list(value_problems(with_value("entropy", 6, np.nan), MANIFEST)) == []


def test_optional_columns_are_checked_as_well() -> None:
    manifest = make_manifest(shard_tokens=1000, tail_samples=2, temperatures=(2.0,))
    rows, _ = make_rows(manifest, 0, masked=False)
    assert list(value_problems(rows, manifest)) == []
    for bad, said in [(300, "outside -1..299"), (-2, "outside -1..299"), (rows["top_ids"].values[17], "in the top-N")]:
        samples = rows["tail_samples"].values.copy()
        samples[9] = bad
        [problem] = value_problems(replaced(rows, tail_samples=samples), manifest)
        assert problem == f"{at(4)} tail sample {bad} is {said}"
    hot = rows["tail_logmass_T2"].values.copy()
    hot[5] = np.nan
    [problem] = value_problems(replaced(rows, tail_logmass_T2=hot), manifest)
    assert problem.startswith(f"{at(5)} tail_logmass_T2 is nan")


@pytest.mark.parametrize("name", ["top_logprobs", "tail_logmass", "gold_logprob", "entropy"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 6e4])
def test_no_value_makes_numpy_talk(name: str, value: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(value_problems(with_value(name, 0, value), MANIFEST))


# ---- shapes -----------------------------------------------------------------------------------------------


def cut(name: str, row: int, *, to: int | None = None) -> Ragged:
    """Column `name` with `row` cut by its last value, or to `to` values."""
    lists = [ROWS[name][i] for i in range(len(ROWS))]
    lists[row] = lists[row][: len(lists[row]) - 1 if to is None else to]
    return Ragged.from_lists(lists, ROWS[name].values.dtype)


@pytest.mark.parametrize("row", [0, 3, 5])
@pytest.mark.parametrize("name", ["loss_mask", "gold_logprob", "tail_logmass", "entropy", "top_count"])
def test_a_column_that_is_not_one_shorter_than_the_ids(name: str, row: int) -> None:
    problems = list(structure_problems(with_lists(**{name: cut(name, row)}), MANIFEST, 0))
    length = LENGTHS[row]
    assert f"row {row}: {name} holds {length - 2} values, {length - 1} (L-1) belong there" in problems


@pytest.mark.parametrize("name", ["top_ids", "top_logprobs"])
def test_a_column_of_entries_that_does_not_match_the_counts(name: str) -> None:
    [problem] = structure_problems(with_lists(**{name: cut(name, 2)}), MANIFEST, 0)
    assert problem == f"row 2: {name} holds 95 values, 96 (E) belong there"


def test_a_value_that_has_moved_to_the_next_row() -> None:
    """The total is right, no row is."""
    offsets = ROWS["gold_logprob"].offsets.copy()
    offsets[3] -= 1
    [problem] = structure_problems(with_lists(gold_logprob=Ragged(values("gold_logprob"), offsets)), MANIFEST, 0)
    assert problem.startswith("row 2: gold_logprob holds 5 values, 6 ")


def test_tail_samples_that_do_not_match_the_stored_positions() -> None:
    manifest = make_manifest(shard_tokens=1000, tail_samples=3)
    rows, _ = make_rows(manifest, 0)
    samples = rows["tail_samples"]
    short = Ragged(samples.values[:-1], np.minimum(samples.offsets, samples.offsets[-1] - 1))
    [problem] = structure_problems(Rows(rows.sequence_id, {**rows.lists, "tail_samples": short}), manifest, 0)
    assert problem.startswith("row 5: tail_samples holds ") and "(P*M)" in problem


@pytest.mark.parametrize("length", [0, 1])
def test_a_sequence_that_is_too_short(length: int) -> None:
    problems = list(structure_problems(with_lists(input_ids=cut("input_ids", 1, to=length)), MANIFEST, 0))
    assert problems[0] == "row 1: fewer than two token ids"


@pytest.mark.parametrize("bad", [-1, 40, 2**31 - 1])
@pytest.mark.parametrize(("index", "row"), [(0, 0), (5, 1), (6, 1), (7, 2), (26, 5)])
def test_a_token_id_outside_the_vocabulary(index: int, row: int, bad: int) -> None:
    problems = list(structure_problems(with_value("input_ids", index, bad), MANIFEST, 0))
    assert problems == [f"row {row}: token id {bad} is outside 0..39"]


def test_sequences_out_of_order() -> None:
    rows = Rows(ROWS.sequence_id[[0, 2, 1, 3, 4, 5]], ROWS.lists)
    assert list(structure_problems(rows, MANIFEST, 0)) == ["sequence_id does not count from 0"]


def test_columns_read_without_the_ids_are_compared_with_each_other() -> None:
    """What `inspect` and the corpus threshold read; they index one column by another."""
    some = {"loss_mask": ROWS["loss_mask"], "gold_logprob": cut("gold_logprob", 3)}
    problems = list(structure_problems(Rows(ROWS.sequence_id, some), MANIFEST, 0))
    assert len(problems) == 1 and problems[0].startswith("row 3: ")


# ---- files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of several shards, for tests that put back what they change."""
    return write_cache(tmp_path_factory.mktemp("sound") / "cache", make_manifest(tail_samples=1))


def rewritten(change: Callable[[pa.Table], pa.Table], path: Path) -> Path:
    """A shard of MANIFEST, whole as Parquet, after `change`."""
    write_shard(path, ROWS, MANIFEST, 0)
    pq.write_table(change(pq.read_table(path)), path, use_dictionary=False)
    return path


def swap_type(table: pa.Table) -> pa.Table:
    at = table.schema.get_field_index("top_ids")
    return table.set_column(at, "top_ids", table["top_ids"].cast(pa.list_(pa.int64())))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda table: table.drop_columns(["entropy"]), "column entropy is missing"),
        (swap_type, "column top_ids is missing or not list<"),
        (lambda table: table.slice(1), "5 rows, the plan says 6"),
        (lambda table: table.slice(0, 0), "0 rows, the plan says 6"),
        (lambda table: pa.concat_tables([table, table]), "12 rows, the plan says 6"),
        (lambda table: table.take([0, 2, 1, 3, 4, 5]), "sequence_id does not count from 0"),
        (lambda table: table.replace_schema_metadata({}), "belongs elsewhere: format_version is nothing"),
    ],
    ids=["missing column", "other type", "row lost", "no rows", "rows twice", "rows swapped", "no metadata"],
)
def test_parquet_that_is_whole_but_wrong(tmp_path: Path, change: Callable, named: str) -> None:
    path = rewritten(change, tmp_path / "part.parquet")
    with pytest.raises(CacheError, match=rf"part\.parquet: .*{named}"):
        read_shard(path, MANIFEST, 0)


def test_nulls_in_a_file_are_refused_with_file_and_column(tmp_path: Path) -> None:
    def with_null(table: pa.Table) -> pa.Table:
        lists = table["gold_logprob"].to_pylist()
        lists[2] = None
        at = table.schema.get_field_index("gold_logprob")
        column = pa.array(lists, schema.GOLD_LOGPROB.type)
        return table.set_column(at, pa.field("gold_logprob", column.type, nullable=True), column)

    with pytest.raises(CacheError, match=r"part\.parquet: .*gold_logprob"):
        read_shard(rewritten(with_null, tmp_path / "part.parquet"), MANIFEST, 0)


def test_a_shard_of_another_place_or_cache(sound: Cache, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="belongs elsewhere: shard is 0, not 1"):
        read_shard(sound.shard_path(0), sound.manifest, 1)
    with pytest.raises(CacheError, match="belongs elsewhere: cache_id is "):
        read_shard(sound.shard_path(0), make_manifest(tail_samples=1, seed=5), 0)
    newer = dict(shard_metadata(sound.manifest, 0)) | {schema.META_FORMAT: b"2"}
    table = pq.read_table(sound.shard_path(0)).replace_schema_metadata(newer)
    pq.write_table(table, tmp_path / "part.parquet", use_dictionary=False)
    with pytest.raises(CacheError, match="format_version is 2, not 1"):
        read_shard(tmp_path / "part.parquet", sound.manifest, 0)


def test_a_column_the_cache_does_not_hold(sound: Cache) -> None:
    with pytest.raises(CacheError, match=r"holds no column tail_logmass_T2; it has sequence_id, .*tail_samples"):
        sound.read_shard(0, ["gold_logprob", "tail_logmass_T2"])


@pytest.mark.parametrize("raw", [b"", b"PAR1", b"PAR1PAR1", b"\0" * 4096, b"not Parquet at all" * 99])
def test_what_is_no_parquet(sound: Cache, tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "part.parquet").write_bytes(raw)
    with pytest.raises(CacheError, match=r"part\.parquet: unreadable"):
        read_shard(tmp_path / "part.parquet", sound.manifest, 0)


def test_no_file_and_a_folder(sound: Cache, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="shard 0 is missing"):
        read_shard(tmp_path / "part.parquet", sound.manifest, 0)
    with pytest.raises(CacheError, match="unreadable"):
        read_shard(tmp_path, sound.manifest, 0)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    one = write_shard(tmp_path / "a.parquet", ROWS, MANIFEST, 0)
    other = write_shard(tmp_path / "b.parquet", ROWS, MANIFEST, 0)
    assert one == other
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_every_flipped_byte_is_noticed_by_the_checksum(sound: Cache) -> None:
    path = sound.shard_path(1)
    raw = path.read_bytes()
    assert 1000 < len(raw) < 20_000
    try:
        with open(path, "r+b", buffering=0) as file:
            for place in range(len(raw)):
                os.pwrite(file.fileno(), bytes([raw[place] ^ (1 << place % 8)]), place)
                with pytest.raises(CacheError, match="sha256 differs"):
                    sound.check_file(1)
                os.pwrite(file.fileno(), raw[place : place + 1], place)
    finally:
        path.write_bytes(raw)
    sound.check_file(1)


def test_flipped_bytes_change_no_value_unnoticed_even_without_the_checksum(
    sound: Cache, record_property: Callable[[str, object], None]
) -> None:
    """Every byte of the pages and every fourth of the footer, which holds names and statistics nobody reads."""
    path = sound.shard_path(1)
    raw = path.read_bytes()
    good = sound.read_shard(1)
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    outcomes: Counter[str] = Counter()
    try:
        for place in [*range(footer), *range(footer, len(raw), 4)]:
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :])
            try:
                rows = sound.read_shard(1)
            except CacheError:
                outcomes["refused"] += 1
                continue
            same = all(rows[name].values.tobytes() == good[name].values.tobytes() for name in good.lists)
            outcomes["harmless" if same else "value changed"] += 1
    finally:
        path.write_bytes(raw)
    record_property("flips", dict(outcomes))
    assert outcomes["value changed"] == 0
    assert outcomes["refused"] > 0.7 * outcomes.total(), outcomes


def test_larger_damage_is_refused(sound: Cache) -> None:
    """Cut at any length, blocks zeroed or swapped: a CacheError, whatever Parquet makes of it."""
    path = sound.shard_path(1)
    raw = path.read_bytes()
    random = np.random.default_rng(0)
    try:
        for _ in range(150):
            a, b = sorted(random.integers(0, len(raw), 2).tolist())
            middle = raw[a:b]
            turned = raw[:a] + middle[::-1] + raw[b:]
            damaged = [raw[:a], raw[a:], raw[:a] + raw[b:], raw[:b] + middle + raw[b:], turned]
            for data in damaged:
                if data == raw:
                    continue
                path.write_bytes(data)
                with pytest.raises(CacheError):
                    sound.check_file(1)
                try:
                    rows = sound.read_shard(1)
                except CacheError:
                    continue
                list(value_problems(rows, sound.manifest))
    finally:
        path.write_bytes(raw)
