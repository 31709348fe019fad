"""`pipeline cache-teacher`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from pipeline.config_file import config_option, key_value_option
from pipeline.option_types import SEED, FloatRange, Text
from pipeline.progress import Progress, printable
from pipeline.reports import show_cache
from pipeline.shared_options import chat_options, chat_settings, engine_options
from pipeline.signals import saying
from pipeline.streams import say
from storage.words import counted, listed_briefly, part_of

if TYPE_CHECKING:
    from stages.cache_options import CacheOptions
    from stages.caching import PreparedCache
    from stages.corpus import CorpusReport
    from stages.summary import Summary
    from storage.cache import Cache

# Mirrors of stages.caching, which would import too much for `--help`; a test holds them equal.
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_TURNS = ("all", "last", "each")


@click.command("cache-teacher")
@click.option(
    "--teacher", required=True, metavar="NAME_OR_DIR", help="The teacher: a directory, a GGUF file or a hub name."
)
@click.option(
    "--dataset",
    required=True,
    metavar="SOURCE",
    help="A .jsonl, .ndjson, .json, .csv, .tsv, .txt (also .gz, .zst) or .parquet file, a folder of those, or a "
    "dataset on the hub (name or name:config). Rows are text, prompt + completion, chat messages, or input_ids.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR_OR_URL",
    type=click.Path(),
    help="The cache to make or to go on with; a URL is like s3://bucket/folder.",
)
@click.option(
    "--top-n",
    default=None,
    type=click.IntRange(1, 65535),
    show_default="4; 64 without samples, with --temperature or --tail-epsilon",
    help="Tokens kept per position, most probable first. Samples stand for the rest; keep more, say 64, for students "
    "that cannot use samples: reverse, jsd, tvd, and temperatures other than 1.",
)
@click.option(
    "--tail-epsilon",
    default=0.0,
    type=FloatRange(0, 1, max_open=True),
    show_default="off: every position keeps --top-n",
    help="Keep, at each position, only as many of the --top-n most probable tokens as leave less than this mass in the "
    "tail.",
)
@click.option("--min-n", default=1, type=click.IntRange(1, 65535), help="With --tail-epsilon, keep at least this many.")
@click.option(
    "--temperature",
    "temperatures",
    multiple=True,
    type=FloatRange(0, min_open=True),
    show_default="only 1",
    help="Keep the tail's mass at this temperature too, so that students can train at it; may be repeated.",
)
@click.option(
    "--tail-samples",
    default=None,
    type=click.IntRange(0, 65535),
    show_default="28; 0 with a sketch, a server or --vllm-route prompt-logprobs",
    help="Ids drawn from the tail at each position, in proportion to their probability.",
)
@click.option(
    "--sketch-rank",
    default=None,
    type=click.IntRange(1, 4096),
    show_default="no sketch",
    help="Keep a code of this many bytes per position, e.g. 32, that says what the teacher's whole tail looks like, as "
    "the best approximation of its logits of this rank; at most the hidden size. Engines transformers and vllm.",
)
@click.option(
    "--residual-samples",
    default=None,
    type=click.IntRange(0),
    show_default="8 with --sketch-rank",
    help="Ids drawn at each position from what the sketch misses, half where it has too little and half where it has "
    "too much, which make it unbiased. 0, or 2 and more.",
)
@click.option(
    "--sketch-positions",
    default=None,
    type=click.IntRange(1),
    show_default="32768",
    help="Positions with a loss, from the start of the corpus, on which the sketch is calibrated.",
)
@click.option(
    "--sketch-from",
    metavar="DIR_OR_URL",
    type=click.Path(),
    show_default="none",
    help="Take the sketch of another cache of this teacher, so that the two can be merged with it.",
)
@click.option(
    "--engine",
    default="auto",
    type=click.Choice(["auto", "transformers", "vllm", "server"]),
    help="What runs the teacher. auto: vLLM where it is installed and serves the teacher, else transformers.",
)
@key_value_option(
    "--vllm-arg", "vllm_args", help="Engine argument of vLLM, e.g. tensor_parallel_size=8, quantization=fp8."
)
@click.option(
    "--vllm-route",
    default="pooling",
    type=click.Choice(["pooling", "prompt-logprobs"]),
    help="pooling: all statistics, inside vLLM; prompt-logprobs: vLLM's stock API, gold and top-N only.",
)
@click.option(
    "--server-url",
    metavar="URL",
    show_default="none",
    help="A running vLLM server, e.g. http://gpu7:8000, that scores instead of this machine; PIPELINE_SERVER_KEY holds "
    "its key, if it wants one.",
)
@click.option("--server-model", metavar="NAME", show_default="the only one", help="Name of the teacher on that server.")
@click.option("--server-concurrency", default=32, type=click.IntRange(1), help="Requests to the server at a time.")
@click.option(
    "--dtype",
    default="auto",
    type=click.Choice(_DTYPES),
    help="Precision of the teacher. auto: float32 on a CPU, else the checkpoint's own.",
)
@click.option(
    "--max-length",
    type=click.IntRange(2),
    show_default="2048, or the teacher's context if shorter",
    help="Longest sequence, in tokens.",
)
@click.option(
    "--overlong",
    default="cut",
    type=click.Choice(["cut", "split"]),
    help="What becomes of longer rows: only their start is kept, or they become several sequences.",
)
@click.option(
    "--split",
    metavar="NAME",
    show_default="train",
    help="Split of a hub dataset, or of a folder whose files or folders are named after splits.",
)
@click.option(
    "--limit", type=click.IntRange(1), show_default="all", help="Use only the first rows of the dataset, this many."
)
@click.option("--text-column", metavar="NAME", show_default="text", help="Column of plain text.")
@click.option("--prompt-column", metavar="NAME", show_default="prompt", help="Column of prompts (no loss on them).")
@click.option("--completion-column", metavar="NAME", show_default="completion", help="Column of completions.")
@click.option(
    "--messages-column",
    metavar="NAME",
    show_default="messages",
    help="Column of chat messages (loss on the assistant's tokens).",
)
@click.option(
    "--tools-column",
    metavar="NAME",
    show_default="tools",
    help="Column of the functions that a chat's assistant may call, as JSON schemas.",
)
@click.option(
    "--turns",
    default="all",
    type=click.Choice(_TURNS),
    help="Assistant turns of a chat that have a loss: all in one sequence, the last alone, or each at the end of a "
    "sequence of its own, which templates need that strip earlier thinking.",
)
@chat_options
@click.option(
    "--append-eos/--no-append-eos", default=True, help="End texts and completions with the end-of-sequence token."
)
@click.option(
    "--logprob-bits",
    default="16",
    type=click.Choice(["8", "16", "32"]),
    help="Bits of a stored top-N log-probability; gold and tail always have 32. 8: "
    "within 0.013 nats at -0.25, 0.025 at -1, 0.05 at -4.",
)
@click.option(
    "--shard-tokens",
    default=None,
    type=click.IntRange(2),
    show_default="a 64th of the corpus, at least 16384 and at most 262144",
    help="Tokens per shard: what a kill can cost at most.",
)
@click.option(
    "--batch-tokens",
    default=8192,
    type=click.IntRange(2),
    help="transformers: tokens of one forward pass; lower it if memory runs out.",
)
@click.option("--seed", default=0, type=SEED, help="Seed of whatever is drawn at random.")
@click.option("--revision", metavar="REV", show_default="main", help="Branch, tag or commit of a hub teacher.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the teacher.")
@click.option(
    "--license",
    type=Text(),
    metavar="ID",
    show_default="not stated",
    help="Licence of the cache for its dataset card, as hubs name them, e.g. cc-by-4.0. The corpus and the teacher "
    "have theirs.",
)
@click.option(
    "--citation",
    type=Text(),
    metavar="TEXT",
    show_default="none",
    help="How to cite the source of the corpus, for the dataset card.",
)
@click.option("--processes", type=click.IntRange(1), show_default="all cores", help="Processes that tokenise.")
@config_option()
def command(**given: Any) -> None:
    """Run the teacher once over a corpus and keep what it believed about every token.

    For each position: the log-probabilities of the top-N tokens and of the token that really came next, the mass of
    all others, and the entropy, in compressed Parquet shards that any tool opens. Kill it at any moment and start the
    same command again: it goes on where it stopped.

    \b
    Example:
      pipeline cache-teacher --teacher ./teacher --dataset corpus.jsonl --output cache/
      pipeline cache-teacher --teacher Qwen/Qwen3-8B --dataset chats.jsonl.zst --output cache/ --top-n 128
    """
    from stages.caching import prepare

    prepared = prepare(cache_options(given))
    report_corpus(prepared.report)
    _show_first(prepared)
    say(f"engine: {prepared.choice.engine} ({prepared.choice.reason})", err=True)
    for note in prepared.choice.notes:
        say(f"engine: {note}", err=True)
    if prepared.note:
        say(prepared.note, err=True)
    total, waiting = len(prepared.manifest.shards), len(prepared.pending)
    if waiting == total:
        say(f"{counted(total, 'shard')} to score", err=True)
    else:
        say(
            f"{part_of(total - waiting, total, 'shard')} done already, {waiting} to score",
            err=True,
        )
    try:
        with saying(lambda: _kept(prepared)):
            cache, numbers = _score(prepared)
    finally:
        prepared.close()
    show_cache(cache, numbers)


def _score(prepared: PreparedCache) -> tuple[Cache, Summary]:
    """Load, calibrate and score what is pending, each with a word on it."""
    from stages.caching import calibrate, run, start, try_sketch

    tokens, planned = prepared.manifest.corpus.tokens, prepared.choice
    if prepared.pending:
        say("loading the teacher", err=True)
    start(prepared)
    if prepared.choice is not planned:
        say(f"engine: {prepared.choice.engine} ({prepared.choice.reason})", err=True)
    for note in prepared.teacher.notes if prepared.teacher else ():
        if note not in prepared.choice.notes:
            say(f"engine: {note}", err=True)
    if (sequences := prepared.calibration) is not None:
        say("calibrating the sketch on the first positions", err=True)
        with Progress("calibrating", sum(len(s.input_ids) for s in sequences)) as progress:
            calibrate(prepared, progress.advance)
        _report_sketch(*try_sketch(prepared))
    if prepared.pending:
        with Progress("caching", tokens, done_before=prepared.done_tokens) as progress:
            return run(prepared, progress.advance)
    return run(prepared, lambda tokens: None)


def _kept(prepared: PreparedCache) -> str:
    """Return what of an interrupted run is kept."""
    from stages.caching import finished_shards

    total, done = len(prepared.manifest.shards), finished_shards(prepared)
    if done:
        return f"{done} of the {total} shards are kept; start the same command again to go on"
    return f"no shard was finished, so nothing is kept{' but the sketch' if prepared.sketch else ''}"


def cache_options(given: dict[str, Any]) -> CacheOptions:
    """What this command's parameters ask for."""
    from stages.cache_options import CacheOptions

    names = ("text_column", "prompt_column", "completion_column", "messages_column", "tools_column")
    columns = {name: given.pop(name) for name in names}
    given["logprob_bits"] = int(given["logprob_bits"])
    given["chat"] = chat_settings(given)
    return CacheOptions(engine_options(given), columns=columns, **given)


