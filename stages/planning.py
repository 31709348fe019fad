"""What a cache will be and cost, before it is made: tokens, shards, bytes, time, and when it has paid for itself.

Without a probe no weight is read and bytes are an estimate, column by column, from what such columns took in caches
that were measured. With a probe the teacher scores a sample, which is written as a shard, and time and bytes follow
from that.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stages import cache_inputs, caching
from stages.cache_options import CacheOptions
from stages.caching import PreparedCache
from stages.corpus import CorpusReport
from stages.corpus import Sequence as TokenSequence
from stages.local_files import check_apart
from stages.sketch_calibration import from_file
from stages.summary import summarize
from storage import schema
from storage.cache import Cache
from storage.manifest import CorpusIdentity, PlannedShard, ScoringOptions, checked
from storage.plan import plan_shards

# Bytes of a receipt, and of a number in a summed tail or a tail prior, as they were measured.
_RECEIPT = 430
_TAIL_SUM = 7.5
_TAIL_PRIOR = 4
_OF_A_SKETCH = {schema.SKETCH_CODES.name, schema.RESIDUAL_SAMPLES.name, schema.RESIDUAL_MASS.name}
# Sequences that a probe scores before the clock starts.
_WARM_UP = 4


@dataclass(frozen=True)
class ColumnPlan:
    """One column: how many values, and the bytes that they are expected to take."""

    name: str
    values: int
    bytes: float


@dataclass(frozen=True)
class SketchProbe:
    """What a sketch does on the sample. bytes: of its file; explained: the share of the variance of the logits, on what
    it was calibrated on; mean_kl and equal_tail_samples: as in Summary.
    """

    bytes: int
    explained: float
    mean_kl: float | None
    equal_tail_samples: float | None


@dataclass(frozen=True)
class Probe:
    """What scoring and writing `sequences` sequences took. Seconds; bytes of the one shard they filled.

    load_seconds: of the teacher, and of calibrating a sketch. tail_sum_bytes: of the file beside a shard; 0 where the
    engine gives none. sketch: None without one.
    """

    engine: str
    sequences: int
    tokens: int
    load_seconds: float
    score_seconds: float
    write_seconds: float
    shard_bytes: int
    tail_sum_bytes: int
    sketch: SketchProbe | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of the teacher's pass alone."""
        return self.tokens / self.score_seconds

    @property
    def bytes_per_token(self) -> float:
        return self.shard_bytes / self.tokens


@dataclass(frozen=True)
class Plan:
    """tokens, sequences, shards of the whole corpus. columns: the estimate, also where a probe measured."""

    report: CorpusReport
    vocabulary_size: int
    top_n: int
    tail_samples: int
    max_length: int
    shards: int
    columns: tuple[ColumnPlan, ...]
    student_epochs: float
    probe: Probe | None
    sketch_rank: int = 0
    residual_samples: int = 0

    @property
    def tokens(self) -> int:
        return self.report.tokens

    @property
    def bytes_per_token(self) -> float:
        """Of the shards, as `pipeline inspect` says it: measured where there is a probe."""
        if self.probe is not None:
            return self.probe.bytes_per_token
        return sum(column.bytes for column in self.columns) / self.tokens

    @property
    def shard_bytes(self) -> float:
        return self.bytes_per_token * self.tokens

    @property
    def bytes_of_equal_noise(self) -> float | None:
        """Bytes per token, an estimate, of a cache without the sketch that has as many tail samples as leave the noise
        of its residual samples. None where no probe has measured that.
        """
        equal = None if self.probe is None or self.probe.sketch is None else self.probe.sketch.equal_tail_samples
        if equal is None:
            return None
        samples = equal * self.report.trained_positions
        samples *= stored_bytes(schema.TAIL_SAMPLES, self.vocabulary_size, self.top_n)
        rest = sum(column.bytes for column in self.columns if column.name not in _OF_A_SKETCH)
        return (rest + samples) / self.tokens

    @property
    def other_bytes(self) -> float:
        """Beside the shards: receipts, summed tails, tail prior, sketch. The tokenizer and the card are small."""
        size, probe = self.vocabulary_size, self.probe
        tail_sum = _TAIL_SUM * size if probe is None else probe.tail_sum_bytes
        beside = self.shards * (_RECEIPT + tail_sum) + (_TAIL_PRIOR * size if tail_sum else 0)
        if self.sketch_rank:
            # A basis of float16 and a bias; without a probe the teacher's hidden size is not known.
            measured = None if probe is None else probe.sketch
            beside += (2 * self.sketch_rank + 4) * size if measured is None else measured.bytes
        return beside

    @property
    def teacher_seconds(self) -> float | None:
        """One pass of the teacher over the corpus, which online distillation pays in every epoch of every run."""
        return None if self.probe is None else self.tokens / self.probe.tokens_per_second

    @property
    def caching_seconds(self) -> float | None:
        """Loading, the pass, and writing, which is done beside the pass but for the last shard's."""
        if self.probe is None or self.teacher_seconds is None:
            return None
        writing = self.probe.write_seconds / self.probe.tokens * self.tokens
        return self.probe.load_seconds + max(self.teacher_seconds, writing) + writing / self.shards

    @property
    def runs_to_pay(self) -> int | None:
        """Student runs after which caching once has cost no more than the teacher's passes of online distillation."""
        if self.caching_seconds is None or self.teacher_seconds is None:
            return None
        return math.ceil(self.caching_seconds / (self.student_epochs * self.teacher_seconds))


