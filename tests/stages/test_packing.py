"""Packed sequences: the loss and the gradients of the padded ones, whatever the model; or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.shrunk_models import shrunk_model
from stages.distillation_forward import Head, install_distillation
from stages.divergence import StudentTerms, divergences, teacher_terms
from stages.head_loss import head_loss
from stages.objective import Objective, coefficients, weighted_sum
from stages.packing import check_packing
from stages.shard_dataset import Collator, ShardDataset, StoredSequence, as_tensors, teacher_rows
from stages.student import StudentOptions, prepare, train
from storage.errors import UserError
from tests.conftest import VOCABULARY, Tiny
from tests.storage.synthetic import make_manifest, write_cache

LONGEST = 64
PACKABLE = (
    "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "phi", "phi3", "gpt_neox", "olmo2",
    "granite", "gpt2", "stablelm", "starcoder2", "smollm3", "mixtral", "qwen3_moe", "olmoe", "deepseek_v3",
)  # fmt: skip
# States along the row, or positions and masks of their own.
MIXING = (
    "lfm2", "bloom", "openai-gpt", "qwen3_next", "mamba", "mamba2", "jamba", "falcon_h1", "recurrent_gemma", "xlstm",
    "rwkv", "bart", "mpt", "gpt_neo", "gpt_oss", "opt",
)  # fmt: skip


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LONGEST,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=LONGEST, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=LONGEST,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def gemma3() -> Any:
    """Sliding windows that are shorter than the sequences."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=LONGEST, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def mamba() -> Any:
    """A state that is carried along the row."""
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2))


def bloom() -> Any:
    """ALiBi: it takes no positions, only a mask."""
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))


def sequences() -> list[StoredSequence]:
    """Made-up teachings of lengths 2 to the longest the models take; most with a prompt that has no loss."""
    random = np.random.default_rng(0)
    found = []
    for length in (2, LONGEST, 17, 5, 2, 33):
        ids = random.integers(0, VOCABULARY, length).astype(np.int32)
        positions = np.arange(length // 3, length - 1)
        log_p = random.normal(scale=3, size=(len(positions), VOCABULARY))
        log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
        top = np.argsort(-log_p, 1)[:, :8]
        kept = np.zeros(log_p.shape, bool)
        np.put_along_axis(kept, top, True, 1)
        gold = ids[positions + 1]
        kept[np.arange(len(gold)), gold] = True
        found.append(
            StoredSequence(
                input_ids=ids,
                positions=positions,
                gold=gold,
                gold_logprob=log_p[np.arange(len(gold)), gold].astype(np.float32),
                tail_logmass=np.log(np.where(kept, 0, np.exp(log_p)).sum(1)).astype(np.float32),
                top_count=np.full(len(gold), 8, np.uint16),
                top_ids=top.astype(np.int32).ravel(),
                top_logprobs=np.take_along_axis(log_p, top, 1).astype(np.float32).ravel(),
            )
        )
    return found


def loss_and_gradients(model: Any, objective: Objective, *, packed: bool) -> tuple[float, dict[str, torch.Tensor]]:
    batch = as_tensors(Collator(objective, VOCABULARY, packed=packed).batch(sequences()))
    rows = teacher_rows(batch)
    terms, weights = teacher_terms(rows, "bucket"), coefficients(objective, batch["is_hard"])

    def from_hidden(hidden: torch.Tensor, head: Head, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        def loss_of(student: StudentTerms, part: slice) -> torch.Tensor:
            return weighted_sum(divergences(student, terms[part]), weights[part])

        return head_loss(hidden, head, parameters, rows, loss_of, vocabulary_size=VOCABULARY)

    model.zero_grad()
    inputs = {name: batch[name] for name in ("input_ids", "rows", "position_ids") if name in batch}
    assert ("position_ids" in inputs) == packed
    loss = model(distillation=from_hidden, **inputs)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, qwen3, gpt2, gemma3])
