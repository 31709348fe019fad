"""Whether a cache is whole and says only what can be true: `pipeline verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from storage.cache import SHARDS, TAIL_PRIOR, Cache, residual_sum, sums
from storage.errors import CacheError
from storage.manifest import Receipt
from storage.shard import value_problems
from storage.words import counted


def problems(cache: Cache, progress: Callable[[int], None] = lambda shard: None) -> Iterator[str]:
    """Every broken checksum and invariant, one sentence each with file and row; nothing when all is well."""
    receipts: list[Receipt] = []
    sound = True
    try:
        cache.check_sketch()
    except CacheError as error:
        yield str(error)
    for index in cache.shards_here:
        of_shard = list(_shard_problems(cache, index, receipts))
        sound &= not of_shard
        yield from of_shard
        progress(index)
    known = {cache.shard_path(i).name for i in range(len(cache.manifest.shards))}
    for name in sorted(path.name for path in (cache.path / SHARDS).glob("*.parquet")):
        if name not in known:
            yield f"{cache.path / SHARDS / name}: not in the plan of this cache"
    if not cache.is_sealed:
        yield f"{cache.path}: not sealed; repeat the `pipeline cache-teacher` that began it"
    else:
        yield from _prior_problems(cache, receipts, sound)


def _shard_problems(cache: Cache, index: int, receipts: list[Receipt]) -> Iterator[str]:
    """The problems of one shard; its receipt is appended to `receipts` where it can be read."""
    try:
        receipts.append(cache.receipt(index))
        receipt = cache.check_file(index, fetch=True)
        rows = cache.read_shard(index)
    except CacheError as error:
        yield str(error)
        return
    path = cache.shard_path(index)
    for problem in value_problems(rows, cache.manifest):
        yield f"{path}: {problem}"
    try:
        cache.check_counts(index, rows)
    except CacheError as error:
        yield str(error)
    if not np.allclose(sums(rows), (receipt.sum_tail_mass, receipt.sum_unc), rtol=1e-6, atol=1e-9):
        yield f"{cache.receipt_path(index)}: says sums of tail mass and UNC that the shard does not have"
    found_mass, said_mass = residual_sum(rows), receipt.sum_residual_mass
    if (found_mass is None) != (said_mass is None) or not np.isclose(found_mass or 0.0, said_mass or 0.0):
        yield f"{cache.receipt_path(index)}: says a sum of residual masses that the shard does not have"


def _prior_problems(cache: Cache, receipts: list[Receipt], sound: bool) -> Iterator[str]:
    """The problems of the mean tail distribution of a sealed cache.

    receipts: of the shards here, as far as they can be read. sound: no shard has a problem. Only then can the prior be
    compared with the shards: where they differ otherwise, it is the shard that is damaged, and it is named already.
    """
    path = cache.path / TAIL_PRIOR
    try:
        weighed = cache.weighed_tail_prior()
    except CacheError as error:
        yield str(error)
        return
    if weighed is None:
        if receipts and all(receipt.tail_prior_sha256 is not None for receipt in receipts):
            yield f"{path}: missing; repeat the `pipeline cache-teacher` that made it"
        return
    prior, positions = weighed
    stored = sum(receipt.stored_positions for receipt in receipts)
    if not sound or cache.is_partial or not stored:
        return
    tail_mass = sum(receipt.sum_tail_mass for receipt in receipts)
    if abs(float(prior.sum(dtype=np.float64)) - tail_mass / stored) > 1e-3:
        yield f"{path}: does not sum to the mean tail mass"
    if positions != stored:
        yield f"{path}: says it is about {counted(positions, 'position')}, the shards have {stored}"
