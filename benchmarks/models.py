"""Models of random weights."""

from __future__ import annotations

from typing import Any


def random_qwen3(vocabulary: int, hidden: int, layers: int, *, tied: bool, head_dim: int = 64) -> Any:
    """A Qwen3-shaped causal LM in float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // head_dim),
        num_key_value_heads=max(1, hidden // (2 * head_dim)),
        head_dim=head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config)
