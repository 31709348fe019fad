"""Every causal LM class of transformers as a student and as a teacher: head cut, full logits, or refused.

    python -m benchmarks.sweep_models [FAMILY ...]

Each family is shrunk (`shrunk_models.py`) and saved. As a student it takes one training step, whose gradients are
compared with those of the model's own logits; as a teacher it scores three sequences, compared with its own logits,
through the code of the commands. Anything else than these three outcomes is a FAULT: an exception that is no
sentence, a number that differs, a parameter whose gradient is lost. Exit code 1 where there is one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.shrunk_models import LEFT_OUT, VOCABULARY, families, shrunk_model
from storage.errors import UserError

CUT, FULL, REFUSED, FAULT, NOT_BUILT = "cut", "full logits", "refused", "FAULT", "not built"
# Relative to the largest of the numbers compared.
TOLERANCE = 1e-4


def as_student(model: Any) -> tuple[str, str]:
    """One cross-entropy through the distillation forward, and its gradients against those of the whole model."""
    from stages.distillation_forward import install_distillation

    model.eval()
    ids = torch.randint(5, VOCABULARY - 1, (2, 24), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(0, 46, 3)
    gold = ids.flatten().roll(-1)[rows]
    try:
        installed = install_distillation(model)
    except UserError as refusal:
        return REFUSED, str(refusal)

    def loss(hidden: torch.Tensor, head: Any, parameters: list[Any]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(hidden), gold)

    trained = [p for p in model.parameters() if p.requires_grad]
    lengths = torch.tensor([24, 24])
    found = torch.autograd.grad(
        model(distillation=loss, input_ids=ids, rows=rows, lengths=lengths), trained, allow_unused=True
    )
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[rows]
    wanted = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, gold), trained, allow_unused=True)
    largest = max(g.abs().max().item() for g in wanted if g is not None)
    for one, other in zip(found, wanted, strict=True):
        if (one is None) != (other is None):
            return FAULT, "a parameter has a gradient on one of two ways only"
        if one is not None and other is not None and (one - other).abs().max().item() > TOLERANCE * largest:
            return FAULT, "gradients differ"
    return (FULL, installed.note) if installed.note else (CUT, "")


def as_teacher(folder: Path) -> tuple[str, str]:
    """Three sequences of different lengths, scored by the engine and by the model alone."""
    from transformers import AutoModelForCausalLM

    from stages.corpus import Sequence
    from stages.statistics import StatisticsOptions
    from stages.teacher_checks import check_causal
    from stages.teacher_transformers import TransformersTeacher

    random = np.random.default_rng(0)
    sequences = [
        Sequence(i, random.integers(5, VOCABULARY - 1, length).astype(np.int32), np.ones(length - 1, bool))
        for i, length in enumerate((24, 9, 16))
    ]
    try:
        teacher = TransformersTeacher(str(folder), StatisticsOptions(4), device="cpu")
        lengths = np.array([len(sequence.input_ids) for sequence in sequences])
        corpus: Any = SimpleNamespace(lengths=lengths, read=lambda start, stop: sequences[start:stop])
        check_causal(teacher, corpus, type(teacher._model).__name__)
        scored = [teacher.score([sequence], lambda tokens: None).sequences[0] for sequence in sequences]
    except UserError as refusal:
        return REFUSED, str(refusal)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for one in scored:
        ids = torch.from_numpy(one.sequence.input_ids.astype(np.int64))
        with torch.no_grad():
            logprobs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        wanted = logprobs.gather(1, ids[1:, None])[:, 0].numpy()
        if np.abs(one.gold_logprob - wanted).max() > TOLERANCE * max(1.0, np.abs(wanted).max()):
            return FAULT, "log-probabilities differ"
    return (FULL, teacher.notes[0]) if teacher.notes else (CUT, "")


def guarded(look: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    try:
        return look()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a fault
        traceback.print_exc()
        return FAULT, f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def sweep(names: list[str], show: Callable[[str], None]) -> dict[str, Counter[str]]:
    """Look at each family; returns how often each outcome came, as student and as teacher."""
    totals: dict[str, Counter[str]] = {"student": Counter(), "teacher": Counter()}
    for name in names:
        torch.manual_seed(0)
        try:
            student, teacher = shrunk_model(name), shrunk_model(name)
        except Exception as error:  # noqa: BLE001 - a family that is not in the tables yet
            for counter in totals.values():
                counter[NOT_BUILT] += 1
            show(f"{name:32} {NOT_BUILT}: {LEFT_OUT.get(name) or ' '.join(str(error).split())[:150]}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            teacher.save_pretrained(folder)
            outcomes = {
                "student": guarded(lambda model=student: as_student(model)),  # type: ignore[misc]
                "teacher": guarded(lambda folder=folder: as_teacher(Path(folder))),  # type: ignore[misc]
            }
        for role, (outcome, _) in outcomes.items():
            totals[role][outcome] += 1
        said = "; ".join(dict.fromkeys(text for _, text in outcomes.values() if text))
        show(f"{name:32} {outcomes['student'][0]:12} {outcomes['teacher'][0]:12} {said}")
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help="all where none is named")
    chosen = parser.parse_args().family
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.monotonic()
    print(f"{'family':32} {'student':12} {'teacher':12}")
    totals = sweep(chosen or families(), lambda line: print(line, flush=True))
    for role, counter in totals.items():
        counts = ", ".join(f"{counter[outcome]} {outcome}" for outcome in (CUT, FULL, REFUSED, FAULT, NOT_BUILT))
        print(f"as {role}s: {counts}")
    print(f"transformers {transformers.__version__}, {time.monotonic() - started:.0f} s")
    return 1 if any(counter[FAULT] for counter in totals.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
