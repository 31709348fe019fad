"""The sliced head-plus-loss equals the plain full-logits form: loss and every gradient, for every kind of head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stages.causal_lm import BodyAndHead, take_apart
from stages.divergence import StudentTerms, TeacherRows, divergences, student_terms, teacher_terms
from stages.head_loss import head_loss
from stages.objective import OBJECTIVES, Objective, coefficients, compare, weighted_sum
from stages.sketch import Sketch
from stages.tail import TAIL_MODES, Tail, log_prior
from tests.stages.test_divergence import kept_rows

ROWS, WIDTH, VOCABULARY = 23, 12, 41


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twelve rows: a slice of 16 or 23 makes a full one and a partial one."""
    each = 12 * 4 * VOCABULARY // torch.get_num_threads() + 1
    monkeypatch.setattr("stages.head_loss._BLOCK_BYTES", each)


class Head(nn.Module):
    """An output layer as some family of models computes it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=kind == "bias")
        self.kind = kind
        if kind == "lora":
            self.output.requires_grad_(False)
            self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, VOCABULARY, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.output(hidden) * 3
        if self.kind == "capped":
            return 4.0 * torch.tanh(logits / 4.0)
        if self.kind == "scaled":
            return logits / 1.7
        if self.kind == "lora":
            return logits + self.up(self.down(hidden))
        return logits


def setting(kind: str, objective: Objective, top_n: int, dtype: torch.dtype):
    generator = np.random.default_rng(0)
    teacher = generator.standard_normal((ROWS, VOCABULARY)) * 2
    gold = generator.integers(0, VOCABULARY, ROWS)
    gold[:8] = teacher[:8].argmax(1)
    rows = kept_rows(teacher, gold, top_n, dtype)
    terms = teacher_terms(rows, objective.tail, dtype)
    hard = torch.tensor(generator.random(ROWS) < 0.5)
    weights = coefficients(objective, hard, dtype=dtype)
    hidden = torch.tensor(generator.standard_normal((ROWS, WIDTH)), dtype=dtype)
    rows.tail_samples = tail_samples(rows, generator)
    add_sketch(rows, teacher, generator)
    head = nn.Linear(WIDTH, VOCABULARY, bias=kind == "linear with bias") if "linear" in kind else Head(kind)
    return head.to(dtype), hidden, rows, terms, weights


def tail_samples(rows: TeacherRows, generator: np.random.Generator) -> torch.Tensor:
    """Five ids outside the kept set of each row, some of them twice; -1 where there are none."""
    drawn = torch.full((ROWS, 5), -1)
    for row in range(ROWS):
        outside = sorted(set(range(VOCABULARY)) - set(rows.top_ids[row].tolist()) - {int(rows.gold[row])})
        if outside:
            drawn[row] = torch.tensor(generator.choice(outside[:7], 5))
    return drawn


def add_sketch(rows: TeacherRows, teacher: np.ndarray, generator: np.random.Generator) -> None:
    """Codes and residual samples as a cache would hold them, but at random; some ids beyond the student's."""
    rows.sketch_codes = torch.tensor(generator.integers(108, 149, (ROWS, 3)), dtype=torch.uint8)
    ids = np.where(rows.tail_samples >= 0, rows.tail_samples, 0)
    rows.residual_samples = torch.tensor(ids)
    rows.residual_samples[3:5, [0, 4]] = VOCABULARY + torch.tensor([3, 4])
    rows.residual_mass = torch.tensor(generator.random(ROWS) * 1.5).half()
    rows.residual_mass[rows.tail_logmass == float("-inf")] = 0.0


def make_sketch(vocabulary: int) -> Sketch:
    generator = torch.Generator().manual_seed(5)
    basis, bias = torch.randn((vocabulary, 3), generator=generator), torch.randn(vocabulary, generator=generator)
    return Sketch(basis, bias, torch.zeros(3, 2), torch.zeros(2), torch.full((3,), 0.06), torch.ones(2), soft_cap=3.0)


def make_tail(mode: str, objective: Objective | None = None) -> Tail:
    if mode == "sketch":
        # A teacher's vocabulary that is narrower than the student's.
        return (objective or Objective(tail="sketch")).sketch_tail(make_sketch(VOCABULARY - 2))
    prior = torch.linspace(1, 3, VOCABULARY).softmax(0)
    return Tail(mode, 0.6, log_prior(prior))


def loss_of(objective, terms, weights) -> Callable[[StudentTerms, slice], torch.Tensor]:
    def call(student: StudentTerms, part: slice) -> torch.Tensor:
        return weighted_sum(compare(objective, student, terms[part]), weights[part])

    return call


HEADS = ("linear", "linear with bias", "plain", "bias", "capped", "scaled", "lora")
CASES = [("atkd", top_n, tail, kind) for top_n in (1, 6, VOCABULARY) for tail in TAIL_MODES for kind in HEADS]
CASES += [(name, 6, tail, "linear") for name in OBJECTIVES for tail in TAIL_MODES]
CASES += [("kl", top_n, "sketch-reverse", kind) for top_n in (1, VOCABULARY) for kind in ("linear", "capped")]
CASES = [case for case in CASES if case[2] == "sketch-reverse" or not Objective(name=case[0], tail=case[2]).problem()]


