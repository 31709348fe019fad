"""Runs that diverge: stopped at the first number that is none, with nothing saved that came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from stages.finite_steps import DivergedError, FiniteSteps, check_weights
from storage.json_text import without_nan
from tests.conftest import Tiny


def run(pipeline: Callable[..., Any], tiny: Tiny, cache: Path, output: Path, *more: object) -> Any:
    given = ("--student", tiny.student, "--shards", cache, "--output", output, "--objective", "kl", "--batch-size", 4)
    return pipeline("train-student", *given, "--trainer", "dataloader_num_workers=0", *more)


@pytest.mark.parametrize("more", [(), ("--trainer", "max_grad_norm=0"), ("--accumulate", 2), ("--eval-share", 0)])
def test_a_rate_that_must_diverge(
    more: tuple[object, ...], tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    ended = run(pipeline, tiny, cache_path, tmp_path / "out", "--learning-rate", 1e30, "--max-steps", 6, *more)
    assert ended.code == 1
    last = ended.err.strip().splitlines()[-1]
    assert "of step 2 is nan: the run has diverged, and no student was saved; no checkpoint was written;" in last
    assert not (tmp_path / "out" / "metrics.json").exists() and not (tmp_path / "out" / "model.safetensors").exists()


def test_the_checkpoint_from_before_is_kept(
    tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM

    # A warm-up whose rate grows with every step.
    growing = ("--trainer", "lr_scheduler_type=constant_with_warmup", "--warmup-steps", 1000, "--save-steps", 1)
    ended = run(pipeline, tiny, cache_path, tmp_path / "out", "--learning-rate", 1e37, "--max-steps", 20, *growing)
    assert ended.code == 1
    kept = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert kept and f"{kept[-1].name}, from before it, is kept" in ended.err
    for checkpoint in kept:
        weights = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
        assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_weights_that_the_last_step_broke_are_not_saved(
    tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    ended = run(
        pipeline, tiny, cache_path, tmp_path / "out", "--learning-rate", 1e39, "--max-steps", 1, "--eval-share", 0
    )
    assert ended.code == 1 and "weights are not finite after step 1: the run has diverged" in ended.err
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_scaler_may_skip_steps_until_its_scale_is_at_its_end() -> None:
    scaler = SimpleNamespace(scale=2.0)
    scaler.get_scale = lambda: scaler.scale
    device = torch.device("cpu")
    steps = FiniteSteps(SimpleNamespace(scaler=scaler, device=device, reduce=lambda value, reduction: value))
    steps.add(torch.tensor(1.0))
    steps.check(torch.tensor(math.inf), 1)
    scaler.scale = 0.5
    with pytest.raises(DivergedError, match="the norm of the gradients of step 2 is inf"):
        steps.check(torch.tensor(math.inf), 2)
    steps.add(torch.tensor(math.nan))
    with pytest.raises(DivergedError, match="the loss of step 3 is nan"):
        steps.check(1.0, 3)
    # One step's loss is not the next one's.
    steps.check(1.0, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_weight_that_is_no_number_is_found(value: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    check_weights(model, Accelerator(cpu=True), 5)
    with torch.no_grad():
        model[1].weight[2, 1] = value
    with pytest.raises(DivergedError, match="after step 5"):
        check_weights(model, Accelerator(cpu=True), 5)


def test_numbers_that_json_does_not_have_are_null() -> None:
    value = {"a": [1.0, math.nan, {"b": (math.inf, "nan", 3)}], "c": None}
    assert without_nan(value) == {"a": [1.0, None, {"b": [None, "nan", 3]}], "c": None}
    json.dumps(without_nan(value), allow_nan=False)
