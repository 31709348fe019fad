"""`pipeline audit`."""

from __future__ import annotations

import json
from typing import Any

import click

from pipeline.commands import cache_teacher
from pipeline.config_file import config_option
from pipeline.option_types import SEED, FloatRange
from pipeline.progress import Progress, summary, table
from pipeline.shared_options import engine_options, options_of
from pipeline.streams import say
from storage.errors import RunError

# The teacher and what runs it, as for cache-teacher.
_TEACHER = (
    "teacher",
    "engine",
    "vllm_args",
    "vllm_route",
    "server_url",
    "server_model",
    "server_concurrency",
    "batch_tokens",
    "revision",
    "trust_remote_code",
)


@click.command("audit")
@click.argument("directory", metavar="DIR_OR_URL", type=click.Path())
@options_of(cache_teacher.command, _TEACHER)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    show_default="the one in the manifest",
    help="Precision of the teacher.",
)
@click.option(
    "--sequences", type=click.IntRange(1), show_default="64", help="Sequences to score again, drawn from all."
)
@click.option(
    "--share",
    type=FloatRange(0, 1, min_open=True),
    show_default="none",
    help="Instead of --sequences: the share of all sequences to score again, 0 to 1.",
)
@click.option("--seed", default=0, type=SEED, help="Seed of the draw.")
@click.option(
    "--threshold",
    metavar="NATS",
    type=FloatRange(0, min_open=True),
    show_default="8 times the control's, at least 0.001 in float32, 0.1 else",
    help="Largest difference that passes, at any position; a mean may be a tenth of it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@config_option()
def command(directory: str, as_json: bool, **given: Any) -> None:
    """Score a random sample of a cache's sequences again with the live teacher, and say whether it agrees.

    Beside each difference stands a control: the same teacher's numbers for the same sequences in other batches, which
    is the noise of its arithmetic. What the rounding of storage hides is not counted. Only the shards that hold the
    sample are read. Exit code 1 if the cache differs.

    \b
    Example:
      pipeline audit cache/ --teacher ./teacher
      pipeline audit s3://bucket/cache --teacher Qwen/Qwen3-8B --sequences 256 --json
    """
    from dataclasses import asdict

    from stages.audit import AuditOptions, prepare, run, start
    from stages.differences import MEASURES

    engine = engine_options(given)
    prepared = prepare(AuditOptions(directory, engine, **given))
    say(f"engine: {prepared.choice.engine} ({prepared.choice.reason}), {prepared.dtype}", err=True)
    for note in prepared.choice.notes:
        say(f"engine: {note}", err=True)
    for difference in prepared.identity_differences:
        say(f"the manifest describes another teacher: {difference}", err=True)
    start(prepared)
    with Progress("auditing", prepared.tokens) as progress:
        audit = run(prepared, progress.advance)
    if as_json:
        say(json.dumps({"passes": audit.passes, "verdict": audit.verdict, **asdict(audit)}, indent=2))
    else:
        ours, control = audit.cache, audit.control
        table(
            "differences in nats, of the cache and of the control",
            ["what", "values", "mean", "99 %", "max", "control mean", "99 %", "max", "passes up to"],
            [
                (
                    MEASURES[name],
                    f"{spread.count:,}",
                    *(f"{value:.3g}" for value in (spread.mean, spread.p99, spread.max)),
                    *(f"{value:.3g}" for value in (noise.mean, noise.p99, noise.max)),
                    f"{audit.tolerances[name][1]:.3g}" if name in audit.tolerances else "not judged",
                )
                for name, spread, noise in (
                    (name, spread, control.spreads[name]) for name, spread in ours.spreads.items()
                )
            ],
        )
        drawn = []
        if ours.samples_that_differ is not None and control.samples_that_differ is not None:
            drawn = [("tail samples that differ", _shares(ours.samples_that_differ, control.samples_that_differ))]
        if ours.codes_that_differ is not None and control.codes_that_differ is not None:
            drawn += [("sketch codes that differ", _shares(ours.codes_that_differ, control.codes_that_differ))]
        summary(
            "audit",
            [
                ("cache", directory),
                ("teacher", engine.teacher),
                ("sequences", f"{audit.sequences:,} of {prepared.cache.manifest.corpus.sequences:,}"),
                ("scored positions", f"{audit.positions:,}"),
                ("shards read", f"{audit.shards:,} of {len(prepared.cache.manifest.shards):,}"),
                ("top-1 that differ", _shares(1 - ours.top1_agreement, 1 - control.top1_agreement)),
                ("top-N ids that differ", _shares(ours.ids_that_differ, control.ids_that_differ)),
                *drawn,
                ("KL, mean", f"{ours.mean_kl:.3g} nats (control {control.mean_kl:.3g})"),
                ("KL, max", f"{ours.max_kl:.3g} nats (control {control.max_kl:.3g})"),
                *([("verdict", audit.verdict)] if audit.passes else []),
            ],
        )
    if not audit.passes:
        raise RunError(f"{directory}: {audit.verdict}")


def _shares(ours: float, control: float) -> str:
    return f"{ours:.4%} (control {control:.4%})"
