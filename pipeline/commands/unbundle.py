"""`pipeline unbundle`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("unbundle")
@click.argument("file", metavar="FILE.tar.zst", type=click.Path(path_type=Path))
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def command(file: Path, directory: Path) -> None:
    """Unpack a bundle into a new directory, which appears only when every shard has been checked.

    The checksum beside the file is compared where there is one; members that are no plain files inside the directory
    are refused.

    \b
    Example:
      pipeline unbundle cache.tar.zst cache/
    """
    from storage.bundle import unbundle

    cache = unbundle(file, directory)
    click.echo(f"{directory}: {len(cache.shards_here)} shards, all sound; cache id {cache.manifest.cache_id}")
