"""Training runs that write down what each step saw, in this process or as one of several devices."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.objective import Objective
from stages.run_identity import run_identity
from stages.student import StudentOptions, prepare
from stages.student_trainer import make_trainer
from storage.files import write_json


def sequences_of(batch: dict[str, torch.Tensor]) -> list[str]:
    """The sequences of a batch, each known by its teacher's log-probabilities."""
    gold, sequence_of = batch["gold_logprob"].numpy(), batch["sequence_of"].numpy()
    return [gold[sequence_of == i].tobytes().hex() for i in range(len(batch["source"]))]


def run(given: dict[str, Any], *, stop_after: int | None = None) -> list[dict[str, Any]]:
    """Train as `given` (fields of StudentOptions) says; what each micro-batch was.

    stop_after: break off, without a farewell, after this step (saved, where save_steps says so).
    """
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop_after:
                raise InterruptedError

    objective = Objective(**given.pop("objective", {}))
    prepared = prepare(StudentOptions(objective=objective, **given))
    trainer = make_trainer(prepared, [Stop()])
    output = Path(prepared.options.output)
    output.mkdir(exist_ok=True)
    if trainer.is_world_process_zero():
        write_json(
            output / "run.json",
            run_identity(prepared.options, [part.cache for part in prepared.parts], prepared.arguments.world_size),
        )
    seen: list[dict[str, Any]] = []
    compute_loss = trainer.compute_loss

    def recorded(model: Any, inputs: dict[str, torch.Tensor], **named: Any) -> Any:
        loss = compute_loss(model, inputs, **named)
        seen.append(
            {
                "step": trainer.state.global_step,
                "sequences": sequences_of(inputs),
                "gold_logprob": inputs["gold_logprob"].tolist(),
                "is_hard": inputs["is_hard"].tolist(),
                "loss": loss.item(),
            }
        )
        return loss

    trainer.compute_loss = recorded  # type: ignore[method-assign]
    try:
        trainer.train(resume_from_checkpoint=prepared.checkpoint)
    except InterruptedError:
        return seen
    if trainer.is_world_process_zero():
        weights = {name: p.detach().numpy() for name, p in trainer.model.named_parameters()}
        np.savez(output / "weights.npz", **weights)
    return seen


def device(rank: int, devices: int, port: int, given: dict[str, Any], record: str, stop_after: int | None) -> int:
    """One of several processes that train together (gloo); the record is written to a file."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(devices),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    given["trainer"] |= {"use_cpu": True, "ddp_backend": "gloo"}
    Path(record).write_text(json.dumps(run(given, stop_after=stop_after)))
    return 0
