"""`pipeline pull`."""

from __future__ import annotations

import click

from pipeline.numbers import parse_range
from pipeline.progress import Progress
from storage.errors import UserError


@click.command("pull")
@click.argument("url", metavar="URL")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option(
    "--shards",
    metavar="FIRST:STOP",
    show_default="all",
    help="Only these shards, numbered from 0, STOP not included. Such a part can be inspected, verified and trained "
    "from.",
)
@click.option("--jobs", default=8, type=click.IntRange(1), help="Files on their way at a time.")
def command(url: str, directory: str, shards: str | None, jobs: int) -> None:
    """Copy a cache from a bucket or another place to a directory, each file compared with its checksum.

    What is there already is skipped: after a kill or a cut line, the same command again goes on, and a part becomes
    the whole by a pull without --shards. A directory that holds another cache is refused.

    \b
    Example:
      pipeline pull s3://bucket/qwen3-8b-chats cache/
      pipeline pull s3://bucket/qwen3-8b-chats sample/ --shards 0:10
    """
    from storage.cache import Cache
    from storage.transfer import copy_cache

    cache = Cache.open(url)
    planned = cache.manifest.shards
    wanted = _range(shards, len(planned))
    with Progress("pulling", sum(planned[index].tokens for index in wanted)) as progress:
        copied = copy_cache(
            cache, directory, shards=wanted, jobs=jobs, progress=lambda shard: progress.advance(planned[shard].tokens)
        )
    click.echo(f"{directory}: {len(wanted)} of {len(planned)} shards, {copied} of them copied now")


def _range(text: str | None, count: int) -> range:
    """Raises UserError unless `text` names at least one of `count` shards."""
    chosen = range(count)[parse_range(text, "--shards")]
    if not chosen:
        raise UserError(f"--shards {text}: wants FIRST:STOP, as in 0:100; this cache has {count} shards, from 0")
    return chosen
