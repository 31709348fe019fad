"""`pipeline plan`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from pipeline.commands import cache_teacher
from pipeline.numbers import format_bytes, format_duration
from pipeline.option_types import FloatRange
from pipeline.progress import summary, table
from pipeline.reports import noise_rows, number
from pipeline.shared_options import options_of
from pipeline.streams import say
from storage.words import counted

if TYPE_CHECKING:
    from stages.planning import Plan

_SHARED = [param.name for param in cache_teacher.command.params if param.name and param.name != "output"]


@click.command("plan")
@options_of(cache_teacher.command, _SHARED)
@click.option(
    "-o",
    "--output",
    default="",
    metavar="DIR_OR_URL",
    type=click.Path(),
    show_default="none",
    help="Where the cache would go; only checked to be free.",
)
@click.option(
    "--probe",
    type=click.IntRange(1),
    show_default="none: no weight is read",
    help="Score this many sequences, drawn at random, and measure speed and bytes, e.g. 64.",
)
@click.option(
    "--student-epochs",
    default=1.0,
    type=FloatRange(0, min_open=True),
    help="Passes over the corpus of one student run, for when the cache has paid for itself.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
def command(probe: int | None, student_epochs: float, as_json: bool, **given: Any) -> None:
    """Say what `cache-teacher` with the same options would make, and what it would cost, before it is made.

    Tokens, sequences and shards are exact: the corpus is tokenised. Bytes are an estimate, and measured with --probe,
    which also gives the time and after how many student runs the cache has paid for itself. Nothing is written.

    \b
    Example:
      pipeline plan --teacher ./teacher --dataset corpus.jsonl
      pipeline plan --teacher Qwen/Qwen3-8B --dataset chats.jsonl.zst --top-n 64 --probe 64
    """
    from dataclasses import asdict

    from stages.planning import plan

    options = cache_teacher.cache_options(given)
    if probe is not None:
        say(f"the teacher is loaded and scores {counted(probe, 'sequence')}", err=True)
    found = plan(options, probe=probe, student_epochs=student_epochs)
    report, measured = found.report, found.probe
    cache_teacher.report_corpus(report)
    if as_json:
        derived = {
            "bytes_per_token": found.bytes_per_token,
            "shard_bytes": found.shard_bytes,
            "other_bytes": found.other_bytes,
            "bytes_are": "estimated" if measured is None else "measured",
            "tokens_per_second": None if measured is None else measured.tokens_per_second,
            "teacher_seconds": found.teacher_seconds,
            "caching_seconds": found.caching_seconds,
            "runs_to_pay": found.runs_to_pay,
            "bytes_of_equal_noise": found.bytes_of_equal_noise,
        }
        say(json.dumps({**asdict(found), **derived}, indent=2))
        return
    if measured is None:
        table(
            "columns, estimated",
            ["column", "values", "bytes per token", "bytes"],
            [
                (column.name, f"{column.values:,}", f"{column.bytes / found.tokens:.2f}", format_bytes(column.bytes))
                for column in found.columns
            ],
        )
    how = (
        "estimate; --probe 64 measures"
        if measured is None
        else f"measured on {counted(measured.sequences, 'sequence', ',')}"
    )
    rows: list[tuple[str, object]] = [
        ("sequences", f"{report.sequences:,}"),
        ("tokens", f"{report.tokens:,}"),
        ("positions with a loss", f"{report.trained_positions:,}"),
        ("shards", f"{found.shards:,}"),
        ("top-N", f"{found.top_n} of {found.vocabulary_size:,}"),
        ("tail samples", found.tail_samples),
        *_sketch_rows(found),
        ("bytes per token", f"{found.bytes_per_token:.1f} ({how})"),
        ("size", f"{format_bytes(found.shard_bytes)}, and {format_bytes(found.other_bytes)} beside the shards"),
    ]
    if measured is not None and found.caching_seconds is not None and found.teacher_seconds is not None:
        runs = found.runs_to_pay
        rows += [
            ("engine", measured.engine),
            ("teacher", f"{measured.tokens_per_second:,.0f} tokens/s on {measured.tokens:,} tokens"),
            ("time to load it", format_duration(measured.load_seconds)),
            ("time to cache", format_duration(found.caching_seconds)),
            ("online distillation", f"{format_duration(found.teacher_seconds)} of teacher in each epoch of each run"),
            (
                "paid for after",
                f"{counted(runs or 0, 'student run')} of {student_epochs:g} epoch{'s' * (student_epochs != 1)}",
            ),
        ]
    summary("plan", rows)


def _sketch_rows(found: Plan) -> list[tuple[str, object]]:
    if not found.sketch_rank:
        return []
    rows: list[tuple[str, object]] = [
        ("sketch", f"rank {found.sketch_rank}, {counted(found.residual_samples, 'residual sample')} per position")
    ]
    if found.probe is None or found.probe.sketch is None:
        return rows
    measured = found.probe.sketch
    rows += [
        ("variance of the logits explained", f"{measured.explained:.4f}"),
        ("KL of the sketch", number(measured.mean_kl, " nats")),
        *noise_rows(measured.equal_tail_samples),
    ]
    if found.bytes_of_equal_noise is not None:
        rows.append(("which would take", f"{found.bytes_of_equal_noise:,.1f} bytes per token (estimate)"))
    return rows
