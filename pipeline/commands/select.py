"""`pipeline select`."""

from __future__ import annotations

import click

from pipeline.derived_cache import derive
from pipeline.numbers import parse_range
from pipeline.option_types import FloatRange


@click.command("select")
@click.argument("source", metavar="DIR_OR_URL", type=click.Path())
@click.option(
    "-o", "--output", required=True, metavar="DIR_OR_URL", type=click.Path(), help="The cache to make or to go on with."
)
@click.option(
    "--sequences", metavar="FIRST:STOP", show_default="all", help="Only these sequences, by index, STOP not included."
)
@click.option(
    "--min-loss-share",
    default=0.0,
    type=FloatRange(0, 1),
    help="Leave out sequences in which a smaller share of the positions has a loss.",
)
@click.option("--top-n", type=click.IntRange(1, 65535), show_default="as there", help="Keep at most this many entries.")
@click.option(
    "--tail-epsilon",
    type=FloatRange(0, 1, max_open=True),
    show_default="as there",
    help="Keep, at each position, only as many entries as leave less than this mass in the tail.",
)
@click.option(
    "--min-n", type=click.IntRange(1, 65535), show_default="as there", help="With --tail-epsilon, at least this many."
)
@click.option(
    "--logprob-bits",
    type=click.Choice(["8", "16", "32"]),
    show_default="as there",
    help="Bits of a stored top-N log-probability.",
)
@click.option(
    "--tail-samples",
    type=click.IntRange(0, 65535),
    show_default="as there",
    help="Keep this many samples per position.",
)
@click.option(
    "--drop",
    multiple=True,
    metavar="COLUMN",
    show_default="nothing",
    help="Leave out an optional column: tail_samples, entropy, tail_logmass_T2, ...; may be repeated.",
)
def command(source: str, output: str, sequences: str | None, **given: object) -> None:
    """Make a smaller cache from one, without the teacher: fewer sequences, entries, bits or columns.

    What leaves the kept set joins the tail: its mass, the tail prior and the samples then say what they would have
    said had the smaller cache been made directly, up to the rounding of the stored entries. Only where some rows of a
    shard are left out the tail prior cannot be known, and the new cache has none. The manifest names the source.
    The same command again goes on where it was stopped.

    \b
    Example:
      pipeline select cache/ -o small/ --top-n 16 --logprob-bits 8
      pipeline select cache/ -o adaptive/ --tail-epsilon 0.02 --drop tail_samples
      pipeline select s3://bucket/cache -o sample/ --sequences 0:1000 --min-loss-share 0.1
    """
    from stages.derivation import Selection, plan_selection
    from storage.cache import Cache

    opened = Cache.open(source)
    chosen = parse_range(sequences, "--sequences", opened.manifest.corpus.sequences, "sequence")
    bits = given.pop("logprob_bits")
    selection = Selection(
        first=chosen.start,
        stop=chosen.stop,
        logprob_bits=None if bits is None else int(str(bits)),
        **given,  # type: ignore[arg-type]
    )
    derive(
        plan_selection(opened, selection),
        output,
        "selecting",
        "it is known for whole shards of a cache that has one",
        sources=[source],
    )
