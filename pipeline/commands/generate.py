"""`pipeline generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pipeline.config_file import config_option, key_value_option
from pipeline.option_types import SEED, FloatRange
from pipeline.progress import Progress, summary
from pipeline.shared_options import chat_options, chat_settings
from pipeline.signals import saying
from pipeline.streams import say
from storage.words import part_of

if TYPE_CHECKING:
    from stages.generation import PreparedGeneration


@click.command("generate")
@click.option(
    "--model", required=True, metavar="NAME_OR_DIR", help="Who writes: a teacher, or a student for on-policy data."
)
@click.option(
    "--prompts",
    required=True,
    metavar="SOURCE",
    help="Rows with a `prompt`, or with chat `messages` that end before the answer; files as for cache-teacher.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE.jsonl",
    type=click.Path(),
    help="The rows with their completions; input for cache-teacher.",
)
@click.option(
    "--max-new-tokens",
    default=512,
    type=click.IntRange(1),
    help="Longest completion, in tokens. One that is cut there gets no end token when it is cached.",
)
@click.option(
    "--max-length",
    type=click.IntRange(2),
    show_default="the model's context",
    help="Longest prompt and completion together, in tokens.",
)
@click.option("--temperature", default=1.0, type=FloatRange(0), help="Of sampling; 0 takes the most probable token.")
@click.option(
    "--top-p",
    default=1.0,
    type=FloatRange(0, 1, min_open=True),
    help="Sample from the most probable tokens of this mass only.",
)
@click.option("--samples", default=1, type=click.IntRange(1), help="Completions per prompt.")
@click.option("--seed", default=0, type=SEED, help="Seed of the sampling.")
@click.option(
    "--token-ids",
    is_flag=True,
    help="Write input_ids and loss_mask instead of text: exactly the tokens that were drawn, and the end token only "
    "where it was drawn.",
)
@click.option("--prompt-column", metavar="NAME", show_default="prompt", help="Column of prompts.")
@click.option("--messages-column", metavar="NAME", show_default="messages", help="Column of chat messages.")
@chat_options
@click.option("--split", metavar="NAME", show_default="train", help="Split of a hub dataset or of a folder.")
@click.option("--limit", type=click.IntRange(1), show_default="all", help="Use only the first rows, this many.")
@click.option(
    "--dtype",
    default="auto",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Precision of the model. auto: the checkpoint's own.",
)
@click.option("--revision", metavar="REV", show_default="main", help="Branch, tag or commit of a hub model.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@key_value_option("--vllm-arg", "vllm_args", help="Engine argument of vLLM, e.g. tensor_parallel_size=8.")
@config_option()
def command(**given: Any) -> None:
    """Let a model write completions for a file of prompts, in vLLM.

    Kill it at any moment and start the same command again: it goes on, and writes what an undisturbed run would have.

    \b
    Example:
      pipeline generate --model ./student --prompts prompts.jsonl --output on-policy.jsonl --token-ids
      pipeline cache-teacher --teacher ./teacher --dataset on-policy.jsonl --output on-policy-cache/
    """
    from stages.generation import GenerateOptions, own_sampling, prepare, run, start

    options = GenerateOptions(chat=chat_settings(given), **given)
    prepared = prepare(options)
    left = len(prepared.prompts) - prepared.done
    there = part_of(prepared.done, len(prepared.prompts), "completion")
    say(f"{there} there already, {left} to write", err=True)
    say(_sampling_sentence(options.temperature, options.top_p, options.seed, own_sampling(options)), err=True)
    new = 0

    def advance(tokens: int) -> None:
        nonlocal new
        new += tokens
        progress.advance(tokens)

    try:
        with saying(lambda: _kept(prepared)):
            start(prepared)
            with Progress("generating", None) as progress:
                made = run(prepared, advance)
    finally:
        prepared.close()
    rows = [("where", options.output), ("completions", made.completions), ("cut at --max-new-tokens", made.cut)]
    summary("completions", [*rows, ("tokens written now", new)])
    if made.cut:
        say(
            f"{part_of(made.cut, made.completions, 'completion')} cut "
            f"(finish_reason: length): cache-teacher trains no end there; a higher --max-new-tokens lets them end",
            err=True,
        )


def _sampling_sentence(temperature: float, top_p: float, seed: int, own: dict[str, Any]) -> str:
    how = f"temperature {temperature:g}, top-p {top_p:g}, seed {seed}" if temperature else "the most probable token"
    said = ", ".join(f"{name} {value}" for name, value in own.items())
    aside = f"; the model's generation_config says {said}, which is left aside" if said else ""
    return f"sampling: {how}{aside}"


def _kept(prepared: PreparedGeneration) -> str:
    """Return what of an interrupted run is kept."""
    from stages.generation import completions_there

    done = completions_there(prepared)
    if not done:
        return "no completion was written, so nothing is kept"
    return f"{part_of(done, len(prepared.prompts), 'completion')} kept; start the same command again to go on"
