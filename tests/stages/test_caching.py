"""What is cached where nothing is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stages.caching import DEFAULT_TAIL_SAMPLES, DEFAULT_TOP_N, DEFAULT_TOP_N_ALONE, CacheOptions
from stages.engines import EngineOptions


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
