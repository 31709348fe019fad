"""An audit finds what is wrong with a cache that every checksum calls sound, and nothing where nothing is."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import audit, caching
from stages.differences import Differences
from stages.engines import EngineOptions
from stages.teacher_transformers import TransformersTeacher
from storage.cache import Cache
from storage.errors import CacheError
from storage.integrity import problems
from storage.rows import Ragged, Rows
from storage.transfer import copy_cache
from tests.conftest import Finished, Tiny, make_model
from tests.storage.s3 import Proxy
from tests.storage.synthetic import make_manifest, make_rows, replaced

# What 32 bits may do to a number, relative to it.
BITS_32 = 2.0**-20


def audited(cache: object, teacher: Path, **options: Any) -> audit.Audit:
    options = {**({} if "share" in options else {"sequences": 24}), **options}
    prepared = audit.prepare(audit.AuditOptions(str(cache), EngineOptions(str(teacher), "transformers"), **options))
    return audit.run(prepared, lambda tokens: None)


@pytest.fixture
def copied(cache_path: Path, tmp_path: Path) -> Cache:
    shutil.copytree(cache_path, tmp_path / "copied")
    return Cache.open(tmp_path / "copied")


def rewrite(cache: Cache, change: Callable[[Rows], Rows]) -> None:
    """Every shard written again with receipts and checksums that are right."""
    for index in range(len(cache.manifest.shards)):
        cache.write_shard(index, change(cache.read_shard(index)), cache.tail_sum(index), 0.0)


@pytest.mark.parametrize(
    "kept",
    [
        {"tail_samples": 3, "temperatures": (2.0,)},
        {"tail_samples": 3, "dtype": "bfloat16"},
        {"top_n": 32, "tail_epsilon": 0.3, "logprob_bits": 8, "tail_samples": 3},
        {"sketch_rank": 8, "residual_samples": 4, "logprob_bits": 32},
    ],
    ids=["float32", "bfloat16", "adaptive, 8 bits", "sketch"],
)
def test_a_cache_is_what_its_teacher_says(kept: dict, tiny: Tiny, make_cache: Any, tmp_path: Path) -> None:
    """Whatever it keeps."""
    cache = make_cache(tmp_path / "cache", **kept)
    found = audited(cache.path, tiny.teacher)
    assert found.passes and found.verdict == "the cache is what this teacher says"
    assert found.sequences == 24 and found.shards <= len(cache.manifest.shards)
    assert found.cache.spreads.keys() == {"gold", "top", "tail", "entropy"}
    assert found.cache.spreads["gold"].max < 1e-4
    assert found.cache.top1_agreement > 0.99
    assert found.cache.mean_kl < (1e-2 if kept.get("logprob_bits") == 8 else 1e-6)
    drawn, codes = found.cache.samples_that_differ, found.cache.codes_that_differ
    if "sketch_rank" in kept:
        assert drawn is None and codes is not None and codes < 0.01
    else:
        assert codes is None and drawn is not None and drawn < 0.01


def test_what_the_control_shows_as_noise_passes(tiny: Tiny, cache_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher whose numbers depend on the batch by 0.01 nats, ten times what passes where the control is quiet."""
    score, sizes = TransformersTeacher.score, []

    def noisy(self: TransformersTeacher, sequences: Any, progress: Any) -> Any:
        sizes.append(len(sequences))
        scored = score(self, sequences, progress)
        for one in scored.sequences:
            noise = np.random.default_rng([len(sizes), one.sequence.sequence_id]).normal(0, 0.01, len(one.gold_logprob))
            one.gold_logprob = (one.gold_logprob - np.abs(noise)).astype(np.float32)
        return scored

    monkeypatch.setattr(TransformersTeacher, "score", noisy)
    found = audited(cache_path, tiny.teacher)
    assert sizes[0] == 24 and sum(sizes[1:]) == 24 and max(sizes[1:]) == 3
    assert found.cache.spreads["gold"].max > 0.01 and found.control.spreads["gold"].max > 0.01
    assert found.passes
    assert audited(cache_path, tiny.teacher, threshold=0.001).beyond == ("gold",)


