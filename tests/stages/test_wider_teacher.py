"""A teacher with more ids than its student, against its full distribution cut to the student's ids, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from stages.divergence import at_temperature, divergences, sampled_shape, student_terms, teacher_terms
from stages.objective import Objective
from stages.shard_dataset import Collator, ShardDataset, StoredSequence, as_tensors, teacher_rows
from stages.student import StudentOptions, prepare, train
from stages.tail import Tail
from stages.wider_teacher import TeacherArrays, leave_out_beyond, shares_within
from storage.errors import CacheError
from tests import reference
from tests.conftest import Tiny, make_model

WIDE, NARROW = 30, 20


def stored(logits: np.ndarray, gold: int, n: int, temperature: float = 1.0) -> tuple[TeacherArrays, np.ndarray]:
    """One row of a cache, and the share of its tail at the student's ids at temperatures 1 and T."""
    of = reference.position_statistics(logits, gold, n, (temperature,) if temperature != 1 else ())
    p = np.exp(reference.log_softmax(logits))
    outside = [j for j in range(WIDE) if j != gold and j not in of["top_ids"]]
    shares = []
    for power in (1.0, 1.0 / temperature):
        mass = p[outside] ** power
        within = mass[[i for i, j in enumerate(outside) if j < NARROW]].sum()
        shares.append(within / mass.sum() if len(outside) else 1.0)
    at = None if temperature == 1 else np.array([of["tail_logmass_T"][temperature]], np.float32)
    rows = TeacherArrays(
        np.array([gold]), np.float32([of["gold_logprob"]]), np.float32([of["tail_logmass"]]), of["top_ids"][None],
        of["top_logprobs"][None].astype(np.float32), at, None, np.float32([of["entropy"]]),
    )  # fmt: skip
    return rows, np.array([shares])


def tensors(rows: TeacherArrays) -> Any:
    return teacher_rows(as_tensors({name: value for name, value in vars(rows).items() if value is not None}))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, WIDE), st.sampled_from(["forward", "reverse", "jsd", "tvd"]))
def test_divergences_are_those_of_the_cut_distribution_at_every_n(seed: int, n: int, compared: str) -> None:
    random = np.random.default_rng(seed)
    teacher, student = random.normal(0, 3, WIDE), random.normal(0, 2, NARROW)
    gold = int(random.integers(NARROW))
    rows, within = stored(teacher, gold, n)
    cut = tensors(leave_out_beyond(rows, NARROW, within, 1.0))
    whole: Any = compared if compared in ("jsd", "tvd") else "kl"
    direction: Any = "reverse" if compared == "reverse" else "forward"
    logits = torch.tensor(student[None])
    terms = teacher_terms(cut, "bucket", torch.float64)
    found = divergences(student_terms(logits, cut), terms, direction, whole)
    kept = [int(i) for i in rows.top_ids[0] if i < NARROW]
    log_p, log_q = reference.log_softmax(teacher[:NARROW]), reference.log_softmax(student)
    if direction == "forward":
        tkd, dkd = reference.bucket_terms(teacher[:NARROW], student, gold, kept)
        np.testing.assert_allclose([found.tkd.item(), found.dkd.item()], [tkd, dkd], rtol=1e-4, atol=1e-5)
    if whole != "kl":
        # The tail as one lump.
        lumps = [[j] for j in {*kept, gold}] + [[j for j in range(NARROW) if j not in {*kept, gold}]]
        p, q = (np.array([np.exp(log[lump]).sum() for lump in lumps]) for log in (log_p, log_q))
        mixed = 0.5 * (p + q)
        with np.errstate(divide="ignore", invalid="ignore"):
            gaps = np.nansum(p * np.log(p / mixed)) + np.nansum(q * np.log(q / mixed))
        value = 0.5 * gaps if whole == "jsd" else 0.5 * np.abs(p - q).sum()
        np.testing.assert_allclose(found.whole.item(), value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cut.gold_logprob.item(), log_p[gold], rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(value).all() for value in vars(found).values())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, WIDE), st.sampled_from([0.5, 2.0, 5.0]))
