"""Which teaching mode does what: mean TKD, DKD and UNC of easy and of hard tokens, as the training goes on."""

from __future__ import annotations

import torch

from stages.divergence import Divergences, TeacherTerms

_NAMES = ("tkd", "dkd", "unc")
_GROUPS = ("easy", "hard")


class Decomposition:
    """Sums over tokens since the last `take`, kept on the device so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros((len(_GROUPS), 1 + len(_NAMES)), device=device)

    @torch.no_grad()
    def add(self, terms: Divergences, teacher: TeacherTerms, is_hard: torch.Tensor) -> None:
        """terms, teacher: of `[R]` rows; is_hard: bool `[R]`."""
        values = torch.stack([torch.ones_like(terms.tkd), terms.tkd, terms.dkd, teacher.unc.to(terms.tkd)], 1)
        groups = torch.stack([~is_hard, is_hard]).to(values)
        self._sums += (groups @ values).to(self._sums)

    def take(self) -> dict[str, float]:
        """`tkd_easy`, `dkd_hard`, ... as means in nats (UNC: probability) of this process's tokens; starts anew."""
        sums = self._sums.tolist()
        self._sums.zero_()
        return {
            f"{name}_{group}": total / row[0]
            for group, row in zip(_GROUPS, sums, strict=True)
            if row[0]
            for name, total in zip(_NAMES, row[1:], strict=True)
        }
