"""The output layer and the loss in one pass over slices of rows, so that `[tokens, vocabulary]` never exists.

Every objective depends on a row's logits only through a few numbers: the logits of the kept ids, the log-sum-exp of
the rest, and, where the teacher's tail has a shape, their mean under it (StudentTerms). For a slice of rows the logits
are computed, reduced to those numbers, and the objective's small gradient is expanded to the gradient on the logits,

    d loss / d z_v  =  d loss / d tail * softmax_tail(v) + d loss / d expected * shape(v)   for v in the tail,

(a sketch that is compared in another way than forward KL has `spread` and its slope in the place of the latter) and the
kept ids' own entries elsewhere. It takes the place of the logits and is multiplied back into hidden states and head
weights before the slice is dropped, so the gradients are ready when the forward pass ends and `backward` only scales
them. One `exp` per logit and three matrix products are all there is, as in plain cross-entropy; a sketch adds a thin
product and an `exp` of its own.

A slice is as large as its memory may be, since the head's weights are read for each one. From logits to gradient it is
gone through in blocks that a CPU's cache holds, and what a sketch gives back is never larger than a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

# fp32 logits of a block for each thread of a CPU: measured on two at V = 32,000 and 152,000.
_BLOCK_BYTES = 8 << 20

# Loss of the rows of a block, as a sum: (terms of the block, which rows they are) -> scalar.
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
    size = max(16, slice_bytes // (4 * vocabulary_size))
    # What a sketch gives back takes as much room as a block, and again as much where it has no residual samples.
    sketched = tail.mode == "sketch"
    block = size // 2 if sketched else size
    if hidden.device.type == "cpu":
        # Of a sketch twice as many rows: its basis is read, and packed for the product, once a block.
        cached = torch.get_num_threads() * _BLOCK_BYTES * (2 if sketched else 1)
        block = min(block, max(1, cached // (4 * vocabulary_size)))
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
        total = hidden.new_zeros((), dtype=torch.float32)
        scratch = _Scratch()
        for part in _parts(len(rows), size):
            logits = head(hidden[part])
            for few in _parts(len(logits), block):
                z = _taken(scratch.like("z", logits[few]), logits[few], temperature)
                these = _within(part, few)
                total = total + loss_of(_reduce(z, rows[these], tail, scratch).terms, these)
        return total
    return _HeadLoss.apply(hidden, head, rows, tail, temperature, loss_of, size, block, *trained)


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
        block: int,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        # Sums over slices are kept in float32 (float64 for float64 models), whatever the precision of the weights.
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        hidden_gradient = torch.zeros_like(hidden)
        gradients = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        total = torch.zeros((), dtype=accumulate, device=hidden.device)
        scratch = _Scratch()

        def in_blocks(logits: torch.Tensor, gradient: torch.Tensor, part: slice) -> torch.Tensor:
            """Loss of a slice; fills `gradient`."""
            losses = []
            for few in _parts(len(logits), block):
                these = _within(part, few)
                losses.append(
                    _block(logits[few], gradient[few], rows[these], tail, temperature, loss_of, these, scratch)
                )
            return torch.stack(losses).sum()

        for part in _parts(len(rows), size):
            states = hidden[part].detach()
            if isinstance(head, nn.Linear):
                # Nothing but the gradient is needed to go back through it, so its output is ours to overwrite.
                with torch.no_grad():
                    gradient = head(states)
                total += in_blocks(gradient, gradient, part)
                hidden_gradient[part] = _through_linear(head, states, gradient, parameters, gradients)
            else:
                with torch.enable_grad():
                    logits = head(states.requires_grad_())
                gradient = torch.empty_like(logits, requires_grad=False)
                total += in_blocks(logits.detach(), gradient, part)
                found = torch.autograd.grad(logits, [states, *parameters], gradient, allow_unused=True)
                hidden_gradient[part] = found[0]
                for gathered, new in zip(gradients, found[1:], strict=True):
                    if new is not None:
                        gathered += new
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
        return hidden_gradient.mul_(scale), None, None, None, None, None, None, None, *scaled


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
    """Memory of a block that the next one uses again: fresh pages are dear on a CPU."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def like(self, name: str, z: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Shape and device of `z`, in at least float32 unless a dtype is given; holds anything."""
        if name not in self._kept or len(self._kept[name]) < len(z):
            self._kept[name] = torch.empty_like(z, dtype=dtype or torch.promote_types(z.dtype, torch.float32))
        return self._kept[name][: len(z)]