def test_at_another_temperature(seed: int, n: int, temperature: float) -> None:
    random = np.random.default_rng(seed)
    teacher, student = random.normal(0, 3, WIDE), random.normal(0, 2, NARROW)
    gold = int(random.integers(NARROW))
    rows, within = stored(teacher, gold, n, temperature)
    cut = leave_out_beyond(rows, NARROW, within, temperature)
    assert cut.tail_logmass_at is not None
    hot = at_temperature(tensors(cut), torch.tensor(cut.tail_logmass_at), temperature)
    terms = teacher_terms(hot, "bucket", torch.float64)
    found = divergences(student_terms(torch.tensor(student[None] / temperature), hot), terms)
    kept = [int(i) for i in rows.top_ids[0] if i < NARROW]
    tkd, dkd = reference.bucket_terms(teacher[:NARROW] / temperature, student / temperature, gold, kept)
    np.testing.assert_allclose([found.tkd.item(), found.dkd.item()], [tkd, dkd], rtol=2e-4, atol=2e-5)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, WIDE - 1))
def test_samples_stand_for_the_tail_that_is_left(seed: int, n: int) -> None:
    """Where every sample is drawn once, `sampled` of the cut rows is what it is without the ids beyond."""
    random = np.random.default_rng(seed)
    teacher, student = random.normal(0, 3, WIDE), random.normal(0, 2, NARROW)
    gold = int(random.integers(NARROW))
    rows, within = stored(teacher, gold, n)
    outside = [j for j in range(WIDE) if j != gold and j not in rows.top_ids[0]]
    drawn = random.choice(outside, 6) if outside else np.full(6, -1)
    cut = leave_out_beyond(TeacherArrays(**{**vars(rows), "tail_samples": drawn[None]}), NARROW, within, 1.0)
    found = divergences(
        student_terms(torch.tensor(student[None]), tensors(cut), Tail("sampled")),
        teacher_terms(tensors(cut), "sampled", torch.float64),
    )
    assert all(torch.isfinite(value).all() for value in vars(found).values())
    valid = drawn[(drawn >= 0) & (drawn < NARROW)]
    # The loss does not depend on a constant that is added to all logits, so the shares sum to the tail's mass.
    again = divergences(
        student_terms(torch.tensor(student[None] + 7.0), tensors(cut), Tail("sampled")),
        teacher_terms(tensors(cut), "sampled", torch.float64),
    )
    torch.testing.assert_close(again.dkd, found.dkd, atol=1e-6, rtol=1e-6)
    if not len(valid):
        assert cut.tail_logmass[0] == -np.inf
        return
    log_p, log_q = reference.log_softmax(teacher[:NARROW]), reference.log_softmax(student)
    nongold = [j for j in range(NARROW) if j != gold]
    p, q = np.exp(log_p) / np.exp(log_p[nongold]).sum(), np.exp(log_q) / np.exp(log_q[nongold]).sum()
    kept = [int(i) for i in rows.top_ids[0] if i < NARROW and i != gold]
    tail = [j for j in nongold if j not in kept]
    mass = p[tail].sum()
    # sum over kept of p log(p/q), then mass (log mass + shape - mean log q over the samples).
    expected = sum(p[j] * np.log(p[j] / q[j]) for j in kept)
    expected += mass * (np.log(mass) + sampled_shape(tensors(cut)).item() - np.log(q[valid]).mean())
    np.testing.assert_allclose(found.dkd.item(), expected, rtol=1e-3, atol=1e-4)


def test_an_entropy_tells_the_tail_s_shape_as_before() -> None:
    random = np.random.default_rng(3)
    for _ in range(20):
        rows, within = stored(random.normal(0, 1, WIDE), 3, 5)
        before = sampled_shape(tensors(rows))
        after = sampled_shape(tensors(leave_out_beyond(rows, NARROW, within, 1.0)))
        torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)


