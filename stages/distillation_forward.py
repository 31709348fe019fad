"""A student's forward pass that ends in a function of hidden states and head instead of in logits.

It takes the place of the model's own `forward` rather than standing beside it, because wrappers (DDP, FSDP, autocast)
hook themselves in there: called through them, it keeps their gradient exchange and casting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stages.causal_lm import BodyAndHead, CutError, evaluating, probe_ids, take_apart, vocabulary_size
from stages.rope import SequenceRope
from stages.router_loss import real_tokens, router_coefficient
from storage.errors import RunError, UserError

Head = Callable[[torch.Tensor], torch.Tensor]
# (hidden [R, H] of the wanted rows, head, the head's parameters) -> anything
FromHidden = Callable[[torch.Tensor, Head, list[nn.Parameter]], Any]


@dataclass(frozen=True)
class Distillation:
    """Describes a model that can distil.

    vocabulary_size: V, of its logits. note: a sentence for whoever trains it, or None. router_coefficient: the weight
    of the router's loss in the model's own; 0 where it has none.
    """

    vocabulary_size: int
    note: str | None
    router_coefficient: float = 0.0


def install_distillation(model: Any) -> Distillation:
    """Let `model(distillation=f, input_ids=[B, L], rows=[R])` return f of the hidden states; with `router=True` the
    pair of that and the router's loss, a scalar (router_loss.py).

    rows: int64, indices into the flattened `[B * L]`. Right padding needs no mask: attention is causal; `lengths` `[B]`
    are the token ids of each row, for positions that depend on them (rope.py). Packed sequences come with
    `position_ids` `[1, T]` instead (packing.py). A model that cannot be cut into body and head hands its full logits
    over as hidden states, with a head that does nothing, and the note says why. Raises UserError for a model that gives
    no logits for token ids, sees the tokens it is to predict, mixes the rows of a batch, or cannot be trained.
    """
    # One of ours, where another trainer had the model before, would cut what is cut.
    own_forward = model.forward = getattr(model.forward, "own", model.forward)
    parts = take_apart(model)
    rope = SequenceRope(model)
    _refuse_reading_ahead(model)
    _refuse_failing_in_training(model)
    coefficient = router_coefficient(model)
    has_head = bool(parts.head_parameters)

    def forward(*args: Any, distillation: FromHidden | None = None, router: bool = False, **kwargs: Any) -> Any:
        if distillation is None:
            return own_forward(*args, **kwargs)
        rows, lengths = kwargs.pop("rows"), kwargs.pop("lengths", None)
        auxiliary = None
        with rope.reading(lengths):
            if router:
                states, auxiliary = parts.body_and_router(real=real_tokens(kwargs["input_ids"], lengths), **kwargs)
            else:
                states = parts.body(**kwargs)
        hidden = states.flatten(0, 1)[rows]
        parameters = parts.head_parameters
        if has_head and not parameters:
            raise RunError(
                f"{type(model).__name__}'s head has no parameters where it is computed, so it would not be trained: "
                "FSDP keeps them in flat ones; set use_orig_params in its configuration"
            )
        found = distillation(hidden, parts.linear_head or parts.head, parameters)
        if not router:
            return found
        if auxiliary is None or (model.training and torch.is_grad_enabled() and not auxiliary.requires_grad):
            raise RunError(
                f"{type(model).__name__}: the router's loss has no gradient; with gradient checkpointing, set "
                "use_reentrant to false in gradient_checkpointing_kwargs"
            )
        return found, auxiliary

    forward.own = own_forward  # type: ignore[attr-defined]
    model.forward = forward
    return Distillation(vocabulary_size(model), parts.note, coefficient)


def _refuse_reading_ahead(model: Any) -> None:
    """Refuse a model whose logits change with later ids or with the other rows of a batch. Raises UserError."""
    size = vocabulary_size(model)
    half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    with evaluating(model):
        ids = probe_ids(model)
        later = torch.cat([ids[:, :4], (ids[:, 4:] + 1) % size], 1)
        # Padded, beside a longer sequence, as in a batch of different lengths.
        padding = torch.cat([torch.zeros_like(ids[:1, :4]), ids[1:, :4]])
        beside = torch.cat([ids, padding], 1)
        alone, other, padded = (
            model(input_ids=each, use_cache=False).logits[0, :8].float() for each in (ids[:1], later[:1], beside)
        )

    def differ(one: torch.Tensor, two: torch.Tensor) -> bool:
        # A NaN on one side is no sign of what it came from.
        return (one - two).abs().nan_to_num(0.0).max().item() > (5e-2 if half else 1e-4) * max(
            1.0, two.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
        )

    if differ(alone[:4], other[:4]):
        raise UserError(
            f"{type(model).__name__} reads ahead: later tokens change what it says of earlier ones, so it would be "
            "trained on what it already sees; a student must be a causal language model"
        )
    if differ(padded, alone):
        raise UserError(
            f"{type(model).__name__} says something else of a sequence beside others in its batch; a student must "
            "keep them apart"
        )


def _refuse_failing_in_training(model: Any) -> None:
    """Refuse a model whose logits have no gradient, or that fails in training mode. Raises UserError."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.train()
    try:
        # Dropout must not move the randomness of the run.
        with torch.random.fork_rng(devices), torch.enable_grad():
            total = model(input_ids=probe_ids(model)[:1], use_cache=False).logits.float().sum()
            if not any(g is not None for g in torch.autograd.grad(total, trained, allow_unused=True)):
                raise RuntimeError("no parameter has a gradient")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - models raise what they like
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(f"{type(model).__name__} cannot be trained here ({reason})") from None
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def compile_body(model: Any, backend: str, mode: str | None) -> None:
    """Let `torch.compile` have the body of a model that is ready to train.

    Not its whole forward, as Trainer would: that ends in a new function at each step, and would be compiled anew at
    each. Lengths change from batch to batch, so shapes are symbols from the start. Raises UserError for a model that
    cannot be cut into body and head.
    """
    try:
        parts = BodyAndHead(model)
    except CutError as error:
        raise UserError(f"{type(model).__name__} cannot be compiled: {error}") from None
    parts.compile_body(dynamic=True, backend=backend, mode=mode)
