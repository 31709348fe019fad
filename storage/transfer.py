"""Copying a cache from one place to another: `pipeline push` and `pipeline pull`.

Every file is compared with its checksum on the way, the receipt of a shard follows the shard, and what the target
holds already is skipped, so the same command again goes on where it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from storage.cache import CARD, PRIOR_RECEIPT, TAIL_PRIOR, Cache
from storage.errors import CacheError
from storage.files import atomic_file, sha256_file, write_bytes
from storage.limits import JSON_BYTES
from storage.manifest import write_model
from storage.places import CHUNK, Place

JOBS = 8


def copy_cache(
    source: Cache,
    target: str | Place,
    *,
    shards: Sequence[int] | None = None,
    jobs: int = JOBS,
    progress: Callable[[int], None] = lambda shard: None,
) -> int:
    """Copy `source` to `target`, or only `shards` of it besides those there; returns how many shards were copied.

    progress gets the number of each shard that is at the target. Raises CacheError where the source is unfinished or
    damaged, or another cache lies at the target, and RunError or OSError where a place fails.
    """
    receipts = {receipt.shard: receipt for receipt in source.receipts()}
    wanted = sorted(receipts) if shards is None else list(shards)
    there = Cache.resume(target, source.manifest)
    cache = Cache.create_or_resume(target, source.manifest)
    if shards is not None and there is not None:
        # A part that grows, or some shards over again.
        before = [i for i in there.shards_here if there.is_partial or there.receipt_path(i).exists()]
        cache.expect({*before, *wanted})
    else:
        cache.expect(wanted)
    if (sketch := source.manifest.scoring.sketch) is not None:
        assert sketch.sha256 is not None
        try:
            cache.check_sketch()
        except CacheError:
            _copy_file(source.sketch_path, cache.sketch_path, sketch.sha256)
    cache.write_tokenizer(source.copy_tokenizer)

    def copy(index: int) -> bool:
        receipt = receipts[index]
        if cache.is_done(index) and cache.receipt(index) == receipt:
            return False
        _copy_file(source.shard_path(index), cache.shard_path(index), receipt.sha256)
        if receipt.tail_prior_sha256 is not None:
            _copy_file(source.tail_sum_path(index), cache.tail_sum_path(index), receipt.tail_prior_sha256)
        write_model(cache.receipt_path(index), receipt)
        return True

    copied = 0
    with ThreadPoolExecutor(jobs, thread_name_prefix="transfer") as workers:
        running = {workers.submit(copy, index): index for index in wanted}
        try:
            for done in as_completed(running):
                copied += done.result()
                progress(running[done])
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
    if (prior := source.prior_receipt()) is not None:
        _copy_file(source.path / TAIL_PRIOR, cache.path / TAIL_PRIOR, prior.sha256)
        write_model(cache.path / PRIOR_RECEIPT, prior)
    if source.is_sealed:
        write_bytes(cache.path / CARD, (source.path / CARD).read_at_most(JSON_BYTES.value, "a card"))
    return copied


def _copy_file(source: Place, target: Place, sha256: str) -> None:
    """Raises CacheError, and leaves no target, where the bytes are not those of the checksum."""
    wrong = CacheError(f"{source}: its bytes have changed since it was written (sha256 differs)")
    try:
        if isinstance(source, Path) and not isinstance(target, Path):
            if sha256_file(source) != sha256:
                raise wrong
            target.upload(source)
            return
        with source.open("rb") as read, atomic_file(target) as written:
            shutil.copyfileobj(read, written, CHUNK)
            if written.sha256 != sha256:
                raise wrong
    except FileNotFoundError:
        raise CacheError(f"{source}: is missing") from None
