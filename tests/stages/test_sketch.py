"""The sketch against the singular value decomposition of the very logits that it approximates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.sketch import HiddenMoments, Sketch, calibrate
from stages.tail import Tail


def states(positions: int, width: int, seed: int = 0) -> np.ndarray:
    """Hidden states `[P, H]` that fill their space unevenly, far from 0, with two dead dimensions."""
    generator = np.random.default_rng(seed)
    mixed = generator.standard_normal((width, width)) * 0.7 ** np.arange(width)[:, None]
    hidden = generator.standard_normal((positions, width)) @ mixed + 3 * generator.standard_normal(width)
    hidden[:, :2] = 0.5
    return hidden.astype(np.float32)


def moments_of(hidden: np.ndarray) -> HiddenMoments:
    moments = HiddenMoments(hidden.shape[1])
    for part in np.array_split(hidden, 3):
        moments.add(torch.from_numpy(part))
    return moments


def centred(logits: np.ndarray) -> np.ndarray:
    """A softmax does not see the mean of a row."""
    return logits - logits.mean(1, keepdims=True)


def error(logits: np.ndarray, sketch: Sketch, hidden: np.ndarray, *, rounded: bool) -> float:
    """Sum of squares that the sketch misses of `[P, V]` logits."""
    states = torch.from_numpy(hidden)
    found = sketch.logits(sketch.encode(states)) if rounded else sketch.decode(exact_codes(sketch, hidden))
    return float((centred(found.double().numpy() - logits) ** 2).sum())


def exact_codes(sketch: Sketch, hidden: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(hidden) - sketch.mean) @ sketch.encoder.T


@pytest.mark.parametrize("positions", [400, 15])  # 15: fewer than dimensions, a covariance without an inverse
@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("with_bias", [True, False])
def test_no_other_approximation_of_that_rank_is_nearer(positions: int, rank: int, with_bias: bool) -> None:
    generator = np.random.default_rng(1)
    hidden, weight = states(positions, 24), generator.standard_normal((300, 24)).astype(np.float32)
    bias = generator.standard_normal(300).astype(np.float32) if with_bias else None
    sketch = calibrate(
        moments_of(hidden), torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias), rank
    )
    logits = hidden.astype(np.float64) @ weight.T.astype(np.float64) + (0 if bias is None else bias)
    deviations = centred(logits - logits.mean(0))
    left, singular, right = np.linalg.svd(deviations, full_matrices=False)
    best = float((singular[rank:] ** 2).sum())
    total = float((singular**2).sum())
    # float32 and a float16 basis.
    assert best - 1e-7 * total <= error(logits, sketch, hidden, rounded=False) <= best + 1e-6 * total
    # Not only as near: the very same approximation.
    found = centred((sketch.decode(exact_codes(sketch, hidden)) - sketch.bias).double().numpy())
    np.testing.assert_allclose(found, left[:, :rank] * singular[:rank] @ right[:rank], atol=4e-3 * deviations.std())
    np.testing.assert_allclose(sketch.explained[: len(singular)], np.cumsum(singular**2)[:24] / total, atol=1e-5)
    # Rounding adds a twelfth of the squares of the steps, which are equally long in the logits but for those that a
    # code would not reach.
    steps = np.maximum(singular[rank], 8 / 127 * singular[:rank])
    np.testing.assert_allclose(sketch.scales * singular[:rank], steps, rtol=1e-4)
    added = error(logits, sketch, hidden, rounded=True) - best
    assert added == pytest.approx((steps**2).sum() / 12, rel=0.5)


def test_codes_have_unit_variance_and_stay_in_range() -> None:
    hidden = states(500, 24)
    sketch = calibrate(moments_of(hidden), torch.randn((100, 24), generator=torch.Generator().manual_seed(0)), None, 6)
    codes = sketch.encode(torch.from_numpy(hidden))
    assert codes.dtype == torch.uint8 and codes.shape == (500, 6)
    np.testing.assert_allclose(exact_codes(sketch, hidden).var(0, correction=0), np.ones(6), atol=1e-3)
    np.testing.assert_allclose((codes.float() - 128) * sketch.scales, exact_codes(sketch, hidden), atol=0.501)
    wild = sketch.encode(torch.from_numpy(1e6 * hidden))
    assert wild.min() == 1 and wild.max() == 255


def test_a_rank_beyond_the_variance_adds_nothing() -> None:
    """Hidden states that all are alike but for two dimensions."""
    hidden = np.ones((50, 8), np.float32)
    hidden[:, 3:5] = np.random.default_rng(0).standard_normal((50, 2))
    weight = torch.randn((40, 8), generator=torch.Generator().manual_seed(0))
    sketch = calibrate(moments_of(hidden), weight, None, 8)
    assert all(torch.isfinite(value).all() for value in sketch.__dict__.values() if isinstance(value, torch.Tensor))
    assert (sketch.basis[:, 2:] == 0).all() and (sketch.encode(torch.from_numpy(hidden))[:, 2:] == 128).all()
    np.testing.assert_allclose(sketch.explained[1:], np.ones(7), atol=1e-6)
    flat = calibrate(moments_of(np.ones((5, 8), np.float32)), weight, None, 2)
    torch.testing.assert_close(flat.logits(flat.encode(torch.ones(3, 8))), (weight.sum(1)).expand(3, 40))


def test_moments_are_those_of_the_whole_however_they_came() -> None:
    hidden = states(200, 10)
    whole, one, other = HiddenMoments(10), HiddenMoments(10), HiddenMoments(10)
    whole.add(torch.from_numpy(hidden))
    one.add(torch.from_numpy(hidden[:50]))
    other.add(torch.from_numpy(hidden[50:]))
    one.merge(other)
    for found in (whole, one):
        assert found.count == 200
        np.testing.assert_allclose(found.mean, hidden.mean(0, dtype=float), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(hidden.T.astype(float), bias=True), atol=1e-9)


@pytest.mark.parametrize(("scale", "cap"), [(0.25, None), (1.0, 5.0), (2.0, 5.0)])
def test_scale_and_cap_come_after_the_sketch(scale: float, cap: float | None) -> None:
    """At full rank the sketch is the model, head included."""
    hidden = states(300, 12)
    weight = torch.randn((60, 12), generator=torch.Generator().manual_seed(0))
    bias = torch.randn(60, generator=torch.Generator().manual_seed(1))
    sketch = calibrate(moments_of(hidden), weight, bias, 12, logit_scale=scale, soft_cap=cap)
    logits = scale * (torch.from_numpy(hidden) @ weight.T + bias)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    found = sketch.decode(exact_codes(sketch, hidden))
    if cap is None:
        found, logits = found - found.mean(1, keepdim=True), logits - logits.mean(1, keepdim=True)
    torch.testing.assert_close(found, logits, atol=2e-2, rtol=1e-3)


def test_a_mixed_precision_run_rebuilds_the_tail_in_float32() -> None:
    hidden = states(60, 12)
    weight = 5 * torch.randn((60, 12), generator=torch.Generator().manual_seed(0))
    sketch = calibrate(moments_of(hidden), weight, None, 6)
    codes, none = sketch.encode(torch.from_numpy(hidden)), torch.zeros((60, 1), dtype=torch.int64)
    tail = Tail("sketch", sketch=sketch)
    # A student with more ids than the teacher has, and one with fewer.
    for width in (64, 50):
        x = tail.sketch_logits(codes, none, none, width)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tail.sketch_logits(codes, none, none, width), x)
        torch.testing.assert_close(x[:, 1:60], sketch.logits(codes)[:, 1 : min(60, width)])
        assert (x.softmax(1)[:, [0, *range(60, width)]] == 0).all()


def test_half_precision_heads_and_wrong_ranks() -> None:
    hidden = states(60, 12)
    weight = torch.randn((60, 12), generator=torch.Generator().manual_seed(0)).bfloat16()
    half, full = (calibrate(moments_of(hidden), head, None, 3) for head in (weight, weight.float()))
    torch.testing.assert_close(half.basis, full.basis)
    for rank in (0, 13):
        with pytest.raises(ValueError, match="1 to the hidden size 12"):
            calibrate(moments_of(hidden), weight, None, rank)
    with pytest.raises(ValueError, match="calibrate on"):
        calibrate(HiddenMoments(12), weight, None, 2)
