"""What is cached where nothing is said; the teacher and the disk at work at the same time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.cache_options import DEFAULT_TAIL_SAMPLES, DEFAULT_TOP_N, DEFAULT_TOP_N_ALONE, CacheOptions
from stages.divergence import teacher_terms
from stages.engines import EngineOptions
from stages.objective import Objective
from stages.scored_rows import rounded
from stages.shard_dataset import Collator, ShardDataset, as_tensors, teacher_rows
from stages.teacher import Scored
from stages.teacher_transformers import TransformersTeacher
from storage.cache import Cache
from storage.errors import CacheError
from storage.rows import Ragged, Rows
from storage.shard import value_problems
from tests import reference
from tests.conftest import Tiny
from tests.storage.synthetic import make_manifest


def test_float16_is_rounded_as_numpy_rounds() -> None:
    """Ties, subnormals and what lies beyond the last float16 too."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        between = (halves.astype(np.float32) + np.nextafter(halves, np.float16(-np.inf)).astype(np.float32)) / 2
        values = np.concatenate([halves, between, np.float32([-65519.9, -65520, -1e30, -1e-9, -0.0])])
        np.testing.assert_array_equal(rounded(values, 16), values.astype(np.float16))
    assert rounded(values, 32) is values


def test_the_teacher_never_waits_for_the_disk(
    make_cache: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard is not written before the teacher is asked for the next one, and no shard outlives its writing."""
    asked = threading.Semaphore(0)  # by how many shards the teacher is ahead
    alive: list[weakref.ref[Scored]] = []
    most = 0
    score, write_shard = TransformersTeacher.score, Cache.write_shard

    def counting(self: TransformersTeacher, *arguments: Any) -> Scored:
        nonlocal most
        asked.release()
        most = max(most, sum(scored() is not None for scored in alive))
        scored = score(self, *arguments)
        alive.append(weakref.ref(scored))
        return scored

    def slowly(self: Cache, index: int, *arguments: Any, **more: Any) -> None:
        asked.acquire()  # the one for this shard
        if index + 1 < len(self.manifest.shards):
            assert asked.acquire(timeout=30), "the teacher waits for the disk"
            asked.release()
        write_shard(self, index, *arguments, **more)

    # It scores a few tokens before the first shard.
    monkeypatch.setattr("stages.caching.check_causal", lambda *_: None)
    monkeypatch.setattr(TransformersTeacher, "score", counting)
    monkeypatch.setattr(Cache, "write_shard", slowly)
    cache = make_cache(tmp_path / "cache")
    assert len(cache.manifest.shards) == len(alive) > 4
    assert most <= 1  # beside the one that is being scored


@pytest.mark.parametrize(
    ("engine", "given", "samples"),
    [
        ({}, None, DEFAULT_TAIL_SAMPLES),
        ({"engine": "vllm"}, None, DEFAULT_TAIL_SAMPLES),
        ({"engine": "vllm", "vllm_route": "prompt-logprobs"}, None, 0),
        ({"engine": "server"}, None, 0),
        ({"server_url": "http://gpu7:8000"}, None, 0),
        ({"engine": "server"}, 5, 5),
        ({}, 0, 0),
    ],
)
def test_tail_samples_are_drawn_where_the_engine_can(engine: dict, given: int | None, samples: int) -> None:
    options = CacheOptions(EngineOptions("teacher", **engine), "data.jsonl", "cache", tail_samples=given)
    assert options.statistics().tail_samples == samples
    assert options.statistics().top_n == (DEFAULT_TOP_N if samples else DEFAULT_TOP_N_ALONE)
    assert replace(options, temperatures=(2.0,)).statistics().top_n == DEFAULT_TOP_N_ALONE
    assert replace(options, top_n=9).statistics().top_n == 9
    assert replace(options, tail_epsilon=0.1).statistics().top_n == DEFAULT_TOP_N_ALONE


def test_a_cache_of_adaptive_n(make_cache: Callable[..., Any], tiny: Tiny, tmp_path: Path, pipeline: Callable) -> None:
    """What the shards say is the teacher's, position by position; it verifies, and students train from it."""
    epsilon, cap, floor = 0.25, 24, 2
    cache = make_cache(tmp_path / "a", top_n=cap, tail_epsilon=epsilon, min_n=floor, tail_samples=4, logprob_bits=32)
    assert pipeline("verify", cache.path).code == 0
    assert "2 to 24, until less than 0.25 is left" in pipeline("inspect", cache.path).out
    model = AutoModelForCausalLM.from_pretrained(tiny.teacher).double()
    rows = cache.read_shard(0)
    for row in range(3):
        ids, counts = rows["input_ids"][row], rows["top_count"][row]
        ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0].detach().numpy()
        for position in range(0, len(counts), 7):
            gold = int(ids[position + 1])
            for count in range(floor, cap + 1):
                expected = reference.position_statistics(logits[position], gold, count)
                if np.exp(expected["tail_logmass"]) < epsilon:
                    break
            assert counts[position] == count
            entries = slice(ends[position], ends[position + 1])
            assert rows["top_ids"][row][entries].tolist() == expected["top_ids"].tolist()
            np.testing.assert_allclose(rows["top_logprobs"][row][entries], expected["top_logprobs"], atol=1e-4)
            np.testing.assert_allclose(rows["tail_logmass"][row][position], expected["tail_logmass"], atol=1e-4)
    assert len(set(rows["top_count"].values)) > 4
    dataset = ShardDataset(cache, np.arange(3), extra=("tail_samples",))
    batch = Collator(Objective("kl"), cache.manifest.vocabulary_size).batch([dataset[i] for i in range(3)])
    terms = teacher_terms(teacher_rows(as_tensors(batch)), "sampled")
    total = terms.gold.exp() + terms.nongold.exp() * (terms.entries.exp().sum(1) + terms.tail.exp())
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-4, rtol=0)
    with pytest.raises(CacheError, match=r"scoring.tail_epsilon: 0.25, not 0.5"):
        make_cache(cache.path, top_n=cap, tail_epsilon=0.5, min_n=floor, tail_samples=4, logprob_bits=32)
    heavier = rows["tail_logmass"].values.copy()
    counts = rows["top_count"].values
    heavier[np.argmax((counts > 0) & (counts < cap))] = np.log(0.3)
    changed = Rows(rows.sequence_id, {**rows.lists, "tail_logmass": Ragged(heavier, rows["tail_logmass"].offsets)})
    assert any("only where less than 0.25 is left" in problem for problem in value_problems(changed, cache.manifest))


def test_an_identity_from_before_adaptive_n() -> None:
    """Caches that were made when the fields did not exist keep their id."""
    manifest = make_manifest()
    assert "tail_epsilon" not in manifest.identity["scoring"]
    adaptive = make_manifest(tail_epsilon=0.1)
    assert adaptive.identity["scoring"]["tail_epsilon"] == 0.1 and adaptive.cache_id != manifest.cache_id


@pytest.mark.parametrize("arguments", [["--min-n", "9", "--tail-epsilon", "0.1"], ["--min-n", "2"]])
def test_a_floor_that_cannot_be(arguments: list[str], tiny: Tiny, tmp_path: Path, pipeline: Callable) -> None:
    given = ["--teacher", tiny.teacher, "--dataset", tiny.corpus, "--output", tmp_path / "c", "--top-n", "8"]
    ended = pipeline("cache-teacher", *given, *arguments)
    assert ended.code == 2 and "--min-n" in ended.err and not (tmp_path / "c").exists()
