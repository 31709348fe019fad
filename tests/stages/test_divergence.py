"""TKD, DKD and cross-entropy from a kept set, against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from stages.divergence import Divergences, TeacherRows, at_temperature, divergences, student_terms, teacher_terms
from stages.objective import Objective, compare
from stages.sketch import Sketch
from stages.tail import Tail, log_prior
from tests import reference

PLAIN_MODES = ("bucket", "drop")


def kept_rows(teacher: np.ndarray, gold: np.ndarray, top_n: int, dtype: torch.dtype = torch.float64) -> TeacherRows:
    """What a cache of unlimited precision would hold of these teacher logits `[R, V]`."""
    found = [reference.position_statistics(row, int(g), top_n) for row, g in zip(teacher, gold, strict=True)]
    return TeacherRows(
        gold=torch.tensor(gold),
        gold_logprob=torch.tensor([f["gold_logprob"] for f in found], dtype=dtype),
        tail_logmass=torch.tensor([f["tail_logmass"] for f in found], dtype=dtype),
        top_ids=torch.tensor(np.array([f["top_ids"] for f in found])),
        top_logprobs=torch.tensor(np.array([f["top_logprobs"] for f in found]), dtype=dtype),
    )


def random_pair(rows: int, vocabulary: int, scale: float, seed: int = 0):
    generator = np.random.default_rng(seed)
    teacher, student = generator.standard_normal((2, rows, vocabulary)) * scale
    return teacher, student, generator.integers(0, vocabulary, rows)


@pytest.mark.parametrize("tail", PLAIN_MODES)
@pytest.mark.parametrize("top_n", [1, 5, 29, 30])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_equal_to_the_reference(tail: str, top_n: int, scale: float) -> None:
    """N = 1 .. V, gold inside and outside the top-N."""
    teacher, student, gold = random_pair(20, 30, scale)
    gold[:10] = teacher[:10].argmax(1)
    rows = kept_rows(teacher, gold, top_n)
    found = divergences(student_terms(torch.tensor(student), rows), teacher_terms(rows, tail, torch.float64))
    terms = {"bucket": reference.bucket_terms, "drop": reference.drop_terms}[tail]
    for row in range(len(gold)):
        kept = reference.position_statistics(teacher[row], int(gold[row]), top_n)["top_ids"]
        tkd, dkd = terms(teacher[row], student[row], int(gold[row]), kept)
        np.testing.assert_allclose(found.tkd[row], tkd, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.dkd[row], dkd, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.ce[row], -reference.log_softmax(student[row])[gold[row]], rtol=1e-12)


def test_kl_is_tkd_plus_unc_times_dkd() -> None:
    teacher, student, gold = random_pair(50, 40, 3.0)
    rows = kept_rows(teacher, gold, 40)
    terms = teacher_terms(rows, "bucket", torch.float64)
    found = divergences(student_terms(torch.tensor(student), rows), terms)
    kl = [reference.kl(p, q) for p, q in zip(teacher, student, strict=True)]
    np.testing.assert_allclose(found.tkd + terms.unc * found.dkd, kl, rtol=1e-10)


def test_bucket_is_a_lower_bound_that_grows_with_n() -> None:
    teacher, student, gold = random_pair(30, 64, 2.0)
    exact = np.array([reference.kl(p, q) for p, q in zip(teacher, student, strict=True)])
    last = np.zeros(30)
    for top_n in (1, 4, 16, 48, 64):
        rows = kept_rows(teacher, gold, top_n)
        terms = teacher_terms(rows, "bucket", torch.float64)
        found = divergences(student_terms(torch.tensor(student), rows), terms)
        kl = (found.tkd + terms.unc * found.dkd).numpy()
        assert (kl >= last - 1e-12).all()
        assert (kl <= exact + 1e-12).all()
        last = kl
    np.testing.assert_allclose(last, exact, rtol=1e-10)


@pytest.mark.parametrize("tail", PLAIN_MODES)
@pytest.mark.parametrize("top_n", [1, 3, 9])
def test_gradcheck(tail: str, top_n: int) -> None:
    teacher, student, gold = random_pair(6, 9, 2.0)
    rows = kept_rows(teacher, gold, top_n)
    terms = teacher_terms(rows, tail, torch.float64)

    def total(logits: torch.Tensor) -> torch.Tensor:
        found = divergences(student_terms(logits, rows), terms)
        return torch.stack([found.tkd, found.dkd, found.ce])

    assert torch.autograd.gradcheck(total, (torch.tensor(student, requires_grad=True),))


@pytest.mark.parametrize("tail", PLAIN_MODES)
@pytest.mark.parametrize("sure", [1e-9, 1.0 - 1e-9])
@pytest.mark.parametrize("top_n", [1, 4, 50])
def test_extreme_gold_in_float32(tail: str, sure: float, top_n: int) -> None:
    """Gold with probability 1e-9 and 1 - 1e-9: finite, close to float64, and with a finite gradient."""
    vocabulary, gold = 50, np.array([7])
    teacher = np.random.default_rng(0).standard_normal((1, vocabulary))
    rest = np.delete(teacher[0], 7)
    teacher[0, 7] = np.log(np.exp(rest).sum()) + np.log(sure) - np.log1p(-sure)
    student = np.random.default_rng(1).standard_normal((1, vocabulary))
    rows = kept_rows(teacher, gold, top_n, torch.float32)
    logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    found = divergences(student_terms(logits, rows), teacher_terms(rows, tail))
    if not (tail == "drop" and top_n == 1 and sure > 0.5):  # then drop keeps gold alone and nothing is left of UNC
        kept = reference.position_statistics(teacher[0], 7, top_n)["top_ids"]
        terms = {"bucket": reference.bucket_terms, "drop": reference.drop_terms}[tail]
        tkd, dkd = terms(teacher[0], student[0], 7, kept)
        np.testing.assert_allclose(found.tkd.item(), tkd, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.dkd.item(), dkd, rtol=1e-4, atol=1e-5)
    (found.tkd + found.dkd + found.ce).sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("tail", PLAIN_MODES)
def test_a_certain_teacher_has_no_dkd(tail: str) -> None:
    """p(gold) = 1 exactly: the non-gold distribution does not exist, DKD counts as 0 and TKD is -log q."""
    rows = TeacherRows(
        torch.tensor([2]),
        torch.tensor([0.0]),
        torch.tensor([float("-inf")]),
        torch.tensor([[2]]),
        torch.tensor([[0.0]]),
    )
    logits = torch.randn(1, 6, requires_grad=True)
    found = divergences(student_terms(logits, rows), teacher_terms(rows, tail))
    assert found.dkd.item() == 0
    torch.testing.assert_close(found.tkd, found.ce)
    (found.tkd + found.dkd).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_padding_entries_change_nothing() -> None:
    """A position with fewer entries than the widest is padded with -inf, whatever id stands there."""
    teacher, student, gold = random_pair(8, 20, 2.0)
    rows = kept_rows(teacher, gold, 4)
    padded = TeacherRows(
        rows.gold,
        rows.gold_logprob,
        rows.tail_logmass,
        torch.cat([rows.top_ids, torch.full((8, 3), 19)], 1),
        torch.cat([rows.top_logprobs, torch.full((8, 3), float("-inf"), dtype=torch.float64)], 1),
    )
    for tail in PLAIN_MODES:
        plain = divergences(student_terms(torch.tensor(student), rows), teacher_terms(rows, tail, torch.float64))
        found = divergences(student_terms(torch.tensor(student), padded), teacher_terms(padded, tail, torch.float64))
        torch.testing.assert_close(found.dkd, plain.dkd)
        torch.testing.assert_close(found.tkd, plain.tkd)


def test_a_wider_student_spreads_into_its_own_tail() -> None:
    """A head padded beyond the teacher's vocabulary: the teacher has no mass there, the student pays for its own."""
    teacher, student, gold = random_pair(6, 16, 1.0)
    wide = np.concatenate([student, np.random.default_rng(9).standard_normal((6, 8))], 1)
    rows = kept_rows(teacher, gold, 16)
    found = divergences(student_terms(torch.tensor(wide), rows), teacher_terms(rows, "bucket", torch.float64))
    padded = np.concatenate([teacher, np.full((6, 8), -np.inf)], 1)
    for row in range(6):
        np.testing.assert_allclose(found.dkd[row], reference.dkd(padded[row], wide[row], int(gold[row])), rtol=1e-9)
        np.testing.assert_allclose(found.tkd[row], reference.tkd(padded[row], wide[row], int(gold[row])), rtol=1e-9)


