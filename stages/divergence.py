"""From a kept set to the divergences: TKD, DKD and cross-entropy of R rows, on the student's logits.

With `p` the teacher, `q` the student, `g` the gold token (Zhong et al., ACL 2024):

    TKD = p_g log(p_g / q_g) + (1 - p_g) log((1 - p_g) / (1 - q_g))
    DKD = sum_{j != g} p^_j log(p^_j / q^_j),   p^_j = p_j / (1 - p_g)
    KL(p || q) = TKD + UNC * DKD,               UNC = 1 - p_g

The student's normaliser is always the full vocabulary. Outside top-N and gold, in the tail, the teacher is what the
tail mode says (`stages.tail`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from stages.tail import Tail, TailMode

BUCKET = Tail("bucket")

Direction = Literal["forward", "reverse"]
DIRECTIONS: tuple[str, ...] = get_args(Direction)

# Above this log p(gold) the stored gold is so close to 0 that an engine may have rounded it; below, its float32
# says more about 1 - p(gold) than entries rounded to 16 bits do.
_NEAR_CERTAIN = -1e-2


@dataclass
class TeacherRows:
    """What the cache says of R positions, padded to the widest top-N.

    gold: int64 `[R]`; gold_logprob, tail_logmass: float32 `[R]`, nats;
    top_ids: int64 `[R, N]`; top_logprobs: float32 `[R, N]`, -inf where a position has fewer entries;
    tail_samples: int64 `[R, M]`, -1 where the tail is empty; entropy: float `[R]`, nats, of the teacher's full
    distribution; None where they were not read. sketch_codes: uint8 `[R, r]`, with `Sketches` `[R, 1 + r]`;
    residual_samples: int64 `[R, M]` and residual_mass: float `[R]`, as in RowStatistics.
    """

    gold: torch.Tensor
    gold_logprob: torch.Tensor
    tail_logmass: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    tail_samples: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    sketch_codes: torch.Tensor | None = None
    residual_samples: torch.Tensor | None = None
    residual_mass: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.gold)

    def __getitem__(self, rows: slice | torch.Tensor) -> TeacherRows:
        part: dict[str, Any] = {name: None if v is None else v[rows] for name, v in self.__dict__.items()}
        return TeacherRows(**part)


def at_temperature(rows: TeacherRows, tail_logmass_at: torch.Tensor, temperature: float) -> TeacherRows:
    """The same positions with the teacher at another temperature: log p_T(j) = log p_j / T - log sum_i p_i^(1/T).

    tail_logmass_at: float `[R]`, the stored log sum over the tail of p^(1/T); from the tail at 1 it cannot be known.
    """
    entries, gold = rows.top_logprobs / temperature, rows.gold_logprob / temperature
    others = entries.masked_fill(rows.top_ids == rows.gold[:, None], float("-inf"))
    log_sum = torch.logsumexp(torch.cat([others, gold[:, None], tail_logmass_at[:, None]], 1), 1)
    return replace(
        rows,
        gold_logprob=gold - log_sum,
        tail_logmass=tail_logmass_at - log_sum,
        top_logprobs=entries - log_sum[:, None],
    )


@dataclass
class Divergences:
    """`[R]` each, nats, differentiable with respect to the student's logits.

    whole: a divergence of the whole distributions, by default KL(p || q).
    """

    tkd: torch.Tensor
    dkd: torch.Tensor
    whole: torch.Tensor
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
    tail: `[R]`, log-sum-exp of z over the tail, -inf where it is empty. With a tail mode that gives the teacher's tail
    a shape s: expected: `[R]`, sum_j s_j z_j; shape: `[R]`, sum_j s_j log s_j, a constant; both 0 for an empty tail.
    With a sketch and another comparison, spread: `[R]`, what the tail's ids add one by one: reversed KL(q_tail || w),
    q_tail summing to 1; of jsd and tvd all that the tail adds, each id having its share of the whole distributions.
    slope: `[R]`, a constant: by how much spread falls as the student's log-sum-exp over all ids, held constant in it,
    rises; None where it is not held constant.
    """

    gold: torch.Tensor
    entries: torch.Tensor
    tail: torch.Tensor
    expected: torch.Tensor | None = None
    shape: torch.Tensor | None = None
    spread: torch.Tensor | None = None
    slope: torch.Tensor | None = None


def kept_ids(rows: TeacherRows) -> torch.Tensor:
    """int64 `[R, N]`: the top-N ids; padding points at gold, which is in the kept set anyway."""
    return torch.where(rows.top_logprobs > float("-inf"), rows.top_ids, rows.gold[:, None])


