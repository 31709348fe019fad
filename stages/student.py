"""`pipeline train-student`: everything from options to a saved student and its `metrics.json`."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.cached_tail import (
    common_sketch,
    extra_columns,
    make_tail,
    measured_columns,
    passed_over,
    read_sketches,
)
from stages.objective import Objective
from stages.run_identity import METRICS, RUN, last_whole_checkpoint, previous_run, run_identity, sole_run
from stages.student_trainer import cache_names, make_trainer
from stages.trainer_arguments import training_arguments
from storage.cache import MADE_AGAIN, TAIL_PRIOR, Cache
from storage.errors import CacheError, RunError, UserError
from storage.files import remove_temporaries, write_json
from storage.json_text import without_nan
from storage.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from stages.batching import BatchPlan
    from stages.sketch import Sketch, Sketches
    from stages.tail import Tail
    from stages.training import DistillationTrainer

# Ids of a packed batch where neither the user nor the longest sequence asks for more.
PACKED_TOKENS = 4096


@dataclass(frozen=True)
class StudentOptions:
    """student: a directory or hub name; with `init_from_config`, only its configuration is used.

    shards: the cache, or several of one teacher. mix: their weights, by sequences drawn; by their sizes when empty.
    batching: `padded`, `length-grouped` or `packed`; batch_tokens: of a packed batch, at most. eval_share: share of
    each cache's sequences held out, 0..1. lora_rank: of LoRA adapters, which then are all that is trained; lora_alpha:
    their scale, twice the rank when None; lora_target: the modules that get one, by name, or `all-linear`. trainer:
    fields of `transformers.TrainingArguments`.
    """

    student: str
    shards: str | Sequence[str]
    output: str
    objective: Objective = field(default_factory=Objective)
    mix: tuple[float, ...] = ()
    batching: str = "padded"
    batch_tokens: int | None = None
    init_from_config: bool = False
    eval_share: float = 0.05
    seed: int = 42
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    checksums: str = "start"
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_target: tuple[str, ...] = ("all-linear",)
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A cache and its split. train_ids, eval_ids: int64, ascending."""

    cache: Cache
    train_ids: np.ndarray
    eval_ids: np.ndarray


@dataclass
class Prepared:
    """A run that is checked and ready: everything that can be refused has been.

    tail: the objective's. eval_sketch: what the held-out KL has for the tail, where it takes a sketch; the same as the
    tail's where that is one. lengths: int64, token ids of each training sequence, cache after cache, where the batches
    depend on them. tokenizer: the one that is saved with the student. notes: sentences for whoever starts the run.
    """

    options: StudentOptions
    parts: list[Part]
    arguments: Any  # transformers.TrainingArguments
    tail: Tail
    eval_sketch: Sketch | Sketches | None
    plan: BatchPlan
    lengths: np.ndarray | None
    checkpoint: str | None
    finished: dict[str, Any] | None
    tokenizer: PreTrainedTokenizerBase
    notes: list[str] = field(default_factory=list)

    @property
    def cache(self) -> Cache:
        """The first one, which stands for all in whatever they must have in common."""
        return self.parts[0].cache

    @property
    def train_tokens(self) -> int:
        """Tokens of one epoch, estimated from each cache's mean length and its share of the epoch."""
        from stages.mixing import shares

        drawn = shares([len(part.train_ids) for part in self.parts], self.options.mix or None)
        corpora = [part.cache.manifest.corpus for part in self.parts]
        return round(sum(n * c.tokens / c.sequences for n, c in zip(drawn.tolist(), corpora, strict=True)))

    @property
    def held_out(self) -> int:
        return sum(len(part.eval_ids) for part in self.parts)