def tail_of(teacher: np.ndarray, gold: int, top_n: int) -> tuple[np.ndarray, np.ndarray]:
    """bool `[V]`, the tail; and the teacher's non-gold distribution p^."""
    outside = np.ones(len(teacher), bool)
    outside[reference.position_statistics(teacher, gold, top_n)["top_ids"]] = False
    outside[gold] = False
    p = np.exp(reference.log_softmax(teacher))
    p[gold] = 0
    return outside, p / p.sum()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_prior_spreads_the_tail_as_it_says(gamma: float) -> None:
    """DKD with p^ replaced, over the tail, by its mass times r ~ prior^gamma q^(1 - gamma)."""
    teacher, student, gold = random_pair(12, 40, 2.0)
    prior = np.random.default_rng(5).dirichlet(np.ones(40))
    rows = kept_rows(teacher, gold, 6)
    tail = Tail("prior", gamma, log_prior(torch.tensor(prior)))
    terms = teacher_terms(rows, "prior", torch.float64)
    logits = torch.tensor(student, requires_grad=True)
    found = divergences(student_terms(logits, rows, tail), terms)
    (gradient,) = torch.autograd.grad(found.dkd.sum(), logits)
    for row in range(12):
        outside, p = tail_of(teacher[row], int(gold[row]), 6)
        q = np.exp(reference.log_softmax(student[row]))
        q[gold[row]] = 0
        q /= q.sum()
        shape = np.where(outside, prior**gamma * q ** (1 - gamma), 0.0)
        target = np.where(outside, p[outside].sum() * shape / shape.sum(), p)
        inside = target > 0
        expected = (target[inside] * np.log(target[inside] / q[inside])).sum()
        np.testing.assert_allclose(found.dkd[row].item(), expected, rtol=1e-9)
        # With r held constant, the gradient of a cross-entropy: q^ - p^ on the non-gold ids.
        np.testing.assert_allclose(gradient[row], q - target, atol=1e-12)


