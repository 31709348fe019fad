"""What may differ where a run is resumed, and what is refused; one command to an output; advice that works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from stages.run_identity import sole_run
from stages.student import StudentOptions, prepare, train
from stages.trainer_arguments import MAY_CHANGE, REFUSED, training_arguments
from stages.training import DistillationTrainer
from storage.errors import RunError, UserError
from tests.conftest import Tiny
from tests.pipeline import apart
from tests.stages import recorded

FIELDS = {field.name for field in fields(TrainingArguments) if field.init}


def given(tiny: Tiny, cache: Path, output: Path, **trainer: Any) -> dict[str, Any]:
    trainer = {
        "max_steps": 8, "save_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "eval_strategy": "no",
        "dataloader_num_workers": 0, **trainer,
    }  # fmt: skip
    return {"student": str(tiny.student), "shards": [str(cache)], "output": str(output), "trainer": trainer}


def weights(output: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(output).state_dict()


# ---- fields of Trainer ------------------------------------------------------------------------------------------


def test_the_tables_name_fields_of_trainer() -> None:
    assert REFUSED.keys() <= FIELDS and FIELDS >= MAY_CHANGE and not MAY_CHANGE & REFUSED.keys()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_field_that_breaks_a_promise_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^--trainer {name}: .*; leave it out$") as raised:
        training_arguments(StudentOptions("s", "c", str(tmp_path / "out"), trainer={name: "true"}))
    assert REFUSED[name] in str(raised.value)
    assert not (tmp_path / "out").exists()


# ---- identity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"devices": 4}, "devices: 4 there, 1 here"),
        ({"seed": 7}, "seed: 7 there, 42 here"),
        ({"trainer": {"max_steps": 9}}, "trainer learning_rate: none there, 0.001 here; trainer max_steps: 9 there, 8"),
        ({"student": "x" * 100}, f"student: {'x' * 57}... there"),
    ],
)
def test_each_difference_is_named_with_both_values(
    changed: dict[str, Any], sentence: str, tiny: Tiny, cache_path: Path, tmp_path: Path
) -> None:
    options = StudentOptions(**given(tiny, cache_path, tmp_path / "out"))
    recorded.run(given(tiny, cache_path, tmp_path / "out"), stop_after=3)
    prepare(options)
    path = tmp_path / "out" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(UserError) as raised:
        prepare(options)
    assert sentence in str(raised.value)


def test_what_has_no_influence_may_change_and_what_it_says_counts(tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    """The weights are those of an undisturbed run; intervals are the new command's."""
    train(prepare(StudentOptions(**given(tiny, cache_path, tmp_path / "whole"))))
    recorded.run(given(tiny, cache_path, tmp_path / "out"), stop_after=5)
    other = {
        "dataloader_num_workers": 1, "save_steps": 3, "logging_steps": 1, "gradient_checkpointing": True,
        "save_total_limit": 5, "per_device_eval_batch_size": 1,
    }  # fmt: skip
    prepared = prepare(StudentOptions(**given(tiny, cache_path, tmp_path / "out", **other)))
    assert prepared.checkpoint is not None and prepared.checkpoint.endswith("checkpoint-4")
    report = train(prepared)
    assert [entry["step"] for entry in report["log"] if "loss" in entry][-4:] == [5, 6, 7, 8]
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} >= {"checkpoint-6", "checkpoint-8"}
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "out")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-5)


# ---- one command to an output -----------------------------------------------------------------------------------


def hold(output: str, held: str) -> int:
    with sole_run(Path(output)):
        Path(held).touch()
        time.sleep(600)
    return 0


