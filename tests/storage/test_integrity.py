"""`problems` finds each kind of damage, names the file, and goes on to the next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.cache import Cache
from storage.errors import CacheError
from storage.files import sha256_file
from storage.integrity import problems
from storage.shard import write_shard, write_table
from tests.storage.synthetic import make_manifest, make_rows, replaced, write_cache

MANIFEST = make_manifest(vocabulary=40, top_n=16)
SHARDS = len(MANIFEST.shards)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "cache"
    write_cache(path, MANIFEST)
    return path


@pytest.fixture
def cache(sound: Path, tmp_path: Path) -> Cache:
    """A copy to damage."""
    shutil.copytree(sound, tmp_path / "cache")
    return Cache.open(tmp_path / "cache")


def unreadable(*_: object) -> None:
    raise OSError(5, "Input/output error")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_receipt(cache: Cache, index: int, **changes: object) -> None:
    edit(cache.receipt_path(index), **changes)


def replace_prior(cache: Cache, values: np.ndarray, positions: int) -> None:
    """Another tail prior, and a receipt whose checksum is right."""
    table = pa.table({"tail_prior": values}).replace_schema_metadata({"stored_positions": str(positions)})
    written = write_table(cache.path / "tail_prior.parquet", table, ["tail_prior"])
    edit(cache.path / "tail_prior.json", sha256=written.sha256)


def rewrite(cache: Cache, index: int, **columns: np.ndarray) -> None:
    """Shard `index` with other values, and a receipt whose checksum and length are right."""
    rows = replaced(make_rows(MANIFEST, index)[0], **columns)
    written = write_shard(cache.shard_path(index), rows, MANIFEST, index)
    edit_receipt(cache, index, bytes=written.bytes, sha256=written.sha256)


def test_a_sound_cache_has_none_and_progress_counts_every_shard(cache: Cache) -> None:
    seen: list[int] = []
    assert list(problems(cache, seen.append)) == []
    assert seen == list(range(SHARDS)) and SHARDS == 3


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def swap(one: Path, other: Path) -> None:
    one_bytes = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(one_bytes)


def fold(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda c: flip(c.shard_path(1)), ["part-00001.parquet: its bytes have changed"]),
        (lambda c: c.shard_path(1).unlink(), ["part-00001.parquet: shard 1 is missing"]),
        (lambda c: c.shard_path(1).write_bytes(b""), ["part-00001.parquet: 0 bytes, its receipt says "]),
        (lambda c: fold(c.shard_path(1)), ["part-00001.parquet"]),
        (lambda c: fold(c.receipt_path(1)), ["part-00001.json: is no regular file"]),
        (lambda c: c.receipt_path(1).unlink(), ["part-00001.json: there is no receipt"]),
        (lambda c: c.receipt_path(1).write_text("{"), ["part-00001.json: the receipt is not JSON"]),
        (lambda c: edit_receipt(c, 1, rows=9), ["part-00001.json: 9 rows, the plan says 2"]),
        (lambda c: edit_receipt(c, 1, tokens=9), ["part-00001.json: says rows, tokens"]),
        (lambda c: edit_receipt(c, 1, entries=9), ["part-00001.json: says rows, tokens"]),
        (lambda c: edit_receipt(c, 1, stored_positions=99), ["part-00001.json: says rows, tokens"]),
        (lambda c: edit_receipt(c, 1, shard=0), ["part-00001.json: this receipt belongs to shard 0"]),
        (lambda c: edit_receipt(c, 1, cache_id="f" * 16), ["part-00001.json: this receipt belongs to shard 1 of"]),
        (lambda c: edit_receipt(c, 1, sum_unc=0.5), ["part-00001.json: says sums"]),
        (lambda c: edit_receipt(c, 1, sum_tail_mass=0.5), ["part-00001.json: says sums"]),
        (
            lambda c: swap(c.shard_path(0), c.shard_path(1)),
            ["part-00000.parquet: ", "part-00001.parquet: "],
        ),
        (lambda c: flip(c.tail_sum_path(2)), ["tail_sums/part-00002.parquet: its bytes have changed"]),
        (lambda c: c.tail_sum_path(2).unlink(), ["tail_sums/part-00002.parquet: the summed tail of shard 2 is"]),
        (lambda c: shutil.copy(c.shard_path(0), c.shard_path(7)), ["part-00007.parquet: not in the plan"]),
        (lambda c: (c.path / "README.md").unlink(), ["cache: not sealed"]),
        (lambda c: (c.path / "tail_prior.parquet").unlink(), ["tail_prior.parquet: missing"]),
        (lambda c: (c.path / "tail_prior.parquet").write_bytes(b"PAR1"), ["tail_prior.parquet: its bytes have"]),
        (
            lambda c: (c.path / "tail_prior.json").unlink(),
            ["tail_prior.json: the receipt of the tail prior is"],
        ),
        (lambda c: edit(c.path / "tail_prior.json", sha256="0" * 64), ["tail_prior.parquet: its bytes have"]),
        (lambda c: edit(c.path / "tail_prior.json", cache_id="f" * 16), ["tail_prior.json: belongs to cache ffff"]),
        (lambda c: flip(c.path / "tail_prior.parquet"), ["tail_prior.parquet: "]),
    ],
)
def test_damage_is_named(cache: Cache, damage: Callable[[Cache], object], named: list[str]) -> None:
    damage(cache)
    found = list(problems(cache))
    assert len(found) == len(named), found
    for problem, part in zip(found, named, strict=True):
        assert part in problem
        assert "\n" not in problem


def test_shards_and_receipts_swapped_together(cache: Cache) -> None:
    swap(cache.shard_path(0), cache.shard_path(1))
    swap(cache.receipt_path(0), cache.receipt_path(1))
    found = list(problems(cache))
    assert len(found) >= 2 and "belongs to shard 1" in found[0] and "belongs to shard 0" in found[1]


def test_a_failing_disk_is_named_and_the_rest_is_still_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.cache.sha256_file", unreadable)
    found = list(problems(cache))
    assert len(found) == SHARDS and all("Input/output error" in problem for problem in found)


def test_everything_is_named_not_only_the_first(cache: Cache) -> None:
    for index in range(SHARDS):
        flip(cache.shard_path(index))
    assert len(list(problems(cache))) == SHARDS


def test_wrong_values_behind_right_checksums(cache: Cache) -> None:
    rows, _ = make_rows(MANIFEST, 1)
    gold = rows["gold_logprob"]
    shifted = gold.values.copy()
    for row in range(len(gold)):
        shifted[gold.offsets[row] : gold.offsets[row + 1]] = np.roll(gold[row], 1)
    rewrite(cache, 1, gold_logprob=shifted)
    found = list(problems(cache))
    assert any("part-00001.parquet: row " in problem and "shifted" in problem for problem in found), found


def test_a_tail_prior_of_another_cache(cache: Cache) -> None:
    stored = sum(receipt.stored_positions for receipt in cache.receipts())
    replace_prior(cache, np.full(40, 1 / 40, np.float32), stored)
    assert ["does not sum to the mean tail mass" in problem for problem in problems(cache)] == [True]
    for wrong in (np.full(39, 0.01, np.float32), np.full(40, 0.01), np.full(40, np.nan, np.float32)):
        replace_prior(cache, wrong, stored)
        [problem] = problems(cache)
        assert "tail_prior.parquet: not 40 non-negative float32" in problem
        with pytest.raises(CacheError, match="tail_prior"):
            cache.tail_prior()


def test_a_tail_prior_about_other_positions(cache: Cache) -> None:
    prior = cache.tail_prior()
    assert prior is not None
    replace_prior(cache, prior, 9)
    [problem] = problems(cache)
    assert "tail_prior.parquet: says it is about 9 positions, the shards have " in problem


def test_a_manifest_that_was_edited_belongs_to_no_shard(cache: Cache) -> None:
    path = cache.path / "manifest.json"
    plain = json.loads(path.read_text())
    plain["teacher"]["name"] = "somebody else"
    path.write_text(json.dumps(plain))
    found = list(problems(Cache.open(cache.path)))
    assert len(found) == SHARDS + 1
    assert all("this receipt belongs to shard" in problem for problem in found[:-1])
    assert "tail_prior.json: belongs to cache" in found[-1]


def test_a_cache_without_tail_prior_is_sound(tmp_path: Path) -> None:
    """Of an engine that cannot give it."""
    cache = Cache.create_or_resume(tmp_path / "cache", MANIFEST)
    for index in range(SHARDS):
        cache.write_shard(index, make_rows(MANIFEST, index)[0], None, 0.0)
    cache.seal("card")
    assert list(problems(cache)) == []
    assert cache.tail_prior() is None


def test_the_tail_prior_is_the_mean_over_stored_positions(sound: Path) -> None:
    cache = Cache.open(sound)
    prior = cache.tail_prior()
    made = [make_rows(MANIFEST, index) for index in range(SHARDS)]
    stored = sum(int(rows["loss_mask"].values.sum()) for rows, _ in made)
    expected = sum(tail for _, tail in made) / stored
    assert prior is not None and prior.dtype == np.float32
    np.testing.assert_allclose(prior, expected, rtol=1e-6)
    masses = [np.exp(rows["tail_logmass"].values[rows["loss_mask"].values].astype(float)).sum() for rows, _ in made]
    assert prior.sum(dtype=float) == pytest.approx(sum(masses) / stored, rel=1e-5)


def test_receipts_match_the_files(sound: Path) -> None:
    cache = Cache.open(sound)
    for index, receipt in enumerate(cache.receipts()):
        path = cache.shard_path(index)
        assert (receipt.bytes, receipt.sha256) == (path.stat().st_size, sha256_file(path))
        assert receipt.rows == pq.read_metadata(path).num_rows == MANIFEST.shards[index].sequences


def test_sealing_before_the_last_receipt_is_refused(tmp_path: Path) -> None:
    cache = Cache.create_or_resume(tmp_path / "cache", MANIFEST)
    cache.write_shard(0, *make_rows(MANIFEST, 0), 0.0)
    with pytest.raises(CacheError, match=r"unfinished, 2 of 3 shards are missing \(first: part-00001"):
        cache.seal("card")
    assert not cache.is_sealed and cache.tail_prior() is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda c, i: flip(c.shard_path(i)),
        lambda c, i: c.shard_path(i).unlink(),
        lambda c, i: c.receipt_path(i).unlink(),
        lambda c, i: edit_receipt(c, i, stored_positions=99),
        lambda c, i: edit_receipt(c, i, sum_tail_mass=9.0),
        lambda c, i: rewrite(c, i, tail_logmass=np.full(len(make_rows(MANIFEST, i)[0]["tail_logmass"].values), -9.0)),
    ],
)
@pytest.mark.parametrize("prior", [True, False])
def test_a_damaged_shard_is_no_damage_of_the_tail_prior(
    tmp_path: Path, damage: Callable[[Cache, int], object], prior: bool
) -> None:
    """Neither of the one that is there, nor of one that no engine gave; also where every shard is damaged."""
    for count in (1, SHARDS):
        cache = Cache.create_or_resume(tmp_path / str(count), MANIFEST)
        for index in range(SHARDS):
            rows, tail_sum = make_rows(MANIFEST, index)
            cache.write_shard(index, rows, tail_sum if prior else None, 0.0)
        cache.seal("card")
        assert list(problems(cache)) == []
        for index in range(count):
            damage(cache, index)
        found = list(problems(Cache.open(cache.path)))
        assert len({name for index in range(SHARDS) for name in found if f"part-{index:05d}" in name}) >= count
        assert not [problem for problem in found if "tail_prior" in problem]
