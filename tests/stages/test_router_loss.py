"""The router's auxiliary loss of a mixture of experts: the model's own, with its own weight, on real tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.shrunk_models import LEFT_OUT, families, shrunk_config, shrunk_model
from stages.distillation_forward import install_distillation
from stages.router_loss import router_coefficient
from storage.errors import RunError, UserError
from tests.conftest import VOCABULARY, Tiny


def asks(family: str) -> bool:
    if family in LEFT_OUT:
        return False
    try:
        return hasattr(shrunk_config(family).get_text_config(), "output_router_logits")
    except Exception:  # noqa: BLE001 - a family that the table does not know yet
        return False


EXPERTS = [family for family in families() if asks(family)]
# Families for which everything must work; others may be refused.
SURE = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "jamba", "dbrx"}
LENGTHS = (23, 9, 16)


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    model = shrunk_model(family, output_router_logits=True).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids `[B, L]`, padded with 0; the mask; lengths."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 95, (len(LENGTHS), max(LENGTHS)), generator=random)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return ids * mask, mask, torch.tensor(LENGTHS)


@pytest.mark.parametrize("family", EXPERTS)
def test_loss_weight_and_gradients_are_the_models_own(family: str) -> None:
    model = model_of(family)
    try:
        installed = install_distillation(model)
    except UserError as refusal:
        said = str(refusal)
    else:
        said = ""
    if said:
        # In a sentence that says what to do, or the model itself fails with that setting; never silent.
        assert family not in SURE, said
        assert ("output_router_logits" in said and "config.json" in said) or "does not score a few token ids" in said
        return
    if installed.router_coefficient == 0:
        assert not getattr(model.config.get_text_config(), "router_aux_loss_coef", 0)
        return
    ids, mask, lengths = batch()
    given = {"input_ids": ids, "rows": torch.tensor([0]), "lengths": lengths}
    _, found = model(distillation=lambda hidden, *_: hidden.sum() * 0, router=True, **given)
    wanted = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss
    # Padding is routed in one of the two and counted in none; what is counted may lie behind it in the row.
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, trained, allow_unused=True) for loss in (found, wanted))
    largest = max(g.abs().max().item() for g in theirs if g is not None)
    assert largest > 0
    for one, other in zip(ours, theirs, strict=True):
        one, other = (torch.zeros(1) if g is None else g for g in (one, other))
        assert (one - other).abs().max().item() <= 1e-3 * largest


def test_what_trainer_would_add_is_what_is_weighed() -> None:
    for family, coefficient in (("mixtral", 0.3), ("qwen3_moe", 0.02), ("olmoe", 1.5)):
        model = shrunk_model(family, output_router_logits=True, router_aux_loss_coef=coefficient)
        assert router_coefficient(model) == pytest.approx(coefficient)
    assert router_coefficient(shrunk_model("mixtral", output_router_logits=False)) == 0
    assert router_coefficient(shrunk_model("llama")) == 0


def test_a_weight_that_is_not_followed_is_refused() -> None:
    model = shrunk_model("mixtral", output_router_logits=True)
    own = type(model).forward

    class Odd(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = own(self, *args, **kwargs)
            if found.loss is not None and found.aux_loss is not None:
                found.loss = found.loss + 0.5 * found.aux_loss
            return found

    model.__class__ = Odd
    with pytest.raises(UserError, match="in a way that is not followed"):
        install_distillation(model)


def student(path: Path, tokenizer: Path, **more: Any) -> Path:
    torch.manual_seed(0)
    model = shrunk_model(
        "mixtral", vocab_size=VOCABULARY, max_position_embeddings=128, output_router_logits=True,
        router_aux_loss_coef=0.5, **more,
    )  # fmt: skip
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_it_is_logged_and_trains_the_router(
    tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    """With the objective's gradient gone, the router alone moves, and its loss falls."""
    from stages.objective import Objective
    from stages.student import StudentOptions, prepare, train

    trainer = {
        "max_steps": 30, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "logging_steps": 1,
        "dataloader_num_workers": 0,
    }  # fmt: skip
    path = student(tmp_path / "student", tiny.tokenizer)
    report = train(
        prepare(StudentOptions(str(path), str(cache_path), str(tmp_path / "out"), Objective("kl"), trainer=trainer))
    )
    losses = [entry["router_loss"] for entry in report["log"] if "router_loss" in entry]
    assert len(losses) == 30 and losses[-1] < losses[0]
    assert not any("router" in name for name in report if name.startswith("eval"))


