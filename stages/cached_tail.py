"""What a run takes from its caches for the teacher's tail: which columns, which sketches, which mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stages.objective import Objective
from storage.cache import Cache
from storage.errors import CacheError
from storage.manifest import SketchIdentity
from storage.schema import temperature_column

if TYPE_CHECKING:
    from stages.sketch import Sketch, Sketches
    from stages.tail import Tail


def extra_columns(objective: Objective, cache: Cache) -> list[str]:
    """Optional columns that the objective reads. Raises CacheError for a temperature the cache does not hold."""
    columns = []
    if objective.tail == "sampled":
        columns = ["tail_samples", *(["entropy"] if cache.manifest.scoring.entropy else [])]
    elif objective.tail == "sketch":
        columns = sketch_columns(cache)
    if objective.temperature != 1:
        there = cache.manifest.scoring.temperatures
        if objective.temperature not in there:
            held = ", ".join(f"{t:g}" for t in (1.0, *there))
            raise CacheError(
                f"{cache.path}: holds the temperatures {held}, not {objective.temperature:g}; "
                f"cache again with --temperature {objective.temperature:g}"
            )
        columns.append(temperature_column(objective.temperature).name)
    return columns


def sketch_columns(cache: Cache) -> list[str]:
    """What the tail mode `sketch` reads of a cache that has one."""
    scoring = cache.manifest.scoring
    assert scoring.sketch is not None
    residuals = ["residual_samples", "residual_mass"] if scoring.sketch.residual_samples else []
    return ["sketch_codes", *residuals, *(["entropy"] if scoring.entropy else [])]


def common_sketch(caches: Sequence[Cache]) -> SketchIdentity | None:
    """The first cache's sketch, where all have one of its rank and as many residual samples."""
    first, *others = (cache.manifest.scoring.sketch for cache in caches)
    same = first is not None and all(
        other is not None and (other.rank, other.residual_samples) == (first.rank, first.residual_samples)
        for other in others
    )
    return first if same else None


def sketch_numbers(caches: Sequence[Cache]) -> tuple[int, ...] | None:
    """Which of the sketches of `read_sketches` each cache has; None where all have the same one, or some have none."""
    sums = [cache.manifest.scoring.sketch.sha256 for cache in caches if cache.manifest.scoring.sketch is not None]
    different = list(dict.fromkeys(sums))
    return tuple(map(different.index, sums)) if len(sums) == len(caches) and len(different) > 1 else None


def read_sketches(caches: Sequence[Cache]) -> Sketch | Sketches:
    """The sketch that all caches have, or the different ones in the order of the caches."""
    from stages.sketch import Sketches
    from stages.sketch_calibration import from_file

    numbers = sketch_numbers(caches)
    if numbers is None:
        return from_file(caches[0].sketch())
    first = [numbers.index(number) for number in range(max(numbers) + 1)]
    return Sketches(tuple(from_file(caches[place].sketch()) for place in first))


def passed_over(caches: Sequence[Cache], taken: str) -> str | None:
    """Why several caches are read as less than each of them holds."""
    scorings = [cache.manifest.scoring for cache in caches]
    if taken in ("sketch", "sampled"):
        return None
    if all(scoring.sketch for scoring in scorings) and not common_sketch(caches):
        why = "the sketches of these caches differ in rank or in how many residual samples they have"
    elif len({scoring.tail_samples for scoring in scorings} - {0}) > 1:
        counts = ", ".join(str(scoring.tail_samples) for scoring in scorings)
        why = f"these caches hold different numbers of tail samples ({counts}), and one run reads one"
    else:
        return None
    return f"--tail auto takes {taken}: {why}"


def measured_columns(caches: Sequence[Cache]) -> list[str]:
    """What the held-out KL takes to be unbiased, or as near as can be, where all caches hold it alike."""
    scorings = [cache.manifest.scoring for cache in caches]
    sketch = common_sketch(caches)
    if sketch is not None and (sketch.residual_samples or not all(s.tail_samples for s in scorings)):
        return sketch_columns(caches[0])
    alike = len({scoring.tail_samples for scoring in scorings}) == 1
    return ["tail_samples", "entropy"] if alike and all(s.tail_samples and s.entropy for s in scorings) else []


def make_tail(objective: Objective, caches: Sequence[Cache]) -> Tail:
    """The objective's tail mode with what the caches hold for it. Raises CacheError where one holds nothing."""
    import torch

    from stages.tail import Tail, log_prior

    assert objective.tail != "auto", "Objective.for_cache decides it"
    if objective.tail == "sampled":
        counts = [cache.manifest.scoring.tail_samples for cache in caches]
        for cache, count in zip(caches, counts, strict=True):
            if not count:
                raise CacheError(
                    f"{cache.path}: --tail sampled needs tail samples; this cache was made without --tail-samples"
                )
            if count != counts[0]:
                raise CacheError(
                    f"{cache.path}: holds {count} tail samples per position, {caches[0].path} holds {counts[0]}; "
                    "--tail sampled needs the same number in all"
                )
    if objective.tail == "sketch":
        for cache in caches:
            if cache.manifest.scoring.sketch is None:
                raise CacheError(
                    f"{cache.path}: --tail sketch needs a sketch; this cache was made without --sketch-rank"
                )
        if common_sketch(caches) is None:
            raise CacheError(
                f"{caches[0].path} and the other caches have sketches of different rank or with different numbers of "
                "residual samples; --tail sketch needs both the same in all"
            )
        return objective.sketch_tail(read_sketches(caches))
    if objective.tail != "prior":
        return Tail(objective.tail)
    total, positions = np.zeros(caches[0].manifest.vocabulary_size), 0
    for cache in caches:
        weighed = cache.weighed_tail_prior()
        if weighed is None:
            raise CacheError(
                f"{cache.path}: --tail prior needs the mean tail distribution, which the engine "
                f"{cache.manifest.scoring.engine} did not give; choose --tail bucket"
            )
        prior, stored = weighed
        total, positions = total + stored * prior, positions + stored
    mean = (total / max(1, positions)).astype(np.float32)
    return Tail("prior", objective.tail_gamma, log_prior(torch.from_numpy(mean)))
