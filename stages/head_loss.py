"""The output layer and the loss in one pass over slices of rows, so that `[tokens, vocabulary]` never exists.

Every objective depends on a row's logits only through a few numbers: the logits of the kept ids, the log-sum-exp of
the rest, and, where the teacher's tail has a shape, their mean under it (StudentTerms). For a slice of rows the logits
are computed, reduced to those numbers, and the objective's small gradient is expanded to the gradient on the logits,

    d loss / d z_v  =  d loss / d tail * softmax_tail(v) + d loss / d expected * shape(v)   for v in the tail,

(a sketch that is compared in another way than forward KL has `spread` and its slope in the place of the latter) and the
kept ids' own entries elsewhere. It is multiplied back into hidden states and head weights before the slice is
dropped, so the gradients are ready when the forward pass ends and `backward` only scales them. One `exp` per logit and
three matrix products are all there is, as in plain cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stages.divergence import (
    BUCKET,
    StudentTerms,
    TeacherRows,
    floored,
    kept_ids,
    residual_weights,
    sample_weights,
    sampled_shape,
    sketch_codes,
    sketch_shape,
)
from stages.tail import Tail

# Rows that are worked on at once where they should stay in a CPU's cache: measured at V = 32,000 and 152,000.
_CACHED_ROWS = 32

# Loss of the rows of a slice, as a sum: (terms of the slice, which rows they are) -> scalar.
LossOfTerms = Callable[[StudentTerms, slice], torch.Tensor]


def head_loss(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    parameters: list[nn.Parameter],
    rows: TeacherRows,
    loss_of: LossOfTerms,
    *,
    vocabulary_size: int,
    tail: Tail = BUCKET,
    temperature: float = 1.0,
    slice_bytes: int = 256 << 20,
) -> torch.Tensor:
    """The summed loss of R rows, differentiable once with respect to `hidden` and `parameters`.

    hidden: `[R, H]`, the states before the head at the stored positions. head: `[C, H] -> [C, V]`, with whatever
    scaling, capping, bias or adapter the model has; an `nn.Linear` takes a shorter way. parameters: what `head` uses;
    a weight tied to the embedding is among them. temperature: the logits are divided by it. slice_bytes: memory of
    one slice of fp32 logits; the fewer rows a slice has, the more often the head's weights are read.
    """
    # What a sketch gives back takes as much room as the logits.
    slice_bytes //= 2 if tail.mode == "sketch" else 1
    size = max(16, slice_bytes // (4 * vocabulary_size))
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
        total = hidden.new_zeros((), dtype=torch.float32)
        scratch = _Scratch()
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            logits = _at_temperature(_at_least_float32(head(hidden[part])), temperature)
            total = total + loss_of(_reduce(logits, rows[part], tail, scratch).terms, part)
        return total
    return _HeadLoss.apply(hidden, head, rows, tail, temperature, loss_of, size, *trained)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
        rows: TeacherRows,
        tail: Tail,
        temperature: float,
        loss_of: LossOfTerms,
        size: int,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        # Sums over slices are kept in float32 (float64 for float64 models), whatever the precision of the weights.
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        hidden_gradient = torch.zeros_like(hidden)
        gradients = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        scratch = _Scratch()
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            states = hidden[part].detach()
            if isinstance(head, nn.Linear):
                # Nothing but `gradient` is needed to go back through it, so its output is ours to overwrite.
                with torch.no_grad():
                    logits = head(states)
                loss, gradient = _loss_and_gradient(
                    logits, rows[part], tail, temperature, loss_of, part, scratch, own=True
                )
                hidden_gradient[part] = _through_linear(head, states, gradient.to(logits.dtype), parameters, gradients)
            else:
                with torch.enable_grad():
                    logits = head(states.requires_grad_())
                loss, gradient = _loss_and_gradient(
                    logits.detach(), rows[part], tail, temperature, loss_of, part, scratch
                )
                found = torch.autograd.grad(logits, [states, *parameters], gradient.to(logits.dtype), allow_unused=True)
                hidden_gradient[part] = found[0]
                for gathered, new in zip(gradients, found[1:], strict=True):
                    if new is not None:
                        gathered += new
            total += loss
        ctx.gradients = hidden_gradient, gradients
        ctx.dtypes = [p.dtype for p in parameters]
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were handed out by an earlier backward")
        (scale,) = outputs
        hidden_gradient, gradients = ctx.gradients
        # Given away, so that they become the parameters' `.grad` without a copy.
        ctx.gradients = None
        scaled = [g.mul_(scale).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return hidden_gradient.mul_(scale), None, None, None, None, None, None, *scaled


def _through_linear(
    head: nn.Linear,
    states: torch.Tensor,
    gradient: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Gradient on `states` `[C, H]` from the one on the logits `[C, V]`; those of `parameters` are added in place."""
    for parameter, gathered in zip(parameters, gradients, strict=True):
        if parameter is head.bias:
            gathered += gradient.sum(0)
        elif parameter is head.weight:
            if gathered.dtype == gradient.dtype == states.dtype:
                gathered.addmm_(gradient.T, states)
            else:
                gathered += gradient.T @ states.to(gradient.dtype)
    return gradient @ head.weight.to(gradient.dtype)


