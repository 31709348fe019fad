"""Every objective is one weighted sum: `loss = sum_t a_t TKD_t + b_t DKD_t + c_t CE_t`.

The coefficients need the teacher alone, so they are known before the student's forward pass:

    objective     a_t        b_t
    ce            0          0            (c_t = 1)
    kl            1          UNC_t
    tkd           1          0
    dkd           0          1
    tkd+dkd       1          1
    atkd, easy    0          lambda
    atkd, hard    1-lambda   1-lambda     (Zhong et al., ACL 2024; DKD without UNC)

Normalisation. `group`: the mean over the tokens of the micro-batch, for atkd over each group's own tokens (what the
paper's released code does; an empty group contributes 0). `token`: the sum over all tokens divided by the number of
tokens of the whole optimiser step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from stages.divergence import Divergences
from stages.ranking import RankScope
from stages.tail import TailMode

ObjectiveName = Literal["atkd", "kl", "tkd", "dkd", "tkd+dkd", "ce"]
OBJECTIVES: tuple[str, ...] = get_args(ObjectiveName)
Normalization = Literal["group", "token"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)


@dataclass(frozen=True)
class Objective:
    """What a student is trained towards.

    hard_ratio: share of the tokens, by UNC, that is hard. easy_weight: lambda of atkd. ce_weight: added to any
    objective, as a mean over all tokens (with `ce` it adds to the 1 that is there). tail_gamma: of the tail `prior`.
    """

    name: ObjectiveName = "atkd"
    hard_ratio: float = 0.5
    easy_weight: float = 0.2
    ce_weight: float = 0.0
    rank_scope: RankScope = "micro-batch"
    normalize: Normalization = "group"
    tail: TailMode = "bucket"
    tail_gamma: float = 0.5


@dataclass
class Coefficients:
    """Weights of the three terms at each of R rows, float `[R]`, normalisation included."""

    tkd: torch.Tensor
    dkd: torch.Tensor
    ce: torch.Tensor

    def __getitem__(self, rows: slice | torch.Tensor) -> Coefficients:
        return Coefficients(self.tkd[rows], self.dkd[rows], self.ce[rows])


def coefficients(
    objective: Objective, unc: torch.Tensor, is_hard: torch.Tensor, step_tokens: torch.Tensor | int | None = None
) -> Coefficients:
    """The table above for R rows.

    unc: float `[R]`. is_hard: bool `[R]`. step_tokens: tokens of the whole optimiser step, which `token`
    normalisation divides by (R when None).
    """
    zero, one = torch.zeros_like(unc), torch.ones_like(unc)
    hard = is_hard.to(unc)
    tokens = len(unc) if objective.normalize == "group" or step_tokens is None else step_tokens
    mean = one / torch.as_tensor(tokens, device=unc.device).clamp(min=1)
    ce = mean * (objective.ce_weight + (objective.name == "ce"))
    if objective.name == "atkd":
        easy_weight, hard_weight = objective.easy_weight, 1.0 - objective.easy_weight
        if objective.normalize == "group":
            hard_tokens = hard.sum()
            hard_mean = hard / hard_tokens.clamp(min=1)
            easy_mean = (1.0 - hard) / (len(unc) - hard_tokens).clamp(min=1)
        else:
            hard_mean, easy_mean = hard * mean, (1.0 - hard) * mean
        return Coefficients(hard_weight * hard_mean, easy_weight * easy_mean + hard_weight * hard_mean, ce)
    a, b = {
        "ce": (zero, zero),
        "kl": (one, unc),
        "tkd": (one, zero),
        "dkd": (zero, one),
        "tkd+dkd": (one, one),
    }[objective.name]
    return Coefficients(a * mean, b * mean, ce)


def weighted_sum(terms: Divergences, weights: Coefficients) -> torch.Tensor:
    """The scalar loss of the rows."""
    return (weights.tkd * terms.tkd + weights.dkd * terms.dkd + weights.ce * terms.ce).sum()
