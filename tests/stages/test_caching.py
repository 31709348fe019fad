"""The teacher and the disk at work at the same time, and what is held in memory meanwhile."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
