"""Hold out sequences of a cache: whole rows of the data, the same for every student of it."""

from __future__ import annotations

import numpy as np

from stages.shard_dataset import sequences_here
from storage.cache import Cache
from storage.errors import CacheError
from storage.words import counted


def split_held_out(cache: Cache, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return training and held-out sequence ids, int64, both ascending.

    Where a row of the data made several sequences (pieces of a long document, turns of a chat), all of them are on one
    side: next to a piece that is trained on, a held-out one would measure memory. The choice depends on the whole
    cache's size and `seed` alone, so students of one cache, or of parts of it, are compared on the same sequences, and
    none ever trains on another's. At least one row is held out when `share` > 0. Raises CacheError where nothing is
    left to train on, or nothing that is held out is in this part.
    """
    sequences, rows = cache.manifest.corpus.sequences, cache.manifest.corpus.source_rows
    here = sequences_here(cache)
    total = sequences if rows is None else rows
    order = np.random.default_rng([seed, 0x5EED]).permutation(total)
    held = min(total, max(1, round(share * total))) if share > 0 else 0
    is_held = np.zeros(total, bool)
    is_held[order[:held]] = True
    of_sequence = is_held if rows is None else is_held[source_rows(cache)]
    train, held_out = (np.flatnonzero(here & side).astype(np.int64) for side in (~of_sequence, of_sequence))
    count = int(here.sum())
    if not len(train):
        raise CacheError(
            f"{cache.path}: holds {counted(count, 'sequence')}{_of(rows)}, too few to hold out a share of {share:g} "
            "and train on the rest; lower --eval-share or set it to 0"
        )
    if held and not len(held_out):
        what = "sequence" if rows is None else "row"
        raise CacheError(
            f"{cache.path}: this part holds {count} of {counted(sequences, 'sequence')} and none of the "
            f"{counted(held, what)} held out of the whole; raise --eval-share, set it to 0, or pull more shards"
        )
    return train, held_out


def source_rows(cache: Cache) -> np.ndarray:
    """Return the row of the data of every sequence, int64 `[S]`; 0 for a sequence that is not here."""
    found = np.zeros(cache.manifest.corpus.sequences, np.int64)
    for rows in cache.column("source_row"):
        assert rows.source_row is not None
        found[rows.sequence_id] = rows.source_row
    return found


def _of(rows: int | None) -> str:
    return "" if rows is None else f" of {counted(rows, 'row')}"
