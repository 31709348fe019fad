"""Positions that depend on length: each sequence as if it were alone, in teacher and student."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stages.corpus import Sequence
from stages.distillation_forward import install_distillation
from stages.packing import check_packing
from stages.pretrained import load_tokenizer
from stages.statistics import StatisticsOptions
from stages.teacher_transformers import TransformersTeacher
from tests.conftest import Finished, Tiny

ORIGINAL = 16
VOCABULARY = 97
VOCABULARY_OF_TOKENIZER = 500
# Below, at and beyond the original context, the longer ones of two lengths.
LENGTHS = (5, 16, 17, 40, 40, 9, 33)
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [4.0, 6.0, 8.0, 10.0],
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 50.0}


def _model(kind: str, vocabulary: int = VOCABULARY) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Phi3Config
    from transformers import Phi3ForCausalLM as Phi3

    torch.manual_seed(5)
    shape = {**SHAPE, "vocab_size": vocabulary}
    if kind == "phi3":
        config: Any = Phi3Config(
            **shape, max_position_embeddings=64, original_max_position_embeddings=ORIGINAL, rope_parameters=LONGROPE
        )
        model: Any = Phi3(config)
    elif kind == "dynamic":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=ORIGINAL, rope_parameters=DYNAMIC))
    else:
        ropes = {"full_attention": DYNAMIC if kind == "gemma3-dynamic" else LONGROPE, "sliding_attention": DEFAULT}
        context = ORIGINAL if kind == "gemma3-dynamic" else 64
        layers = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                **SHAPE, head_dim=8, max_position_embeddings=context, rope_parameters=ropes, layer_types=layers,
                sliding_window=64,
            )
        )  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(6)
    return model.eval()


KINDS = ("phi3", "dynamic", "gemma3-dynamic", "gemma3-longrope")


def _sequences() -> list[Sequence]:
    random = np.random.default_rng(3)
    return [
        Sequence(i, random.integers(2, VOCABULARY, n).astype(np.int32), np.ones(n - 1, bool))
        for i, n in enumerate(LENGTHS)
    ]


@torch.no_grad()
def _alone(kind: str, ids: np.ndarray) -> torch.Tensor:
    """log p(gold) of one sequence by a model that has read nothing before; float64 `[L - 1]`."""
    ids = torch.from_numpy(ids.astype(np.int64))
    logprobs = _model(kind)(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
    return logprobs[:-1].gather(1, ids[1:, None])[:, 0]


def _phi3_by_hand(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[L, V]` of a Phi-3, in float64, from its weights alone."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, kv, size = 4, 2, 8
    length = len(ids)
    factor = LONGROPE["long_factor"] if length > ORIGINAL else LONGROPE["short_factor"]
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    inverse = 1 / (torch.tensor(factor, dtype=torch.float64) * 100.0**exponents)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * inverse
    scale = math.sqrt(1 + math.log(64 / ORIGINAL) / math.log(ORIGINAL))
    cos, sin = (torch.cat([f(angles)] * 2, 1) * scale for f in (torch.cos, torch.sin))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * w[name]

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(2):
        at = f"model.layers.{layer}."
        qkv = norm(x, at + "input_layernorm.weight") @ w[at + "self_attn.qkv_proj.weight"].T
        q, k, v = (
            part.view(length, -1, size).transpose(0, 1) for part in qkv.split([heads * size, *[kv * size] * 2], 1)
        )
        k, v = (part.repeat_interleave(heads // kv, 0) for part in (turned(k), v))
        score = turned(q) @ k.transpose(1, 2) / math.sqrt(size)
        score = score.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        mixed = (score.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)
        x = x + mixed @ w[at + "self_attn.o_proj.weight"].T
        gate, up = (norm(x, at + "post_attention_layernorm.weight") @ w[at + "mlp.gate_up_proj.weight"].T).chunk(2, 1)
        x = x + (nn.functional.silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_scores_each_sequence_as_if_alone(kind: str, tmp_path: Path) -> None:
    _model(kind).save_pretrained(tmp_path)
    teacher = TransformersTeacher(str(tmp_path), StatisticsOptions(4), device="cpu", batch_tokens=4096)
    sequences = _sequences()
    # Twice, since `dynamic` remembers.
    for order in (sequences, sequences[::-1]):
        for scored in teacher.score(order, lambda tokens: None).sequences:
            alone = _alone(kind, scored.sequence.input_ids)
            np.testing.assert_allclose(scored.gold_logprob, alone, atol=2e-5)


def test_teacher_with_longrope_is_the_one_made_by_hand(tmp_path: Path) -> None:
    model = _model("phi3")
    model.save_pretrained(tmp_path)
    teacher = TransformersTeacher(str(tmp_path), StatisticsOptions(4), device="cpu", batch_tokens=4096)
    for scored in teacher.score(_sequences(), lambda tokens: None).sequences:
        ids = torch.from_numpy(scored.sequence.input_ids.astype(np.int64))
        logprobs = _phi3_by_hand(model, ids)[:-1].log_softmax(-1)
        np.testing.assert_allclose(scored.gold_logprob, logprobs.gather(1, ids[1:, None])[:, 0], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_student_reads_each_sequence_as_if_alone(kind: str) -> None:
    """Padded with `lengths`, and packed with positions that start anew; gradients too."""
    model = _model(kind)
    install_distillation(model)
    ids = [torch.from_numpy(s.input_ids.astype(np.int64)) for s in _sequences()]

    def gradient(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        model.zero_grad()
        model(distillation=lambda hidden, head, _: head(hidden).log_softmax(-1)[:, 3].sum(), **batch).backward()
        return model.model.embed_tokens.weight.grad.clone()

    def rows(n: int) -> torch.Tensor:
        return torch.arange(n)

    alone = sum(gradient({"input_ids": one[None], "rows": rows(len(one))}) for one in ids)
    lengths = torch.tensor([len(one) for one in ids])
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    real = torch.cat([row * padded.shape[1] + rows(n) for row, n in enumerate(lengths.tolist())])
    together = gradient({"input_ids": padded, "rows": real, "lengths": lengths})
    row = torch.cat(ids)
    positions = torch.cat([rows(len(one)) for one in ids])
    packed = gradient({"input_ids": row[None], "rows": rows(len(row)), "position_ids": positions[None]})
    size = alone.abs().max()
    torch.testing.assert_close(together / size, alone / size, atol=1e-4, rtol=0)
    torch.testing.assert_close(packed / size, alone / size, atol=1e-4, rtol=0)
    check_packing(model)


def test_a_student_is_trained_and_measured_on_such_sequences(
    tmp_path: Path, tiny: Tiny, pipeline: Callable[..., Finished]
) -> None:
    """A student that is the teacher itself has no divergence from it, however its batches are made."""
    model = _model("phi3", VOCABULARY_OF_TOKENIZER)
    model.save_pretrained(tmp_path / "teacher")
    load_tokenizer(str(tiny.tokenizer)).save_pretrained(tmp_path / "teacher")
    rows = [{"input_ids": [int(id) for id in s.input_ids]} for s in _sequences()] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = ("--teacher", tmp_path / "teacher", "--engine", "transformers", "--top-n", VOCABULARY_OF_TOKENIZER)
    data = ("--dataset", tmp_path / "rows.jsonl", "--logprob-bits", 32, "--tail-samples", 0, "--processes", 1)
    assert pipeline("cache-teacher", *teacher, *data, "--output", tmp_path / "cache").code == 0
    for batching in ("padded", "packed"):
        given = ("--student", tmp_path / "teacher", "--shards", tmp_path / "cache", "--output", tmp_path / batching)
        how = ("--batching", batching, "--max-steps", 1, "--learning-rate", 0, "--eval-share", 0.5)
        ended = pipeline("train-student", *given, *how, "--trainer", "logging_steps=1")
        assert ended.code == 0, ended.err
        metrics = json.loads((tmp_path / batching / "metrics.json").read_text())
        losses = [entry["loss"] for entry in metrics["log"] if "loss" in entry]
        assert metrics["eval_kl"] < 1e-4 and len(losses) == 1 and losses[0] < 1e-4
