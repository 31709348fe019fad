"""Independent float64 reference for the mathematics of the cache, used only by tests.

Everything here is written straight from the definitions in section 2 of the design page,
position by position, from full distributions, with plain loops. It imports nothing of ours,
so an error shared with the code under test would have to be made twice.

Conventions
-----------
* ``V`` is the vocabulary size, ``T`` the number of scored positions (tokens).
* ``p`` is the teacher, ``q`` the student, ``g`` (``gold``) the ground-truth token id.
* Logarithms are natural: log-probabilities, entropies and divergences are in nats.
* Logits are at temperature 1; each may be finite or ``-inf`` (a token of probability zero).
* ``0 * log(0 / x) = 0``, and ``p * log(p / 0) = +inf`` for ``p > 0``.
* ``log(1 - p_g)`` is always the log-sum-exp of the non-gold log-probabilities, and a tail is
  always the sum of its own terms. Neither is ever ``1 - (the rest)``.
* "Exactly zero" mass means a log-mass of ``-inf``. A mass whose logarithm is -1000 is not
  zero, although its exponential underflows.

Sources: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022 (the split of KL into a
target and a non-target part); Zhong et al., "Revisiting Knowledge Distillation for
Autoregressive Language Models", ACL 2024 (UNC, TKD, DKD, ATKD).
"""

import math

import numpy as np

NEGATIVE_INFINITY = float("-inf")
OBJECTIVES = ("kl", "tkd", "dkd", "tkd+dkd", "ce", "atkd")


# ---------------------------------------------------------------------------------------
# Small helpers
# ---------------------------------------------------------------------------------------


def _log_sum_exp(values):
    """log(sum(exp(values))) of a sequence of floats; -inf when empty or all are -inf.

    The largest term is taken out and the others are added exactly (math.fsum), then log1p:
    a sum that exceeds its largest term by 1e-12 keeps those digits.
    """
    values = [float(value) for value in values]
    if not values:
        return NEGATIVE_INFINITY
    where = max(range(len(values)), key=lambda i: values[i])
    largest = values[where]
    if largest == NEGATIVE_INFINITY:
        return NEGATIVE_INFINITY
    rest = math.fsum(math.exp(values[i] - largest) for i in range(len(values)) if i != where)
    return largest + math.log1p(rest)


def _p_log_ratio(log_p, log_q):
    """p * log(p / q) from the two logarithms, with the conventions for zeros."""
    if log_p == NEGATIVE_INFINITY:
        return 0.0
    if log_q == NEGATIVE_INFINITY:
        return math.inf
    return math.exp(log_p) * (log_p - log_q)


def _mean(values):
    """Mean of a sequence of floats; 0.0 when it is empty."""
    values = list(values)
    if not values:
        return 0.0
    return math.fsum(values) / len(values)


def _one_gold(gold, vocabulary_size):
    """`gold` as an int, checked to be a token id (a negative index would pass silently)."""
    token = int(gold)
    if token != gold or not 0 <= token < vocabulary_size:
        raise ValueError(f"gold {gold!r} is not a token id in 0..{vocabulary_size - 1}")
    return token


def _one_position(logits):
    """Log-probabilities [V], as a list of Python floats, of logits [V]."""
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 1:
        raise ValueError(f"expected the logits of one position, [V], got shape {logits.shape}")
    return log_softmax(logits).tolist()


def _two_positions(p_logits, q_logits, gold):
    """(log p [V], log q [V], gold) of one position, checked to belong together."""
    log_p = _one_position(p_logits)
    log_q = _one_position(q_logits)
    if len(log_p) != len(log_q):
        raise ValueError(f"teacher has {len(log_p)} tokens, student has {len(log_q)}")
    return log_p, log_q, _one_gold(gold, len(log_p))


def _many_positions(p_logits, q_logits, gold):
    """(p_logits [T, V], q_logits [T, V], gold [T]) as float64 / int arrays, shapes checked."""
    p_logits = np.asarray(p_logits, dtype=np.float64)
    q_logits = np.asarray(q_logits, dtype=np.float64)
    gold = np.asarray(gold)
    if p_logits.ndim != 2 or p_logits.shape != q_logits.shape:
        raise ValueError(f"expected two [T, V], got {p_logits.shape} and {q_logits.shape}")
    if gold.shape != (p_logits.shape[0],):
        raise ValueError(f"expected gold [{p_logits.shape[0]}], got shape {gold.shape}")
    return p_logits, q_logits, gold