def student_terms(logits: torch.Tensor, rows: TeacherRows, tail: Tail = BUCKET) -> StudentTerms:
    """Terms of each row of the student's full logits.

    logits: `[R, V]`, before softmax; half precisions are computed in float32. V may exceed the teacher's vocabulary
    (the padding then belongs to the student's tail), and every id in `rows` must be below V.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    gold, ids = rows.gold[:, None], kept_ids(rows)
    entries = z.gather(1, ids).masked_fill(ids == gold, float("-inf"))
    outside = z.scatter(1, torch.cat([ids, gold], 1), float("-inf"))
    terms = StudentTerms(z.gather(1, gold).squeeze(1), entries, _logsumexp(outside))
    if tail.mode == "prior":
        shape = tail.prior_shape(torch.nan_to_num(outside.detach().softmax(1)))
        terms.expected = (shape * z).sum(1)
        terms.shape = torch.xlogy(shape, shape).sum(1)
    elif tail.mode == "sampled":
        ids, weights = sample_weights(rows)
        terms.expected = (z.gather(1, ids) * weights.to(z)).sum(1)
        terms.shape = sampled_shape(rows).to(z)
    elif tail.mode == "sketch":
        _add_sketch(terms, z, outside, rows, tail)
    return terms


def _add_sketch(terms: StudentTerms, z: torch.Tensor, outside: torch.Tensor, rows: TeacherRows, tail: Tail) -> None:
    """outside: z with -inf on the kept set."""
    x = tail.sketch_logits(sketch_codes(rows), kept_ids(rows), rows.gold[:, None], z.shape[1])
    if tail.compared == "forward":
        w = x.softmax(1)
        terms.expected = (w.to(z) * z).sum(1)
        terms.shape = sketch_shape(rows, tail, x, w).to(z)
        residual = residual_weights(rows, tail, z.shape[1])
        if residual is not None:
            ids, shares = residual
            terms.expected = terms.expected + (z.gather(1, ids) * shares.to(z)).sum(1)
        return
    present = outside > float("-inf")
    if tail.compared == "reverse":
        log_q = (outside - terms.tail[:, None]).masked_fill(~present, 0.0)
        log_w = floored(x.log_softmax(1)).to(z).masked_fill(~present, 0.0)
        terms.spread = (log_q.exp().masked_fill(~present, 0.0) * (log_q - log_w)).sum(1)
        return
    q = (outside - torch.logsumexp(z, 1, keepdim=True)).masked_fill(~present, float("-inf")).exp()
    p = rows.tail_logmass.to(z).exp()[:, None] * x.softmax(1).to(z)
    if tail.compared == "tvd":
        terms.spread = 0.5 * (p - q).abs().sum(1)
        return
    tiny = torch.finfo(z.dtype).tiny
    log_mixed = (tail.beta * p + (1.0 - tail.beta) * q).clamp(min=tiny).log()
    gap_p, gap_q = (share * (share.clamp(min=tiny).log() - log_mixed) for share in (p, q))
    terms.spread = (tail.beta * gap_p + (1.0 - tail.beta) * gap_q).sum(1)


def sketch_codes(rows: TeacherRows) -> torch.Tensor:
    if rows.sketch_codes is None:
        raise ValueError("the tail mode `sketch` needs sketch codes")
    return rows.sketch_codes


def residual_weights(rows: TeacherRows, tail: Tail, width: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """int64 `[R, M]` ids and float32 `[R, M]`, the signed share of the tail that each adds to w; None without samples.

    They were drawn at temperature 1 and mean nothing at another. width: of the student's vocabulary; what it has no id
    for adds nothing.
    """
    ids, mass = rows.residual_samples, rows.residual_mass
    if ids is None or mass is None or not ids.shape[1] or tail.temperature != 1.0:
        return None
    more = (ids.shape[1] + 1) // 2
    sign = torch.full((ids.shape[1],), -0.5 / max(1, ids.shape[1] - more), device=ids.device)
    sign[:more] = 0.5 / more
    shares = mass.float()[:, None] * sign
    return ids.clamp(max=width - 1), shares.masked_fill(ids >= width, 0.0)


def sketch_shape(rows: TeacherRows, tail: Tail, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """float `[R]`: sum_j s_j log s_j; of the true tail where residual samples stand for it, else of w `[R, V]`.

    x: `[R, V]`, logits of w.
    """
    if residual_weights(rows, tail, x.shape[1]) is not None:
        return sampled_shape(rows)
    # log w at its peak gives the normaliser without another logarithm per id.
    log_sum = x.amax(1) - w.amax(1).log()
    return torch.linalg.vecdot(w, x) - log_sum


def sample_weights(rows: TeacherRows) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 `[R, M]` ids that can be gathered, and float32 `[R, M]`, the share of the tail that each stands for.

    A share is 0 where an empty tail gave no sample.
    """
    if rows.tail_samples is None:
        raise ValueError("the tail mode `sampled` needs tail samples")
    drawn = (rows.tail_samples >= 0).float()
    return rows.tail_samples.clamp(min=0), drawn / drawn.sum(1, keepdim=True).clamp(min=1)


