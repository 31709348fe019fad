"""Loading models, configs and tokenizers by directory or hub name, with errors a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.gguf_file import source_of, unpacked
from stages.hub import offline_reason
from stages.tokenizer_checks import refuse_drawing
from storage.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def _explain(name: str, what: str, error: Exception) -> UserError:
    if Path(name).exists():
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = "directory" if Path(name).is_dir() else "file"
        return UserError(f"{name}: no {what} can be loaded from this {kind} ({reason[:200]})")
    if offline := offline_reason():
        return UserError(
            f"{name}: no such directory, no {what} of that name was downloaded before, and none can be now "
            f"({offline}); check the spelling and the network"
        )
    return UserError(
        f"{name}: no such directory, and no {what} of that name could be had from the hub "
        "(check the spelling, the network and, for gated models, `hf auth login`)"
    )


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Raises UserError where there is none, or it needs code that may not run."""
    from transformers import AutoConfig

    _look_for(name, "model configuration")
    try:
        return AutoConfig.from_pretrained(**source_of(name), revision=revision, trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a configuration's own checks, and GGUF's reader, raise what they like
        raise _explain(name, "model configuration", error) from None


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Raises UserError where there is none, or it gives the same text other ids each time."""
    from transformers import AutoTokenizer

    _look_for(name, "tokenizer")
    source = source_of(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            **source,
            revision=revision,
            trust_remote_code=trust_remote_code,
            # Where mistral-common is installed, its tokenizer would else take every `tekken.json`, and offer less.
            mistral_format=False,
        )
        tokenizer = _whole_tekken(tokenizer)
    except Exception as error:  # noqa: BLE001 - the tokenizer loaders raise whatever their parsers raise
        raise _explain(name, "tokenizer", error) from None
    refuse_drawing(tokenizer, name)
    return tokenizer


def load_end_ids(
    name: str, config: PretrainedConfig, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[int, ...]:
    """Return the token ids that stop the model: those of its generation config, else of its config."""
    from transformers import GenerationConfig

    try:
        # A GGUF file would be read as if it were JSON.
        stated = None if Path(name).is_file() else GenerationConfig.from_pretrained(name, revision=revision or "main")
        found: Any = getattr(stated, "eos_token_id", None)
    except Exception:  # noqa: BLE001 - a model may come without one, and then its config says
        found = None
    for source in (config, config.get_text_config()):
        found = getattr(source, "eos_token_id", None) if found is None else found
    ids = found if isinstance(found, (list, tuple)) else [found]
    return tuple(int(each) for each in ids if each is not None)


def _whole_tekken(tokenizer: Any) -> Any:
    """Add what transformers leaves out where a `tekken.json` is all there is.

    Namely the special tokens, the beginning of text that Mistral's models want, and the chat template.
    """
    file = tokenizer.init_kwargs.get("vocab_file")
    if tokenizer.eos_token is not None or not (isinstance(file, str) and Path(file).name == "tekken.json"):
        return tokenizer
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    whole: Any = convert_tekken_tokenizer(file)
    whole.add_bos_token = True
    return whole


def load_causal_lm(
    name: str, *, dtype: torch.dtype, revision: str | None = None, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """Raises UserError where the weights are missing, damaged or not a causal LM's.

    A model that also takes images or sound is loaded whole, and reads text alone.
    """
    _look_for(name, "causal language model")
    source = source_of(name)
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    try:
        loaded: Any = _auto_class(config).from_pretrained(
            **source,
            **unpacked(source),
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # noqa: BLE001 - safetensors, zip, JSON and config errors all mean the same here
        raise _explain(name, "causal language model", error) from None
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        # transformers would fill them with random numbers and only warn.
        raise UserError(f"{name}: weights are missing for {', '.join(missing[:3])} ({len(missing)} in all)")
    return model


def is_quantized(config: PretrainedConfig) -> bool:
    """Tell whether the checkpoint's weights are quantised; a GGUF file's are unpacked, and do not count."""
    return getattr(config, "quantization_config", None) is not None


def _auto_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that loads a model of this configuration to predict the next token."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    named = getattr(config, "auto_map", None) or {}
    kind = type(config)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in named:
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM if kind in MODEL_FOR_MULTIMODAL_LM_MAPPING else AutoModelForCausalLM


def _look_for(name: str, what: str) -> None:
    """A name that can only be a path is answered at once, and a hub's client is not sent into a dead line."""
    if not name.strip():
        raise UserError(f"the name of the model to load a {what} from is empty; give a directory or a hub name")
    if Path(name).exists():
        return
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such directory or file to load a {what} from")
    offline_reason()
