"""Every causal LM class of transformers with a configuration that is small enough to run in a moment.

The sizes below are set where a family's configuration has a field of that name; what a family wants beyond that stands
in `OWN`. Weights are random.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

VOCABULARY = 96
# Factor of all matrices: drawn as they come, a model is so unsure that nothing it reads changes what it says.
SURE = 4.0
# Field of a configuration -> its small value.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64, "max_sequence_length": 64,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embedding_size": 32, "attention_hidden_size": 32, "dim": 32,
    "hidden_dim": 32, "word_embed_proj_dim": 32, "lru_width": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 1,
    "num_decoder_layers": 2, "num_encoder_layers": 1,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "attention_head_dim": 8, "d_kv": 8, "kv_channels": 8,
    "intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "n_inner": 48, "d_ff": 48,
    "d_inner": 48, "dff": 48, "ffn_hidden_size": 48, "dense_intermediate_size": 48, "intermediate_size_mlp": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "num_shared_experts": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "o_lora_rank": 16, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_heads": 2, "linear_head_dim": 16,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "mamba_n_groups": 1, "mamba_chunk_size": 16, "mamba_d_ssm": 64, "mamba_dt_rank": 4, "mamba_ngroups": 1,
    "state_size": 8, "ssm_state_size": 8, "time_step_rank": 4, "n_groups": 1, "chunk_size": 16,
    "sliding_window": 16, "sliding_window_size": 16, "attention_window_size": 16, "attention_chunk_size": 16,
    "rotary_dim": 8, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "query_pre_attn_scalar": 8, "max_window_layers": 1, "num_kv_shared_layers": 0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3, "cls_token_id": 4,
    "decoder_start_token_id": 1,
}  # fmt: skip
# Of vision and sound towers, which no text goes through.
_TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8, "mlp_dim": 48, "num_blocks": 1, "output_channels": 16, "global_attn_indexes": [0],
    "window_size": 2,
    "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32, "input_size": 16,
    "crop_size": 16,
}  # fmt: skip
# Family -> further fields of its text part.
OWN: dict[str, dict[str, Any]] = {
    # Latent attention has as many key heads as query heads.
    **{
        family: {"num_key_value_heads": 4}
        for family in (
            "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
            "longcat_flash", "minicpm3", "youtu",
        )
    },
    "cohere_compass_text": {
        "head_dim": 128,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "cpmant": {"dim_head": 8, "dim_ff": 48, "position_bias_num_buckets": 32, "prompt_length": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "num_key_value_heads": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "phi4_multimodal": {"original_max_position_embeddings": 64},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, 24],
        "attention_head_size": 8, "feed_forward_size": 48, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8,
        "num_buckets": 2, "num_hidden_layers": None,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8, "shape_embed_dim": 8, "pronunciation_vocab_size": 96, "shape_vocab_size": 96,
    },
    "xlm": {"emb_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "n_mamba_heads": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 4, "mamba_headdim": 16,
        "hybrid_layer_ids": [1], "num_mem_blocks": 1, "adapter_rank": 4, "attention_hidden_size": 64,
        "attention_head_dim": 16, "num_query_groups": 4, "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
# Families that have no model of their own for text, or whose parts this machine lacks: said in the table.
LEFT_OUT = {
    "blt": "its byte groups alone have 500,002 embeddings each",
    "gemma3n": "needs the library timm",
    "gemma4_assistant": "drafts for another model and is none by itself",
    "gemma4_unified_assistant": "drafts for another model and is none by itself",
    "musicgen": "reads sound codes",
    "musicgen_melody": "reads sound codes",
}


def families() -> list[str]:
    """Return the model types of transformers that have a causal LM class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrunk_config(family: str, **more: Any) -> Any:
    """Return the small configuration of a family. more: fields of its text part. Raises what its class raises."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    default = kind()
    text = default.get_text_config()
    own = {**OWN.get(family, {}), **more}
    named = {*text.to_dict(), *inspect.signature(type(text).__init__).parameters} - {*type(text).attribute_map}
    fields = {
        name: value for name, value in {**SMALL, **own}.items() if (name in named and value is not None) or name in more
    }
    if "is_decoder" in named:
        fields["is_decoder"] = own.get("is_decoder", True)
    parts: dict[str, Any] = {}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if part is text:
            parts[name], fields = fields, {}
        elif part is not None and name.endswith(("vision_config", "audio_config")):
            parts[name] = {key: value for key, value in _TOWER.items() if key in part.to_dict()}
    return kind(**fields, **parts)


def shrunk_model(family: str, **more: Any) -> Any:
    """Return a causal LM of random weights in float32. Raises what its class raises, and ValueError for LEFT_OUT."""
    from transformers import AutoModelForCausalLM

    if family in LEFT_OUT:
        raise ValueError(LEFT_OUT[family])
    model = AutoModelForCausalLM.from_config(shrunk_config(family, **more))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.mul_(SURE)
    return model
