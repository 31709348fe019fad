"""What is kept of the teacher's distribution at a position, computed from its logits.

Everything comes from one exponential of a slice of rows `[C, V]`, in fp32 and without cancellation:

- the tail mass is the sum of what is left after the kept set is zeroed, never `1 - sum(top)`: in fp32
  the difference is wrong by more than itself once the tail is under 1e-6;
- Z is a sum of shares of the most probable id, `e^(z_j - z_max)`, and so between 1 and V;
- `log p(gold) = -softplus(log nongold - z_gold)`, so a teacher that is sure to 1 - 1e-9 still has a UNC
  of 1e-9 instead of 0, and its tokens still rank.

A tail below e^-87 of the most probable token underflows fp32 and reads as empty (-inf).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

_FLOOR = -1.0e4
# Ids per group of the top-k's tournament.
_GROUP = 8


@dataclass(frozen=True)
class StatisticsOptions:
    """What to keep at each scored position.

    top_n: how many of the most probable ids, 1..V.
    temperatures: for each T, `log sum_{j not in K} p_j^(1/T)` is computed as well (T = 1 is always there).
    tail_samples: M ids drawn from the tail in proportion to p, one from each M-th of its mass; 0 for none.
    seed: of all samples.
    tail_epsilon: above 0, a position keeps only the shortest prefix of its top-N that leaves less than this mass in the
        tail, and at least min_n ids. What leaves the prefix is tail in every respect.
    sketch_rank: codes per position of a sketch (stages.sketch); 0 for none.
    residual_samples: ids drawn from what that sketch misses; 0 for none, else 2 or more, as either sign needs one.
    """

    top_n: int
    temperatures: tuple[float, ...] = ()
    tail_samples: int = 0
    seed: int = 0
    tail_epsilon: float = 0.0
    min_n: int = 1
    sketch_rank: int = 0
    residual_samples: int = 0


@dataclass
class RowStatistics:
    """Statistics of C rows; tensors on the device of the logits, log-probabilities in nats."""

    gold_logprob: torch.Tensor  # float32 [C]
    tail_logmass: torch.Tensor  # float32 [C], -inf where the tail is empty
    entropy: torch.Tensor  # float32 [C]
    top_ids: torch.Tensor  # int64 [C, N], by descending log-probability; -1 beyond the prefix that is kept
    top_logprobs: torch.Tensor  # float32 [C, N], -inf there
    tail_logmass_at: torch.Tensor  # float32 [C, len(temperatures)]
    tail_samples: torch.Tensor  # int64 [C, M]; -1 where the tail is empty
    # With the tail p and its reconstruction w, both summing to 1: ids, the first ceil(M/2) drawn in proportion to
    # max(p - w, 0), the others to max(w - p, 0), int64 [C, M]; and R = sum |p - w|, 0..2, float32 [C]. All 0 where
    # nothing is left over. w, plus R/2 shared out among the former, less R/2 among the latter, has the expectation p.
    residual_samples: torch.Tensor
    residual_mass: torch.Tensor
    # KL from p to the distribution that has w in the place of p's tail, nats; 0 without a sketch.
    sketch_kl: torch.Tensor  # float32 [C]


def rows_per_slice(vocabulary_size: int, budget_bytes: int = 64 << 20) -> int:
    """How many rows of fp32 logits fit `budget_bytes`; the peak is about three times that."""
    return max(1, min(4096, budget_bytes // (4 * vocabulary_size)))


def sample_uniforms(input_ids: np.ndarray, options: StatisticsOptions) -> np.ndarray:
    """float64 `[L-1, M]` in [0, 1), ascending: the random numbers behind the tail samples of one sequence.

    Number i is uniform in its stratum [i/M, (i+1)/M). A mean over the M samples is then as unbiased as over independent
    ones and varies no more: an id with a share s of the tail is drawn M s times, give or take two. Being ascending,
    they draw ascending ids, which compress better.

    They depend on the seed and on the token ids alone, so a replay draws the same samples whatever the
    batch, the engine, the worker or the order.
    """
    return _uniforms(input_ids, options.seed, options.tail_samples, b"")


def residual_uniforms(input_ids: np.ndarray, options: StatisticsOptions) -> np.ndarray:
    """The same for the residual samples, from another stream: the two kinds do not know of each other."""
    return _uniforms(input_ids, options.seed, options.residual_samples, b"residual")


def _uniforms(input_ids: np.ndarray, seed: int, samples: int, stream: bytes) -> np.ndarray:
    ids = np.ascontiguousarray(input_ids, dtype="<i4").tobytes()
    digest = hashlib.blake2b(ids, digest_size=8, person=stream).digest()
    key = np.array([seed, int.from_bytes(digest, "little")], dtype=np.uint64)
    uniforms = np.random.Generator(np.random.Philox(key=key)).random((len(input_ids) - 1, samples))
    # The last stratum's largest numbers would round up to 1.
    return np.minimum((np.arange(samples) + uniforms) / max(1, samples), np.nextafter(1.0, 0.0))


@torch.no_grad()
def row_statistics(
    logits: torch.Tensor,
    gold: torch.Tensor,
    options: StatisticsOptions,
    *,
    uniforms: torch.Tensor | None = None,
    prior_sum: torch.Tensor | None = None,
    prior_rows: torch.Tensor | None = None,
    sketch_logits: torch.Tensor | None = None,
    residual_uniforms: torch.Tensor | None = None,
) -> RowStatistics:
    """Statistics of each row of `logits`.

    logits: `[C, V]`, any float dtype.
    gold: int64 `[C]`, the token that really came next.
    uniforms: float64 `[C, M]` in [0, 1), needed when `options.tail_samples` is set.
    prior_sum: float `[V]`, to which the tail distribution of the rows in `prior_rows` (bool `[C]`, all
        when None) is added: `sum_t p_t(j) [j not in K_t]`.
    sketch_logits: float `[C, V]`, what the codes of these rows give back; overwritten.
    residual_uniforms: float64 `[C, M]` in [0, 1), needed when `options.residual_samples` is set.
    """
    x = logits.float()
    top, top_ids = top_k(x, options.top_n)
    peak = top[:, :1]
    gold_column = gold[:, None]
    # A head that is padded may give -inf at ids that do not exist; a floor keeps 0 * -inf out of the entropy.
    gold_x = (x.gather(1, gold_column) - peak).clamp_(min=_FLOOR)
    top_x = (top - peak).clamp_(min=_FLOOR)
    # Shares of the most probable id's probability; divided by their sum Z only where they leave this function.
    e = torch.sub(x, peak).exp_()

    top_is_gold = top_ids == gold_column
    top_e = e.gather(1, top_ids)
    gold_e = e.gather(1, gold_column)
    tail_e = e.scatter_(1, top_ids, 0.0).scatter_(1, gold_column, 0.0)
    tail = tail_e.sum(1)
    others_e = top_e.masked_fill(top_is_gold, 0.0)
    nongold = tail + others_e.sum(1)
    z = nongold + gold_e.squeeze(1)
    log_z = z.log()
    inside = top_is_gold.any(1, keepdim=True)
    kept_gold = inside
    dropped = None
    if options.tail_epsilon:
        dropped = beyond_prefix(others_e / z[:, None], tail / z, options.tail_epsilon, options.min_n)
        # Back to the tail, gold excepted.
        others_e.masked_fill_(~dropped, 0.0)
        tail_e.scatter_add_(1, top_ids, others_e)
        tail = tail + others_e.sum(1)
        top_e = top_e.masked_fill(dropped, 0.0)
        kept_gold = (top_is_gold & ~dropped).any(1, keepdim=True)
    outside_e = gold_e.masked_fill_(kept_gold, 0.0)
    tail_logmass = tail.log() - log_z
    # + 0.0 turns the -0.0 of a certain gold into 0.0.
    gold_logprob = -torch.nn.functional.softplus(nongold.log() - gold_x.squeeze(1)) + 0.0
    top_logprobs = _with_gold(top_x - log_z[:, None], top_is_gold, inside, gold_logprob[:, None])

    rows = torch.ones_like(z) if prior_rows is None else prior_rows.to(z)
    tail_sum = None if prior_sum is None else (rows / z) @ tail_e
    at = [_tail_logmass_at(x, peak, t, top_ids, gold_column, dropped) - log_z / t for t in options.temperatures]
    if options.tail_samples:
        if uniforms is None:
            raise ValueError("tail samples need uniforms")
        samples = _draw(tail_e, uniforms.to(tail_e.device))[0]
    else:
        samples = top_ids.new_empty((len(gold), 0))
    residual_samples, residual_mass = top_ids.new_zeros((len(gold), options.residual_samples)), x.new_zeros(len(gold))
    tail_sketch = sketch_lse = None
    if sketch_logits is not None:
        tail_sketch = torch.linalg.vecdot(tail_e, sketch_logits)
        kept_logits = torch.full_like(top_x, float("-inf"))
        if dropped is not None:
            kept_logits = torch.where(dropped, sketch_logits.gather(1, top_ids), kept_logits)
        sketch_logits.scatter_(1, top_ids, kept_logits).scatter_(1, gold_column, float("-inf"))
        if options.residual_samples and residual_uniforms is None:
            raise ValueError("residual samples need uniforms")
        if options.residual_samples == 1:
            raise ValueError("one residual sample cannot stand for both signs")
        highest = sketch_logits.amax(1, keepdim=True)
        # A kept set that is the whole vocabulary leaves nothing but -inf.
        highest.masked_fill_(highest == float("-inf"), 0.0)
        sketch_e = sketch_logits.sub_(highest).exp_()
        sketch_z = sketch_e.sum(1)
        sketch_lse = sketch_z.log() + highest.squeeze(1)
        residual_samples, residual_mass = _residual(tail_e, tail, sketch_e, sketch_z, residual_uniforms)
    elif options.residual_samples:
        raise ValueError("residual samples need the logits of a sketch")

    # -sum p log p = log Z - sum p (z - z_max). The tail's part takes the place of its shares.
    products = tail_e.mul_(x)
    tail_x = products.sum(1)
    if tail_x.isnan().any():
        tail_x = products.nan_to_num_(nan=0.0).sum(1)
    tail_x = tail_x - peak.squeeze(1) * tail
    mean_x = (torch.linalg.vecdot(top_e, top_x) + (outside_e * gold_x).squeeze(1) + tail_x) / z
    sketch_kl = torch.zeros_like(tail)
    if tail_sketch is not None and sketch_lse is not None:
        # sum p (log p - log tail) - sum p log w over the tail.
        own = tail_x - torch.xlogy(tail, tail)
        sketch_kl = ((own - tail_sketch + sketch_lse * tail) / z).clamp_(min=0.0).masked_fill_(tail == 0, 0.0)
    if dropped is not None:
        top_ids, top_logprobs = top_ids.masked_fill(dropped, -1), top_logprobs.masked_fill(dropped, float("-inf"))
    # After everything that may run out of memory, so that a caller can try again with fewer rows.
    if prior_sum is not None and tail_sum is not None:
        prior_sum += tail_sum
    return RowStatistics(
        gold_logprob=gold_logprob,
        tail_logmass=tail_logmass,
        entropy=(log_z - mean_x).clamp_(min=0.0),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        tail_logmass_at=torch.stack(at, 1) if at else x.new_empty((len(gold), 0)),
        tail_samples=samples,
        residual_samples=residual_samples,
        residual_mass=residual_mass,
        sketch_kl=sketch_kl,
    )


def _with_gold(
    top_logprobs: torch.Tensor, top_is_gold: torch.Tensor, inside: torch.Tensor, gold_logprob: torch.Tensor
) -> torch.Tensor:
    """Gold's own number, the more exact one, in its place among the top-N, `[C, N]`; it may not break their order.

    Where it ties with others, who stands before it is not below it, who stands after it not above. inside: bool
    `[C, 1]`, whether it is among them; gold_logprob: `[C, 1]`.
    """
    reached = top_is_gold.cumsum(1) > 0
    at_least = top_logprobs.maximum(torch.where(inside, gold_logprob, float("-inf")))
    ordered = torch.where(reached, top_logprobs.minimum(gold_logprob), at_least)
    return torch.where(top_is_gold, gold_logprob, ordered)


def beyond_prefix(others_p: torch.Tensor, tail: torch.Tensor, epsilon: float, min_n: int) -> torch.Tensor:
    """bool `[C, N]`: entries behind the shortest prefix, of `min_n` at least, that leaves less than `epsilon`.

    others_p: `[C, N]`, the top-N's probabilities in descending order, 0 at gold, which is kept wherever it stands.
    tail: `[C]`, the mass outside top-N and gold.
    """
    # What a prefix that ends before entry i leaves, added up from the small end.
    left = others_p.flip(1).cumsum(1).flip(1) + tail[:, None]
    return (left < epsilon) & (torch.arange(left.shape[1], device=left.device) >= min_n)


def top_k(x: torch.Tensor, k: int, *, ordered: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """`x.topk(k, dim=1)` of `[C, V]`: values, in descending order if `ordered`, and their int64 ids, both `[C, k]`.

    On a CPU torch selects by a heap over the whole row, the dearest step of all. Here ids are grouped, and only the k
    groups with the largest maxima are looked into: they hold the k largest values, ties aside.
    """
    groups = x.shape[1] // _GROUP
    if x.device.type != "cpu" or groups < 2 * k:
        return x.topk(k, dim=1, sorted=ordered)
    # Ids that are `groups` apart share a group, so that the maxima are taken of contiguous vectors.
    grouped, rest = x[:, : groups * _GROUP].unflatten(1, (_GROUP, groups)), x[:, groups * _GROUP :]
    group = top_k(grouped.amax(1), k, ordered=False)[1]
    members = grouped.gather(2, group[:, None, :].expand(-1, _GROUP, -1)).flatten(1)
    values, index = torch.cat([members, rest], 1).topk(k, dim=1, sorted=ordered)
    ids = index // k * groups + group.gather(1, index % k)
    return values, torch.where(index < members.shape[1], ids, index - members.shape[1] + groups * _GROUP)


def _tail_logmass_at(
    x: torch.Tensor,
    peak: torch.Tensor,
    temperature: float,
    top_ids: torch.Tensor,
    gold_column: torch.Tensor,
    dropped: torch.Tensor | None,
) -> torch.Tensor:
    """log of `sum_{j not in K} e^((z_j - z_max) / T)` of logits `[C, V]`; float `[C]`.

    peak: `[C, 1]`, z_max; dropped: as `beyond_prefix`.
    """
    e = torch.sub(x, peak).div_(temperature).exp_()
    top_e = e.gather(1, top_ids)
    tail = e.scatter_(1, top_ids, 0.0).scatter_(1, gold_column, 0.0).sum(1)
    if dropped is not None:
        tail = tail + top_e.masked_fill(~dropped | (top_ids == gold_column), 0.0).sum(1)
    return tail.log()


def _residual(
    tail_e: torch.Tensor,
    tail: torch.Tensor,
    sketch_e: torch.Tensor,
    sketch_z: torch.Tensor,
    uniforms: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[C, M]` and their mass `[C]`, see RowStatistics.

    tail_e: `[C, V]`, in proportion to p outside the kept set, and tail `[C]`, its sum. sketch_e: the same of w, which
    is overwritten, and sketch_z its sum.
    """
    empty = (tail == 0) | (sketch_z == 0)
    # On the tail's own scale: a light one needs no division that might overflow.
    scale = (tail / sketch_z).masked_fill_(empty, 0.0)
    residual = torch.addcmul(tail_e, sketch_e, scale[:, None], value=-1.0, out=sketch_e)
    if uniforms is None or not uniforms.shape[1]:
        ids, mass = torch.empty((len(tail), 0), dtype=torch.int64, device=tail.device), residual.abs().sum(1)
    else:
        # Half of the samples for either sign, whose masses are equal: what is added is taken away again.
        count, uniforms = uniforms.shape[1], uniforms.to(residual.device)
        more = (count + 1) // 2
        surplus = residual.clamp(min=0.0)
        above, added = _draw(surplus, uniforms[:, :more] * (count / more))
        deficit = torch.sub(surplus, residual, out=surplus)
        below, taken = _draw(deficit, (uniforms[:, more:] * count - more) / (count - more))
        mass = torch.where((added > 0) & (taken > 0), added + taken, 0.0)
        ids = torch.cat([above, below], 1).masked_fill_((mass == 0)[:, None], 0)
    return ids, (mass / tail).masked_fill_(empty, 0.0).to(tail)