def test_sampled_tail_has_the_gradient_of_the_full_teacher_on_average() -> None:
    """Each sample stands for 1/M of the tail; over many draws the gradient is the one of the whole distribution."""
    teacher, student, gold = random_pair(3, 30, 1.5)
    rows = kept_rows(teacher, gold, 4)
    generator = np.random.default_rng(0)
    draws = []
    for row in range(3):
        outside, p = tail_of(teacher[row], int(gold[row]), 4)
        draws.append(generator.choice(30, (4000, 8), p=np.where(outside, p, 0) / p[outside].sum()))
    logits = torch.tensor(student, requires_grad=True)
    terms = teacher_terms(rows, "sampled", torch.float64)
    gradients = []
    for draw in range(4000):
        rows.tail_samples = torch.tensor(np.stack([d[draw] for d in draws]))
        found = divergences(student_terms(logits, rows, Tail("sampled")), terms)
        gradients.append(torch.autograd.grad(found.dkd.sum(), logits)[0])
    stacked = torch.stack(gradients)
    mean, error = stacked.mean(0), stacked.std(0) / 4000**0.5
    for row in range(3):
        _, p = tail_of(teacher[row], int(gold[row]), 4)
        q = np.exp(reference.log_softmax(student[row]))
        q[gold[row]] = 0
        assert ((mean[row] - torch.tensor(q / q.sum() - p)).abs() <= 5 * error[row] + 1e-12).all()


