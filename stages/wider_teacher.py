"""A teacher with more token ids than its student: a head that is padded further, for the most part.

No student id stands for the ids beyond, so their mass is left out and the rest renormalised, at every N:
`p'_j = p_j / sum_{i < V} p_i` for the V ids of the student. Of the kept entries that mass is known. Of the tail only
the sum is stored; its share beyond is that of the cache's mean tail, or none where the cache has no mean tail. Where
the kept set holds every id of the student, all of the tail is beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storage.cache import Cache


@dataclass(frozen=True)
class TeacherArrays:
    """Numbers of R rows, padded to N entries: gold int `[R]`; gold_logprob, tail_logmass float `[R]`, nats; top_ids
    int `[R, N]`; top_logprobs float `[R, N]`, -inf where a row has fewer; tail_logmass_at float `[R]`, of temperature
    T; tail_samples int `[R, M]`, -1 for none; entropy float `[R]`, nats; None where they were not read.
    """

    gold: np.ndarray
    gold_logprob: np.ndarray
    tail_logmass: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    tail_logmass_at: np.ndarray | None = None
    tail_samples: np.ndarray | None = None
    entropy: np.ndarray | None = None


def shares_within(caches: Sequence[Cache], vocabulary_size: int, temperature: float) -> np.ndarray | None:
    """float64 `[C, 2]`: the share of each cache's mean tail at ids below `vocabulary_size`, at temperatures 1 and T.

    None where no cache's teacher has more ids. Raises CacheError for a damaged mean tail.
    """
    if all(cache.manifest.vocabulary_size <= vocabulary_size for cache in caches):
        return None
    return np.array([_shares(cache, vocabulary_size, temperature) for cache in caches])


def _shares(cache: Cache, vocabulary_size: int, temperature: float) -> tuple[float, float]:
    mean = cache.tail_prior() if cache.manifest.vocabulary_size > vocabulary_size else None
    if mean is None or not mean.any():
        return 1.0, 1.0
    at_one = mean.astype(np.float64)
    at = (at_one / at_one.sum()) ** (1.0 / temperature)
    return tuple(float(masses[:vocabulary_size].sum() / masses.sum()) for masses in (at_one, at))  # type: ignore[return-value]


def leave_out_beyond(
    rows: TeacherArrays, vocabulary_size: int, within: np.ndarray, temperature: float
) -> TeacherArrays:
    """Return rows of a teacher that has the student's ids alone; entries beyond get -inf and id 0, samples -1.

    within: float64 `[R, 2]`, the share of each row's tail at the student's ids, at temperatures 1 and T. A tail whose
    samples are all beyond counts as beyond.
    """
    present = rows.top_logprobs > -np.inf
    beyond = present & (rows.top_ids >= vocabulary_size)
    kept = present & ~beyond
    gold, tail = rows.gold_logprob.astype(np.float64), rows.tail_logmass.astype(np.float64)
    entries = rows.top_logprobs.astype(np.float64)
    gold_apart = ~(kept & (rows.top_ids == rows.gold[:, None])).any(1)
    all_kept = kept.sum(1) + gold_apart >= vocabulary_size
    samples = rows.tail_samples
    if samples is not None:
        all_kept |= (samples >= 0).any(1) & ~((samples >= 0) & (samples < vocabulary_size)).any(1)
        samples = np.where(samples >= vocabulary_size, -1, samples).astype(samples.dtype)
    with np.errstate(divide="ignore"):
        shares = np.log(np.where(all_kept[:, None], 0.0, within))
        tail_within = tail + shares[:, 0]
        left_out = np.exp(_log_sum(np.where(beyond, entries, -np.inf))) + np.exp(tail) - np.exp(tail_within)
        gold_or_none = np.where(gold_apart, gold, -np.inf)[:, None]
        summed = _log_sum(np.concatenate([np.where(kept, entries, -np.inf), gold_or_none, tail_within[:, None]], 1))
        # One minus a small mass is exact; of a large one little is left, which is better summed.
        rest = np.where(left_out < 0.5, np.log1p(-np.minimum(left_out, 0.5)), summed)
    at = rows.tail_logmass_at
    if at is not None:
        at = (at + shares[:, 1] - rest / temperature).astype(np.float32)
    logprobs = np.where(kept, entries - rest[:, None], -np.inf).astype(np.float32)
    tail_logmass, gold_logprob = (tail_within - rest).astype(np.float32), (gold - rest).astype(np.float32)
    entropy = rows.entropy
    if entropy is not None:
        shape = _tail_shape(rows, entropy)
        parts = np.concatenate(
            [logprobs, np.where(gold_apart, gold_logprob, -np.inf)[:, None], tail_logmass[:, None]], 1
        )
        entropy = (-_p_log_p(parts).sum(1) - np.exp(tail_logmass.astype(np.float64)) * shape).astype(np.float32)
    ids = np.where(kept, rows.top_ids, 0).astype(rows.top_ids.dtype)
    return TeacherArrays(rows.gold, gold_logprob, tail_logmass, ids, logprobs, at, samples, entropy)


def _tail_shape(rows: TeacherArrays, entropy: np.ndarray) -> np.ndarray:
    """float64 `[R]`: sum_j s_j log s_j of the tail s, which the entropy tells (`divergence.sampled_shape`).

    The part of the tail that is left keeps it, and the entropy is made to tell it again.
    """
    logprobs, tail = rows.top_logprobs.astype(np.float64), rows.tail_logmass.astype(np.float64)
    gold_apart = ~((rows.top_ids == rows.gold[:, None]) & (logprobs > -np.inf)).any(1)
    kept = _p_log_p(logprobs).sum(1) + gold_apart * _p_log_p(rows.gold_logprob)
    rest = -entropy.astype(np.float64) - kept - _p_log_p(tail)
    return np.clip(rest / np.maximum(np.exp(tail), 1e-30), -20.0, 0.0)


def _log_sum(values: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(values, axis=1)


def _p_log_p(log_p: np.ndarray) -> np.ndarray:
    finite = np.where(log_p > -np.inf, log_p, 0.0).astype(np.float64)
    return np.where(log_p > -np.inf, np.exp(finite) * finite, 0.0)
