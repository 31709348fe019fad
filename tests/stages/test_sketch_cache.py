"""A cache with a sketch: what its rows say against float64 of the whole teacher, and one sketch whoever works on it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.damage import contents
from stages import caching, sketch_identity
from stages.cache_options import CacheOptions
from stages.cached_tail import common_sketch, extra_columns, make_tail, sketch_numbers
from stages.caching import prepare, run
from stages.divergence import divergences, student_terms, teacher_terms
from stages.engines import EngineOptions
from stages.objective import Objective
from stages.shard_dataset import Collator, ShardDataset, as_tensors, teacher_rows
from stages.sketch_calibration import from_file
from stages.student import StudentOptions, train
from stages.student import prepare as prepare_student
from stages.student_trainer import make_trainer
from stages.summary import summarize
from storage.cache import Cache
from storage.errors import CacheError, UserError
from storage.integrity import problems
from storage.rows import Rows
from tests.conftest import VOCABULARY, Finished, Tiny
from tests.pipeline.test_bad_input import one_sentence

RANK, SAMPLES, POSITIONS = 6, 5, 900
OPTIONS = {"sketch_rank": RANK, "residual_samples": SAMPLES, "sketch_positions": POSITIONS, "limit": 20}


@pytest.fixture(scope="module")
def cache(make_cache: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("sketched") / "cache", **OPTIONS)


@pytest.fixture(scope="module")
def adaptive(make_cache: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Positions keep as many ids as leave less than 0.4 in the tail: 2 to 20."""
    more = {"top_n": 20, "tail_epsilon": 0.4, "min_n": 2, "logprob_bits": 32}
    return make_cache(tmp_path_factory.mktemp("adaptive") / "cache", **OPTIONS, **more)


@pytest.fixture(params=["cache", "adaptive"])
def either(request: pytest.FixtureRequest) -> Cache:
    return request.getfixturevalue(request.param)


def entries(rows: Rows, row: int) -> list[np.ndarray]:
    """Where the entries of each position of a row stand."""
    counts = rows["top_count"][row].astype(int)
    return np.split(np.arange(counts.sum()), counts.cumsum()[:-1])


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.teacher, dtype=torch.float32).eval()