@pytest.mark.parametrize("gold_is_kept", [True, False])
def test_samples_and_entropy_give_the_whole_kl(gold_is_kept: bool) -> None:
    """Of a tail that is flat, each id drawn once says all; its entropy is not in the samples but in the cache's."""
    teacher, student, gold = random_pair(12, 30, 2.0)
    for row in range(12):
        order = teacher[row].argsort()[::-1]
        gold[row] = order[2 if gold_is_kept else 9]
        teacher[row, np.setdiff1d(order[5:], gold[row])] = teacher[row].min() - 1
    rows = kept_rows(teacher, gold, 5)
    tails = [np.setdiff1d(np.arange(30), [*ids, g]) for ids, g in zip(rows.top_ids.tolist(), gold, strict=True)]
    rows.tail_samples = torch.tensor(np.array(tails))
    p, q = full(teacher, student)
    rows.entropy = torch.tensor(-(p * np.log(p)).sum(1))
    found = divergences(
        student_terms(torch.tensor(student), rows, Tail("sampled")), teacher_terms(rows, "sampled", torch.float64)
    )
    np.testing.assert_allclose(found.whole, (p * np.log(p / q)).sum(1), rtol=1e-9)
    # The shape is the teacher's alone: no gradient depends on it.
    rows.entropy = None
    other = divergences(
        student_terms(torch.tensor(student), rows, Tail("sampled")), teacher_terms(rows, "sampled", torch.float64)
    )
    assert (other.whole > found.whole).all()


@pytest.mark.parametrize("mode", ["prior", "sampled"])
def test_an_empty_tail_has_no_shape(mode: str) -> None:
    teacher, student, gold = random_pair(5, 12, 1.0)
    rows = kept_rows(teacher, gold, 12)
    rows.tail_samples = torch.full((5, 3), -1)
    tail = Tail(mode, 0.5, torch.zeros(12))
    logits = torch.tensor(student, requires_grad=True)
    found = divergences(student_terms(logits, rows, tail), teacher_terms(rows, mode, torch.float64))
    expected = [reference.dkd(p, q, int(g)) for p, q, g in zip(teacher, student, gold, strict=True)]
    np.testing.assert_allclose(found.dkd.detach(), expected, rtol=1e-9)
    found.dkd.sum().backward()
    assert torch.isfinite(logits.grad).all()


