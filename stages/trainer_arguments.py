"""The fields of `transformers.TrainingArguments`: our defaults, the user's, and those that are refused."""

from __future__ import annotations

import difflib
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from storage.errors import UserError

if TYPE_CHECKING:
    from stages.student import StudentOptions

# What is ours to set, or would undo what the objective relies on.
RESERVED = (
    "output_dir",
    "remove_unused_columns",
    "label_names",
    "label_smoothing_factor",
    "use_liger_kernel",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "accelerator_config",
    "auto_find_batch_size",
    "logging_nan_inf_filter",
)
# Trainer's own way would compile anew at each step: `compile_body`.
COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def training_arguments(options: StudentOptions) -> Any:
    """Our defaults and the user's fields together; raises UserError for a name or a value that is refused."""
    from transformers import TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks

    known = {f.name for f in fields(TrainingArguments) if f.init}
    for name in options.trainer:
        if name in RESERVED:
            raise UserError(f"--trainer {name}: is set by pipeline train-student itself; leave it out")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"--trainer {name}: transformers.TrainingArguments has no such field{hint}")
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
    if "eval_steps" in options.trainer and options.eval_share > 0:
        defaults["eval_strategy"] = "steps"
    if options.trainer.get("dataloader_num_workers") == 0:
        defaults |= {"dataloader_persistent_workers": False, "dataloader_prefetch_factor": None}
    try:
        arguments = TrainingArguments(
            **{name: value for name, value in {**defaults, **options.trainer}.items() if name not in COMPILE},
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
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(f"--trainer: {' '.join(str(error).split())[:300]}") from None
    if arguments.n_gpu > 1:
        # Several GPUs are one process each (torchrun); Trainer would copy the model to all of them in threads.
        arguments._n_gpu = 1
    return arguments
