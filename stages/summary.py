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

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    @property
    def mean_top_n(self) -> float:
        return self.entries / max(1, self.stored_positions)


def summarize(cache: Cache) -> Summary:
    """Reads the receipts and two columns, of a partial cache what is there.

    Raises CacheError for an unfinished or damaged cache.
    """
    receipts = cache.receipts(partial=True)
    gold: list[np.ndarray] = []
    entropy = 0.0
    has_entropy = cache.manifest.scoring.entropy
    for rows in cache.column("loss_mask", "gold_logprob", *(["entropy"] if has_entropy else [])):
        mask = rows["loss_mask"].values
        gold.append(rows["gold_logprob"].values[mask])
        if has_entropy:
            entropy += float(rows["entropy"].values[mask].sum(dtype=np.float64))
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
        unc_quantiles=tuple(float(-np.expm1(value)) for value in logs),
        teacher_cross_entropy=float(-gold_logprob.mean(dtype=np.float64)) if len(gold_logprob) else 0.0,
        mean_entropy=entropy / stored if has_entropy else None,
        mean_sketch_kl=_mean([receipt.sum_sketch_kl for receipt in receipts], stored),
        mean_residual_mass=_mean([receipt.sum_residual_mass for receipt in receipts], stored),
    )


def _mean(sums: Sequence[float | None], stored: int) -> float | None:
    """None where some shard does not say."""
    known = [value for value in sums if value is not None]
    return sum(known) / stored if len(known) == len(sums) else None
