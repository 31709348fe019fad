"""From a kept set to the divergences: TKD, DKD and cross-entropy of R rows, on the student's logits.

With `p` the teacher, `q` the student, `g` the gold token (Zhong et al., ACL 2024, eq. 3-5):

    TKD = p_g log(p_g / q_g) + (1 - p_g) log((1 - p_g) / (1 - q_g))
    DKD = sum_{j != g} p^_j log(p^_j / q^_j),   p^_j = p_j / (1 - p_g)
    KL(p || q) = TKD + UNC * DKD,               UNC = 1 - p_g

The student's normaliser is always the full vocabulary. What stands for the teacher inside the tail (all ids
outside top-N and gold) is the tail mode:

    bucket  one lump, compared with the student's lump: a lower bound, exact when the tail is empty
    drop    ignored, the kept set renormalised (what most systems do): biased, kept for comparison
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

TailMode = Literal["bucket", "drop"]
TAIL_MODES: tuple[str, ...] = get_args(TailMode)

# Above this log p(gold) the stored gold is so close to 0 that an engine may have rounded it; below, its float32
# says more about 1 - p(gold) than entries rounded to 16 bits do.
_NEAR_CERTAIN = -1e-2


@dataclass
class TeacherRows:
    """What the cache says of R positions, padded to the widest top-N.

    gold: int64 `[R]`; gold_logprob, tail_logmass: float32 `[R]`, nats;
    top_ids: int64 `[R, N]`; top_logprobs: float32 `[R, N]`, -inf where a position has fewer entries.
    """

    gold: torch.Tensor
    gold_logprob: torch.Tensor
    tail_logmass: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    def __len__(self) -> int:
        return len(self.gold)

    def __getitem__(self, rows: slice | torch.Tensor) -> TeacherRows:
        return TeacherRows(**{name: value[rows] for name, value in self.__dict__.items()})

    def to(self, device: torch.device) -> TeacherRows:
        return TeacherRows(**{name: value.to(device, non_blocking=True) for name, value in self.__dict__.items()})


@dataclass
class Divergences:
    """`[R]` each, nats, differentiable with respect to the student's logits."""

    tkd: torch.Tensor
    dkd: torch.Tensor
    ce: torch.Tensor


@dataclass
class TeacherTerms:
    """The teacher's side, which needs no student. All `[R]` but the last, in nats.

    gold: log p_g; nongold: log(1 - p_g), the log of UNC; tail: log of the tail's share of the non-gold mass;
    entries: `[R, N]`, log p^ of the kept non-gold ids, -inf elsewhere.
    """

    gold: torch.Tensor
    nongold: torch.Tensor
    tail: torch.Tensor
    entries: torch.Tensor

    def __getitem__(self, rows: slice | torch.Tensor) -> TeacherTerms:
        return TeacherTerms(self.gold[rows], self.nongold[rows], self.tail[rows], self.entries[rows])

    @property
    def unc(self) -> torch.Tensor:
        return self.nongold.exp()


def teacher_terms(rows: TeacherRows, tail_mode: TailMode, dtype: torch.dtype = torch.float32) -> TeacherTerms:
    """The teacher's two distributions, gold against the rest and within the rest, from what was kept."""
    entries = rows.top_logprobs.to(dtype).masked_fill(rows.top_ids == rows.gold[:, None], float("-inf"))
    tail = rows.tail_logmass.to(dtype)
    gold = rows.gold_logprob.to(dtype)
    if tail_mode == "drop":
        tail = torch.full_like(tail, float("-inf"))
        everything = torch.logsumexp(torch.cat([entries, gold[:, None]], 1), 1)
        entries, gold = entries - everything[:, None], gold - everything
    within = _logsumexp(torch.cat([entries, tail[:, None]], 1))
    certain = gold > _NEAR_CERTAIN
    from_gold = torch.log(-torch.expm1(gold.masked_fill(certain, -1.0)))
    nongold = torch.where(certain, within, from_gold)
    # A gold of exactly 1 leaves nothing to share out: p^ is empty and DKD is 0.
    share = within.masked_fill(within == float("-inf"), 0.0)
    return TeacherTerms(gold, nongold, tail - share, entries - share[:, None])


@dataclass
class StudentTerms:
    """What any of the divergences needs of the student's logits z, and all that they depend on.

    gold: `[R]`, z of the gold token; entries: `[R, N]`, z of the kept non-gold ids, -inf where there is none;
    tail: `[R]`, log-sum-exp of z over the tail, -inf where it is empty.
    """

    gold: torch.Tensor
    entries: torch.Tensor
    tail: torch.Tensor


def kept_ids(rows: TeacherRows) -> torch.Tensor:
    """int64 `[R, N]`: the top-N ids; padding points at gold, which is in the kept set anyway."""
    return torch.where(rows.top_logprobs > float("-inf"), rows.top_ids, rows.gold[:, None])


def student_terms(logits: torch.Tensor, rows: TeacherRows) -> StudentTerms:
    """Terms of each row of the student's full logits.

    logits: `[R, V]`, before softmax; half precisions are computed in float32. V may exceed the teacher's vocabulary
    (the padding then belongs to the student's tail), and every id in `rows` must be below V.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    gold, ids = rows.gold[:, None], kept_ids(rows)
    entries = z.gather(1, ids).masked_fill(ids == gold, float("-inf"))
    tail = _logsumexp(z.scatter(1, torch.cat([ids, gold], 1), float("-inf")))
    return StudentTerms(z.gather(1, gold).squeeze(1), entries, tail)


def divergences(student: StudentTerms, teacher: TeacherTerms) -> Divergences:
    """TKD, DKD and cross-entropy of each row. The student is normalised over its full vocabulary."""
    nongold = torch.logaddexp(student.tail, _logsumexp(student.entries))
    everything = torch.logaddexp(nongold, student.gold)
    log_q_gold = student.gold - everything
    tkd = _weighted_gap(teacher.gold, log_q_gold) + _weighted_gap(teacher.nongold, nongold - everything)
    dkd = _weighted_gap(teacher.entries, student.entries - nongold[:, None]).sum(1)
    dkd = dkd + _weighted_gap(teacher.tail, student.tail - nongold)
    return Divergences(tkd, dkd, -log_q_gold)


def _weighted_gap(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`p (log p - log q)`, and 0 with a zero gradient wherever p is 0, whatever q is there."""
    absent = log_p == float("-inf")
    log_p = log_p.masked_fill(absent, 0.0)
    log_q = log_q.masked_fill(absent, 0.0)
    return (log_p.exp() * (log_p - log_q)).masked_fill(absent, 0.0)


def _logsumexp(values: torch.Tensor) -> torch.Tensor:
    """log sum exp over dim 1; a row of only -inf gives -inf and, unlike torch's, a zero gradient and not NaN."""
    empty = (values == float("-inf")).all(1)
    safe = values.masked_fill(empty[:, None], 0.0)
    return torch.logsumexp(safe, 1).masked_fill(empty, float("-inf"))
