"""Forms in which teachers come: GGUF files, Mistral's own tokenizers, models that also take images, odd bodies."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.corpus import Sequence
from stages.identity import teacher_identity, tokenizer_identity
from stages.pretrained import load_causal_lm, load_config, load_tokenizer
from stages.statistics import StatisticsOptions
from stages.teacher_transformers import TransformersTeacher
from stages.vllm_engine import check_serves
from storage.errors import UserError
from tests.conftest import VOCABULARY, Finished, Tiny

# GGUF -----------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, source: Path, *, quantized: bool = False) -> None:
    """Write a tiny Llama of `source` and its byte-level tokenizer as one GGUF file."""
    gguf = pytest.importorskip("gguf")
    config = load_config(str(source))
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    tokens += [f"[PAD{index}]" for index in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in load_causal_lm(str(source), dtype=torch.float32).state_dict().items():
        stem, values = name.removesuffix(".weight"), tensor.numpy()
        if stem in whole:
            target = whole[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            target = f"blk.{layer}.{parts[part]}"
        if heads := {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(target[6:]):
            # The file keeps the two halves of a rotated pair side by side.
            values = values.reshape(heads, 2, len(values) // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        values = np.ascontiguousarray(values)
        kind = gguf.GGMLQuantizationType.Q8_0
        if quantized and values.ndim == 2:
            writer.add_tensor(f"{target}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{target}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("quantized", [False, True])
def test_a_gguf_file_is_a_teacher(
    quantized: bool, tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Finished]
) -> None:
    from storage.cache import Cache

    (tmp_path / "models").mkdir()
    # The ending is as good in capitals.
    file = tmp_path / "models" / ("tiny.GGUF" if quantized else "tiny.gguf")
    write_gguf(file, tiny.teacher, quantized=quantized)
    given = ("--dataset", tiny.corpus, "--top-n", 8, "--processes", 1, "--limit", 8)
    # The file, the directory that holds nothing else, and the model that it was made from.
    for name, teacher in {"file": file, "folder": file.parent, "hf": tiny.teacher}.items():
        engine = ("--engine", "transformers" if name == "hf" else "auto")
        ended = pipeline("cache-teacher", "--teacher", teacher, "--output", tmp_path / name, *engine, *given)
        assert ended.code == 0, ended.err
    caches = {name: Cache.open(str(tmp_path / name)) for name in ("file", "folder", "hf")}
    found = {name: cache.read_shard(0) for name, cache in caches.items()}
    for name in ("file", "folder"):
        assert np.array_equal(found[name]["input_ids"].values, found["hf"]["input_ids"].values)
        error = np.abs(found[name]["gold_logprob"].values - found["hf"]["gold_logprob"].values).max()
        # 8 bits a weight: near, and not the same.
        assert (1e-4 < error < 0.5) if quantized else error < 1e-5
    assert {cache.manifest.teacher.architecture for cache in caches.values()} == {"LlamaForCausalLM"}
    assert caches["file"].manifest.teacher.name == file.name and caches["folder"].manifest.teacher.name == "models"
    assert caches["file"].manifest.teacher.weights == caches["folder"].manifest.teacher.weights
    audit = pipeline("audit", tmp_path / "file", "--teacher", file, "--engine", "transformers")
    assert audit.code == 0 and "the cache is what this teacher says" in audit.out


def test_other_weights_of_the_same_name_are_another_teacher(tiny: Tiny, tmp_path: Path) -> None:
    identities = []
    for folder, source in (("a", tiny.teacher), ("b", tiny.teacher), ("c", tiny.student)):
        (tmp_path / folder).mkdir()
        write_gguf(tmp_path / folder / "tiny.gguf", source)
        file = str(tmp_path / folder / "tiny.gguf")
        identities.append(teacher_identity(file, load_config(file)))
    assert identities[0] == identities[1] != identities[2] and identities[0].weights != identities[2].weights


def test_what_a_gguf_file_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    for name in ("a.gguf", "b.gguf", "c-00001-of-00002.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match="holds 3 GGUF files; name one of them"):
        load_config(str(tmp_path))
    with pytest.raises(UserError, match="part of a split GGUF file"):
        load_config(str(tmp_path / "c-00001-of-00002.gguf"))
    with pytest.raises(UserError, match="no model configuration can be loaded from this file"):
        load_config(str(tmp_path / "a.gguf"))
    with pytest.raises(UserError, match="vLLM does not read GGUF files; choose --engine transformers"):
        check_serves(str(tmp_path / "a.gguf"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'teacher-logit-cache\[gguf\]'"):
        load_config(str(tmp_path / "a.gguf"))


# Mistral's own tokenizer ----------------------------------------------------------------------------------------------

SPECIALS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
            "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]  # fmt: skip


def write_tekken(folder: Path) -> None:
    """Write a `tekken.json` of bytes and a few words, and a configuration of a Mistral model."""
    tokens = [bytes([value]) for value in range(256)]
    tokens += [word.encode() for word in ("th", "the", " th", " the", "in", "on", "se", "sel", "self")]
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    size = len(tokens) + len(SPECIALS)
    content = {
        "config": {
            "pattern": pattern, "num_vocab_tokens": len(tokens), "default_vocab_size": size,
            "default_num_special_tokens": len(SPECIALS), "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(tokens)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(SPECIALS)
        ],
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "vocab_size": size}))


def test_a_tekken_file_beside_a_usual_tokenizer_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    write_tekken(tmp_path / "mistral")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.tokenizer / file, tmp_path / "mistral")
    usual = load_tokenizer(str(tiny.tokenizer))
    assert tokenizer_identity(load_tokenizer(str(tmp_path / "mistral"))) == tokenizer_identity(usual)


def test_a_tekken_file_alone_is_a_whole_tokenizer(tmp_path: Path) -> None:
    write_tekken(tmp_path / "mistral")
    tokenizer = load_tokenizer(str(tmp_path / "mistral"))
    # Ids of mistral-common: special tokens first, then each token by its rank.
    ids = tokenizer("the self in")["input_ids"]
    offset = len(SPECIALS)
    assert ids == [1, offset + 257, offset + 32, offset + 264, offset + 32, offset + 260]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<s>", "</s>", 2)
    try:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    except ImportError:
        pass
    else:
        theirs = Tekkenizer.from_file(str(tmp_path / "mistral" / "tekken.json"))
        for text in ("the self in", "a\n\n b  the 12 é"):
            assert tokenizer(text)["input_ids"] == theirs.encode(text, bos=True, eos=False)
        assert "[INST]" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    # A cache keeps its own copy, which is the same tokenizer.
    tokenizer.save_pretrained(tmp_path / "copy")
    assert tokenizer_identity(load_tokenizer(str(tmp_path / "copy"))) == tokenizer_identity(tokenizer)


# Models ---------------------------------------------------------------------------------------------------------------

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
PLACES = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}


def _model(name: str) -> Any:
    import transformers

    if name == "Mistral3ForConditionalGeneration":
        config: Any = transformers.Mistral3Config(
            text_config={"model_type": "mistral", "head_dim": 8, **SHAPE},
            vision_config={"model_type": "pixtral", **VISION}, image_token_index=5,
        )  # fmt: skip
    elif name == "Qwen2_5_VLForConditionalGeneration":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
        config = transformers.Qwen2_5_VLConfig(
            text_config={**SHAPE, "rope_parameters": rope}, vision_config={**vision, "patch_size": 8}, **PLACES
        )
    elif name == "Gemma3ForConditionalGeneration":
        config = transformers.Gemma3Config(
            text_config={**SHAPE, "head_dim": 8, "sliding_window": 16},
            vision_config={**VISION, "vision_use_head": False}, mm_tokens_per_image=4, image_token_index=5,
        )  # fmt: skip
    elif name == "Llama4ForConditionalGeneration":
        experts = {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
        out = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 32}
        config = transformers.Llama4Config(
            text_config={**SHAPE, **experts}, vision_config={**VISION, **out}, image_token_index=5
        )
    elif name == "OPTForCausalLM":
        size = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
        config = transformers.OPTConfig(
            **size, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16, do_layer_norm_before=False
        )
    elif name == "ElectraForCausalLM":
        # Narrower embeddings, and so a projection between body and output layer.
        size = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
        config = transformers.ElectraConfig(**size, embedding_size=16, is_decoder=True)
    elif name == "RemBertForCausalLM":
        size = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
        config = transformers.RemBertConfig(**size, input_embedding_size=16, output_embedding_size=24, is_decoder=True)
    else:
        config = transformers.BartConfig(
            vocab_size=97, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
            max_position_embeddings=64, is_decoder=True, is_encoder_decoder=False,
        )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(6)
    return model


@pytest.mark.parametrize(
    "name",
    [
        "Mistral3ForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
        "Llama4ForConditionalGeneration",
        "OPTForCausalLM",
        "BartForCausalLM",
        "ElectraForCausalLM",
        "RemBertForCausalLM",
    ],
)
def test_a_teacher_scores_text_as_the_whole_model_does(name: str, tmp_path: Path) -> None:
    model = _model(name)
    model.save_pretrained(tmp_path)
    teacher = TransformersTeacher(str(tmp_path), StatisticsOptions(4), device="cpu")
    assert teacher.vocabulary_size == 97 == load_config(str(tmp_path)).get_text_config().vocab_size
    random = np.random.default_rng(1)
    sequences = [
        Sequence(i, random.integers(9, 97, length).astype(np.int32), np.ones(length - 1, bool))
        for i, length in enumerate((12, 30, 7))
    ]
    for scored in teacher.score(sequences, lambda tokens: None).sequences:
        ids = torch.from_numpy(scored.sequence.input_ids.astype(np.int64))
        with torch.no_grad():
            logprobs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        np.testing.assert_allclose(scored.gold_logprob, logprobs.gather(1, ids[1:, None])[:, 0], atol=1e-5)


def test_a_projection_is_computed_in_float32_too(tmp_path: Path) -> None:
    """All that lies behind the body: the same states give the same logits to float32's precision."""
    model = _model("ElectraForCausalLM")
    model.save_pretrained(tmp_path)
    teacher = TransformersTeacher(str(tmp_path), StatisticsOptions(4), dtype="bfloat16", device="cpu")
    assert teacher.notes == ()
    half = model.to(torch.bfloat16)
    ids = torch.arange(9, 21)[None]
    states = teacher._parts.body(ids)[0]
    projected = half.generator_predictions.float()(states.float())
    expected = half.generator_lm_head.float()(projected)
    torch.testing.assert_close(teacher._parts.head(states), expected, atol=1e-5, rtol=1e-5)


