"""A plan is what the cache then is: counts exactly, bytes nearly, and nothing of it stays on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands import cache_teacher
from pipeline.commands import plan as plan_command
from stages import caching, planning
from stages.cache_options import CacheOptions
from stages.corpus import CorpusReport
from stages.engines import EngineOptions
from storage import schema
from storage.cache import Cache
from storage.manifest import ScoringOptions, SketchIdentity
from tests.conftest import Finished, Tiny


@pytest.fixture
def options(tiny: Tiny) -> CacheOptions:
    engine = EngineOptions(str(tiny.teacher), "transformers")
    return CacheOptions(engine, str(tiny.corpus), "", top_n=8, tail_samples=0, shard_tokens=1500, processes=1)


def test_without_a_probe_nothing_is_loaded_and_counts_are_exact(
    options: CacheOptions, cache_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "load", None)
    found = planning.plan(options)
    cache = Cache.open(cache_path)
    receipts = cache.receipts()
    assert found.shards == len(cache.manifest.shards)
    assert (found.report.sequences, found.tokens) == (cache.manifest.corpus.sequences, cache.manifest.corpus.tokens)
    assert found.report.trained_positions == sum(receipt.stored_positions for receipt in receipts)
    rows = [cache.read_shard(index) for index in range(found.shards)]
    for column in found.columns:
        if column.name != "sequence_id":
            assert column.values == sum(len(each[column.name].values) for each in rows), column.name
    # A teacher of random weights, which gives columns that compress badly.
    assert found.shard_bytes == pytest.approx(sum(receipt.bytes for receipt in receipts), rel=0.25)
    assert found.probe is None and found.caching_seconds is None and found.runs_to_pay is None


def test_a_probe_measures_the_bytes(
    options: CacheOptions, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = planning.plan(
        replace(options, output=str(tmp_path / "free")), probe=12
    )  # about a shard of this cache, whose ends weigh the same
    assert found.probe is not None and (found.probe.sequences, found.probe.engine) == (12, "transformers")
    cache = Cache.open(cache_path)
    assert found.bytes_per_token == pytest.approx(sum(r.bytes for r in cache.receipts()) / found.tokens, rel=0.05)
    beside = [p.stat().st_size for folder in ("tail_sums", "shards") for p in (cache_path / folder).iterdir()]
    beside += [(cache_path / "tail_prior.parquet").stat().st_size]
    whole = found.shard_bytes + found.other_bytes
    assert whole == pytest.approx(sum(beside), rel=0.05)
    assert list(tmp_path.iterdir()) == []


def test_a_sketch_is_planned_and_probed(options: CacheOptions) -> None:
    sketched = replace(options, top_n=4, tail_samples=None, sketch_rank=8, residual_samples=4)
    estimated, measured = planning.plan(sketched), planning.plan(sketched, probe=12)
    assert {"sketch_codes", "residual_samples", "residual_mass"} <= {column.name for column in estimated.columns}
    assert [(c.name, c.values) for c in estimated.columns] == [(c.name, c.values) for c in measured.columns]
    assert measured.bytes_per_token == pytest.approx(estimated.bytes_per_token, rel=0.3)
    # The sketch's file is the same for a sample and for the whole corpus.
    plain = planning.plan(options)
    assert measured.probe is not None and measured.probe.sketch is not None
    assert estimated.other_bytes - plain.other_bytes == pytest.approx(measured.probe.sketch.bytes, rel=0.2)
    # The bytes of a cache with that many samples, planned as one.
    samples = round(measured.probe.sketch.equal_tail_samples)
    as_noisy = planning.plan(replace(options, top_n=4, tail_samples=samples))
    assert measured.bytes_of_equal_noise == pytest.approx(as_noisy.bytes_per_token, rel=0.1)
    assert estimated.bytes_of_equal_noise is None


def test_when_it_has_paid() -> None:
    """The formula of docs/planning.md with numbers done by hand."""
    report = CorpusReport(10, 0, 0, 0, 0, 0, 10, 100_000, 99_990, 99_990)
    probe = planning.Probe("vllm", 5, 1_000, 30.0, 2.0, 0.1, 50_000, 0)
    plan = planning.Plan(report, 500, 4, 28, 64, 4, (), 1.0, probe)
    # 200 s for the pass, 10 s of writing of which the last of 4 shards is waited for, 30 s to load.
    assert plan.teacher_seconds == pytest.approx(200)
    assert plan.caching_seconds == pytest.approx(30 + 200 + 2.5)
    assert plan.runs_to_pay == 2
    assert replace(plan, student_epochs=2.0).runs_to_pay == 1
    assert replace(plan, student_epochs=0.25).runs_to_pay == 5
    slow = replace(plan, probe=replace(probe, write_seconds=4.0))
    assert slow.caching_seconds == pytest.approx(30 + 400 + 100)
    assert plan.shard_bytes == pytest.approx(50 * 100_000)


def scored(top_n: int, samples: int, **more: Any) -> ScoringOptions:
    return ScoringOptions(engine="vllm", dtype="float32", top_n=top_n, tail_samples=samples, max_length=256, **more)


def test_every_column_of_the_format_can_be_planned() -> None:
    report = CorpusReport(10, 0, 0, 0, 0, 0, 10, 1000, 990, 500)
    sketch = SketchIdentity(rank=16, residual_samples=8, positions=100)
    for bits in schema.LOGPROB_TYPES:
        scoring = scored(4, 28, logprob_bits=bits, temperatures=(2.0,), sketch=sketch)
        values = {column.name: planning.column_values(column, report, scoring) for column in scoring.columns}
        assert all(values.values())
        assert (values["tail_samples"], values["sketch_codes"]) == (500 * 28, 500 * 16)
        assert (values["residual_samples"], values["residual_mass"]) == (500 * 8, 500)
        for column in scoring.columns:
            assert 0 < planning.stored_bytes(column, 32_000, 4) <= 1.1 * column.element.bit_width / 8


def test_estimates_against_caches_of_a_trained_teacher() -> None:
    """Bytes per token of docs/fidelity.md: written shards, V = 8192, sequences of 256 ids, all of them trained on."""
    report = CorpusReport(100, 0, 0, 0, 0, 0, 100, 25_600, 25_500, 25_500)
    for top_n, samples, measured in ((4, 28, 56.7), (8, 16, 54.1), (16, 0, 54.2), (64, 0, 181.6)):
        scoring = scored(top_n, samples)
        estimate = sum(
            planning.column_values(column, report, scoring) * planning.stored_bytes(column, 8192, top_n)
            for column in scoring.columns
        )
        assert estimate / report.tokens == pytest.approx(measured, rel=0.05), (top_n, samples)


def test_the_command_takes_every_option_of_cache_teacher(
    tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Finished]
) -> None:
    ours = {param.name: param for param in plan_command.command.params}
    for param in cache_teacher.command.params:
        # The command line gives each command a --debug of its own when it is first called.
        if param.name != "debug":
            assert ours[param.name] is param or param.name == "output"
    (tmp_path / "run.yaml").write_text(f"teacher: {tiny.teacher}\ndataset: {tiny.corpus}\noutput: {tmp_path / 'c'}\n")
    base = ["plan", "--config", tmp_path / "run.yaml", "--engine", "transformers", "--processes", 1]
    done = pipeline(*base)
    assert done.code == 0, done.err
    assert "tokens: " in done.out and "(estimate; --probe 64 measures)" in done.out and "tail_samples\t" in done.out
    assert not (tmp_path / "c").exists()
    done = pipeline(*base, "--probe", 8)
    assert done.code == 0, done.err
    assert "measured on 8 sequences" in done.out and "paid for after: " in done.out
    told: dict[str, Any] = json.loads(pipeline(*base, "--json", "--top-n", 3).out)
    assert told["top_n"] == 3 and told["bytes_are"] == "estimated" and told["report"]["tokens"] > 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    done = pipeline(*base, "--output", tmp_path / "full")
    assert done.code == 2 and "holds other files" in done.err
