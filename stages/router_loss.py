"""The auxiliary loss of a mixture of experts, which keeps its router from sending all tokens to the same experts.

A causal LM of transformers adds it to its loss where its configuration has `output_router_logits`, times a coefficient
of the configuration. A student that is trained through its body and its head would lose it, so it is taken from the
model's own code here (`causal_lm.py`), with the coefficient that the model is seen to use.
"""

from __future__ import annotations

from typing import Any

import torch

from stages.causal_lm import evaluating, probe_ids
from storage.errors import UserError

# Names that configurations have for the coefficient.
_NAMES = ("router_aux_loss_coef", "aux_loss_alpha", "moe_loss_weight", "aux_loss_coef", "router_loss_coef")


def router_coefficient(model: Any) -> float:
    """Return the weight of the router's loss in the model's own loss; 0 for a model whose configuration asks for none.

    Raises UserError for a model that is asked for such a loss and gives none, or weighs it in an unknown way.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    with evaluating(model):
        ids = probe_ids(model)
        given = {"input_ids": ids, "labels": ids, "use_cache": False}
        try:
            with_it, without = (model(**given, output_router_logits=asked) for asked in (True, False))
            auxiliary = with_it.aux_loss
        except (AttributeError, TypeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"{name}: its configuration has output_router_logits, and the model gives no router loss ({reason}); "
                "set it to false in the student's config.json"
            ) from None
        if auxiliary is None:
            raise UserError(
                f"{name}: its configuration has output_router_logits, and the model gives no router loss; set it to "
                "false in the student's config.json"
            )
        added = (with_it.loss.double() - without.loss.double()).item()
    held = [
        getattr(owner, each, None) for each in _NAMES for owner in (model, config, getattr(config, "ffn_config", None))
    ]
    fitting = [
        float(c) for c in held if c is not None and _fits(float(c), float(auxiliary), added, float(without.loss))
    ]
    if not fitting:
        raise UserError(
            f"{name}: adds a router loss to its own in a way that is not followed; set output_router_logits to "
            "false in the student's config.json"
        )
    return fitting[0]


def _fits(coefficient: float, auxiliary: float, added: float, loss: float) -> bool:
    """Return True where the coefficient explains what was added, up to the rounding of the whole loss."""
    return abs(coefficient * auxiliary - added) <= 1e-3 * abs(added) + 4e-7 * max(1.0, abs(loss))


def real_tokens(input_ids: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor | None:
    """Return int64 `[B, L]`, 1 for ids and 0 for padding; None where every row is full. lengths: int64 `[B]`."""
    if lengths is None:
        return None
    return (torch.arange(input_ids.shape[1], device=input_ids.device) < lengths.to(input_ids.device)[:, None]).long()