def _tkd_of_logs(log_p, log_q, gold):
    """TKD of two full distributions given as log-probabilities, [classes] each."""
    log_p_nongold = _log_sum_exp(log_p[j] for j in range(len(log_p)) if j != gold)
    log_q_nongold = _log_sum_exp(log_q[j] for j in range(len(log_q)) if j != gold)
    return math.fsum(
        [
            _p_log_ratio(log_p[gold], log_q[gold]),
            _p_log_ratio(log_p_nongold, log_q_nongold),
        ]
    )


def _dkd_of_logs(log_p, log_q, gold):
    """DKD of two full distributions given as log-probabilities, [classes] each."""
    nongold = [j for j in range(len(log_p)) if j != gold]
    log_p_nongold = _log_sum_exp(log_p[j] for j in nongold)
    log_q_nongold = _log_sum_exp(log_q[j] for j in nongold)
    if log_p_nongold == NEGATIVE_INFINITY:
        return 0.0  # the teacher has no non-gold distribution to learn from
    if log_q_nongold == NEGATIVE_INFINITY:
        return math.inf  # the teacher has one and the student has none
    return math.fsum(_p_log_ratio(log_p[j] - log_p_nongold, log_q[j] - log_q_nongold) for j in nongold)


def _kept_and_tail(kept_ids, gold, vocabulary_size):
    """(kept non-gold ids, tail ids), both ascending; the kept set K is kept_ids plus gold."""
    kept = {gold}
    for token in kept_ids:
        token = int(token)
        if not 0 <= token < vocabulary_size:
            raise ValueError(f"kept id {token} is not a token id in 0..{vocabulary_size - 1}")
        kept.add(token)
    kept_nongold = [j for j in range(vocabulary_size) if j in kept and j != gold]
    tail = [j for j in range(vocabulary_size) if j not in kept]
    return kept_nongold, tail


# ---------------------------------------------------------------------------------------
# One distribution
# ---------------------------------------------------------------------------------------