@pytest.mark.parametrize(("name", "top_n", "tail", "kind"), CASES)
def test_equal_to_the_full_form(name: str, top_n: int, tail: str, kind: str) -> None:
    tail, _, direction = tail.partition("-")
    objective = Objective(name=name, tail=tail, direction=direction or "forward", ce_weight=0.2)
    head, hidden, rows, terms, weights = setting(kind, objective, top_n, torch.float32)
    whole = hidden.clone().requires_grad_()
    mode = make_tail(tail, objective)
    expected = weighted_sum(compare(objective, student_terms(head(whole), rows, mode), terms), weights)
    parameters = [p for p in head.parameters() if p.requires_grad]
    expected_gradients = torch.autograd.grad(expected, [whole, *parameters])

    sliced = hidden.clone().requires_grad_()
    # 16 rows at a time, the least there is: 23 rows make a full and a partial slice.
    found = head_loss(
        sliced,
        head,
        list(head.parameters()),
        rows,
        loss_of(objective, terms, weights),
        slice_bytes=1,
        vocabulary_size=VOCABULARY,
        tail=mode,
    )
    gradients = torch.autograd.grad(2.0 * found, [sliced, *parameters])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, 2.0 * theirs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        silent = head_loss(
            hidden,
            head,
            list(head.parameters()),
            rows,
            loss_of(objective, terms, weights),
            vocabulary_size=VOCABULARY,
            tail=mode,
        )
    torch.testing.assert_close(silent, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tail", ["bucket", "drop", "sampled", "sketch"])  # the shape of `prior` is held constant
@pytest.mark.parametrize("name", ["atkd", "kl"])
@pytest.mark.parametrize("kind", ["linear", "capped"])
def test_gradcheck(kind: str, name: str, tail: str) -> None:
    objective = Objective(name=name, tail=tail)
    mode = make_tail(tail, objective)
    check_gradients(kind, objective, mode)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "given",
    [{"name": "kl", "direction": "reverse"}, {"direction": "reverse"}, {"name": "jsd", "beta": 0.3}, {"name": "tvd"}],
    ids=["reverse kl", "reverse atkd", "jsd", "tvd"],
)
@pytest.mark.parametrize("kind", ["linear", "capped"])
def test_gradcheck_of_what_a_sketch_is_compared_by(kind: str, given: dict[str, Any], temperature: float) -> None:
    objective = Objective(**given, tail="sketch", temperature=temperature)
    check_gradients(kind, objective, make_tail("sketch", objective))


def check_gradients(kind: str, objective: Objective, mode: Tail) -> None:
    head, hidden, rows, terms, weights = setting(kind, objective, 5, torch.float64)

    def call(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # The parameter the head uses, so that its gradient is the one that is asked for.
        module.weight = weight  # type: ignore[assignment]
        return head_loss(
            hidden,
            head,
            [weight],  # type: ignore[list-item]
            rows,
            loss_of(objective, terms, weights),
            vocabulary_size=VOCABULARY,
            tail=mode,
            temperature=1.5,
        )

    class Again(torch.autograd.Function):
        """gradcheck goes backward more than once, which the loss itself refuses."""

        @staticmethod
        def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*inputs)
            return call(*inputs).detach()

        @staticmethod
        def backward(ctx: Any, scale: torch.Tensor) -> Any:
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            with torch.enable_grad():
                return torch.autograd.grad(call(*leaves), leaves, scale)

    module = head if isinstance(head, nn.Linear) else head.output
    weight = module.weight.detach().clone().requires_grad_()
    del module.weight
    assert torch.autograd.gradcheck(Again.apply, (hidden.requires_grad_(), weight))


@pytest.mark.parametrize(
    ("family", "more", "is_linear"),
    [
        ("Llama", {}, True),
        ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}, True),
        ("Gemma2", {"head_dim": 16}, False),  # capped
        ("Granite", {"logits_scaling": 3.0}, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_only_its_output_layer_is_recognised(
    family: str, more: dict[str, Any], is_linear: bool, dtype: torch.dtype
) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=77,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        **more,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    parts = take_apart(model)
    assert isinstance(parts, BodyAndHead)
    assert parts.linear_head is (model.get_output_embeddings() if is_linear else None)


def test_a_second_backward_is_refused() -> None:
    """The gradients were given away; a second pass would hand out zeros or scaled ones."""
    objective = Objective("kl")
    head, hidden, rows, terms, weights = setting("linear", objective, 5, torch.float32)
    loss = head_loss(hidden, head, [head.weight], rows, loss_of(objective, terms, weights), vocabulary_size=VOCABULARY)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward"):
        loss.backward()


def test_bfloat16_weights_gather_their_gradient_in_float32() -> None:
    """Many slices in bf16: summing their gradients in bf16 would lose the small ones."""
    torch.manual_seed(0)
    rows_count, vocabulary = 640, 64
    head = nn.Linear(16, vocabulary, bias=False).bfloat16()
    hidden = torch.randn(rows_count, 16).bfloat16()
    gold = torch.randint(0, vocabulary, (rows_count,))
    rows = TeacherRows(
        gold,
        torch.full((rows_count,), -1.0),
        torch.full((rows_count,), np.log1p(-np.exp(-1.0))),
        gold[:, None],
        torch.full((rows_count, 1), -1.0),
    )
    objective = Objective("kl")
    terms = teacher_terms(rows, "bucket")
    weights = coefficients(objective, torch.zeros(rows_count, dtype=torch.bool))
    found = head_loss(
        hidden, head, [head.weight], rows, loss_of(objective, terms, weights), slice_bytes=1, vocabulary_size=vocabulary
    )
    found.backward()
    exact_head = nn.Linear(16, vocabulary, bias=False)
    exact_head.weight = nn.Parameter(head.weight.detach().float())
    exact = weighted_sum(divergences(student_terms(exact_head(hidden.float()), rows), terms), weights)
    exact.backward()
    error = (head.weight.grad.float() - exact_head.weight.grad).norm() / exact_head.weight.grad.norm()
    assert found.dtype == torch.float32
    assert error < 1e-2
