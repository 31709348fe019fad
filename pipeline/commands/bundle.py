"""`pipeline bundle`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.progress import Progress
from storage.errors import UserError


@click.command("bundle")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.argument("file", metavar="FILE.tar.zst", type=click.Path(path_type=Path))
def command(directory: str, file: Path) -> None:
    """Pack a finished cache into one file, with its checksum beside it, for machines without a network.

    \b
    Example:
      pipeline bundle cache/ cache.tar.zst
      sha256sum --check cache.tar.zst.sha256
    """
    from storage.bundle import SUFFIX, bundle, checksum_path
    from storage.cache import Cache

    if not file.name.endswith(SUFFIX):
        raise UserError(f"{file}: a bundle's name ends in {SUFFIX}")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent}: no such directory")
    cache = Cache.open(directory)
    shards = cache.manifest.shards
    with Progress("bundling", sum(shards[index].tokens for index in cache.shards_here)) as progress:
        digest = bundle(cache, file, lambda shard: progress.advance(shards[shard].tokens))
    click.echo(f"{file}: {file.stat().st_size} bytes, sha256 {digest} (in {checksum_path(file).name})")
