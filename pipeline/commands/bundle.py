"""`pipeline bundle`."""

from __future__ import annotations

import click

from pipeline.progress import Progress
from pipeline.streams import say
from storage.errors import UserError
from storage.words import counted


@click.command("bundle")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.argument("file", metavar="FILE.tar.zst", type=click.Path())
def command(directory: str, file: str) -> None:
    """Pack a finished cache into one file, with its checksum beside it, for machines without a network.

    \b
    Example:
      pipeline bundle cache/ cache.tar.zst
      sha256sum --check cache.tar.zst.sha256
    """
    from stages.local_files import check_apart
    from storage.bundle import SUFFIX, bundle, checksum_path
    from storage.cache import Cache
    from storage.new_path import check_new_path, local_path

    path = local_path(file, "a bundle")
    if not path.name.endswith(SUFFIX):
        raise UserError(f"{file}: a bundle's name ends in {SUFFIX}")
    if path.is_dir():
        raise UserError(f"{file}: is a directory; a bundle is a file")
    check_new_path(path, "a bundle is a file in a folder")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such directory")
    cache = Cache.open(directory)
    check_apart(directory, file, "cache")
    shards = cache.manifest.shards
    with Progress("bundling", sum(shards[index].tokens for index in cache.shards_here)) as progress:
        digest = bundle(cache, path, lambda shard: progress.advance(shards[shard].tokens))
    say(f"{file}: {counted(path.stat().st_size, 'byte')}, sha256 {digest} (in {checksum_path(path).name})")