class _Scratch:
    """Memory for one more `[C, V]` beside the logits, the same for every slice: fresh pages are dear on a CPU."""

    def __init__(self) -> None:
        self._kept: torch.Tensor | None = None

    def like(self, z: torch.Tensor) -> torch.Tensor:
        """Shape, dtype and device of `z`; holds anything."""
        if self._kept is None or len(self._kept) < len(z):
            self._kept = torch.empty_like(z)
        return self._kept[: len(z)]


@dataclass
class _Reduced:
    """A slice of logits reduced to its terms, and what turns their gradient into one on the logits."""

    terms: StudentTerms
    weights: torch.Tensor  # [C, V], the softmax within the tail up to a factor per row; zero on the kept set
    factor: torch.Tensor  # [C, 1], that factor
    shape: torch.Tensor | None  # [C, V], the derivative of `expected` or `spread` by the logits where it is dense
    samples: tuple[torch.Tensor, torch.Tensor] | None  # ids [C, M] and their shares of the tail, in `expected` too


def _reduce(z: torch.Tensor, rows: TeacherRows, tail: Tail, scratch: _Scratch, *, own: bool = False) -> _Reduced:
    """Terms of logits `[C, V]`, without a graph."""
    gold, ids = rows.gold[:, None], kept_ids(rows)
    entries = z.gather(1, ids).masked_fill(ids == gold, float("-inf"))
    z_gold = z.gather(1, gold).squeeze(1)
    terms = StudentTerms(z_gold, entries, z_gold)
    samples = shape = x = None
    if tail.mode == "sampled":
        samples = sample_weights(rows)
        terms.expected = (z.gather(1, samples[0]) * samples[1].to(z)).sum(1)
        terms.shape = sampled_shape(rows).to(z)
    elif tail.mode == "sketch":
        samples = residual_weights(rows, tail, z.shape[1]) if tail.compared == "forward" else None
        if tail.compared == "forward":
            shape = _sketch_shape(z, terms, rows, tail, samples, scratch.like(z))
        else:
            x = tail.sketch_logits(sketch_codes(rows), ids, gold, z.shape[1])
            # Reversed log q - log w, up to the student's normaliser; else w.
            x = z - floored(x.log_softmax(1)).to(z) if tail.compared == "reverse" else x.softmax(1).to(z)
    outside = z if own and tail.mode != "prior" else z.clone()
    outside.scatter_(1, ids, float("-inf")).scatter_(1, gold, float("-inf"))
    peak = outside.amax(1, keepdim=True)
    # A kept set that is the whole vocabulary leaves a tail of nothing but -inf.
    peak.masked_fill_(peak == float("-inf"), 0.0)
    weights = outside.sub_(peak).exp_()
    total = weights.sum(1, keepdim=True)
    factor = total.clamp(min=torch.finfo(z.dtype).tiny).reciprocal()
    terms.tail = (total.log() + peak).squeeze(1)
    if tail.mode == "prior":
        shape = tail.prior_shape(weights)
        terms.expected = torch.linalg.vecdot(shape, z)
        terms.shape = torch.xlogy(shape, shape).sum(1)
    elif x is not None and tail.compared == "reverse":
        gap = x.sub_(total.clamp(min=torch.finfo(z.dtype).tiny).log() + peak)
        terms.spread = torch.linalg.vecdot(weights, gap) * factor.squeeze(1)
        shape = gap.sub_(terms.spread[:, None]).mul_(weights).mul_(factor)
    elif x is not None:
        shape = _spread_of_whole(terms, weights * factor, x, rows, tail)
    return _Reduced(terms, weights, factor, shape, samples)