def _draw(weights: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[C, M]` with probability proportional to `weights [C, V]`, by inverting the cumulative sum, and that sum,
    float64 `[C]`. -1 where it is 0.

    Two levels, blocks then ids, because a float32 cumulative sum over a whole vocabulary has lost the
    small entries by its end and a float64 one over `[C, V]` costs eight times the traffic.
    """
    rows, vocabulary = weights.shape
    # Measured at M = 28: wider blocks cost more to look into, narrower ones leave more sums to search.
    width = 64 if vocabulary < 1 << 16 else 128
    if vocabulary % width:
        weights = torch.nn.functional.pad(weights, (0, -vocabulary % width))
    blocks = weights.view(rows, -1, width)
    # So few float32 add up to six digits, and far faster than as float64.
    block_sums = blocks.sum(2).double()
    cumulative = block_sums.cumsum(1)
    total = cumulative[:, -1:]
    target = uniforms.to(torch.float64) * total
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=blocks.shape[1] - 1)
    before = (cumulative - block_sums).gather(1, block)
    # Whole blocks are copied by one index, several times faster than a gather of each id.
    first = torch.arange(rows, device=block.device)[:, None] * blocks.shape[1]
    drawn = blocks.reshape(-1, width).index_select(0, (block + first).flatten()).double()
    inside = drawn.cumsum(1).view(*block.shape, width)
    # The remainder is kept inside the block's own sum, and a draw never lands on an id of weight zero.
    remainder = torch.minimum((target - before).clamp_(min=0.0), inside[:, :, -1].nextafter(target.new_zeros(())))
    within = torch.searchsorted(inside, remainder[:, :, None], right=True).squeeze(2)
    ids = block * width + within.clamp_(max=width - 1)
    return torch.where(total > 0, ids, -1), total.squeeze(1)
