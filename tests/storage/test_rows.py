"""Every column survives Parquet exactly as it was put in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import schema
from storage.errors import CacheError
from storage.manifest import SketchIdentity
from storage.quantization import decode, encode
from storage.rows import Ragged, Rows
from storage.shard import read_shard, structure_problems, value_problems, write_shard
from tests.storage.synthetic import make_manifest, make_rows, replaced


def assert_same(one: Rows, other: Rows) -> None:
    assert np.array_equal(one.sequence_id, other.sequence_id)
    assert one.lists.keys() == other.lists.keys()
    for name in one.lists:
        a, b = one[name], other[name]
        assert a.values.dtype == b.values.dtype, name
        assert np.array_equal(a.offsets, b.offsets), name
        assert a.values.tobytes() == b.values.tobytes(), name


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprob_bits": 32},
        {"logprob_bits": 8},
        {"temperatures": (0.5, 2.0, 4.0), "tail_samples": 3},
        {"vocabulary": 200_000, "top_n": 2, "tail_samples": 1},
        {"top_n": 1},
        {"sketch": SketchIdentity(rank=5, residual_samples=4, positions=9), "tail_samples": 2},
        {"sketch": SketchIdentity(rank=1, positions=9)},
        {"vocabulary": 9, "top_n": 9, "sketch": SketchIdentity(rank=2, residual_samples=3, positions=9)},
        {"vocabulary": 9, "top_n": 9},
        {"vocabulary": 9, "top_n": 9, "logprob_bits": 32, "temperatures": (2.0,)},
    ],
    ids=[
        "default",
        "32 bits",
        "8 bits",
        "optional columns",
        "wide vocabulary",
        "N=1",
        "a sketch",
        "codes alone",
        "N=V, a sketch",
        "N=V",
        "N=V, 32 bits",
    ],
)
def test_every_column_survives_a_shard(tmp_path: Path, options: dict, index: int) -> None:
    manifest = make_manifest(**options)
    rows, _ = make_rows(manifest, index)
    assert not list(structure_problems(rows, manifest, index))
    assert not list(value_problems(rows, manifest))
    write_shard(tmp_path / "shard.parquet", rows, manifest, index)
    back = read_shard(tmp_path / "shard.parquet", manifest, index)
    if options.get("logprob_bits") == 8:
        rows = replaced(rows, top_logprobs=decode(encode(rows["top_logprobs"].values)))
    assert_same(rows, back)
    assert list(back.lists) == [column.name for column in manifest.scoring.columns if column.is_list]


def test_the_made_up_rows_hold_the_hard_cases() -> None:
    """What the round trip above is meant to cross."""
    wide, _ = make_rows(make_manifest(vocabulary=200_000), 2)
    assert wide["input_ids"].values.max() > 65_535 and wide["top_ids"].values.max() > 65_535
    assert (wide["top_ids"].lengths == 0).any() and (wide["top_ids"].lengths > 0).any()
    whole, _ = make_rows(make_manifest(vocabulary=9, top_n=9), 1)
    assert np.isneginf(whole["tail_logmass"].values).all()


def test_a_shard_in_which_nothing_is_trained_on(tmp_path: Path) -> None:
    manifest = make_manifest(tail_samples=2)
    rows, _ = make_rows(manifest, 0)
    nothing = {name: rows[name] for name in rows.lists}
    nothing["loss_mask"] = Ragged(np.zeros_like(rows["loss_mask"].values), rows["loss_mask"].offsets)
    nothing["top_count"] = Ragged(np.zeros_like(rows["top_count"].values), rows["top_count"].offsets)
    for name in ("top_ids", "top_logprobs", "tail_samples"):
        nothing[name] = Ragged(rows[name].values[:0], np.zeros_like(rows[name].offsets))
    write_shard(tmp_path / "shard.parquet", Rows(rows.sequence_id, nothing), manifest, 0)
    back = read_shard(tmp_path / "shard.parquet", manifest, 0)
    assert_same(Rows(rows.sequence_id, nothing), back)
    assert not list(value_problems(back, manifest))


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    manifest = make_manifest(logprob_bits=32)
    rows, _ = make_rows(manifest, 2)
    gold = rows["gold_logprob"].values.copy()
    gold[:4] = [-1e-9, -np.inf, np.float32(-1e-45), -20.723265]
    top = rows["top_logprobs"].values.copy()
    top[-2:] = [-np.inf, -np.inf]
    rows = replaced(rows, gold_logprob=gold, top_logprobs=top)
    write_shard(tmp_path / "shard.parquet", rows, manifest, 2)
    assert_same(rows, read_shard(tmp_path / "shard.parquet", manifest, 2))


def test_any_parquet_reader_sees_the_declared_types(tmp_path: Path) -> None:
    manifest = make_manifest(temperatures=(2.0,), tail_samples=1)
    rows, _ = make_rows(manifest, 1)
    write_shard(tmp_path / "shard.parquet", rows, manifest, 1)
    table = pq.read_table(tmp_path / "shard.parquet")
    assert table.schema.names == [column.name for column in manifest.scoring.columns]
    for column in manifest.scoring.columns:
        assert table.schema.field(column.name).type == column.type
        assert table.schema.field(column.name).metadata[b"unit"] == column.unit.encode()
    assert table["top_ids"].to_pylist() == [rows["top_ids"][row].tolist() for row in range(len(rows))]


def test_some_columns_alone(tmp_path: Path) -> None:
    manifest = make_manifest()
    rows, _ = make_rows(manifest, 1)
    write_shard(tmp_path / "shard.parquet", rows, manifest, 1)
    some = read_shard(tmp_path / "shard.parquet", manifest, 1, ["gold_logprob", "loss_mask"])
    assert_same(some, Rows(rows.sequence_id, {name: rows[name] for name in ("gold_logprob", "loss_mask")}))


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6), max_size=8))
def test_ragged_is_the_lists_it_came_from(lists: list[list[int]]) -> None:
    ragged = Ragged.from_lists([np.array(item, np.int64) for item in lists], np.int32)
    assert len(ragged) == len(lists)
    assert [ragged[row].tolist() for row in range(len(ragged))] == lists
    assert ragged.lengths.tolist() == [len(item) for item in lists]
    assert ragged.values.dtype == np.int32


@given(st.lists(st.lists(st.booleans(), max_size=9), min_size=1, max_size=9), st.data())
def test_slices_and_chunks_of_a_table_read_alike(lists: list[list[bool]], data: st.DataObject) -> None:
    whole = pa.table({"sequence_id": np.arange(len(lists)), "loss_mask": pa.array(lists, pa.list_(pa.bool_()))})
    start = data.draw(st.integers(0, len(lists) - 1))
    cut = data.draw(st.integers(start, len(lists)))
    part = pa.concat_tables([whole.slice(start, cut - start), whole.slice(cut)])
    rows = Rows.from_table(part)
    assert rows.sequence_id.tolist() == list(range(start, len(lists)))
    assert [rows["loss_mask"][row].tolist() for row in range(len(rows))] == lists[start:]
    assert rows["loss_mask"].offsets[0] == 0


@pytest.mark.parametrize("values", [[[1], None, [2]], [[1], [None, 2]]], ids=["a null list", "a null in a list"])
def test_nulls_are_refused_with_the_column_named(values: list) -> None:
    table = pa.table({"sequence_id": np.arange(len(values)), "input_ids": pa.array(values, pa.list_(pa.int32()))})
    with pytest.raises(CacheError, match=r"input_ids .*null"):
        Rows.from_table(table)


def test_more_values_than_offsets_can_count_are_refused() -> None:
    huge = Ragged(np.zeros(0, np.int32), np.array([0, 2**31]))
    with pytest.raises(CacheError, match="smaller shards"):
        Rows(np.zeros(1, np.int64), {"input_ids": huge}).to_table([schema.INPUT_IDS], {})
