"""What cannot be a teacher, and what a teacher cannot read: refused in one sentence, with nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.distillation_forward import install_distillation
from stages.engines import Choice, EngineOptions
from stages.pretrained import load_tokenizer
from stages.teacher_checks import check_quantization, context_length, engine_length, rope_of_vllm
from stages.teacher_transformers import TransformersTeacher
from storage.errors import UserError
from tests.conftest import VOCABULARY, Finished, Tiny

Run = Callable[..., Finished]


def _cache(pipeline: Run, teacher: Path, dataset: Path, output: Path, *more: object) -> Finished:
    given = ("--teacher", teacher, "--dataset", dataset, "--output", output, "--engine", "transformers")
    return pipeline("cache-teacher", *given, "--processes", 1, *more)


# Ids beyond the head --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A teacher whose tokenizer has one token more than its head, and that token's id."""
    path = tmp_path_factory.mktemp("narrow")
    shutil.copytree(tiny.teacher, path, dirs_exist_ok=True)
    tokenizer = load_tokenizer(str(path))
    tokenizer.add_tokens([f"<extra{i}>" for i in range(VOCABULARY + 1 - len(tokenizer))])
    tokenizer.save_pretrained(path)
    return path, len(tokenizer) - 1


@pytest.mark.parametrize("kind", ["text", "completion", "messages", "tokens", "turns"])
def test_an_id_beyond_the_head_is_refused_by_row(
    kind: str, narrow: tuple[Path, int], tmp_path: Path, pipeline: Run
) -> None:
    teacher, beyond = narrow
    assert beyond == VOCABULARY
    token = load_tokenizer(str(teacher)).convert_ids_to_tokens(beyond)
    more: list[object] = []
    if kind in ("messages", "turns"):
        path = tmp_path / "teacher"
        shutil.copytree(teacher, path)
        template = (
            "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        (path / "chat_template.jinja").write_text(template)
        teacher = path
        more = ["--turns", "each"] if kind == "turns" else []
    rows: dict[str, Callable[[str], dict[str, Any]]] = {
        "text": lambda text: {"text": text},
        "completion": lambda text: {"prompt": text, "completion": "an answer"},
        "messages": lambda text: {
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]
        },
        "tokens": lambda text: {"input_ids": [4, beyond if token in text else 5, 6]},
    }
    row = rows["messages" if kind == "turns" else kind]
    texts = ["one two", "three", f"four {token} five", "six"]
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(json.dumps(row(text)) + "\n" for text in texts))
    ended = _cache(pipeline, teacher, dataset, tmp_path / "cache", *more)
    assert ended.code == 2
    line = ended.err.strip().splitlines()[-1]
    assert f"{token!r} in row 3 of {dataset} has id {beyond}" in line and f"below {VOCABULARY}" in line
    assert not (tmp_path / "cache").exists()


def test_an_id_beyond_the_head_that_is_cut_off_does_no_harm(
    narrow: tuple[Path, int], tmp_path: Path, pipeline: Run
) -> None:
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text(json.dumps({"input_ids": [4, 5, 6, 7, narrow[1]]}))
    assert _cache(pipeline, narrow[0], dataset, tmp_path / "cache", "--max-length", 4).code == 0
    assert _cache(pipeline, narrow[0], dataset, tmp_path / "other", "--max-length", 4, "--overlong", "split").code == 2


# Tokenizers that draw -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.2, 0.01, 1e-6])
def test_bpe_dropout_is_refused(dropout: float, tiny: Tiny, tmp_path: Path, pipeline: Run) -> None:
    shutil.copytree(tiny.teacher, tmp_path / "teacher")
    file = tmp_path / "teacher" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["dropout"] = dropout
    file.write_text(json.dumps(content))
    ended = _cache(pipeline, tmp_path / "teacher", tiny.corpus, tmp_path / "cache")
    assert ended.code == 2 and "set dropout to null in its tokenizer.json" in ended.err
    assert not (tmp_path / "cache").exists()
    content["model"]["dropout"] = 0.0
    file.write_text(json.dumps(content))
    load_tokenizer(str(tmp_path / "teacher"))


def test_sentencepiece_sampling_is_refused(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog again and again\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=60, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "text.txt").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip_text_model"}))
    config: dict[str, Any] = {"tokenizer_class": "SiglipTokenizer", "unk_token": "<unk>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    load_tokenizer(str(tmp_path))
    config["sp_model_kwargs"] = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="remove enable_sampling"):
        load_tokenizer(str(tmp_path))