def test_ids_beyond_the_head_are_no_crash(tiny: Tiny) -> None:
    teacher = TransformersTeacher(str(tiny.teacher), StatisticsOptions(4), device="cpu")
    beyond = Sequence(3, np.array([1, VOCABULARY], np.int32), np.ones(1, bool))
    with pytest.raises(UserError, match=f"sequence 3 holds id {VOCABULARY}"):
        teacher.score([beyond], lambda tokens: None)


def test_a_quantised_checkpoint_is_a_teacher(tiny: Tiny, tmp_path: Path) -> None:
    """Eight bits a weight, packed: the scores are those of the weights that the bits stand for."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny.teacher, tmp_path, dirs_exist_ok=True)
    model = load_causal_lm(str(tiny.teacher), dtype=torch.float32)
    packed, plain = {}, dict(model.state_dict())
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        if "proj" not in name:
            packed[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127
        whole = (weight / scale).round()
        packed[f"{name}_packed"] = helpers.pack_to_int32(whole.to(torch.int8), 8)
        packed[f"{name}_shape"], packed[f"{name}_scale"] = torch.tensor(whole.shape), scale
        plain[name] = whole * scale
    save_file(packed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher = TransformersTeacher(str(tmp_path), StatisticsOptions(4), device="cpu")
    ids = torch.arange(3, 40)
    sequence = Sequence(0, ids.numpy().astype(np.int32), np.ones(len(ids) - 1, bool))
    scored = teacher.score([sequence], lambda tokens: None).sequences[0]
    model.load_state_dict(plain)
    with torch.no_grad():
        logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    np.testing.assert_allclose(scored.gold_logprob, logprobs, atol=2e-5)
