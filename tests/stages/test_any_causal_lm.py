"""Every causal LM class of transformers: its head is cut, full logits are taken with a line on it, or it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from benchmarks.shrunk_models import LEFT_OUT, families, shrunk_model
from benchmarks.sweep_models import CUT, REFUSED, as_student, as_teacher
from stages.causal_lm import BodyAndHead, FullLogits, evaluating, take_apart
from stages.distillation_forward import install_distillation
from storage.errors import RunError, UserError
from tests.conftest import VOCABULARY, Tiny

# What is not cut, as student and as teacher, and why.
OTHERS = {
    "cpmant": (REFUSED, REFUSED, "reads ahead"),
    "emu3": (CUT, REFUSED, "no causal language model can be loaded"),
    "mllama": (CUT, REFUSED, "no causal language model can be loaded"),
    # Neither can be cut: it computes its positions from the length of the whole batch.
    "prophetnet": (REFUSED, REFUSED, "batch"),
    "reformer": (REFUSED, REFUSED, ""),
    "xlm": (REFUSED, REFUSED, "reads ahead"),
    "xlnet": (REFUSED, REFUSED, "reads ahead"),
}


@pytest.mark.parametrize("family", families())
def test_every_family(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    try:
        student, teacher = shrunk_model(family), shrunk_model(family)
    except Exception as error:  # noqa: BLE001 - a family that this table does not know yet
        pytest.skip(f"{LEFT_OUT.get(family) or error}")
    teacher.save_pretrained(tmp_path)
    found = as_student(student), as_teacher(tmp_path)
    *outcomes, said = OTHERS.get(family, (CUT, CUT, ""))
    assert [outcome for outcome, _ in found] == outcomes, found
    assert all(said in text for (outcome, text) in found if outcome != CUT), found


def test_most_families_are_built() -> None:
    assert len(families()) - len(LEFT_OUT) >= 150


def test_one_that_cannot_be_cut_trains_on_full_logits_with_a_line(
    tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same student, cut and whole, learns the same."""
    given = (
        "--student",
        tiny.student,
        "--shards",
        cache_path,
        "--max-steps",
        3,
        "--trainer",
        "dataloader_num_workers=0",
    )
    cut = pipeline("train-student", *given, "--output", tmp_path / "cut")
    assert cut.code == 0 and "full logits" not in cut.err

    def no(self: Any, *args: Any) -> None:
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(BodyAndHead, "check", no)
    whole = pipeline("train-student", *given, "--output", tmp_path / "whole")
    assert whole.code == 0
    line = "LlamaForCausalLM is not cut into body and head (tuple index out of range): it computes full logits, which"
    assert whole.err.count(line) == 1
    from transformers import AutoModelForCausalLM

    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("cut", "whole"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=0)


def test_a_teacher_that_cannot_be_cut_says_so_and_scores_the_same(
    tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from storage.cache import Cache

    given = ("--teacher", tiny.teacher, "--dataset", tiny.corpus, "--engine", "transformers", "--limit", 8)
    assert pipeline("cache-teacher", *given, "--output", tmp_path / "cut").code == 0

    def no(self: Any, *args: Any) -> None:
        raise AttributeError("no attribute decoder")

    monkeypatch.setattr(BodyAndHead, "check", no)
    whole = pipeline("cache-teacher", *given, "--output", tmp_path / "whole")
    assert whole.code == 0
    assert whole.err.count("engine: LlamaForCausalLM is not cut into body and head (no attribute decoder): it") == 1
    one, two = (next(iter(Cache.open(str(tmp_path / n)).column("gold_logprob"))) for n in ("cut", "whole"))
    np.testing.assert_allclose(one["gold_logprob"].values, two["gold_logprob"].values, atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "gpt2", "bart", "xglm"])
def test_dropout_does_not_hide_the_head(family: str) -> None:
    """As with --init-from-config, where a model comes in training mode."""
    model = shrunk_model(family).train()
    list(model.modules())[3].eval()
    training = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    assert isinstance(take_apart(model), BodyAndHead)
    assert install_distillation(model).note is None
    assert [module.training for module in model.modules()] == training and not all(training)
    # Nothing of the run's randomness is used up.
    assert torch.equal(torch.random.get_rng_state(), state)


def test_buffers_and_gradients_stay_as_they_were() -> None:
    model = shrunk_model("llama").train()
    norm = nn.BatchNorm1d(32)
    model.model.norm = nn.Sequential(model.model.norm, Transposed(norm))
    before = copy.deepcopy(dict(model.named_buffers()))
    with pytest.raises(UserError):
        install_distillation(model.train())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


class Transposed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden.transpose(1, 2)).transpose(1, 2) + hidden.mean((0, 1))


def refused(model: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        install_distillation(model)
    assert "\n" not in str(raised.value)


class MixesRows(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + hidden.mean(0, keepdim=True)


class Fails(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise NotImplementedError("no backward kernel")
        return hidden


class SpoilsLater(nn.Module):
    """NaN from an id on, whatever comes after it: no sign of reading ahead."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(hidden.shape[1])[None, :, None] > 5, torch.nan, hidden)


def test_students_that_cannot_be_trained_are_refused_in_a_sentence() -> None:
    for module, sentence in [
        (MixesRows(), "LlamaForCausalLM says something else of a sequence beside others"),
        (Fails(), r"LlamaForCausalLM cannot be trained here \(no backward kernel\)"),
    ]:
        model = shrunk_model("llama")
        model.model.norm = nn.Sequential(model.model.norm, module)
        refused(model, sentence)
    frozen = shrunk_model("llama").requires_grad_(False)
    refused(frozen, "LlamaForCausalLM cannot be trained here")


def test_numbers_that_are_none_are_not_called_reading_ahead() -> None:
    model = shrunk_model("llama")
    model.model.norm = nn.Sequential(model.model.norm, SpoilsLater())
    install_distillation(model)


def test_a_head_whose_parameters_went_elsewhere_is_refused_where_it_is_used() -> None:
    """As FSDP does with use_orig_params=false: plain tensors stand where parameters were."""
    model = shrunk_model("llama", tie_word_embeddings=False)
    install_distillation(model)
    head = model.get_output_embeddings()
    flat = head.weight.detach().clone()
    del head._parameters["weight"]
    head.weight = flat
    with pytest.raises(RunError, match="head has no parameters where it is computed, so it would not be trained"):
        model(distillation=lambda *args: None, input_ids=torch.arange(6)[None], rows=torch.tensor([1]))


def test_full_logits_are_the_models_own() -> None:
    model = shrunk_model("gpt2")
    whole = FullLogits(model, "no reason")
    ids = torch.arange(12).view(2, 6)
    with evaluating(model):
        torch.testing.assert_close(whole.head(whole.body(ids)), model(input_ids=ids).logits)
    assert whole.linear_head is None and whole.head_parameters == []


def test_opt_and_bart_train_through_the_command(
    tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    for family in ("opt", "bart", "mbart", "xglm"):
        model = shrunk_model(family, vocab_size=VOCABULARY, max_position_embeddings=128)
        model.save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        ended = pipeline(
            "train-student", "--student", tmp_path / family, "--shards", cache_path, "--max-steps", 2,
            "--output", tmp_path / f"o-{family}", "--trainer", "dataloader_num_workers=0",
        )  # fmt: skip
        assert ended.code == 0, ended.err
        assert "full logits" not in ended.err
