"""The teacher's statistics against the float64 reference, at ordinary and extreme positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.statistics import StatisticsOptions, residual_uniforms, row_statistics, sample_uniforms
from tests import reference


def statistics(logits: np.ndarray, gold: np.ndarray, options: StatisticsOptions, **more):
    return row_statistics(torch.tensor(logits, dtype=torch.float32), torch.tensor(gold), options, **more)


def random_rows(rows: int, vocabulary: int, scale: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    # Rounded to float32 first, so that the reference sees the very same logits.
    logits = (generator.standard_normal((rows, vocabulary)) * scale).astype(np.float32).astype(np.float64)
    return logits, generator.integers(0, vocabulary, rows)


@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("top_n", [1, 7, 301])
def test_equal_to_the_reference(scale: float, top_n: int) -> None:
    logits, gold = random_rows(12, 301, scale)
    found = statistics(logits, gold, StatisticsOptions(top_n, temperatures=(2.0, 4.0, 0.5)))
    for row in range(len(gold)):
        expected = reference.position_statistics(logits[row], int(gold[row]), top_n, (2.0, 4.0, 0.5))
        assert found.top_ids[row].tolist() == list(expected["top_ids"])
        np.testing.assert_allclose(found.top_logprobs[row], expected["top_logprobs"], atol=2e-5, rtol=1e-6)
        np.testing.assert_allclose(found.gold_logprob[row], expected["gold_logprob"], atol=2e-5, rtol=1e-6)
        np.testing.assert_allclose(found.entropy[row], expected["entropy"], atol=2e-5)
        np.testing.assert_allclose(found.tail_logmass[row], expected["tail_logmass"], atol=2e-5, rtol=1e-6)
        for column, temperature in enumerate((2.0, 4.0, 0.5)):
            np.testing.assert_allclose(
                found.tail_logmass_at[row, column], expected["tail_logmass_T"][temperature], atol=3e-5, rtol=1e-6
            )


@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
@pytest.mark.parametrize(("epsilon", "min_n"), [(0.5, 1), (0.1, 3), (1e-6, 1)])
def test_adaptive_n_is_the_shortest_prefix_of_the_reference(scale: float, epsilon: float, min_n: int) -> None:
    """Tail, temperatures, samples and prior are those of the kept prefix; what it does not change stays."""
    cap, temperatures = 40, (2.0, 0.5)
    logits, gold = random_rows(30, 301, scale)
    gold[:20] = np.argsort(-logits, 1)[np.arange(20), np.arange(20) * 2]  # inside the prefix, and behind it
    options = StatisticsOptions(cap, temperatures, tail_samples=6, tail_epsilon=epsilon, min_n=min_n)
    uniforms = torch.tensor(np.random.default_rng(0).random((30, 6)))
    prior = torch.zeros(301, dtype=torch.float64)
    found = statistics(logits, gold, options, uniforms=uniforms, prior_sum=prior)
    expected_prior = np.zeros(301)
    counts = set()
    for row in range(len(gold)):
        for count in range(min_n, cap + 1):
            expected = reference.position_statistics(logits[row], int(gold[row]), count, temperatures)
            if np.exp(expected["tail_logmass"]) < epsilon:
                break
        counts.add(count)
        assert found.top_ids[row].tolist() == [*expected["top_ids"], *[-1] * (cap - count)]
        np.testing.assert_allclose(found.top_logprobs[row, :count], expected["top_logprobs"], atol=2e-5, rtol=1e-6)
        assert torch.isneginf(found.top_logprobs[row, count:]).all()
        np.testing.assert_allclose(found.gold_logprob[row], expected["gold_logprob"], atol=2e-5, rtol=1e-6)
        np.testing.assert_allclose(found.entropy[row], expected["entropy"], atol=2e-5)
        np.testing.assert_allclose(found.tail_logmass[row], expected["tail_logmass"], atol=2e-5, rtol=1e-6)
        for column, temperature in enumerate(temperatures):
            np.testing.assert_allclose(
                found.tail_logmass_at[row, column], expected["tail_logmass_T"][temperature], atol=3e-5, rtol=1e-6
            )
        tail = np.exp(reference.log_softmax(logits[row]))
        tail[expected["top_ids"]] = tail[gold[row]] = 0
        expected_prior += tail
        # The drawing inverts the tail's cumulative sum: near a jump float32 may fall on either side.
        cumulative = tail.cumsum()
        targets = uniforms[row].numpy() * cumulative[-1]
        for drawn, target in zip(found.tail_samples[row].tolist(), targets, strict=True):
            assert tail[drawn] > 0
            assert cumulative[drawn] - tail[drawn] - 1e-5 * cumulative[-1] <= target <= cumulative[drawn] * (1 + 1e-5)
    np.testing.assert_allclose(prior, expected_prior, atol=1e-5)
    assert len(counts) > 1 or scale == 0.5 or epsilon == 1e-6


def test_a_sure_teacher_keeps_the_digits_of_its_uncertainty() -> None:
    """Gold with probability 1 - 1e-9 and 1e-9: `1 - p` in float32 would be 0 and the ranks lost."""
    logits = np.full((2, 1001), 0.0)
    logits[0, 5] = np.log(1000 / 1e-9)  # p(5) = 1 - 1e-9
    logits[1, 5] = np.log(1000 / 1e-9)
    found = statistics(logits, np.array([5, 6]), StatisticsOptions(4))
    np.testing.assert_allclose(-np.expm1(found.gold_logprob[0].double().numpy()), 1e-9, rtol=1e-5)
    np.testing.assert_allclose(found.gold_logprob[1], np.log(1e-12), rtol=1e-6)
    np.testing.assert_allclose(found.tail_logmass[0], np.log(997e-12), rtol=1e-6)


def test_tail_is_empty_when_everything_is_kept() -> None:
    logits, gold = random_rows(5, 40, 2.0)
    everything = statistics(logits, gold, StatisticsOptions(40, temperatures=(2.0,)))
    assert torch.isneginf(everything.tail_logmass).all()
    assert torch.isneginf(everything.tail_logmass_at).all()
    # 39 of 40, and the one left out is gold.
    gold = logits.argmin(1)
    assert torch.isneginf(statistics(logits, gold, StatisticsOptions(39)).tail_logmass).all()


def test_vocabulary_beyond_16_bits() -> None:
    logits, _ = random_rows(3, 70_001, 3.0)
    gold = np.array([70_000, 65_536, 3])
    logits[0, 70_000] = 40.0
    found = statistics(logits, gold, StatisticsOptions(5))
    assert found.top_ids[0, 0] == 70_000
    for row in range(3):
        expected = reference.position_statistics(logits[row], int(gold[row]), 5)
        np.testing.assert_allclose(found.tail_logmass[row], expected["tail_logmass"], atol=3e-5, rtol=1e-5)


def test_masked_logits_leave_the_entropy_finite() -> None:
    """Heads padded to a round width give -inf, or the most negative float, at ids that do not exist."""
    logits, gold = random_rows(4, 64, 2.0)
    padded = np.concatenate([logits, np.full((4, 8), -np.inf)], 1)
    found = statistics(padded, gold, StatisticsOptions(10))
    expected = statistics(logits, gold, StatisticsOptions(10))
    torch.testing.assert_close(found.entropy, expected.entropy)
    torch.testing.assert_close(found.tail_logmass, expected.tail_logmass)


def test_ties_keep_the_order_descending_and_gold_its_entry() -> None:
    """bf16 logits tie often; the order stays non-increasing and gold's mass is counted once."""
    logits, gold = random_rows(2000, 997, 1.5)
    tied = torch.tensor(logits).bfloat16()
    # Gold among the ties too, where its own, more exact number meets the others' rounding.
    gold[:1500] = tied.float().topk(20, dim=1)[1][torch.arange(1500), torch.arange(1500) % 20]
    found = row_statistics(tied, torch.tensor(gold), StatisticsOptions(20))
    assert (found.top_logprobs.diff(dim=1) <= 0).all()
    assert all(len(set(ids)) == 20 for ids in found.top_ids.tolist())
    outside = ~(found.top_ids == torch.tensor(gold)[:, None]).any(1)
    total = found.top_logprobs.exp().sum(1) + found.tail_logmass.exp() + outside * found.gold_logprob.exp()
    torch.testing.assert_close(total, torch.ones(2000), atol=1e-5, rtol=0)


