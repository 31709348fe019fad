"""Every objective is one weighted sum: `loss = sum_t a_t TKD_t + b_t DKD_t + d_t D_t + c_t CE_t`.

The coefficients need the teacher alone, so they are known before the student's forward pass:

    objective     a_t        b_t        d_t
    ce            0          0          0      (c_t = 1)
    kl            0          0          1      D = KL(p || q) = TKD + UNC DKD; reversed KL(q || p)
    jsd, tvd      0          0          1      D = Jensen-Shannon (beta), total variation
    tkd           1          0          0
    dkd           0          1          0
    tkd+dkd       1          1          0
    atkd, easy    0          lambda     0
    atkd, hard    1-lambda   1-lambda   0      (Zhong et al., ACL 2024; DKD without UNC)

Normalisation. `group`: the mean over the tokens of the micro-batch, for atkd over each group's own tokens (what the
paper's released code does; an empty group contributes 0). `token`: the sum over all tokens divided by the number of
tokens of the whole optimiser step; with `train_on` over the chosen tokens, divided by the number of these. With the
rank scope `global-batch` both are over the whole step, over all its micro-batches and devices: tokens that are ranked
together are averaged together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from stages.divergence import Direction, Divergences, StudentTerms, TeacherTerms, divergences
from stages.ranking import HardRatio, RankScope
from stages.sketch import Sketch, Sketches
from stages.tail import Compared, Tail, TailChoice

ObjectiveName = Literal["atkd", "kl", "tkd", "dkd", "tkd+dkd", "jsd", "tvd", "ce"]
OBJECTIVES: tuple[str, ...] = get_args(ObjectiveName)
Normalization = Literal["group", "token"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)
TrainOn = Literal["all", "easy", "hard"]
TRAIN_ON: tuple[str, ...] = get_args(TrainOn)
# Whole-distribution divergences, which are one number and not TKD and DKD.
_WHOLE = ("kl", "jsd", "tvd")


@dataclass(frozen=True)
class Objective:
    """What a student is trained towards.

    hard_ratio: share of the tokens, by UNC, that is hard, or `median` (`ranking.hard_threshold`). easy_weight: lambda
    of atkd. ce_weight: added to any objective, as a mean over the same tokens (with `ce` it adds to the 1 that is
    there). direction: `reverse` swaps teacher and student in the divergences; ranks stay the teacher's. beta: of jsd.
    train_on: only these tokens have a loss, and means are over them. temperature: of teacher and student in the
    divergences, cross-entropy stays at 1; temperature_squared: whether they are multiplied by its square, which keeps
    the size of the gradients (Hinton et al., 2015). tail: a mode of `stages.tail`, or `auto`, the best one that
    objective and cache allow. tail_gamma: of the tail `prior`.
    """

    name: ObjectiveName = "atkd"
    hard_ratio: HardRatio = 0.5
    easy_weight: float = 0.2
    ce_weight: float = 0.0
    rank_scope: RankScope = "micro-batch"
    normalize: Normalization = "group"
    tail: TailChoice = "auto"
    tail_gamma: float = 0.5
    direction: Direction = "forward"
    beta: float = 0.5
    train_on: TrainOn = "all"
    temperature: float = 1.0
    temperature_squared: bool = True

    @property
    def _lumps_tail(self) -> bool:
        return self.direction == "reverse" or self.name in ("jsd", "tvd")

    @property
    def compared(self) -> Compared:
        if self.name in ("jsd", "tvd"):
            return self.name
        return self.direction

    def for_cache(
        self, *, has_samples: bool, has_prior: bool, has_sketch: bool = False, has_residuals: bool = False
    ) -> Objective:
        """The same with `auto` made the tail mode that trains best (docs/fidelity.md) among those that can be had.

        has_samples, has_prior, has_sketch, has_residuals: whether the cache holds tail samples, the mean tail
        distribution, a sketch, and residual samples of it.
        """
        if self.tail != "auto":
            return self
        if self.name == "ce":
            return replace(self, tail="bucket")
        if not self._lumps_tail and self.temperature == 1:
            if has_residuals:
                return replace(self, tail="sketch")
            if has_samples:
                return replace(self, tail="sampled")
        if has_sketch:
            return replace(self, tail="sketch")
        return replace(self, tail="prior" if has_prior and not self._lumps_tail else "bucket")

    def sketch_tail(self, sketch: Sketch | Sketches) -> Tail:
        """The tail mode `sketch` for this objective."""
        return Tail("sketch", sketch=sketch, compared=self.compared, beta=self.beta, temperature=self.temperature)

    def problem(self) -> str | None:
        """A sentence on options that do not go together, or None."""
        if self._lumps_tail and self.tail not in ("auto", "bucket", "sketch"):
            what = "--direction reverse" if self.direction == "reverse" else f"--objective {self.name}"
            return f"{what} takes the tail as one lump or a sketch; it needs --tail bucket or sketch, not {self.tail}"
        if self.direction == "reverse" and self.name in ("jsd", "tvd", "ce"):
            return f"--direction reverse means nothing for --objective {self.name}; leave it out"
        if self.temperature != 1 and self.tail == "sampled":
            return "--tail sampled was drawn at temperature 1 and cannot stand for another; choose another --tail"
        return None


def chosen_tokens(objective: Objective, is_hard: torch.Tensor) -> int:
    """Return how many of R rows have a loss. is_hard: bool `[R]`."""
    hard = int(is_hard.sum())
    return {"all": len(is_hard), "hard": hard, "easy": len(is_hard) - hard}[objective.train_on]


@dataclass
class Coefficients:
    """Weights of the four terms at each of R rows, float `[R]`, normalisation included."""

    tkd: torch.Tensor
    dkd: torch.Tensor
    whole: torch.Tensor
    ce: torch.Tensor

    def __getitem__(self, rows: slice | torch.Tensor) -> Coefficients:
        return Coefficients(self.tkd[rows], self.dkd[rows], self.whole[rows], self.ce[rows])


def coefficients(
    objective: Objective,
    is_hard: torch.Tensor,
    step_tokens: torch.Tensor | int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Coefficients:
    """The table above for R rows.

    is_hard: bool `[R]`. step_tokens: chosen tokens of the whole optimiser step, which `token` normalisation divides by
    (those of the R rows when None).
    """
    hard = is_hard.to(dtype)
    chosen = {"all": torch.ones_like(hard), "hard": hard, "easy": 1.0 - hard}[objective.train_on]
    alone = objective.normalize == "group" or step_tokens is None
    tokens = chosen.sum() if alone else torch.as_tensor(step_tokens)
    mean = chosen / tokens.to(hard).clamp(min=1)
    scale = objective.temperature**2 if objective.temperature_squared else 1.0
    zero, scaled = torch.zeros_like(hard), scale * mean
    ce = mean * (objective.ce_weight + (objective.name == "ce"))
    if objective.name == "atkd":
        hard_mean, easy_mean = scaled * hard, scaled * (1.0 - hard)
        if objective.normalize == "group":
            # Each group's own mean.
            hard_mean = scale * chosen * hard / hard.sum().clamp(min=1)
            easy_mean = scale * chosen * (1.0 - hard) / (len(hard) - hard.sum()).clamp(min=1)
        hard_part = (1.0 - objective.easy_weight) * hard_mean
        return Coefficients(hard_part, objective.easy_weight * easy_mean + hard_part, zero, ce)
    return Coefficients(
        tkd=scaled if objective.name in ("tkd", "tkd+dkd") else zero,
        dkd=scaled if objective.name in ("dkd", "tkd+dkd") else zero,
        whole=scaled if objective.name in _WHOLE else zero,
        ce=ce,
    )


def weighted_sum(terms: Divergences, weights: Coefficients) -> torch.Tensor:
    """The scalar loss of the rows."""
    total = weights.tkd * terms.tkd + weights.dkd * terms.dkd + weights.whole * terms.whole
    return (total + weights.ce * terms.ce).sum()


def compare(objective: Objective, student: StudentTerms, teacher: TeacherTerms) -> Divergences:
    """The divergences that this objective weighs."""
    if objective.name in ("jsd", "tvd"):
        return divergences(student, teacher, whole=objective.name, beta=objective.beta)
    return divergences(student, teacher, objective.direction)
