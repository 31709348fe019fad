"""A teacher that trains in two minutes on two cores, so that the demo distils something that knows its text.

Nothing is downloaded: the tokenizer and the weights come from the corpus that `corpus.py` cuts out of the
standard library. The result is an ordinary Hugging Face folder, all that `pipeline cache-teacher` asks for.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
CONTEXT = 256
TEACHER_STEPS = 900


def train_tokenizer(texts: Iterable[str], output_dir: str | Path, vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer and save it; bytes, so that no text is ever out of vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(output_dir)
    return tokenizer


def teacher_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Of the four settings tried the narrowest ended lowest; it reads the most text per minute."""
    return _config(tokenizer, hidden_size=128, layers=4, heads=2)


def student_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """About a quarter of the teacher's parameters; most of them are the embedding of the shared vocabulary."""
    return _config(tokenizer, hidden_size=64, layers=2, heads=2)


def train_teacher(
    corpus_path: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    output_dir: str | Path,
    steps: int = TEACHER_STEPS,
    seed: int = 0,
    progress: bool = True,
    *,
    config: LlamaConfig | None = None,
    batch_size: int = 8,
    learning_rate: float = 4e-3,
    heldout_path: str | Path | None = None,
) -> LlamaForCausalLM:
    """Train a small Llama on the texts of a JSONL file, save it with its tokenizer, and return it.

    The budget is counted in steps, not in seconds: on a busy machine the demo is then slower, not different.
    """
    import torch
    from transformers import LlamaForCausalLM

    from .corpus import read_texts

    torch.manual_seed(seed)
    sequences = pack(tokenizer, read_texts(corpus_path))
    model = LlamaForCausalLM(config if config is not None else teacher_config(tokenizer))
    optimizer = torch.optim.AdamW(_parameter_groups(model), lr=learning_rate, betas=(0.9, 0.98), eps=1e-9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, steps))
    batches = _batches(sequences, batch_size, seed)
    model.train()
    with _reporter(steps, enabled=progress) as report:
        for step in range(1, steps + 1):
            batch = next(batches)
            with _autocast():
                loss = mean_cross_entropy(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            report(step, step * batch.numel(), loss.item())
    model.eval()
    if heldout_path is not None and progress:
        measured = heldout_loss(model, tokenizer, heldout_path)
        print(f"teacher's held-out loss: {measured:.3f} nats per token", flush=True)
    with _no_save_bar():
        model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model


def heldout_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: str | Path) -> float:
    """Mean cross-entropy in nats per token, in fp32, on the texts of a JSONL file."""
    import torch

    from .corpus import read_texts

    with torch.no_grad():
        losses = [mean_cross_entropy(model, batch) for batch in pack(tokenizer, read_texts(path)).split(8)]
    return float(torch.stack(losses).mean())


def pack(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> torch.Tensor:
    """All texts, each ended by the end-of-text token, as rows of CONTEXT tokens; the rest is dropped."""
    import torch

    encoded = tokenizer(list(texts), verbose=False, return_attention_mask=False)["input_ids"]
    tokens = torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])
    rows = len(tokens) // CONTEXT
    if rows == 0:
        raise ValueError(f"The texts hold {len(tokens)} tokens; at least {CONTEXT} are needed for one row.")
    return tokens[: rows * CONTEXT].view(rows, CONTEXT)


def mean_cross_entropy(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean loss of predicting each token of the rows from those before it."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def _config(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, heads: int) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _parameter_groups(model: LlamaForCausalLM) -> list[dict[str, Any]]:
    """Decay the matrices only: pulling a norm's gain towards zero hurts and regularises nothing."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _warmup_cosine(step: int, steps: int) -> float:
    warmup = max(1, min(50, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _batches(sequences: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Rows in a fresh seeded order every epoch, for ever."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from sequences[torch.randperm(len(sequences), generator=generator)].split(batch_size)


def _autocast() -> contextlib.AbstractContextManager[object]:
    """bf16 where the processor multiplies it natively; elsewhere it is emulated and slower than fp32."""
    import torch

    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.autocast("cpu", dtype=torch.bfloat16) if native else contextlib.nullcontext()


@contextlib.contextmanager
def _no_save_bar() -> Iterator[None]:
    """Saving takes a moment; its bar would break the plain lines."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _reporter(steps: int, enabled: bool) -> Iterator[Callable[[int, int, float], None]]:
    """A bar on a terminal, about ten plain lines elsewhere, nothing where progress is switched off."""
    started = time.monotonic()

    def numbers(step: int, tokens: int, loss: float) -> str:
        elapsed = max(time.monotonic() - started, 1e-9)
        return f"loss {loss:.3f}  {tokens / elapsed:,.0f} tokens/s  {elapsed / step * (steps - step):.0f} s left"

    if not enabled:
        yield lambda *_: None
    elif sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        title, now = TextColumn("training the teacher"), TextColumn("{task.fields[now]}")
        with Progress(title, BarColumn(), MofNCompleteColumn(), now) as bar:
            task = bar.add_task("", total=steps, now="")
            yield lambda step, tokens, loss: bar.update(task, completed=step, now=numbers(step, tokens, loss))
    else:
        every = max(1, steps // 10)

        def line(step: int, tokens: int, loss: float) -> None:
            if step % every == 0 or step == steps:
                print(f"training the teacher: step {step}/{steps}  {numbers(step, tokens, loss)}", flush=True)

        yield line
