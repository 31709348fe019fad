"""A run that diverges ends at the first step whose loss or gradients are no numbers, and before it saves such weights.

Trainer would go on: it replaces a loss that is NaN by the mean of the last ones, and saves what is there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from storage.errors import RunError

# A gradient scaler halves its scale at each overflow; below this, no scale makes the gradients finite.
_LEAST_SCALE = 1.0


class DivergedError(RunError):
    """A loss, a gradient or a weight of a run is not finite."""


class FiniteSteps:
    """Holds the loss of one optimiser step, and compares it and the norm of its gradients with what is finite.

    accelerator: Trainer's. All processes raise at the same step: gradients are the same everywhere, losses are summed.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._loss: torch.Tensor | None = None

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of a micro-batch, a scalar on the device; nothing waits for it."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def check(self, norm: torch.Tensor | float | None, step: int) -> None:
        """Raise DivergedError unless the losses since the last check and `norm` of their gradients are finite.

        step: number of the optimiser step, from 1. norm: None where the engine (DeepSpeed) tells none. A step of
        float16 whose gradients overflow is one that its scaler skips, so only its loss counts, until the scale is at
        its end.
        """
        loss = torch.zeros(()) if self._loss is None else self._loss.float()
        self._loss = None
        loss = self._accelerator.reduce(loss.to(self._accelerator.device), reduction="sum")
        norm = torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=loss.device)
        # One transfer, and so one wait, for both.
        of_loss, of_norm = torch.stack([loss.reshape(()), norm.reshape(())]).tolist()
        if not math.isfinite(of_loss):
            raise DivergedError(f"the loss of step {step} is {of_loss}")
        scaler = getattr(self._accelerator, "scaler", None)
        if not math.isfinite(of_norm) and (scaler is None or scaler.get_scale() < _LEAST_SCALE):
            raise DivergedError(f"the norm of the gradients of step {step} is {of_norm}")


@torch.no_grad()
def check_weights(model: nn.Module, accelerator: Any, step: int) -> None:
    """Raise DivergedError, in all processes, where a weight of the model is not finite. step: the last one made."""
    wrong: torch.Tensor | None = None
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            there = (~torch.isfinite(local).all()).float()
            wrong = there if wrong is None else torch.maximum(wrong, there.to(wrong.device))
    if wrong is not None and accelerator.reduce(wrong.to(accelerator.device), reduction="sum").item():
        raise DivergedError(f"weights are not finite after step {step}")
