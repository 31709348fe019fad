"""A cache opens in the tools that people have: losses come out of SQL, and `datasets` loads the directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pytest
import torch

from stages.divergence import divergences, student_terms, teacher_terms
from stages.objective import Objective
from stages.shard_dataset import Collator, ShardDataset, as_tensors, teacher_rows
from storage.cache import Cache
from tests.conftest import VOCABULARY

# One row per stored position. A list is unfolded with its places; entries lie one position after another.
POSITIONS = """
WITH places AS (
    SELECT sequence_id, input_ids, gold_logprob, tail_logmass, loss_mask, top_count, top_ids, top_logprobs,
           unnest(range(1, len(loss_mask) + 1)) AS t
    FROM read_parquet($shards)
)
SELECT sequence_id, t, input_ids[t + 1] AS gold, gold_logprob[t] AS gold_logprob, tail_logmass[t] AS tail,
       coalesce(list_sum(top_count[1:t - 1]), 0)::BIGINT AS first,
       top_count[t]::BIGINT AS entries, top_ids, top_logprobs
FROM places WHERE loss_mask[t]
"""
# KL from the teacher to the uniform distribution over V, the tail as one lump:
# sum_K p log(p V) + m log(m V / (V - |K|)).
KL = """
WITH positions AS ({positions}),
entries AS (
    SELECT sequence_id, t, gold, id, {logprob} AS logprob
    FROM (
        SELECT *, unnest(top_ids[first + 1:first + entries]) AS id,
               unnest(top_logprobs[first + 1:first + entries]) AS stored
        FROM positions
    )
),
kept AS (
    SELECT sequence_id, t, sum(CASE WHEN id = gold THEN 0 ELSE exp(logprob) * (logprob + ln({v})) END) AS nats,
           count(*) FILTER (WHERE id <> gold) + 1 AS ids
    FROM entries GROUP BY ALL
)
SELECT avg(-p.gold_logprob), avg(
    nats + exp(p.gold_logprob) * (p.gold_logprob + ln({v})) + exp(tail) * (tail + ln({v}) - ln({v} - ids))
)
FROM kept JOIN positions p USING (sequence_id, t)
"""


@pytest.fixture(scope="module", params=[16, 8])
def cache(request: pytest.FixtureRequest, make_cache: Callable[..., Any], tmp_path_factory: Any) -> Cache:
    return make_cache(tmp_path_factory.mktemp("open") / "cache", logprob_bits=request.param, tail_epsilon=0.2, limit=20)


@pytest.fixture(scope="module")
def expected(cache: Cache) -> tuple[float, float]:
    """Mean cross-entropy of the teacher and KL to the uniform distribution, by the project's own loss."""
    sequences = np.arange(cache.manifest.corpus.sequences)
    dataset = ShardDataset(cache, sequences)
    rows = teacher_rows(as_tensors(Collator(Objective("kl"), VOCABULARY).batch([dataset[i] for i in sequences])))
    student = student_terms(torch.zeros(len(rows), VOCABULARY), rows)
    found = divergences(student, teacher_terms(rows, "bucket")).whole
    return -rows.gold_logprob.double().mean().item(), found.double().mean().item()


def shards(cache: Cache) -> list[str]:
    return sorted(str(path) for path in (Path(cache.path) / "shards").glob("*.parquet"))


def test_duckdb_gives_the_same_losses(cache: Cache, expected: tuple[float, float]) -> None:
    logprob = "stored"
    if cache.manifest.scoring.logprob_bits == 8:
        found = duckdb.execute(
            "SELECT decode(value) FROM parquet_kv_metadata($1) WHERE decode(key) LIKE '%step'", [shards(cache)[0]]
        ).fetchone()
        assert found is not None
        logprob = f"-pow({float(found[0])} * stored, 2)"
    query = KL.format(positions=POSITIONS, logprob=logprob, v=VOCABULARY)
    found = duckdb.execute(query, {"shards": shards(cache)}).fetchone()
    # Where gold is nearly sure the project takes 1 - p(gold) from the entries; their rounding is the difference.
    assert found == pytest.approx(expected, rel=5e-3)
    assert found is not None and found[0] == pytest.approx(expected[0], rel=1e-5)


def test_polars_gives_the_same_losses(cache: Cache, expected: tuple[float, float]) -> None:
    frame = polars.read_parquet(shards(cache))
    counted = frame.select("sequence_id", polars.col("loss_mask", "gold_logprob", "tail_logmass", "top_count"))
    gold = frame.select("sequence_id", polars.col("input_ids").list.slice(1).alias("gold")).explode("gold")
    positions = counted.explode("loss_mask", "gold_logprob", "tail_logmass", "top_count").with_columns(gold["gold"])
    positions = positions.filter("loss_mask").with_row_index("at")
    at = positions.select(polars.col("at").repeat_by("top_count")).explode("at")
    entries = frame.select("top_ids", "top_logprobs").explode("top_ids", "top_logprobs").drop_nulls()
    logprob = polars.col("top_logprobs").cast(polars.Float64)
    if cache.manifest.scoring.logprob_bits == 8:
        logprob = -((0.025 * logprob) ** 2)
    nats = logprob.exp() * (logprob + np.log(VOCABULARY))
    kept = (
        entries.with_columns(at["at"])
        .join(positions.select("at", "gold"), on="at")
        .filter(polars.col("top_ids") != polars.col("gold"))
        .group_by("at")
        .agg(nats.sum().alias("nats"), polars.len().alias("ids"))
    )
    tail, own = polars.col("tail_logmass").cast(polars.Float64), polars.col("gold_logprob").cast(polars.Float64)
    whole = positions.join(kept, on="at", how="left").with_columns(polars.col("nats", "ids").fill_null(0))
    kl = (
        polars.col("nats")
        + own.exp() * (own + np.log(VOCABULARY))
        + tail.exp() * (tail + np.log(VOCABULARY) - (VOCABULARY - 1 - polars.col("ids")).log())
    )
    found = whole.select((-own).mean(), kl.mean().alias("kl")).row(0)
    assert found == pytest.approx(expected, rel=5e-3)


def test_datasets_loads_the_directory_as_it_stands(cache: Cache, tmp_path: Path) -> None:
    from datasets import load_dataset

    loaded = load_dataset(str(cache.path), cache_dir=str(tmp_path / "arrow"))
    assert list(loaded) == ["train"]
    assert len(loaded["train"]) == cache.manifest.corpus.sequences
    assert loaded["train"].column_names == [column.name for column in cache.manifest.scoring.columns]
    rows = cache.read_shard(0)
    first = loaded["train"][0]
    assert first["input_ids"] == rows["input_ids"][0].tolist()
    assert first["top_ids"] == rows["top_ids"][0].tolist()
    np.testing.assert_array_equal(np.array(first["tail_logmass"], np.float32), rows["tail_logmass"][0])
