"""Which sequences go into which shard, decided from their lengths alone and so the same for every worker, and where
one lies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from storage.manifest import PlannedShard

# Tokens of a shard where nobody has chosen. A shard is what a kill costs at most, so a small corpus has many: a share
# of it each, but not less than an engine needs to be busy.
LARGEST_SHARD = 1 << 18
SMALLEST_SHARD = 1 << 14
_SHARDS_OF_A_SMALL_CORPUS = 64


def default_shard_tokens(lengths: np.ndarray) -> int:
    """Return the tokens of a shard for a corpus of these lengths, int `[S]`."""
    share = -(-int(lengths.sum(dtype=np.int64)) // _SHARDS_OF_A_SMALL_CORPUS)
    return min(LARGEST_SHARD, max(SMALLEST_SHARD, share))


def plan_shards(lengths: np.ndarray, shard_tokens: int | None) -> tuple[PlannedShard, ...]:
    """Cut the corpus, in its order, into runs of at most `shard_tokens` tokens (at least one sequence each).

    lengths: int `[S]`, token ids per sequence. shard_tokens: None for `default_shard_tokens`.
    """
    if shard_tokens is None:
        shard_tokens = default_shard_tokens(lengths)
    shards: list[PlannedShard] = []
    ends = np.cumsum(lengths, dtype=np.int64)
    first, before = 0, 0
    while first < len(lengths):
        stop = max(first + 1, int(np.searchsorted(ends, before + shard_tokens, side="right")))
        tokens = int(ends[stop - 1]) - before
        shards.append(PlannedShard(first=first, sequences=stop - first, tokens=tokens))
        first, before = stop, int(ends[stop - 1])
    return tuple(shards)


def locate(shards: Sequence[PlannedShard], sequence_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 `[n]` and int64 `[n]`: the shard that holds each sequence, and its row there."""
    firsts = np.array([shard.first for shard in shards], np.int64)
    shard_of = np.searchsorted(firsts, sequence_ids, side="right") - 1
    return shard_of, sequence_ids - firsts[shard_of]
