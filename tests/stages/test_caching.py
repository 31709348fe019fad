"""What is cached where nothing is said; the teacher and the disk at work at the same time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.caching import DEFAULT_TAIL_SAMPLES, DEFAULT_TOP_N, DEFAULT_TOP_N_ALONE, CacheOptions
from stages.engines import EngineOptions
from stages.teacher import Scored
from stages.teacher_transformers import TransformersTeacher
from storage.cache import Cache


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
