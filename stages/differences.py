"""How far the numbers of a cache are from those that a teacher gives for the same sequences, in nats.

What the rounding of storage hides is not counted. Nor is, with adaptive N, the tail of positions that keep another
number of entries: what is near the border is an entry on one side and tail on the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from storage.manifest import Manifest
from storage.quantization import rounding
from storage.rows import Rows
from storage.schema import column_temperature

# Log-probabilities are compared down to here: a smaller tail may have underflowed where it was summed.
_LOWEST = -87.0
# A difference that is no number, or that no two log-probabilities can have.
_CAP = 1.0e4

MEASURES = {
    "gold": "log p(gold)",
    "top": "top-N entries, by id",
    "tail": "log of the tail's mass, at every temperature",
    "entropy": "entropy",
}


@dataclass(frozen=True)
class Spread:
    """Absolute differences in nats over `count` values."""

    count: int
    mean: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        if not len(values):
            return cls(0, 0.0, 0.0, 0.0)
        return cls(len(values), float(values.mean()), float(np.quantile(values, 0.99)), float(values.max()))


@dataclass(frozen=True)
class Comparison:
    """One side against the live teacher. spreads: by the names of MEASURES; one that cannot be had is missing.

    top1_agreement, ids_that_differ, samples_that_differ: shares, of stored positions, entries, samples.
    codes_that_differ: share of the sketch's codes, by more than one step. mean_kl: nats, over kept set and tail, so a
    lower bound.
    """

    spreads: dict[str, Spread]
    top1_agreement: float
    ids_that_differ: float
    samples_that_differ: float | None
    codes_that_differ: float | None
    mean_kl: float
    max_kl: float


class Differences:
    """Collects the differences between two sides, batch by batch."""

    def __init__(self, manifest: Manifest) -> None:
        self._vocabulary = manifest.vocabulary_size
        self._values: dict[str, list[np.ndarray]] = {name: [] for name in MEASURES}
        self._kl: list[np.ndarray] = []
        self._top1: list[np.ndarray] = []
        self._bits = manifest.scoring.logprob_bits
        self._is_adaptive = manifest.scoring.tail_epsilon > 0
        self._entries = self._unmatched = self._samples = self._other_samples = 0
        self._codes = self._other_codes = 0
        self.positions = 0
        self.sequence_of: list[np.ndarray] = []  # of each position, as the next four
        self.position: list[np.ndarray] = []
        self.stored_gold: list[np.ndarray] = []
        self.live_gold: list[np.ndarray] = []

    def add(self, ours: Rows, live: Rows) -> None:
        """Rows of the same sequences; `live` is what `ours` is held against."""
        mask = live["loss_mask"]
        lengths = mask.lengths
        self.positions += int(lengths.sum())
        self.sequence_of.append(np.repeat(ours.sequence_id, lengths))
        self.position.append(np.arange(lengths.sum()) - np.repeat(mask.offsets[:-1], lengths))
        gold, live_gold = (_wide(rows, "gold_logprob") for rows in (ours, live))
        self.stored_gold.append(gold)
        self.live_gold.append(live_gold)
        self._values["gold"].append(apart(gold, live_gold))
        tail, live_tail = (_wide(rows, "tail_logmass") for rows in (ours, live))
        comparable = ours["top_count"].values == live["top_count"].values
        if self._is_adaptive:
            comparable &= mask.values  # elsewhere nobody says how many were kept
        for name in ("tail_logmass", *(n for n in live.lists if column_temperature(n) is not None)):
            self._values["tail"].append(apart(_wide(ours, name), _wide(live, name))[comparable])
        if "entropy" in ours.lists and not np.isnan(_wide(live, "entropy")).any():
            entropy = ours["entropy"].values
            self._values["entropy"].append(
                np.maximum(0, apart(_wide(ours, "entropy"), _wide(live, "entropy")) - _rounding(entropy, 16))
            )
        self._add_entries(ours, live, (gold, live_gold), (tail, live_tail))
        if "tail_samples" in ours.lists and "tail_samples" in live.lists:
            drawn, live_drawn = (rows["tail_samples"].values for rows in (ours, live))
            self._samples += len(drawn)
            self._other_samples += int((drawn != live_drawn).sum())
        if "sketch_codes" in ours.lists and "sketch_codes" in live.lists:
            steps = ours["sketch_codes"].values.astype(np.int16) - live["sketch_codes"].values
            self._codes += len(steps)
            self._other_codes += int((np.abs(steps) > 1).sum())

    def _add_entries(
        self, ours: Rows, live: Rows, golds: tuple[np.ndarray, np.ndarray], tails: tuple[np.ndarray, np.ndarray]
    ) -> None:
        """The top-N, matched by position and id.

        An id that the other side does not list is there no more probable than its last entry, and differs by at least
        the rest. For the divergence it joins the tail, on both sides.
        """
        sides = [_Entries(rows, self._vocabulary) for rows in (ours, live)]
        one, other = sides
        _, first, second = np.intersect1d(one.keys, other.keys, assume_unique=False, return_indices=True)
        matched = [np.isin(np.arange(len(one.keys)), first), np.isin(np.arange(len(other.keys)), second)]
        entry = apart(one.logprobs[first], other.logprobs[second]) - _rounding(one.logprobs[first], self._bits)
        parts = [np.maximum(0, entry)]
        for this, that, is_matched, that_gold in zip(sides, sides[::-1], matched, golds[::-1], strict=True):
            alone = ~is_matched
            at = this.position[alone]
            # Gold's log-probability is known on both sides, listed or not.
            there = np.where(this.ids[alone] == this.gold[at], that_gold[at], that.last[at])
            beyond = _capped(this.logprobs[alone] - np.maximum(there, _LOWEST))
            slack = _rounding(this.logprobs[alone], self._bits) + _rounding(there, self._bits)
            parts.append(np.maximum(0, beyond - slack))
        self._values["top"].append(np.concatenate(parts))
        self._entries += len(one.keys)
        self._unmatched += int((~matched[0]).sum())
        self._top1.append(one.top1 == other.top1)
        self._kl.append(_divergence(sides, (first, second), matched, golds, tails))

    def comparison(self) -> Comparison:
        kl, top1 = np.concatenate(self._kl), np.concatenate(self._top1)
        return Comparison(
            {name: Spread.of(np.concatenate(values)) for name, values in self._values.items() if values},
            float(top1.mean()) if len(top1) else 1.0,
            self._unmatched / max(1, self._entries),
            self._other_samples / self._samples if self._samples else None,
            self._other_codes / self._codes if self._codes else None,
            float(kl.mean()) if len(kl) else 0.0,
            float(kl.max(initial=0.0)),
        )

    def by_position(self, name: str) -> np.ndarray:
        return np.concatenate(self._values[name])


class _Entries:
    """The top-N of some rows: one number for each position and id, and what stands there."""

    def __init__(self, rows: Rows, vocabulary: int) -> None:
        counts = rows["top_count"].values.astype(np.int64)
        mask = rows["loss_mask"]
        self.positions = len(counts)
        self.position = np.repeat(np.arange(len(counts)), counts)
        self.ids = rows["top_ids"].values.astype(np.int64)
        self.logprobs = _wide(rows, "top_logprobs")
        self.keys = self.position * vocabulary + self.ids
        # Drop the first id of every row: position t predicts the one after it.
        keep = np.ones(len(rows["input_ids"].values), bool)
        keep[rows["input_ids"].offsets[:-1]] = False
        self.gold = rows["input_ids"].values[keep]
        self.stored = np.flatnonzero(mask.values)
        ends = np.cumsum(counts)
        self.last = np.zeros(len(counts))
        self.last[counts > 0] = self.logprobs[ends[counts > 0] - 1]
        self.top1 = self.ids[np.minimum((ends - counts)[self.stored], len(self.ids) - 1)] if len(self.ids) else self.ids


def _divergence(
    sides: list[_Entries],
    common: tuple[np.ndarray, np.ndarray],
    matched: list[np.ndarray],
    golds: tuple[np.ndarray, np.ndarray],
    tails: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """KL(ours || live) at each stored position over gold, the ids that both list, and one lump of all the others.

    As `sum p log(p/q) - p + q`, which rounding can hardly make negative and which is the same where both sum to 1.
    """
    one = sides[0]
    gold_at = one.ids[common[0]] == one.gold[one.position[common[0]]]
    place = one.position[common[0]][~gold_at]
    p = [np.exp(side.logprobs[index][~gold_at]) for side, index in zip(sides, common, strict=True)]
    lumps = []
    for side, is_matched, tail in zip(sides, matched, tails, strict=True):
        alone = ~is_matched & (side.ids != side.gold[side.position])
        lumps.append(np.exp(tail) + np.bincount(side.position[alone], np.exp(side.logprobs[alone]), side.positions))
    gold_p = [np.exp(gold) for gold in golds]
    with np.errstate(all="ignore"):
        total = np.bincount(place, _kl_terms(*p), one.positions) + _kl_terms(*gold_p) + _kl_terms(*lumps)
    return _capped(np.maximum(0, total[one.stored]))


def _kl_terms(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    q = np.maximum(q, np.exp(_LOWEST))
    return np.where(p > 0, p * np.log(np.maximum(p, np.exp(_LOWEST)) / q), 0.0) - p + q


def _wide(rows: Rows, name: str) -> np.ndarray:
    return rows[name].values.astype(np.float64)


def apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return _capped(np.abs(np.maximum(one, _LOWEST) - np.maximum(other, _LOWEST)))


def _capped(values: np.ndarray) -> np.ndarray:
    return np.minimum(np.where(np.isnan(values), _CAP, values), _CAP)


def _rounding(values: np.ndarray, bits: int) -> np.ndarray:
    """How far apart two values may be that were the same before one or both were stored in so many bits."""
    with np.errstate(all="ignore"):
        return np.nan_to_num(rounding(values, bits), nan=0.0, posinf=np.inf)
