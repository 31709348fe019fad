"""The whole idea on real text, in a few minutes on two CPU cores: `make demo`, or `python -m examples.demo`.

    text every Python ships -> tokenizer and teacher -> cache -> a start -> three students -> a table

A first small model learns from the teacher's own text: the start, as a small model from a hub would be. The three
students go on from its weights, see the same tokens in the same order and differ in the objective alone. Each finished
step is kept in the output directory, so a second run goes on where the first one stopped. `--seeds 3` repeats start and
students with other seeds, and shows means and spreads.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from examples.demo.corpus import CorpusError, build_corpus, read_texts
from pipeline.threads import bound_spinning

OBJECTIVES = ("ce", "kl", "atkd")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where everything goes")
    parser.add_argument("--teacher-steps", type=int, default=900, help="training steps of the teacher")
    parser.add_argument("--start-steps", type=int, default=800, help="training steps of the start")
    parser.add_argument("--student-epochs", type=float, default=3, help="passes over the cache by each student")
    parser.add_argument("--seeds", type=int, default=1, help="how often start and students are trained, each anew")
    parser.add_argument("--top-n", type=int, default=4, help="tokens kept per position")
    parser.add_argument("--limit-characters", type=int, help="size of the corpus (default: all there is)")
    arguments = parser.parse_args()

    bound_spinning()
    output: Path = arguments.output
    try:
        make_teacher(output, arguments.teacher_steps, arguments.limit_characters)
    except CorpusError as error:
        raise SystemExit(f"error: {error}") from None
    announce("3/4", "run the teacher once over text it has not trained on, and keep what it believed")
    pipeline(
        *("cache-teacher", "--teacher", output / "teacher", "--dataset", output / "corpus" / "transfer.jsonl"),
        *("--output", output / "cache", "--top-n", arguments.top_n, "--overlong", "split", "--engine", "transformers"),
        *("--shard-tokens", 65536, "--batch-tokens", 4096),
    )
    announce("4/4", "train three students from one start and the shards, without the teacher")
    for seed in range(arguments.seeds):
        folder = output / "students" / f"seed-{seed}"
        make_start(output, folder / "start", arguments.start_steps, seed)
        for objective in OBJECTIVES:
            train_student(output, folder, objective, arguments.student_epochs, seed)
    show_table(output, arguments.seeds)
    return 0


def make_start(output: Path, start: Path, steps: int, seed: int) -> None:
    """A small model that has read what the teacher has, unless it is there."""
    from transformers import AutoTokenizer, LlamaConfig

    from examples.demo.teacher import train_teacher

    if (start / "config.json").exists():
        return
    config = LlamaConfig.from_pretrained(output / "student-config")
    tokenizer = AutoTokenizer.from_pretrained(output / "teacher")
    train_teacher(output / "corpus" / "teacher.jsonl", tokenizer, start, steps=steps, seed=seed, config=config)


def train_student(output: Path, folder: Path, objective: str, epochs: float, seed: int) -> None:
    """Train one student from the start, unless it is there."""
    if (folder / objective / "metrics.json").exists():
        return
    pipeline(
        *("train-student", "--student", folder / "start", "--shards", output / "cache"),
        *("--output", folder / objective, "--objective", objective, "--epochs", epochs, "--batch-size", 4),
        *("--learning-rate", 2e-3, "--schedule", "cosine", "--warmup-steps", 0.05, "--eval-share", 0.1),
        *("--seed", seed, "--trainer", "adam_beta2=0.98", "--trainer", "logging_steps=50"),
        *("--trainer", "save_strategy=no", "--trainer", "eval_on_start=true"),
    )


def make_teacher(output: Path, steps: int, limit_characters: int | None) -> None:
    """The corpus, the tokenizer, the teacher, and the configuration of the students."""
    from examples.demo.teacher import student_config, train_teacher, train_tokenizer

    if (output / "student-config" / "config.json").exists():
        announce("1-2/4", f"{output} holds a corpus and a teacher already")
        return
    announce("1/4", "build a corpus from Python's own documentation and library, and a tokenizer")
    corpus = build_corpus(output / "corpus", limit_characters=limit_characters)
    for name, size in corpus.characters.items():
        print(f"{name}: {size:,} characters")
    tokenizer = train_tokenizer(read_texts(corpus.teacher), output / "teacher")
    announce("2/4", "train a small teacher (the one step that real users skip: theirs is on a hub)")
    train_teacher(corpus.teacher, tokenizer, output / "teacher", steps=steps, heldout_path=corpus.heldout)
    # Last, because it says that all of the above is done.
    student_config(tokenizer).save_pretrained(output / "student-config")


def announce(step: str, what: str) -> None:
    print(f"\n== {step}  {what}", flush=True)


def pipeline(*arguments: object) -> None:
    """Run one command as a person would, and show what was typed."""
    words = [str(argument) for argument in arguments]
    print(f"$ pipeline {shlex.join(words)}", flush=True)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", "pipeline.cli", *words], env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def show_table(output: Path, seeds: int) -> None:
    """What distillation bought, from each student's metrics.json and the receipts of the cache."""
    from pipeline.progress import table
    from storage.cache import Cache

    cache = Cache.open(output / "cache")
    receipts = cache.receipts()
    per_token = f"{sum(receipt.bytes for receipt in receipts) / cache.manifest.corpus.tokens:.0f}"
    folders = [output / "students" / f"seed-{seed}" for seed in range(seeds)]
    reports = {
        name: [json.loads((folder / name / "metrics.json").read_text()) for folder in folders] for name in OBJECTIVES
    }
    # Evaluated before the first step, the same for all.
    starts = [next(entry for entry in report["log"] if "eval_kl" in entry) for report in reports["ce"]]
    measured = {"the start": starts, **reports}

    def shown(name: str, measure: str, form: Callable[[float], str]) -> str:
        values = [report[measure] for report in measured[name] if measure in report]
        if not values:
            return ""
        spread = f" ± {form(statistics.stdev(values))}" if len(values) > 1 else ""
        return f"{form(statistics.mean(values))}{spread}"

    rows = [
        (
            f"{name} (no teacher)" if name == "ce" else name,
            shown(name, "eval_cross_entropy", "{:.3f}".format),
            shown(name, "eval_kl", "{:.3f}".format),
            shown(name, "eval_agreement", "{:.1%}".format),
            shown(name, "train_tokens_per_second", "{:,.0f}".format),
            per_token if name in ("kl", "atkd") else "0",
        )
        for name in measured
    ]
    teacher = reports["ce"][0]["eval_teacher_cross_entropy"]
    seconds = sum(receipt.seconds for receipt in receipts)
    speed = cache.manifest.corpus.tokens / max(seconds, 1e-9)
    rows.append(("(the teacher)", f"{teacher:.3f}", "0", "100%", f"{speed:,.0f} scored", per_token))
    print()
    spread = f"; mean and standard deviation of {seeds} seeds" if seeds > 1 else ""
    table(
        f"students of one teacher, from one start, same tokens; held-out text{spread}",
        ["objective", "cross-entropy", "KL to teacher", "agreement", "tokens/s", "bytes per token"],
        rows,
    )
    print(f"\nLook closer: pipeline inspect {output / 'cache'}")


if __name__ == "__main__":
    sys.exit(main())
