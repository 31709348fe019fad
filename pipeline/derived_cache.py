"""How `pipeline select` and `pipeline merge` end: the cache is made, or gone on with, and described."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.progress import Progress
from pipeline.reports import show_cache
from pipeline.streams import say

if TYPE_CHECKING:
    from stages.derivation import Derivation


def derive(derivation: Derivation, output: str, doing: str, without_prior: str, *, sources: Sequence[str]) -> None:
    """Make it at `output`, a directory or URL, from the caches `sources`.

    doing: for the progress. without_prior: said where the new cache has no tail prior. Raises CacheError for an output
    that is another cache, UserError for one inside a source, CacheError for a source that cannot be read.
    """
    from stages.derivation import write
    from stages.local_files import check_apart
    from storage.cache import Cache

    for source in sources:
        check_apart(source, output, "cache")
    Cache.resume(output, derivation.manifest)
    if not derivation.has_prior:
        say(f"the new cache has no tail prior: {without_prior}", err=True)
    with Progress(doing, derivation.manifest.corpus.tokens) as progress:
        cache, numbers = write(derivation, output, progress.advance)
    show_cache(cache, numbers)
