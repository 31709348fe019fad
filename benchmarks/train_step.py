"""Time and peak memory of one optimiser step: ours against plain cross-entropy and the other ways to distil.

    python -m benchmarks.train_step --vocabulary 152064 [--tokens 4096] [--rounds 3] [--device cuda --dtype bfloat16]

    ce      cross-entropy with the model's own loss: what ordinary fine-tuning costs
    ours    `train-student`'s step: DistillationTrainer.compute_loss, objective atkd, tail samples, fused head and loss
    sketch  `ours`, the tail from a sketch and its residual samples
    naive   the same objective from the same stored rows, on the student's full logits
    liger   cross-entropy with Liger's fused linear loss (CUDA; it has no CPU kernels)
    online  KL to a live teacher with about ten times the student's parameters, on full logits

Each way runs in a process of its own: a warm-up step, then `--steps` timed ones with AdamW; the ways take turns, round
after round, so that a machine whose speed drifts does not favour one. Ratios are medians over rounds against `ce` of
the same round; what the sketch costs is its ratio to `ours`. Memory is the peak during the timed steps above what is
held between steps, the weights and AdamW's moments: activations, logits and gradients. Weights are random; the stored
rows are the statistics of random logits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.memory import PeakMemory
from benchmarks.models import random_qwen3
from benchmarks.rounds import report, take_turns

WAYS = ("ce", "ours", "sketch", "naive", "liger", "online")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=4096, help="a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--top-n", type=int, default=16)
    parser.add_argument("--tail-samples", type=int, default=16)
    parser.add_argument("--sketch-rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments)
        return
    if arguments.device == "cpu" and "liger" in arguments.ways:
        print("liger is left out: its kernels are Triton's, which has no CPU", file=sys.stderr)
        arguments.ways.remove("liger")
    show(arguments, measure(arguments))


def measure(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    names = [name for name in vars(arguments) if name not in ("ways", "run", "rounds")]
    return take_turns("benchmarks.train_step", "--run", arguments.ways, names, arguments)


def show(arguments: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    print(
        f"V={arguments.vocabulary}, {arguments.tokens} tokens a step, hidden {arguments.hidden}, "
        f"{arguments.layers} layers, {arguments.dtype}, {arguments.device}, {arguments.rounds} rounds, "
        f"{os.cpu_count()} cores\n"
    )
    print("| way | seconds a step | of ce | of ours | tokens/s | memory MB | of ce |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for way, rounds in found.items():
        seconds = statistics.median(r["seconds"] for r in rounds)
        memory = statistics.median(r["memory_mb"] for r in rounds)

        def ratio(name: str, base: str = "ce", rounds: list[dict[str, float]] = rounds) -> str:
            if base not in found:
                return ""
            return f"{statistics.median(a[name] / b[name] for a, b in zip(rounds, found[base], strict=True)):.2f}"

        print(
            f"| {way} | {seconds:.3f} | {ratio('seconds')} | {ratio('seconds', 'ours')} | "
            f"{arguments.tokens / seconds:.0f} | {memory:.0f} | {ratio('memory_mb')} |"
        )


# One way, in a process of its own -------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> None:
    import torch

    torch.manual_seed(0)
    device = torch.device(arguments.device)
    student = make_model(arguments, arguments.hidden, arguments.layers).to(device)
    batch = {name: tensor.to(device) for name, tensor in make_batch(arguments).items()}
    loss = LOSSES[arguments.run](student, batch, arguments)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    with PeakMemory(cuda=device.type == "cuda") as memory:
        seconds = []
        for _ in range(arguments.steps):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
    report(seconds=statistics.median(seconds), memory_mb=memory.growth_mb)


def make_model(arguments: argparse.Namespace, hidden: int, layers: int) -> Any:
    import torch

    return random_qwen3(arguments.vocabulary, hidden, layers, tied=True).to(getattr(torch, arguments.dtype))


def make_batch(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the collator gives for sequences of random tokens, every position stored."""
    import torch

    from stages.ranking import is_hard
    from stages.statistics import StatisticsOptions, row_statistics

    length, count = arguments.length, arguments.tokens // arguments.length
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, arguments.vocabulary, (count, length), generator=generator)
    rows = torch.cat([torch.arange(length - 1) + length * row for row in range(count)])
    gold = input_ids.flatten()[rows + 1]
    samples = arguments.tail_samples
    options = StatisticsOptions(arguments.top_n, tail_samples=samples, residual_samples=samples)
    sketch, codes, parts = make_sketch(arguments), [], []
    for part in gold.split(64):
        logits = 3 * torch.randn((len(part), arguments.vocabulary), generator=generator)
        uniforms = torch.rand((len(part), samples), dtype=torch.float64, generator=generator)
        codes.append(torch.randint(108, 149, (len(part), sketch.rank), generator=generator).to(torch.uint8))
        drawn = {"uniforms": uniforms, "residual_uniforms": uniforms}
        parts.append(row_statistics(logits, part, options, sketch_logits=sketch.logits(codes[-1]), **drawn))

    def all_of(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    gold_logprob = all_of("gold_logprob")
    return {
        "input_ids": input_ids,
        "rows": rows,
        "gold": gold,
        "gold_logprob": gold_logprob,
        "is_hard": torch.from_numpy(is_hard(gold_logprob.numpy(), 0.5)),
        "tail_logmass": all_of("tail_logmass"),
        "top_ids": all_of("top_ids"),
        "top_logprobs": all_of("top_logprobs"),
        "tail_samples": all_of("tail_samples"),
        "sketch_codes": torch.cat(codes),
        "residual_samples": all_of("residual_samples"),
        "residual_mass": all_of("residual_mass").half(),
    }


def make_sketch(arguments: argparse.Namespace) -> Any:
    import torch

    from stages.sketch import Sketch

    generator = torch.Generator().manual_seed(2)
    size, rank = arguments.vocabulary, arguments.sketch_rank
    basis, bias = (torch.randn(shape, generator=generator) for shape in ((size, rank), (size,)))
    nothing = torch.zeros(1)
    return Sketch(basis, bias, nothing, nothing, torch.full((rank,), 0.06), nothing)


Loss = Callable[[], Any]


def ce(student: Any, batch: dict[str, Any], arguments: argparse.Namespace) -> Loss:
    return lambda: student(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss


def ours(student: Any, batch: dict[str, Any], arguments: argparse.Namespace) -> Loss:
    from stages.objective import Objective
    from stages.tail import Tail

    return trained(student, batch, arguments, Objective(tail="sampled"), Tail("sampled"))


def sketch(student: Any, batch: dict[str, Any], arguments: argparse.Namespace) -> Loss:
    from stages.objective import Objective

    objective = Objective(tail="sketch")
    return trained(student, batch, arguments, objective, objective.sketch_tail(make_sketch(arguments)))


def trained(student: Any, batch: dict[str, Any], arguments: argparse.Namespace, objective: Any, tail: Any) -> Loss:
    from transformers import TrainingArguments

    from stages.training import DistillationTrainer

    trainer = DistillationTrainer(
        model=student,
        args=TrainingArguments(tempfile.mkdtemp(), report_to=[], use_cpu=arguments.device == "cpu"),
        objective=objective,
        tail=tail,
    )
    return lambda: trainer.compute_loss(student, batch)


def naive(student: Any, batch: dict[str, Any], arguments: argparse.Namespace) -> Loss:
    from stages.divergence import student_terms, teacher_terms
    from stages.objective import Objective, coefficients, compare, weighted_sum
    from stages.shard_dataset import teacher_rows
    from stages.tail import Tail

    objective, rows = Objective(tail="sampled"), teacher_rows(batch)

    def loss() -> Any:
        logits = student(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)[batch["rows"]].float()
        terms = compare(objective, student_terms(logits, rows, Tail("sampled")), teacher_terms(rows, "sampled"))
        return weighted_sum(terms, coefficients(objective, batch["is_hard"]))

    return loss


def liger(student: Any, batch: dict[str, Any], arguments: argparse.Namespace) -> Loss:
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3

    apply_liger_kernel_to_qwen3(
        rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=True, model=student
    )
    return ce(student, batch, arguments)


def online(student: Any, batch: dict[str, Any], arguments: argparse.Namespace) -> Loss:
    import torch

    size = sum(parameter.numel() for parameter in student.parameters())
    width = 2 * arguments.hidden
    layers = arguments.layers
    with torch.device("meta"):
        while sum(p.numel() for p in make_model(arguments, width, layers).parameters()) < 10 * size:
            layers += 4
    teacher = make_model(arguments, width, layers).to(student.device).eval()

    def loss() -> Any:
        with torch.no_grad():
            target = teacher(input_ids=batch["input_ids"], use_cache=False).logits.float().log_softmax(-1)
        logits = student(input_ids=batch["input_ids"], use_cache=False).logits.float()
        return torch.nn.functional.kl_div(
            logits.log_softmax(-1).flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean"
        )

    return loss


LOSSES: dict[str, Callable[[Any, dict[str, Any], argparse.Namespace], Loss]] = {
    "ce": ce,
    "ours": ours,
    "sketch": sketch,
    "naive": naive,
    "liger": liger,
    "online": online,
}

if __name__ == "__main__":
    main()