@pytest.mark.parametrize("change", ["trained", "other"])
def test_another_teacher(change: str, tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    """A little training of one matrix is enough, also where nothing but the numbers tells."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    if change == "other":
        make_model(tmp_path / "teacher", tokenizer, peak=20.0, seed=7)
    else:
        model = AutoModelForCausalLM.from_pretrained(tiny.teacher)
        with torch.no_grad():
            weight = model.model.layers[1].mlp.down_proj.weight
            weight.add_(0.02 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        model.save_pretrained(tmp_path / "teacher")
        tokenizer.save_pretrained(tmp_path / "teacher")
    found = audited(cache_path, tmp_path / "teacher")
    assert "gold" in found.beyond and found.identity_differences == ("other weights",)
    assert found.verdict.startswith("differs: log p(gold) by up to ")
    assert found.verdict.endswith("the manifest describes another teacher (other weights)")
    assert (found.cache.top1_agreement > 0.9) == (change == "trained")


def test_another_revision_of_a_hub_teacher(cache_path: Path, tiny: Tiny) -> None:
    from stages.pretrained import load_config, load_tokenizer

    config, tokenizer = load_config(str(tiny.teacher)), load_tokenizer(str(tiny.teacher))
    manifest = Cache.open(cache_path).manifest
    there = manifest.teacher.model_copy(update={"revision": "a" * 40, "weights": None})
    config._commit_hash = "b" * 40
    said = audit._identity_differences(manifest.model_copy(update={"teacher": there}), "org/name", config, tokenizer)
    assert said == ("revision aaaaaaaaaaaa, not bbbbbbbbbbbb",)


@pytest.mark.parametrize(("step", "where"), [(1, "after"), (-1, "before")])
def test_a_shift_by_one(step: int, where: str, copied: Cache, tiny: Tiny) -> None:
    """All numbers moved together within their sequences, so that they agree among themselves."""

    def shifted(rows: Rows) -> Rows:
        lists = {}
        for name in ("gold_logprob", "tail_logmass", "entropy"):
            lists[name] = np.concatenate([np.roll(rows[name][row], -step) for row in range(len(rows))])
        n = copied.manifest.scoring.top_n
        for name in ("top_ids", "top_logprobs"):
            moved = [np.roll(rows[name][row].reshape(-1, n), -step, 0).ravel() for row in range(len(rows))]
            lists[name] = np.concatenate(moved)
        return replaced(rows, **lists)

    rewrite(copied, shifted)
    found = audited(copied.path, tiny.teacher)
    assert set(found.beyond) == {"gold", "top", "tail", "entropy"}
    assert found.verdict.endswith(f"its numbers are those of the position {where}, so it is shifted by one")


def test_one_wrong_value_under_a_right_checksum(copied: Cache, tiny: Tiny) -> None:
    """Too little for `verify`, which knows only that gold is outside the top-N and rarer than its last entry."""
    place: list[tuple[int, int, int]] = []

    def wrong(rows: Rows) -> Rows:
        gold = rows["gold_logprob"].values.copy()
        if rows.sequence_id[0] == copied.manifest.shards[1].first:
            at = int(np.argmin(gold))
            row = int(np.searchsorted(rows["gold_logprob"].offsets, at, side="right")) - 1
            place.append((int(rows.sequence_id[row]), at - int(rows["gold_logprob"].offsets[row]), 1))
            gold[at] -= 0.5
        return replaced(rows, gold_logprob=gold)

    rewrite(copied, wrong)
    assert list(problems(copied)) == []
    found = audited(copied.path, tiny.teacher, share=1.0)
    assert found.beyond == ("gold",)
    assert (found.worst.sequence, found.worst.position, found.worst.shard) == place[0]
    assert found.cache.spreads["gold"].max == pytest.approx(0.5, abs=1e-4)
    assert "wrong at 1 of" in found.verdict and "part-00001.parquet" in found.verdict
    assert audited(copied.path, tiny.teacher, share=1.0, threshold=0.6).passes


def test_wrong_ids_in_the_top_n(copied: Cache, tiny: Tiny) -> None:
    """An id that the teacher does not list there differs by what it has too much, at least."""

    def wrong(rows: Rows) -> Rows:
        ids = rows["top_ids"].values.copy()
        n, vocabulary = copied.manifest.scoring.top_n, copied.manifest.vocabulary_size
        for first in range(0, len(ids), n):
            absent = np.setdiff1d(np.arange(vocabulary), ids[first : first + n])
            ids[first] = absent[first % len(absent)]
        return replaced(rows, top_ids=ids)

    rewrite(copied, wrong)
    found = audited(copied.path, tiny.teacher, sequences=5)
    assert found.beyond == ("top",)
    assert found.cache.top1_agreement == 0 and found.cache.ids_that_differ == pytest.approx(1 / 8)


def test_a_precision_that_the_manifest_does_not_name(
    tiny: Tiny, make_cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = caching.load
    monkeypatch.setattr(caching, "load", lambda *given, dtype, **more: load(*given, dtype="bfloat16", **more))
    cache = make_cache(tmp_path / "cache")
    assert cache.manifest.scoring.dtype == "float32"
    found = audited(cache.path, tiny.teacher)
    assert "gold" in found.beyond and not found.identity_differences
    assert found.verdict.endswith("small and everywhere, as another precision or engine makes it")
    assert audited(cache.path, tiny.teacher, dtype="bfloat16").passes


def test_an_unfinished_cache_is_refused_before_a_teacher_is_loaded(copied: Cache, tiny: Tiny) -> None:
    for path in (copied.shard_path(0), copied.receipt_path(0)):
        Path(str(path)).unlink()
    options = audit.AuditOptions(str(copied.path), EngineOptions(str(tiny.teacher), "transformers"))
    with pytest.raises(CacheError, match="unfinished, 1 of"):
        audit.prepare(options)


def test_the_sample_is_drawn_over_all_rows(cache_path: Path) -> None:
    cache = Cache.open(cache_path)
    total = cache.manifest.corpus.sequences
    counts = np.zeros(total)
    for seed in range(400):
        sample = audit.draw(cache, 7, None, seed)
        assert len(set(sample.tolist())) == 7 and (np.diff(sample) > 0).all()
        counts[sample] += 1
    expected = 400 * 7 / total
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)
    np.testing.assert_array_equal(audit.draw(cache, 7, None, 3), audit.draw(cache, 7, None, 3))
    assert len(audit.draw(cache, None, 0.5, 3)) == round(total / 2)
    assert len(audit.draw(cache, 10**6, None, 3)) == total


def test_only_the_shards_of_the_sample_are_fetched(cache_path: Path, tiny: Tiny, s3: Proxy) -> None:
    copy_cache(Cache.open(cache_path), "s3://bucket/cache")
    s3.seen.clear()
    found = audited("s3://bucket/cache", tiny.teacher, sequences=2)
    assert found.passes and found.shards <= 2
    assert len({path for method, path, _ in s3.seen if path.endswith(".parquet")}) == found.shards


def test_differences_against_plain_loops() -> None:
    """Spreads and the divergence, position by position, of two made-up teachers that share some of their top-N."""
    manifest = make_manifest([5, 2, 7, 4, 6, 3], vocabulary=12, shard_tokens=100, logprob_bits=32)
    one, _ = make_rows(manifest, 0, seed=1)
    other, _ = make_rows(manifest, 0, seed=2)
    other = replaced(other, input_ids=one["input_ids"].values, loss_mask=one["loss_mask"].values)
    gold_ids = np.concatenate([one["input_ids"][row][1:] for row in range(len(one))])
    stored = np.flatnonzero(one["loss_mask"].values)
    # The top-N of made-up rows follow their own masks: give both sides entries for the same positions.
    sides = []
    for rows, seed in ((one, 3), (other, 4)):
        random = np.random.default_rng(seed)
        gold, tail = rows["gold_logprob"].values.copy(), rows["tail_logmass"].values.copy()
        ids, logprobs = [], []
        for position in stored:
            p = random.dirichlet(np.full(12, 0.5))
            top = np.argsort(-p)[:4]
            ids.append(top)
            logprobs.append(np.log(p[top]))
            gold[position] = math.log(p[gold_ids[position]])
            tail[position] = math.log(max(p.sum() - p[list({*top, gold_ids[position]})].sum(), 1e-30))
        entries = {"top_ids": np.concatenate(ids), "top_logprobs": np.concatenate(logprobs)}
        lists = {name: Ragged(values, one[name].offsets) for name, values in entries.items()}
        counts = np.where(one["loss_mask"].values, 4, 0)
        made = replaced(rows, gold_logprob=gold, tail_logmass=tail, top_count=counts)
        made = Rows(one.sequence_id, {**made.lists, **lists})
        sides.append(made)
    differences = Differences(manifest)
    differences.add(*sides)
    found = differences.comparison()

    expected, apart = [], []
    for place, position in enumerate(stored):
        gold_id = gold_ids[position]
        listed = []
        for side in sides:
            entries = slice(4 * place, 4 * place + 4)
            known = dict(zip(side["top_ids"].values[entries], side["top_logprobs"].values[entries], strict=True))
            listed.append((known, side["gold_logprob"].values[position], side["tail_logmass"].values[position]))
        (a, gold_a, tail_a), (b, gold_b, tail_b) = listed
        terms = [(math.exp(gold_a), math.exp(gold_b))]
        terms += [(math.exp(a[i]), math.exp(b[i])) for i in a.keys() & b.keys() if i != gold_id]
        lump_a = math.exp(tail_a) + sum(math.exp(a[i]) for i in a.keys() - b.keys() - {gold_id})
        lump_b = math.exp(tail_b) + sum(math.exp(b[i]) for i in b.keys() - a.keys() - {gold_id})
        expected.append(sum(p * math.log(p / q) - p + q for p, q in [*terms, (lump_a, lump_b)]))
        for i in a.keys() | b.keys():
            if i in a and i in b:
                apart.append(abs(a[i] - b[i]) - BITS_32 * abs(a[i]))
                continue
            here, there = (a[i], (gold_b, b)) if i in a else (b[i], (gold_a, a))
            least = there[0] if i == gold_id else min(there[1].values())
            apart.append(max(0.0, here - least - BITS_32 * (abs(here) + abs(least))))
    assert found.mean_kl == pytest.approx(np.mean(expected), rel=1e-9)
    assert found.max_kl == pytest.approx(np.max(expected), rel=1e-9)
    spread = found.spreads["top"]
    assert (spread.count, spread.max) == (len(apart), pytest.approx(max(apart)))
    assert spread.mean == pytest.approx(np.mean(apart))
    gold = np.abs(sides[0]["gold_logprob"].values.astype(float) - sides[1]["gold_logprob"].values)
    assert found.spreads["gold"].p99 == pytest.approx(np.quantile(gold, 0.99))


def test_the_command(tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Finished]) -> None:
    base = ["audit", cache_path, "--teacher", tiny.teacher, "--engine", "transformers", "--sequences", 6]
    done = pipeline(*base)
    assert done.code == 0, done.err
    assert "verdict: the cache is what this teacher says" in done.out
    assert "log p(gold)\t" in done.out
    told = json.loads(pipeline(*base, "--json").out)
    assert told["passes"] is True and told["sequences"] == 6 and told["cache"]["spreads"]["gold"]["max"] < 1e-4

    from transformers import AutoTokenizer

    make_model(tmp_path / "other", AutoTokenizer.from_pretrained(tiny.tokenizer), peak=20.0, seed=3)
    base[3] = tmp_path / "other"
    done = pipeline(*base, "--json")
    assert done.code == 1 and json.loads(done.out)["passes"] is False
    assert done.err.splitlines()[-1].startswith(f"error: {cache_path}: differs: log p(gold) by up to ")

    done = pipeline(*base, "--share", 0.5)
    assert done.code == 2 and "give one of them" in done.err

    make_model(tmp_path / "wide", AutoTokenizer.from_pretrained(tiny.tokenizer), vocab_size=512)
    base[3] = tmp_path / "wide"
    done = pipeline(*base)
    assert done.code == 2 and "its vocabulary has 512 tokens" in done.err and "auditing" not in done.err
