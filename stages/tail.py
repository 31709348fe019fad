"""What stands for the teacher inside the tail: the ids outside top-N and gold, of which only the mass is stored.

    bucket   one lump, compared with the student's lump: a lower bound of the divergence, exact when the tail is
             empty; leaves the shape of the student's tail free
    drop     nothing, the kept set renormalised (what most systems do): biased, kept for comparison
    prior    spread as r_j ~ prior_j^gamma * q_j^(1-gamma) over the tail, q the student itself and held constant,
             prior the teacher's mean tail distribution over the whole cache: no bytes per token
    sampled  the ids that were drawn from the tail when caching, each standing for 1/M of its mass: unbiased, noisy;
             trains nearest to the live teacher (docs/fidelity.md) and is what `auto` takes where it can
    sketch   w, the softmax over the tail of logits that a low-rank code of the teacher's hidden state gives
             (`stages.sketch`), and M residual samples, added or taken away, that make its mean the teacher's: unbiased,
             less noisy. Without them, and for what is not linear in the teacher, w alone

With `s` that shape (it sums to 1 over the tail) the teacher's tail adds, beyond the bucket's lump,

    p^_tail * KL(s || q_tail) = p^_tail * (sum_j s_j log s_j - (sum_j s_j z_j - logsumexp_tail z))

so all that the student's logits z have to give is one more number per row, `sum_j s_j z_j`. For `sampled` and `sketch`
the first sum follows from the stored entropy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch

if TYPE_CHECKING:
    from stages.sketch import Sketch, Sketches

TailMode = Literal["bucket", "drop", "prior", "sampled", "sketch"]
TAIL_MODES: tuple[str, ...] = get_args(TailMode)
# `auto` becomes a mode when the cache is known, see Objective.for_cache.
TailChoice = Literal["auto", "bucket", "drop", "prior", "sampled", "sketch"]
TAIL_CHOICES: tuple[str, ...] = get_args(TailChoice)
# What teacher and student are compared by: KL(p || q), KL(q || p), Jensen-Shannon, total variation.
Compared = Literal["forward", "reverse", "jsd", "tvd"]

# A logit that has no share: finite, so that 0 times it is 0.
_ABSENT = -1e30


@dataclass(frozen=True)
class Tail:
    """A tail mode with what it needs. gamma: of `prior`, 0..1. log_prior: float `[V]`, log of the mean tail mass of
    each id up to a constant; ids that never were in a tail have the smallest value there is, not -inf. sketch: of the
    mode `sketch`, which also has to know what is compared, the beta of jsd, and the temperature of the teacher."""

    mode: TailMode = "bucket"
    gamma: float = 0.5
    log_prior: torch.Tensor | None = None
    sketch: Sketch | Sketches | None = None
    compared: Compared = "forward"
    beta: float = 0.5
    temperature: float = 1.0

    def to(self, device: torch.device | str) -> Tail:
        """The same with its tensors there: they are one for the whole run."""
        prior = None if self.log_prior is None else self.log_prior.to(device)
        return replace(self, log_prior=prior, sketch=None if self.sketch is None else self.sketch.to(device))

    def prior_shape(self, tail_softmax: torch.Tensor) -> torch.Tensor:
        """r `[C, V]` of the mode `prior`, summing to 1 over the tail.

        tail_softmax: `[C, V]`, the student's softmax within the tail up to a factor per row, 0 elsewhere.
        """
        assert self.log_prior is not None
        width = tail_softmax.shape[1]
        prior = torch.nn.functional.pad(self.log_prior, (0, max(0, width - len(self.log_prior))), value=float("-inf"))
        weights = (self.gamma * prior[:width].to(tail_softmax)).exp()
        # 0^0 is 1: at gamma = 1 the kept set must be left out by hand.
        shape = tail_softmax.pow(1.0 - self.gamma).mul_(weights).masked_fill_(tail_softmax == 0, 0.0)
        return shape.div_(shape.sum(1, keepdim=True).clamp(min=torch.finfo(shape.dtype).tiny))

    def sketch_logits(
        self,
        codes: torch.Tensor,
        kept: torch.Tensor,
        gold: torch.Tensor,
        width: int,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """float32 `[C, width]` whose softmax is w: 0 on the kept ids `[C, N]` and on gold `[C, 1]`.

        codes: uint8 `[C, r]`, of `Sketches` `[C, 1 + r]`. width: of the student's vocabulary, which may be wider than
        the teacher's. out: memory for it.
        """
        if self.sketch is None:
            raise ValueError("the tail mode `sketch` needs a sketch")
        x = torch.empty((len(codes), width), device=codes.device) if out is None else out
        known = x[:, : self.sketch.vocabulary_size]
        self.sketch.logits(codes, out=known)
        x[:, known.shape[1] :] = _ABSENT
        if self.temperature != 1.0:
            x.div_(self.temperature)
        return x.scatter_(1, kept, _ABSENT).scatter_(1, gold, _ABSENT)


def log_prior(mean_tail: torch.Tensor) -> torch.Tensor:
    """From `tail_prior` of a cache, float32 `[V]`. An id that no tail ever held gets a tenth of the rarest's mass."""
    positive = mean_tail[mean_tail > 0]
    floor = positive.min() / 10 if len(positive) else torch.tensor(1.0)
    return mean_tail.clamp(min=float(floor)).log()