def log_softmax(logits):
    """Log-probabilities over the last axis: log p_j = z_j - log(sum_i exp(z_i)).

    logits: [..., V], any real dtype, converted to float64 first. Finite or -inf.
    Returns float64 [..., V], nats.

    The largest logit is subtracted and the remaining terms enter through log1p, so the
    log-probability of a token of probability 1 - 1e-9 has full relative precision.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"expected logits [..., V] with V >= 1, got shape {logits.shape}")
    if np.isnan(logits).any() or np.isposinf(logits).any():
        raise ValueError("logits must be finite or -inf")
    rows = logits.reshape(-1, logits.shape[-1])
    result = np.empty_like(rows)
    for t in range(rows.shape[0]):
        largest = rows[t].max()
        if largest == NEGATIVE_INFINITY:
            raise ValueError("every logit of a position is -inf: there is no distribution")
        shifted = rows[t] - largest
        result[t] = shifted - _log_sum_exp(shifted.tolist())
    return result.reshape(logits.shape)


def position_statistics(logits, gold, top_n, temperatures=()):
    """What a cache stores about one scored position (sections 1 to 3 of the design page).

    logits: teacher logits [V]. gold: token id. top_n: N, in tokens (at most V are returned).
    temperatures: the T > 0 for which a tail is wanted, dimensionless.

    Returns a dict, with K = top-N plus gold and p the distribution at temperature 1:
      top_ids         int64 [min(N, V)], by descending log-probability, ties by lower id
      top_logprobs    float64 [min(N, V)], log p of those ids, nats
      gold_logprob    float, log p(gold), nats
      tail_logmass    float, log(sum_{j not in K} p_j), nats; -inf when that sum is empty
      entropy         float, -sum_j p_j log p_j of the full distribution, nats
      tail_logmass_T  {T: log(sum_{j not in K} p_j^(1/T))}, nats; -inf when empty. These are
                      powers of the temperature-1 p and are not divided by the partition
                      function at T, sum_i p_i^(1/T).
    """
    log_p = _one_position(logits)
    vocabulary_size = len(log_p)
    gold = _one_gold(gold, vocabulary_size)
    if top_n < 0:
        raise ValueError(f"top_n must be 0 or more, got {top_n}")

    by_probability = sorted(range(vocabulary_size), key=lambda j: (-log_p[j], j))
    top = by_probability[:top_n]
    kept = set(top) | {gold}
    tail = [j for j in range(vocabulary_size) if j not in kept]

    entropy_terms = []
    for value in log_p:
        if value != NEGATIVE_INFINITY:
            entropy_terms.append(-math.exp(value) * value)

    tail_at = {}
    for temperature in temperatures:
        if not temperature > 0:
            raise ValueError(f"a temperature must be above 0, got {temperature}")
        tail_at[temperature] = _log_sum_exp(log_p[j] / temperature for j in tail)

    return {
        "top_ids": np.array(top, dtype=np.int64),
        "top_logprobs": np.array([log_p[j] for j in top], dtype=np.float64),
        "gold_logprob": log_p[gold],
        "tail_logmass": _log_sum_exp(log_p[j] for j in tail),
        "entropy": math.fsum(entropy_terms),
        "tail_logmass_T": tail_at,
    }


def unc(p_logits, gold):
    """Uncertainty coefficient of one position: UNC = 1 - p_g = sum_{j != g} p_j.

    p_logits: teacher logits [V]. gold: token id. Returns a float in 0..1 (a probability).
    Computed as the sum, so a UNC of 1e-20 is not rounded to 0.
    """
    log_p = _one_position(p_logits)
    gold = _one_gold(gold, len(log_p))
    return math.exp(_log_sum_exp(log_p[j] for j in range(len(log_p)) if j != gold))


# ---------------------------------------------------------------------------------------
# Two distributions, one position
# ---------------------------------------------------------------------------------------


def tkd(p_logits, q_logits, gold):
    """Target-oriented divergence of one position, a binary KL, in nats.

    TKD = p_g log(p_g / q_g) + (1 - p_g) log((1 - p_g) / (1 - q_g))

    p_logits, q_logits: teacher and student logits [V]. gold: token id. Returns a float.
    """
    return _tkd_of_logs(*_two_positions(p_logits, q_logits, gold))


def dkd(p_logits, q_logits, gold):
    """Diversity-oriented divergence of one position, without the UNC factor, in nats.

    DKD = sum_{j != g} phat_j log(phat_j / qhat_j),
    phat_j = p_j / (1 - p_g), qhat_j = q_j / (1 - q_g)

    p_logits, q_logits: teacher and student logits [V]. gold: token id. Returns a float;
    0 where the teacher's non-gold mass is exactly zero, +inf where only the student's is.
    """
    return _dkd_of_logs(*_two_positions(p_logits, q_logits, gold))


def kl(p_logits, q_logits, gold=None):
    """Forward divergence of one position over the full vocabulary, in nats.

    KL(p || q) = sum_j p_j log(p_j / q_j)  ( = TKD + UNC * DKD for every gold)

    p_logits, q_logits: teacher and student logits [V]. gold is not used; it is accepted so
    that the three divergences can be called alike. Returns a float.
    """
    log_p, log_q, _ = _two_positions(p_logits, q_logits, 0 if gold is None else gold)
    return math.fsum(_p_log_ratio(log_p[j], log_q[j]) for j in range(len(log_p)))


def bucket_terms(p_logits, q_logits, gold, kept_ids):
    """(TKD, DKD) of one position with the tail lumped into one class: tail mode `bucket`.

    K = kept_ids plus gold. The classes compared are: gold, each other token of K, and (when
    there is a token outside K) one class holding sum_{j not in K} p_j for the teacher and
    sum_{j not in K} q_j for the student. TKD and DKD are then the definitions on those
    classes.

    p_logits, q_logits: [V]. gold: token id. kept_ids: token ids, in any order, with or
    without gold. Returns two floats, nats.
    """
    log_p, log_q, gold = _two_positions(p_logits, q_logits, gold)
    kept_nongold, tail = _kept_and_tail(kept_ids, gold, len(log_p))
    lumped_p = [log_p[gold]]
    lumped_q = [log_q[gold]]
    for j in kept_nongold:
        lumped_p.append(log_p[j])
        lumped_q.append(log_q[j])
    if tail:
        lumped_p.append(_log_sum_exp(log_p[j] for j in tail))
        lumped_q.append(_log_sum_exp(log_q[j] for j in tail))
    return _tkd_of_logs(lumped_p, lumped_q, 0), _dkd_of_logs(lumped_p, lumped_q, 0)


def drop_terms(p_logits, q_logits, gold, kept_ids):
    """(TKD, DKD) of one position with the teacher's tail ignored: tail mode `drop`.

    K = kept_ids plus gold, S = sum_{j in K} p_j, and the teacher is renormalised on K:
    pt_j = p_j / S for j in K, 0 outside. The student is not renormalised: q_g and 1 - q_g
    are of the full vocabulary, and so is qhat_j = q_j / (1 - q_g).

    TKD = pt_g log(pt_g / q_g) + (1 - pt_g) log((1 - pt_g) / (1 - q_g))
    DKD = sum_{j in K, j != g} pthat_j log(pthat_j / qhat_j),  pthat_j = pt_j / (1 - pt_g)

    p_logits, q_logits: [V]. gold: token id. kept_ids: token ids, in any order, with or
    without gold. Returns two floats, nats; DKD is 0 where K holds no non-gold mass.
    """
    log_p, log_q, gold = _two_positions(p_logits, q_logits, gold)
    kept_nongold, _ = _kept_and_tail(kept_ids, gold, len(log_p))
    log_kept_mass = _log_sum_exp(log_p[j] for j in [gold, *kept_nongold])
    if log_kept_mass == NEGATIVE_INFINITY:
        raise ValueError("the teacher has no mass on the kept set: it cannot be renormalised")
    renormalised = [NEGATIVE_INFINITY] * len(log_p)
    for j in [gold, *kept_nongold]:
        renormalised[j] = log_p[j] - log_kept_mass
    return _tkd_of_logs(renormalised, log_q, gold), _dkd_of_logs(renormalised, log_q, gold)


# ---------------------------------------------------------------------------------------
# Losses over many positions
# ---------------------------------------------------------------------------------------


def is_hard(unc, hard_ratio):
    """Which tokens are hard: the top share by UNC, ties at the threshold being hard.

    m = ceil(hard_ratio * T); the threshold is the m-th largest UNC; hard = UNC >= threshold.
    At hard_ratio 0.5 this is the split at the median (the mean of the middle two for an even
    T), `UNC >= median`.

    unc: [T], probabilities (any quantity ordered as UNC will do). hard_ratio: a share, 0..1.
    Returns bool [T]. Nothing is hard at ratio 0; an empty input gives an empty result.

    A product within 1e-9 of an integer counts as that integer before the ceiling is taken
    (in floating point 0.07 * 100 is 7.000000000000001), but a ratio above 0 always asks for
    at least one token.
    """
    unc = np.asarray(unc, dtype=np.float64)
    if unc.ndim != 1:
        raise ValueError(f"expected unc [T], got shape {unc.shape}")
    if np.isnan(unc).any():
        raise ValueError("unc holds NaN")
    if not 0 <= hard_ratio <= 1:
        raise ValueError(f"hard_ratio must be in 0..1, got {hard_ratio}")
    tokens = len(unc)
    if tokens == 0 or hard_ratio == 0:
        return np.zeros(tokens, dtype=bool)
    product = hard_ratio * tokens
    if abs(product - round(product)) <= 1e-9:
        hard_tokens = max(1, round(product))
    else:
        hard_tokens = math.ceil(product)
    descending = sorted(unc.tolist(), reverse=True)
    threshold = descending[hard_tokens - 1]
    return np.array([value >= threshold for value in unc.tolist()], dtype=bool)


def atkd_loss(p_logits, q_logits, gold, easy_weight=0.2, hard_ratio=0.5, normalize="group"):
    """ATKD (Zhong et al., ACL 2024) over the T tokens of one batch, in nats.

    L = lambda * L_easy + (1 - lambda) * L_hard, lambda = easy_weight
    L_easy: DKD of the easy tokens; L_hard: TKD + DKD of the hard tokens, DKD without the UNC
    factor. Hard tokens are `is_hard` of the teacher's UNC of these T tokens.

    normalize="group": each of the two is the mean over its own group's tokens, and an empty
    group contributes 0. normalize="token": each is the sum over its group's tokens divided
    by T, the number of all tokens.

    p_logits, q_logits: [T, V]. gold: token ids [T]. easy_weight, hard_ratio: shares, 0..1.
    Returns a float; 0.0 when T is 0.
    """
    p_logits, q_logits, gold = _many_positions(p_logits, q_logits, gold)
    if normalize not in ("group", "token"):
        raise ValueError(f"normalize must be 'group' or 'token', got {normalize!r}")
    tokens = len(gold)
    if tokens == 0:
        return 0.0
    hard = is_hard([unc(p_logits[t], gold[t]) for t in range(tokens)], hard_ratio)

    easy_losses = []
    hard_losses = []
    for t in range(tokens):
        if hard[t]:
            hard_losses.append(tkd(p_logits[t], q_logits[t], gold[t]) + dkd(p_logits[t], q_logits[t], gold[t]))
        else:
            easy_losses.append(dkd(p_logits[t], q_logits[t], gold[t]))

    if normalize == "group":
        easy_loss = _mean(easy_losses)
        hard_loss = _mean(hard_losses)
    else:
        easy_loss = math.fsum(easy_losses) / tokens
        hard_loss = math.fsum(hard_losses) / tokens
    return easy_weight * easy_loss + (1 - easy_weight) * hard_loss


def objective_loss(
    name,
    p_logits,
    q_logits,
    gold,
    ce_weight=0.0,
    *,
    tkd_weight=1.0,
    dkd_weight=1.0,
    easy_weight=0.2,
    hard_ratio=0.5,
    normalize="group",
):
    """Loss of a named objective over T tokens, from full distributions, in nats.

    kl        mean over tokens of KL(p || q)
    tkd, dkd  mean over tokens of TKD, of DKD (without the UNC factor)
    tkd+dkd   mean over tokens of tkd_weight * TKD + dkd_weight * DKD (alpha and beta)
    ce        mean over tokens of -log q_g
    atkd      `atkd_loss` with easy_weight, hard_ratio and normalize

    To each, ce included, ce_weight times the mean of -log q_g over all T tokens is added.
    (So `ce` is (1 + ce_weight) times the cross-entropy, and the cross-entropy beside `atkd`
    is a mean over all tokens under either normalisation.)

    p_logits, q_logits: [T, V]. gold: token ids [T]. Weights are dimensionless. tkd_weight
    and dkd_weight are read by tkd+dkd only; easy_weight, hard_ratio and normalize by atkd
    only. Returns a float; 0.0 when T is 0.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}: one of {', '.join(OBJECTIVES)}")
    p_logits, q_logits, gold = _many_positions(p_logits, q_logits, gold)
    tokens = range(len(gold))

    def mean_of(divergence):
        return _mean(divergence(p_logits[t], q_logits[t], gold[t]) for t in tokens)

    def cross_entropy(_, q_logits_t, gold_t):
        log_q = _one_position(q_logits_t)
        return -log_q[_one_gold(gold_t, len(log_q))]

    if name == "kl":
        loss = mean_of(kl)
    elif name == "tkd":
        loss = mean_of(tkd)
    elif name == "dkd":
        loss = mean_of(dkd)
    elif name == "tkd+dkd":
        loss = 0.0
        if tkd_weight != 0:  # 0 * inf would be NaN
            loss += tkd_weight * mean_of(tkd)
        if dkd_weight != 0:
            loss += dkd_weight * mean_of(dkd)
    elif name == "ce":
        loss = mean_of(cross_entropy)
    else:
        loss = atkd_loss(p_logits, q_logits, gold, easy_weight, hard_ratio, normalize)
    if ce_weight != 0:
        loss += ce_weight * mean_of(cross_entropy)
    return loss


