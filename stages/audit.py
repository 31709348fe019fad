"""Whether a cache says what a teacher says: a random sample of its sequences, scored again by the live teacher.

Live numbers go through the same rounding and columns as a cache's (`rows_from_scored`) and are compared with what is
stored. Beside them stands a control: the same teacher's numbers for the same sequences in other batches. What differs
there is numerical noise, and a cache is judged by how far it is from its teacher beyond that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stages.cache_inputs import resolve_dtype
from stages.corpus import Sequence
from stages.differences import MEASURES, Comparison, Differences, apart
from stages.engine_guard import EngineNotUsable
from stages.engines import Choice, EngineOptions, choose, load
from stages.identity import teacher_identity, tokenizer_identity
from stages.pretrained import load_config, load_tokenizer
from stages.scored_rows import rows_from_scored
from stages.sketch_calibration import from_file
from stages.statistics import StatisticsOptions
from stages.teacher import Teacher
from storage.cache import Cache
from storage.errors import UserError
from storage.manifest import Manifest, ScoringOptions
from storage.plan import LARGEST_SHARD, locate
from storage.rows import Rows

DEFAULT_SEQUENCES = 64
# Nats that pass at any position where nobody names a threshold, however quiet the control is. Other hardware or another
# engine rounds otherwise than the control's batches do.
FLOORS = {"float32": 1e-3}
FLOOR = 0.1
# How much more than the control's largest and mean difference passes.
MAX_FACTOR = 8.0
MEAN_FACTOR = 4.0
# A mean may be this part of what a single position may be.
MEAN_SHARE = 0.1
# Sequences of one batch of the control: few, and not a divisor of what engines like to take.
_CONTROL_SEQUENCES = 3


@dataclass(frozen=True)
class AuditOptions:
    """cache: directory or URL. sequences: how many are scored again, else DEFAULT_SEQUENCES; or share: of all, 0..1.

    dtype: of the teacher; None for the one in the manifest. threshold: nats, the largest difference that passes; None
    for MAX_FACTOR times the control's, and at least the floor of the dtype.
    """

    cache: str
    engine: EngineOptions
    sequences: int | None = None
    share: float | None = None
    seed: int = 0
    dtype: str | None = None
    threshold: float | None = None


@dataclass
class PreparedAudit:
    """Everything that can be refused has been; no weight is read. sample: int64, ascending sequence ids.

    teacher: between `start` and `run`.
    """

    options: AuditOptions
    cache: Cache
    sample: np.ndarray
    statistics: StatisticsOptions
    dtype: str
    choice: Choice
    identity_differences: tuple[str, ...]
    teacher: Teacher | None = None

    @property
    def tokens(self) -> int:
        """What is scored, estimated from the mean length; once for the audit and once for the control."""
        corpus = self.cache.manifest.corpus
        return round(2 * len(self.sample) * corpus.tokens / corpus.sequences)


@dataclass(frozen=True)
class Worst:
    """Where the stored log p(gold) is furthest from the live one."""

    sequence: int
    position: int
    shard: int
    stored: float
    live: float


@dataclass(frozen=True)
class Audit:
    """What an audit found. beyond: the measures that are beyond their tolerance; empty where the cache passes.

    tolerances: of each measure that is judged, the mean and the largest difference that pass. reasons: what is likely
    behind a difference.
    """

    sequences: int
    positions: int
    shards: int
    cache: Comparison
    control: Comparison
    tolerances: dict[str, tuple[float, float]]
    beyond: tuple[str, ...]
    reasons: tuple[str, ...]
    worst: Worst
    identity_differences: tuple[str, ...]

    @property
    def passes(self) -> bool:
        return not self.beyond

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.beyond:
            doubt = f", though its manifest describes another one ({', '.join(self.identity_differences)})"
            return f"the cache is what this teacher says{doubt if self.identity_differences else ''}"
        first, *others = self.beyond
        ours, noise = self.cache.spreads[first], self.control.spreads[first]
        parts = [
            f"differs: {MEASURES[first]} by up to {ours.max:.3g} nats, {ours.mean:.3g} in the mean (two runs of the "
            f"teacher by up to {noise.max:.3g}, {noise.mean:.3g})",
            *([f"so do {', '.join(MEASURES[name] for name in others)}"] if others else []),
            *self.reasons,
        ]
        return "; ".join(parts)


def prepare(options: AuditOptions) -> PreparedAudit:
    """Draw the sample and choose the engine. Raises UserError or CacheError; reads no shard."""
    if options.sequences is not None and options.share is not None:
        raise UserError("--sequences and --share say the same thing in two ways; give one of them")
    cache = Cache.open(options.cache)
    # Before a teacher is loaded: where some are missing, the cache is unfinished.
    cache.receipts(partial=True)
    manifest, engine = cache.manifest, options.engine
    source: dict[str, Any] = {"revision": engine.revision, "trust_remote_code": engine.trust_remote_code}
    config = load_config(engine.teacher, **source)
    vocabulary = int(config.get_text_config().vocab_size)
    if vocabulary != manifest.vocabulary_size:
        raise UserError(
            f"{engine.teacher}: its vocabulary has {vocabulary} tokens, the one of {cache.path} has "
            f"{manifest.vocabulary_size}; this is not the teacher of this cache"
        )
    different = _identity_differences(manifest, engine.teacher, config, load_tokenizer(engine.teacher, **source))
    scoring = manifest.scoring
    # vLLM's stock API gives the top-N and no more, and only engines that run here show hidden states.
    stock = engine.vllm_route == "prompt-logprobs"
    elsewhere = stock or engine.on_server
    sketch = None if elsewhere else scoring.sketch
    least = StatisticsOptions(scoring.top_n, seed=scoring.seed, tail_epsilon=scoring.tail_epsilon, min_n=scoring.min_n)
    statistics = replace(
        least,
        temperatures=scoring.temperatures,
        tail_samples=scoring.tail_samples,
        sketch_rank=sketch.rank if sketch else 0,
        residual_samples=sketch.residual_samples if sketch else 0,
    )
    if stock:
        statistics = least
    sample = draw(cache, options.sequences, options.share, options.seed)
    choice = choose(
        engine,
        statistics,
        max_length=scoring.max_length,
        vocabulary_size=vocabulary,
        there=scoring.engine,
        without_pooler=least,
    )
    if not choice.gives_entropy:  # by vLLM's stock API, of a server too
        statistics = least
    if options.dtype is not None:
        dtype = options.dtype
    else:
        known = scoring.dtype in ("float32", "bfloat16", "float16")
        dtype = scoring.dtype if known else resolve_dtype("auto", config)
    return PreparedAudit(options, cache, sample, statistics, dtype, choice, different)


def draw(cache: Cache, sequences: int | None, share: float | None, seed: int) -> np.ndarray:
    """int64, ascending: ids of the sequences to score again, each as likely as any other of those that are here."""
    ranges = [cache.manifest.shards[index] for index in cache.shards_here]
    here = np.concatenate([np.arange(shard.first, shard.first + shard.sequences) for shard in ranges])
    count = (sequences or DEFAULT_SEQUENCES) if share is None else max(1, round(share * len(here)))
    order = np.random.default_rng([seed, 0xA0D17]).permutation(len(here))
    return np.sort(here[order[:count]])


def start(prepared: PreparedAudit) -> None:
    """Load the teacher. Raises UserError where it cannot be loaded, RunError where its engine does not start."""
    if prepared.teacher is not None:
        return
    try:
        prepared.teacher = load(
            prepared.choice,
            prepared.options.engine,
            prepared.statistics,
            dtype=prepared.dtype,
            max_length=prepared.cache.manifest.scoring.max_length,
        )
    except EngineNotUsable as error:
        raise type(error)(f"{error}; or choose --engine transformers", error.cause) from error


def run(prepared: PreparedAudit, progress: Callable[[int], None]) -> Audit:
    """Score and compare. Raises CacheError for a shard that cannot be read, RunError from the engine.

    progress: gets 0 once the teacher is loaded, then tokens as they are scored.
    """
    manifest = prepared.cache.manifest
    start(prepared)
    teacher, prepared.teacher = prepared.teacher, None
    assert teacher is not None
    try:
        if teacher.vocabulary_size != manifest.vocabulary_size:
            raise UserError(
                f"{prepared.options.engine.teacher}: its head gives {teacher.vocabulary_size} logits, the cache has a "
                f"vocabulary of {manifest.vocabulary_size}; this is not the teacher of this cache"
            )
        scoring = _as_scored(manifest.scoring, prepared.statistics)
        if scoring.sketch is not None:
            teacher.use_sketch(from_file(prepared.cache.sketch()))
        cache, control = Differences(manifest), Differences(manifest)
        progress(0)  # The loading is over.
        shards: set[int] = set()
        for number, stored in enumerate(_stored(prepared.cache, prepared.sample, shards)):
            sequences = [
                Sequence(int(id), ids, mask)
                for id, ids, mask in zip(
                    stored.sequence_id, _lists(stored, "input_ids"), _lists(stored, "loss_mask"), strict=True
                )
            ]
            live = rows_from_scored(teacher.score(sequences, progress).sequences, scoring)
            again = _in_other_batches(teacher, sequences, [prepared.options.seed, number], scoring, progress)
            cache.add(stored, live)
            control.add(again, live)
    finally:
        teacher.close()
    return _audit(prepared, scoring, cache, control, len(shards))


# ---- the two sides ------------------------------------------------------------------------------------------


def _stored(cache: Cache, sample: np.ndarray, shards: set[int]) -> Iterator[Rows]:
    """The sample's rows as they are stored, a few shards' worth at a time; `shards` learns which ones were read."""
    shard_of, row_of = locate(cache.manifest.shards, sample)
    parts: list[Rows] = []
    tokens = 0
    for shard in np.unique(shard_of).tolist():
        parts.append(cache.read_shard(shard).take(row_of[shard_of == shard]))
        shards.add(shard)
        tokens += parts[-1].tokens
        if tokens >= LARGEST_SHARD:
            yield Rows.concatenated(parts)
            parts, tokens = [], 0
    if parts:
        yield Rows.concatenated(parts)


def _in_other_batches(
    teacher: Teacher,
    sequences: list[Sequence],
    seed: list[int],
    scoring: ScoringOptions,
    progress: Callable[[int], None],
) -> Rows:
    """The same sequences scored again, a few at a time and in another order, so that every batch is another one."""
    order = np.random.default_rng(seed).permutation(len(sequences))
    size = _CONTROL_SEQUENCES if len(sequences) > _CONTROL_SEQUENCES else 1
    scored: list[Any] = [None] * len(sequences)
    for start in range(0, len(order), size):
        places = order[start : start + size]
        for at, one in zip(places, teacher.score([sequences[i] for i in places], progress).sequences, strict=True):
            scored[at] = one
    return rows_from_scored(scored, scoring)


def _as_scored(scoring: ScoringOptions, statistics: StatisticsOptions) -> ScoringOptions:
    """The cache's columns as far as the live teacher gives them."""
    given: dict[str, Any] = {"temperatures": statistics.temperatures, "tail_samples": statistics.tail_samples}
    if not statistics.sketch_rank:
        given["sketch"] = None
    return scoring.model_copy(update=given)


