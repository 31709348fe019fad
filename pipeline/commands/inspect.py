"""`pipeline inspect`."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import click

from pipeline.progress import summary, table
from pipeline.reports import summary_rows
from pipeline.streams import say
from storage.errors import CacheError, UserError
from storage.words import counted

if TYPE_CHECKING:
    from storage.cache import Cache


_ALTERNATIVES = 8


@click.command("inspect")
@click.argument("directory", metavar="DIR_OR_URL", type=click.Path())
@click.option(
    "--sequence", type=click.IntRange(0), show_default="the first", help="Sequence to look into, by its index."
)
@click.option(
    "--position",
    type=click.IntRange(0),
    show_default="the middle one with a loss",
    help="Scored position to show, by its index in the sequence.",
)
@click.option(
    "--alternatives", type=click.IntRange(1), show_default="8", help="How many of the teacher's tokens to show."
)
@click.option(
    "--masks", is_flag=True, help="Show the whole sequence as text instead, the tokens that have a loss marked in it."
)
def command(directory: str, sequence: int | None, position: int | None, alternatives: int | None, masks: bool) -> None:
    """Show what a cache is and holds, and one position as text with the teacher's alternatives.

    With --masks: the text of one sequence, underlined where it has a loss, or between [[ and ]] where the output is no
    terminal. Other marks take their place, and are named, where the text itself holds these.

    \b
    Example:
      pipeline inspect cache/
      pipeline inspect cache/ --sequence 12 --masks
      pipeline inspect cache/ --sequence 12 --position 40 --alternatives 20
      pipeline inspect s3://bucket/cache
    """
    import numpy as np

    from stages.compatibility import cache_tokenizer, decoded
    from stages.summary import summarize
    from storage.cache import Cache
    from storage.shard import value_problems

    if masks and (position is not None or alternatives is not None):
        raise UserError("--masks shows a whole sequence; leave out --position and --alternatives")
    cache = Cache.open(directory)
    manifest = cache.manifest
    if sequence is None:
        sequence = manifest.shards[cache.shards_here[0]].first
    if sequence >= manifest.corpus.sequences:
        raise UserError(
            f"--sequence {sequence}: this cache holds {counted(manifest.corpus.sequences, 'sequence')}, from 0"
        )
    shard = next(i for i, planned in enumerate(manifest.shards) if sequence < planned.first + planned.sequences)
    if shard not in cache.shards_here:
        raise UserError(f"--sequence {sequence}: is in shard {shard}, which was not pulled to {directory}")
    if masks:
        _show_masks(cache, shard, sequence)
        return
    numbers = summarize(cache)
    rows = cache.read_shard(shard)
    # What is shown is what it says, so it has to be possible.
    for problem in value_problems(rows, manifest):
        raise CacheError(f"{cache.shard_path(shard)}: {problem}")
    row = sequence - manifest.shards[shard].first
    ids, mask, counts = rows["input_ids"][row], rows["loss_mask"][row], rows["top_count"][row].astype(np.int64)
    stored = np.flatnonzero(mask)
    if position is None:
        shown_first = stored if len(stored) else np.arange(len(mask))
        position = int(shown_first[len(shown_first) // 2])
    if position >= len(mask):
        raise UserError(
            f"--position {position}: sequence {sequence} has {counted(len(mask), 'scored position')}, from 0"
        )
    tokenizer = cache_tokenizer(cache)
    versions = dict(manifest.made_with)
    why = versions.pop("engine", "")

    summary(
        "cache",
        [
            *summary_rows(cache, numbers),
            ("mean entropy", "not stored" if numbers.mean_entropy is None else f"{numbers.mean_entropy:.4f} nats"),
            ("max length", manifest.scoring.max_length),
            *(
                []
                if manifest.corpus.source_rows is None
                else [("rows of the data", f"{manifest.corpus.source_rows:,}, held out with all their sequences")]
            ),
            ("data set", manifest.source.get("dataset", "unknown")),
            ("corpus fingerprint", manifest.corpus.fingerprint),
            ("columns", ", ".join(column.name for column in manifest.columns)),
            ("made with", ", ".join(f"{name} {version}" for name, version in versions.items())),
            ("why this engine", "named by --engine" if why == "--engine" else why or "not stated"),
        ],
    )
    if manifest.scoring.sketch is not None:
        _explained(cache)
    gold = int(ids[position + 1])
    gold_logprob = float(rows["gold_logprob"][row][position])
    start = int(counts[:position].sum())
    shown = slice(start, start + min(alternatives or _ALTERNATIVES, int(counts[position])))
    top = rows["top_ids"][row][shown].tolist()
    before, next_text, *top_texts = decoded(
        cache, tokenizer, [ids[max(0, position - 40) : position + 1].tolist(), [gold], *([token] for token in top)]
    )
    summary(
        f"sequence {sequence}, position {position} of 0..{len(mask) - 1}",
        [
            ("text so far", f"...{before[-200:]}" if position > 40 or len(before) > 200 else before),
            ("what came next", f"{next_text!r} (id {gold})"),
            ("p(gold)", f"{math.exp(gold_logprob):.6g}"),
            ("UNC", f"{-math.expm1(gold_logprob):.6g}"),
            *([("entropy", f"{float(rows['entropy'][row][position]):.4f} nats")] if manifest.scoring.entropy else []),
            ("tail mass", f"{math.exp(float(rows['tail_logmass'][row][position])):.6g}"),
        ],
    )
    if not mask[position]:
        say("this position has no loss, so its top-N is not stored")
        return
    table(
        "the teacher's tokens",
        ["rank", "token", "id", "probability"],
        [
            (
                rank,
                repr(text) + (" <- gold" if token == gold else ""),
                token,
                f"{math.exp(logprob):.6f}",
            )
            for rank, (token, text, logprob) in enumerate(
                zip(top, top_texts, rows["top_logprobs"][row][shown].tolist(), strict=True), 1
            )
        ],
    )


def _show_masks(cache: Cache, shard: int, sequence: int) -> None:
    from pipeline.mask_view import show, stretches
    from stages.compatibility import cache_tokenizer, within_limits

    rows = cache.read_shard(shard, ["input_ids", "loss_mask"])
    row = sequence - cache.manifest.shards[shard].first
    ids, mask = rows["input_ids"][row], rows["loss_mask"][row]
    tokenizer = cache_tokenizer(cache)
    view = within_limits(cache, len(ids), lambda: stretches(tokenizer, ids, mask))
    show(view, f"sequence {sequence} of {cache.manifest.corpus.sequences}", ids, mask, sys.stdout)


def _explained(cache: Cache) -> None:
    """What other ranks would do: the share of the variance of the teacher's logits, over what it was calibrated on."""
    from pipeline.numbers import format_bytes

    sketch = cache.sketch()
    explained = sketch.tensors["explained"]
    rank = len(sketch.tensors["scales"])
    ranks = sorted({rank, len(explained), *(1 << power for power in range(len(explained).bit_length()))})
    summary(
        "sketch",
        [
            ("calibrated on", f"{sketch.about.get('positions', 'unknown')} positions"),
            ("size", format_bytes(cache.sketch_path.stat().st_size)),
        ],
    )
    table(
        "share of the logits' variance by rank",
        ["rank", "explained"],
        [
            (f"{each}{' <- this cache' if each == rank else ''}", f"{explained[each - 1]:.4f}")
            for each in ranks
            if each <= len(explained)
        ],
    )