def stored_bytes(column: schema.Column, vocabulary_size: int, top_n: int) -> float:
    """Expected bytes of one value of a column in a shard; of a column that was not measured, its uncompressed width.

    `benchmarks/column_bytes.py` printed what these lines were fitted to; they are within 5 % of it, and so is the sum
    of caches of a trained teacher (docs/planning.md). Ids grow with the digits of the vocabulary; entries further down
    the top-N have less regular ids and log-probabilities that differ less.
    """
    digits, depth = math.log2(vocabulary_size), math.log2(max(1, top_n))
    measured = {
        schema.SEQUENCE_ID.name: 3.0,
        schema.INPUT_IDS.name: 0.24 + 0.09 * digits,
        schema.LOSS_MASK.name: 0.02,
        schema.GOLD_LOGPROB.name: 3.45,
        schema.TAIL_LOGMASS.name: 3.3,
        schema.ENTROPY.name: 1.55,
        schema.TOP_COUNT.name: 0.02,
        schema.TOP_IDS.name: 0.9 + 0.09 * depth,
        schema.TOP_LOGPROBS.name: 1.8 - 0.1 * depth,
        schema.TAIL_SAMPLES.name: 0.375 + 0.074 * digits,
        # These, and log-probabilities of 8 bits, from one cache (V=4,000, rank 32) of a teacher of random weights.
        schema.SKETCH_CODES.name: 1.07,
        schema.RESIDUAL_SAMPLES.name: 1.0 + 0.074 * digits,
        schema.RESIDUAL_MASS.name: 1.5,
    }
    if schema.column_temperature(column.name) is not None:
        return measured[schema.TAIL_LOGMASS.name]
    width = column.element.bit_width / 8
    if column.name == schema.TOP_LOGPROBS.name and width != 2:
        return measured[schema.GOLD_LOGPROB.name] if width > 2 else 0.85
    return measured.get(column.name, width)


def column_values(column: schema.Column, report: CorpusReport, scoring: ScoringOptions) -> int:
    """How many values a column holds in the whole cache; of adaptive N's entries, at most."""
    stored = report.trained_positions
    counts = {"row": report.sequences, "L": report.tokens, "L-1": report.scored_positions, "E": stored * scoring.top_n}
    return counts[column.per] if column.per in counts else stored * scoring.per_stored_position[column.name]