def test_a_second_command_is_refused_until_the_first_is_dead(tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    output, held = tmp_path / "out", tmp_path / "held"
    output.mkdir()
    child = apart.start(hold, str(output), str(held), errors=str(tmp_path / "errors"))
    started = time.monotonic()
    while not held.exists():
        assert time.monotonic() - started < 60
        time.sleep(0.02)
    prepared = prepare(StudentOptions(**given(tiny, cache_path, output)))
    with pytest.raises(UserError, match="another command trains into it; wait for it, or name a new --output"):
        train(prepared)
    assert not (output / "run.json").exists()
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    train(prepared)
    assert (output / "metrics.json").exists() and not (output / ".lock").exists()
    # Prepared before the other one had finished.
    with pytest.raises(UserError, match="another command trained into it meanwhile"):
        train(prepared)


# ---- several processes ------------------------------------------------------------------------------------------


def test_processes_that_would_not_train_together_are_refused(
    tiny: Tiny, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = StudentOptions(**given(tiny, cache_path, tmp_path / "out"))
    # As schedulers leave them for a single process.
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("SLURM_NTASKS", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    training_arguments(options)
    # One process on each of two machines, and nothing by which they find each other.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but these processes would not train together"):
        training_arguments(options)


def test_torchrun_without_an_accelerator(tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    """Refused with advice that works: the two then train as one process with twice the accumulation."""
    command = ["train-student", "--student", tiny.student, "--shards", cache_path, "--max-steps", 3, "--batch-size", 3]
    command += ["--objective", "kl", "--normalize", "token", "--eval-share", 0, "--trainer", "dataloader_num_workers=0"]

    def started(processes: int, *more: object) -> subprocess.CompletedProcess[str]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        words = [*launch, "--module", "pipeline.cli", *command, *more] if processes > 1 else [
            sys.executable, "-m", "pipeline.cli", *command, *more
        ]  # fmt: skip
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return subprocess.run([str(w) for w in words], capture_output=True, text=True, env=environment, timeout=120)

    refused = started(2, "--output", tmp_path / "refused")
    assert refused.returncode != 0 and not (tmp_path / "refused").exists()
    assert "WORLD_SIZE is 2, but these processes would not train together" in refused.stderr
    together = started(
        2, "--output", tmp_path / "two", "--trainer", "use_cpu=true", "--trainer", "ddp_backend=gloo"
    )  # fmt: skip
    assert together.returncode == 0, together.stderr
    alone = started(1, "--output", tmp_path / "one", "--accumulate", 2)
    assert alone.returncode == 0, alone.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-4, rtol=0)
    counted = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    positions = [round(each["train_tokens_per_second"] * each["train_seconds"]) for each in counted]
    assert abs(positions[0] - positions[1]) <= 2


# ---- advice -----------------------------------------------------------------------------------------------------


def test_what_is_advised_where_memory_ends_is_taken(
    tiny: Tiny, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(prepare(StudentOptions(**given(tiny, cache_path, tmp_path / "whole"))))
    compute_loss = DistillationTrainer.compute_loss

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(DistillationTrainer, "compute_loss", full)
        with pytest.raises(RunError, match="again with --trainer gradient_checkpointing=true to resume, or with a low"):
            train(prepare(StudentOptions(**given(tiny, cache_path, tmp_path / "out"))))
        with pytest.raises(RunError, match="out of memory; start again with a lower --batch-size, raise --accumulate"):
            train(prepare(StudentOptions(**given(tiny, cache_path, tmp_path / "new", gradient_checkpointing=True))))
    again = prepare(StudentOptions(**given(tiny, cache_path, tmp_path / "out", gradient_checkpointing=True)))
    assert again.checkpoint is not None and again.checkpoint.endswith("checkpoint-4")
    train(again)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_what_is_advised_where_a_worker_was_killed_is_taken(tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            # Not all children of this process: a server that other tests need may be among them.
            for worker in self._train_loader._iterator._workers:
                worker.kill()
        return compute_loss(self, *args, **kwargs)

    compute_loss = DistillationTrainer.compute_loss
    whole = given(tiny, cache_path, tmp_path / "whole", max_steps=40)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DistillationTrainer, "compute_loss", killed)
        options = given(tiny, cache_path, tmp_path / "out", dataloader_num_workers=1, max_steps=40)
        with pytest.raises(RunError, match="again with --trainer dataloader_num_workers=0 to resume without one"):
            train(prepare(StudentOptions(**options)))
    train(prepare(StudentOptions(**whole)))
    again = prepare(StudentOptions(**given(tiny, cache_path, tmp_path / "out", max_steps=40)))
    assert again.checkpoint is not None
    train(again)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(np.array_equal(one[name], two[name]) for name in one)
