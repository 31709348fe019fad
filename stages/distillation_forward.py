"""A student's forward pass that ends in a function of hidden states and head instead of in logits.

It takes the place of the model's own `forward` rather than standing beside it, because wrappers (DDP, FSDP, autocast)
hook themselves in there: called through them, it keeps their gradient exchange and casting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stages.causal_lm import BodyAndHead
from stages.rope import SequenceRope
from storage.errors import UserError

Head = Callable[[torch.Tensor], torch.Tensor]
# (hidden [R, H] of the wanted rows, head, the head's parameters) -> anything
FromHidden = Callable[[torch.Tensor, Head, list[nn.Parameter]], Any]


def install_distillation(model: Any) -> int:
    """Let `model(distillation=f, input_ids=[B, L], rows=[R])` return f of the hidden states; returns V.

    rows: int64, indices into the flattened `[B * L]`. Right padding needs no mask: attention is causal; `lengths` `[B]`
    are the token ids of each row, for positions that depend on them (rope.py). Packed sequences come with
    `position_ids` `[1, T]` instead (packing.py). A model that cannot be cut into body and head hands its
    full logits over as hidden states, with a head that does nothing. Raises UserError for a model that sees the tokens
    it is to predict.
    """
    own_forward = model.forward
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    parts: BodyAndHead | None
    try:
        parts = BodyAndHead(model)
        parts.check(model, vocabulary)
    except UserError:
        parts = None
    rope = SequenceRope(model)
    _refuse_reading_ahead(model, vocabulary)

    def forward(*args: Any, distillation: FromHidden | None = None, **kwargs: Any) -> Any:
        if distillation is None:
            return own_forward(*args, **kwargs)
        rows, lengths = kwargs.pop("rows"), kwargs.pop("lengths", None)
        if parts is None:
            with rope.reading(lengths):
                logits = own_forward(**kwargs, use_cache=False).logits
            return distillation(logits.flatten(0, 1)[rows], _identity, [])
        with rope.reading(lengths):
            hidden = parts.body(**kwargs).flatten(0, 1)[rows]
        return distillation(hidden, parts.linear_head or parts.head, parts.head_parameters)

    model.forward = forward
    return vocabulary


@torch.no_grad()
def _refuse_reading_ahead(model: Any, vocabulary: int) -> None:
    """Refuse a model whose logits change with later ids. Raises UserError."""
    device = next(model.parameters()).device
    ids = (torch.arange(1, 9, device=device)[None] * 7919) % vocabulary
    other = torch.cat([ids[:, :4], (ids[:, 4:] + 1) % vocabulary], 1)
    was_training = model.training
    model.eval()
    try:
        one, two = (model(input_ids=each, use_cache=False).logits[0, :4].float() for each in (ids, other))
    finally:
        model.train(was_training)
    half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    if (one - two).abs().max().item() > (5e-2 if half else 1e-4) * max(1.0, one.abs().max().item()):
        raise UserError(
            f"{type(model).__name__} reads ahead: later tokens change what it says of earlier ones, so it would be "
            "trained on what it already sees; a student must be a causal language model"
        )


def compile_body(model: Any, backend: str, mode: str | None) -> None:
    """Let `torch.compile` have the body of a model that is ready to train.

    Not its whole forward, as Trainer would: that ends in a new function at each step, and would be compiled anew at
    each. Lengths change from batch to batch, so shapes are symbols from the start. Raises UserError for a model that
    cannot be cut into body and head.
    """
    BodyAndHead(model).compile_body(dynamic=True, backend=backend, mode=mode)


def _identity(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
