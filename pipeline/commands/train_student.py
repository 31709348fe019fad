"""`pipeline train-student`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.config_file import config_option, key_value_option
from pipeline.numbers import format_share
from pipeline.option_types import SEED, FloatRange, ShareOrWord
from pipeline.progress import summary
from pipeline.signals import saying
from pipeline.streams import say
from storage.words import counted

if TYPE_CHECKING:
    from stages.student import Part, Prepared

# Options that are fields of transformers.TrainingArguments under a name that is shorter to type.
_SHORT = {
    "learning_rate": "learning_rate",
    "epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "accumulate": "gradient_accumulation_steps",
    "schedule": "lr_scheduler_type",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "bf16": "bf16",
    "eval_steps": "eval_steps",
    "save_steps": "save_steps",
    "report_to": "report_to",
}
_OBJECTIVE = (
    "hard_ratio",
    "easy_weight",
    "ce_weight",
    "rank_scope",
    "normalize",
    "tail",
    "tail_gamma",
    "direction",
    "beta",
    "train_on",
    "temperature",
    "temperature_squared",
)


@click.command("train-student")
@click.option(
    "--student",
    required=True,
    metavar="NAME_OR_DIR",
    help="The student: a directory or a hub name; with --init-from-config also a config.json.",
)
@click.option(
    "--shards",
    required=True,
    multiple=True,
    metavar="DIR_OR_URL",
    type=click.Path(),
    help="The cache: the --output of `pipeline cache-teacher`, or where it was pushed. Repeat it for several caches of "
    "one teacher.",
)
@click.option(
    "--mix",
    metavar="W,W,...",
    show_default="by size",
    help="Weight of each --shards, in their order: its share of the sequences drawn. An epoch is as many sequences as "
    "all caches hold; a cache with fewer than its share is gone through again, one with more goes on in the next.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    type=click.Path(),
    help="Where checkpoints, the student and metrics.json go.",
)
@click.option(
    "--init-from-config",
    is_flag=True,
    help="Start from random weights of the student's configuration; the tokenizer is the cache's.",
)
@click.option(
    "--objective",
    default="atkd",
    type=click.Choice(["atkd", "kl", "tkd", "dkd", "tkd+dkd", "jsd", "tvd", "ce"]),
    help="What to minimise; ce ignores the teacher.",
)
@click.option(
    "--hard-ratio",
    default=0.5,
    type=ShareOrWord("median"),
    help="atkd: share of the tokens, by the teacher's uncertainty, that is hard; median is the split of the paper's "
    "released code, which has one hard token more where their number is even.",
)
@click.option(
    "--easy-weight",
    default=0.2,
    type=FloatRange(0, 1),
    help="atkd: lambda, the weight of the easy tokens' DKD; hard ones get the rest.",
)
@click.option(
    "--ce-weight",
    default=0.0,
    type=FloatRange(0),
    help="Weight of cross-entropy on gold, added to any objective.",
)
@click.option(
    "--rank-scope",
    default="micro-batch",
    type=click.Choice(["micro-batch", "global-batch", "sequence", "corpus"]),
    help="Among which tokens the uncertainty is ranked; micro-batch is the paper's code, global-batch is the whole "
    "optimiser step, over --accumulate and devices.",
)
@click.option(
    "--normalize",
    default="group",
    type=click.Choice(["group", "token"]),
    help="group: mean over each group's tokens of a micro-batch (the paper's code), or of the step with --rank-scope "
    "global-batch; token: sum over all tokens, divided by the tokens of the step.",
)
@click.option(
    "--direction",
    default="forward",
    type=click.Choice(["forward", "reverse"]),
    help="reverse swaps teacher and student in the divergences; the ranks stay the teacher's.",
)
@click.option(
    "--beta",
    default=0.5,
    type=FloatRange(0, 1, min_open=True, max_open=True),
    help="jsd: the teacher's share of the mixture.",
)
@click.option(
    "--train-on",
    default="all",
    type=click.Choice(["all", "easy", "hard"]),
    help="Only these tokens have a loss, split by --hard-ratio.",
)
@click.option(
    "--temperature",
    default=1.0,
    type=FloatRange(0, min_open=True),
    help="Of teacher and student in the divergences; one that the cache holds.",
)
@click.option(
    "--temperature-squared/--no-temperature-squared",
    default=True,
    help="Multiply the divergences by the temperature's square, so that gradients keep their size.",
)
@click.option(
    "--tail",
    default="auto",
    type=click.Choice(["auto", "bucket", "drop", "prior", "sampled", "sketch"]),
    help="What stands for the teacher outside the kept tokens: one lump; nothing; the cache's mean tail distribution; "
    "the tokens drawn from it (cache-teacher --tail-samples); or what the codes of each position give back, corrected "
    "by residual samples (cache-teacher --sketch-rank). auto: sketch or sampled where the cache holds it and the "
    "objective can use it, else prior, or bucket for reverse, jsd and tvd.",
)
@click.option(
    "--tail-gamma",
    default=0.5,
    type=FloatRange(0, 1),
    help="prior: how much the mean tail distribution weighs against the student's own, as an exponent.",
)
@click.option(
    "--eval-share",
    default=0.05,
    type=FloatRange(0, 1, max_open=True),
    help="Share of the sequences held out and evaluated on.",
)
@click.option("--learning-rate", type=FloatRange(0), show_default="5e-5", help="Peak learning rate.")
@click.option("--epochs", type=FloatRange(), show_default="3", help="Passes over the training share.")
@click.option("--max-steps", type=int, show_default="by epochs", help="Optimiser steps; beats --epochs.")
@click.option(
    "--batching",
    default="padded",
    type=click.Choice(["padded", "length-grouped", "packed"]),
    help="How sequences make a micro-batch: padded to the longest; the same among sequences of similar length; or "
    "one after another up to --batch-tokens, without attending across them.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), show_default="8", help="Sequences of one micro-batch on one device."
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(2),
    show_default="4096, or the longest sequence",
    help="packed: token ids of one micro-batch on one device, at most; takes the place of --batch-size.",
)
@click.option(
    "--eval-batch-size",
    type=click.IntRange(1),
    show_default="8",
    help="Sequences of one evaluation batch on one device.",
)
@click.option("--accumulate", type=click.IntRange(1), show_default="1", help="Micro-batches of one optimiser step.")
@click.option(
    "--schedule",
    metavar="NAME",
    show_default="linear",
    help="Learning-rate schedule: linear, cosine, constant_with_warmup, ...",
)
@click.option(
    "--warmup-steps", type=FloatRange(), show_default="0", help="Steps of warm-up, or below 1 a share of all."
)
@click.option("--weight-decay", type=FloatRange(), show_default="0", help="AdamW's weight decay.")
@click.option("--bf16/--no-bf16", default=None, show_default="no", help="Mixed precision in bfloat16.")
@click.option(
    "--dtype", default="float32", type=click.Choice(["float32", "bfloat16"]), help="Precision of the student's weights."
)
@click.option(
    "--lora-rank",
    type=click.IntRange(1, 65536),
    show_default="off",
    help="Train LoRA adapters of this rank instead of all weights, and save only them (needs peft).",
)
@click.option("--lora-alpha", type=FloatRange(0, min_open=True), show_default="2 x rank", help="LoRA's scale.")
@click.option(
    "--lora-target",
    metavar="NAME,NAME,...",
    default="all-linear",
    help="Modules that get an adapter, by name; all-linear is every linear layer but the head.",
)
@click.option("--eval-steps", type=click.IntRange(1), show_default="every epoch", help="Steps between evaluations.")
@click.option("--save-steps", type=click.IntRange(1), show_default="500", help="Steps between checkpoints.")
@click.option("--report-to", metavar="NAME", show_default="none", help="Where to log as well: tensorboard, wandb, ...")
@click.option("--seed", default=42, type=SEED, help="Seed of initial weights, shuffle and dropout.")
@click.option("--revision", metavar="REV", show_default="main", help="Branch, tag or commit of a hub student.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the student.")
@click.option(
    "--checksums",
    default="start",
    type=click.Choice(["start", "read", "off"]),
    help="When the sha256 of each local file is compared: of all before the training begins, of each shard when it is "
    "first read, or never; off leaves out the CRC of every page too. Remote shards are always compared when they are "
    "fetched, and values are always checked.",
)
@key_value_option("--trainer", help="Any other field of transformers.TrainingArguments, e.g. optim=adafactor.")
@config_option()
def command(**given: Any) -> None:
    """Train a student from a cache; the teacher is never loaded.

    A held-out share of the cache is evaluated during and after the training: cross-entropy, KL to the teacher and
    top-1 agreement with it, also apart for the tokens the teacher finds easy and hard. Start the same command again
    after a kill: it goes on from the last checkpoint.

    \b
    Example:
      pipeline train-student --student ./student --shards cache/ --output distilled/
      pipeline train-student --student Qwen/Qwen3-0.6B --shards cache/ --output distilled/ \\
          --objective atkd --epochs 2 --batch-size 4 --accumulate 8 --bf16 --trainer optim=adamw_torch_fused
      pipeline train-student --student ./student --shards ground-truth/ --shards on-policy/ --mix 0.5,0.5 \\
          --output distilled/ --batching packed --batch-tokens 8192
    """
    from stages.objective import Objective
    from stages.student import StudentOptions, prepare, train

    given["mix"] = _weights(given["mix"])
    given["lora_target"] = tuple(name.strip() for name in given["lora_target"].split(","))
    trainer = dict(given.pop("trainer"))
    for name, field in _SHORT.items():
        value = given.pop(name)
        if value is None:
            continue
        if field in trainer:
            raise click.UsageError(f"--{name.replace('_', '-')} and --trainer {field} say the same; give one of them")
        trainer[field] = value
    objective = Objective(name=given.pop("objective"), **{name: given.pop(name) for name in _OBJECTIVE})
    prepared = prepare(StudentOptions(objective=objective, trainer=trainer, **given))
    for part in prepared.parts:
        if part.cache.is_partial:
            say(_part_sentence(part), err=True)
    for note in prepared.notes:
        say(note, err=True)
    if prepared.finished is not None:
        say(f"{prepared.options.output}: this run is finished already", err=True)
        report = prepared.finished
    else:
        if prepared.checkpoint:
            say(f"going on from {prepared.checkpoint}", err=True)
        from pipeline.training_progress import TrainingProgress

        with saying(lambda: _kept(prepared)):
            report = train(prepared, [TrainingProgress(prepared.train_tokens)], lambda note: say(note, err=True))
    # Of several processes that train together, one says how it went.
    if os.environ.get("RANK", "0") == "0":
        summary("student", _rows(prepared.options.output, report))


def _kept(prepared: Prepared) -> str:
    """Return what of an interrupted run is kept."""
    from stages.run_identity import last_whole_checkpoint

    checkpoint = last_whole_checkpoint(Path(prepared.options.output))
    if checkpoint is None:
        return "no checkpoint was written, so nothing is kept"
    return f"{Path(checkpoint).name} is kept; start the same command again to go on from it"


def _part_sentence(part: Part) -> str:
    """What of a cache that was pulled with --shards is here."""
    from stages.shard_dataset import sequences_here

    cache = part.cache
    here, count = int(sequences_here(cache).sum()), cache.manifest.corpus.sequences
    return (
        f"{cache.path}: a part, {len(cache.shards_here)} of {counted(len(cache.manifest.shards), 'shard')} "
        f"with {here:,} of {counted(count, 'sequence', ',')} ({format_share(here / count)}), {len(part.eval_ids):,} of "
        "them held out; which are held out, and the mean tail distribution, are those of the whole cache"
    )


def _weights(text: str | None) -> tuple[float, ...]:
    try:
        weights = tuple(float(weight) for weight in text.split(",")) if text else ()
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError
        return weights
    except ValueError:
        raise click.UsageError(f"--mix {text}: not numbers with commas between them, such as 0.5,0.5") from None


def _rows(output: str, report: dict[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("where", output),
        ("objective", report["objective"]["name"]),
        ("tail", report["objective"]["tail"]),
        ("steps", report["steps"]),
        ("tokens/s", f"{report['train_tokens_per_second']:,.0f}"),
    ]
    for measure, label, shown in [
        ("cross_entropy", "held-out cross-entropy (nats)", "{:.4f}".format),
        ("kl", "held-out KL to the teacher (nats)", "{:.4f}".format),
        ("agreement", "held-out top-1 agreement", format_share),
    ]:
        name = f"eval_{measure}"
        if name in report:
            parts = "".join(
                f", {group} {shown(report[f'{name}_{group}'])}"
                for group in ("easy", "hard")
                if f"{name}_{group}" in report
            )
            rows.append((label, f"{shown(report[name])}{parts}"))
    if "eval_teacher_cross_entropy" in report:
        rows.append(("the teacher's own cross-entropy", f"{report['eval_teacher_cross_entropy']:.4f}"))
    return rows
