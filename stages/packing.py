"""Whether a model keeps packed sequences apart.

Packed sequences lie in one row without an attention mask, and only their positions, which start anew, say where one
ends. Decoders of transformers build a block-diagonal mask from that (eager, SDPA, flex attention; for batches of one
row flash attention takes its variable-length kernel). Layers that carry a state along the row do not, nor do models
that number positions by themselves. So the loaded student is asked, with the attention and on the device it trains on.
"""

from __future__ import annotations

from typing import Any

import torch

from storage.errors import UserError

_LENGTHS = (7, 2, 11)


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Raises UserError unless a few packed sequences have the hidden states they have alone.

    model: one that `install_distillation` was called on; its training mode is kept.
    """
    device = next(model.parameters()).device
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    ids = (torch.arange(1, 1 + sum(_LENGTHS), device=device)[None] * 7919) % vocabulary
    positions = torch.cat([torch.arange(length, device=device) for length in _LENGTHS])[None]

    def hidden(ids: torch.Tensor, **packing: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(ids.shape[1], device=device)
        return model(distillation=lambda states, *_: states, input_ids=ids, rows=rows, **packing).float()

    was_training = model.training
    model.eval()
    try:
        apart = torch.cat([hidden(part) for part in ids.split(_LENGTHS, 1)])
        together = hidden(ids, position_ids=positions)
        error = ((together - apart).norm(dim=1) / apart.norm(dim=1).clamp(min=1e-6)).max().item()
    except (TypeError, ValueError, RuntimeError) as refused:
        # Such as a forward that takes no positions.
        raise UserError(_sentence(model, str(refused))) from None
    finally:
        model.train(was_training)
    # Another order of the same sums; what leaks from a neighbour is far more.
    half = torch.is_autocast_enabled(device.type) or next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    if not error <= (5e-2 if half else 1e-3):
        raise UserError(_sentence(model, f"their hidden states change by {error:.0%}"))


def _sentence(model: Any, reason: str) -> str:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    reason = " ".join(reason.split())[:120]
    return (
        f"{type(inner).__name__} does not keep packed sequences apart ({reason}); train it with "
        "--batching length-grouped"
    )
