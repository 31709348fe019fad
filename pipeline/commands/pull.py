"""`pipeline pull`."""

from __future__ import annotations

import click

from pipeline.numbers import parse_range
from pipeline.progress import Progress
from pipeline.streams import say
from storage.words import counted


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
    from stages.local_files import check_apart
    from storage.cache import Cache
    from storage.transfer import copy_cache

    cache = Cache.open(url)
    check_apart(url, directory, "cache")
    planned = cache.manifest.shards
    wanted = parse_range(shards, "--shards", len(planned), "shard")
    with Progress("pulling", sum(planned[index].tokens for index in wanted)) as progress:
        copied = copy_cache(
            cache, directory, shards=wanted, jobs=jobs, progress=lambda shard: progress.advance(planned[shard].tokens)
        )
    say(f"{directory}: {len(wanted)} of {counted(len(planned), 'shard')}, {copied} of them copied now")