def plan(
    options: CacheOptions,
    *,
    probe: int | None = None,
    student_epochs: float = 1.0,
) -> Plan:
    """Plan what `cache-teacher` would do with `options`, of which `output` may be empty. Writes nothing that stays.

    probe: how many sequences to score; None for none, and then no weight is read. student_epochs: of one student run.
    Raises what `cache-teacher` would raise for these options, and RunError from the engine of a probe.
    """
    if options.output:
        Cache.check_target(options.output)
        check_apart(options.dataset, options.output)
    statistics = options.statistics()
    measured: Probe | None = None
    if probe is None:
        files = cache_inputs.read_teacher(options)
        corpus, vocabulary, max_length = (
            cache_inputs.read_corpus(options, files),
            files.vocabulary_size,
            files.max_length,
        )
        shards = plan_shards(corpus.lengths, options.shard_tokens)
        if files.sketch is not None:
            statistics = replace(options, sketch_rank=files.sketch.rank).statistics()
        scoring = checked(
            ScoringOptions,
            engine=options.engine.engine,
            dtype=options.dtype,
            top_n=statistics.top_n,
            logprob_bits=options.logprob_bits,
            temperatures=statistics.temperatures,
            tail_samples=statistics.tail_samples,
            entropy=options.engine.vllm_route != "prompt-logprobs",
            sketch=files.sketch,
            max_length=max_length,
            tail_epsilon=statistics.tail_epsilon,
            min_n=statistics.min_n,
        )
    else:
        with tempfile.TemporaryDirectory(prefix="teacher-logit-cache-") as folder:
            prepared = caching.prepare(replace(options, output=str(Path(folder) / "cache")))
            measured = _probe(prepared, probe)
        manifest = prepared.manifest
        corpus, vocabulary, max_length = prepared.corpus, manifest.vocabulary_size, manifest.scoring.max_length
        scoring, shards = manifest.scoring, manifest.shards
    report, top_n, samples, sketch = corpus.report, scoring.top_n, scoring.tail_samples, scoring.sketch
    sketched = (0, 0) if sketch is None else (sketch.rank, sketch.residual_samples)
    columns = tuple(
        ColumnPlan(
            column.name,
            values := column_values(column, report, scoring),
            values * stored_bytes(column, vocabulary, top_n),
        )
        for column in scoring.columns
    )
    return Plan(
        report, vocabulary, top_n, samples, max_length, len(shards), columns, student_epochs, measured, *sketched
    )


def _probe(prepared: PreparedCache, count: int) -> Probe:
    """Score a random sample of the corpus and write it as a shard."""
    corpus = prepared.corpus
    random = np.random.default_rng([prepared.options.seed, 0x940BE])
    drawn = np.sort(random.permutation(len(corpus))[:count])
    # A shard's sequences count from its first one.
    sequences = [
        TokenSequence(place, one.input_ids, one.loss_mask)
        for place, (one,) in enumerate(corpus.read(index, index + 1) for index in drawn.tolist())
    ]
    tokens = sum(len(sequence.input_ids) for sequence in sequences)
    started = time.monotonic()
    caching.start(prepared)
    caching.calibrate(prepared, lambda tokens: None)
    teacher = prepared.teacher
    assert teacher is not None
    try:
        manifest = prepared.manifest
        alone = manifest.model_copy(
            update={
                "corpus": CorpusIdentity(
                    fingerprint=manifest.corpus.fingerprint, sequences=len(sequences), tokens=tokens
                ),
                "shards": (PlannedShard(first=0, sequences=len(sequences), tokens=tokens),),
            }
        )
        cache = Cache.create_or_resume(prepared.options.output, alone)
        if prepared.sketch is not None:
            caching.keep_sketch(cache, prepared.sketch)
            teacher.use_sketch(from_file(cache.sketch()))
        load_seconds = time.monotonic() - started
        # The first batches also start what is started lazily.
        teacher.score(sequences[:_WARM_UP], lambda tokens: None)
        started = time.monotonic()
        scored = teacher.score(sequences, lambda tokens: None)
        score_seconds = time.monotonic() - started
    finally:
        teacher.close()
    started = time.monotonic()
    caching.write_scored(cache, 0, scored, score_seconds)
    write_seconds = time.monotonic() - started
    tail_sum = cache.tail_sum_path(0)
    return Probe(
        manifest.scoring.engine,
        len(sequences),
        tokens,
        load_seconds,
        max(score_seconds, 1e-9),
        write_seconds,
        cache.receipt(0).bytes,
        tail_sum.stat().st_size if tail_sum.exists() else 0,
        None if prepared.sketch is None else _probe_sketch(cache),
    )


def _probe_sketch(cache: Cache) -> SketchProbe:
    sketch, numbers = cache.sketch(), summarize(cache)
    size = cache.sketch_path.stat().st_size
    return SketchProbe(size, sketch.explained, numbers.mean_sketch_kl, numbers.equal_tail_samples)
