"""A tokenizer of somebody else is a program: it is tried in a process with limits before this one loads it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages import compatibility
from stages.identity import tokenizer_identity
from stages.pretrained import load_tokenizer

JSON = dict[str, Any]


def explodes(tokenizer: JSON) -> None:
    """Each step makes a hundred letters of one."""
    steps = [{"type": "Replace", "pattern": {"Regex": "."}, "content": "ab" * 50}] * 8
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}


def backtracks(tokenizer: JSON) -> None:
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": "((.+)+)+(?<=\x00)"},
                "behavior": "Isolated",
                "invert": False,
            },
            tokenizer["pre_tokenizer"],
        ],
    }


def prepends(tokenizer: JSON) -> None:
    tokenizer["normalizer"] = {"type": "Prepend", "prepend": "x " * (1 << 25)}


def is_no_tokenizer(tokenizer: JSON) -> None:
    tokenizer["model"]["vocab"] = {"a": 1 << 40}


@pytest.fixture(params=[explodes, backtracks, prepends, is_no_tokenizer])
def attacked(request: pytest.FixtureRequest, cache_path: Path, tmp_path: Path) -> Path:
    cache = tmp_path / "cache"
    shutil.copytree(cache_path, cache)
    path = cache / "tokenizer/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    request.param(tokenizer)
    path.write_text(json.dumps(tokenizer))
    return cache


@pytest.mark.parametrize("name", ["verify", "inspect", "train-student"])
def test_a_tokenizer_is_refused_within_its_limits(
    attacked: Path, name: str, tmp_path: Path, pipeline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_TOKENIZER_SECONDS", "3")
    monkeypatch.setenv("PIPELINE_TOKENIZER_MEMORY", str(1 << 30))
    words = {"train-student": ["train-student", "--shards", attacked, "--output", tmp_path / "out", "--student", "x"]}
    begin = time.monotonic()
    ended = pipeline(*words.get(name, [name, attacked]))
    assert ended.code and "internal" not in ended.err, ended.err
    assert time.monotonic() - begin < 20
    if name != "train-student":
        assert "tokenizer" in ended.err + ended.out


def test_the_limits_are_named(
    attacked: Path, pipeline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("PIPELINE_TOKENIZER_SECONDS", "2")
    monkeypatch.setenv("PIPELINE_TOKENIZER_MEMORY", str(1 << 30))
    said = pipeline("verify", attacked).out
    if "is_no_tokenizer" in request.node.name:
        assert said.startswith(f"{attacked}/tokenizer: no tokenizer can be loaded"), said
        return
    assert "the trial of this tokenizer" in said and "PIPELINE_TOKENIZER_SECONDS" in said, said
    assert any(
        reason in said for reason in ("takes more than 2 s", "bytes of memory", "ends the process", "fails with")
    )


def test_text_that_explodes_is_not_shown(
    cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder is no part of what a trial encodes; `inspect` and `--masks` use it within the same limits."""
    cache = tmp_path / "cache"
    shutil.copytree(cache_path, cache)
    path = cache / "tokenizer/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    step = {"type": "Replace", "pattern": {"Regex": "."}, "content": "ab" * 50}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"], *[step] * 5]}
    path.write_text(json.dumps(tokenizer))
    assert (
        tokenizer_identity(load_tokenizer(str(path.parent))) == compatibility.Cache.open(str(cache)).manifest.tokenizer
    )
    monkeypatch.setenv("PIPELINE_TOKENIZER_SECONDS", "5")
    monkeypatch.setenv("PIPELINE_TOKENIZER_MEMORY", str(1 << 30))
    for words in (["inspect", cache], ["inspect", cache, "--masks"]):
        ended = pipeline(*words)
        assert ended.code and "to make text with this tokenizer" in ended.err, ended.err
        assert len(ended.out) < 10_000


def test_a_tokenizer_is_tried_once(cache_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []
    whole = compatibility.limited
    monkeypatch.setattr(compatibility, "limited", lambda *given, **named: tries.append(1) or whole(*given, **named))
    compatibility._tried.cache_clear()
    for _ in range(3):
        cache = compatibility.Cache.open(str(cache_path))
        found = compatibility.cache_tokenizer(cache)
        assert tokenizer_identity(found) == cache.manifest.tokenizer
    assert len(tries) == 1