def test_rows_without_mass_beyond_stay_as_they_are() -> None:
    rows, _ = stored(np.concatenate([np.random.default_rng(0).normal(0, 2, NARROW), np.full(10, -np.inf)]), 4, 8)
    cut = leave_out_beyond(rows, NARROW, np.ones((1, 2)), 1.0)
    np.testing.assert_array_equal(cut.top_logprobs, rows.top_logprobs)
    np.testing.assert_array_equal(cut.tail_logmass, rows.tail_logmass)
    np.testing.assert_allclose(cut.gold_logprob, rows.gold_logprob, atol=1e-7)


# ---- whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many ids as the tokenizer has; the teacher's head has nine more."""
    root = tmp_path_factory.mktemp("narrow")
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    make_model(root / "student", tokenizer, hidden=16, seed=1, vocab_size=len(tokenizer))
    return root / "student"


@pytest.fixture(scope="module")
def wide_cache(make_cache: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_cache(tmp_path_factory.mktemp("wide") / "cache", top_n=509, tail_samples=4, temperatures=(2.0,))


@pytest.mark.parametrize(
    "objective",
    [
        Objective("atkd", tail="sampled"),
        Objective("kl", tail="prior"),
        Objective("kl", temperature=2.0, tail="bucket"),
        Objective("dkd", direction="reverse"),
        Objective("jsd"),
        Objective("tvd"),
        Objective("kl", tail="drop", rank_scope="global-batch"),
    ],
    ids=lambda o: f"{o.name}-{o.tail}-{o.direction}",
)
@pytest.mark.parametrize("top_n", [509, 3])
def test_every_objective_trains_on_a_wider_teacher(
    objective: Objective, top_n: int, narrow: Path, wide_cache: Any, make_cache: Callable[..., Any], tmp_path: Path
) -> None:
    cache = wide_cache
    if top_n == 3:
        cache = make_cache(tmp_path / "cache", top_n=3, tail_samples=4, temperatures=(2.0,))
    trainer = {"max_steps": 2, "per_device_train_batch_size": 4, "dataloader_num_workers": 0, "logging_steps": 1}
    given = StudentOptions(str(narrow), str(cache.path), str(tmp_path / "out"), objective=objective, trainer=trainer)
    prepared = prepare(given)
    assert any("9 token ids more than the student; their mass is left out" in note for note in prepared.notes)
    report = train(prepared)
    assert all(np.isfinite(entry["loss"]) for entry in report["log"] if "loss" in entry)
    assert np.isfinite(report["eval_kl"])


def test_whole_distributions_of_a_cache_are_cut_exactly(tiny: Tiny, wide_cache: Any) -> None:
    dataset = ShardDataset(wide_cache, np.arange(3))
    sequences = [dataset[i] for i in range(3)]
    vocabulary = len(AutoTokenizer.from_pretrained(tiny.tokenizer))
    within = shares_within([wide_cache], vocabulary, 1.0)
    assert within is not None and shares_within([wide_cache], 509, 1.0) is None
    batch = Collator(Objective("kl"), vocabulary, shares_within=within).batch(sequences)
    assert batch["top_ids"].max() < vocabulary and (batch["tail_logmass"] == -np.inf).all()
    np.testing.assert_allclose(np.exp(batch["top_logprobs"].astype(np.float64)).sum(1), 1, atol=2e-3)
    # Ranks are by the teacher's own numbers.
    wide = Collator(Objective("kl"), 509).batch(sequences)
    np.testing.assert_array_equal(batch["is_hard"], wide["is_hard"])
    np.testing.assert_array_equal(batch["rank_logprob"], wide["gold_logprob"])


def test_a_sequence_with_an_id_that_the_student_lacks_is_refused() -> None:
    one = np.zeros(1, np.float32)
    ids = np.array([3, NARROW])
    sequence = StoredSequence(ids, np.array([0]), ids[1:], one, one, np.ones(1, np.int64), ids[:1], one)
    found = Collator(Objective("kl"), NARROW)([sequence])
    assert isinstance(found, CacheError)
    assert str(found).startswith(
        f"a sequence of the shards holds the token id {NARROW}, and the student has {NARROW} ids"
    )