@pytest.mark.parametrize("normalize", ["group", "token"])
def test_accumulating_takes_the_mean_over_micro_batches(
    normalize: Any, tiny: Tiny, cache_path: Path, tmp_path: Path
) -> None:
    """One optimiser step of plain gradient descent: what the router's gate moved by is the mean of the parts."""
    from stages.objective import Objective
    from stages.student import StudentOptions, prepare
    from stages.student_trainer import make_trainer

    path = student(tmp_path / "student", tiny.tokenizer)
    trainer = {
        "max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1e9,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "dataloader_num_workers": 0,
    }  # fmt: skip
    objective = Objective("ce", normalize=normalize)
    given = StudentOptions(
        str(path), str(cache_path), str(tmp_path / "out"), objective, eval_share=0, trainer=trainer, batching="padded"
    )
    trained = make_trainer(prepare(given))
    seen: list[dict[str, torch.Tensor]] = []
    compute = trained.compute_loss

    def kept(model: Any, inputs: dict[str, torch.Tensor], **named: Any) -> Any:
        seen.append({name: inputs[name].clone() for name in ("input_ids", "lengths")})
        return compute(model, inputs, **named)

    trained.compute_loss = kept  # type: ignore[method-assign]
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    trained.train()
    moved = {name: before[name] - p.detach() for name, p in trained.model.named_parameters()}
    trained._router_coefficient = 0.0
    again = make_trainer(prepare(StudentOptions(**{**vars(given), "output": str(tmp_path / "plain")})))
    again._router_coefficient = 0.0
    again.train()
    plain = {name: before[name] - p.detach() for name, p in again.model.named_parameters()}
    model = AutoModelForCausalLM.from_pretrained(path)
    auxiliary = [
        model(
            input_ids=each["input_ids"],
            attention_mask=(torch.arange(each["input_ids"].shape[1]) < each["lengths"][:, None]).long(),
            output_router_logits=True,
        ).aux_loss
        for each in seen
    ]
    (0.5 * torch.stack(auxiliary).mean()).backward()
    gates = [name for name, _ in model.named_parameters() if "gate.weight" in name]
    assert gates
    for name, parameter in model.named_parameters():
        if name in gates:
            torch.testing.assert_close(moved[name] - plain[name], parameter.grad, atol=1e-5, rtol=1e-3)


def test_checkpoints_that_are_not_reentrant_change_nothing_and_reentrant_ones_are_refused(
    tiny: Tiny, cache_path: Path, tmp_path: Path
) -> None:
    from stages.student import StudentOptions, prepare, train

    path = student(tmp_path / "student", tiny.tokenizer)

    def run(name: str, **more: Any) -> dict[str, torch.Tensor]:
        trainer = {"max_steps": 2, "per_device_train_batch_size": 4, "dataloader_num_workers": 0, **more}
        train(prepare(StudentOptions(str(path), str(cache_path), str(tmp_path / name), trainer=trainer)))
        return weights(tmp_path / name)

    plain, saved = run("plain"), run("checkpoints", gradient_checkpointing=True)
    for name in plain:
        torch.testing.assert_close(saved[name], plain[name], atol=1e-5, rtol=1e-4)
    with pytest.raises(
        RunError, match="the router's loss has no gradient; with gradient checkpointing, set use_reentrant"
    ):
        run("reentrant", gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