def sampled_shape(rows: TeacherRows) -> torch.Tensor:
    """float `[R]`: sum_j s_j log s_j of the teacher's tail s, which samples of it do not say but the entropy does:

        -H(p) = sum_K p log p + m log m + m sum_j s_j log s_j,   m the tail's mass

    It is the same for every student. 0 where the entropy was not read and where the tail is empty.
    """
    if rows.entropy is None:
        return torch.zeros_like(rows.gold_logprob)
    outside = ~((rows.top_ids == rows.gold[:, None]) & (rows.top_logprobs > float("-inf"))).any(1)
    kept = _p_log_p(rows.top_logprobs).sum(1) + outside * _p_log_p(rows.gold_logprob)
    mass = rows.tail_logmass.exp()
    rest = -rows.entropy.to(kept) - kept - _p_log_p(rows.tail_logmass)
    # A tail too light for the entropy's 16 bits: any value within reason, it hardly counts.
    shape = (rest / mass.clamp(min=1e-30)).clamp(min=-20.0, max=0.0)
    return shape.masked_fill(mass == 0, 0.0)


def _p_log_p(log_p: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * log_p).masked_fill(log_p == float("-inf"), 0.0)


def divergences(
    student: StudentTerms,
    teacher: TeacherTerms,
    direction: Direction = "forward",
    whole: Literal["kl", "jsd", "tvd"] = "kl",
    beta: float = 0.5,
) -> Divergences:
    """The divergences of each row. The student is normalised over its full vocabulary.

    direction: `reverse` swaps p and q, so KL(q || p) = TKD + (1 - q_g) DKD. whole: which divergence of the whole
    distributions; jsd is beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (Agarwal et al., ICLR
    2024), tvd is half the sum of |p - q|. All but forward ones compare the tail as one lump, unless a sketch says more.
    """
    nongold = torch.logaddexp(student.tail, _logsumexp(student.entries))
    everything = torch.logaddexp(nongold, student.gold)
    log_q_gold, log_q_nongold = student.gold - everything, nongold - everything
    entries, tail = student.entries - nongold[:, None], student.tail - nongold
    if direction == "forward":
        tkd = _weighted_gap(teacher.gold, log_q_gold) + _weighted_gap(teacher.nongold, log_q_nongold)
        dkd = _weighted_gap(teacher.entries, entries).sum(1) + _weighted_gap(teacher.tail, tail)
        unc = teacher.nongold.exp()
    else:
        tkd = _weighted_gap(log_q_gold, floored(teacher.gold)) + _weighted_gap(log_q_nongold, floored(teacher.nongold))
        dkd = _weighted_gap(entries, floored(teacher.entries)).sum(1) + _weighted_gap(tail, floored(teacher.tail))
        unc = log_q_nongold.exp()
    if student.expected is not None and student.shape is not None:
        # An empty tail, the teacher's or the student's, has no shape to compare.
        empty = (teacher.tail == float("-inf")) | (student.tail == float("-inf"))
        gap = student.shape - student.expected + student.tail.masked_fill(empty, 0.0)
        dkd = dkd + teacher.tail.exp() * gap.masked_fill(empty, 0.0)
    if direction == "reverse" and student.spread is not None:
        empty = (teacher.tail == float("-inf")) | (student.tail == float("-inf"))
        dkd = dkd + (tail.exp() * student.spread).masked_fill(empty, 0.0)
    if whole == "kl":
        compared = tkd + unc * dkd
    else:
        p = _distribution(teacher.gold, teacher.nongold, teacher.entries, teacher.tail)
        q = _distribution(log_q_gold, log_q_nongold, entries, tail)
        if student.spread is not None:
            p, q = p[:, :-1], q[:, :-1]
        compared = _jensen_shannon(p, q, beta) if whole == "jsd" else 0.5 * (p.exp() - q.exp()).abs().sum(1)
        if student.spread is not None:
            compared = compared + student.spread
            if student.slope is not None:
                compared = compared - student.slope * (everything - everything.detach())
    return Divergences(tkd, dkd, compared, -log_q_gold)


def _distribution(gold: torch.Tensor, nongold: torch.Tensor, entries: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[R, 1 + N + 1]` of gold, the kept non-gold ids and the tail as one lump."""
    return torch.cat([gold[:, None], entries + nongold[:, None], (tail + nongold)[:, None]], 1)


def _jensen_shannon(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) of log-probabilities `[R, K]`, 0 < beta < 1."""
    mixed = torch.logaddexp(_finite(p) + math.log(beta), _finite(q) + math.log1p(-beta))
    return (beta * _weighted_gap(p, mixed) + (1.0 - beta) * _weighted_gap(q, mixed)).sum(1)


def _finite(log_p: torch.Tensor) -> torch.Tensor:
    """-inf as a number that is as good as it: torch's logaddexp has no gradient at two of them."""
    return log_p.masked_fill(log_p == float("-inf"), -1e4)


def floored(log_p: torch.Tensor) -> torch.Tensor:
    """Reversed, a teacher that has nothing where the student has something is infinitely far: bound it at e^-50."""
    return log_p.clamp(min=-50.0)


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
