"""`pipeline verify`."""

from __future__ import annotations

import click

from pipeline.progress import Progress, printable
from pipeline.streams import say
from storage.errors import RunError, UserError
from storage.limits import SHOWN
from storage.words import counted


@click.command("verify")
@click.argument("directory", metavar="DIR_OR_URL", type=click.Path())
def command(directory: str) -> None:
    """Recompute every checksum and invariant of a cache, and name each bad file and row.

    Checked: bytes against receipts, row counts and lengths, L-1 scored positions for L ids, ids in range, descending
    order, gold's own entry against its log-probability (the sign of a shift by one), probabilities that sum to 1.
    Exit code 1 if anything is wrong.

    \b
    Example:
      pipeline verify cache/
      pipeline verify s3://bucket/cache
    """
    from stages.compatibility import cache_tokenizer
    from storage import integrity
    from storage.cache import Cache

    cache = Cache.open(directory)
    shards = cache.manifest.shards
    found, shown = 0, SHOWN.value
    tokens = sum(shards[index].tokens for index in cache.shards_here)
    with Progress("verifying", tokens) as progress:
        for problem in integrity.problems(cache, lambda shard: progress.advance(shards[shard].tokens)):
            found += 1
            if found <= shown:
                say(printable(problem))
    if found > shown:
        say(f"and {counted(found - shown, 'problem', ',')} more; {SHOWN.advice}")
    try:
        cache_tokenizer(cache)
    except UserError as error:
        found += 1
        say(printable(str(error)))
    if found:
        raise RunError(f"{directory}: {counted(found, 'problem')} in this cache")
    say(f"{directory}: {counted(len(cache.shards_here), 'shard')}, {counted(tokens, 'token')}, all sound")
