"""What stands for the teacher inside the tail: how near each choice comes to the full teacher, and at what price.

    python -m benchmarks.fidelity teacher  --work DIR     a tokenizer and a teacher, trained on Python's own text
    python -m benchmarks.fidelity snapshot --work DIR     KL, its bias, and the student's gradient, at one moment
    python -m benchmarks.fidelity sketches --work DIR     what sketches leave to residual samples, and their bytes
    python -m benchmarks.fidelity spectrum --work DIR     the same of made-up teachers, by how steep their spectrum is
    python -m benchmarks.fidelity train    --work DIR     students of one start under each setting; goes on when killed
    python -m benchmarks.fidelity show     --work DIR     the tables, in markdown

A setting is written `mode:N:M`, `prior:N:gamma`, or `sketch:N:r:M`:

    online            the live teacher's whole distribution: what all others are compared with
    rskd:M            M ids drawn from the whole distribution, cross-entropy against their frequencies: unbiased (random
                      sampling KD, Anshumann et al., ACL 2025)
    drop:N bucket:N prior:N:gamma sampled:N:M       the tail modes of `stages.tail`, from what a cache holds
    sketch:N:r:M      a sketch of rank r and M residual samples; M = 0 is the sketch alone
    independent:N:M   `sampled`, but M independent draws instead of one from each of M strata
    mix:N:M:gamma:a   the share a of the tail as `prior` says, the rest as `sampled`: less noise, some bias

The teacher is live, but a student sees what a cache gives: our own `row_statistics`, top log-probabilities rounded to
float16, our own loss. Bytes are those of a shard that the project's writer really wrote, ids and mask included. The
objective is plain forward `kl`. Text that students train on was not seen by the teacher; held-out text by nobody. A
sketch is calibrated on the first rows of the former, as `cache-teacher` does; what all positions share, its basis or
the mean tail, is not in the bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, log_softmax

from stages.causal_lm import BodyAndHead
from stages.divergence import StudentTerms, TeacherRows, teacher_terms
from stages.head_loss import head_loss
from stages.objective import Objective, coefficients, compare, weighted_sum
from stages.sketch import HiddenMoments, Sketch, calibrate
from stages.statistics import RowStatistics, StatisticsOptions, residual_uniforms, row_statistics, sample_uniforms
from stages.summary import equal_tail_samples, squared_masses
from stages.tail import Tail, log_prior

# One device sums in another order than the next; the comparison within one machine is what counts.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = ["online", "sampled:4:28", "prior:64:0.5", "drop:64", "bucket:16"]
SETTINGS += [f"rskd:{m}" for m in (12, 24, 50, 55)]
SETTINGS += ["sketch:2:16:4", "sketch:4:16:8", "sketch:4:32:8", "sketch:4:64:8"]
SKETCHES = [f"sketch:{n}:{r}:0" for n in (2, 4, 8) for r in (8, 16, 32, 64)]
SNAPSHOT = [
    f"{mode}:{n}{rest}"
    for n in (4, 8, 16, 32, 64, 128)
    for mode, rest in [("drop", ""), ("bucket", ""), ("prior", ":0.5"), ("prior", ":1"), ("sampled", ":8")]
] + ["independent:16:8", "sampled:4:28", "independent:4:28", "rskd:12", "rskd:50"]
SNAPSHOT += [f"sketch:4:{r}:{m}" for r in (8, 16, 32, 64) for m in (0, 8)]
# Rows of the students' text that sketches and mean tails are made of.
CALIBRATION = 64
# Residual samples, and how fast the singular values of made-up logits fall: s_i = i ** -exponent.
RESIDUALS = 8
EXPONENTS = (0.5, 0.75, 1.0, 1.25)


@dataclass(frozen=True)
class Setting:
    """What a student learns from; see the top of this file."""

    mode: str
    top_n: int = 1
    samples: int = 0
    gamma: float = 0.5
    share: float = 0.0
    rank: int = 0

    @classmethod
    def parse(cls, text: str) -> Setting:
        mode, *numbers = text.split(":")
        if mode == "rskd":
            return cls(mode, samples=int(numbers[0]))
        if mode in ("sampled", "independent"):
            return cls(mode, int(numbers[0]), int(numbers[1]))
        if mode == "prior":
            return cls(mode, int(numbers[0]), gamma=float(numbers[1]))
        if mode == "mix":
            return cls(mode, int(numbers[0]), int(numbers[1]), float(numbers[2]), float(numbers[3]))
        if mode == "sketch":
            return cls(mode, int(numbers[0]), int(numbers[2]), rank=int(numbers[1]))
        return cls(mode, *map(int, numbers))

    @property
    def tail_mode(self) -> Any:
        return "sampled" if self.mode in ("independent", "mix") else self.mode

    @property
    def options(self) -> StatisticsOptions:
        if self.mode == "sketch":
            return StatisticsOptions(self.top_n, residual_samples=self.samples)
        return StatisticsOptions(self.top_n, tail_samples=self.samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = (snapshot, sketches, spectrum, train, show)
    steps = {"teacher": make_teacher, **{step.__name__: step for step in own}}
    parser.add_argument("step", choices=list(steps))
    parser.add_argument(
        "--work", type=Path, default=Path("fidelity"), help="where everything is kept; default: fidelity/"
    )
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=192, help="of the teacher")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--teacher-steps", type=int, default=1400, help="of 2048 tokens")
    parser.add_argument("--teacher-learning-rate", type=float, default=3e-3)
    parser.add_argument("--student-hidden", type=int, default=96)
    parser.add_argument("--student-layers", type=int, default=2)
    parser.add_argument("--start-steps", type=int, default=400, help="cross-entropy steps before the comparison")
    parser.add_argument("--steps", type=int, default=250, help="of the comparison")
    parser.add_argument("--batch", type=int, default=4, help="sequences of 256 tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--sharpen", type=float, default=1.0, help="the teacher's temperature: below 1 surer than it is"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--settings", nargs="+", help="see above; default: the ones of the tables")
    parser.add_argument("--threads", type=int, help="of torch; default: all cores")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    steps[arguments.step](arguments)


# Teacher, text and students -------------------------------------------------------------------------------------------


def make_teacher(arguments: argparse.Namespace) -> None:
    from examples.demo.corpus import build_corpus, read_texts
    from examples.demo.teacher import pack, train_tokenizer

    corpus = build_corpus(arguments.work / "corpus", transfer_characters=1_200_000, heldout_characters=200_000)
    tokenizer = train_tokenizer(read_texts(corpus.teacher), arguments.work / "teacher", arguments.vocabulary)
    model = make_model(tokenizer, arguments.hidden, arguments.layers, seed=0)
    text = pack(tokenizer, read_texts(corpus.teacher))
    learn_text(
        model, text, arguments.teacher_steps, batch=8, learning_rate=arguments.teacher_learning_rate, seed=0, every=100
    )
    model.save_pretrained(arguments.work / "teacher")
    describe_teacher(Bench(arguments))


def describe_teacher(bench: Bench) -> None:
    ce = entropy = top = 0.0
    for ids in bench.held_out.split(4):
        log_p = log_softmax(bench.teacher_logits(ids), 1)
        ce += cross_entropy(log_p, ids[:, 1:].flatten().to(DEVICE), reduction="sum").item()
        entropy -= (log_p.exp() * log_p).sum().item()
        top += log_p.amax(1).exp().sum().item()
    positions = bench.held_out[:, 1:].numel()
    said = {"cross_entropy": ce / positions, "entropy": entropy / positions, "top1_mass": top / positions}
    (bench.work / f"teacher{bench.arguments.sharpen:g}.json").write_text(json.dumps(said))
    print(f"teacher on held-out text: {said}", flush=True)


def make_model(tokenizer: Any, hidden: int, layers: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).to(DEVICE)


def learn_text(
    model: Any, text: torch.Tensor, steps: int, *, batch: int, learning_rate: float, seed: int, every: int = 0
) -> None:
    """Plain cross-entropy on rows of text."""
    from examples.demo.teacher import mean_cross_entropy

    step_of = Optimizer(model, learning_rate, steps)
    started = time.monotonic()
    for step, ids in zip(range(1, steps + 1), batches(text, batch, seed), strict=False):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = mean_cross_entropy(model, ids.to(DEVICE))
        loss.backward()
        step_of()
        if every and step % every == 0:
            print(f"step {step} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)


class Optimizer:
    """AdamW, gradients cut at norm 1, a short warm-up, then a cosine to 0. Called after `backward`."""

    def __init__(self, model: Any, learning_rate: float, steps: int) -> None:
        from transformers import get_cosine_schedule_with_warmup

        self.parameters = list(model.parameters())
        decayed = [{"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": 0.1}]
        plain = [{"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW([*decayed, *plain], lr=learning_rate, betas=(0.9, 0.98), eps=1e-9)
        self.schedule = get_cosine_schedule_with_warmup(self.adam, min(50, steps // 10), steps)

    def __call__(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.schedule.step()
        self.adam.zero_grad(set_to_none=True)


def batches(text: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Rows in a fresh order every epoch, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from text[torch.randperm(len(text), generator=generator)].split(size)


class Bench:
    """The teacher, its tokenizer and the texts of one work directory."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

        self.arguments, self.work = arguments, arguments.work
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.work / "teacher")
        self.teacher = BodyAndHead(LlamaForCausalLM.from_pretrained(self.work / "teacher").to(DEVICE).eval())
        self.vocabulary = len(self.tokenizer)
        self.prior_sums: dict[int, torch.Tensor] = {}
        self.hidden: dict[bytes, torch.Tensor] = {}
        self.sketches: dict[int, Sketch] = {}

    def text(self, name: str) -> torch.Tensor:
        """int64 `[S, 256]`"""
        from examples.demo.corpus import read_texts
        from examples.demo.teacher import pack

        return pack(self.tokenizer, read_texts(self.work / "corpus" / f"{name}.jsonl"))

    @cached_property
    def transfer(self) -> torch.Tensor:
        return self.text("transfer")

    @cached_property
    def held_out(self) -> torch.Tensor:
        return self.text("heldout")[:96]

    @torch.no_grad()
    def teacher_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 `[S * 255, V]` of the scored positions of rows of ids."""
        return self.teacher.head(self.states(ids)).float() / self.arguments.sharpen

    @torch.no_grad()
    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """The teacher's `[S * 255, H]` before its head, computed once."""
        names = [row.numpy().tobytes() for row in ids]
        new = [index for index, name in enumerate(names) if name not in self.hidden]
        if new:
            states = self.teacher.body(ids[new].to(DEVICE))[:, :-1]
            self.hidden.update({names[index]: row for index, row in zip(new, states, strict=True)})
        return torch.cat([self.hidden[name] for name in names])

    def sketch(self, rank: int) -> Sketch:
        if rank not in self.sketches:
            head = self.teacher.head_parameters[0]
            moments = HiddenMoments(head.shape[1], DEVICE)
            for ids in self.transfer[:CALIBRATION].split(4):
                moments.add(self.states(ids))
            self.sketches[rank] = calibrate(moments, head, None, rank, logit_scale=1 / self.arguments.sharpen)
        return self.sketches[rank]

    def sketched(self, rank: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of rows of ids, uint8 `[S * 255, r]`, and the logits `[S * 255, V]` that they give back."""
        codes = self.sketch(rank).encode(self.states(ids))
        return codes, self.sketch(rank).logits(codes)

    def tail(self, setting: Setting) -> Tail:
        """The tail mode; its prior is the mean tail at this N over the first rows of the students' text."""
        if setting.mode == "sketch":
            return Tail("sketch", sketch=self.sketch(setting.rank))
        if setting.mode not in ("prior", "mix"):
            return Tail(setting.tail_mode)
        if setting.top_n not in self.prior_sums:
            total = torch.zeros(self.vocabulary, dtype=torch.float64, device=DEVICE)
            for ids in self.transfer[:CALIBRATION].split(4):
                gold = ids[:, 1:].flatten().to(DEVICE)
                row_statistics(self.teacher_logits(ids), gold, StatisticsOptions(setting.top_n), prior_sum=total)
            self.prior_sums[setting.top_n] = total.float()
        return Tail("prior", setting.gamma, log_prior(self.prior_sums[setting.top_n]))

    def student(self, seed: int) -> Any:
        """The common start of a seed: a small Llama that has read a little text."""
        arguments = self.arguments
        model = make_model(self.tokenizer, arguments.student_hidden, arguments.student_layers, seed=1000 + seed)
        name = f"start-{arguments.student_hidden}-{arguments.student_layers}-{arguments.start_steps}-{seed}.pt"
        path = self.work / name
        if not path.exists():
            rows = self.text("teacher")
            learn_text(model, rows, arguments.start_steps, batch=8, learning_rate=3e-3, seed=1000 + seed)
            torch.save(model.state_dict(), path)
        model.load_state_dict(torch.load(path, map_location=DEVICE, weights_only=True))
        return model


# What a student sees of the teacher -----------------------------------------------------------------------------------


def statistics_of(
    setting: Setting, ids: torch.Tensor, logits: torch.Tensor, seed: int, sketched: torch.Tensor | None = None
) -> RowStatistics:
    """The project's own statistics of rows of ids; `logits` are left as they are. sketched: what a sketch has for them,
    overwritten.
    """
    options = replace(setting.options, seed=seed)
    uniforms = np.concatenate([sample_uniforms(row, options) for row in ids.numpy()])
    residual = np.concatenate([residual_uniforms(row, options) for row in ids.numpy()])
    if setting.mode == "independent":
        generator = np.random.default_rng([seed, *ids[0, :8].tolist()])
        uniforms = generator.random((ids[:, 1:].numel(), setting.samples))
    return row_statistics(
        logits.clone(),
        ids[:, 1:].flatten().to(DEVICE),
        options,
        uniforms=torch.from_numpy(uniforms).to(DEVICE),
        sketch_logits=sketched,
        residual_uniforms=torch.from_numpy(residual).to(DEVICE),
    )


def stored_rows(bench: Bench, setting: Setting, ids: torch.Tensor, logits: torch.Tensor, seed: int) -> TeacherRows:
    """What comes back out of a cache."""
    codes = sketched = None
    if setting.mode == "sketch":
        codes, sketched = bench.sketched(setting.rank, ids)
    found = statistics_of(setting, ids, logits, seed, sketched)
    return TeacherRows(
        ids[:, 1:].flatten().to(DEVICE),
        found.gold_logprob,
        found.tail_logmass,
        found.top_ids,
        found.top_logprobs.half().float(),
        found.tail_samples if found.tail_samples.shape[1] else None,
        sketch_codes=codes,
        residual_samples=found.residual_samples,
        residual_mass=found.residual_mass.half().float(),
    )


def target(setting: Setting, logits: torch.Tensor, seed: int) -> torch.Tensor:
    """`[R, V]`, the distribution that a student of the live teacher is compared with."""
    p = logits.softmax(1)
    if setting.mode == "online":
        return p
    generator = torch.Generator(DEVICE).manual_seed(seed)
    drawn = p.multinomial(setting.samples, replacement=True, generator=generator)
    return torch.zeros_like(p).scatter_add_(1, drawn, torch.full_like(drawn, 1 / setting.samples, dtype=p.dtype))


class Loss:
    """The mean loss of a student over the positions of a batch, under one setting."""

    def __init__(self, bench: Bench, setting: Setting) -> None:
        self.bench, self.setting = bench, setting
        # (weight, tail) whose losses are added; targets add up in the same way, the loss being linear in them.
        self.tails = [(1.0, bench.tail(setting))]
        if setting.mode == "mix":
            self.tails = [(setting.share, bench.tail(setting)), (1.0 - setting.share, Tail("sampled"))]

    def __call__(self, student: BodyAndHead, ids: torch.Tensor, seed: int) -> torch.Tensor:
        logits = self.bench.teacher_logits(ids)
        hidden = student.body(ids.to(DEVICE))[:, :-1].flatten(0, 1)
        if self.setting.mode in ("online", "rskd"):
            wanted = target(self.setting, logits, seed=hash((seed, *ids[0, :8].tolist())) % 2**31)
            constant = torch.xlogy(wanted, wanted).sum(1).mean()
            return cross_entropy(student.head(hidden), wanted) + constant
        rows = stored_rows(self.bench, self.setting, ids, logits, seed)
        return torch.stack([weight * self.of_cache(student, hidden, rows, tail) for weight, tail in self.tails]).sum()

    def of_cache(self, student: BodyAndHead, hidden: torch.Tensor, rows: TeacherRows, tail: Tail) -> torch.Tensor:
        objective = Objective("kl", tail=tail.mode)
        terms = teacher_terms(rows, tail.mode)
        weights = coefficients(objective, torch.zeros(len(rows), dtype=torch.bool, device=DEVICE))

        def loss_of(found: StudentTerms, part: slice) -> torch.Tensor:
            return weighted_sum(compare(objective, found, terms[part]), weights[part])

        size = self.bench.vocabulary
        return head_loss(hidden, student.head, student.head_parameters, rows, loss_of, vocabulary_size=size, tail=tail)


# At one moment --------------------------------------------------------------------------------------------------------


def snapshot(arguments: argparse.Namespace) -> None:
    """Angle and length of the gradient on the student's weights, KL and its bias, over one batch of a training."""
    bench = Bench(arguments)
    model = bench.student(arguments.seeds[0])
    student = BodyAndHead(model)
    ids = bench.transfer[: arguments.batch]
    whole, kl = gradient(model, Loss(bench, Setting("online")), student, ids, 0)
    print(
        "| setting | KL | bias | angle, all weights | angle, output layer | angle, body | length ratio "
        "| KL to its expectation |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in arguments.settings or SNAPSHOT:
        setting = Setting.parse(name)
        found, value = gradient(model, Loss(bench, setting), student, ids, 0)
        value += missing_constant(bench, setting, ids)
        angles = [f"{angle(found[part], whole[part]):.1f}°" for part in ("all", "head", "body")]
        ratio = (found["all"].norm() / whole["all"].norm()).item()
        cells = [f"`{name}`", f"{value:.3f}", f"{value - kl:+.3f}", *angles, f"{ratio:.3f}"]
        print(f"| {' | '.join(cells)} | {expectation_kl(bench, setting, ids, student):.3f} |", flush=True)


def gradient(
    model: Any, loss: Loss, student: BodyAndHead, ids: torch.Tensor, seed: int
) -> tuple[dict[str, torch.Tensor], float]:
    """Flat gradients of all weights, of those of the output layer, and of the others; and the loss."""
    model.zero_grad(set_to_none=True)
    value = loss(student, ids, seed)
    value.backward()
    head = {id(p) for p in student.head_parameters}
    grads = {
        part: torch.cat([p.grad.flatten() for p in model.parameters() if part == "all" or (id(p) in head) == inside])
        for part, inside in [("all", True), ("head", True), ("body", False)]
    }
    return grads, value.item()


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.degrees(math.acos(min(1.0, (torch.dot(a, b) / (a.norm() * b.norm())).item())))


def missing_constant(bench: Bench, setting: Setting, ids: torch.Tensor) -> float:
    """What the loss of drawn ids lacks, a constant of the teacher alone: the KL is comparable with it."""
    logits = bench.teacher_logits(ids)
    log_p = log_softmax(logits, 1)
    if setting.mode == "rskd":
        wanted = target(setting, logits, 0)
        return ((log_p.exp() * log_p).sum(1) - torch.xlogy(wanted, wanted).sum(1)).mean().item()
    if not setting.samples:
        return 0.0
    tail, mass = true_tail(setting, ids, log_p)
    within = tail.clamp(min=-1e4) - mass.clamp(min=-1e4)[:, None]
    return (1.0 - setting.share) * (tail.exp() * within).sum(1).mean().item()


def true_tail(setting: Setting, ids: torch.Tensor, log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p `[R, V]` with -inf on the kept set, and its log-sum-exp `[R]`."""
    found = statistics_of(Setting("bucket", setting.top_n), ids, log_p, 0)
    kept = torch.cat([found.top_ids, ids[:, 1:].flatten().to(DEVICE)[:, None]], 1)
    return log_p.scatter(1, kept, -math.inf), found.tail_logmass


@torch.no_grad()
def expectation_kl(bench: Bench, setting: Setting, ids: torch.Tensor, student: BodyAndHead) -> float:
    """KL from the teacher to the mean of what a student is shown: 0 where that is unbiased, infinite where an id gets
    nothing, and for a shape that is mixed with the student's own, that with this student.
    """
    if setting.mode in ("online", "rskd", "sampled", "independent") or (setting.mode == "sketch" and setting.samples):
        return 0.0
    if setting.mode in ("drop", "bucket"):
        return math.inf if setting.mode == "drop" else math.nan
    tail, mass = true_tail(setting, ids, log_softmax(bench.teacher_logits(ids), 1))
    outside = tail > -math.inf
    if setting.mode == "sketch":
        log_w = bench.sketched(setting.rank, ids)[1].masked_fill_(~outside, -math.inf).log_softmax(1)
    else:
        q = student.head(student.body(ids.to(DEVICE))[:, :-1].flatten(0, 1)).float()
        log_w = bench.tail(setting).prior_shape(q.masked_fill_(~outside, -math.inf).softmax(1)).log()
    p = tail.exp()
    if setting.mode == "mix":
        log_w = torch.log(setting.share * log_w.exp() + (1 - setting.share) * (tail - mass[:, None]).exp())
    gap = torch.where(p > 0, p * (tail - mass[:, None] - log_w), 0.0)
    return gap.sum(1).mean().item()


@torch.no_grad()
def sketches(arguments: argparse.Namespace) -> None:
    """Of held-out text: the share of the logits' variance that a sketch explains, the KL from the teacher to what it
    gives back, the mean mass R of what is left, which is 1 without a sketch, and how many samples of the tail would be
    as noisy as RESIDUALS of what is left (`equal_tail_samples`).
    """
    bench = Bench(arguments)
    print(f"| setting | explained | KL | R | tail samples as noisy as {RESIDUALS} residual ones | bytes with these |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in arguments.settings or SKETCHES:
        setting = Setting.parse(name)
        sketch, kl, rows = bench.sketch(setting.rank), [], []
        for ids in bench.held_out[:16].split(4):
            logits = bench.teacher_logits(ids)
            kl.append(expectation_kl(bench, replace(setting, samples=0), ids, bench.teacher))
            rows.append(stored_rows(bench, setting, ids, logits, 0))
        explained, left, equal = of_sketch(sketch, rows)
        written = bytes_per_token(bench, replace(setting, samples=RESIDUALS))
        cells = f"{explained:.3f} | {statistics.mean(kl):.4f} | {left:.3f} | {equal:.0f} | {written:.1f}"
        print(f"| `{name}` | {cells} |", flush=True)


def of_sketch(sketch: Sketch, rows: list[Any]) -> tuple[float, float, float]:
    """Explained share, mean residual mass, and the tail samples that RESIDUALS residual ones equal; of rows with
    `tail_logmass` and `residual_mass`. A tail weighs as much as its mass, and so does its noise.
    """
    tail, left = (torch.cat([getattr(each, name) for each in rows]).cpu() for name in ("tail_logmass", "residual_mass"))
    equal = equal_tail_samples(RESIDUALS, squared_masses(tail.numpy(), left.numpy()))
    mean = (tail.exp() * left).sum() / tail.exp().sum()
    return sketch.explained[sketch.rank - 1].item(), mean.item(), math.inf if equal is None else equal


@torch.no_grad()
def spectrum(arguments: argparse.Namespace) -> None:
    """Sketches of teachers that are made up: Gaussian hidden states of which direction i has the standard deviation
    i ** -exponent, a head with random weights, and a bias as word frequencies have it, by Zipf's law. What decides is
    how steep the spectrum is and how sure the teacher; both can be set here, and large models' spectra are published.
    """
    vocabulary, hidden, positions, top_n = 16_000, 2048, 400, 4
    generator = torch.Generator().manual_seed(0)
    head = torch.randn((vocabulary, hidden), generator=generator)
    bias = -torch.arange(1, vocabulary + 1).float().log()
    print(f"| exponent | entropy | rank | explained | R | tail samples as noisy as {RESIDUALS} residual ones |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for exponent in EXPONENTS:
        for deviation in (2.5, 4.5):
            scales = torch.arange(1, hidden + 1).double() ** -exponent
            scales *= deviation / scales.norm()
            moments = HiddenMoments(hidden)
            moments.count, moments.second = 1, scales.square().diag()
            states = torch.randn((positions, hidden), generator=generator) * scales.float()
            logits = states @ head.T + bias
            log_p = logits.log_softmax(1)
            gold = log_p.exp().multinomial(1, generator=generator)[:, 0]
            entropy = -(log_p.exp() * log_p).sum(1).mean().item()
            for rank in (16, 32, 64, 128):
                sketch = calibrate(moments, head, bias, rank)
                sketched = sketch.logits(sketch.encode(states))
                found = row_statistics(logits.clone(), gold, StatisticsOptions(top_n), sketch_logits=sketched)
                explained, left, equal = of_sketch(sketch, [found])
                cells = f"{exponent} | {entropy:.2f} | {rank} | {explained:.3f} | {left:.3f} | {equal:.0f}"
                print(f"| {cells} |", flush=True)


# Over a training ------------------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> None:
    bench = Bench(arguments)
    results = arguments.work / "results.jsonl"
    describe_teacher(bench)
    for seed in arguments.seeds:
        for name in arguments.settings or SETTINGS:
            identity = {"setting": name, "seed": seed, **conditions(arguments)}
            if any(identity.items() <= done.items() for done in read_results(results)):
                continue
            started = time.monotonic()
            measured = train_one(bench, Setting.parse(name), seed)
            record = {**identity, **measured, "seconds": round(time.monotonic() - started, 1)}
            with results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(record, flush=True)
            measure_bytes(bench, name)


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("student_hidden", "student_layers", "start_steps", "steps", "batch", "learning_rate", "sharpen")
    return {name: getattr(arguments, name) for name in names}


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train_one(bench: Bench, setting: Setting, seed: int) -> dict[str, float]:
    """Held-out KL to the live teacher over the whole vocabulary, and cross-entropy, in nats per token."""
    arguments = bench.arguments
    model = bench.student(seed)
    student, loss = BodyAndHead(model), Loss(bench, setting)
    step_of = Optimizer(model, arguments.learning_rate, arguments.steps)
    for _, ids in zip(range(arguments.steps), batches(bench.transfer, arguments.batch, seed), strict=False):
        loss(student, ids, seed).backward()
        step_of()
    return evaluate(bench, student)


@torch.no_grad()
def evaluate(bench: Bench, student: BodyAndHead) -> dict[str, float]:
    kl = ce = agreed = 0.0
    for ids in bench.held_out.split(4):
        log_p = log_softmax(bench.teacher_logits(ids), 1)
        log_q = log_softmax(student.head(student.body(ids.to(DEVICE))[:, :-1].flatten(0, 1)).float(), 1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        ce -= log_q.gather(1, ids[:, 1:].flatten()[:, None].to(DEVICE)).sum().item()
        agreed += (log_p.argmax(1) == log_q.argmax(1)).sum().item()
    positions = bench.held_out[:, 1:].numel()
    return {"kl": kl / positions, "ce": ce / positions, "agreement": agreed / positions}


def measure_bytes(bench: Bench, name: str) -> None:
    path = bench.work / "bytes.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
        path.write_text(json.dumps({**known, name: bytes_per_token(bench, Setting.parse(name))}))


def bytes_per_token(bench: Bench, setting: Setting) -> float:
    """Of a shard of 96 sequences, written as `cache-teacher` writes it. Only ids are stored of `rskd`."""
    from stages.corpus import Sequence
    from stages.scored_rows import rows_from_scored
    from stages.teacher import ScoredSequence
    from storage.manifest import ScoringOptions, SketchIdentity
    from storage.shard import split_leaves, write_table

    if setting.mode == "online":
        return 0.0
    scored, identity = [], None
    if setting.mode == "sketch":
        identity = SketchIdentity(rank=setting.rank, residual_samples=setting.samples, positions=CALIBRATION * 255)
    for index, row in enumerate(bench.transfer[:96]):
        logits, codes, sketched = bench.teacher_logits(row[None]), None, None
        if setting.mode == "sketch":
            codes, sketched = bench.sketched(setting.rank, row[None])
        found = statistics_of(setting, row[None], logits, 0, sketched)
        if setting.mode == "rskd":
            found.tail_samples = logits.softmax(1).multinomial(setting.samples, replacement=True).sort(1).values
        arrays = {name: value.cpu().numpy() for name, value in found.__dict__.items()}
        sequence = Sequence(index, row.numpy().astype(np.int32), np.ones(255, bool))
        scored.append(ScoredSequence(sequence, **arrays, sketch_codes=None if codes is None else codes.cpu().numpy()))
    options = ScoringOptions(
        engine="x",
        dtype="float32",
        top_n=setting.top_n,
        tail_samples=0 if setting.mode == "sketch" else setting.samples,
        sketch=identity,
        max_length=256,
    )
    columns = options.columns
    if setting.mode == "rskd":
        columns = tuple(c for c in columns if c.name in ("sequence_id", "input_ids", "loss_mask", "tail_samples"))
    table = rows_from_scored(scored, options).to_table(columns, {})
    with tempfile.TemporaryDirectory() as folder:
        written = write_table(Path(folder) / "shard.parquet", table, split_leaves(columns))
    return written.bytes / (96 * 256)


def show(arguments: argparse.Namespace) -> None:
    """Gaps in nats, paired: each student's held-out KL less that of the online student of its seed, whose KL itself
    stands in the first row.
    """
    wanted = conditions(arguments)
    results = [r for r in read_results(arguments.work / "results.jsonl") if wanted.items() <= r.items()]
    of = {(record["setting"], record["seed"]): record for record in results}
    online = {seed: record["kl"] for (name, seed), record in of.items() if name == "online"}
    seeds = sorted(online)
    stored = json.loads((arguments.work / "bytes.json").read_text())
    gaps = {
        name: {seed: of[name, seed]["kl"] - online[seed] for seed in seeds if (name, seed) in of}
        for name in dict.fromkeys(record["setting"] for record in results)
    }
    heads = [f"seed {seed}" for seed in seeds]
    print(f"| setting | bytes per token | {' | '.join(heads)} | mean gap | cross-entropy |")
    print(f"| --- | {' | '.join(['---:'] * (len(seeds) + 3))} |")
    for name in sorted((n for n in gaps if gaps[n]), key=lambda name: statistics.mean(gaps[name].values())):
        shown, mean = gaps[name], f"**{statistics.mean(gaps[name].values()):.4f}**"
        if name == "online":
            shown, mean = online, ""
        cells = [f"{shown[seed]:.4f}" if seed in shown else "" for seed in seeds]
        ce = statistics.mean(of[name, seed]["ce"] for seed in shown)
        print(f"| `{name}` | {stored.get(name, math.nan):.1f} | {' | '.join(cells)} | {mean} | {ce:.4f} |")


if __name__ == "__main__":
    sys.exit(main())
