"""`pipeline generate`."""

from __future__ import annotations

from typing import Any

import click

from pipeline.config_file import config_option, key_value_option
from pipeline.progress import Progress, summary


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
    "--output",
    required=True,
    metavar="FILE.jsonl",
    type=click.Path(),
    help="The rows with their completions; input for cache-teacher.",
)
@click.option("--max-new-tokens", default=512, type=click.IntRange(1), help="Longest completion, in tokens.")
@click.option(
    "--max-length",
    type=click.IntRange(2),
    show_default="the model's context",
    help="Longest prompt and completion together, in tokens.",
)
@click.option(
    "--temperature", default=1.0, type=click.FloatRange(0), help="Of sampling; 0 takes the most probable token."
)
@click.option(
    "--top-p",
    default=1.0,
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample from the most probable tokens of this mass only.",
)
@click.option("--samples", default=1, type=click.IntRange(1), help="Completions per prompt.")
@click.option("--seed", default=0, type=click.IntRange(0), help="Seed of the sampling.")
@click.option(
    "--token-ids",
    is_flag=True,
    help="Write input_ids and loss_mask instead of text: exactly the tokens that were drawn.",
)
@click.option("--prompt-column", metavar="NAME", show_default="prompt", help="Column of prompts.")
@click.option("--messages-column", metavar="NAME", show_default="messages", help="Column of chat messages.")
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
    from stages.generation import GenerateOptions, prepare, run

    prepared = prepare(GenerateOptions(**given))
    left = len(prepared.prompts) - prepared.done
    click.echo(f"{prepared.done} of {len(prepared.prompts)} completions are there already, {left} to write", err=True)
    new = 0

    def advance(tokens: int) -> None:
        nonlocal new
        new += tokens
        progress.advance(tokens)

    with Progress("generating", None) as progress:
        completions = run(prepared, advance)
    summary("completions", [("where", given["output"]), ("completions", completions), ("tokens written now", new)])
