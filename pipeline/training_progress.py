"""Trainer's events as our progress bar."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.numbers import format_share
from pipeline.progress import Progress


class TrainingProgress(TrainerCallback):
    """A bar in tokens: steps are what Trainer counts, so a step stands for its mean share of an epoch's tokens."""

    def __init__(self, epoch_tokens: int) -> None:
        self._epoch_tokens = epoch_tokens
        self._bar: Progress | None = None
        self._tokens_per_step = 0.0
        self._shown = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        loader = kwargs["train_dataloader"]
        steps_per_epoch = max(1, len(loader) // args.gradient_accumulation_steps)
        self._tokens_per_step = self._epoch_tokens / steps_per_epoch
        self._shown = state.global_step
        self._bar = Progress(
            "training",
            round(state.max_steps * self._tokens_per_step),
            done_before=round(state.global_step * self._tokens_per_step),
        )
        self._bar.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            done = round(state.global_step * self._tokens_per_step) - round(self._shown * self._tokens_per_step)
            self._shown = state.global_step
            self._bar.advance(done)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._bar is None or not logs:
            return
        if "loss" in logs:
            self._bar.advance(0, note=f"loss {float(logs['loss']):.4f}")
        elif "eval_cross_entropy" in logs:
            self._bar.status(
                f"step {state.global_step}: held-out cross-entropy {logs['eval_cross_entropy']:.4f}, "
                f"KL to the teacher {logs['eval_kl']:.4f}, agreement {format_share(logs['eval_agreement'])}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
