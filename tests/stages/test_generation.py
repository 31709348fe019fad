"""What `pipeline generate` reads and writes, without an engine; with one: tests/pipeline/test_vllm_commands.py."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import processors
from transformers import AutoTokenizer

from pipeline.commands.generate import _sampling_sentence
from stages.generation import GenerateOptions, PreparedGeneration, Prompt, _row, _text_ids, own_sampling
from tests.conftest import Tiny


def test_completions_say_what_was_cut(tiny: Tiny) -> None:
    """Each form of a row, its end, and no half of a character where the limit fell into one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    ids = tokenizer("yes 😀")["input_ids"]
    options = GenerateOptions("model", "prompts", "output")
    prompt = Prompt({"prompt": "ask", "truncated": True, "finish_reason": "length"}, [5, 6], 0, 0)
    prepared = PreparedGeneration(options, tokenizer, [prompt], "prompt", False, 9, {})
    assert _row(prepared, prompt, ids, "stop") == {"prompt": "ask", "completion": "yes 😀", "finish_reason": "stop"}
    cut = _row(prepared, prompt, ids[:-1], "length")
    assert cut == {"prompt": "ask", "completion": "yes ", "finish_reason": "length"}
    by_ids = PreparedGeneration(
        GenerateOptions("m", "p", "o", token_ids=True), tokenizer, [prompt], "prompt", False, 9, {}
    )
    assert _row(by_ids, prompt, [7, 8], "length") == {
        "input_ids": [5, 6, 7, 8],
        "loss_mask": [False, True, True],
        "finish_reason": "length",
    }


def test_a_prompt_that_begins_already_gets_no_second_beginning(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    plain = tokenizer("x = 1")["input_ids"]
    end = tokenizer.eos_token_id
    assert _text_ids(tokenizer, "x = 1") == plain
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    assert tokenizer("x = 1")["input_ids"] == [end, *plain, end]
    assert _text_ids(tokenizer, "x = 1") == [end, *plain]
    assert _text_ids(tokenizer, "<|endoftext|>x = 1") == [end, *plain]


def test_how_the_model_would_sample_itself(tmp_path: Path) -> None:
    assert own_sampling(GenerateOptions(str(tmp_path), "prompts", "output")) == {}
    said = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    found = own_sampling(GenerateOptions(str(tmp_path), "prompts", "output"))
    assert found == {"do_sample": True, "temperature": 0.6, "top_k": 20}
    sentence = _sampling_sentence(1.0, 0.9, 3, found)
    assert sentence == (
        "sampling: temperature 1, top-p 0.9, seed 3; the model's generation_config says do_sample True, "
        "temperature 0.6, top_k 20, which is left aside"
    )
    assert _sampling_sentence(0.0, 1.0, 3, {}) == "sampling: the most probable token"
