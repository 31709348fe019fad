"""`pipeline train-student`: everything from options to a saved student and its `metrics.json`.

The output directory has an identity of its own, `run.json`. The same command again goes on from the last checkpoint,
or says that all is done; another command is refused.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.objective import Objective
from storage.cache import Cache
from storage.errors import CacheError, RunError, UserError
from storage.files import remove_temporaries, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

    from stages.shard_dataset import ShardDataset
    from stages.tail import Tail
    from stages.training import DistillationTrainer

RUN = "run.json"
METRICS = "metrics.json"

# What is ours to set, or would undo what the objective relies on.
_RESERVED = ("output_dir", "remove_unused_columns", "label_names", "label_smoothing_factor", "use_liger_kernel")


@dataclass(frozen=True)
class StudentOptions:
    """student: a directory or hub name; with `init_from_config`, only its configuration is used.

    eval_share: share of the sequences held out, 0..1. trainer: fields of `transformers.TrainingArguments`.
    """

    student: str
    shards: str
    output: str
    objective: Objective = field(default_factory=Objective)
    init_from_config: bool = False
    eval_share: float = 0.05
    seed: int = 42
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass
class Prepared:
    """A run that is checked and ready: everything that can be refused has been."""

    options: StudentOptions
    cache: Cache
    arguments: Any  # transformers.TrainingArguments
    train_ids: np.ndarray
    eval_ids: np.ndarray
    checkpoint: str | None
    finished: dict[str, Any] | None

    @property
    def train_tokens(self) -> int:
        """Tokens of one epoch, estimated from the share that is trained on."""
        total = self.cache.manifest.corpus
        return round(total.tokens * len(self.train_ids) / total.sequences)


def prepare(options: StudentOptions) -> Prepared:
    """Check options, cache and student against each other before any weight is read.

    Raises UserError or CacheError, with nothing written.
    """
    from stages.compatibility import cache_tokenizer, check_head, check_tokenizer
    from stages.pretrained import load_config, load_tokenizer
    from stages.shard_dataset import split_held_out

    arguments = training_arguments(options)
    cache = Cache.open(options.shards)
    for index in range(len(cache.receipts())):
        cache.check_file(index)
    source: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    config = load_config(options.student, **source)
    if options.init_from_config:
        cache_tokenizer(cache)
    else:
        check_tokenizer(cache, load_tokenizer(options.student, **source), options.student)
    check_head(cache, config.get_text_config().vocab_size, options.student)
    if problem := options.objective.problem():
        raise UserError(problem)
    has_samples, has_prior = cache.manifest.scoring.tail_samples > 0, cache.tail_prior() is not None
    objective = options.objective.for_cache(has_samples=has_samples, has_prior=has_prior)
    options = replace(options, objective=objective)
    make_tail(objective, cache)
    extra_columns(objective, cache)
    train_ids, eval_ids = split_held_out(cache, options.eval_share)
    checkpoint, finished = _previous_run(options, cache)
    return Prepared(options, cache, arguments, train_ids, eval_ids, checkpoint, finished)


def extra_columns(objective: Objective, cache: Cache) -> list[str]:
    """Optional columns that the objective reads. Raises CacheError for a temperature the cache does not hold."""
    from storage.schema import temperature_column

    columns = ["tail_samples"] if objective.tail == "sampled" else []
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


def make_tail(objective: Objective, cache: Cache) -> Tail:
    """The objective's tail mode with what the cache holds for it. Raises CacheError where it holds nothing."""
    import torch

    from stages.tail import Tail, log_prior

    assert objective.tail != "auto", "Objective.for_cache decides it"
    if objective.tail == "sampled" and not cache.manifest.scoring.tail_samples:
        raise CacheError(f"{cache.path}: --tail sampled needs tail samples; this cache was made without --tail-samples")
    if objective.tail != "prior":
        return Tail(objective.tail)
    prior = cache.tail_prior()
    if prior is None:
        raise CacheError(
            f"{cache.path}: --tail prior needs the mean tail distribution, which the engine "
            f"{cache.manifest.scoring.engine} did not give; choose --tail bucket"
        )
    return Tail("prior", objective.tail_gamma, log_prior(torch.from_numpy(prior.copy())))


def training_arguments(options: StudentOptions) -> Any:
    """Our defaults and the user's fields together; raises UserError for a name or a value that is refused."""
    from transformers import TrainingArguments

    known = {f.name for f in fields(TrainingArguments) if f.init}
    for name in options.trainer:
        if name in _RESERVED:
            raise UserError(f"--trainer {name}: is set by pipeline train-student itself; leave it out")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"--trainer {name}: transformers.TrainingArguments has no such field{hint}")
    import torch

    defaults: dict[str, Any] = {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "eval_strategy": "epoch" if options.eval_share > 0 else "no",
        "logging_steps": 10,
        "report_to": "none",
        "save_total_limit": 2,
        "seed": options.seed,
    }
    if "eval_steps" in options.trainer and options.eval_share > 0:
        defaults["eval_strategy"] = "steps"
    try:
        return TrainingArguments(
            **{**defaults, **options.trainer},
            output_dir=options.output,
            remove_unused_columns=False,
            label_names=[],
            disable_tqdm=True,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"--trainer: {' '.join(str(error).split())[:300]}") from None