def _lists(rows: Rows, name: str) -> list[np.ndarray]:
    return [rows[name][row] for row in range(len(rows))]


# ---- the verdict --------------------------------------------------------------------------------------------


def _audit(
    prepared: PreparedAudit, scoring: ScoringOptions, cache: Differences, control: Differences, shards: int
) -> Audit:
    ours, noise = cache.comparison(), control.comparison()
    given = prepared.options.threshold
    # The tail of vLLM's stock API is what its entries leave of 1, so it is shown and not judged.
    stock = any(engine.endswith("prompt-logprobs") for engine in (prepared.choice.engine, scoring.engine))
    tolerances: dict[str, tuple[float, float]] = {}
    for name in ours.spreads:
        if name == "tail" and stock:
            continue
        base, live = FLOORS.get(prepared.dtype, FLOOR), noise.spreads[name]
        mean, most = max(MEAN_SHARE * base, MEAN_FACTOR * live.mean), max(base, MAX_FACTOR * live.max)
        tolerances[name] = (mean, most) if given is None else (MEAN_SHARE * given, given)
    beyond = tuple(
        name
        for name, (mean, most) in tolerances.items()
        if ours.spreads[name].mean > mean or ours.spreads[name].max > most
    )
    worst = _worst(cache, prepared.cache.manifest)
    return Audit(
        len(prepared.sample),
        cache.positions,
        shards,
        ours,
        noise,
        tolerances,
        beyond,
        _reasons(cache, ours, prepared, tolerances["gold"][1], worst) if beyond else (),
        worst,
        prepared.identity_differences,
    )


