"""Whether a model keeps packed sequences apart.

Packed sequences lie in one row without an attention mask, and only their positions, which start anew, say where one
ends. Decoders of transformers build a block-diagonal mask from that (eager, SDPA, flex attention; for batches of one
row flash attention takes its variable-length kernel). Layers that carry a state along the row do not, nor do models
that number positions by themselves. So the loaded student is asked, with the attention and on the device it trains on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stages.causal_lm import evaluating, vocabulary_size
from stages.teacher_checks import context_length
from storage.errors import UserError

# Longer than the windows of convolutions and the chunks of linear attention, and one of two ids.
_LENGTHS = (7, 70, 2, 37)
# How far the rounding of a mixture of experts may move a sequence's states, in units of the last place of its largest
# one: what is summed together depends on where the other tokens go.
_EXPERTS_ROUND = {torch.float32: 64.0, torch.float64: 64.0}
_EXPERTS_ROUND_HALF = 8.0


def check_packing(model: Any, tokens: int | None = None) -> None:
    """Raise UserError unless packed sequences are kept apart.

    Three things are looked at: a sequence's hidden states do not change at all with its neighbours' ids, they have no
    gradient at all at its neighbours' embeddings, and they are those that the sequence has alone. The first two leave
    nothing to a tolerance: what leaks in half precision may be smaller than its rounding.

    model: one that `install_distillation` was called on; its training mode is kept. tokens: ids of the longest row of
    the run; some models take no row longer than their context, however its positions start anew.
    """
    context = context_length(model.config)
    lengths = [length if context is None else min(length, context) for length in _LENGTHS]
    device = next(model.parameters()).device
    size = vocabulary_size(model)
    ids = (torch.arange(1, 1 + sum(lengths), device=device)[None] * 7919) % size
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]

    def hidden(ids: torch.Tensor, **packing: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(ids.shape[1], device=device)
        return model(distillation=lambda states, *_: states, input_ids=ids, rows=rows, **packing)

    try:
        with evaluating(model):
            together = hidden(ids, position_ids=positions)
            apart = torch.cat([hidden(part) for part in ids.split(lengths, 1)])
            for start, length in zip(starts, lengths, strict=True):
                own = slice(start, start + length)
                others = (ids + 1) % size
                others[:, own] = ids[:, own]
                _refuse_change(model, together[own], hidden(others, position_ids=positions)[own])
            if tokens is not None and context is not None and tokens > context:
                long = torch.arange(tokens, device=device)[None]
                hidden(long * 7919 % size, position_ids=long % min(context, max(_LENGTHS)))
            _refuse_gradients(model, lambda: hidden(ids, position_ids=positions), starts, lengths)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as refused:  # noqa: BLE001 - such as a forward that takes no positions
        raise UserError(_sentence(model, str(refused))) from None
    together, apart = together.float(), apart.float()
    error = ((together - apart).norm(dim=1) / apart.norm(dim=1).clamp(min=1e-6)).max().item()
    # Another order of the same sums; what leaks from a neighbour is far more.
    half = torch.is_autocast_enabled(device.type) or next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    if not error <= (0.2 if half else 1e-3):
        raise UserError(_sentence(model, f"their hidden states change by {error:.0%}"))


def _refuse_change(model: Any, one: torch.Tensor, other: torch.Tensor) -> None:
    """Raise UserError where the states `[L, H]` of a sequence changed with its neighbours' ids."""
    moved = (one - other).abs().amax(1).float()
    if not _has_experts(model):
        allowed = torch.zeros_like(moved)
    else:
        eps = torch.finfo(one.dtype).eps * _EXPERTS_ROUND.get(one.dtype, _EXPERTS_ROUND_HALF)
        allowed = eps * one.abs().amax(1).float()
    if not bool((moved <= allowed).all()):
        raise UserError(_sentence(model, "the ids of one change the hidden states of another"))


def _refuse_gradients(model: Any, states: Any, starts: list[int], lengths: list[int]) -> None:
    """Raise UserError where the states of a sequence have a gradient at the embeddings of another."""
    with torch.enable_grad(), _embeddings(model) as seen:
        found = states()
        # A model that embeds in another way shows none.
        if not seen or not found.requires_grad:
            return
        for start, length in zip(starts, lengths, strict=True):
            own = slice(start, start + length)
            weights = torch.linspace(0.5, 1.5, found[own].numel(), device=found.device).view_as(found[own])
            (gradient,) = torch.autograd.grad((found[own].float() * weights).sum(), seen[:1], retain_graph=True)
            # A NaN is 0 times infinity, of a padding id whose embedding is 0.
            gradient = gradient.reshape(-1, gradient.shape[-1]).nan_to_num(0.0)
            gradient[own] = 0
            if gradient.count_nonzero():
                raise UserError(_sentence(model, "the embeddings of one have a gradient from another"))


@contextmanager
def _embeddings(model: Any) -> Iterator[list[torch.Tensor]]:
    """Catch what the model's embedding layer gives, as leaves with a gradient."""
    seen: list[torch.Tensor] = []

    def catch(_module: Any, _given: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor):
            return output
        seen.append(output.detach().requires_grad_())
        # Some models write into their embeddings, which no leaf allows.
        return seen[-1].clone()

    handle = model.get_input_embeddings().register_forward_hook(catch)
    try:
        yield seen
    finally:
        handle.remove()


def _has_experts(model: Any) -> bool:
    config = model.config.get_text_config()
    nested = getattr(config, "ffn_config", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(each, name, 0) or 0) > 1 for each in (config, nested) for name in names)


def _sentence(model: Any, reason: str) -> str:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    reason = " ".join(reason.split())[:120]
    return (
        f"{type(inner).__name__} does not keep packed sequences apart ({reason}); train it with "
        "--batching length-grouped"
    )
