"""Off by one is the commonest bug of every system of this kind: a teacher whose answers are known shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.cache_options import CacheOptions
from stages.caching import prepare, run
from stages.corpus import Sequence
from stages.engines import EngineOptions
from stages.scored_rows import rows_from_scored
from stages.statistics import StatisticsOptions
from stages.teacher_transformers import TransformersTeacher, batches_by_tokens
from storage.rows import Ragged, Rows
from storage.shard import value_problems
from tests.conftest import Tiny, make_model

SHIFT = 7


@pytest.fixture(scope="module")
def knowing_teacher(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that after token i always says i + SHIFT: orthogonal embeddings, silent layers, a permuted head."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("knowing")
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    model = make_model(path, tokenizer, hidden=512, num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(512)[: model.config.vocab_size])
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        vocabulary = model.config.vocab_size
        model.lm_head.weight.zero_()
        model.lm_head.weight[(torch.arange(vocabulary) + SHIFT) % vocabulary, torch.arange(vocabulary)] = 1.0
    model.save_pretrained(path)
    return path


def test_every_position_answers_its_own_token(knowing_teacher: Path, tmp_path: Path) -> None:
    """Sequences that the teacher predicts perfectly: gold is certain at each position, and it is the right gold."""
    rows = [[start + SHIFT * step for step in range(length)] for start, length in [(1, 9), (5, 2), (30, 40)]]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    options = CacheOptions(
        EngineOptions(str(knowing_teacher), "transformers"), str(tmp_path / "c.jsonl"), str(tmp_path / "cache"), top_n=3
    )
    cache, _ = run(prepare(options), lambda tokens: None)
    stored = cache.read_shard(0)
    for row, ids in enumerate(rows):
        assert stored["input_ids"][row].tolist() == ids
        assert len(stored["gold_logprob"][row]) == len(ids) - 1
        assert (stored["gold_logprob"][row] > -1e-3).all()
        assert stored["top_ids"][row].reshape(-1, 3)[:, 0].tolist() == ids[1:]


def shifted(rows: Rows, names: tuple[str, ...]) -> Rows:
    """The same rows with the values of some columns moved by one position."""
    lists = dict(rows.lists)
    for name in names:
        values = lists[name].values
        step = len(values) // len(rows["gold_logprob"].values)
        lists[name] = Ragged(np.roll(values, step), lists[name].offsets)
    return replace(rows, lists=lists)


@pytest.mark.parametrize(
    "names",
    [("gold_logprob",), ("top_ids", "top_logprobs"), ("gold_logprob", "top_ids", "top_logprobs", "tail_logmass")],
)
def test_a_shift_by_one_is_found(names: tuple[str, ...], cache_path: Path) -> None:
    from storage.cache import Cache

    cache = Cache.open(cache_path)
    rows = cache.read_shard(0)
    assert not list(value_problems(rows, cache.manifest))
    assert any("shifted" in problem for problem in value_problems(shifted(rows, names), cache.manifest))


def test_a_shifted_cache_is_not_trained_from(
    cache_path: Path, tiny: Tiny, tmp_path: Path, make_cache: Callable[..., Any], pipeline: Callable[..., Any]
) -> None:
    """A cache that is whole by its checksums but shifted inside, as another program might write it."""
    from storage.cache import Cache

    cache = make_cache(tmp_path / "cache")
    for index in range(len(cache.manifest.shards)):
        rows = Cache.open(cache_path).read_shard(index)
        cache.write_shard(index, shifted(rows, ("gold_logprob",)), np.zeros(509), 0.0)
    trained = pipeline(
        "train-student",
        "--student",
        tiny.student,
        "--shards",
        cache.path,
        "--output",
        tmp_path / "out",
        "--max-steps",
        2,
    )
    assert trained.code == 2
    assert "positions shifted?" in trained.err


def test_padding_changes_no_number(tiny: Tiny) -> None:
    """A batch of many lengths against each sequence alone."""
    generator = np.random.default_rng(0)
    sequences = [
        Sequence(i, generator.integers(0, 509, length).astype(np.int32), generator.random(length - 1) < 0.7)
        for i, length in enumerate([2, 3, 17, 64, 128, 128, 40, 5])
    ]
    options = StatisticsOptions(9, temperatures=(2.0,), tail_samples=3)
    teacher = TransformersTeacher(str(tiny.teacher), options, device="cpu", batch_tokens=4096)
    together = teacher.score(sequences, lambda tokens: None)
    prior = np.zeros(509)
    for batched, sequence in zip(together.sequences, sequences, strict=True):
        scored = teacher.score([sequence], lambda tokens: None)
        prior += scored.tail_prior_sum
        (alone,) = scored.sequences
        assert batched.sequence is sequence
        assert batched.top_ids.shape == (sequence.loss_mask.sum(), 9)
        for name in ("gold_logprob", "tail_logmass", "entropy", "top_logprobs", "tail_logmass_at"):
            np.testing.assert_allclose(getattr(batched, name), getattr(alone, name), atol=2e-5, err_msg=name)
        np.testing.assert_array_equal(batched.top_ids, alone.top_ids)
        np.testing.assert_array_equal(batched.tail_samples, alone.tail_samples)
    np.testing.assert_allclose(together.tail_prior_sum, prior, atol=1e-4)


def test_small_slices_and_batches_change_no_number(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    import stages.teacher_transformers as module

    generator = np.random.default_rng(1)
    sequences = [Sequence(i, generator.integers(0, 509, 50).astype(np.int32), np.ones(49, bool)) for i in range(4)]
    options = StatisticsOptions(4)
    whole = TransformersTeacher(str(tiny.teacher), options, device="cpu").score(sequences, lambda tokens: None)
    monkeypatch.setattr(module, "rows_per_slice", lambda vocabulary: 7)
    teacher = TransformersTeacher(str(tiny.teacher), options, device="cpu", batch_tokens=60)
    sliced = teacher.score(sequences, lambda tokens: None)
    for one, other in zip(whole.sequences, sliced.sequences, strict=True):
        np.testing.assert_allclose(one.gold_logprob, other.gold_logprob, atol=2e-5)
        np.testing.assert_array_equal(one.top_ids, other.top_ids)


def test_batches_respect_the_budget_and_hold_each_sequence_once() -> None:
    lengths = [5, 100, 7, 64, 64, 2, 300, 9]
    batches = list(batches_by_tokens(lengths, 128))
    assert sorted(index for batch in batches for index in batch) == list(range(8))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 128


def test_masked_out_positions_store_no_entries(tiny: Tiny) -> None:
    from storage.manifest import ScoringOptions

    mask = np.array([False, True, False, True, True])
    teacher = TransformersTeacher(str(tiny.teacher), StatisticsOptions(3), device="cpu")
    scored = teacher.score([Sequence(0, np.arange(6, dtype=np.int32), mask)], lambda tokens: None)
    rows = rows_from_scored(
        scored.sequences, ScoringOptions(engine="transformers", dtype="float32", top_n=3, max_length=8)
    )
    assert rows["top_count"][0].tolist() == [0, 3, 0, 3, 3]
    assert len(rows["top_ids"].values) == 9
    assert len(rows["gold_logprob"].values) == 5
    assert scored.stored_positions == 3
