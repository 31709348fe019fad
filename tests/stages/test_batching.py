"""Which sequences an epoch draws, and how they become batches."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.batching import BATCHINGS, BatchPlan, EpochBatches, packed
from stages.mixing import Mixture, shares
from stages.shard_dataset import ShardDataset, sequence_lengths
from storage.cache import Cache
from storage.errors import UserError
from tests.storage.synthetic import LENGTHS, make_manifest, write_cache


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Cache]:
    """Two caches of many tiny shards; each sequence of at least two tokens."""
    root = tmp_path_factory.mktemp("caches")
    return [
        write_cache(root / name, make_manifest(LENGTHS * times, shard_tokens=30, seed=seed))
        for name, times, seed in (("a", 16, 0), ("b", 5, 1))
    ]


def mixture(caches: list[Cache], mix: tuple[float, ...] | None = None) -> Mixture:
    return Mixture(
        [ShardDataset(c, np.arange(c.manifest.corpus.sequences), source=i) for i, c in enumerate(caches)], mix
    )


def plan(batching: Any, **more: int) -> BatchPlan:
    return BatchPlan(batching, sequences=4, tokens=16, **more)


def lengths_of(mixed: Mixture) -> np.ndarray:
    return np.concatenate([sequence_lengths(part.cache) for part in mixed.parts])


def epoch(mixed: Mixture, batching: BatchPlan, number: int, seed: int = 1, epochs: int = 3) -> list[list[int]]:
    batches = EpochBatches(mixed, batching, seed, lengths_of(mixed), lambda batches: epochs)
    batches.set_epoch(number)
    found = list(batches)
    assert len(found) == len(batches)
    return found


def test_lengths_are_those_of_the_sequences(caches: list[Cache]) -> None:
    mixed = mixture(caches)
    assert lengths_of(mixed).tolist() == [len(mixed[i].input_ids) for i in range(len(mixed))]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_an_epoch_is_every_sequence_once(batching: str, caches: list[Cache]) -> None:
    mixed = mixture(caches)
    first, second = (epoch(mixed, plan(batching), number) for number in (0, 1))
    for batches in (first, second):
        assert sorted(i for batch in batches for i in batch) == list(range(len(mixed)))
    assert first != second
    assert first == epoch(mixture(caches), plan(batching), 0)
    assert first != epoch(mixed, plan(batching), 0, seed=2)


@pytest.mark.parametrize("devices", [2, 3, 7])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_devices_share_an_epoch(batching: str, devices: int, caches: list[Cache]) -> None:
    """Equal numbers of steps, and the batches together are an epoch: nothing twice and nothing left out."""
    mixed = mixture(caches)
    for number in range(3):
        parts = [epoch(mixed, plan(batching, devices=devices, device=d), number) for d in range(devices)]
        assert len({len(part) for part in parts}) == 1
        assert all(batch for part in parts for batch in part)
        assert sorted(i for part in parts for batch in part for i in batch) == list(range(len(mixed)))


def test_devices_and_accumulation_make_the_same_steps(caches: list[Cache]) -> None:
    """One device with four micro-batches a step, two with two each."""
    mixed = mixture(caches)
    one = epoch(mixed, plan("padded"), 0)
    two = [epoch(mixed, plan("padded", devices=2, device=d), 0) for d in (0, 1)]
    for step in range(len(one) // 4):
        ours = one[4 * step : 4 * step + 4]
        theirs = [batch for device in two for batch in device[2 * step : 2 * step + 2]]
        assert sorted(ours) == sorted(theirs)


def test_one_sequence_a_batch_leaves_out_what_no_device_can_share(caches: list[Cache]) -> None:
    mixed = Mixture([ShardDataset(caches[0], np.arange(57))])
    parts = [epoch(mixed, BatchPlan(sequences=1, devices=2, device=d), 0) for d in (0, 1)]
    drawn = [i for part in parts for batch in part for i in batch]
    assert len(drawn) == len(set(drawn)) == 56
    with pytest.raises(UserError, match="57 sequences to train on, fewer than the 60 devices"):
        epoch(mixed, BatchPlan(devices=60), 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 64), min_size=1, max_size=200), st.integers(64, 200), st.integers(0, 2**32 - 1))
def test_packed_batches_hold_the_budget_and_every_sequence(lengths: list[int], tokens: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(lengths))
    batches = packed(order, np.array(lengths), tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= tokens for batch in batches)
    # No two batches that were open together could have been one: all but a few are more than half full.
    assert sum(2 * sum(lengths[i] for i in batch) <= tokens for batch in batches) <= 1 + len(lengths) // 16


def test_packing_wastes_little_and_keeps_neighbours() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(16, 1024, 20_000)
    batches = packed(np.arange(len(lengths)), lengths, 4096)
    assert lengths.sum() / (len(batches) * 4096) > 0.97
    assert max(max(batch) - min(batch) for batch in batches) < 1000


def test_every_epoch_has_the_same_number_of_packed_batches(caches: list[Cache]) -> None:
    mixed = mixture(caches)
    lengths = lengths_of(mixed)
    counts = set()
    for number in range(50):
        batches = epoch(mixed, plan("packed"), number, epochs=50)
        counts.add(len(batches))
        assert sorted(i for batch in batches for i in batch) == list(range(len(mixed)))
        assert max(lengths[batch].sum() for batch in batches) <= 16
    assert len(counts) == 1


def test_length_groups_pad_less(caches: list[Cache]) -> None:
    mixed = mixture(caches)
    lengths = lengths_of(mixed)

    def padding(batching: str) -> int:
        return sum(
            lengths[batch].max() * len(batch) - lengths[batch].sum() for batch in epoch(mixed, plan(batching), 0)
        )

    assert padding("length-grouped") < 0.2 * padding("padded")


def test_shares() -> None:
    assert shares([96, 30], None).tolist() == [96, 30]
    assert shares([96, 30], (0.5, 0.5)).tolist() == [63, 63]
    assert shares([96, 30], (2, 1)).tolist() == [84, 42]
    assert shares([10, 10, 11], (1, 1, 1)).sum() == 31


def test_a_mix_draws_each_caches_share_and_sees_its_sequences_equally_often(caches: list[Cache]) -> None:
    mixed = mixture(caches, (0.5, 0.5))  # 96 and 30 sequences: 63 of each an epoch
    seen: Counter[int] = Counter()
    for number in range(10):
        order = mixed.order(3, number)
        assert (order < 96).sum() == (order >= 96).sum() == 63
        # The caches take turns all through the epoch.
        assert 0.2 < (order[:40] < 96).mean() < 0.8
        seen.update(order.tolist())
    large, small = [seen[i] for i in range(96)], [seen[i] for i in range(96, 126)]
    assert sum(large) == sum(small) == 630
    assert max(large) - min(large) <= 1
    assert set(small) == {21}


@pytest.mark.parametrize(("batching", "most"), [("padded", 1), ("packed", 2.5), ("length-grouped", 8)])
def test_few_shards_are_decoded_at_a_time(
    batching: str, most: float, caches: list[Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences are shuffled over windows of shards, and a padded epoch decodes each shard once.

    In these windows of 24 sequences a group of 128 lengths reaches over several, and a packed batch often over two.
    """
    mixed = mixture(caches[:1])
    batches = epoch(mixed, plan(batching), 0)
    decoded: list[int] = []
    read = Cache.read_shard

    def counted(cache: Cache, shard: int, columns: Any, **options: Any) -> Any:
        decoded.append(shard)
        return read(cache, shard, columns, **options)

    monkeypatch.setattr(Cache, "read_shard", counted)
    for batch in batches:
        mixed.__getitems__(batch)
    shards = len(caches[0].manifest.shards)
    assert sorted(set(decoded)) == list(range(shards))
    assert len(decoded) <= most * shards


