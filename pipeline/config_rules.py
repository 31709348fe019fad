"""Options that a configuration file does not set, for whoever is handed a file does not see what it would do.

A file says which models, data, outputs and servers a command uses. It does not let other code run, and it sends nothing
to a service: that is typed.
"""

from __future__ import annotations

from typing import Any

_CODE = "it runs Python code that comes with a model"
_ENGINE = "it may let vLLM run other code or send data away"
_SENDS = "it sends what a run reports to a service"
# Arguments of vLLM that a file may hold, as numbers and words. Of the others some name code (`scheduler_cls`,
# `kv_transfer_config`) or a place, and each version brings new ones.
_ENGINE_ARGUMENTS = frozenset(
    {
        "async_scheduling",
        "block_size",
        "cpu_offload_gb",
        "data_parallel_size",
        "disable_custom_all_reduce",
        "enable_chunked_prefill",
        "enable_expert_parallel",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_dtype",
        "kv_cache_memory_bytes",
        "load_format",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_seqs",
        "optimization_level",
        "performance_mode",
        "pipeline_parallel_size",
        "quantization",
        "seed",
        "tensor_parallel_size",
    }
)
_LOCAL_REPORTS = frozenset({"none", "tensorboard"})
# Sections of DeepSpeed's configuration that send metrics away.
_DEEPSPEED_SERVICES = frozenset({"wandb", "comet"})


def typed_alone(option: str, value: Any) -> str | None:
    """Return why an option is taken on the command line alone; None where a file may set it to this value.

    option: its name with dashes.
    """
    if option == "trust-remote-code":
        return _CODE
    if option == "report-to":
        return None if _stays_here(value) else _SENDS
    return None


def pair_typed_alone(option: str, name: str, value: Any) -> str | None:
    """Return the same of one entry of a mapping: `name` and `value` of `vllm-arg` or `trainer`."""
    if option == "vllm-arg":
        if name in _ENGINE_ARGUMENTS and isinstance(value, (bool, int, float, str)):
            return None
        # The remedy that this program itself names for a quantized head.
        head_alone = name == "hf_overrides" and isinstance(value, dict) and value.keys() == {"head_dtype"}
        return None if head_alone else _ENGINE
    if option == "trainer" and name == "report_to" and not _stays_here(value):
        return _SENDS
    if (
        option == "trainer"
        and name == "deepspeed"
        and not (isinstance(value, dict) and not _DEEPSPEED_SERVICES & {*value})
    ):
        return "it may hold a service that metrics are sent to"
    return None


def _stays_here(value: Any) -> bool:
    return all(_stays_here(each) for each in value) if isinstance(value, list) else str(value) in _LOCAL_REPORTS