def test_any_other_tokenizer_that_draws_is_found_by_asking(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that leaves out a merge at a token in a thousand, and says so nowhere."""
    from transformers import PreTrainedTokenizerFast

    random, own = np.random.default_rng(0), PreTrainedTokenizerFast._encode_plus

    def drawing(self: Any, *arguments: Any, **more: Any) -> Any:
        found = own(self, *arguments, **more)
        ids = found["input_ids"]
        if ids and isinstance(ids[0], int):
            found["input_ids"] = [id + int(random.random() < 1e-3) for id in ids]
        return found

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", drawing)
    with pytest.raises(UserError, match="gives the same text other token ids each time"):
        load_tokenizer(str(tiny.tokenizer))


# Models that do not predict the next token ----------------------------------------------------------------------------


def _bert(path: Path, tiny: Tiny, cls: str) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128, is_decoder=cls == "decoder",
    )  # fmt: skip
    model = (transformers.BertForMaskedLM if cls == "masked" else transformers.BertLMHeadModel)(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)
    model.save_pretrained(path)
    load_tokenizer(str(tiny.tokenizer)).save_pretrained(path)


def test_a_model_that_reads_both_directions_is_refused(
    tiny: Tiny, tmp_path: Path, pipeline: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(cls: str) -> str:
        _bert(tmp_path / cls, tiny, cls)
        ended = _cache(pipeline, tmp_path / cls, tiny.corpus, tmp_path / "cache")
        assert ended.code == 2 and not (tmp_path / "cache").exists()
        return ended.err.strip().splitlines()[-1]

    assert "reads ahead" in refused("both")
    monkeypatch.setattr(TransformersTeacher, "__init__", None)
    # The configuration tells, and no weight is read.
    assert "names BertForMaskedLM" in refused("masked")


def test_the_same_model_as_a_decoder_is_a_teacher(tiny: Tiny, tmp_path: Path, pipeline: Run) -> None:
    _bert(tmp_path / "teacher", tiny, "decoder")
    assert _cache(pipeline, tmp_path / "teacher", tiny.corpus, tmp_path / "cache", "--limit", 4).code == 0


def test_an_encoder_decoder_model_is_refused(tiny: Tiny, tmp_path: Path, pipeline: Run) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    size = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**size)).save_pretrained(tmp_path / "teacher")
    load_tokenizer(str(tiny.tokenizer)).save_pretrained(tmp_path / "teacher")
    ended = _cache(pipeline, tmp_path / "teacher", tiny.corpus, tmp_path / "cache")
    assert ended.code == 2 and "is an encoder-decoder model" in ended.err


def test_scores_that_depend_on_the_batch_are_refused(
    tiny: Tiny, tmp_path: Path, pipeline: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model's own code may do; here every state moves with the width of the batch."""
    hidden = TransformersTeacher._hidden

    def moved(self: TransformersTeacher, batch: Any) -> Any:
        states, rows = hidden(self, batch)
        return states * (1 + max(len(s.input_ids) for s in batch) / 100), rows

    monkeypatch.setattr(TransformersTeacher, "_hidden", moved)
    ended = _cache(pipeline, tiny.teacher, tiny.corpus, tmp_path / "cache", "--limit", 8)
    assert ended.code == 2 and "with the other sequences of its batch; lower --batch-tokens to 2" in ended.err
    assert not (tmp_path / "cache").exists()
    assert _cache(pipeline, tiny.teacher, tiny.corpus, tmp_path / "cache", "--limit", 8, "--batch-tokens", 2).code == 0


def test_a_student_that_reads_ahead_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _bert(tmp_path, tiny, "both")
    with pytest.raises(UserError, match="a student must be a causal language model"):
        install_distillation(AutoModelForCausalLM.from_pretrained(tmp_path))


# Rope and engines -----------------------------------------------------------------------------------------------------


def _config(rope: dict[str, Any], context: int = 128) -> Any:
    from transformers import LlamaConfig

    size = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": context}
    return LlamaConfig(**size, rope_parameters={"rope_theta": 1e4, **rope})


def test_what_vllm_does_with_such_rope_is_said() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    long = _config({**rope, "original_max_position_embeddings": 64})
    vllm, stock, own = (Choice(name, "") for name in ("vllm", "vllm-prompt-logprobs", "transformers"))
    options = EngineOptions("teacher")
    assert "up to 100 tokens, more than 64" in (rope_of_vllm(long, vllm, options, 100) or "")
    # The engine that completes takes one id more.
    assert rope_of_vllm(long, vllm, options, 64) is None and rope_of_vllm(long, stock, options, 64) is not None
    given = EngineOptions("teacher", vllm_args={"max_model_len": "128"})
    assert rope_of_vllm(long, vllm, given, 64) is not None
    assert rope_of_vllm(long, own, options, 100) is None
    # The same for every part of a corpus and for an audit, whatever sequences they hold.
    assert engine_length(long, 20, 100) == 100 and engine_length(_config({"rope_type": "default"}), 20, 100) == 20

    dynamic = _config({"rope_type": "dynamic", "factor": 4.0})
    assert context_length(dynamic) == 512 and context_length(long) == 128
    assert rope_of_vllm(dynamic, vllm, options, 128) is None and rope_of_vllm(dynamic, own, options, 200) is None
    with pytest.raises(UserError, match="choose --engine transformers, or --max-length 128 at most"):
        rope_of_vllm(dynamic, vllm, options, 200)


@pytest.mark.parametrize(
    ("method", "package"), [("gptq", "optimum"), ("bitsandbytes", "bitsandbytes"), ("aqlm", "aqlm"), ("later", "later")]
)
def test_a_quantised_checkpoint_names_what_it_needs(method: str, package: str) -> None:
    from transformers import LlamaConfig

    given = {"quant_method": method, "bits": 4, "load_in_4bit": True} if method == "bitsandbytes" else {
        "quant_method": method, "bits": 4, "group_size": 32
    }  # fmt: skip
    with pytest.raises(UserError, match=f"weights are quantised .*{package}.*choose --engine vllm"):
        check_quantization(LlamaConfig(quantization_config=given), "teacher")