def gradient_on_logits(name, p_logits, q_logits, gold, ce_weight=0.0, *, step=1e-6, **options):
    """d objective_loss / d q_logits by central finite differences, for small T and V.

    dL/dz ~ (L(z + step) - L(z - step)) / (2 step), one student logit at a time. With the
    default step the error is of the order 1e-10 times the size of the loss. The cost is
    2 T V evaluations of the whole loss.

    name, p_logits [T, V], q_logits [T, V], gold [T], ce_weight, options: as in
    `objective_loss`. step: in logits. Returns float64 [T, V], nats per logit. A student logit
    of -inf has gradient 0; a loss that is not finite is refused.
    """
    p_logits, q_logits, gold = _many_positions(p_logits, q_logits, gold)

    def loss_at(logits):
        return objective_loss(name, p_logits, logits, gold, ce_weight, **options)

    if not math.isfinite(loss_at(q_logits)):
        raise ValueError("the loss is not finite, so it has no gradient")
    gradient = np.zeros(q_logits.shape, dtype=np.float64)
    for t in range(q_logits.shape[0]):
        for j in range(q_logits.shape[1]):
            if q_logits[t, j] == NEGATIVE_INFINITY:
                continue
            above = q_logits.copy()
            below = q_logits.copy()
            above[t, j] += step
            below[t, j] -= step
            width = above[t, j] - below[t, j]  # the step actually taken, after rounding
            gradient[t, j] = (loss_at(above) - loss_at(below)) / width
    return gradient