def prepare(options: StudentOptions) -> Prepared:
    """Check options, cache and student against each other before any weight is read.

    Raises UserError or CacheError, with nothing written.
    """
    from stages.compatibility import check_head
    from stages.context import check_context
    from stages.held_out import split_held_out
    from stages.pretrained import load_config

    arguments = training_arguments(options)
    paths = [options.shards] if isinstance(options.shards, str) else options.shards
    if len(options.mix) not in (0, len(paths)) or any(weight <= 0 for weight in options.mix):
        raise UserError(f"--mix wants one weight above 0 for each of the {len(paths)} --shards, in their order")
    caches = open_caches(paths, options.checksums)
    source: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    for cache in caches:
        if not any(receipt.stored_positions for receipt in cache.receipts(partial=True)):
            raise UserError(f"{cache.path}: no position has a loss, so there is nothing to train on")
    config = load_config(options.student, **source)
    tokenizer, notes = _tokenizer(options, caches[0], source)
    check_head(caches[0], config.get_text_config().vocab_size, options.student)
    check_context(caches, config, options.student)
    if problem := options.objective.problem():
        raise UserError(problem)
    if options.lora_rank is not None and importlib.util.find_spec("peft") is None:
        raise UserError("--lora-rank needs peft: pip install 'teacher-logit-cache[lora]'")
    samples = {cache.manifest.scoring.tail_samples for cache in caches}
    sketch = common_sketch(caches)
    objective = options.objective.for_cache(
        has_samples=len(samples) == 1 and 0 not in samples,
        has_prior=all(cache.has_tail_prior for cache in caches),
        has_sketch=sketch is not None,
        has_residuals=sketch is not None and sketch.residual_samples > 0,
    )
    asked, options = options.objective.tail, replace(options, objective=objective)
    tail = make_tail(objective, caches)
    for cache in caches:
        extra_columns(objective, cache)
    parts = [Part(cache, *split_held_out(cache, options.eval_share)) for cache in caches]
    eval_sketch = None
    if any(len(part.eval_ids) for part in parts) and "sketch_codes" in measured_columns(caches):
        eval_sketch = tail.sketch or read_sketches(caches)
    checkpoint, finished = previous_run(options, caches, arguments.world_size)
    plan, lengths = _batch_plan(options, parts)
    if asked == "auto" and objective.name != "ce" and (note := passed_over(caches, objective.tail)):
        notes.append(note)
    notes += _wider(caches, config.get_text_config().vocab_size)
    return Prepared(options, parts, arguments, tail, eval_sketch, plan, lengths, checkpoint, finished, tokenizer, notes)


def _wider(caches: Sequence[Cache], vocabulary_size: int) -> list[str]:
    """A note where the teacher has more ids than the student."""
    beyond = max(cache.manifest.vocabulary_size for cache in caches) - vocabulary_size
    if beyond <= 0:
        return []
    ids = counted(beyond, "token id", ",")
    return [f"the teacher has {ids} more than the student; their mass is left out and the rest renormalised"]


