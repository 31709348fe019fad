"""Whether several caches may be trained from in one run: one teacher, one tokenizer, columns that go together."""

from __future__ import annotations

from collections.abc import Sequence

from storage.cache import Cache
from storage.errors import CacheError


def check_together(caches: Sequence[Cache]) -> None:
    """Raises CacheError, naming what differs from the first cache."""
    first = caches[0]
    for place, cache in enumerate(caches):
        for earlier in caches[:place]:
            if earlier.manifest.cache_id == cache.manifest.cache_id:
                raise CacheError(
                    f"{cache.path}: is the same cache as {earlier.path}; name it once and weigh it with --mix"
                )
        if differing := differences(first, cache):
            raise CacheError(
                f"{cache.path}: does not go together with {first.path}, which has another {', '.join(differing)}; "
                "train from caches of one teacher"
            )


def differences(one: Cache, other: Cache) -> list[str]:
    """What keeps two caches from being of one teacher and tokenizer; empty when they go together."""
    a, b = one.manifest, other.manifest
    found = []
    # A hub teacher has a revision, a local one a fingerprint of its weights: only what both have can differ.
    exact = [(a.teacher.revision, b.teacher.revision), (a.teacher.weights, b.teacher.weights)]
    known = [(x, y) for x, y in exact if x is not None and y is not None]
    same_name = a.teacher.name.rpartition("/")[2] == b.teacher.name.rpartition("/")[2]
    if a.teacher.config_sha256 != b.teacher.config_sha256 or any(x != y for x, y in known) or not (known or same_name):
        found.append(f"teacher ({a.teacher.name}, not {b.teacher.name})")
    for name in ("vocabulary_sha256", "behaviour_sha256"):
        if getattr(a.tokenizer, name) != getattr(b.tokenizer, name):
            found.append("tokenizer")
            break
    if a.vocabulary_size != b.vocabulary_size:
        found.append(f"vocabulary size ({a.vocabulary_size}, not {b.vocabulary_size})")
    return found