def _worst(differences: Differences, manifest: Manifest) -> Worst:
    at = int(np.argmax(differences.by_position("gold")))
    values = (differences.sequence_of, differences.position, differences.stored_gold, differences.live_gold)
    sequence, position, stored, live = (np.concatenate(value)[at] for value in values)
    (shard,), _ = locate(manifest.shards, np.array([sequence]))
    return Worst(int(sequence), int(position), int(shard), float(stored), float(live))


def _reasons(
    cache: Differences, ours: Comparison, prepared: PreparedAudit, tolerance: float, worst: Worst
) -> tuple[str, ...]:
    """What is likely behind a difference, as far as the numbers or the manifest tell."""
    if prepared.identity_differences:
        return (f"the manifest describes another teacher ({', '.join(prepared.identity_differences)})",)
    sequence = np.concatenate(cache.sequence_of)
    stored, live = np.concatenate(cache.stored_gold), np.concatenate(cache.live_gold)
    for step, where in ((1, "after"), (-1, "before")):
        one, other = (stored[:-1], live[1:]) if step > 0 else (stored[1:], live[:-1])
        same = sequence[:-1] == sequence[1:]
        if same.any() and np.median(apart(one[same], other[same])) <= tolerance < np.median(apart(stored, live)):
            return (f"its numbers are those of the position {where}, so it is shifted by one",)
    wrong = cache.by_position("gold") > tolerance
    if 0 < wrong.mean() < 0.1:
        return (
            f"log p(gold) is wrong at {wrong.sum()} of {len(wrong)} positions, most of all at position "
            f"{worst.position} of sequence {worst.sequence} ({prepared.cache.shard_path(worst.shard).name}: "
            f"{worst.stored:.4g}, the teacher says {worst.live:.4g})",
        )
    if wrong.any() and ours.top1_agreement > 0.95:
        return ("small and everywhere, as another precision or engine makes it",)
    return ()


def _identity_differences(manifest: Manifest, teacher: str, config: Any, tokenizer: Any) -> tuple[str, ...]:
    """In which parts this teacher is not the one that the manifest describes; names of directories may change."""
    there, here = manifest.teacher, teacher_identity(teacher, config)
    found = []
    if there.architecture != here.architecture:
        found.append(f"architecture {there.architecture}, not {here.architecture}")
    if there.revision and here.revision and there.revision != here.revision:
        found.append(f"revision {there.revision[:12]}, not {here.revision[:12]}")
    if there.weights and here.weights and there.weights != here.weights:
        found.append("other weights")
    if there.config_sha256 != here.config_sha256:
        found.append("another config.json")
    ours, theirs = manifest.tokenizer, tokenizer_identity(tokenizer)
    if (ours.vocabulary_sha256, ours.behaviour_sha256) != (theirs.vocabulary_sha256, theirs.behaviour_sha256):
        found.append("another tokenizer")
    return tuple(found)