def test_prior_sum_is_the_sum_of_the_tails_of_the_chosen_rows() -> None:
    logits, gold = random_rows(30, 97, 2.0)
    chosen = np.arange(30) % 3 == 0
    prior = torch.zeros(97, dtype=torch.float64)
    statistics(logits, gold, StatisticsOptions(6), prior_sum=prior, prior_rows=torch.tensor(chosen))
    expected = np.zeros(97)
    for row in np.flatnonzero(chosen):
        p = np.exp(reference.log_softmax(logits[row]))
        p[reference.position_statistics(logits[row], int(gold[row]), 6)["top_ids"]] = 0
        p[gold[row]] = 0
        expected += p
    np.testing.assert_allclose(prior, expected, atol=1e-5)


def test_tail_samples_follow_the_tail() -> None:
    """Over many replays of 32 samples: the mean count of every id is the tail's, and it varies no more than the count
    of independent draws would; the kept set is never drawn; a replay draws the same."""
    replays, samples, vocabulary = 10_000, 32, 300
    logits, gold = random_rows(1, vocabulary, 2.0, seed=3)
    options = StatisticsOptions(10, tail_samples=samples, seed=7)
    uniforms = torch.tensor(sample_uniforms(np.arange(replays + 1), options))
    rows, golds = np.repeat(logits, replays, 0), np.repeat(gold, replays)
    found = statistics(rows, golds, options, uniforms=uniforms)
    assert torch.equal(found.tail_samples, statistics(rows, golds, options, uniforms=uniforms).tail_samples)
    counts = torch.zeros(replays, vocabulary).scatter_add_(1, found.tail_samples, torch.ones(replays, samples)).numpy()
    p = np.exp(reference.log_softmax(logits[0]))
    p[found.top_ids[0].numpy()] = 0
    p[gold[0]] = 0
    p /= p.sum()
    assert counts[:, p == 0].sum() == 0
    variance = samples * p * (1 - p)
    assert (abs(counts.mean(0) - samples * p) <= 5 * np.sqrt(variance / replays)).all()
    # The fourth moment of a rare count is about its mean: five standard errors of its variance.
    assert (counts.var(0) <= variance + 5 * np.sqrt(samples * p / replays)).all()
    # Strata fix most of what a likely id gets: only the two at its ends are left to chance, 1/4 each at the most.
    likely = p.argmax()
    assert samples * p[likely] > 1
    assert counts[:, likely].var() < 0.55 < 0.5 * variance[likely]