def _sketch_shape(
    z: torch.Tensor,
    terms: StudentTerms,
    rows: TeacherRows,
    tail: Tail,
    samples: tuple[torch.Tensor, torch.Tensor] | None,
    w: torch.Tensor,
) -> torch.Tensor:
    """w `[C, V]`, filled in; sets `expected` and `shape`. On a CPU a few rows at a time, which stay in its cache."""
    codes, ids, gold = sketch_codes(rows), kept_ids(rows), rows.gold[:, None]
    size = _CACHED_ROWS if z.device.type == "cpu" else len(z)
    expected, constants = [], []
    for start in range(0, len(z), size):
        part = slice(start, start + size)
        x = tail.sketch_logits(codes[part], ids[part], gold[part], z.shape[1])
        shape = x.softmax(1)
        constants.append(sketch_shape(rows[part], tail, x, shape))
        w[part] = shape
        expected.append((shape * z[part]).sum(1))
    terms.expected, terms.shape = torch.cat(expected), torch.cat(constants).to(z)
    if samples is not None:
        terms.expected += (z.gather(1, samples[0]) * samples[1].to(z)).sum(1)
    return w


def _spread_of_whole(
    terms: StudentTerms, q_tail: torch.Tensor, w: torch.Tensor, rows: TeacherRows, tail: Tail
) -> torch.Tensor:
    """Sets `spread` and `slope` of jsd or tvd, and gives the derivative of spread by the logits `[C, V]`.

    q_tail, w: `[C, V]`, the student's tail and the sketch's, each summing to 1; overwritten.
    """
    everything = torch.logsumexp(torch.cat([terms.entries, terms.gold[:, None], terms.tail[:, None]], 1), 1)
    q = q_tail.mul_((terms.tail - everything).exp()[:, None])
    p = w.mul_(rows.tail_logmass.to(q).exp()[:, None])
    if tail.compared == "tvd":
        gap = p.sub_(q)
        terms.spread = 0.5 * gap.abs().sum(1)
        slopes = gap.sign_().mul_(q).mul_(-0.5)
    else:
        mixed = (tail.beta * p).add_(q, alpha=1.0 - tail.beta).clamp_(min=torch.finfo(q.dtype).tiny)
        slopes = torch.xlogy(q, q / mixed).mul_(1.0 - tail.beta)
        terms.spread = tail.beta * torch.xlogy(p, p / mixed).sum(1) + slopes.sum(1)
    terms.slope = slopes.sum(1)
    return slopes


def _loss_and_gradient(
    logits: torch.Tensor,
    rows: TeacherRows,
    tail: Tail,
    temperature: float,
    loss_of: LossOfTerms,
    part: slice,
    scratch: _Scratch,
    *,
    own: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a slice and its gradient on the logits `[C, V]`, which are overwritten where they are our own."""
    z = _at_temperature(_at_least_float32(logits), temperature)
    reduced = _reduce(z, rows, tail, scratch, own=own or z is not logits)
    terms = reduced.terms
    leaves = [terms.gold, terms.entries, terms.tail]
    leaves += [term for term in (terms.expected, terms.spread) if term is not None]
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_()
        loss = loss_of(terms, part)
        found = torch.autograd.grad(loss / temperature, leaves, allow_unused=True)
    gold, entries, lump, *shaped = (
        torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, found, strict=True)
    )
    gradient = reduced.weights.mul_(lump[:, None] * reduced.factor)
    if reduced.shape is not None:
        gradient.addcmul_(reduced.shape, shaped[0][:, None])
    # Padding entries stand at gold, whose own gradient comes last; an id stands once in the top-N.
    ids = kept_ids(rows)
    gradient.scatter_(1, ids, entries.masked_fill(ids == rows.gold[:, None], 0.0))
    gradient.scatter_(1, rows.gold[:, None], gold[:, None])
    if reduced.samples is not None:
        ids, shares = reduced.samples
        gradient.scatter_add_(1, ids, shaped[0][:, None] * shares.to(gradient))
    return loss.detach(), gradient


def _at_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits if temperature == 1 else logits / temperature


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