@pytest.mark.parametrize("scope", ["micro-batch", "sequence"])
def test_packed_loss_and_gradients_equal_the_padded_ones(make: Callable[[], Any], attention: str, scope: Any) -> None:
    torch.manual_seed(0)
    model = make()
    model.set_attn_implementation(attention)
    install_distillation(model)
    check_packing(model)
    objective = Objective("atkd", rank_scope=scope, ce_weight=0.1)
    padded, expected = loss_and_gradients(model, objective, packed=False)
    packed, found = loss_and_gradients(model, objective, packed=True)
    assert packed == pytest.approx(padded, abs=1e-5, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("make", [mamba, bloom])
def test_a_model_that_mixes_packed_sequences_is_refused(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = make()
    install_distillation(model)
    model.train()
    with pytest.raises(UserError, match=rf"{type(model).__name__} does not keep .* --batching length-grouped"):
        check_packing(model)
    assert model.training


def test_rows_and_sequences_of_a_packed_batch(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", make_manifest())
    dataset = ShardDataset(cache, np.arange(6))
    chosen = [dataset[i] for i in (4, 1, 2)]
    batch = Collator(Objective(), 300, packed=True).batch(chosen)
    ids = batch["input_ids"][0]
    assert ids.tolist() == [i for s in chosen for i in s.input_ids.tolist()]
    assert batch["position_ids"][0].tolist() == [t for s in chosen for t in range(len(s.input_ids))]
    assert batch["gold"].tolist() == ids[batch["rows"] + 1].tolist()
    assert batch["sequence_of"].tolist() == [n for n, s in enumerate(chosen) for _ in s.positions]


def test_training_packed_is_training_padded(tiny: Tiny, cache_path: Path, tmp_path: Path) -> None:
    """One step of all sequences, from the command's options to the saved weights."""
    from transformers import AutoModelForCausalLM

    found = []
    for name, more in (("padded", {}), ("packed", {"batching": "packed", "batch_tokens": 20_000})):
        trainer = {"max_steps": 1, "learning_rate": 1e-2, "optim": "sgd"}
        if not more:
            trainer["per_device_train_batch_size"] = tiny.rows
        options = StudentOptions(
            str(tiny.student), str(cache_path), str(tmp_path / name), Objective("kl"), trainer=trainer, **more
        )
        report = train(prepare(options))
        found.append((report["train_loss"], AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, weight in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], weight, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_options_that_do_not_go_together(
    tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    base = ["train-student", "--student", tiny.student, "--shards", cache_path, "--output", tmp_path / "out"]
    alone = pipeline(*base, "--batch-tokens", 2000)
    both = pipeline(*base, "--batching", "packed", "--batch-size", 4)
    small = pipeline(*base, "--batching", "packed", "--batch-tokens", 10)
    assert [alone.code, both.code, small.code] == [2, 2, 2]
    assert "add --batching packed" in alone.err
    assert "give --batch-tokens" in both.err
    assert "the longest sequence has" in small.err
    assert not (tmp_path / "out").exists()


def test_a_student_that_cannot_pack_is_refused_before_anything_is_written(
    tiny: Tiny, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    from transformers import AutoTokenizer

    mamba().save_pretrained(tmp_path / "mamba")
    AutoTokenizer.from_pretrained(tiny.tokenizer).save_pretrained(tmp_path / "mamba")
    base = ["train-student", "--student", tmp_path / "mamba", "--shards", cache_path, "--max-steps", 1]
    packed = pipeline(*base, "--output", tmp_path / "packed", "--batching", "packed")
    assert packed.code == 2
    assert "MambaForCausalLM does not keep packed sequences apart" in packed.err
    assert not any((tmp_path / "packed").iterdir())
    grouped = pipeline(*base, "--output", tmp_path / "grouped", "--batching", "length-grouped")
    assert grouped.code == 0, grouped.err


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("family", PACKABLE)
def test_students_that_keep_sequences_apart(family: str, precision: str) -> None:
    torch.manual_seed(0)
    model = shrunk_model(family)
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
    install_distillation(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        check_packing(model)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("family", MIXING)
def test_students_that_mix_sequences(family: str, precision: str) -> None:
    """However little reaches a neighbour: half precision may round it away from the states, not from the gradient."""
    torch.manual_seed(0)
    model = shrunk_model(family)
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
    install_distillation(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"), pytest.raises(UserError) as raised:
        check_packing(model)
    assert "does not keep packed sequences apart" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "family", [*PACKABLE, *(f for f in MIXING if f not in ("gpt_neo", "openai-gpt", "mpt", "bart"))]
)
def test_the_verdict_is_that_of_float64(family: str) -> None:
    """A sequence alone and in a row with others, in double precision, where a leak and rounding are far apart."""
    lengths = (7, 40, 2, 30)
    torch.manual_seed(0)
    model = shrunk_model(family).double().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    ids = torch.arange(1, 1 + sum(lengths))[None] * 7919 % 95 + 1
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=part, use_cache=False).logits[0] for part in ids.split(lengths, 1)])
        try:
            together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        except TypeError:
            assert family in MIXING
            return
    # Some compute their angles in float32 also then.
    moved = ((together - alone).abs().max() / alone.abs().max()).item()
    assert (moved < 1e-6) == (family in PACKABLE), moved


def test_a_row_longer_than_a_model_takes_is_refused_before_it_is_trained_on() -> None:
    model = shrunk_model("gpt_neo")
    install_distillation(model)
    with pytest.raises(UserError, match="does not keep packed sequences apart"):
        check_packing(model, 4096)
    model = shrunk_model("llama")
    install_distillation(model)
    check_packing(model, 4096)
