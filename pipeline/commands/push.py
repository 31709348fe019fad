"""`pipeline push`."""

from __future__ import annotations

import click

from pipeline.progress import Progress
from pipeline.streams import say
from storage.words import counted


@click.command("push")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.argument("url", metavar="URL")
@click.option("--jobs", default=8, type=click.IntRange(1), help="Files on their way at a time.")
def command(directory: str, url: str, jobs: int) -> None:
    """Copy a finished cache to a bucket or another place, each file compared with its checksum.

    What is there already is skipped: after a kill or a cut line, the same command again goes on.

    \b
    Example:
      pipeline push cache/ s3://bucket/qwen3-8b-chats
      pipeline push cache/ hf://datasets/org/qwen3-8b-chats
    """
    from stages.local_files import check_apart
    from storage.cache import Cache
    from storage.transfer import copy_cache

    cache = Cache.open(directory)
    check_apart(directory, url, "cache")
    shards = cache.manifest.shards
    with Progress("pushing", cache.manifest.corpus.tokens) as progress:
        copied = copy_cache(cache, url, jobs=jobs, progress=lambda shard: progress.advance(shards[shard].tokens))
    say(f"{url}: {counted(len(shards), 'shard')}, {copied} of them copied now; cache id {cache.manifest.cache_id}")
