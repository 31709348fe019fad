"""Training from a part of a cache: the same numbers, the same held-out choice, the tail of the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.cached_tail import make_tail
from stages.held_out import split_held_out
from stages.objective import Objective
from stages.run_identity import run_identity
from stages.shard_dataset import ShardDataset, corpus_threshold, sequence_lengths, sequences_here
from stages.student import StudentOptions, prepare
from storage.cache import Cache
from storage.errors import CacheError
from storage.transfer import copy_cache
from tests.conftest import Tiny

SHARDS = (1, 4)


@pytest.fixture
def part(cache_path: Path, tmp_path: Path) -> Cache:
    copy_cache(Cache.open(cache_path), tmp_path / "part", shards=SHARDS)
    return Cache.open(tmp_path / "part")


def test_a_part_holds_the_same_numbers_under_the_same_ids(part: Cache, cache_path: Path) -> None:
    whole = Cache.open(cache_path)
    planned = [whole.manifest.shards[index] for index in SHARDS]
    ids = np.concatenate([np.arange(shard.first, shard.first + shard.sequences) for shard in planned])
    np.testing.assert_array_equal(np.flatnonzero(sequences_here(part)), ids)
    ours, theirs = ShardDataset(part, ids), ShardDataset(whole, ids)
    for index in range(len(ids)):
        a, b = vars(ours[index]), vars(theirs[index])
        assert all(np.array_equal(a[name], b[name]) for name in a)
    np.testing.assert_array_equal(sequence_lengths(part)[ids], sequence_lengths(whole)[ids])
    assert sequence_lengths(part).sum() == sequence_lengths(whole)[ids].sum()
    assert corpus_threshold([(part, ids)], 0.5) == corpus_threshold([(whole, ids)], 0.5)


def test_what_is_held_out_and_the_tail_are_those_of_the_whole(part: Cache, cache_path: Path) -> None:
    whole = Cache.open(cache_path)
    (train, held_out), (all_train, all_held) = split_held_out(part, 0.2), split_held_out(whole, 0.2)
    here = np.flatnonzero(sequences_here(part))
    assert len(train) and len(held_out)
    np.testing.assert_array_equal(train, np.intersect1d(all_train, here))
    np.testing.assert_array_equal(held_out, np.intersect1d(all_held, here))
    objective = Objective(name="kl", tail="prior")
    ours, theirs = make_tail(objective, [part]).log_prior, make_tail(objective, [whole]).log_prior
    assert ours is not None and theirs is not None and bool((ours == theirs).all())


def test_a_part_is_another_run_than_the_whole(part: Cache, cache_path: Path, tiny: Tiny, tmp_path: Path) -> None:
    options = StudentOptions(
        str(tiny.student), str(part.path), str(tmp_path / "out"), batching="packed", eval_share=0.2
    )
    prepared = prepare(options)
    assert prepared.lengths is not None and (prepared.lengths > 0).all()
    np.testing.assert_array_equal(prepared.lengths, sequence_lengths(part)[prepared.parts[0].train_ids])
    assert run_identity(options, [part], 1) != run_identity(options, [Cache.open(cache_path)], 1)


def test_a_part_without_any_held_out_sequence_is_refused(cache_path: Path, tmp_path: Path) -> None:
    whole = Cache.open(cache_path)
    _, held = split_held_out(whole, 0.01)
    shard = next(i for i, s in enumerate(whole.manifest.shards) if not s.first <= held[0] < s.first + s.sequences)
    copy_cache(whole, tmp_path / "part", shards=[shard])
    with pytest.raises(
        CacheError, match="none of the 1 sequence held out of the whole; raise --eval-share, set it to 0"
    ):
        split_held_out(Cache.open(tmp_path / "part"), 0.01)
    assert len(split_held_out(Cache.open(tmp_path / "part"), 0)[0])


def test_an_unsealed_or_robbed_cache_is_not_trained_from(part: Cache, tiny: Tiny, tmp_path: Path) -> None:
    options = StudentOptions(str(tiny.student), str(part.path), str(tmp_path / "out"))
    for name in ("tail_prior.json", "tail_prior.parquet"):
        (tmp_path / "part" / name).unlink()
        with pytest.raises(CacheError, match=r"tail_prior\.(json|parquet): .*missing"):
            prepare(options)
    (tmp_path / "part" / "README.md").unlink()
    with pytest.raises(CacheError, match="not sealed"):
        prepare(options)