def test_what_a_worker_gets_is_small_and_reads_the_same(caches: list[Cache], tmp_path: Path) -> None:
    mixed = mixture(caches)
    before = mixed[3]
    sent = pickle.dumps(mixed)
    assert len(sent) < 50_000
    after = pickle.loads(sent)[3]
    for name, value in before.__dict__.items():
        np.testing.assert_array_equal(value, after.__dict__[name])


class Lengths:
    """A cache of which only the number of sequences and their shards matter."""

    def __init__(self, sequences: int) -> None:
        self.shard_of = np.arange(sequences) // 7

    def __len__(self) -> int:
        return len(self.shard_of)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_packed_mixes_show_every_sequence_that_an_epoch_draws(data: st.DataObject) -> None:
    """Epoch by epoch, on any number of devices; a later epoch of a mix may need many more batches than the first."""
    sizes = data.draw(st.lists(st.integers(8, 60), min_size=2, max_size=3))
    mix = data.draw(st.lists(st.floats(0.05, 1), min_size=len(sizes), max_size=len(sizes)))
    devices, seed, epochs = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 99)), data.draw(st.integers(1, 6))
    random = np.random.default_rng(seed)
    # One cache of short and one of long sequences.
    lengths = np.concatenate([random.integers(2, 8 if i else 64, size) for i, size in enumerate(sizes)])
    mixed = Mixture([Lengths(size) for size in sizes], mix)  # type: ignore[list-item]
    parts = [
        EpochBatches(mixed, BatchPlan("packed", tokens=64, devices=devices, device=d), seed, lengths, lambda _: epochs)
        for d in range(devices)
    ]
    for number in range(epochs):
        order = mixed.order(seed, number)
        found = []
        for part in parts:
            part.set_epoch(number)
            batches = part._epoch_batches(number)[part._plan.device :: devices]
            assert len(batches) == len(part)
            assert all(batch and lengths[batch].sum() <= 64 for batch in batches)
            found += [i for batch in batches for i in batch]
        assert sorted(found) == sorted(order.tolist())


def test_as_many_epochs_are_planned_as_a_run_of_steps_has(caches: list[Cache]) -> None:
    mixed = mixture(caches)
    asked: list[int] = []

    def epochs(batches: int) -> int:
        asked.append(batches)
        return -(-1000 // batches)

    batches = EpochBatches(mixed, plan("packed"), 1, lengths_of(mixed), epochs)
    # A thousand steps, however many batches an epoch turned out to have.
    batches.set_epoch(-(-1000 // len(batches)) - 1)
    assert len(list(batches)) == len(batches) == asked[-1]
    batches.set_epoch(-(-1000 // len(batches)))
    with pytest.raises(ValueError, match="that were planned"):
        list(batches)
