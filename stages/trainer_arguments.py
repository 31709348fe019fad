"""The fields of `transformers.TrainingArguments`: our defaults, the user's, those that are refused, and why."""

from __future__ import annotations

import difflib
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_type_hints

from storage.errors import UserError
from storage.redact import holds_secret

if TYPE_CHECKING:
    from stages.student import StudentOptions

_OURS = "pipeline train-student sets it"
_MEASURES = "the held-out measures are summed token by token, so it would change nothing"
_HUB = "a student is pushed once it is finished, for example with `hf upload`"
# What is set here, what the objective or exact resuming rely on, and what would change nothing; each with its reason.
REFUSED = {
    "output_dir": _OURS,
    "remove_unused_columns": _OURS,
    "label_names": _OURS,
    "seed": "--seed sets it",
    "disable_tqdm": _OURS,
    "logging_nan_inf_filter": "a loss that is no number would be shown as a good one",
    "label_smoothing_factor": "the objective has no smoothed labels",
    "use_liger_kernel": "head and loss are computed together already",
    "liger_kernel_config": "head and loss are computed together already",
    "train_sampling_strategy": "--batching says how sequences make batches",
    "length_column_name": "--batching says how sequences make batches",
    "dataloader_drop_last": "every sequence of an epoch is trained on",
    "dataloader_in_order": "batches come in their order, or a resumed run would see others",
    "accelerator_config": _OURS,
    "parallelism_config": "a sequence is not split over devices",
    "auto_find_batch_size": "a batch size that changes by itself would change which tokens are ranked together",
    "average_tokens_across_devices": "the tokens of a step are always counted over all devices",
    "use_cache": "the student keeps its own setting",
    "include_num_input_tokens_seen": "it counts padding too; metrics.json has train_tokens_per_second",
    "do_train": "it would change nothing",
    "do_eval": "--eval-share says what is evaluated",
    "do_predict": "it would change nothing",
    "resume_from_checkpoint": "the same command resumes by itself",
    "ignore_data_skip": "a resumed run would see sequences again and never see others",
    "save_only_model": "a run could not be resumed from such a checkpoint",
    "enable_jit_checkpoint": "a run that is stopped resumes from its last checkpoint",
    "local_rank": "the launcher (torchrun) sets it",
    "prediction_loss_only": _MEASURES,
    "eval_accumulation_steps": _MEASURES,
    "eval_do_concat_batches": _MEASURES,
    "eval_use_gather_object": _MEASURES,
    "include_for_metrics": _MEASURES,
    "batch_eval_metrics": _MEASURES,
    "fp16_full_eval": "evaluation runs in the precision of the training",
    "bf16_full_eval": "evaluation runs in the precision of the training",
    "push_to_hub": _HUB,
    "hub_token": "a token would be written into the output; set HF_TOKEN where you upload",
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_private_repo": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "trackio_space_id": _HUB,
    "trackio_bucket_id": _HUB,
    "trackio_static_space_id": _HUB,
}
# Fields without influence on the weights, which may differ when a run is resumed.
MAY_CHANGE = frozenset(
    {
        "dataloader_num_workers",
        "dataloader_prefetch_factor",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_multiprocessing_context",
        "ddp_bucket_cap_mb",
        "ddp_timeout",
        "debug",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_first_step",
        "logging_steps",
        "logging_strategy",
        "per_device_eval_batch_size",
        "project",
        "report_to",
        "run_name",
        "save_on_each_node",
        "save_steps",
        "save_total_limit",
        "skip_memory_metrics",
        "torch_empty_cache_steps",
    }
)
# Trainer's own way would compile anew at each step: `compile_body`.
COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def training_arguments(options: StudentOptions) -> Any:
    """Our defaults and the user's fields together; raises UserError for a name or a value that is refused."""
    from transformers import TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks

    known = {f.name for f in fields(TrainingArguments) if f.init}
    for name in options.trainer:
        if name in REFUSED:
            raise UserError(f"--trainer {name}: {REFUSED[name]}; leave it out")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"--trainer {name}: transformers.TrainingArguments has no such field{hint}")
        if holds_secret(str(options.trainer[name])):
            raise UserError(f"--trainer {name}: holds a key or password, which would be written into the output")
    given = {name: _typed(name, value) for name, value in options.trainer.items()}
    import torch

    defaults: dict[str, Any] = {
        # One process reads ahead while the student computes.
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 4,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "eval_strategy": "epoch" if options.eval_share > 0 else "no",
        "logging_steps": 10,
        "report_to": "none",
        "save_total_limit": 2,
        "seed": options.seed,
    }
    if "eval_steps" in given and options.eval_share > 0:
        defaults["eval_strategy"] = "steps"
    if given.get("dataloader_num_workers") == 0:
        defaults |= {"dataloader_persistent_workers": False, "dataloader_prefetch_factor": None}
    try:
        arguments = TrainingArguments(
            **{name: value for name, value in {**defaults, **given}.items() if name not in COMPILE},
            # Absolute, or a name that begins with ~ would be another place for Trainer than for the rest.
            output_dir=os.path.abspath(options.output),
            remove_unused_columns=False,
            label_names=[],
            # It would show a loss that is NaN as the mean of the ones before.
            logging_nan_inf_filter=False,
            disable_tqdm=True,
        )
        # Trainer would make them only once the caches are read.
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
        _try_steps(arguments)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(f"--trainer: {' '.join(str(error).split())[:300]}") from None
    _check_processes(arguments)
    if arguments.n_gpu > 1:
        # Several GPUs are one process each (torchrun); Trainer would copy the model to all of them in threads.
        arguments._n_gpu = 1
    return arguments


def _typed(name: str, value: Any) -> Any:
    """Return the value in the type of its field; a word that means it is converted. Raise UserError for another one.

    transformers takes any value, and fails at the first step, or takes the word `no` for true.
    """
    from pydantic import TypeAdapter, ValidationError
    from transformers import TrainingArguments

    # Its annotation leaves out what it takes.
    if name == "fsdp":
        return value
    try:
        return TypeAdapter(get_type_hints(TrainingArguments)[name]).validate_python(value)
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        raise UserError(f"--trainer {name}: {said[:1].lower()}{said[1:]}, not {repr(value)[:60]}") from None


def _try_steps(arguments: Any) -> None:
    """Make the optimizer and the schedule of one number, which raise what they would raise once the output is begun."""
    import torch
    from transformers import Trainer
    from transformers.optimization import get_scheduler

    weight = torch.nn.Parameter(torch.zeros(1, 1))
    optimizer: Any = torch.optim.SGD([weight], arguments.learning_rate)
    # GaLore and the like need the model.
    if not arguments.optim_target_modules:
        kind, given = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([weight], **given)
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(2),
        num_training_steps=2,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )


def _check_processes(arguments: Any) -> None:
    """Raise UserError where a launcher started several processes and each would train alone, into one output."""
    started = os.environ.get("WORLD_SIZE", "1")
    if started.isdigit() and int(started) > 1 and arguments.world_size == 1:
        raise UserError(
            f"WORLD_SIZE is {started}, but these processes would not train together, for no accelerator is seen here; "
            "start one process, or train on CPUs together with --trainer use_cpu=true --trainer ddp_backend=gloo"
        )
