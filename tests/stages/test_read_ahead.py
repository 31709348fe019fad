"""Shards behind a URL come while others are trained on: before they are needed, and never too many."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.batching import BatchPlan, EpochBatches
from stages.mixing import Mixture
from stages.read_ahead import AHEAD
from stages.shard_dataset import KEPT, ShardDataset
from storage import copies
from storage.cache import Cache
from storage.transfer import copy_cache
from tests.storage.s3 import Fault, Proxy
from tests.storage.synthetic import LENGTHS, make_manifest, write_cache

URL = "s3://bucket/cache"
SEED = 5


@pytest.fixture
def local(tmp_path: Path) -> Cache:
    cache = write_cache(tmp_path / "local", make_manifest(LENGTHS * 6, shard_tokens=20, vocabulary=40))
    cache.write_tokenizer(lambda folder: (folder / "tokenizer_config.json").write_text("{}"))
    return cache


@pytest.fixture
def mixture(local: Cache, s3: Proxy) -> Mixture:
    """Of the remote cache, its receipts known, as they are once a run is prepared."""
    copy_cache(local, URL)
    cache = Cache.open(URL)
    cache.receipts()
    s3.seen.clear()
    return Mixture([ShardDataset(cache, np.arange(cache.manifest.corpus.sequences))])


def batches(mixture: Mixture) -> EpochBatches:
    return EpochBatches(mixture, BatchPlan("padded", sequences=2), SEED)


def fetched(s3: Proxy) -> list[str]:
    return [path.rpartition("/")[2] for method, path, _ in s3.seen if method == "GET" and path.endswith(".parquet")]


def shard_names(mixture: Mixture, indices: list[int]) -> set[str]:
    return {f"part-{shard:05d}.parquet" for shard in mixture.places(np.array(indices))[1]}


def settle() -> None:
    """Until nothing is under way: every thread that fetches has taken up this, which comes last."""
    if (pool := copies._prefetchers.get(os.getpid())) is not None:
        together = threading.Barrier(copies.PREFETCHERS + 1)
        for _ in range(copies.PREFETCHERS):
            pool.submit(together.wait)
        together.wait(30)


def test_what_comes_next_is_fetched_while_a_batch_is_trained_on(mixture: Mixture, s3: Proxy) -> None:
    """Only those of the first batch are fetched by their reader, none is fetched twice, and few are ahead."""
    needed: set[str] = set()
    for number, batch in enumerate(batches(mixture)):
        settle()
        there = set(fetched(s3))
        now = shard_names(mixture, batch)
        assert number == 0 or now <= there | needed
        needed |= now
        assert len(there - needed) <= AHEAD
        before = len(fetched(s3))
        for index in batch:
            mixture[index]
        assert len(fetched(s3)) - before <= (len(now) if number == 0 else 0)
    assert len(fetched(s3)) == len(set(fetched(s3))) == len(mixture.parts[0].cache.manifest.shards)


def test_a_run_that_skips_batches_asks_for_few(mixture: Mixture, s3: Proxy) -> None:
    """All batches are passed over while the line is slow."""
    s3.faults.append(Fault("slow", 10**6, lambda method, path: path.endswith(".parquet")))
    for _ in batches(mixture):
        pass
    settle()
    assert 0 < len(fetched(s3)) <= 2 * AHEAD < len(mixture.parts[0].cache.manifest.shards)


def test_little_room_is_left_to_what_is_being_read(
    mixture: Mixture, s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(receipt.bytes for receipt in mixture.parts[0].cache.receipts())
    monkeypatch.setenv("PIPELINE_COPIES_BYTES", str(largest * (KEPT + AHEAD) // 2))
    s3.seen.clear()
    for _ in batches(mixture):
        pass
    settle()
    assert fetched(s3) == []


def test_local_caches_are_left_alone(local: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a local shard needs no fetching")

    monkeypatch.setattr(Cache, "prefetch", never)
    assert len(list(batches(Mixture([ShardDataset(local, np.arange(36))])))) == 18
