"""Caches from caches: the same as caching directly, whole or not there, and refused by name where it cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.derivation import Selection, plan_selection, write
from storage.cache import Cache
from storage.errors import CacheError
from storage.files import sha256_file
from storage.rows import Rows
from tests.conftest import Tiny, texts

WIDE = {"top_n": 16, "temperatures": (2.0,), "logprob_bits": 32, "shard_tokens": 700}


def write_corpus(path: Path, rows: list[str]) -> str:
    """Prompts without a loss before completions of different lengths."""
    lines = [{"prompt": row[: 20 * (i % 6)], "completion": row[20 * (i % 6) :]} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpora")
    rows = [text[start : start + 300] for text in texts() for start in (0, 300)]
    a, b = write_corpus(folder / "a.jsonl", rows[:20]), write_corpus(folder / "b.jsonl", rows[20:34])
    (folder / "ab.jsonl").write_text(Path(a).read_text() + Path(b).read_text())
    return [a, b, str(folder / "ab.jsonl")]


@pytest.fixture(scope="module")
def wide(make_cache: Callable[..., Any], corpora: list[str], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("wide") / "cache", dataset=corpora[0], tail_samples=6, **WIDE)


def all_rows(cache: Cache) -> Rows:
    return Rows.concatenated([cache.read_shard(index) for index in cache.shards_here])


def digests(cache: Cache) -> dict[str, str]:
    root = Path(cache.path)
    return {str(path.relative_to(root)): sha256_file(path) for path in root.rglob("*.parquet")}


@pytest.mark.parametrize("kept", [{"top_n": 5}, {"tail_epsilon": 0.3, "min_n": 2}, {"tail_epsilon": 0.1, "top_n": 9}])
def test_equal_to_caching_with_less(
    kept: dict[str, Any], wide: Cache, corpora: list[str], make_cache: Callable[..., Any], tmp_path: Path, pipeline: Any
) -> None:
    """Entries, tails at both temperatures, tail prior, corpus and plan."""
    found, _ = write(plan_selection(wide, Selection(**kept)), str(tmp_path / "selected"))
    direct = make_cache(tmp_path / "direct", dataset=corpora[0], **{**WIDE, **{"top_n": 16} | kept}, tail_samples=6)
    assert pipeline("verify", found.path).code == 0
    assert found.manifest.corpus == direct.manifest.corpus and found.manifest.scoring == direct.manifest.scoring
    assert found.manifest.cache_id != direct.manifest.cache_id
    ours, theirs = all_rows(found), all_rows(direct)
    stored = ours["loss_mask"].values
    assert 0 < stored.sum() < len(stored)
    for name in ("input_ids", "loss_mask", "top_count", "top_ids"):
        assert np.array_equal(ours[name].values, theirs[name].values), name
        assert np.array_equal(ours[name].offsets, theirs[name].offsets), name
    for name in ("gold_logprob", "entropy", "top_logprobs"):
        np.testing.assert_allclose(ours[name].values, theirs[name].values, rtol=1e-3 * (name == "entropy"), atol=2e-6)
    for name in ("tail_logmass", "tail_logmass_T2"):
        np.testing.assert_allclose(ours[name].values[stored], theirs[name].values[stored], atol=1e-5)
    np.testing.assert_allclose(found.tail_prior(), direct.tail_prior(), atol=1e-6)


def test_rows_bits_and_columns(wide: Cache, tmp_path: Path, pipeline: Any, tiny: Tiny) -> None:
    """By range and by the share with a loss; a student trains from the result as from any cache."""
    options = ["--sequences", "3:15", "--min-loss-share", "0.6", "--logprob-bits", "8", "--tail-samples", "2"]
    ended = pipeline("select", wide.path, "-o", tmp_path / "small", *options, "--drop", "tail_logmass_T2")
    assert ended.code == 0 and "has no tail prior" in ended.err and wide.manifest.cache_id in ended.out
    cache = Cache.open(tmp_path / "small")
    assert pipeline("verify", cache.path).code == 0
    before, after = all_rows(wide), all_rows(cache)
    shares = [before["loss_mask"][row].mean() for row in range(len(before))]
    rows = [row for row in range(3, 15) if shares[row] >= 0.6]
    assert 0 < len(rows) < 12 and len(after) == len(rows)
    assert all(np.array_equal(after["input_ids"][i], before["input_ids"][row]) for i, row in enumerate(rows))
    assert list(after.sequence_id) == list(range(len(rows)))
    assert cache.tail_prior() is None and not list((Path(cache.path) / "tail_sums").iterdir())
    scoring = cache.manifest.scoring
    assert (scoring.logprob_bits, scoring.tail_samples, scoring.temperatures) == (8, 2, ())
    (origin,) = cache.manifest.derived_from
    assert (origin.cache_id, origin.first, origin.stop, origin.min_loss_share) == (wide.manifest.cache_id, 3, 15, 0.6)
    words = ["train-student", "--student", tiny.student, "--shards", cache.path, "--output", tmp_path / "student"]
    assert pipeline(*words, "--max-steps", 1, "--batch-size", 4).code == 0


def test_killed_between_shards_it_is_not_whole_and_goes_on(wide: Cache, tmp_path: Path) -> None:
    derivation = plan_selection(wide, Selection(top_n=4))
    assert len(derivation.parts) > 2

    def kill(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(derivation, str(tmp_path / "cache"), kill)
    half = Cache.open(tmp_path / "cache")
    assert not half.is_sealed and half.is_done(0) and not half.is_done(1)
    with pytest.raises(CacheError, match="unfinished"):
        half.receipts()
    again, _ = write(plan_selection(wide, Selection(top_n=4)), str(tmp_path / "cache"))
    once, _ = write(derivation, str(tmp_path / "once"))
    assert again.is_sealed and digests(again) == digests(once)
    with pytest.raises(CacheError, match="holds another cache"):
        write(plan_selection(wide, Selection(top_n=3)), str(tmp_path / "cache"))


def test_a_damaged_source_is_not_copied(wide: Cache, tmp_path: Path) -> None:
    shutil.copytree(wide.path, tmp_path / "source")
    source = Cache.open(tmp_path / "source")
    derivation = plan_selection(source, Selection(top_n=4))
    rows = source.read_shard(1)
    gold = np.roll(rows["gold_logprob"].values, 1)
    lists = {**rows.lists, "gold_logprob": type(rows["gold_logprob"])(gold, rows["gold_logprob"].offsets)}
    source.write_shard(1, Rows(rows.sequence_id, lists), source.tail_sum(1), 0.0)
    with pytest.raises(CacheError, match=r"part-00001.parquet.*positions shifted"):
        write(derivation, str(tmp_path / "cache"))
    assert not Cache.open(tmp_path / "cache").is_sealed


def test_merged_is_the_cache_of_both_corpora(
    wide: Cache, corpora: list[str], make_cache: Callable[..., Any], tmp_path: Path, pipeline: Any
) -> None:
    other = make_cache(tmp_path / "b", dataset=corpora[1], tail_samples=6, **WIDE)
    ended = pipeline("merge", wide.path, other.path, "-o", tmp_path / "both")
    assert ended.code == 0, ended.err
    both, direct = Cache.open(tmp_path / "both"), make_cache(tmp_path / "d", dataset=corpora[2], tail_samples=6, **WIDE)
    assert pipeline("verify", both.path).code == 0
    assert both.manifest.corpus == direct.manifest.corpus
    ours, theirs = all_rows(both), all_rows(direct)
    assert np.array_equal(ours.sequence_id, theirs.sequence_id)
    for name in theirs.lists:
        assert np.array_equal(ours[name].offsets, theirs[name].offsets), name
        if ours[name].values.dtype.kind == "f":
            np.testing.assert_allclose(ours[name].values.astype(float), theirs[name].values.astype(float), atol=2e-2)
    assert np.array_equal(ours["input_ids"].values, theirs["input_ids"].values)
    np.testing.assert_allclose(both.tail_prior(), direct.tail_prior(), atol=1e-6)
    assert [origin.cache_id for origin in both.manifest.derived_from] == [
        wide.manifest.cache_id,
        other.manifest.cache_id,
    ]


def test_shards_of_one_cache_that_lie_apart(wide: Cache, tmp_path: Path, pipeline: Any) -> None:
    count = len(wide.manifest.shards)
    for name, shards in (("first", "0:2"), ("rest", f"2:{count}")):
        assert pipeline("pull", wide.path, tmp_path / name, "--shards", shards).code == 0
    ended = pipeline("merge", tmp_path / "first", tmp_path / "rest", "-o", tmp_path / "whole")
    assert ended.code == 0, ended.err
    whole = Cache.open(tmp_path / "whole")
    assert pipeline("verify", whole.path).code == 0 and whole.manifest.corpus == wide.manifest.corpus
    ours, theirs = all_rows(whole), all_rows(wide)
    assert all(np.array_equal(ours[name].values, theirs[name].values) for name in theirs.lists)
    np.testing.assert_allclose(whole.tail_prior(), wide.tail_prior(), atol=1e-7)
    again = pipeline("merge", tmp_path / "first", wide.path, "-o", tmp_path / "no")
    assert again.code == 2 and "both hold the same shards" in again.err and not (tmp_path / "no").exists()


def test_behind_urls(s3: Any, cache_path: Path, tmp_path: Path, pipeline: Any) -> None:
    assert pipeline("push", cache_path, "s3://bucket/whole").code == 0
    ended = pipeline("select", "s3://bucket/whole", "-o", "s3://bucket/small", "--top-n", "3")
    assert ended.code == 0, ended.err
    assert pipeline("verify", "s3://bucket/small").code == 0
    write(plan_selection(Cache.open(cache_path), Selection(top_n=3)), str(tmp_path / "local"))
    ours, theirs = Cache.open("s3://bucket/small"), Cache.open(tmp_path / "local")
    assert ours.manifest == theirs.manifest
    assert [r.sha256 for r in ours.receipts()] == [r.sha256 for r in theirs.receipts()]


@pytest.fixture
def refused(wide: Cache, tmp_path: Path, pipeline: Any) -> Callable[..., str]:
    def call(*arguments: object) -> str:
        ended = pipeline(*arguments, "-o", tmp_path / "out")
        assert ended.code == 2, ended.err
        assert not (tmp_path / "out").exists()
        return ended.err

    return call


def test_what_cannot_be_is_refused_by_name(wide: Cache, cache_path: Path, refused: Callable[..., str]) -> None:
    source = wide.path
    assert "--top-n 20" in refused("select", source, "--top-n", 20)
    assert "--tail-samples 9" in refused("select", source, "--tail-samples", 9)
    assert "--logprob-bits 32" in refused("select", cache_path, "--logprob-bits", 32)
    assert "--min-n 3" in refused("select", source, "--min-n", 3)
    assert "--min-n 9: is above --top-n 4" in refused(
        "select", source, "--top-n", 4, "--tail-epsilon", 0.1, "--min-n", 9
    )
    assert "can do without tail_samples, entropy, tail_logmass_T2" in refused("select", source, "--drop", "top_ids")
    assert "--sequences" in refused("select", source, "--sequences", "500:")
    assert "FIRST:STOP" in refused("select", source, "--sequences", "all")
    assert "no sequence is left" in refused("select", source, "--min-loss-share", 1.0, "--sequences", "1:2")
    assert "top_n (8, not 16)" in refused("merge", source, cache_path)
    assert "at least two" in refused("merge", source)


def test_an_adaptive_source_cannot_be_made_to_keep_more(
    wide: Cache, tmp_path: Path, refused: Callable[..., str]
) -> None:
    adaptive, _ = write(plan_selection(wide, Selection(tail_epsilon=0.2, min_n=2)), str(tmp_path / "adaptive"))
    assert "--tail-epsilon 0.1" in refused("select", adaptive.path, "--tail-epsilon", 0.1)
    assert "--min-n 3" in refused("select", adaptive.path, "--min-n", 3)
    again, _ = write(plan_selection(adaptive, Selection(tail_epsilon=0.4, min_n=1)), str(tmp_path / "again"))
    once, _ = write(plan_selection(wide, Selection(tail_epsilon=0.4, min_n=1)), str(tmp_path / "once"))
    assert np.array_equal(all_rows(again)["top_ids"].values, all_rows(once)["top_ids"].values)


def test_the_source_itself_is_never_written(wide: Cache, pipeline: Any) -> None:
    before = digests(wide)
    ended = pipeline("select", wide.path, "-o", wide.path, "--top-n", 3)
    assert ended.code == 2 and digests(wide) == before


def test_a_sketch_goes_with_its_entries_or_is_left_out(
    make_cache: Callable[..., Any], tmp_path: Path, pipeline: Any, refused: Callable[..., str]
) -> None:
    """Rows and bits leave it as it is; fewer entries would make its residuals those of another tail."""
    cache = make_cache(tmp_path / "cache", sketch_rank=4, residual_samples=3, limit=12, shard_tokens=400)
    ended = pipeline("select", cache.path, "-o", tmp_path / "some", "--sequences", "2:9", "--logprob-bits", 8)
    assert ended.code == 0, ended.err
    some = Cache.open(tmp_path / "some")
    assert pipeline("verify", some.path).code == 0 and some.sketch_bytes() == cache.sketch_bytes()
    for row in range(7):
        assert np.array_equal(all_rows(some)["sketch_codes"][row], all_rows(cache)["sketch_codes"][row + 2])
    assert "--drop sketch_codes" in refused("select", cache.path, "--top-n", 3)
    ended = pipeline("select", cache.path, "-o", tmp_path / "few", "--top-n", 3, "--drop", "sketch_codes")
    assert ended.code == 0, ended.err
    assert pipeline("verify", tmp_path / "few").code == 0 and not (tmp_path / "few" / "sketch.safetensors").exists()
