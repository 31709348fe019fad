"""`pipeline unbundle`."""

from __future__ import annotations

import click

from pipeline.streams import say
from storage.words import counted


@click.command("unbundle")
@click.argument("file", metavar="FILE.tar.zst", type=click.Path())
@click.argument("directory", metavar="DIR", type=click.Path())
def command(file: str, directory: str) -> None:
    """Unpack a bundle into a new directory, which appears only when every shard has been checked.

    The checksum beside the file is compared where there is one; members that are no plain files inside the directory
    are refused.

    \b
    Example:
      pipeline unbundle cache.tar.zst cache/
    """
    from storage.bundle import unbundle
    from storage.new_path import local_path

    cache = unbundle(local_path(file, "a bundle"), local_path(directory, "an unpacked cache"))
    say(f"{directory}: {counted(len(cache.shards_here), 'shard')}, all sound; cache id {cache.manifest.cache_id}")
