"""Students that train adapters alone, and Trainer's ways to save memory, under the fused head and loss."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import student as student_module
from stages import student_trainer
from stages.divergence import divergences, student_terms, teacher_terms
from stages.objective import Objective, coefficients, weighted_sum
from stages.shard_dataset import as_tensors, teacher_rows
from stages.student import StudentOptions, prepare, train
from stages.student_trainer import load_student, make_trainer
from tests.conftest import Tiny

peft = pytest.importorskip("peft")


def options(tiny: Tiny, cache: Path, output: Path, **more: Any) -> StudentOptions:
    trainer = {"max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1, **more.pop("trainer", {})}
    return StudentOptions(str(tiny.student), str(cache), str(output), trainer=trainer, **more)


def plain_gradients(model: Any, batch: dict[str, torch.Tensor], objective: Objective) -> dict[str, torch.Tensor]:
    """Of the full logits, by autograd alone."""
    rows = teacher_rows(batch)
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)[batch["rows"]]
    terms = divergences(student_terms(logits, rows), teacher_terms(rows, objective.tail))
    weighted_sum(terms, coefficients(objective, batch["is_hard"])).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "adapters",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["frozen head", "adapter on the head", "head trained whole"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_the_full_logits(
    adapters: dict[str, Any],
    checkpointing: bool,
    tiny: Tiny,
    cache_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective = Objective("atkd", ce_weight=0.1, tail="bucket")
    prepared = prepare(
        options(
            tiny, cache_path, tmp_path / "out", objective=objective, trainer={"gradient_checkpointing": checkpointing}
        )
    )
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **adapters)
    model = peft.get_peft_model(load_student(prepared), config)
    twin = copy.deepcopy(model)
    monkeypatch.setattr(student_trainer, "load_student", lambda prepared: model)
    trainer = make_trainer(prepared)
    batch = as_tensors(next(iter(trainer.get_train_dataloader())))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, dict(batch))
    assert loss > 0
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = plain_gradients(twin, batch, objective)
    assert found.keys() == expected.keys() and found
    assert all("lora_" in name or "modules_to_save" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_command_trains_and_saves_adapters(
    tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    base = ["train-student", "--student", tiny.student, "--shards", cache_path, "--objective", "kl"]
    out = tmp_path / "out"
    done = pipeline(*base, "--output", out, "--lora-rank", 4, "--max-steps", 20, "--learning-rate", 1e-2)
    assert done.code == 0, done.err
    assert not (out / "model.safetensors").exists()
    saved = json.loads((out / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (4, 8)
    assert "lm_head" not in saved["target_modules"]
    losses = [e["loss"] for e in json.loads((out / "metrics.json").read_text())["log"] if "loss" in e]
    assert losses[-1] < losses[0]
    from transformers import AutoModelForCausalLM

    whole = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.student), out)
    assert whole.peft_config["default"].r == 4
    wrong = pipeline(*base, "--output", tmp_path / "wrong", "--lora-rank", 4, "--lora-target", "no_such_module")
    assert wrong.code == 2 and "--lora-target" in wrong.err and "no_such_module" in wrong.err


def test_adapters_resume(tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]) -> None:
    """A run that lost its end goes on from its checkpoint to the same adapters."""
    words = ["train-student", "--student", tiny.student, "--shards", cache_path, "--lora-rank", 4]
    words += ["--max-steps", 6, "--save-steps", 2, "--learning-rate", 1e-2, "--output"]
    assert pipeline(*words, tmp_path / "whole").code == 0
    assert pipeline(*words, tmp_path / "cut").code == 0
    (tmp_path / "cut" / "metrics.json").unlink()
    for path in (tmp_path / "cut" / "checkpoint-6").iterdir():
        path.unlink()
    done = pipeline(*words, tmp_path / "cut")
    assert done.code == 0 and "going on from" in done.err and "checkpoint-4" in done.err
    name = "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_without_peft_one_sentence(
    tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = student_module.importlib.util.find_spec
    monkeypatch.setattr(
        student_module.importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name)
    )
    base = ["train-student", "--student", tiny.student, "--shards", cache_path, "--output", tmp_path / "out"]
    done = pipeline(*base, "--lora-rank", 4)
    assert done.code == 2
    assert "teacher-logit-cache[lora]" in done.err


@pytest.mark.parametrize("batching", ["padded", "packed"])
@pytest.mark.parametrize(
    ("more", "tolerance"),
    [({"gradient_checkpointing": True}, 1e-5), ({"bf16": True, "use_cpu": True}, 3e-2)],
    ids=lambda v: str(v),
)
def test_checkpointing_and_bf16_stay_close_to_plain_float32(
    more: dict[str, Any], tolerance: float, batching: str, tiny: Tiny, cache_path: Path, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"batching": "packed", "batch_tokens": 1000} if batching == "packed" else {}
    losses = []
    for name, trainer in (("plain", {}), ("other", more)):
        report = train(prepare(options(tiny, cache_path, tmp_path / name, trainer=dict(trainer), **sizes)))
        losses.append([entry["loss"] for entry in report["log"] if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
