"""Several caches of one teacher in one run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.cached_tail import make_tail
from stages.objective import Objective
from stages.shard_dataset import as_tensors, corpus_threshold
from stages.student import StudentOptions, prepare, train
from stages.student_trainer import make_trainer
from stages.together import check_together
from storage.cache import Cache
from storage.errors import CacheError
from tests import reference
from tests.conftest import Tiny, make_model, make_tokenizer, texts
from tests.stages.recorded import sequences_of
from tests.storage.synthetic import make_manifest, write_cache


@pytest.fixture(scope="module")
def other_path(make_cache: Callable[..., Any], tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text through the same teacher, more entries per position and in float32."""
    folder = tmp_path_factory.mktemp("other")
    rows = [text[start : start + 300] for text in texts()[20:] for start in (1200, 1600)][:30]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    path = folder / "on-policy"
    return make_cache(path, dataset=str(folder / "corpus.jsonl"), top_n=12, logprob_bits=32).path


def options(tiny: Tiny, caches: list[Path], output: Path, **more: Any) -> StudentOptions:
    trainer = {"max_steps": 2, **more.pop("trainer", {})}
    return StudentOptions(str(tiny.student), [str(c) for c in caches], str(output), trainer=trainer, **more)


def test_batches_hold_the_share_of_each_cache(tiny: Tiny, cache_path: Path, other_path: Path, tmp_path: Path) -> None:
    prepared = prepare(options(tiny, [cache_path, other_path], tmp_path / "out", mix=(1, 3)))
    total = sum(len(part.train_ids) for part in prepared.parts)
    batches = [as_tensors(batch) for batch in make_trainer(prepared).get_train_dataloader()]
    source = np.concatenate([batch["source"].numpy() for batch in batches])
    assert len(source) == total
    assert (source == 1).sum() == pytest.approx(0.75 * total, abs=1)
    # What is in a batch is what the cache holds, entries padded to the wider of the two.
    held = {
        rows["gold_logprob"][row].tobytes().hex()
        for cache in (Cache.open(cache_path), Cache.open(other_path))
        for rows in cache.column("gold_logprob")
        for row in range(len(rows))
    }
    assert all(sequence in held for batch in batches for sequence in sequences_of(batch))
    mixed = next(b for b in batches if len(set(b["source"].tolist())) == 2)
    narrow = (mixed["source"] == 0)[mixed["sequence_of"]]
    assert mixed["top_ids"].shape[1] == 12
    assert (mixed["top_logprobs"][narrow][:, 8:] == -np.inf).all()
    assert (mixed["top_logprobs"][~narrow] > -np.inf).all()


def test_the_report_tells_the_caches_apart(tiny: Tiny, cache_path: Path, other_path: Path, tmp_path: Path) -> None:
    given = options(tiny, [cache_path, other_path], tmp_path / "out", mix=(0.5, 0.5), eval_share=0.2)
    report = train(prepare(given))
    sizes = [report[f"eval_{name}_tokens"] for name in ("cache", "on-policy")]
    assert sum(sizes) == report["eval_tokens"] and all(sizes)
    mean = sum(n * report[f"eval_{name}_kl"] for n, name in zip(sizes, ("cache", "on-policy"), strict=True))
    assert report["eval_kl"] == pytest.approx(mean / sum(sizes), rel=1e-6)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["caches"] == [Cache.open(path).manifest.cache_id for path in (cache_path, other_path)]
    assert run["mix"] == [0.5, 0.5]
    # Each cache holds out what it holds out alone.
    alone = prepare(options(tiny, [other_path], tmp_path / "alone", eval_share=0.2))
    np.testing.assert_array_equal(alone.parts[0].eval_ids, prepare(given).parts[1].eval_ids)


def test_one_threshold_over_all_caches(cache_path: Path, other_path: Path) -> None:
    caches = [Cache.open(cache_path), Cache.open(other_path)]
    parts = [(cache, np.arange(1, cache.manifest.corpus.sequences)) for cache in caches]
    gold = np.concatenate(
        [
            rows["gold_logprob"][row][rows["loss_mask"][row]]
            for cache in caches
            for index in range(len(cache.manifest.shards))
            for rows in [cache.read_shard(index)]
            for row in range(len(rows))
            if rows.sequence_id[row] > 0
        ]
    )
    threshold = corpus_threshold(parts, 0.3)
    np.testing.assert_array_equal(gold <= threshold, reference.is_hard(-gold, 0.3))


def test_the_tail_prior_of_several_caches_is_their_mean_over_positions(cache_path: Path, other_path: Path) -> None:
    caches = [Cache.open(cache_path), Cache.open(other_path)]
    together = make_tail(Objective("kl", tail="prior"), caches).log_prior
    assert together is not None
    positions = [sum(r.stored_positions for r in cache.receipts()) for cache in caches]
    mean = np.average([cache.tail_prior() for cache in caches], axis=0, weights=positions)
    np.testing.assert_allclose(together.exp()[mean > 0], mean[mean > 0], rtol=1e-5)


def test_the_command_takes_several_caches(
    tiny: Tiny, cache_path: Path, other_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    base = ["train-student", "--student", tiny.student, "--output", tmp_path / "out", "--max-steps", 2]
    both = ["--shards", cache_path, "--shards", other_path]
    assert pipeline(*base, *both, "--mix", "0.3,0.7").code == 0
    other = pipeline(*base, *both, "--mix", "0.7,0.3")
    assert other.code == 2 and "(mix: [0.3, 0.7] there, [0.7, 0.3] here)" in other.err
    for mix in ("1", "1,0", "1,-1", "a,b"):
        wrong = pipeline(*base, *both, "--mix", mix)
        assert wrong.code == 2 and "--mix" in wrong.err, mix


def test_caches_that_do_not_go_together_are_refused_by_name(
    tiny: Tiny, cache_path: Path, make_cache: Callable[..., Any], tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    make_model(tmp_path / "stranger", make_tokenizer(tmp_path / "tokenizer", 450), seed=9)
    from stages.engines import EngineOptions

    foreign = make_cache(tmp_path / "foreign", engine=EngineOptions(str(tmp_path / "stranger"), "transformers"))
    base = ["train-student", "--student", tiny.student, "--output", tmp_path / "out", "--shards", cache_path]
    done = pipeline(*base, "--shards", foreign.path)
    assert done.code == 2
    assert "another teacher (teacher, not stranger), tokenizer" in done.err
    shutil.copytree(cache_path, tmp_path / "copy")
    twice = pipeline(*base, "--shards", tmp_path / "copy")
    assert twice.code == 2 and "is the same cache as" in twice.err
    warm = pipeline(*base, "--shards", make_cache(tmp_path / "warm", temperatures=(2.0,)).path, "--temperature", 2)
    assert warm.code == 2 and "holds the temperatures 1, not 2" in warm.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocabulary_size": 301}, r"vocabulary size \(300, not 301\)"),
        ({"tokenizer": {"behaviour_sha256": "9" * 64}}, "tokenizer"),
        ({"teacher": {"name": "somebody"}}, r"teacher \(nobody, not somebody\)"),
        ({"teacher": {"config_sha256": "9" * 64}}, r"teacher \(nobody, not nobody\)"),
    ],
)
def test_what_must_be_the_same(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    one = write_cache(tmp_path / "one", make_manifest())
    manifest = make_manifest(seed=1)
    check_together([one, Cache(tmp_path / "other", manifest)])
    update = {
        name: getattr(manifest, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in change.items()
    }
    with pytest.raises(CacheError, match=words):
        check_together([one, Cache(tmp_path / "other", manifest.model_copy(update=update))])
