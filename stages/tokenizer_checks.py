"""Tokenizers that no cache can rest on: those that give the same text other ids each time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.identity import PROBES, probe
from storage.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Enough that a tokenizer that draws seldom is seen: it has thousands of places to draw at.
_TIMES = 8
_LONG = " ".join(PROBES) * 8


def refuse_drawing(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that draws at random, as some are left to do after their training. Raises UserError."""
    setting = _drawing_setting(tokenizer)
    if setting is None and not _changes(tokenizer):
        return
    reason = "it gives the same text other token ids each time" if setting is None else setting
    raise UserError(f"{name}: its tokenizer draws at random ({reason}), so nothing that is cached could be found again")


def _drawing_setting(tokenizer: Any) -> str | None:
    """Return the setting that makes it draw, and what to do about it; None where none is known."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if dropout := getattr(model, "dropout", None):
        return f"BPE dropout {dropout:g}; set dropout to null in its tokenizer.json"
    if getattr(model, "alpha", None) and getattr(model, "nbest_size", None) != 1:
        return "its unigram model samples; take alpha away from it"
    if (getattr(tokenizer, "sp_model_kwargs", None) or {}).get("enable_sampling"):
        return "SentencePiece sampling; remove enable_sampling from sp_model_kwargs in its tokenizer_config.json"
    return None


def _changes(tokenizer: PreTrainedTokenizerBase) -> bool:
    def ids() -> list[list[int]]:
        return [*probe(tokenizer), tokenizer(_LONG, add_special_tokens=False, verbose=False)["input_ids"]]

    first = ids()
    return any(ids() != first for _ in range(_TIMES - 1))
