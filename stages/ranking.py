"""Which tokens are hard: the rank of UNC = 1 - p(gold), which depends on the teacher alone.

UNC falls as log p(gold) rises, so the ranks are taken on `gold_logprob` itself, where float32 tells a teacher
that is sure to 1e-9 from one that is sure to 1e-8; `1 - p` in float32 does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal, get_args

import numpy as np

RankScope = Literal["micro-batch", "global-batch", "sequence", "corpus"]
RANK_SCOPES: tuple[str, ...] = get_args(RankScope)
# A share of the tokens, 0..1, or the split of the released code.
HardRatio = float | Literal["median"]


def hard_threshold(gold_logprob: np.ndarray, hard_ratio: HardRatio) -> float:
    """Return the log p(gold) at or below which a token is hard, so that at least `hard_ratio` of the tokens are.

    gold_logprob: float `[T]`, nats. The ceil(hard_ratio * T)-th largest UNC is the threshold and ties with it are hard.
    `median` is the split of the released code of Zhong et al. (ACL 2024), UNC >= torch.median(UNC), which is the lower
    one of two middle values: of an even T tokens T / 2 + 1 are hard there, one more than at 0.5; of an odd T the same.
    Returns -inf, no token hard, for a ratio of 0 or no tokens.
    """
    tokens = len(gold_logprob)
    if hard_ratio == "median":
        count = tokens // 2 + (tokens > 0)
    else:
        # Fraction of the decimal text: 0.1 * 30 is 3, not 3.0000000000000004.
        count = math.ceil(Fraction(str(hard_ratio)) * tokens)
    if count == 0:
        return -math.inf
    return float(np.partition(gold_logprob, count - 1)[count - 1])


def is_hard(gold_logprob: np.ndarray, hard_ratio: HardRatio) -> np.ndarray:
    """bool `[T]`: the tokens of one group ranked among themselves."""
    return gold_logprob <= hard_threshold(gold_logprob, hard_ratio)


def is_hard_by_sequence(gold_logprob: np.ndarray, counts: Iterable[int], hard_ratio: HardRatio) -> np.ndarray:
    """bool `[T]`: ranked within each sequence; `counts` says how many of the T tokens each sequence has."""
    hard = np.zeros(len(gold_logprob), bool)
    start = 0
    for count in counts:
        hard[start : start + count] = is_hard(gold_logprob[start : start + count], hard_ratio)
        start += count
    return hard
