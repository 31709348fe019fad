"""Lines that several commands show about a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.numbers import format_bytes
from pipeline.progress import summary
from storage.words import counted

if TYPE_CHECKING:
    from stages.summary import Summary
    from storage.cache import Cache


def show_cache(cache: Cache, numbers: Summary) -> None:
    """Where a cache that was just made is, and what describes it."""
    summary("cache", [("where", cache.path), *summary_rows(cache, numbers)])


def summary_rows(cache: Cache, numbers: Summary) -> list[tuple[str, object]]:
    """Name and value of what describes a cache, for `pipeline.progress.summary`."""
    from stages.summary import QUANTILES

    manifest, scoring = cache.manifest, cache.manifest.scoring
    quantiles = ", ".join(f"{q:.0%} {value:.3g}" for q, value in zip(QUANTILES, numbers.unc_quantiles, strict=True))
    adaptive: list[tuple[str, object]] = []
    if scoring.tail_epsilon:
        said = f"{scoring.min_n} to {scoring.top_n}, until less than {scoring.tail_epsilon:g} is left"
        adaptive.append(("adaptive N", f"{said}; {numbers.mean_top_n:.1f} on average"))
    derived = [
        f"{counted(origin.sequences, 'sequence', ',')} of cache {origin.cache_id}" for origin in manifest.derived_from
    ]
    rows: list[tuple[str, object]] = [
        ("cache id", manifest.cache_id),
        *([("made from", ", ".join(derived))] if derived else []),
        ("teacher", f"{manifest.teacher.name} ({manifest.teacher.architecture}, {scoring.dtype}, {scoring.engine})"),
        ("sequences", f"{numbers.sequences:,}"),
        ("tokens", f"{numbers.tokens:,}"),
        ("positions with a loss", f"{numbers.stored_positions:,}"),
        ("shards", f"{numbers.shards:,}" + (f" of {len(manifest.shards):,}" if cache.is_partial else "")),
        ("top-N", f"{scoring.top_n} of {manifest.vocabulary_size:,}"),
        *adaptive,
        ("size", format_bytes(numbers.bytes)),
        ("bytes per token", f"{numbers.bytes_per_token:.1f}"),
        ("mean tail mass", f"{numbers.mean_tail_mass:.4g}"),
        ("mean UNC", f"{numbers.mean_unc:.4g}"),
        ("UNC quantiles", quantiles),
        ("teacher's cross-entropy", f"{numbers.teacher_cross_entropy:.4f} nats"),
    ]
    if scoring.sketch is not None:
        samples = counted(scoring.sketch.residual_samples, "residual sample")
        rows += [
            ("sketch", f"rank {scoring.sketch.rank}, {samples} per position"),
            ("KL of the sketch", number(numbers.mean_sketch_kl, " nats")),
            ("mean residual mass", number(numbers.mean_residual_mass, " of 2")),
            *noise_rows(numbers.equal_tail_samples),
        ]
    return rows


def noise_rows(equal_tail_samples: float | None) -> list[tuple[str, object]]:
    """What tells one sketch from another, in the unit of `--tail-samples`."""
    if equal_tail_samples is None:
        return []
    return [("noise of residual samples", f"that of {equal_tail_samples:,.0f} tail samples")]


def number(value: float | None, unit: str) -> str:
    return "not stored" if value is None else f"{value:.4g}{unit}"
