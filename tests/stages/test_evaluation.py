"""The held-out KL of a cache with a sketch, against the full teacher."""

from __future__ import annotations

import numpy as np
import torch

from stages.divergence import TeacherRows
from stages.evaluation import MEASURES, measured_tail, sums_by_sequence
from stages.sketch import Sketch
from stages.statistics import StatisticsOptions, residual_uniforms, row_statistics
from tests import reference

REPLAYS, VOCABULARY = 4000, 60


def replays(residual_samples: int) -> tuple[TeacherRows, Sketch, np.ndarray]:
    """One position, stored again and again with other residual samples; its sketch; the teacher's logits."""
    generator = np.random.default_rng(0)
    logits = 2 * generator.standard_normal(VOCABULARY)
    basis, bias = generator.standard_normal((VOCABULARY, 2)), logits + generator.standard_normal(VOCABULARY)
    nothing = torch.zeros(1)
    sketch = Sketch(
        torch.tensor(basis).float(), torch.tensor(bias).float(), nothing, nothing, torch.full((2,), 0.01), nothing
    )
    codes = torch.tensor([[150, 90]], dtype=torch.uint8).expand(REPLAYS, 2)
    gold = torch.full((REPLAYS,), 7)
    options = StatisticsOptions(4, residual_samples=residual_samples)
    found = row_statistics(
        torch.tensor(logits).float().expand(REPLAYS, -1),
        gold,
        options,
        sketch_logits=sketch.logits(codes),
        residual_uniforms=torch.tensor(residual_uniforms(np.arange(REPLAYS + 1), options)),
    )
    rows = TeacherRows(
        gold,
        found.gold_logprob,
        found.tail_logmass,
        found.top_ids,
        found.top_logprobs,
        entropy=found.entropy,
        sketch_codes=codes,
        residual_samples=found.residual_samples if residual_samples else None,
        residual_mass=found.residual_mass if residual_samples else None,
    )
    return rows, sketch, logits


def held_out_kl(rows: TeacherRows, sketch: Sketch | None, student: torch.Tensor) -> np.ndarray:
    """Of each replay, which is a sequence of its own."""
    sums = sums_by_sequence(
        student.expand(REPLAYS, -1),
        lambda hidden: hidden,
        rows,
        torch.zeros(REPLAYS, dtype=torch.bool),
        torch.arange(REPLAYS),
        sequences=REPLAYS,
        vocabulary_size=VOCABULARY,
        sketch=sketch,
    )
    return sums[:, 0, 1 + MEASURES.index("kl")].numpy()


def test_residual_samples_give_the_held_out_kl_without_bias() -> None:
    rows, sketch, logits = replays(6)
    student = torch.tensor(np.random.default_rng(1).standard_normal(VOCABULARY)).float()
    kl = reference.kl(logits, student.double().numpy())
    estimates = held_out_kl(rows, sketch, student)
    assert estimates.std() > 0.01
    assert abs(estimates.mean() - kl) <= 4 * estimates.std() / REPLAYS**0.5 + 1e-4
    # Without the sketch the same rows give a lower bound.
    assert held_out_kl(rows, None, student)[0] < kl - 0.05
    assert measured_tail(rows, None).mode == "bucket"


def test_a_sketch_alone_gives_the_kl_to_what_it_says() -> None:
    rows, sketch, logits = replays(0)
    assert measured_tail(rows, sketch).mode == "sketch"
    rows.tail_samples = torch.zeros((REPLAYS, 3), dtype=torch.long)
    assert measured_tail(rows, sketch).mode == "sampled"
    rows.tail_samples = None
    p, kept = np.exp(reference.log_softmax(logits)), np.append(rows.top_ids[0], 7)
    said = sketch.logits(rows.sketch_codes[:1])[0].double().numpy()
    said[kept] = -np.inf
    p = np.where(
        np.isin(np.arange(VOCABULARY), kept), p, np.delete(p, kept).sum() * np.exp(reference.log_softmax(said))
    )
    student = torch.zeros(VOCABULARY)
    np.testing.assert_allclose(held_out_kl(rows, sketch, student), (p * np.log(p * VOCABULARY)).sum(), rtol=1e-4)
