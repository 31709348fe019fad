"""Loading models, configs and tokenizers by directory or hub name, with errors a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.hub import offline_reason
from storage.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def _explain(name: str, what: str, error: Exception) -> UserError:
    if Path(name).exists():
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return UserError(f"{name}: no {what} can be loaded from this directory ({reason[:200]})")
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
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _explain(name, "model configuration", error) from None


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Raises UserError where there is none."""
    from transformers import AutoTokenizer

    _look_for(name, "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001 - the tokenizer loaders raise whatever their parsers raise
        raise _explain(name, "tokenizer", error) from None


def load_end_ids(
    name: str, config: PretrainedConfig, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[int, ...]:
    """Return the token ids that stop the model: those of its generation config, else of its config."""
    from transformers import GenerationConfig

    try:
        found: Any = GenerationConfig.from_pretrained(name, revision=revision or "main").eos_token_id
    except Exception:  # noqa: BLE001 - a model may come without one, and then its config says
        found = None
    for source in (config, config.get_text_config()):
        found = getattr(source, "eos_token_id", None) if found is None else found
    ids = found if isinstance(found, (list, tuple)) else [found]
    return tuple(int(each) for each in ids if each is not None)


def load_causal_lm(
    name: str, *, dtype: torch.dtype, revision: str | None = None, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """Raises UserError where the weights are missing, damaged or not a causal LM's."""
    from transformers import AutoModelForCausalLM

    _look_for(name, "causal language model")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
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


def _look_for(name: str, what: str) -> None:
    """A name that can only be a path is answered at once, and a hub's client is not sent into a dead line."""
    if Path(name).exists():
        return
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such directory to load a {what} from")
    offline_reason()
