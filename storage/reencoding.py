"""Rows of a cache kept in less: fewer entries, fewer bits, fewer columns. The teacher is not needed.

What leaves the kept set joins the tail, so the rows say what caching with the smaller options would have said, up to
the rounding of the stored entries:

- the tail's mass, at each temperature, grows by theirs (gold stays kept wherever it stands);
- the summed tail grows by their probabilities, id by id;
- tail samples are mixed: a share w of the new tail is theirs, so w M samples, rounded up or down at random, are drawn
  anew from them in proportion to p, and the others are an evenly spaced choice of the old ones with a random start.
  Every old sample is as likely to stay as any other, so the mean over the M samples stays unbiased.

At positions without a loss no entries are stored, and their tail stays that of the caching.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from storage import schema
from storage.manifest import ScoringOptions
from storage.rows import Ragged, Rows
from storage.shard import gold_ids

# Positions that are padded to rectangles at a time.
_BLOCK = 4096


@dataclass(frozen=True)
class _Entries:
    """The top-N entries of a shard, flat, and the position that each belongs to."""

    position: np.ndarray  # int64 [E]
    rank: np.ndarray  # int64 [E], from 0
    ids: np.ndarray  # int32 [E]
    logprobs: np.ndarray  # float64 [E]
    is_gold: np.ndarray  # bool [E]


def reencode(
    rows: Rows, new: ScoringOptions, tail_sum: np.ndarray | None, random: np.random.Generator
) -> tuple[Rows, np.ndarray | None]:
    """`rows` under the options `new`, which keep no more than theirs, and their summed tail (float64 `[V]`).

    The rows need the columns that an entry touches: ids, loss mask, counts, entries, tails. Numbers keep the width they
    have in memory; writing rounds them to `new.logprob_bits`.
    """
    wanted = {column.name for column in new.columns if column.is_list}
    lists = {name: ragged for name, ragged in rows.lists.items() if name in wanted}
    counts = rows["top_count"].values.astype(np.int64)
    ends = np.cumsum(counts)
    position = np.repeat(np.arange(len(counts)), counts)
    entries = _Entries(
        position,
        np.arange(len(position)) - np.repeat(ends - counts, counts),
        rows["top_ids"].values,
        rows["top_logprobs"].values.astype(np.float64),
        rows["top_ids"].values == gold_ids(rows)[position],
    )
    leaves = _leaving(entries, counts, np.exp(rows["tail_logmass"].values.astype(np.float64)), new)
    moved = leaves & ~entries.is_gold
    if leaves.any():
        stays = ~leaves
        new_counts = np.bincount(position[stays], minlength=len(counts))
        lists["top_count"] = Ragged(new_counts.astype(rows["top_count"].values.dtype), rows["top_count"].offsets)
        offsets = np.concatenate([[0], np.cumsum(new_counts)])[rows["top_count"].offsets]
        for name in ("top_ids", "top_logprobs"):
            lists[name] = Ragged(rows[name].values[stays], offsets)
        for name in lists:
            temperature = 1.0 if name == "tail_logmass" else schema.column_temperature(name)
            if temperature is not None:
                lists[name] = Ragged(_heavier(rows[name].values, entries, moved, temperature), rows[name].offsets)
        if tail_sum is not None:
            p = np.exp(entries.logprobs[moved])
            tail_sum = tail_sum + np.bincount(entries.ids[moved], weights=p, minlength=len(tail_sum))
    if new.tail_samples:
        lists["tail_samples"] = _samples(rows, lists["tail_logmass"].values, entries, moved, new.tail_samples, random)
    return Rows(rows.sequence_id, lists, rows.source_row), tail_sum


def _leaving(entries: _Entries, counts: np.ndarray, tail: np.ndarray, new: ScoringOptions) -> np.ndarray:
    """bool `[E]`: entries beyond what `new` keeps of their position. tail: probability, `[positions]`."""
    leaves = entries.rank >= new.top_n
    if new.tail_epsilon:
        others = np.where(entries.is_gold, 0.0, np.exp(entries.logprobs))
        left = np.empty(len(others))
        starts = np.concatenate([[0], np.cumsum(counts)])
        for first in range(0, len(counts), _BLOCK):
            block = slice(first, min(first + _BLOCK, len(counts)))
            part = slice(starts[block.start], starts[block.stop])
            present = np.arange(counts[block].max(initial=1)) < counts[block, None]
            padded = np.zeros(present.shape)
            padded[present] = others[part]
            # What a prefix that ends before an entry leaves, added up from the small end.
            behind = padded[:, ::-1].cumsum(1)[:, ::-1] + tail[block, None]
            left[part] = behind[present]
        leaves |= (left < new.tail_epsilon) & (entries.rank >= new.min_n)
    return leaves


def _heavier(tail: np.ndarray, entries: _Entries, moved: np.ndarray, temperature: float) -> np.ndarray:
    """A tail column with the mass p^(1/T) of the entries that moved: `[positions]`, in the dtype of `tail`."""
    gained = np.bincount(entries.position[moved], np.exp(entries.logprobs[moved] / temperature), minlength=len(tail))
    with np.errstate(divide="ignore"):
        return np.logaddexp(tail.astype(np.float64), np.log(gained)).astype(tail.dtype)


def _samples(
    rows: Rows, new_tail: np.ndarray, entries: _Entries, moved: np.ndarray, samples: int, random: np.random.Generator
) -> Ragged:
    """`samples` ids per stored position, each position's ascending. new_tail: log-mass `[positions]`."""
    stored = np.flatnonzero(rows["loss_mask"].values)
    old = rows["tail_samples"].values.reshape(len(stored), -1)
    before = np.concatenate([[0], np.cumsum(rows["loss_mask"].values)])[rows["loss_mask"].offsets]
    if samples == old.shape[1] and not moved.any():
        return rows["tail_samples"]
    p = np.exp(entries.logprobs[moved])
    gained = np.bincount(entries.position[moved], p, minlength=len(new_tail))
    with np.errstate(divide="ignore", invalid="ignore"):
        # Of what was empty and stays so, everything is old.
        share = np.nan_to_num(gained[stored] / np.exp(new_tail[stored].astype(np.float64)), nan=0.0)
    share = np.where(old[:, 0] < 0, gained[stored] > 0, np.clip(share, 0.0, 1.0))
    fresh = np.floor(samples * share + random.random(len(stored))).astype(np.int64).clip(max=samples)
    slot = np.arange(samples)
    kept = samples - fresh
    # Evenly spaced among the old, from a random start: as likely to hit one as another.
    spaced = (slot - fresh[:, None] + random.random((len(stored), 1))) * (old.shape[1] / np.maximum(kept, 1))[:, None]
    drawn = np.take_along_axis(old, spaced.astype(np.int64).clip(0, old.shape[1] - 1), 1)
    if moved.any():
        # Each position's moved mass as one unit of a line, and on it evenly spaced places from a random start.
        line = np.cumsum(p / gained[entries.position[moved]])
        ends = np.cumsum(gained[stored] > 0)
        places = (slot + random.random((len(stored), 1))) / np.maximum(fresh, 1)[:, None]
        places = (ends - 1)[:, None] + np.clip(places, 1e-9, 1.0 - 1e-9)
        at = np.searchsorted(line, places, side="right").clip(max=len(line) - 1)
        drawn = np.where(slot < fresh[:, None], entries.ids[moved][at], drawn)
    return Ragged(np.sort(drawn, axis=1).astype(np.int32).ravel(), before * samples)
