"""With the whole vocabulary kept, training from the cache is training from the live teacher: loss and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from stages.distillation_forward import Head, install_distillation
from stages.divergence import StudentTerms, divergences, teacher_terms
from stages.head_loss import head_loss
from stages.objective import NORMALIZATIONS, Objective, coefficients, weighted_sum
from stages.shard_dataset import Collator, ShardDataset, as_tensors, corpus_threshold, teacher_rows
from stages.student import StudentOptions, prepare
from stages.student_trainer import make_trainer
from tests import reference
from tests.conftest import VOCABULARY, Tiny


@pytest.fixture(scope="module")
def full_cache(tiny: Tiny, make_cache: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_cache(tmp_path_factory.mktemp("full") / "cache", top_n=VOCABULARY, logprob_bits=32, limit=12)


def load(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def online_loss(teacher, student, sequences, objective: Objective) -> torch.Tensor:
    """The objective from both models' full logits, each sequence alone, straight from the definitions."""
    tkd, dkd, ce, unc = [], [], [], []
    for sequence in sequences:
        ids = torch.tensor(sequence.input_ids, dtype=torch.long)[None]
        with torch.no_grad():
            log_p = log_softmax(teacher(ids).logits[0, :-1].double(), -1)
        logits = student(ids).logits[0, :-1]
        log_q = log_softmax(logits.double(), -1)
        gold = ids[0, 1:, None]
        gp, gq = log_p.gather(1, gold), log_q.gather(1, gold)
        others = torch.ones_like(log_p, dtype=torch.bool).scatter_(1, gold, False)
        rest_p = log_p[others].view(len(gold), -1)
        rest_q = log_q[others].view(len(gold), -1)
        np_, nq = rest_p.logsumexp(1, keepdim=True), rest_q.logsumexp(1, keepdim=True)
        tkd.append((gp.exp() * (gp - gq) + np_.exp() * (np_ - nq)).squeeze(1))
        hat_p, hat_q = rest_p - np_, rest_q - nq
        dkd.append((hat_p.exp() * (hat_p - hat_q)).sum(1))
        ce.append(cross_entropy(logits.double(), gold.squeeze(1), reduction="none"))
        unc.append(np_.exp().squeeze(1))
    tkd, dkd, ce, unc = (torch.cat(parts) for parts in (tkd, dkd, ce, unc))
    total = len(unc)
    extra = objective.ce_weight * ce.mean()
    if objective.name != "atkd":
        plain = {"ce": ce, "kl": tkd + unc * dkd, "tkd": tkd, "dkd": dkd, "tkd+dkd": tkd + dkd}
        return plain[objective.name].mean() + extra
    hard = unc >= unc.sort(descending=True).values[int(np.ceil(objective.hard_ratio * total)) - 1]
    easy_sum, hard_sum = dkd[~hard].sum(), (tkd + dkd)[hard].sum()
    if objective.normalize == "group":
        easy_sum, hard_sum = easy_sum / (~hard).sum().clamp(min=1), hard_sum / hard.sum().clamp(min=1)
    else:
        easy_sum, hard_sum = easy_sum / total, hard_sum / total
    return objective.easy_weight * easy_sum + (1 - objective.easy_weight) * hard_sum + extra


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("name", reference.OBJECTIVES)
def test_loss_and_gradient_on_the_students_weights(name: str, normalize: str, full_cache: Any, tiny: Tiny) -> None:
    objective = Objective(name=name, normalize=normalize, ce_weight=0.1)
    dataset = ShardDataset(full_cache, np.arange(full_cache.manifest.corpus.sequences))
    # Different lengths, so that the batch is padded.
    sequences = sorted((dataset[i] for i in range(len(dataset))), key=lambda s: len(s.input_ids))
    sequences = [sequences[0], sequences[5], sequences[-1]]
    student = load(tiny.student)
    batch = as_tensors(Collator(objective, VOCABULARY).batch(sequences))
    rows = teacher_rows(batch)
    terms = teacher_terms(rows, objective.tail)
    weights = coefficients(objective, batch["is_hard"])
    vocabulary = install_distillation(student).vocabulary_size

    def from_hidden(hidden: torch.Tensor, head: Head, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        def loss_of(found: StudentTerms, part: slice) -> torch.Tensor:
            return weighted_sum(divergences(found, terms[part]), weights[part])

        return head_loss(hidden, head, parameters, rows, loss_of, vocabulary_size=vocabulary, slice_bytes=1)

    offline = student(distillation=from_hidden, input_ids=batch["input_ids"], rows=batch["rows"])
    offline.backward()

    twin = load(tiny.student)
    online = online_loss(load(tiny.teacher), twin, sequences, objective)
    online.backward()
    assert offline.item() == pytest.approx(online.item(), abs=1e-5, rel=1e-5)
    for (parameter, ours), theirs in zip(student.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=lambda m, p=parameter: f"{p}: {m}")


def test_a_model_that_is_given_to_a_second_trainer_is_cut_again(tiny: Tiny) -> None:
    """And not run whole, with all its logits in memory, because a forward of ours stands in its own's place."""
    student = load(tiny.student)
    for _ in range(2):
        vocabulary = install_distillation(student).vocabulary_size
    ids, rows = torch.arange(12).reshape(2, 6), torch.tensor([0, 1, 7])

    def both(hidden: torch.Tensor, head: Head, parameters: list[torch.nn.Parameter]) -> Any:
        return hidden.shape, head(hidden)

    shape, logits = student(distillation=both, input_ids=ids, rows=rows)
    assert shape == (3, student.config.hidden_size) and logits.shape == (3, vocabulary)
    torch.testing.assert_close(logits, student(input_ids=ids).logits.flatten(0, 1)[rows])


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_five_steps_of_a_cached_and_of_an_online_student(
    batching: str, full_cache: Any, tiny: Tiny, tmp_path: Path
) -> None:
    """The command's own training against a loop with AdamW and both models' logits: every weight after every step."""
    from transformers import TrainerCallback

    trainer: dict[str, Any] = {"max_steps": 5, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    # Adam divides a gradient by its own size: where that is rounding noise, only epsilon keeps it from mattering.
    trainer |= {"adam_epsilon": 1e-5, "weight_decay": 0.01, "dataloader_num_workers": 0}
    sizes: dict[str, Any] = {"batching": "packed", "batch_tokens": 300} if batching == "packed" else {}
    if not sizes:
        trainer["per_device_train_batch_size"] = 3
    objective = Objective("atkd", ce_weight=0.1)
    given = StudentOptions(
        str(tiny.student),
        str(full_cache.path),
        str(tmp_path / "out"),
        objective,
        eval_share=0,
        trainer=trainer,
        **sizes,
    )
    offline = make_trainer(prepare(given))
    after: list[dict[str, torch.Tensor]] = []

    class Keep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            after.append({name: p.detach().clone() for name, p in kwargs["model"].named_parameters()})

    offline.add_callback(Keep())
    loader: Any = offline.get_train_dataloader()
    drawn: list[list[int]] = []
    for epoch in range(5):
        if len(drawn) < trainer["max_steps"]:
            loader.batch_sampler.set_epoch(epoch)
            drawn += list(loader.batch_sampler)
    offline.train()

    teacher, student = load(tiny.teacher), load(tiny.student)
    decayed = [p for name, p in student.named_parameters() if "norm" not in name]
    others = [p for name, p in student.named_parameters() if "norm" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=1e-3, eps=1e-5
    )
    corpus = [
        row for rows in full_cache.column("input_ids") for row in map(rows["input_ids"].__getitem__, range(len(rows)))
    ]
    for step, batch in enumerate(drawn[:5]):
        online_loss(teacher, student, [SimpleNamespace(input_ids=corpus[i]) for i in batch], objective).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for name, ours in student.named_parameters():
            torch.testing.assert_close(
                after[step][name], ours.detach(), atol=1e-5, rtol=0, msg=lambda m, n=name, s=step: f"step {s}, {n}: {m}"
            )
    start = load(tiny.student).get_output_embeddings().weight
    assert (student.get_output_embeddings().weight - start).abs().max() > 1e-3


def test_corpus_scope_is_the_same_however_batches_are_formed(full_cache: Any) -> None:
    objective = Objective(rank_scope="corpus")
    dataset = ShardDataset(full_cache, np.arange(full_cache.manifest.corpus.sequences))
    threshold = corpus_threshold([(full_cache, dataset.sequence_ids)], 0.5)
    collator = Collator(objective, VOCABULARY, threshold)
    alone = np.concatenate([collator.batch([dataset[i]])["is_hard"] for i in range(len(dataset))])
    together = collator.batch([dataset[i] for i in range(len(dataset))])["is_hard"]
    np.testing.assert_array_equal(alone, together)
    assert 0.5 <= together.mean() < 0.51


def test_sequence_scope_ranks_inside_each_sequence(full_cache: Any) -> None:
    dataset = ShardDataset(full_cache, np.arange(4))
    batch = Collator(Objective(rank_scope="sequence"), VOCABULARY).batch([dataset[i] for i in range(4)])
    for sequence in range(4):
        inside = batch["sequence_of"] == sequence
        assert batch["is_hard"][inside].sum() == np.ceil(0.5 * int(inside.sum()))
