"""Objectives as weighted sums, and the ranks behind them, against the plain definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import ranking
from stages.divergence import divergences, student_terms, teacher_terms
from stages.objective import NORMALIZATIONS, Objective, chosen_tokens, coefficients, compare, weighted_sum
from tests import reference
from tests.stages.test_divergence import kept_rows, random_pair


def loss(objective: Objective, teacher: np.ndarray, student: torch.Tensor, gold: np.ndarray) -> torch.Tensor:
    """The objective on a micro-batch whose kept set is the whole vocabulary."""
    rows = kept_rows(teacher, gold, teacher.shape[1])
    terms = teacher_terms(rows, objective.tail, torch.float64)
    hard = torch.tensor(ranking.is_hard(rows.gold_logprob.numpy(), objective.hard_ratio))
    return weighted_sum(
        compare(objective, student_terms(student, rows), terms), coefficients(objective, hard, dtype=torch.float64)
    )


@pytest.mark.parametrize("name", reference.OBJECTIVES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_equal_to_the_plain_definition(name: str, normalize: str, ce_weight: float) -> None:
    teacher, student, gold = random_pair(11, 17, 2.0)
    objective = Objective(name=name, normalize=normalize, ce_weight=ce_weight, hard_ratio=0.4, easy_weight=0.3)
    logits = torch.tensor(student, requires_grad=True)
    found = loss(objective, teacher, logits, gold)
    options = {"hard_ratio": 0.4, "easy_weight": 0.3, "normalize": normalize}
    expected = reference.objective_loss(name, teacher, student, gold, ce_weight, **options)
    np.testing.assert_allclose(found.item(), expected, rtol=1e-9)
    found.backward()
    gradient = reference.gradient_on_logits(name, teacher, student, gold, ce_weight, **options)
    np.testing.assert_allclose(logits.grad, gradient, atol=2e-8)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("hard_ratio", [0.0, 0.5, 1.0])
def test_atkd_with_ties_and_an_empty_group(normalize: str, hard_ratio: float) -> None:
    teacher, student, gold = random_pair(8, 9, 1.5)
    teacher[3:7], gold[3:7] = teacher[3], gold[3]  # four tokens of one and the same UNC
    objective = Objective(hard_ratio=hard_ratio, normalize=normalize)
    found = loss(objective, teacher, torch.tensor(student), gold)
    expected = reference.atkd_loss(teacher, student, gold, 0.2, hard_ratio, normalize)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert torch.isfinite(found)


def test_one_token_is_hard_and_alone() -> None:
    teacher, student, gold = random_pair(1, 9, 1.5)
    found = loss(Objective(), teacher, torch.tensor(student), gold)
    expected = 0.8 * (
        reference.tkd(teacher[0], student[0], int(gold[0])) + reference.dkd(teacher[0], student[0], int(gold[0]))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_token_normalisation_adds_up_over_micro_batches() -> None:
    """Two micro-batches divided by the tokens of the step give the loss of both at once: no double division."""
    teacher, student, gold = random_pair(10, 9, 1.5)
    objective = Objective("kl", normalize="token")
    whole = loss(objective, teacher, torch.tensor(student), gold)
    parts = []
    for part in (slice(0, 3), slice(3, 10)):
        rows = kept_rows(teacher[part], gold[part], 9)
        terms = teacher_terms(rows, "bucket", torch.float64)
        weights = coefficients(objective, torch.zeros(len(rows), dtype=torch.bool), step_tokens=10, dtype=torch.float64)
        parts.append(weighted_sum(divergences(student_terms(torch.tensor(student[part]), rows), terms), weights))
    torch.testing.assert_close(sum(parts), whole)


@given(
    st.lists(st.floats(-50, 0, width=32) | st.sampled_from([-1.0, -2.0]), max_size=40),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.6, 0.9, 1.0]),
)
def test_hard_tokens_equal_the_reference(gold_logprob: list[float], ratio: float) -> None:
    values = np.array(gold_logprob, np.float32)
    # The reference ranks by any number that rises with UNC.
    assert ranking.is_hard(values, ratio).tolist() == reference.is_hard(-values.astype(np.float64), ratio).tolist()


def test_hard_by_sequence_ranks_each_on_its_own() -> None:
    values = np.log(np.array([0.9, 0.8, 0.7, 0.1, 0.2, 0.3, 0.4]))
    hard = ranking.is_hard_by_sequence(values, [3, 4], 0.5)
    assert hard.tolist() == [False, True, True, True, True, False, False]
    assert ranking.is_hard(values, 0.5).tolist() == [False, False, False, True, True, True, True]


def test_very_sure_tokens_still_have_an_order() -> None:
    """1 - p is 0 in float32 for all three; log p is not."""
    values = -np.array([1e-10, 1e-9, 1e-8], np.float32)
    assert ranking.is_hard(values, 1 / 3).tolist() == [False, False, True]


def test_train_on_some_tokens_is_the_mean_over_those() -> None:
    teacher, student, gold = random_pair(10, 9, 1.5)
    unc = np.array([reference.unc(t, int(g)) for t, g in zip(teacher, gold, strict=True)])
    hard = reference.is_hard(unc, 0.3)
    kl = np.array([reference.kl(p, q) for p, q in zip(teacher, student, strict=True)])
    for train_on, mask in [("hard", hard), ("easy", ~hard)]:
        found = loss(Objective("kl", train_on=train_on, hard_ratio=0.3), teacher, torch.tensor(student), gold)
        np.testing.assert_allclose(found, kl[mask].mean(), rtol=1e-9)
    dkd = np.array([reference.dkd(p, q, int(g)) for p, q, g in zip(teacher, student, gold, strict=True)])
    found = loss(Objective("atkd", train_on="easy", hard_ratio=0.3), teacher, torch.tensor(student), gold)
    np.testing.assert_allclose(found, 0.2 * dkd[~hard].mean(), rtol=1e-9)


def test_temperature_squared_scales_divergences_and_not_cross_entropy() -> None:
    hard = torch.tensor([True, False])
    plain = coefficients(Objective("kl", temperature=2.0, temperature_squared=False, ce_weight=0.5), hard)
    squared = coefficients(Objective("kl", temperature=2.0, ce_weight=0.5), hard)
    torch.testing.assert_close(squared.whole, 4 * plain.whole)
    torch.testing.assert_close(squared.ce, plain.ce)


@pytest.mark.parametrize(
    "options",
    [
        {"direction": "reverse", "tail": "drop"},
        {"name": "jsd", "tail": "prior"},
        {"name": "tvd", "direction": "reverse"},
        {"tail": "sampled", "temperature": 2.0},
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict) -> None:
    assert Objective().problem() is None
    assert Objective(**options).problem()


@pytest.mark.parametrize(
    ("options", "residuals", "chosen"),
    [
        ({}, True, "sketch"),
        ({}, False, "sampled"),
        ({"temperature": 2.0}, True, "sketch"),
        ({"direction": "reverse"}, False, "sketch"),
        ({"name": "jsd"}, True, "sketch"),
        ({"name": "ce"}, True, "bucket"),
        ({"tail": "bucket"}, True, "bucket"),
    ],
)
def test_auto_takes_a_sketch_where_nothing_unbiased_is_without(options: dict, residuals: bool, chosen: str) -> None:
    resolved = Objective(**options).for_cache(
        has_samples=True, has_prior=True, has_sketch=True, has_residuals=residuals
    )
    assert resolved.tail == chosen
    assert resolved.problem() is None
    no_samples = Objective(**options).for_cache(has_samples=False, has_prior=True, has_sketch=True)
    assert no_samples.tail == ("sketch" if chosen == "sampled" else chosen)


@pytest.mark.parametrize(
    ("options", "samples", "prior", "chosen"),
    [
        ({}, True, True, "sampled"),
        ({}, False, True, "prior"),
        ({}, False, False, "bucket"),
        ({"temperature": 2.0}, True, True, "prior"),
        ({"direction": "reverse"}, True, True, "bucket"),
        ({"name": "jsd"}, True, True, "bucket"),
        ({"name": "tvd"}, True, True, "bucket"),
        ({"name": "ce"}, True, True, "bucket"),
        ({"tail": "drop"}, True, True, "drop"),
    ],
)
def test_auto_becomes_a_tail_that_can_be_had(options: dict, samples: bool, prior: bool, chosen: str) -> None:
    resolved = Objective(**options).for_cache(has_samples=samples, has_prior=prior)
    assert resolved.tail == chosen
    assert resolved.problem() is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([-0.5, -1.0, -1.5, -2.0, -3.0, -4.5]) | st.floats(-20, -1e-3), min_size=1, max_size=30))
def test_median_is_the_split_of_torch_median(gold: list[float]) -> None:
    """Ties too; of an even number of different values one token more is hard than at 0.5."""
    logprob = np.array(gold, np.float32)
    # Any quantity that falls with log p orders as UNC does; float32 of 1 - p would tie where log p does not.
    unc = torch.tensor(-logprob)
    hard = ranking.is_hard(logprob, "median")
    np.testing.assert_array_equal(hard, (unc >= unc.median()).numpy())
    if len(set(logprob.tolist())) == len(logprob):
        assert hard.sum() == len(gold) // 2 + 1
        assert ranking.is_hard(logprob, 0.5).sum() == -(-len(gold) // 2)


def test_the_median_of_nothing_is_nothing() -> None:
    assert ranking.hard_threshold(np.zeros(0, np.float32), "median") == -np.inf


@pytest.mark.parametrize("name", ["atkd", "kl", "ce", "tkd+dkd"])
@pytest.mark.parametrize("train_on", ["all", "easy", "hard"])
def test_token_normalisation_divides_by_the_tokens_that_have_a_loss(name: Any, train_on: Any) -> None:
    is_hard = torch.tensor([True, False, True, True, False, False, False])
    objective = Objective(name, normalize="token", train_on=train_on)
    chosen = chosen_tokens(objective, is_hard)
    assert chosen == {"all": 7, "easy": 4, "hard": 3}[train_on]
    alone, of_step = coefficients(objective, is_hard), coefficients(objective, is_hard, 5 * chosen)
    for field in ("tkd", "dkd", "whole", "ce"):
        one, other = getattr(alone, field), getattr(of_step, field)
        torch.testing.assert_close(one, 5 * other)
        assert set(one[~(is_hard if train_on == "hard" else ~is_hard)].tolist()) <= {0.0} or train_on == "all"
    total = {"atkd": alone.dkd, "kl": alone.whole, "ce": alone.ce, "tkd+dkd": alone.tkd}[name]
    weight = {"all": (3 * 0.8 + 4 * 0.2) / 7, "easy": 0.2, "hard": 0.8}[train_on] if name == "atkd" else 1.0
    assert total.sum().item() == pytest.approx(weight)


def test_a_step_without_a_token_that_has_a_loss_is_zero() -> None:
    objective = Objective("kl", normalize="token", train_on="hard")
    weights = coefficients(objective, torch.zeros(4, dtype=torch.bool), chosen_tokens(objective, torch.zeros(4).bool()))
    assert weights.whole.tolist() == [0.0] * 4