def test_tail_samples_of_an_empty_tail_are_marked() -> None:
    logits, gold = random_rows(2, 12, 1.0)
    options = StatisticsOptions(12, tail_samples=3)
    found = statistics(logits, gold, options, uniforms=torch.rand(2, 3, dtype=torch.float64))
    assert (found.tail_samples == -1).all()


def test_uniforms_depend_on_tokens_and_seed_alone() -> None:
    ids = np.arange(9)
    options = StatisticsOptions(1, tail_samples=4, seed=1)
    assert np.array_equal(sample_uniforms(ids, options), sample_uniforms(ids.astype(np.int32), options))
    assert sample_uniforms(ids, options).shape == (8, 4)
    # One in each of four strata.
    assert (np.floor(sample_uniforms(ids, options) * 4) == np.arange(4)).all()
    assert not np.array_equal(sample_uniforms(ids, options), sample_uniforms(ids + 1, options))
    other = StatisticsOptions(1, tail_samples=4, seed=2)
    assert not np.array_equal(sample_uniforms(ids, options), sample_uniforms(ids, other))


def residual_of(
    logits: np.ndarray, sketch: np.ndarray, gold: np.ndarray, options: StatisticsOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p, w and p - w of the tails, each `[R, V]`, in float64."""
    p, w = np.exp(reference.log_softmax(logits)), np.exp(reference.log_softmax(sketch))
    for row in range(len(gold)):
        kept = [*reference.position_statistics(logits[row], int(gold[row]), options.top_n)["top_ids"], gold[row]]
        p[row, kept] = w[row, kept] = 0
    p, w = p / p.sum(1, keepdims=True), w / w.sum(1, keepdims=True)
    return p, w, p - w


@pytest.mark.parametrize(("vocabulary", "samples"), [(300, 12), (1024, 7), (300, 2)])
def test_residual_samples_make_the_reconstruction_unbiased(vocabulary: int, samples: int) -> None:
    """Over many replays: w, R/2 added at ids where it is too little and taken at others, has the mean p, whatever w."""
    replays = 8000
    logits, gold = random_rows(1, vocabulary, 2.0, seed=3)
    sketch = (0.6 * logits + random_rows(1, vocabulary, 0.7, seed=4)[0]).astype(np.float32).astype(np.float64)
    options = StatisticsOptions(10, residual_samples=samples, seed=7)
    uniforms = torch.tensor(residual_uniforms(np.arange(replays + 1), options))

    def draw():
        rows, golds = np.repeat(logits, replays, 0), np.repeat(gold, replays)
        ours = torch.tensor(np.repeat(sketch, replays, 0), dtype=torch.float32)
        return statistics(rows, golds, options, sketch_logits=ours, residual_uniforms=uniforms)

    found = draw()
    assert torch.equal(found.residual_samples, draw().residual_samples)
    p, w, residual = (array[0] for array in residual_of(logits, sketch, gold, options))
    np.testing.assert_allclose(found.residual_mass, np.full(replays, abs(residual).sum()), rtol=1e-5)
    ids, more = found.residual_samples.numpy(), (samples + 1) // 2
    above, below = ids[:, :more], ids[:, more:]
    assert (residual[above] > 0).all() and (residual[below] < 0).all()
    assert (np.diff(above, axis=1) >= 0).all() and (np.diff(below, axis=1) >= 0).all()
    estimate, half = np.zeros((replays, vocabulary)), float(found.residual_mass[0]) / 2
    np.add.at(estimate, (np.arange(replays)[:, None], above), half / more)
    np.add.at(estimate, (np.arange(replays)[:, None], below), -half / (samples - more))
    np.testing.assert_allclose(estimate.sum(1), np.zeros(replays), atol=1e-6)
    estimate += w
    share = abs(residual) / half
    # That of independent draws, which strata do not exceed.
    error = half * np.sqrt(share * (1 - share) / np.where(residual > 0, more, samples - more) / replays)
    # Ids that come a few times in all are far from normal.
    often = share * replays * samples / 2 > 30
    scores = ((estimate.mean(0) - p) / np.maximum(error, 1e-12))[often]
    assert abs(scores).max() <= 5
    assert (scores**2).mean() <= 1 + 5 * np.sqrt(2 / len(scores))
    assert (estimate.mean(0)[p == 0] == 0).all()
    # What `Summary.equal_tail_samples` goes by: R^2 / M, less for strata and for ids that are drawn more than once.
    assert 0.5 <= estimate.var(0).sum() / ((2 * half) ** 2 / samples) <= 1.1


def test_a_short_prefix_and_a_sketch_make_the_whole_teacher() -> None:
    """What `tail_epsilon` leaves out is tail: over many replays, what is kept of a position and what the sketch and the
    residual samples make of the rest has the mean p, wherever gold stands."""
    replays, cap, samples = 6000, 24, 5
    logits, _ = random_rows(3, 200, 3.0, seed=6)
    # Inside the prefix, behind it but in the top-N, and beyond.
    gold = np.argsort(-logits, 1)[np.arange(3), [1, cap - 2, 70]]
    sketch = (0.6 * logits + random_rows(3, 200, 0.7, seed=8)[0]).astype(np.float32)
    options = StatisticsOptions(cap, residual_samples=samples, tail_epsilon=0.3, min_n=2, seed=5)
    uniforms = torch.tensor(residual_uniforms(np.arange(replays + 1), options))
    for row in range(3):
        found = statistics(
            np.repeat(logits[row : row + 1], replays, 0),
            np.repeat(gold[row], replays),
            options,
            sketch_logits=torch.tensor(np.repeat(sketch[row : row + 1], replays, 0)),
            residual_uniforms=uniforms,
        )
        p = np.exp(reference.log_softmax(logits[row]))
        top = found.top_ids[0].numpy()
        prefix = top[top >= 0]
        assert 2 <= len(prefix) < cap - 2 and (int(gold[row]) in prefix) == (row == 0)
        kept = np.zeros(200, bool)
        kept[prefix] = kept[gold[row]] = True
        estimate = np.zeros(200)
        estimate[prefix] = found.top_logprobs[0].exp().numpy()[: len(prefix)]
        estimate[gold[row]] = found.gold_logprob[0].exp()
        np.testing.assert_allclose(estimate[kept], p[kept], rtol=1e-4)
        mass, half = float(found.tail_logmass[0].exp()), float(found.residual_mass[0]) / 2
        assert mass == pytest.approx(p[~kept].sum(), rel=1e-4)
        w = np.where(kept, 0.0, np.exp(reference.log_softmax(sketch[row].astype(np.float64))))
        w /= w.sum()
        ids, more = found.residual_samples.numpy(), (samples + 1) // 2
        assert not kept[ids].any()
        counts = [np.bincount(part.ravel(), minlength=200) for part in (ids[:, :more], ids[:, more:])]
        added, taken = counts[0] / (more * replays), counts[1] / ((samples - more) * replays)
        estimate[~kept] = (mass * (w + half * (added - taken)))[~kept]
        assert estimate.sum() == pytest.approx(1.0, abs=1e-4)
        # That of independent draws, which strata do not exceed.
        share = abs(p - mass * w) / (mass * half) * ~kept
        drawn = np.where(p > mass * w, more, samples - more) * replays
        often = share * drawn > 30
        scores = ((estimate - p) / np.maximum(mass * half * np.sqrt(share * (1 - share) / drawn), 1e-9))[often]
        assert often.sum() > 20 and abs(scores).max() <= 5
        assert (scores**2).mean() <= 1 + 5 * np.sqrt(2 / len(scores))


def test_residuals_of_rows_that_differ() -> None:
    """Each row has its own sketch; a tail that is empty, or that the sketch has right, leaves nothing to draw."""
    logits, gold = random_rows(40, 77, 2.0)
    sketch = logits + random_rows(40, 77, 1.0, seed=5)[0]
    sketch[7] = logits[7] + 3.0
    options = StatisticsOptions(6, residual_samples=5, tail_samples=5)
    uniforms = torch.rand(40, 5, dtype=torch.float64)
    more = {"uniforms": uniforms, "residual_uniforms": uniforms}
    found = statistics(logits, gold, options, sketch_logits=torch.tensor(sketch).float(), **more)
    residual = residual_of(logits, sketch, gold, options)[2]
    np.testing.assert_allclose(found.residual_mass, abs(residual).sum(1), atol=1e-5)
    ids = found.residual_samples.numpy()
    rows = np.arange(40) != 7
    assert (abs(np.take_along_axis(residual, ids, 1))[rows] > 0).all()
    # What else is kept does not change, and without samples there still is a mass.
    plain = statistics(logits, gold, StatisticsOptions(6, tail_samples=5), uniforms=uniforms)
    for name in ("gold_logprob", "tail_logmass", "entropy", "top_ids", "top_logprobs", "tail_samples"):
        assert torch.equal(getattr(found, name), getattr(plain, name))
    without = statistics(logits, gold, StatisticsOptions(6), sketch_logits=torch.tensor(sketch).float())
    torch.testing.assert_close(without.residual_mass, found.residual_mass)
    assert without.residual_samples.shape == plain.residual_samples.shape == (40, 0)
    everything = StatisticsOptions(77, residual_samples=5)
    empty = statistics(logits, gold, everything, sketch_logits=torch.tensor(sketch).float(), residual_uniforms=uniforms)
    assert (empty.residual_mass == 0).all() and (empty.residual_samples == 0).all()
    # A tail that underflows has no residual either.
    logits[3, :] = 0.0
    logits[3, :7] = 200.0
    one = StatisticsOptions(7, residual_samples=5)
    light = statistics(logits, gold, one, sketch_logits=torch.tensor(sketch).float(), residual_uniforms=uniforms)
    assert light.residual_mass[3] == 0 and torch.isfinite(light.residual_mass).all()


def test_residual_samples_need_a_sketch_and_have_a_stream_of_their_own() -> None:
    options = StatisticsOptions(1, tail_samples=4, residual_samples=4, seed=1)
    ids = np.arange(9)
    assert residual_uniforms(ids, options).shape == (8, 4)
    assert (np.floor(residual_uniforms(ids, options) * 4) == np.arange(4)).all()
    assert not np.isclose(residual_uniforms(ids, options), sample_uniforms(ids, options)).any()
    np.testing.assert_array_equal(residual_uniforms(ids, options), residual_uniforms(ids.astype(np.int32), options))
    logits, gold = random_rows(2, 12, 1.0)
    with pytest.raises(ValueError, match="sketch"):
        statistics(logits, gold, StatisticsOptions(2, residual_samples=1))
    with pytest.raises(ValueError, match="uniforms"):
        statistics(logits, gold, StatisticsOptions(2, residual_samples=2), sketch_logits=torch.zeros(2, 12))
    one = {"sketch_logits": torch.zeros(2, 12), "residual_uniforms": torch.rand(2, 1, dtype=torch.float64)}
    with pytest.raises(ValueError, match="both signs"):
        statistics(logits, gold, StatisticsOptions(2, residual_samples=1), **one)