def full(teacher: np.ndarray, student: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.exp(reference.log_softmax(teacher)), np.exp(reference.log_softmax(student))


def test_reverse_swaps_teacher_and_student() -> None:
    teacher, student, gold = random_pair(12, 20, 2.0)
    rows = kept_rows(teacher, gold, 20)
    terms = teacher_terms(rows, "bucket", torch.float64)
    found = divergences(student_terms(torch.tensor(student), rows), terms, "reverse")
    for row in range(12):
        g = int(gold[row])
        np.testing.assert_allclose(found.tkd[row], reference.tkd(student[row], teacher[row], g), rtol=1e-9)
        np.testing.assert_allclose(found.dkd[row], reference.dkd(student[row], teacher[row], g), rtol=1e-9)
        np.testing.assert_allclose(found.whole[row], reference.kl(student[row], teacher[row]), rtol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_and_total_variation(beta: float) -> None:
    teacher, student, gold = random_pair(12, 20, 2.0)
    rows = kept_rows(teacher, gold, 20)
    terms = teacher_terms(rows, "bucket", torch.float64)
    reduced = student_terms(torch.tensor(student), rows)
    jsd = divergences(reduced, terms, whole="jsd", beta=beta).whole
    tvd = divergences(reduced, terms, whole="tvd").whole
    for row in range(12):
        p, q = full(teacher[row], student[row])
        m = beta * p + (1 - beta) * q
        expected = beta * (p * np.log(p / m)).sum() + (1 - beta) * (q * np.log(q / m)).sum()
        np.testing.assert_allclose(jsd[row], expected, rtol=1e-9)
        np.testing.assert_allclose(tvd[row], 0.5 * np.abs(p - q).sum(), rtol=1e-9)


@pytest.mark.parametrize("whole", ["jsd", "tvd"])
@pytest.mark.parametrize("top_n", [1, 5, 9])
def test_gradcheck_of_whole_divergences(whole: str, top_n: int) -> None:
    teacher, student, gold = random_pair(5, 9, 2.0)
    rows = kept_rows(teacher, gold, top_n)
    terms = teacher_terms(rows, "bucket", torch.float64)

    def call(logits: torch.Tensor) -> torch.Tensor:
        return divergences(student_terms(logits, rows), terms, whole=whole, beta=0.3).whole

    assert torch.autograd.gradcheck(call, (torch.tensor(student, requires_grad=True),))


@pytest.mark.parametrize("top_n", [1, 5, 9])
def test_gradcheck_of_reverse(top_n: int) -> None:
    teacher, student, gold = random_pair(5, 9, 2.0)
    rows = kept_rows(teacher, gold, top_n)
    terms = teacher_terms(rows, "bucket", torch.float64)

    def call(logits: torch.Tensor) -> torch.Tensor:
        found = divergences(student_terms(logits, rows), terms, "reverse")
        return torch.stack([found.tkd, found.dkd, found.whole])

    assert torch.autograd.gradcheck(call, (torch.tensor(student, requires_grad=True),))


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("top_n", [1, 6, 25])
def test_temperature_equals_softened_logits(temperature: float, top_n: int) -> None:
    """From the kept set and the stored tail at T: what the teacher's logits divided by T would have given."""
    teacher, student, gold = random_pair(10, 25, 3.0)
    found = [
        reference.position_statistics(t, int(g), top_n, (temperature,)) for t, g in zip(teacher, gold, strict=True)
    ]
    tail_at = torch.tensor([f["tail_logmass_T"][temperature] for f in found], dtype=torch.float64)
    rows = at_temperature(kept_rows(teacher, gold, top_n), tail_at, temperature)
    terms = divergences(
        student_terms(torch.tensor(student / temperature), rows), teacher_terms(rows, "bucket", torch.float64)
    )
    for row in range(10):
        p, q = teacher[row] / temperature, student[row] / temperature
        tkd, dkd = reference.bucket_terms(p, q, int(gold[row]), found[row]["top_ids"])
        np.testing.assert_allclose(terms.tkd[row], tkd, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(terms.dkd[row], dkd, rtol=1e-8, atol=1e-12)


@dataclass
class Sketched:
    """Rows whose tails a sketch has for w. meant: float64 `[R, V]`, the teacher as these rows say: the kept ids as they
    are, the tail's mass spread as w and the residual samples, if any, have it.
    """

    teacher: np.ndarray
    student: np.ndarray
    gold: np.ndarray
    rows: TeacherRows
    sketch: Sketch
    meant: np.ndarray

    def compared(self, **objective: Any) -> tuple[Divergences, np.ndarray]:
        """By this objective; and the gradient of the whole divergence on the student's logits."""
        asked = Objective(**objective, tail="sketch")
        logits = torch.tensor(self.student / asked.temperature, requires_grad=True)
        student = student_terms(logits, self.rows, asked.sketch_tail(self.sketch))
        found = compare(asked, student, teacher_terms(self.rows, "sketch", torch.float64))
        return found, torch.autograd.grad(found.whole.sum(), logits)[0].numpy()


def sketched(samples: int = 0, temperature: float = 1.0) -> Sketched:
    teacher, student, gold = random_pair(12, 30, 2.0)
    generator = np.random.default_rng(3)
    basis, bias = generator.standard_normal((30, 4)), generator.standard_normal(30)
    codes = generator.integers(1, 256, (12, 4))
    nothing = torch.zeros(1)
    sketch = Sketch(
        torch.tensor(basis).float(), torch.tensor(bias).float(), nothing, nothing, torch.full((4,), 0.01), nothing
    )
    rows = kept_rows(teacher / temperature, gold, 5)
    rows.sketch_codes = torch.tensor(codes, dtype=torch.uint8)
    meant = np.exp(reference.log_softmax(teacher / temperature))
    drawn = np.zeros((12, samples), np.int64)
    for row in range(12):
        outside, _ = tail_of(teacher[row], int(gold[row]), 5)
        w = np.where(outside, np.exp((bias + 0.01 * basis @ (codes[row] - 128.0)) / temperature), 0.0)
        w /= w.sum()
        if samples:
            drawn[row] = generator.choice(np.flatnonzero(outside), samples)
            more = (samples + 1) // 2
            np.add.at(w, drawn[row, :more], 0.25 / more)
            np.add.at(w, drawn[row, more:], -0.25 / (samples - more))
        meant[row, outside] = meant[row, outside].sum() * w[outside]
    if samples:
        rows.residual_samples, rows.residual_mass = torch.tensor(drawn), torch.full((12,), 0.5)
    return Sketched(teacher, student, gold, rows, sketch, meant)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_sketch_spreads_the_tail_as_it_says(temperature: float) -> None:
    """Every divergence, TKD and DKD included, is the one of the distribution that is meant."""
    made = sketched(temperature=temperature)
    p, q = made.meant, np.exp(reference.log_softmax(made.student / temperature))
    log_p, log_q = np.log(p), np.log(q)
    for direction, (one, other) in [("forward", (log_p, log_q)), ("reverse", (log_q, log_p))]:
        found, gradient = made.compared(name="kl", direction=direction, temperature=temperature)
        for row in range(12):
            g = int(made.gold[row])
            np.testing.assert_allclose(found.tkd[row].item(), reference.tkd(one[row], other[row], g), rtol=1e-5)
            np.testing.assert_allclose(found.dkd[row].item(), reference.dkd(one[row], other[row], g), rtol=1e-5)
            np.testing.assert_allclose(found.whole[row].item(), reference.kl(one[row], other[row]), rtol=1e-5)
    kl = (q * (log_q - log_p)).sum(1, keepdims=True)
    np.testing.assert_allclose(gradient, q * (log_q - log_p - kl), atol=1e-6)
    mixed = 0.3 * p + 0.7 * q
    jsd, _ = made.compared(name="jsd", beta=0.3, temperature=temperature)
    expected = (0.3 * p * np.log(p / mixed) + 0.7 * q * np.log(q / mixed)).sum(1)
    np.testing.assert_allclose(jsd.whole.detach(), expected, rtol=1e-5)
    tvd, _ = made.compared(name="tvd", temperature=temperature)
    np.testing.assert_allclose(tvd.whole.detach(), 0.5 * abs(p - q).sum(1), rtol=1e-5)


@pytest.mark.parametrize("samples", [2, 7])
def test_residual_samples_add_and_take_away(samples: int) -> None:
    """The gradient is that of the distribution they make, which need not be positive; the value is the KL of the full
    teacher but for what the samples do not see, whose own entropy the cache has."""
    made = sketched(samples)
    p, q = full(made.teacher, made.student)
    made.rows.entropy = torch.tensor(-(p * np.log(p)).sum(1))
    found, gradient = made.compared(name="kl")
    np.testing.assert_allclose(made.meant.sum(1), np.ones(12))
    np.testing.assert_allclose(gradient, q - made.meant, atol=1e-6)
    np.testing.assert_allclose(found.whole.detach(), (p * np.log(p) - made.meant * np.log(q)).sum(1), rtol=1e-5)
    # Drawn at temperature 1 from what is left of p, they have no part in any other comparison.
    alone = sketched()
    for asked in ({"name": "kl", "direction": "reverse"}, {"name": "jsd"}, {"name": "tvd"}, {"temperature": 2.0}):
        torch.testing.assert_close(made.compared(**asked)[0].whole, alone.compared(**asked)[0].whole)
