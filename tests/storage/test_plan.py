"""The plan is a partition of the corpus, decided by its lengths alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.plan import default_shard_tokens, plan_shards

LENGTHS = st.lists(st.integers(2, 5000), min_size=1, max_size=60)
BUDGET = st.integers(2, 20_000)


@given(LENGTHS, BUDGET)
def test_every_sequence_stands_in_exactly_one_shard_in_order(lengths: list[int], budget: int) -> None:
    shards = plan_shards(np.array(lengths, np.int32), budget)
    covered = [i for shard in shards for i in range(shard.first, shard.first + shard.sequences)]
    assert covered == list(range(len(lengths)))
    for shard in shards:
        assert shard.tokens == sum(lengths[shard.first : shard.first + shard.sequences])


@given(LENGTHS, BUDGET)
def test_a_shard_keeps_the_budget_and_could_hold_no_more(lengths: list[int], budget: int) -> None:
    for shard in plan_shards(np.array(lengths), budget):
        assert shard.tokens <= budget or shard.sequences == 1
        after = shard.first + shard.sequences
        if after < len(lengths):
            assert shard.tokens + lengths[after] > budget


@given(LENGTHS, BUDGET, LENGTHS)
def test_what_comes_later_changes_no_earlier_shard(lengths: list[int], budget: int, more: list[int]) -> None:
    before = plan_shards(np.array(lengths), budget)
    assert plan_shards(np.array(lengths + more), budget)[: len(before) - 1] == before[:-1]


@given(LENGTHS, BUDGET)
def test_the_dtype_of_the_lengths_does_not_matter(lengths: list[int], budget: int) -> None:
    assert plan_shards(np.array(lengths, np.int32), budget) == plan_shards(np.array(lengths, np.int64), budget)


def test_sums_beyond_32_bits() -> None:
    shards = plan_shards(np.full(5, 2**30, np.int32), 2**31)
    assert [(shard.first, shard.sequences, shard.tokens) for shard in shards] == [
        (0, 2, 2**31),
        (2, 2, 2**31),
        (4, 1, 2**30),
    ]
    assert isinstance(shards[0].first, int)


def test_no_sequences_no_shards() -> None:
    assert plan_shards(np.zeros(0, np.int32), 100) == ()


@pytest.mark.parametrize(
    ("tokens", "shard"),
    [
        (0, 1 << 14),
        (100, 1 << 14),
        (1 << 20, 1 << 14),
        ((1 << 20) + 1, (1 << 14) + 1),
        (1 << 24, 1 << 18),
        (1 << 30, 1 << 18),
    ],
)
def test_the_default_shards_of_a_small_corpus_are_small(tokens: int, shard: int) -> None:
    assert default_shard_tokens(np.array([tokens], np.int64)) == shard


def test_the_default_plan_is_that_of_its_shard_tokens() -> None:
    lengths = np.full(1000, 512, np.int32)
    shards = plan_shards(lengths, None)
    assert shards == plan_shards(lengths, 1 << 14)
    assert len(shards) == 32
