"""Kept in less: what leaves the kept set is in the tail, and samples of it stay unbiased."""

from __future__ import annotations

import numpy as np
import pytest

from storage.manifest import Manifest
from storage.reencoding import reencode
from storage.rows import Ragged, Rows
from storage.shard import structure_problems, value_problems
from tests.storage.synthetic import make_manifest, make_rows

REPLAYS, VOCABULARY, KEPT = 20_000, 40, 12


def replays(samples: int, seed: int) -> tuple[Rows, np.ndarray, Manifest]:
    """One position many times, with samples drawn anew each time, and its distribution `[V]`. Gold is of rank 5."""
    random = np.random.default_rng(seed)
    p = np.sort(random.dirichlet(np.full(VOCABULARY, 0.7)))[::-1]
    ids = random.permutation(VOCABULARY)
    gold, tail = ids[5], p[KEPT:]
    drawn = random.choice(ids[KEPT:], (REPLAYS, samples), p=tail / tail.sum())
    one = np.arange(REPLAYS + 1)
    lists = {
        "input_ids": Ragged(np.tile([0, gold], REPLAYS).astype(np.int32), 2 * one),
        "loss_mask": Ragged(np.ones(REPLAYS, bool), one),
        "gold_logprob": Ragged(np.full(REPLAYS, np.log(p[5]), np.float32), one),
        "tail_logmass": Ragged(np.full(REPLAYS, np.log(tail.sum()), np.float32), one),
        "entropy": Ragged(np.full(REPLAYS, -(p * np.log(p)).sum(), np.float16), one),
        "top_count": Ragged(np.full(REPLAYS, KEPT, np.uint16), one),
        "top_ids": Ragged(np.tile(ids[:KEPT], REPLAYS).astype(np.int32), KEPT * one),
        "top_logprobs": Ragged(np.tile(np.log(p[:KEPT]), REPLAYS).astype(np.float32), KEPT * one),
        "tail_samples": Ragged(np.sort(drawn, 1).astype(np.int32).ravel(), samples * one),
    }
    probabilities = np.zeros(VOCABULARY)
    probabilities[ids] = p
    manifest = make_manifest(
        [2] * REPLAYS,
        vocabulary=VOCABULARY,
        shard_tokens=3 * REPLAYS,
        top_n=KEPT,
        tail_samples=samples,
        logprob_bits=32,
    )
    return Rows(np.arange(REPLAYS), lists), probabilities, manifest


@pytest.mark.parametrize(
    ("change", "samples"),
    [({"top_n": 3}, 8), ({"top_n": 11}, 3), ({"tail_samples": 3}, 8), ({"top_n": 4, "tail_samples": 2}, 5)],
)
def test_mixed_samples_are_unbiased(change: dict[str, int], samples: int) -> None:
    rows, p, manifest = replays(samples, seed=samples)
    new = manifest.scoring.model_copy(update=change)
    found, _ = reencode(rows, new, None, np.random.default_rng(1))
    drawn = found["tail_samples"].values.reshape(REPLAYS, new.tail_samples)
    tail = p.copy()
    tail[found["top_ids"][0]] = tail[rows["input_ids"][0][1]] = 0
    np.testing.assert_allclose(np.exp(found["tail_logmass"][0]), tail.sum(), rtol=1e-5)
    tail /= tail.sum()
    counts = np.zeros((REPLAYS, VOCABULARY))
    np.add.at(counts, (np.arange(REPLAYS)[:, None], drawn), 1.0)
    assert (counts[:, tail == 0] == 0).all()
    # Of an id that hardly comes at all, the variance of a count is its mean.
    spread = np.sqrt(np.where(tail < 1e-3, new.tail_samples * tail, counts.var(0)) / REPLAYS)
    assert (np.abs(counts.mean(0) - new.tail_samples * tail) <= 5 * spread + 1e-9).all()
    assert (np.diff(drawn, axis=1) >= 0).all()


@pytest.mark.parametrize("change", [{"top_n": 2}, {"tail_epsilon": 0.3}, {"tail_epsilon": 0.3, "min_n": 2, "top_n": 5}])
def test_the_rows_stay_true_to_the_format(change: dict[str, float]) -> None:
    manifest = make_manifest(top_n=8, vocabulary=50, tail_samples=4, temperatures=(2.0,), logprob_bits=32)
    scoring = type(manifest.scoring)(**{**manifest.scoring.model_dump(), **change})
    smaller = manifest.model_copy(update={"scoring": scoring})
    seen: set[int] = set()
    for index in range(len(manifest.shards)):
        rows, tail_sum = make_rows(manifest, index)
        direct, direct_sum = make_rows(smaller, index)
        found, found_sum = reencode(rows, scoring, tail_sum, np.random.default_rng(0))
        assert list(structure_problems(found, smaller, index)) == []
        assert value_problems(found, smaller) == []
        assert found_sum is not None
        if "tail_epsilon" in change:
            seen.update(found["top_count"].values.tolist())
            continue
        stored = rows["loss_mask"].values
        for name in ("top_ids", "top_logprobs", "top_count", "gold_logprob"):
            assert np.array_equal(found[name].values, direct[name].values), name
        for name in ("tail_logmass", "tail_logmass_T2"):
            np.testing.assert_allclose(found[name].values[stored], direct[name].values[stored], atol=1e-5)
        np.testing.assert_allclose(found_sum, direct_sum, atol=1e-5)
    assert len(seen) > 2 or "tail_epsilon" not in change


def test_an_empty_tail_that_gains() -> None:
    """All was kept, so there were no samples; then all of them come from what left."""
    manifest = make_manifest(top_n=9, vocabulary=9, tail_samples=6, logprob_bits=32)
    rows, _ = make_rows(make_manifest(top_n=9, vocabulary=9, logprob_bits=32), 1)
    stored = int(rows["loss_mask"].values.sum())
    before = np.concatenate([[0], np.cumsum(rows["loss_mask"].values)])[rows["loss_mask"].offsets]
    rows = Rows(rows.sequence_id, {**rows.lists, "tail_samples": Ragged(np.full(6 * stored, -1, np.int32), 6 * before)})
    new = manifest.scoring.model_copy(update={"top_n": 3})
    found, _ = reencode(rows, new, None, np.random.default_rng(0))
    assert (found["tail_samples"].values >= 0).all()
    assert value_problems(found, manifest.model_copy(update={"scoring": new})) == []
