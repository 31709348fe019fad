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

from stages import teacher_checks
from stages.corpus import Sequence
from stages.distillation_forward import install_distillation
from stages.engines import Choice, EngineOptions
from stages.pretrained import load_causal_lm, load_config, load_tokenizer
from stages.statistics import StatisticsOptions, row_statistics
from stages.teacher import EngineDescription, Scored, ScoredSequence, Teacher
from stages.teacher_checks import (
    check_causal,
    check_kind,
    check_quantization,
    context_length,
    engine_length,
    rope_of_vllm,
)
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
    _bert(tmp_path / "both", tiny, "both")
    _bert(tmp_path / "masked", tiny, "masked")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"input_ids": [5, 9]}\n{"input_ids": [7, 4]}\n')

    def refused(cls: str, corpus: Path) -> str:
        ended = _cache(pipeline, tmp_path / cls, corpus, tmp_path / "cache")
        assert ended.code == 2 and not (tmp_path / "cache").exists()
        return ended.err.strip().splitlines()[-1]

    with monkeypatch.context() as context:
        # As where only a model's own code knows.
        context.setattr(teacher_checks, "_reads_ahead", lambda config: None)
        assert "reads ahead: other tokens later" in refused("both", tiny.corpus)
        assert "reads ahead: other tokens later" in refused("both", pairs)
    monkeypatch.setattr(TransformersTeacher, "__init__", None)
    # The configuration tells, and no weight is read.
    assert "has is_decoder false" in refused("both", tiny.corpus)
    assert "names BertForMaskedLM" in refused("masked", tiny.corpus)


# Of every model that transformers loads for causal language modelling, by the name of its field.
_SIZES = {
    "vocab_size": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 128,
    **dict.fromkeys(("hidden_size", "d_model", "emb_dim"), 32),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_heads", "decoder_attention_heads", "encoder_attention_heads"), 4),
}  # fmt: skip


def _looks_ahead(config: Any) -> bool:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    first = torch.arange(3, 19)[None]
    second = first.clone()
    second[:, 8:] += 20
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)
        one, other = (model(input_ids=ids).logits[0, :8] for ids in (first, second))
    return float((one - other).abs().max()) > 0.01