def run_identity(options: StudentOptions, cache: Cache) -> dict[str, Any]:
    """What must agree for a run to be the same run."""
    path = Path(options.student)
    name = str(path.resolve()) if path.exists() else options.student
    identity = {
        "student": name,
        "revision": options.revision,
        "init_from_config": options.init_from_config,
        "cache_id": cache.manifest.cache_id,
        "objective": asdict(options.objective),
        "eval_share": options.eval_share,
        "seed": options.seed,
        "dtype": options.dtype,
        "trainer": options.trainer,
    }
    return json.loads(json.dumps(identity, default=str))


def _previous_run(options: StudentOptions, cache: Cache) -> tuple[str | None, dict[str, Any] | None]:
    """The checkpoint to go on from, or the metrics of a run that is already done."""
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; --output wants a directory")
    # Hidden files may be what a killed run left of its first one.
    if not output.is_dir() or all(entry.name[:1] == "." for entry in output.iterdir()):
        return None, None
    if not (output / RUN).exists():
        raise UserError(f"{output}: holds other files and no run of train-student; name a new --output")
    there, ours = _read_object(output / RUN), run_identity(options, cache)
    if differing := [key for key in sorted({*there, *ours}) if there.get(key) != ours.get(key)]:
        raise UserError(
            f"{output}: holds another run, which differs in {', '.join(differing)}; "
            "name a new --output or repeat the command that began it"
        )
    if (output / METRICS).exists():
        return None, _read_object(output / METRICS)
    return _last_whole_checkpoint(output), None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged; name a new --output")
    return value


def _last_whole_checkpoint(output: Path) -> str | None:
    """Trainer writes a checkpoint file by file and its state last: without a state that parses, it is not whole."""
    steps = [int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*") if path.name[11:].isdigit()]
    for step in sorted(steps, reverse=True):
        checkpoint = output / f"checkpoint-{step}"
        try:
            json.loads((checkpoint / "trainer_state.json").read_bytes())
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None


def load_student(prepared: Prepared) -> PreTrainedModel:
    """The student, with weights read or drawn from the seed."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    from stages.pretrained import load_causal_lm, load_config

    options = prepared.options
    dtype = getattr(torch, options.dtype)
    source: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    set_seed(options.seed)
    if not options.init_from_config:
        return load_causal_lm(options.student, dtype=dtype, **source)
    config = load_config(options.student, **source)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=options.trust_remote_code)


def make_trainer(prepared: Prepared, callbacks: Sequence[TrainerCallback] = ()) -> DistillationTrainer:
    """The trainer of a prepared run, its student loaded and its datasets open."""
    from transformers import PrinterCallback

    from stages.shard_dataset import Collator, ShardDataset, corpus_threshold
    from stages.training import DistillationTrainer

    options, cache = prepared.options, prepared.cache
    model = load_student(prepared)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    objective = options.objective
    threshold = None
    if objective.rank_scope == "corpus":
        threshold = corpus_threshold(cache, prepared.train_ids, objective.hard_ratio)
    eval_dataset: ShardDataset | None = None
    eval_collator = None
    if len(prepared.eval_ids):
        eval_dataset = ShardDataset(cache, prepared.eval_ids)
        # Easy and hard are split over the whole held-out share, so that no batch size changes a metric.
        eval_collator = Collator(
            replace(objective, rank_scope="corpus"),
            vocabulary,
            corpus_threshold(cache, prepared.eval_ids, objective.hard_ratio),
        )
    trainer = DistillationTrainer(
        model=model,
        args=prepared.arguments,
        train_dataset=ShardDataset(cache, prepared.train_ids, extra=extra_columns(objective, cache)),
        eval_dataset=eval_dataset,
        data_collator=Collator(objective, vocabulary, threshold),
        eval_collator=eval_collator,
        objective=objective,
        tail=make_tail(objective, cache),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(prepared: Prepared, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train, evaluate and save; returns what `metrics.json` holds. Raises RunError for a run that breaks off."""
    import torch

    from stages.compatibility import cache_tokenizer

    options, cache = prepared.options, prepared.cache
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    trainer = make_trainer(prepared, callbacks)
    output = Path(options.output)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        remove_temporaries(output)
        write_json(output / RUN, run_identity(options, cache))
    try:
        result = trainer.train(resume_from_checkpoint=prepared.checkpoint)
    except torch.OutOfMemoryError:
        raise RunError(
            "out of memory; lower --batch-size and raise --accumulate to match, then start the same command again "
            "with a new --output"
        ) from None
    seconds = max(result.metrics["train_runtime"] - trainer.evaluation_seconds, 1e-9)
    metrics = trainer.evaluate() if len(prepared.eval_ids) else {}
    trainer.save_model()
    report = {
        "objective": asdict(options.objective),
        "cache_id": cache.manifest.cache_id,
        "teacher": cache.manifest.teacher.name,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        # Trainer's mean starts anew when a run is resumed.
        "train_loss": result.training_loss if prepared.checkpoint is None else None,
        "train_seconds": seconds,
        "train_tokens_per_second": trainer.trained_positions / seconds,
        "held_out_sequences": len(prepared.eval_ids),
        **{name: value for name, value in metrics.items() if _is_measure(name)},
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        cache_tokenizer(cache).save_pretrained(output)
        write_json(output / METRICS, report)
    return report


def _is_measure(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_loss"))