@torch.no_grad()
def states(model: Any, ids: np.ndarray) -> np.ndarray:
    """float64 [L-1, H]"""
    return model.model(torch.from_numpy(ids[None].astype(np.int64))).last_hidden_state[0, :-1].double().numpy()


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def test_rows_against_the_whole_teacher(either: Cache, model: Any) -> None:
    """Codes, residual mass, signs and the KL in the receipt, from the sketch's own tensors in float64."""
    cache = either
    sketch = {name: tensor.astype(np.float64) for name, tensor in cache.sketch().tensors.items()}
    weight = model.lm_head.weight.detach().double().numpy()
    counts: set[int] = set()
    squares = np.zeros(2)
    for index in range(len(cache.manifest.shards)):
        rows = cache.read_shard(index)
        kl = mass = 0.0
        same = total = 0
        for row in range(len(rows)):
            ids, mask = rows["input_ids"][row], rows["loss_mask"][row]
            assert mask.all()
            hidden = states(model, ids)
            codes = rows["sketch_codes"][row].reshape(-1, RANK).astype(np.float64) - 128
            exact = (hidden - sketch["mean"]) @ sketch["encoder"].T / sketch["scales"]
            assert np.abs(exact - codes).max() < 0.5 + 1e-3
            same += int((np.rint(exact) == codes).sum())
            total += codes.size
            tail = np.ones((len(ids) - 1, VOCABULARY), bool)
            for position, kept in enumerate(entries(rows, row)):
                tail[position, rows["top_ids"][row][kept]] = False
                counts.add(len(kept))
            np.put_along_axis(tail, ids[1:, None].astype(np.int64), False, 1)
            p = softmax(np.where(tail, hidden @ weight.T, -np.inf))
            w = softmax(np.where(tail, sketch["bias"] + (codes * sketch["scales"]) @ sketch["basis"].T, -np.inf))
            residual = p - w
            found = rows["residual_mass"][row].astype(np.float64)
            np.testing.assert_allclose(found, np.abs(residual).sum(1), rtol=2e-3)
            signed = rows["residual_samples"][row].reshape(-1, SAMPLES).astype(np.int64)
            drawn = np.take_along_axis(residual, signed, 1)
            signs = np.where(np.arange(SAMPLES) < (SAMPLES + 1) // 2, 1, -1)
            assert (np.sign(drawn) == signs)[np.abs(drawn) > 1e-6].all()
            tail_mass = np.exp(rows["tail_logmass"][row].astype(np.float64))
            gap = np.log(np.where(tail, p, 1.0)) - np.log(np.where(tail, w, 1.0))
            kl += float((tail_mass * (p * gap).sum(1)).sum())
            mass += float(found.sum())
            squares += (tail_mass**2).sum(), ((tail_mass * np.abs(residual).sum(1)) ** 2).sum()
        receipt = cache.receipt(index)
        assert receipt.sum_sketch_kl == pytest.approx(kl, rel=1e-4)
        assert receipt.sum_residual_mass == pytest.approx(mass, rel=1e-9)
        assert same >= 0.999 * total
    assert summarize(cache).equal_tail_samples == pytest.approx(SAMPLES * squares[0] / squares[1], rel=2e-3)
    assert list(problems(cache)) == []
    assert len(counts) > 10 if cache.manifest.scoring.tail_epsilon else counts == {8}


def test_it_is_calibrated_on_the_first_positions(cache: Cache, model: Any) -> None:
    """The mean of the hidden states of the first sequences that have so many positions together, and no more."""
    seen: list[np.ndarray] = []
    for rows in cache.column("input_ids"):
        for row in range(len(rows)):
            if sum(map(len, seen)) < POSITIONS:
                seen.append(states(model, rows["input_ids"][row]))
    sketch = cache.sketch()
    assert sketch.about["positions"] == sum(map(len, seen)) < cache.manifest.corpus.tokens - 500
    np.testing.assert_allclose(sketch.tensors["mean"], np.concatenate(seen).mean(0), atol=1e-5)
    # And the bias is what the head makes of it.
    weight = model.lm_head.weight.detach().double().numpy()
    np.testing.assert_allclose(sketch.tensors["bias"], weight @ np.concatenate(seen).mean(0), atol=1e-3)


def test_the_same_command_makes_the_same_cache(cache: Cache, make_cache: Callable[..., Any], tmp_path: Path) -> None:
    again = make_cache(tmp_path / "cache", **OPTIONS)
    assert again.manifest.cache_id == cache.manifest.cache_id
    assert contents(tmp_path / "cache") == contents(Path(cache.path))


def options_of(tiny: Tiny, output: Path, **more: Any) -> CacheOptions:
    """Those of `make_cache`."""
    given: dict[str, Any] = {"top_n": 8, "tail_samples": 0, "shard_tokens": 1500, "processes": 1, **OPTIONS, **more}
    engine = EngineOptions(str(tiny.teacher), "transformers")
    return CacheOptions(engine=engine, dataset=str(tiny.corpus), output=str(output), **given)


def test_a_killed_calibration_is_done_again_and_a_made_one_is_not(
    tiny: Tiny, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    prepared = prepare(options_of(tiny, path))
    assert prepared.calibration is not None

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    # Once the sketch is there, but before the manifest.
    with monkeypatch.context() as patch:
        patch.setattr(Cache, "create_or_resume", killed)
        with pytest.raises(KeyboardInterrupt):
            run(prepared, lambda tokens: None)
    assert [entry.name for entry in path.iterdir()] == ["sketch.safetensors"]
    again = prepare(options_of(tiny, path))
    assert again.calibration is None
    run(again, lambda tokens: None)
    assert contents(path) == contents(Path(cache.path))


def test_two_workers_use_the_sketch_of_the_first(tiny: Tiny, cache: Cache, tmp_path: Path) -> None:
    """Their calibrations may differ by a rounding; then the one that is there counts."""
    path = tmp_path / "cache"
    second = prepare(options_of(tiny, path))
    theirs = cache.sketch()
    theirs = replace(theirs, tensors={**theirs.tensors, "bias": theirs.tensors["bias"] + np.float32(1e-4)})
    Cache.claim_sketch(path, theirs.to_bytes())
    done, summary = run(second, lambda tokens: None)
    assert done.sketch_bytes() == theirs.to_bytes()
    assert done.manifest.scoring.sketch is not None
    assert done.manifest.scoring.sketch.sha256 == hashlib.sha256(theirs.to_bytes()).hexdigest()
    assert done.manifest.cache_id != cache.manifest.cache_id
    assert list(problems(done)) == []
    assert summary.mean_sketch_kl is not None and summary.mean_residual_mass is not None
    # A third one that comes later makes none at all.
    assert prepare(options_of(tiny, path)).calibration is None


def test_a_sketch_that_was_lost_is_made_again_and_another_is_refused(
    tiny: Tiny, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    shutil.copytree(cache.path, path)
    (path / "sketch.safetensors").unlink()
    (path / "shards" / "part-00001.json").unlink()
    run(prepare(options_of(tiny, path)), lambda tokens: None)
    assert contents(path) == contents(Path(cache.path))
    # On a machine whose numbers differ, the shards that are there could not be told from those that are to come.
    (path / "sketch.safetensors").write_bytes(b"damaged")
    for module in (caching, sketch_identity):
        monkeypatch.setattr(module, "calibration_id", lambda manifest: "of another machine")
    before = contents(path)
    with pytest.raises(CacheError, match=r"sketch.safetensors: missing or damaged, and .* name a new --output"):
        run(prepare(options_of(tiny, path)), lambda tokens: None)
    assert contents(path) == before


def test_what_another_command_left_is_refused(tiny: Tiny, cache: Cache, tmp_path: Path) -> None:
    Cache.claim_sketch(tmp_path / "cache", cache.sketch_bytes())
    for other in ({"limit": 19}, {"sketch_positions": POSITIONS + 1}):
        with pytest.raises(CacheError, match="another command left this sketch"):
            prepare(options_of(tiny, tmp_path / "cache", **other))
    with pytest.raises(CacheError, match=r"holds another cache \(scoring.sketch.rank: 6, not 7"):
        prepare(options_of(tiny, Path(cache.path), sketch_rank=7))


def caching_words(tiny: Tiny, output: Path, *more: object) -> list[object]:
    base = ["cache-teacher", "--teacher", tiny.teacher, "--dataset", tiny.corpus, "--output", output]
    return [*base, "--engine", "transformers", *more]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--residual-samples", 4], ["--residual-samples 4: means nothing without a sketch; add --sketch-rank"]),
        (["--sketch-positions", 9], ["--sketch-positions 9: means nothing without a sketch"]),
        (["--sketch-rank", 33], ["--sketch-rank 33: the teacher's hidden states have only 32 dimensions"]),
        (["--sketch-rank", 8, "--sketch-positions", 7], ["--sketch-positions 7: too few for --sketch-rank 8"]),
        (["--sketch-rank", 32, "--limit", 1, "--max-length", 20], ["only 19 positions with a loss", "give more text"]),
        (["--sketch-rank", 8, "--engine", "server"], ["--sketch-rank: a server shows no hidden states"]),
        (["--sketch-rank", 8, "--engine", "auto", "--server-url", "http://x:1"], ["--sketch-rank: a server"]),
        (["--sketch-from", "CACHE", "--sketch-rank", 5], ["its sketch has rank 6 and is calibrated already"]),
        (["--sketch-from", "CACHE", "--sketch-positions", 50], ["leave out --sketch-rank and --sketch-positions"]),
        (["--sketch-from", "PLAIN"], ["this cache has no sketch; it was made without --sketch-rank"]),
        (["--sketch-from", "CACHE", "--teacher", "STUDENT"], ["its sketch is of another teacher"]),
    ],
)
def test_what_cannot_be(
    given: list[object],
    parts: list[str],
    tiny: Tiny,
    cache: Cache,
    cache_path: Path,
    tmp_path: Path,
    pipeline: Callable[..., Finished],
) -> None:
    places = {"CACHE": cache.path, "PLAIN": cache_path, "STUDENT": tiny.student}
    words = [places.get(str(word), word) for word in given]
    one_sentence(pipeline(*caching_words(tiny, tmp_path / "cache", *words)), 2, *parts)
    assert not (tmp_path / "cache").exists()


def test_a_head_that_no_sketch_can_follow(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are capped, by a cap that the configuration does not name."""
    from stages.causal_lm import BodyAndHead

    head = BodyAndHead.head
    monkeypatch.setattr(BodyAndHead, "check", lambda *arguments: None)
    monkeypatch.setattr(BodyAndHead, "head", lambda self, hidden: 9.0 * torch.tanh(head(self, hidden) / 9.0))
    prepared = prepare(options_of(tiny, tmp_path / "cache"))
    with pytest.raises(UserError, match="not a linear function of its last hidden state; leave it out"):
        run(prepared, lambda tokens: None)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["Gemma2", "Cohere", "Granite"])
def test_capped_and_scaled_logits(kind: str, tiny: Tiny, make_cache: Callable[..., Any], tmp_path: Path) -> None:
    """With as many codes as dimensions a sketch gives back the model's own logits, their cap and scale included."""
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    more = {
        "Gemma2": {"final_logit_softcapping": 4.0},
        "Cohere": {"logit_scale": 3.0},
        "Granite": {"logits_scaling": 0.2},
    }
    config = getattr(transformers, f"{kind}Config")(
        **shape, **more[kind], bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30.0)
    model.save_pretrained(tmp_path / "teacher")
    transformers.AutoTokenizer.from_pretrained(tiny.tokenizer).save_pretrained(tmp_path / "teacher")
    engine = EngineOptions(str(tmp_path / "teacher"), "transformers")
    options = {**OPTIONS, "sketch_rank": 16, "engine": engine, "limit": 12, "residual_samples": 0}
    cache = make_cache(tmp_path / "cache", **options)
    sketch = from_file(cache.sketch())
    assert sketch.soft_cap == (4.0 if kind == "Gemma2" else None)
    ids = torch.from_numpy(cache.read_shard(0)["input_ids"][0].astype(np.int64))[None]
    with torch.no_grad():
        logits = model(ids).logits[0]
        ours = sketch.logits(sketch.encode(model.model(ids).last_hidden_state[0]))
    assert logits.std() > 0.5
    wanted, found = (x - x.mean(1, keepdim=True) for x in (logits, ours))
    assert (wanted - found).abs().mean() < 0.02 * wanted.abs().mean()
    [receipt] = cache.receipts()
    assert receipt.sum_sketch_kl / receipt.stored_positions < 1e-3
    assert "residual_samples" not in [column.name for column in cache.manifest.scoring.columns]


# ---- students ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(cache: Cache, make_cache: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Of other text, with the sketch of the first."""
    more = {"limit": 30, "sketch_from": str(cache.path), "residual_samples": SAMPLES}
    return make_cache(tmp_path_factory.mktemp("other") / "cache", **more)


@pytest.fixture(scope="module")
def own(make_cache: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """As wide a sketch as the first's, calibrated on less text."""
    return make_cache(tmp_path_factory.mktemp("own") / "cache", **{**OPTIONS, "sketch_positions": 200})


def test_the_sketch_of_another_cache(cache: Cache, other: Cache) -> None:
    assert other.sketch_bytes() == cache.sketch_bytes()
    ours, theirs = cache.read_shard(0), other.read_shard(0)
    for name in ("sketch_codes", "residual_samples", "residual_mass"):
        np.testing.assert_array_equal(ours[name].values, theirs[name].values)


def test_a_batch_of_shards_against_float64(either: Cache) -> None:
    """KL of student logits that are made up, from what stands in the columns: kept ids, the codes, the residuals."""
    cache, objective = either, Objective("kl", tail="sketch")
    columns = extra_columns(objective, cache)
    assert columns == ["sketch_codes", "residual_samples", "residual_mass", "entropy"]
    dataset = ShardDataset(cache, np.arange(4), extra=columns)
    sketch = {name: tensor.astype(np.float64) for name, tensor in cache.sketch().tensors.items()}
    stored, chosen = cache.read_shard(0), (2, 0)
    count = sum(len(stored["loss_mask"][row]) for row in chosen)
    logits = np.random.default_rng(0).standard_normal((count, VOCABULARY))
    wanted: list[float] = []
    for row in chosen:
        ids = stored["input_ids"][row]
        for position, at in enumerate(entries(stored, row)):
            z = logits[len(wanted)]
            logp = dict(zip(stored["top_ids"][row][at].tolist(), stored["top_logprobs"][row][at], strict=True))
            logp[int(ids[position + 1])] = stored["gold_logprob"][row][position]
            kept = np.array(list(logp))
            log_q = z - np.log(np.exp(z).sum())
            codes = stored["sketch_codes"][row].reshape(-1, RANK)[position]
            x = sketch["bias"] + sketch["basis"] @ ((codes.astype(float) - 128) * sketch["scales"])
            x[kept] = -np.inf
            shares = softmax(x[None])[0]
            drawn = stored["residual_samples"][row].reshape(-1, SAMPLES)[position].astype(np.int64)
            more, half = (SAMPLES + 1) // 2, float(stored["residual_mass"][row][position]) / 2
            np.add.at(shares, drawn[:more], half / more)
            np.add.at(shares, drawn[more:], -half / (SAMPLES - more))
            in_tail = z @ shares - np.log(np.exp(z).sum())
            cross = np.exp(np.array(list(logp.values()), np.float64)) @ log_q[kept]
            cross += np.exp(float(stored["tail_logmass"][row][position])) * in_tail
            wanted.append(-float(stored["entropy"][row][position]) - cross)
    for packed in (False, True):
        batch = Collator(objective, VOCABULARY, packed=packed).batch([dataset[row] for row in chosen])
        rows, tail = teacher_rows(as_tensors(batch)), make_tail(objective, [cache])
        terms = student_terms(torch.from_numpy(logits), rows, tail)
        # The entropy and the entries are of 16 bits.
        np.testing.assert_allclose(divergences(terms, teacher_terms(rows, "sketch")).whole, wanted, atol=1e-2)


def test_a_batch_of_caches_with_sketches_of_their_own(cache: Cache, own: Cache) -> None:
    """Each position's tail is what its own cache's sketch says, as in a batch of that cache alone."""
    objective = Objective("kl", tail="sketch")
    assert own.sketch_bytes() != cache.sketch_bytes() and common_sketch([cache, own]) is not None
    caches = [cache, own, cache]
    assert sketch_numbers(caches) == (0, 1, 0) and sketch_numbers([cache, cache]) is None
    columns = extra_columns(objective, cache)
    parts = [ShardDataset(each, np.arange(4), extra=columns, source=i) for i, each in enumerate(caches)]
    sequences = [parts[0][1], parts[1][2], parts[2][3], parts[1][0]]
    collator = Collator(objective, VOCABULARY, sketches=sketch_numbers(caches))
    rows, tail = teacher_rows(as_tensors(collator.batch(sequences))), make_tail(objective, caches)
    assert rows.sketch_codes is not None and rows.sketch_codes.shape == (len(rows), 1 + RANK)
    logits = torch.randn((len(rows), VOCABULARY), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = divergences(student_terms(logits, rows, tail), teacher_terms(rows, "sketch")).whole
    start = 0
    for sequence in sequences:
        alone = teacher_rows(as_tensors(Collator(objective, VOCABULARY).batch([sequence])))
        tail = make_tail(objective, [caches[sequence.source]])
        part = slice(start, start := start + len(alone))
        terms = student_terms(logits[part], alone, tail)
        torch.testing.assert_close(divergences(terms, teacher_terms(alone, "sketch")).whole, whole[part])
        other = make_tail(objective, [caches[1 - sequence.source % 2]])
        wrong = divergences(student_terms(logits[part], alone, other), teacher_terms(alone, "sketch")).whole
        assert (wrong - whole[part]).abs().max() > 1e-2
    assert start == len(rows)


def test_a_student_is_trained_from_caches_with_sketches_of_their_own(
    tiny: Tiny, cache: Cache, own: Cache, tmp_path: Path, pipeline: Callable[..., Finished]
) -> None:
    words = ["train-student", "--student", tiny.student, "--shards", cache.path, "--shards", own.path]
    words += ["--objective", "kl", "--output", tmp_path / "out", "--max-steps", 30, "--learning-rate", 1e-2]
    trained = pipeline(*words)
    assert trained.code == 0, trained.err
    assert "tail: sketch" in trained.out and "--tail auto" not in trained.err
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    # The mixed held-out share is measured as the two are, each alone.
    alone = [
        make_trainer(
            prepare_student(
                StudentOptions(str(tmp_path / "out"), [str(each.path)], str(tmp_path / "more"), Objective("kl"))
            )
        ).evaluate()
        for each in (cache, own)
    ]
    found = [report["eval_kl"], *(each["eval_kl"] for each in alone)]
    assert min(found[1:]) - 1e-3 <= found[0] <= max(found[1:]) + 1e-3


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_a_student_is_trained_from_two_caches_of_one_sketch(
    batching: str, tiny: Tiny, cache: Cache, other: Cache, tmp_path: Path, pipeline: Callable[..., Finished]
) -> None:
    words = ["train-student", "--student", tiny.student, "--shards", cache.path, "--shards", other.path]
    words += ["--objective", "kl", "--output", tmp_path / "out", "--max-steps", 30, "--batching", batching]
    words += ["--batch-tokens", 512] if batching == "packed" else []
    trained = pipeline(*words, "--learning-rate", 1e-2, "--trainer", "dataloader_num_workers=0")
    assert trained.code == 0, trained.err
    assert "tail: sketch" in trained.out
    prepared = prepare_student(
        StudentOptions(str(tmp_path / "out"), [str(cache.path)], str(tmp_path / "more"), Objective("kl"))
    )
    after = make_trainer(prepared).evaluate()
    before = make_trainer(replace(prepared, options=replace(prepared.options, student=str(tiny.student)))).evaluate()
    assert after["eval_kl"] < 0.8 * before["eval_kl"]


def test_a_student_of_short_prefixes_and_its_kl_to_the_live_teacher(
    tiny: Tiny, adaptive: Cache, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured KL is that of the whole distributions; and the sketch is read once for training and measuring."""
    from transformers import AutoModelForCausalLM

    reads: list[Cache] = []
    sketch_bytes = Cache.sketch_bytes
    monkeypatch.setattr(Cache, "sketch_bytes", lambda self, **given: reads.append(self) or sketch_bytes(self, **given))
    given = {"max_steps": 30, "learning_rate": 1e-2, "dataloader_num_workers": 0}
    options = StudentOptions(
        str(tiny.student), str(adaptive.path), str(tmp_path / "out"), Objective("kl"), eval_share=0.4, trainer=given
    )
    prepared = prepare_student(options)
    assert prepared.options.objective.tail == "sketch"
    before = make_trainer(prepared).evaluate()["eval_kl"]
    after = train(prepared)["eval_kl"]
    assert len(reads) == 1
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    gaps: list[torch.Tensor] = []
    dataset = ShardDataset(adaptive, prepared.parts[0].eval_ids)
    for row in range(len(dataset)):
        ids = torch.from_numpy(dataset[row].input_ids.astype(np.int64))[None]
        with torch.no_grad():
            p, q = (one(ids).logits[0, :-1].double().log_softmax(1) for one in (model, student))
        gaps.append((p.exp() * (p - q)).sum(1))
    assert after < 0.8 * before
    assert after == pytest.approx(float(torch.cat(gaps).mean()), rel=0.03)


def test_what_the_tail_sketch_needs(
    tiny: Tiny, cache: Cache, cache_path: Path, make_cache: Callable[..., Any], tmp_path: Path
) -> None:
    def preparing(*caches: object, tail: str = "sketch") -> Any:
        options = StudentOptions(str(tiny.student), [str(path) for path in caches], str(tmp_path / "out"))
        return prepare_student(replace(options, objective=Objective("kl", tail=tail)))  # type: ignore[arg-type]

    with pytest.raises(CacheError, match="--tail sketch needs a sketch; this cache was made without --sketch-rank"):
        preparing(cache_path)
    different = make_cache(tmp_path / "different", **{**OPTIONS, "limit": 12, "residual_samples": SAMPLES + 1})
    with pytest.raises(CacheError, match=r"the other caches have sketches of different rank or with different numbers"):
        preparing(cache.path, different.path)
    without = preparing(cache.path, different.path, tail="auto")
    assert without.options.objective.tail == "prior"
    assert without.notes[0].startswith("--tail auto takes prior: the sketches of these caches differ in rank")
    assert preparing(cache.path, different.path, tail="prior").notes == []
    alone = preparing(cache.path, tail="auto")
    assert alone.options.objective.tail == "sketch" and alone.notes == []


def test_inspect_shows_what_other_ranks_would_do(cache: Cache, pipeline: Callable[..., Finished]) -> None:
    shown = pipeline("inspect", cache.path)
    assert shown.code == 0, shown.err
    explained = cache.sketch().tensors["explained"]
    assert f"sketch: rank {RANK}, {SAMPLES} residual samples per position" in shown.out
    assert f"6 <- this cache\t{explained[5]:.4f}" in shown.out and f"16\t{explained[15]:.4f}" in shown.out
    assert "32\t1.0000" in shown.out
    kl = sum(receipt.sum_sketch_kl or 0.0 for receipt in cache.receipts())
    positions = sum(receipt.stored_positions for receipt in cache.receipts())
    assert f"KL of the sketch: {kl / positions:.4g} nats" in shown.out
    assert f"KL from the teacher {kl / positions:.4g} nats" in (Path(cache.path) / "README.md").read_text()


def test_a_new_sketch_is_tried_before_the_corpus_is_scored(
    tiny: Tiny, cache: Cache, tmp_path: Path, pipeline: Callable[..., Finished]
) -> None:
    options = ["--sketch-rank", RANK, "--residual-samples", SAMPLES, "--sketch-positions", POSITIONS, "--limit", 20]
    made = pipeline(
        "cache-teacher", "--teacher", tiny.teacher, "--dataset", tiny.corpus, "--output", tmp_path / "cache",
        "--engine", "transformers", "--top-n", 8, "--shard-tokens", 1500, "--processes", 1, *options,
    )  # fmt: skip
    assert made.code == 0, made.err
    assert contents(tmp_path / "cache") == contents(Path(cache.path))
    summary = summarize(cache)
    said = re.search(r"its residual samples are as noisy as ([\d,]+) tail samples would be", made.err)
    assert said is not None and summary.equal_tail_samples is not None
    # The first positions here, all of them there.
    assert int(said[1].replace(",", "")) == pytest.approx(summary.equal_tail_samples, rel=0.25)
    assert f"the sketch explains {cache.sketch().explained:.3f} of the variance" in made.err
    shown = f"noise of residual samples: that of {summary.equal_tail_samples:,.0f} tail samples"
    assert shown in made.out
    assert ("are nearer to this teacher" in made.err) == (summary.equal_tail_samples < 28)
