"""`pipeline merge`."""

from __future__ import annotations

import click

from pipeline.derived_cache import derive


@click.command("merge")
@click.argument("sources", metavar="DIR_OR_URL...", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o", "--output", required=True, metavar="DIR_OR_URL", type=click.Path(), help="The cache to make or to go on with."
)
def command(sources: tuple[str, ...], output: str) -> None:
    """Join caches of one teacher, over different corpora or shards of one, into one cache.

    Sequences are numbered anew, in the order given. Caches that keep different things are refused, with what differs:
    `pipeline select` brings them to the smaller options, and `train-student` takes several --shards as they are. The
    manifest names the sources. The same command again goes on where it was stopped.

    \b
    Example:
      pipeline merge code/ chats/ -o both/
      pipeline merge s3://bucket/a s3://bucket/b -o s3://bucket/ab
    """
    from stages.derivation import plan_merge
    from storage.cache import Cache

    derive(
        plan_merge([Cache.open(source) for source in sources]),
        output,
        "merging",
        "not every source has one",
        sources=sources,
    )