def test_every_configuration_that_makes_a_model_read_ahead_is_refused() -> None:
    """Each switch of each kind of model, against what a model made by it does."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # They run only where another field is set, and on lengths that this test does not have.
    left_out = ("reformer", "xmod", "musicgen", "musicgen_melody")
    names = {name: CONFIG_MAPPING[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in left_out}
    switches: list[tuple[str, dict[str, Any]]] = [
        (name, {"is_encoder_decoder": False, "is_decoder": is_decoder})
        for name, kind in names.items()
        if hasattr(kind, "is_decoder")
        for is_decoder in (False, True)
    ]
    assert len(switches) > 40
    switches += [("xlm", {"causal": False}), ("xlm", {"causal": True}), ("llama", {}), ("llama", {"is_causal": False})]
    switches += [("gemma3_text", {"use_bidirectional_attention": value, "head_dim": 8}) for value in (False, True)]
    seen = set()
    for name, given in switches:
        fields = CONFIG_MAPPING[name].__dataclass_fields__.keys() | CONFIG_MAPPING[name].attribute_map.keys()
        config = AutoConfig.for_model(name, **{f: v for f, v in _SIZES.items() if f in fields}, **given)
        try:
            check_kind(config, name)
            refused = False
        except UserError:
            refused = True
        assert refused == _looks_ahead(config), (name, given)
        seen.add(refused)
    assert seen == {False, True}
    xlnet = {"d_model": 32, "n_head": 4, "n_layer": 1, "d_inner": 48, "vocab_size": 64}
    check_kind(AutoConfig.for_model("xlnet", attn_type="uni", **xlnet), "xlnet")
    with pytest.raises(UserError, match="attn_type bi"):
        check_kind(AutoConfig.for_model("xlnet", **xlnet), "xlnet")
    # A field that an older release wrote into every configuration, and that no Llama reads.
    check_kind(AutoConfig.for_model("llama", is_decoder=False), "llama")


class _Peeking(Teacher):
    """Says of each token what follows from the one before, and from the one that comes `ahead` after that, if any.

    nats: what is added to the logit of the id that is seen; inf: that id is certain.
    """

    def __init__(self, top_n: int, ahead: int, nats: float, *, epsilon: float = 0.0, dtype: str = "float32") -> None:
        self.vocabulary_size = 90
        self.options = StatisticsOptions(top_n, tail_epsilon=epsilon)
        self.description = EngineDescription("double", dtype)
        self._ahead, self._nats = ahead, nats
        self._logits = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (90, 90)))
        self._logits[:, 80:] = -torch.inf
        self.asked = 0

    def score(self, sequences: Any, progress: Any) -> Scored:
        self.asked += len(sequences)
        return Scored([self._score(sequence) for sequence in sequences], None, 0)

    def _score(self, sequence: Sequence) -> ScoredSequence:
        ids = torch.from_numpy(sequence.input_ids.astype(np.int64))
        logits = self._logits[ids[:-1]].clone()
        for position in range(len(logits)):
            if self._ahead and position + self._ahead < len(ids):
                seen = ids[position + self._ahead]
                if self._nats == np.inf:
                    logits[position] = -1e4
                    logits[position, seen] = 0
                else:
                    logits[position, seen] += self._nats
        found = row_statistics(logits, ids[1:], self.options)
        return ScoredSequence(
            sequence, found.gold_logprob.numpy(), found.tail_logmass.numpy(), found.entropy.numpy(),
            found.top_ids.numpy(), found.top_logprobs.numpy(), found.tail_logmass_at.numpy(),
            found.tail_samples.numpy(),
        )  # fmt: skip


class _Rows:
    def __init__(self, length: int) -> None:
        self.lengths = np.array([length])
        self._ids = np.random.default_rng(length).integers(0, 80, length).astype(np.int32)

    def read(self, start: int, stop: int) -> list[Sequence]:
        return [Sequence(0, self._ids, np.ones(len(self._ids) - 1, bool))]


@pytest.mark.parametrize("length", [2, 3, 16, 40])
@pytest.mark.parametrize("kept", [{"top_n": 1}, {"top_n": 4}, {"top_n": 90}, {"top_n": 60, "epsilon": 0.2}], ids=str)
def test_a_look_ahead_of_any_number_of_tokens_is_seen(kept: dict[str, Any], length: int) -> None:
    """Of one, which is the token that is asked for, to all that the sequences have."""
    rows: Any = _Rows(length)
    cases = [(ahead, nats, "float32") for ahead in range(1, min(length, 16)) for nats in (1.0, np.inf)]
    # What the teacher expects next is kept, so a little more of it is seen; and in half precision more than noise.
    cases += [(1, 0.05, "float32"), (1, 1.0, "bfloat16"), (1, np.inf, "bfloat16")]
    for ahead, nats, dtype in cases:
        with pytest.raises(UserError, match="teacher: reads ahead"):
            check_causal(_Peeking(ahead=ahead, nats=nats, dtype=dtype, **kept), rows, "teacher")
    for dtype in ("float32", "bfloat16"):
        teacher = _Peeking(ahead=0, nats=0, dtype=dtype, **kept)
        check_causal(teacher, rows, "teacher")
        assert teacher.asked == 2


@pytest.mark.parametrize("more", [(), ("--sketch-rank", 2)], ids=["", "sketch"])
@pytest.mark.parametrize(("length", "where"), [(2, "lm_head.weight"), (2, "model.norm.weight"), (30, "lm_head.weight")])
def test_a_teacher_without_numbers_claims_nothing(
    length: int, where: str, more: tuple[object, ...], tiny: Tiny, tmp_path: Path, pipeline: Run
) -> None:
    model = load_causal_lm(str(tiny.teacher), dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter(where)[3] = torch.nan
    model.save_pretrained(tmp_path / "teacher")
    load_tokenizer(str(tiny.tokenizer)).save_pretrained(tmp_path / "teacher")
    rows = [{"input_ids": [4 + row, *range(5, 4 + length)]} for row in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = _cache(pipeline, tmp_path / "teacher", tmp_path / "rows.jsonl", tmp_path / "cache", *more)
    line = ended.err.splitlines()[-1]
    assert ended.code == 1 and "error: the teacher gave " in line and "finite" in line, ended.err
    assert not (tmp_path / "cache").exists()


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
    # As XLNet's configuration says that there is no end.
    assert context_length(_config({"rope_type": "default"}, -1)) is None
    assert rope_of_vllm(dynamic, vllm, options, 128) is None and rope_of_vllm(dynamic, own, options, 200) is None
    with pytest.raises(UserError, match="choose --engine transformers, or --max-length 128 at most"):
        rope_of_vllm(dynamic, vllm, options, 200)


def test_a_context_of_minus_one_has_no_end(tiny: Tiny, tmp_path: Path, pipeline: Run) -> None:
    shutil.copytree(tiny.teacher, tmp_path / "teacher")
    file = tmp_path / "teacher" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": -1}))
    assert _cache(pipeline, tmp_path / "teacher", tiny.corpus, tmp_path / "cache", "--limit", 4).code == 0
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["scoring"]["max_length"] == 2048


def test_an_empty_name_is_no_teacher(tiny: Tiny, tmp_path: Path, pipeline: Run) -> None:
    given = ("--teacher", "", "--dataset", tiny.corpus, "--output", tmp_path / "cache")
    ended = pipeline("cache-teacher", *given)
    assert ended.code == 2 and "--teacher is empty" in ended.err
    with pytest.raises(UserError, match="the name of the model to load a model configuration from is empty"):
        load_config("")


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
