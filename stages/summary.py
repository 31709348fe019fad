"""The numbers that describe a whole cache: what the end of `cache-teacher`, `inspect` and the card show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storage.cache import Cache

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Summary:
    """bytes_per_token counts the shards alone. Means are over stored positions, probabilities not logs.

    mean_sketch_kl: nats from the teacher to what top-N, gold, tail mass and codes give back; mean_residual_mass: of the
    sum of |p - w| over the tail, 0..2. None without a sketch, or without residual samples.

    equal_tail_samples: see the function of that name; None without residual samples.
    """

    sequences: int
    tokens: int
    stored_positions: int
    entries: int
    shards: int
    bytes: int
    mean_tail_mass: float
    mean_unc: float
    unc_quantiles: tuple[float, ...]
    teacher_cross_entropy: float
    mean_entropy: float | None
    mean_sketch_kl: float | None = None
    mean_residual_mass: float | None = None
    equal_tail_samples: float | None = None

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    @property
    def mean_top_n(self) -> float:
        return self.entries / max(1, self.stored_positions)


def summarize(cache: Cache) -> Summary:
    """Reads the receipts and a few narrow columns, of a partial cache what is there.

    Raises CacheError for an unfinished or damaged cache.
    """
    receipts = cache.receipts(partial=True)
    gold: list[np.ndarray] = []
    entropy = 0.0
    has_entropy, sketch = cache.manifest.scoring.entropy, cache.manifest.scoring.sketch
    drawn = 0 if sketch is None else sketch.residual_samples
    squares = np.zeros(2)
    names = ["loss_mask", "gold_logprob"]
    names += ["entropy"] * has_entropy + ["tail_logmass", "residual_mass"] * (drawn > 0)
    for rows in cache.column(*names):
        mask = rows["loss_mask"].values
        gold.append(rows["gold_logprob"].values[mask])
        if has_entropy:
            entropy += float(rows["entropy"].values[mask].sum(dtype=np.float64))
        if drawn:
            squares += squared_masses(rows["tail_logmass"].values[mask], rows["residual_mass"].values)
    gold_logprob = np.concatenate(gold)
    stored = max(1, len(gold_logprob))
    # Quantiles of UNC = 1 - p(gold), taken on the log where float32 keeps the digits of a sure teacher.
    logs = np.quantile(gold_logprob, [1 - q for q in QUANTILES]) if len(gold_logprob) else np.zeros(len(QUANTILES))
    return Summary(
        sequences=sum(receipt.rows for receipt in receipts),
        tokens=sum(receipt.tokens for receipt in receipts),
        stored_positions=len(gold_logprob),
        entries=sum(receipt.entries for receipt in receipts),
        shards=len(receipts),
        bytes=sum(receipt.bytes for receipt in receipts),
        mean_tail_mass=sum(receipt.sum_tail_mass for receipt in receipts) / stored,
        mean_unc=sum(receipt.sum_unc for receipt in receipts) / stored,
        unc_quantiles=tuple(float(-np.expm1(min(value, 0.0))) for value in logs),
        teacher_cross_entropy=float(-gold_logprob.mean(dtype=np.float64)) if len(gold_logprob) else 0.0,
        mean_entropy=entropy / stored if has_entropy else None,
        mean_sketch_kl=_mean([receipt.sum_sketch_kl for receipt in receipts], stored),
        mean_residual_mass=_mean([receipt.sum_residual_mass for receipt in receipts], stored),
        equal_tail_samples=equal_tail_samples(drawn, squares),
    )


def squared_masses(tail_logmass: np.ndarray, residual_mass: np.ndarray) -> np.ndarray:
    """float64 `[2]`, of positions `[P]` each: the sums of m^2 and (m R)^2, with tail mass m and residual mass R."""
    tail = np.exp(2 * tail_logmass.astype(np.float64))
    return np.array([tail.sum(), (tail * residual_mass.astype(np.float64) ** 2).sum()])


def equal_tail_samples(residual_samples: int, squares: np.ndarray) -> float | None:
    """How many ids drawn from the tail itself, at each position, would leave as much noise in what students learn from
    as M residual samples do: M sum(m^2) / sum((m R)^2), since the variance of M draws that stand for a mass is its
    square over M. squares: see `squared_masses`. None without samples, or where nothing is left to them.
    """
    return residual_samples * float(squares[0] / squares[1]) if residual_samples and squares[1] else None


def _mean(sums: Sequence[float | None], stored: int) -> float | None:
    """None where some shard does not say."""
    known = [value for value in sums if value is not None]
    return sum(known) / stored if len(known) == len(sums) else None