def _tokenizer(
    options: StudentOptions, cache: Cache, source: dict[str, Any]
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer that is saved with the student, and notes on it: its own, or the cache's where it starts from a
    configuration. Raises CacheError where the student's is not that of the shards.
    """
    from stages.compatibility import cache_tokenizer, check_tokenizer
    from stages.pretrained import load_tokenizer

    if options.init_from_config:
        return cache_tokenizer(cache), []
    own = load_tokenizer(options.student, **source)
    check_tokenizer(cache, own, options.student)
    if own.chat_template is not None or cache.manifest.tokenizer.chat_template_sha256 is None:
        return own, []
    own.chat_template = cache_tokenizer(cache).chat_template
    return own, ["the student's tokenizer has no chat template; that of the shards is saved with it"]


def open_caches(paths: Sequence[str], checksums: str = "start") -> list[Cache]:
    """The caches of a run, finished or a part of a finished one, sound and of one teacher. Raises CacheError.

    checksums: `start` compares the bytes of every local file with its receipt here.
    """
    from stages.together import check_together

    caches = [Cache.open(path) for path in paths]
    check_together(caches)
    for cache in caches:
        receipts = cache.receipts(partial=True)
        if not cache.is_sealed:
            raise CacheError(
                f"{cache.path}: not sealed; repeat the `pipeline cache-teacher`, push or pull that began it"
            )
        if cache.prior_receipt() is None and all(receipt.tail_prior_sha256 for receipt in receipts):
            raise CacheError(f"{cache.path / TAIL_PRIOR}: missing; {MADE_AGAIN}")
        with ThreadPoolExecutor() as readers:
            check = cache.check_file if checksums == "start" else cache.check_length
            for _ in readers.map(check, cache.shards_here):
                pass
    return caches


def _batch_plan(options: StudentOptions, parts: Sequence[Part]) -> tuple[BatchPlan, np.ndarray | None]:
    """How batches are made, and the lengths that takes."""
    from stages.batching import BatchPlan
    from stages.shard_dataset import sequence_lengths

    packed = options.batching == "packed"
    if options.batch_tokens is not None and not packed:
        raise UserError("--batch-tokens is the size of packed batches; add --batching packed or give --batch-size")
    if packed and "per_device_train_batch_size" in options.trainer:
        raise UserError("--batch-size counts the sequences of padded batches; for packed ones give --batch-tokens")
    if options.batching == "padded":
        return BatchPlan(), None
    lengths = np.concatenate([sequence_lengths(part.cache)[part.train_ids] for part in parts])
    longest = int(lengths.max())
    if options.batch_tokens is not None and options.batch_tokens < longest:
        raise UserError(
            f"--batch-tokens {options.batch_tokens}: the longest sequence has {longest} tokens; give at least as many"
        )
    tokens = options.batch_tokens or max(PACKED_TOKENS, longest)
    return BatchPlan(options.batching, tokens=tokens), lengths  # type: ignore[arg-type]


def train(
    prepared: Prepared, callbacks: Sequence[TrainerCallback] = (), say: Callable[[str], None] = lambda note: None
) -> dict[str, Any]:
    """Train, evaluate and save; returns what `metrics.json` holds.

    say: gets sentences on the loaded student, from the first of several processes. Raises RunError for a run that
    breaks off, UserError where another command trains into the same output.
    """
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    trainer = make_trainer(prepared, callbacks)
    if not trainer.is_world_process_zero():
        return _train(prepared, trainer)
    for note in trainer.notes:
        say(note)
    output, devices = Path(prepared.options.output), prepared.arguments.world_size
    output.mkdir(parents=True, exist_ok=True)
    with sole_run(output):
        caches = [part.cache for part in prepared.parts]
        if previous_run(prepared.options, caches, devices) != (prepared.checkpoint, prepared.finished):
            raise UserError(f"{output}: another command trained into it meanwhile; start the same command again")
        remove_temporaries(output)
        write_json(output / RUN, run_identity(prepared.options, caches, devices))
        return _train(prepared, trainer)


def _train(prepared: Prepared, trainer: DistillationTrainer) -> dict[str, Any]:
    import torch

    from stages.finite_steps import DivergedError

    options, caches = prepared.options, [part.cache for part in prepared.parts]
    output = Path(options.output)
    try:
        result = trainer.train(resume_from_checkpoint=prepared.checkpoint)
        metrics = _last_measures(trainer) if prepared.held_out else {}
        trained = trainer.all_trained_positions()
        trainer.save_model()
    except DivergedError as error:
        checkpoint = last_whole_checkpoint(output)
        kept = f"{Path(checkpoint).name}, from before it, is kept" if checkpoint else "no checkpoint was written"
        raise DivergedError(
            f"{error}: the run has diverged, and no student was saved; {kept}; lower the learning rate, or warm up "
            "longer, with a new output directory"
        ) from None
    except torch.OutOfMemoryError:
        raise RunError(f"out of memory; {_smaller(prepared)}") from None
    seconds = max(result.metrics["train_runtime"] - trainer.evaluation_seconds, 1e-9)
    report = without_nan(
        {
            "objective": asdict(options.objective),
            "caches": dict(zip(cache_names(caches), [cache.manifest.cache_id for cache in caches], strict=True)),
            "shards": {
                name: [len(cache.shards_here), len(cache.manifest.shards)]
                for name, cache in zip(cache_names(caches), caches, strict=True)
            },
            "teacher": caches[0].manifest.teacher.name,
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            # Trainer's mean starts anew when a run is resumed.
            "train_loss": result.training_loss if prepared.checkpoint is None else None,
            "train_seconds": seconds,
            "train_tokens_per_second": trained / seconds,
            "held_out_sequences": prepared.held_out,
            **{name: value for name, value in metrics.items() if _is_measure(name)},
            "log": trainer.state.log_history,
        }
    )
    if trainer.is_world_process_zero():
        prepared.tokenizer.save_pretrained(output)
        write_json(output / METRICS, report)
    return report


def _smaller(prepared: Prepared) -> str:
    """Advice on a run that wants less memory, which the same output takes where it says so."""
    if prepared.plan.batching == "packed":
        smaller = "a lower --batch-tokens, raise --accumulate to match"
    else:
        smaller = "a lower --batch-size, raise --accumulate to match"
    anew = f"with {smaller}, and name a new --output"
    if prepared.options.trainer.get("gradient_checkpointing"):
        return f"start again {anew}"
    return f"start the same command again with --trainer gradient_checkpointing=true to resume, or {anew}"


def _last_measures(trainer: DistillationTrainer) -> dict[str, float]:
    """Measures of the weights that are saved: those of the last step's evaluation, where there was one of these."""
    state, last = trainer.state, trainer.last_evaluation
    is_of_last_step = last is not None and last[0] == state.global_step
    other_weights = trainer.args.load_best_model_at_end and state.best_global_step != state.global_step
    return last[1] if last is not None and is_of_last_step and not other_weights else trainer.evaluate()


def _is_measure(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_loss"))
