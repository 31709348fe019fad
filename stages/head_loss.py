"""The output layer and the loss in one pass over slices of rows, so that `[tokens, vocabulary]` never exists.

Every objective depends on a row's logits only through a few numbers: the logits of the kept ids and the log-sum-exp
of the rest (StudentTerms). For a slice of rows the logits are computed, reduced to those numbers, and the objective's
small gradient is expanded at once to the gradient on the logits,

    d loss / d z_v  =  d loss / d tail * softmax_tail(v)   for v in the tail,   and the kept ids' own entries,

which is multiplied back into hidden states and head weights before the slice is dropped. The gradients are ready when
the forward pass ends; `backward` only scales them. One `exp` per logit and three matrix products are all there is,
as in plain cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stages.divergence import StudentTerms, TeacherRows, kept_ids

# Loss of the rows of a slice, as a sum: (terms of the slice, which rows they are) -> scalar.
LossOfTerms = Callable[[StudentTerms, slice], torch.Tensor]


def head_loss(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    parameters: list[nn.Parameter],
    rows: TeacherRows,
    loss_of: LossOfTerms,
    *,
    slice_bytes: int = 64 << 20,
    vocabulary_size: int,
) -> torch.Tensor:
    """The summed loss of R rows, differentiable with respect to `hidden` and `parameters`.

    hidden: `[R, H]`, the states before the head at the stored positions. head: `[C, H] -> [C, V]`, with whatever
    scaling, capping, bias or adapter the model has. parameters: what `head` uses and is trained; a weight tied to the
    embedding is among them. slice_bytes: memory of one slice of fp32 logits.
    """
    size = max(16, slice_bytes // (4 * vocabulary_size))
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            terms, _ = _reduce(_at_least_float32(head(hidden[part])), rows[part], overwrite=False)
            total = total + loss_of(terms, part)
        return total
    return _HeadLoss.apply(hidden, head, rows, loss_of, size, *trained)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
        rows: TeacherRows,
        loss_of: LossOfTerms,
        size: int,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        # Sums over slices are kept in float32 (float64 for float64 models), whatever the precision of the weights.
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        hidden_gradient = torch.zeros_like(hidden)
        gradients = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            with torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_()
                logits = head(leaf)
            loss, gradient = _loss_and_gradient(logits.detach(), rows[part], loss_of, part)
            total += loss
            found = torch.autograd.grad(logits, [leaf, *parameters], gradient.to(logits.dtype), allow_unused=True)
            hidden_gradient[part] = found[0]
            for gathered, new in zip(gradients, found[1:], strict=True):
                if new is not None:
                    gathered += new
        ctx.save_for_backward(hidden_gradient, *gradients)
        ctx.dtypes = [p.dtype for p in parameters]
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        (scale,) = outputs
        hidden_gradient, *gradients = ctx.saved_tensors
        scaled = [(scale * g).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return (scale * hidden_gradient).to(hidden_gradient.dtype), None, None, None, None, *scaled


def _loss_and_gradient(
    logits: torch.Tensor, rows: TeacherRows, loss_of: LossOfTerms, part: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a slice and its gradient on the logits `[C, V]`."""
    ids = kept_ids(rows)
    is_entry = ids != rows.gold[:, None]
    terms, tail_softmax = _reduce(_at_least_float32(logits), rows, overwrite=False)
    with torch.enable_grad():
        leaves = [value.requires_grad_() for value in (terms.gold, terms.entries, terms.tail)]
        loss = loss_of(StudentTerms(*leaves), part)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
    gold, entries, tail = (
        torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, found, strict=True)
    )
    gradient = tail_softmax.mul_(tail[:, None])
    # Padding entries stand at gold, whose own gradient comes last; an id stands once in the top-N.
    gradient.scatter_(1, ids, entries.masked_fill(~is_entry, 0.0))
    gradient.scatter_(1, rows.gold[:, None], gold[:, None])
    return loss.detach(), gradient


def _reduce(z: torch.Tensor, rows: TeacherRows, *, overwrite: bool) -> tuple[StudentTerms, torch.Tensor]:
    """StudentTerms of logits `[C, V]` without a graph, and the softmax within the tail (zero on the kept set)."""
    gold, ids = rows.gold[:, None], kept_ids(rows)
    entries = z.gather(1, ids).masked_fill(ids == gold, float("-inf"))
    z_gold = z.gather(1, gold).squeeze(1)
    outside = z if overwrite else z.clone()
    outside.scatter_(1, ids, float("-inf")).scatter_(1, gold, float("-inf"))
    peak = outside.amax(1, keepdim=True)
    # A kept set that is the whole vocabulary leaves a tail of nothing but -inf.
    peak.masked_fill_(peak == float("-inf"), 0.0)
    exponentials = outside.sub_(peak).exp_()
    total = exponentials.sum(1, keepdim=True)
    softmax = exponentials.div_(total.clamp(min=torch.finfo(z.dtype).tiny))
    tail = (total.log() + peak).squeeze(1)
    return StudentTerms(z_gold, entries, tail), softmax


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
