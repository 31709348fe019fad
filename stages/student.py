"""`pipeline train-student`: everything from options to a saved student and its `metrics.json`."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
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
    sketch_numbers,
)
from stages.objective import Objective
from stages.run_identity import METRICS, RUN, previous_run, run_identity
from stages.trainer_arguments import COMPILE, training_arguments
from storage.cache import MADE_AGAIN, TAIL_PRIOR, Cache
from storage.errors import CacheError, RunError, UserError
from storage.files import remove_temporaries, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

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
    depend on them. passed_over: a sentence on what all caches hold and `--tail auto` could not use.
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
    passed_over: str | None = None

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
    from stages.compatibility import cache_tokenizer, check_head, check_tokenizer
    from stages.pretrained import load_config, load_tokenizer
    from stages.shard_dataset import split_held_out

    arguments = training_arguments(options)
    paths = [options.shards] if isinstance(options.shards, str) else options.shards
    if len(options.mix) not in (0, len(paths)) or any(weight <= 0 for weight in options.mix):
        raise UserError(f"--mix wants one weight above 0 for each of the {len(paths)} --shards, in their order")
    caches = open_caches(paths, options.checksums)
    source: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    config = load_config(options.student, **source)
    if options.init_from_config:
        cache_tokenizer(caches[0])
    else:
        check_tokenizer(caches[0], load_tokenizer(options.student, **source), options.student)
    check_head(caches[0], config.get_text_config().vocab_size, options.student)
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
    checkpoint, finished = previous_run(options, caches)
    plan, lengths = _batch_plan(options, parts)
    note = passed_over(caches, objective.tail) if asked == "auto" and objective.name != "ce" else None
    return Prepared(options, parts, arguments, tail, eval_sketch, plan, lengths, checkpoint, finished, note)


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


def load_student(prepared: Prepared) -> PreTrainedModel:
    """The student, with weights read or drawn from the seed, and its adapters where it has some."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    from stages.pretrained import load_causal_lm, load_config

    options = prepared.options
    dtype = getattr(torch, options.dtype)
    source: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    set_seed(options.seed)
    if options.init_from_config:
        config = load_config(options.student, **source)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=options.trust_remote_code)
    else:
        model = load_causal_lm(options.student, dtype=dtype, **source)
    return model if options.lora_rank is None else _with_lora(model, options, options.lora_rank)


def _with_lora(model: PreTrainedModel, options: StudentOptions, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    # peft says int and takes any number: adapters are scaled by alpha / rank.
    alpha: Any = 2 * rank if options.lora_alpha is None else options.lora_alpha
    target: Any = "all-linear" if options.lora_target == ("all-linear",) else list(options.lora_target)
    try:
        return get_peft_model(
            model,
            LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=target),
        )
    except ValueError as error:
        raise UserError(f"--lora-target: {' '.join(str(error).split())[:300]}") from None


def make_trainer(prepared: Prepared, callbacks: Sequence[TrainerCallback] = ()) -> DistillationTrainer:
    """The trainer of a prepared run, its student loaded and its datasets open."""
    from transformers import PrinterCallback

    from stages.distillation_forward import compile_body
    from stages.mixing import Mixture
    from stages.shard_dataset import Collator, ShardDataset, corpus_threshold
    from stages.training import DistillationTrainer

    options, parts = prepared.options, prepared.parts

    def opened(cache: Cache, ids: np.ndarray, extra: Sequence[str], source: int) -> ShardDataset:
        return ShardDataset(cache, ids, extra=extra, source=source, checksums=options.checksums)

    model = load_student(prepared)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    objective = options.objective
    threshold = None
    if objective.rank_scope == "corpus":
        threshold = corpus_threshold([(part.cache, part.train_ids) for part in parts], objective.hard_ratio)
    sketches = sketch_numbers([part.cache for part in parts])
    packed = prepared.plan.batching == "packed"
    eval_dataset: Mixture | None = None
    eval_collator = None
    if prepared.held_out:
        extra = measured_columns([part.cache for part in parts])
        eval_dataset = Mixture([opened(part.cache, part.eval_ids, extra, i) for i, part in enumerate(parts)])
        # Easy and hard are split over the whole held-out share, so that no batch size changes a metric.
        eval_collator = Collator(
            replace(objective, rank_scope="corpus"),
            vocabulary,
            corpus_threshold([(part.cache, part.eval_ids) for part in parts], objective.hard_ratio),
            sketches=sketches,
        )
    trained = [
        opened(part.cache, part.train_ids, extra_columns(objective, part.cache), i) for i, part in enumerate(parts)
    ]
    trainer = DistillationTrainer(
        model=model,
        args=prepared.arguments,
        train_dataset=Mixture(trained, options.mix or None),
        eval_dataset=eval_dataset,
        data_collator=Collator(objective, vocabulary, threshold, packed, sketches),
        eval_collator=eval_collator,
        eval_sketch=prepared.eval_sketch,
        objective=objective,
        tail=prepared.tail,
        plan=prepared.plan,
        lengths=prepared.lengths,
        cache_names=cache_names([part.cache for part in parts]),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    if any(options.trainer.get(name) for name in COMPILE):
        backend, mode = options.trainer.get("torch_compile_backend"), options.trainer.get("torch_compile_mode")
        compile_body(trainer.model, backend or "inductor", mode)
    return trainer


def cache_names(caches: Sequence[Cache]) -> list[str]:
    """The caches' directories by their last names, numbered where two have the same."""
    names = [cache.path.resolve().name for cache in caches]
    return [name if names.count(name) == 1 else f"{name}-{place + 1}" for place, name in enumerate(names)]


def train(prepared: Prepared, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train, evaluate and save; returns what `metrics.json` holds. Raises RunError for a run that breaks off."""
    import torch

    from stages.compatibility import cache_tokenizer

    options, caches = prepared.options, [part.cache for part in prepared.parts]
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    trainer = make_trainer(prepared, callbacks)
    output = Path(options.output)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        remove_temporaries(output)
        write_json(output / RUN, run_identity(options, caches))
    try:
        result = trainer.train(resume_from_checkpoint=prepared.checkpoint)
    except torch.OutOfMemoryError:
        smaller = "--batch-tokens" if prepared.plan.batching == "packed" else "--batch-size"
        raise RunError(
            f"out of memory; lower {smaller} and raise --accumulate to match, then start the same command again "
            "with a new --output"
        ) from None
    seconds = max(result.metrics["train_runtime"] - trainer.evaluation_seconds, 1e-9)
    metrics = trainer.evaluate() if prepared.held_out else {}
    trainer.save_model()
    report = {
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
        "train_tokens_per_second": trainer.trained_positions / seconds,
        "held_out_sequences": prepared.held_out,
        **{name: value for name, value in metrics.items() if _is_measure(name)},
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        cache_tokenizer(caches[0]).save_pretrained(output)
        write_json(output / METRICS, report)
    return report


def _is_measure(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_loss"))
