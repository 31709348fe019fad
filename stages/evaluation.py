"""What a student is measured by, on held-out sequences of the cache: no teacher is needed for it.

Per token and averaged over all, the easy and the hard ones: cross-entropy on gold, KL to the teacher, and how often the
student's most probable token is the teacher's. From the teacher's entropy and samples, residual or the tail's, the
KL is estimated without bias. Of a sketch alone it is the KL to the teacher as the sketch has it. Else the tail is
compared as one lump: a lower bound, the looser the fewer tokens were kept.
"""

from __future__ import annotations

import torch

from stages.distillation_forward import Head
from stages.divergence import BUCKET, TeacherRows, divergences, student_terms, teacher_terms
from stages.sketch import Sketch, Sketches
from stages.statistics import rows_per_slice
from stages.tail import Tail

GROUPS = ("all", "easy", "hard")
MEASURES = ("cross_entropy", "kl", "agreement", "teacher_cross_entropy")


@torch.no_grad()
def sums_by_sequence(
    hidden: torch.Tensor,
    head: Head,
    rows: TeacherRows,
    is_hard: torch.Tensor,
    sequence_of: torch.Tensor,
    *,
    sequences: int,
    vocabulary_size: int,
    sketch: Sketch | Sketches | None = None,
) -> torch.Tensor:
    """float64 `[sequences, 3, 1 + 4]` on the CPU: tokens and the sums of MEASURES over each group of GROUPS.

    hidden `[R, H]` and head as in `head_loss`, is_hard bool `[R]`, sequence_of int64 `[R]`. Sums and not means, so
    that batches, and the copies a distributed loader pads with, can be put together exactly. sketch: of the codes in
    `rows`, where they were read.
    """
    parts = []
    size = rows_per_slice(vocabulary_size)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        parts.append(_measures(head(hidden[part]), rows[part], sketch))
    values = torch.cat(parts).to("cpu", torch.float64)
    hard = is_hard.cpu()
    grouped = torch.stack([values, values * ~hard[:, None], values * hard[:, None]], 1)
    return torch.zeros((sequences, *grouped.shape[1:]), dtype=torch.float64).index_add_(0, sequence_of.cpu(), grouped)


def measured_tail(rows: TeacherRows, sketch: Sketch | Sketches | None) -> Tail:
    """What the held-out KL has for the teacher's tail."""
    sketched = sketch is not None and rows.sketch_codes is not None
    if sketched and rows.residual_samples is not None and rows.entropy is not None:
        return Tail("sketch", sketch=sketch)
    if rows.tail_samples is not None and rows.entropy is not None:
        return Tail("sampled")
    return Tail("sketch", sketch=sketch) if sketched else BUCKET


def _measures(logits: torch.Tensor, rows: TeacherRows, sketch: Sketch | Sketches | None) -> torch.Tensor:
    """`[R, 1 + 4]`: a one, and each of MEASURES."""
    tail = measured_tail(rows, sketch)
    terms = divergences(student_terms(logits, rows, tail), teacher_terms(rows, tail.mode))
    agrees = logits.argmax(1) == rows.top_ids[:, 0]
    columns = [torch.ones_like(terms.ce), terms.ce, terms.whole, agrees, -rows.gold_logprob]
    return torch.stack([column.to(terms.ce) for column in columns], 1)


def metrics(sums: torch.Tensor, prefix: str) -> dict[str, float]:
    """Means from the total `[3, 1 + 4]`: `prefix_kl`, `prefix_kl_easy`, ..., `prefix_tokens`; no empty groups."""
    result: dict[str, float] = {f"{prefix}_tokens": int(sums[0, 0])}
    for group, values in zip(GROUPS, sums.tolist(), strict=True):
        suffix = "" if group == "all" else f"_{group}"
        if values[0]:
            for measure, total in zip(MEASURES, values[1:], strict=True):
                result[f"{prefix}_{measure}{suffix}"] = total / values[0]
    return result