def _show_first(prepared: PreparedCache) -> None:
    """The first sequence on stderr, around its first trained tokens."""
    from pipeline.mask_view import shortened, show, stretches

    first = prepared.corpus.read(0, 1)[0]
    view = shortened(stretches(prepared.tokenizer, first.input_ids, first.loss_mask))
    show(view, "the first sequence", first.input_ids, first.loss_mask, sys.stderr)


def _report_sketch(explained: float, equal_tail_samples: float | None) -> None:
    from stages.cache_options import DEFAULT_TAIL_SAMPLES

    say(f"the sketch explains {explained:.3f} of the variance of the teacher's logits", err=True)
    if equal_tail_samples is None:
        return
    say(f"its residual samples are as noisy as {equal_tail_samples:,.0f} tail samples would be", err=True)
    if equal_tail_samples < DEFAULT_TAIL_SAMPLES:
        say(
            f"{DEFAULT_TAIL_SAMPLES} tail samples, the default without --sketch-rank, are nearer to this teacher; "
            "a higher rank may be, too",
            err=True,
        )


def report_corpus(report: CorpusReport) -> None:
    """What became of the rows, on stderr; every kind of loss that occurred is named."""
    say(
        f"corpus: {counted(report.rows, 'row')}, {counted(report.sequences, 'sequence')}, "
        f"{counted(report.tokens, 'token')}, "
        f"{report.trained_positions} of {counted(report.scored_positions, 'position')} with a loss",
        err=True,
    )
    for count, noun, what in [
        (report.empty, "empty row", "left out"),
        (report.too_short, "row", "of fewer than two tokens left out"),
        (report.without_loss, "sequence", "with no token to train on left out"),
        (report.cut, "row", "cut at --max-length (--overlong split keeps the rest)"),
        (report.split, "row", "longer than --max-length split into several sequences"),
    ]:
        if count:
            say(f"corpus: {counted(count, noun)} {what}", err=True)
    for field, noun, one, several in _WHAT_ROWS_DO:
        if number := getattr(report, field):
            say(f"corpus: {counted(number, noun)} {one if number == 1 else several}", err=True)
    if report.unread_columns:
        say(f"corpus: columns that are not read: {printable(listed_briefly(report.unread_columns))}", err=True)
    for note in report.notes:
        say(f"corpus: {printable(note)}", err=True)


def _both(verb: str, rest: str) -> tuple[str, str]:
    """The sentence about one and about several."""
    return f"{verb}s {rest}", f"{verb} {rest}"


# A number of the report, what it counts, and what these do.
_WHAT_ROWS_DO = [
    (
        "turns_without_end",
        "assistant turn",
        *_both("end", "in no token that stops the teacher, so students do not learn to stop"),
    ),
    ("open_thoughts", "assistant turn", *_both("answer", "inside the <think> that the generation prompt opens")),
    ("special_text", "row", *_both("contain", "text that the tokenizer reads as special tokens")),
    ("unfinished", "row", *_both("say", "that the text was cut when it was written, so no end token has a loss")),
    (
        "ended",
        "sequence",
        *_both(
            "end",
            "with an end-of-sequence token that has a loss; for rows that are pieces of documents --no-append-eos "
            "leaves it out",
        ),
    ),
]