def _parts(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _within(part: slice, few: slice) -> slice:
    return slice(part.start + few.start, part.start + few.stop)


def _taken(z: torch.Tensor, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """`z`, filled with the logits at that temperature."""
    if z.data_ptr() != logits.data_ptr():
        z.copy_(logits)
    return z if temperature == 1 else z.div_(temperature)


@dataclass
class _Reduced:
    """A block of logits reduced to its terms, and what turns their gradient into one on the logits."""

    terms: StudentTerms
    weights: torch.Tensor  # [C, V], the softmax within the tail up to a factor per row; zero on the kept set
    factor: torch.Tensor  # [C, 1], that factor
    shape: torch.Tensor | None  # [C, V], the derivative of `expected` or `spread` by the logits where it is dense
    samples: tuple[torch.Tensor, torch.Tensor] | None  # ids [C, M] and their shares of the tail, in `expected` too


def _reduce(z: torch.Tensor, rows: TeacherRows, tail: Tail, scratch: _Scratch) -> _Reduced:
    """Terms of logits `[C, V]`, which are overwritten, without a graph."""
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
            shape = _sketch_shape(z, terms, rows, tail, samples, scratch)
        else:
            x = tail.sketch_logits(sketch_codes(rows), ids, gold, z.shape[1])
            # Reversed log q - log w, up to the student's normaliser; else w.
            x = z - floored(x.log_softmax(1)).to(z) if tail.compared == "reverse" else x.softmax(1).to(z)
    logits = scratch.like("logits", z).copy_(z) if tail.mode == "prior" else None
    z.scatter_(1, ids, float("-inf")).scatter_(1, gold, float("-inf"))
    peak = z.amax(1, keepdim=True)
    # A kept set that is the whole vocabulary leaves a tail of nothing but -inf.
    peak.masked_fill_(peak == float("-inf"), 0.0)
    weights = z.sub_(peak).exp_()
    total = weights.sum(1, keepdim=True)
    factor = total.clamp(min=torch.finfo(z.dtype).tiny).reciprocal()
    terms.tail = (total.log() + peak).squeeze(1)
    if logits is not None:
        shape = tail.prior_shape(weights)
        terms.expected = torch.linalg.vecdot(shape, logits)
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
    scratch: _Scratch,
) -> torch.Tensor:
    """w `[C, V]`; sets `expected` and `shape`."""
    x = scratch.like("x", z, torch.float32)
    tail.sketch_logits(sketch_codes(rows), kept_ids(rows), rows.gold[:, None], z.shape[1], out=x)
    # Where `sketch_shape` does not need the logits any more, w is made in their place.
    w = torch.softmax(x, 1, out=x if samples is not None else scratch.like("w", z, torch.float32))
    terms.shape = sketch_shape(rows, tail, x, w).to(z)
    w = w.to(z)
    terms.expected = _row_products(w, z)
    if samples is not None:
        terms.expected += (z.gather(1, samples[0]) * samples[1].to(z)).sum(1)
    return w


def _row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`[C]`, the sum of `a * b` over each row of `[C, V]`. Row by row on a CPU: measured at twice the speed of one
    product of the matrices, which also would need memory for it.
    """
    if a.device.type != "cpu":
        return torch.linalg.vecdot(a, b)
    return torch.stack([torch.dot(x, y) for x, y in zip(a, b, strict=True)]) if len(a) else a.new_zeros(0)


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


def _block(
    logits: torch.Tensor,
    gradient: torch.Tensor,
    rows: TeacherRows,
    tail: Tail,
    temperature: float,
    loss_of: LossOfTerms,
    these: slice,
    scratch: _Scratch,
) -> torch.Tensor:
    """Loss of a block; `gradient` `[C, V]`, of the dtype of the logits and maybe their memory, becomes theirs."""
    z = gradient if gradient.dtype in (torch.float32, torch.float64) else scratch.like("z", logits)
    reduced = _reduce(_taken(z, logits, temperature), rows, tail, scratch)
    terms = reduced.terms
    leaves = [terms.gold, terms.entries, terms.tail]
    leaves += [term for term in (terms.expected, terms.spread) if term is not None]
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_()
        loss = loss_of(terms, these)
        found = torch.autograd.grad(loss / temperature, leaves, allow_unused=True)
    gold, entries, lump, *shaped = (
        torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, found, strict=True)
    )
    z = reduced.weights.mul_(lump[:, None] * reduced.factor)
    if reduced.shape is not None:
        z.addcmul_(reduced.shape, shaped[0][:, None])
    # Padding entries stand at gold, whose own gradient comes last; an id stands once in the top-N.
    ids = kept_ids(rows)
    z.scatter_(1, ids, entries.masked_fill(ids == rows.gold[:, None], 0.0))
    z.scatter_(1, rows.gold[:, None], gold[:, None])
    if reduced.samples is not None:
        ids, shares = reduced.samples
        z.scatter_add_(1, ids, shaped[0][:, None] * shares.to(z))
    if z.dtype != gradient.dtype:
        gradient.copy_(z)
    return loss.detach()
