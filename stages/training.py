"""Stage two: a student is trained from the shards, on `transformers.Trainer`, and the teacher is never loaded."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from stages import evaluation
from stages.decomposition import Decomposition
from stages.distillation_forward import Head, install_distillation
from stages.divergence import BUCKET, StudentTerms, at_temperature, divergences, teacher_terms
from stages.head_loss import head_loss
from stages.objective import Objective, coefficients, compare, weighted_sum
from stages.shard_dataset import Collator, WindowShuffle, teacher_rows
from stages.tail import Tail


class DistillationTrainer(Trainer):
    """Trainer whose loss is the objective's weighted sum and whose evaluation compares with the cached teacher.

    Trainer scales losses in one of two ways; `loss_is_scaled_for_ga` says which one ours needs, so that nothing is
    divided twice: `group` losses are means over a micro-batch (Trainer averages them over the accumulated ones),
    `token` losses are divided here by the tokens of the whole step, over micro-batches and devices.
    """

    objective: Objective

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        tail: Tail = BUCKET,
        eval_collator: Collator | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        # The prior is one vector for the whole run; it moves to the device once.
        prior = None if tail.log_prior is None else tail.log_prior.to(self.args.device)
        self._tail = replace(tail, log_prior=prior)
        self._eval_collator = eval_collator
        self._vocabulary_size = install_distillation(self.model)
        self.loss_is_scaled_for_ga = objective.normalize == "token"
        self._decomposition = Decomposition(self.args.device)
        self.trained_positions = 0
        self.evaluation_seconds = 0.0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch (see Collator for `inputs`). num_items_in_batch: tokens of the whole step."""
        objective, temperature = self.objective, self.objective.temperature
        weights = coefficients(objective, inputs["is_hard"], num_items_in_batch)
        at_one = rows = teacher_rows(inputs)
        if temperature != 1:
            rows = at_temperature(rows, inputs["tail_logmass_at"], temperature)
        self.trained_positions += len(rows)
        teacher = teacher_terms(rows, self._tail.mode)
        # Cross-entropy stays at temperature 1, which takes a second pass of the head where both are wanted.
        separate_ce = temperature != 1 and (objective.ce_weight > 0 or objective.name == "ce")

        def loss_of(student: StudentTerms, part: slice) -> torch.Tensor:
            terms, weight = compare(objective, student, teacher[part]), weights[part]
            self._decomposition.add(terms, teacher[part], inputs["is_hard"][part])
            return weighted_sum(terms, replace(weight, ce=torch.zeros_like(weight.ce)) if separate_ce else weight)

        def ce_of(student: StudentTerms, part: slice) -> torch.Tensor:
            return (weights.ce[part] * divergences(student, teacher[part]).ce).sum()

        def from_hidden(hidden: torch.Tensor, head: Head, parameters: list[nn.Parameter]) -> torch.Tensor:
            def cooled(states: torch.Tensor) -> torch.Tensor:
                return head(states) / temperature

            size = self._vocabulary_size
            total = head_loss(
                hidden,
                head if temperature == 1 else cooled,
                parameters,
                rows,
                loss_of,
                vocabulary_size=size,
                tail=self._tail,
            )
            if separate_ce:
                total = total + head_loss(hidden, head, parameters, at_one, ce_of, vocabulary_size=size)
            return total

        loss = model(distillation=from_hidden, input_ids=inputs["input_ids"], rows=inputs["rows"])
        if self.objective.normalize == "token" and num_items_in_batch is not None:
            # Gradients are averaged over devices, the tokens were counted over all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log with the paper's decomposition since the last one: mean TKD, DKD and UNC, easy and hard."""
        if "loss" in logs:
            logs = {**logs, **self._decomposition.take()}
        super().log(logs, start_time)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.tensor(sum(len(batch["gold"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(tokens, reduction="sum")

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        return WindowShuffle(dataset, self._data_seed)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset: Any = self.eval_dataset if eval_dataset is None or isinstance(eval_dataset, str) else eval_dataset
        loader: DataLoader = DataLoader(
            dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=self._eval_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        return self.accelerator.prepare(loader)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Our measures in place of Trainer's gathered logits, which would be `[tokens, vocabulary]` in memory."""
        started = time.monotonic()
        model: Any = self._wrap_model(self.model, training=False)  # type: ignore[arg-type]
        if not self.accelerator._models and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        total = torch.zeros((len(evaluation.GROUPS), 1 + len(evaluation.MEASURES)), dtype=torch.float64)
        sequences = 0
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)

            def from_hidden(
                hidden: torch.Tensor, head: Head, parameters: list[nn.Parameter], inputs: Any = inputs
            ) -> torch.Tensor:
                return evaluation.sums_by_sequence(
                    hidden, head, teacher_rows(inputs), inputs["is_hard"], inputs["sequence_of"],
                    sequences=len(inputs["input_ids"]), vocabulary_size=self._vocabulary_size,
                )  # fmt: skip

            with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
                sums = model(distillation=from_hidden, input_ids=inputs["input_ids"], rows=inputs["rows"])
            # Drops the sequences that the loader repeated to give every device the same number.
            gathered = self.accelerator.gather_for_metrics(sums.to(self.args.device, _gatherable(self.args.device)))
            total += gathered.cpu().double().sum(0)
            sequences += len(gathered)
        metrics = evaluation.metrics(total, metric_key_prefix)
        # What `metric_for_best_model` and early stopping look at by default.
        metrics[f"{metric_key_prefix}_loss"] = metrics.get(f"{metric_key_prefix}_cross_entropy", float("nan"))
        self.evaluation_seconds += time.monotonic() - started
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=sequences)  # type: ignore[arg-type]


def _gatherable(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
