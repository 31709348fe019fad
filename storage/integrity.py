"""Whether a cache is whole and says only what can be true: `pipeline verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from storage.cache import SHARDS, TAIL_PRIOR, Cache, residual_sum, sums
from storage.errors import CacheError
from storage.shard import value_problems


def problems(cache: Cache, progress: Callable[[int], None] = lambda shard: None) -> Iterator[str]:
    """Every broken checksum and invariant, one sentence each with file and row; nothing when all is well."""
    prior_expected = True
    tail_mass, stored = 0.0, 0
    sound = True
    try:
        cache.check_sketch()
    except CacheError as error:
        yield str(error)
    for index in cache.shards_here:
        try:
            receipt = cache.check_file(index, fetch=True)
            rows = cache.read_shard(index)
        except CacheError as error:
            yield str(error)
            sound = False
            progress(index)
            continue
        prior_expected &= receipt.tail_prior_sha256 is not None
        tail_mass += receipt.sum_tail_mass
        stored += receipt.stored_positions
        path = cache.shard_path(index)
        for problem in value_problems(rows, cache.manifest):
            yield f"{path}: {problem}"
        try:
            cache.check_counts(index, rows)
        except CacheError as error:
            yield str(error)
            sound = False
        if not np.allclose(sums(rows), (receipt.sum_tail_mass, receipt.sum_unc), rtol=1e-6, atol=1e-9):
            yield f"{cache.receipt_path(index)}: says sums of tail mass and UNC that the shard does not have"
        found_mass, said_mass = residual_sum(rows), receipt.sum_residual_mass
        if (found_mass is None) != (said_mass is None) or not np.isclose(found_mass or 0.0, said_mass or 0.0):
            yield f"{cache.receipt_path(index)}: says a sum of residual masses that the shard does not have"
        progress(index)
    known = {cache.shard_path(i).name for i in range(len(cache.manifest.shards))}
    for name in sorted(path.name for path in (cache.path / SHARDS).glob("*.parquet")):
        if name not in known:
            yield f"{cache.path / SHARDS / name}: not in the plan of this cache"
    if not cache.is_sealed:
        yield f"{cache.path}: not sealed; repeat the `pipeline cache-teacher` that began it"
    elif prior_expected:
        try:
            weighed = cache.weighed_tail_prior()
        except CacheError as error:
            yield str(error)
            return
        if weighed is None:
            yield f"{cache.path / TAIL_PRIOR}: missing; repeat the `pipeline cache-teacher` that made it"
            return
        prior, positions = weighed
        if stored and not cache.is_partial and abs(float(prior.sum(dtype=np.float64)) - tail_mass / stored) > 1e-3:
            yield f"{cache.path / TAIL_PRIOR}: does not sum to the mean tail mass"
        if sound and not cache.is_partial and positions != stored:
            yield f"{cache.path / TAIL_PRIOR}: says it is about {positions} positions, the shards have {stored}"
