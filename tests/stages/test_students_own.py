"""What belongs to the student stays the student's: tokenizer, template, settings; and how long a text it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from stages.context import check_context
from stages.shard_dataset import sequence_lengths
from stages.student import StudentOptions, prepare, train
from storage.cache import Cache
from storage.errors import CacheError
from tests.conftest import VOCABULARY, Tiny, make_model

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def options(student: Path, cache: Path, output: Path, **more: Any) -> StudentOptions:
    trainer = {"max_steps": 1, "per_device_train_batch_size": 4, "dataloader_num_workers": 0, **more.pop("trainer", {})}
    return StudentOptions(str(student), str(cache), str(output), trainer=trainer, **more)


def test_its_tokenizer_and_added_tokens_are_saved(tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(tiny.tokenizer)
    own.add_tokens(["<tool>", "</tool>"], special_tokens=True)
    own.eos_token, own.chat_template = "</tool>", TEMPLATE
    make_model(tmp_path / "student", own, hidden=16, seed=1)
    train(prepare(options(tmp_path / "student", cache_path, tmp_path / "out")))
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.get_vocab() == own.get_vocab() and len(saved.encode("<tool>")) == 1
    assert (saved.eos_token, saved.chat_template) == ("</tool>", TEMPLATE)


def test_one_that_starts_from_a_configuration_gets_the_shards_tokenizer(
    tiny: Tiny, cache_path: Path, tmp_path: Path
) -> None:
    train(prepare(options(tiny.student / "config.json", cache_path, tmp_path / "out", init_from_config=True)))
    cached = AutoTokenizer.from_pretrained(tiny.tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == cached.get_vocab()


def test_a_template_that_it_lacks_comes_from_the_shards(tiny: Tiny, make_cache: Any, tmp_path: Path) -> None:
    chatty = AutoTokenizer.from_pretrained(tiny.tokenizer)
    chatty.chat_template = TEMPLATE
    make_model(tmp_path / "teacher", chatty)
    from stages.engines import EngineOptions

    cache = make_cache(tmp_path / "cache", engine=EngineOptions(str(tmp_path / "teacher"), "transformers"))
    prepared = prepare(options(tiny.student, cache.path, tmp_path / "out"))
    assert prepared.notes[0] == "the student's tokenizer has no chat template; that of the shards is saved with it"
    assert prepared.tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize("use_cache", [True, False])
def test_its_configuration_is_saved_as_it_was(use_cache: bool, tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(tiny.tokenizer)
    make_model(tmp_path / "student", own, hidden=16, seed=1, use_cache=use_cache)
    train(prepare(options(tmp_path / "student", cache_path, tmp_path / "out", trainer={"save_steps": 1})))
    before = AutoConfig.from_pretrained(tmp_path / "student").to_dict()
    for saved in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        after = AutoConfig.from_pretrained(saved).to_dict()
        assert after == {**before, "_name_or_path": after["_name_or_path"]} if "_name_or_path" in after else before
        assert after["use_cache"] is use_cache


def gpt2(context: int) -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=context, n_embd=16, n_layer=1, n_head=2))


def opt(context: int) -> Any:
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=VOCABULARY, max_position_embeddings=context, num_attention_heads=2, **sizes)
    return OPTForCausalLM(config)


@pytest.mark.parametrize("family", [gpt2, opt, None])
def test_a_context_that_is_too_short_is_refused_and_one_that_just_fits_trains(
    family: Any, tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    lengths = sequence_lengths(Cache.open(str(cache_path)))
    longest = int(lengths.max())
    own = AutoTokenizer.from_pretrained(tiny.tokenizer)
    for context in (longest - 1, longest):
        student = tmp_path / f"student-{context}"
        if family is None:
            make_model(student, own, hidden=16, max_position_embeddings=context)
        else:
            family(context).save_pretrained(student)
            own.save_pretrained(student)
    given = ("--shards", cache_path, "--max-steps", 40, "--batch-size", 8, "--trainer", "dataloader_num_workers=0")
    beyond = int((lengths >= longest).sum())
    refused = pipeline(
        "train-student", "--student", tmp_path / f"student-{longest - 1}", "--output", tmp_path / "a", *given
    )
    assert refused.code == 2 and not (tmp_path / "a").exists()
    assert f"reads at most {longest - 1} tokens, and {beyond} of {len(lengths)} sequences of" in refused.err
    assert f"{'is' if beyond == 1 else 'are'} longer, up to {longest};" in refused.err
    fits = pipeline("train-student", "--student", tmp_path / f"student-{longest}", "--output", tmp_path / "b", *given)
    assert fits.code == 0, fits.err


def test_a_student_that_states_no_context_reads_any_length(cache_path: Path) -> None:
    from transformers import BloomConfig, LlamaConfig

    cache = Cache.open(str(cache_path))
    check_context([cache], BloomConfig(), "bloom")
    stretched = LlamaConfig(max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "factor": 4.0})
    check_context([cache], stretched, "dynamic")
    with pytest.raises(CacheError, match="reads at most 64 tokens"):
        check_context([cache], LlamaConfig(max_position_embeddings=64), "llama")


# ---- numbers of a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps", [{"num_train_epochs": 1}, {"max_steps": 3, "eval_steps": 3}, {"max_steps": 3, "eval_steps": 2}]
)
def test_the_last_evaluation_is_made_once(
    steps: dict[str, Any], tiny: Tiny, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.training import DistillationTrainer

    at: list[int] = []
    loop = DistillationTrainer.evaluation_loop

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        at.append(self.state.global_step)
        return loop(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "evaluation_loop", counting)
    given = options(
        tiny.student, cache_path, tmp_path / "out", trainer={"max_steps": -1, "learning_rate": 1e-3, **steps}
    )
    report = train(prepare(given))
    assert at == sorted(set(at)) and at[-1] == report["steps"]
    logged = [entry for entry in report["log"] if "eval_kl" in entry][-1]
    assert logged["step"] == report["steps"] and logged["eval_kl"] == report["eval_kl"]


def test_measures_are_those_of_the_best_weights_where_these_are_saved(
    tiny: Tiny, cache_path: Path, tmp_path: Path
) -> None:
    # A rate so large that later steps are worse than the first.
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 4}
    report = train(prepare(options(tiny.student, cache_path, tmp_path / "out", trainer={"learning_rate": 0.3, **best})))
    logged = [entry["eval_loss"] for entry in report["log"] if "eval_loss" in entry]
    # The best is not the last, so its weights are evaluated once more.
    assert len(logged) == 5 and min(logged[:4]) < logged[3]
    again = make_trainer_of(tmp_path / "out", cache_path, tmp_path / "again")
    assert report["eval_cross_entropy"] == pytest.approx(min(logged), rel=1e-6)
    assert again.evaluate()["eval_cross_entropy"] == pytest.approx(report["eval_cross_entropy"], rel=1e-5)


def make_trainer_of(student: Path, cache: Path, output: Path) -> Any:
    from stages.student_trainer import make_trainer

    return make_trainer(prepare(options(student, cache, output)))


def test_metrics_are_json(tiny: Tiny, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages import evaluation

    real = evaluation.metrics
    monkeypatch.setattr(evaluation, "metrics", lambda *a: {**real(*a), f"{a[1]}_kl": float("nan")})
    report = train(prepare(options(tiny.student, cache_path, tmp_path / "out")))

    def refuse(text: str) -> None:
        raise AssertionError(text)

    saved = json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=refuse)
    assert saved["eval_kl"] is None and report["eval_kl"] is None
