"""Write pages of docs/: cli.md from the commands, format.md from the schema, limits.md, chat-templates.md from chats.

`python docs/generate.py` writes them; with `--check` it writes nothing, names the stale files and exits 1.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import get_args

import click
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from docs.chat_templates import chat_templates_markdown
from pipeline.cli import COMMANDS, PROGRAM, main

DOCS = Path(__file__).resolve().parent

_NOTE = "<!-- Written by docs/generate.py; change the source, then run it again. -->\n"

_CLI_INTRODUCTION = """\
Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 2 misuse or bad input (nothing
was done), 1 the run failed, 130 interrupted by Ctrl-C, 143 by SIGTERM. Every command takes `--help` and `--debug`.
"""

_LIMITS_INTRODUCTION = """\
A cache, a store, a server and a corpus may be somebody else's, so all that is read of them is limited. Each limit is an
environment variable, which holds for every command; the message of what breaks a limit names it.

| variable | default | limits |
| --- | --- | --- |
"""

_LIMITS_REST = """\

A bundle unpacks to at most {times} times its size and {besides}; a problem that is one of many is counted, not shown.
The trial of a tokenizer and the reading of a Parquet file that unpacks far are done in a process of their own, whose
memory the system limits, on Linux; elsewhere in the command's own process, without those limits. The bytes that come
from a store are counted for `s3://` and `https://`; for other stores the time is limited alone.
"""

_FORMAT_INTRODUCTION = """\
A cache is a directory of Parquet shards and a manifest. One row is one sequence of `L` token ids. It has
exactly `L-1` scored positions: position `t` is the teacher's distribution after reading `input_ids[:t+1]`,
and its gold token is `input_ids[t+1]`. `P` positions have the loss mask set and keep top-N entries, `E` in
all; `M` is the number of samples per stored position, of the tail or of a sketch's residual, `r` the rank of the
sketch. Log-probabilities are in nats.

```text
cache/
  manifest.json              identity: teacher, tokenizer, corpus, what is kept, the plan of shards; never changes
  README.md                  dataset card; written last, so it seals the cache
  tokenizer/                 the teacher's tokenizer files
  tail_prior.parquet         mean tail distribution, one float32 per vocabulary id, where the engine gives it
  sketch.safetensors         with --sketch-rank: basis [V, r], bias [V], encoder [r, H], mean [H], scales [r] and
                             explained [H], the share of the logits' variance by rank; written before the manifest,
                             which names its sha256
  tail_prior.json            its receipt: the cache, its sha256
  shards/part-00000.parquet  the rows of a fixed range of sequences
  shards/part-00000.json     its receipt: rows, tokens, bytes, sha256; a shard without one does not exist
  tail_sums/part-00000.parquet   its summed tail, float64, from which the mean is made
  partial.json               only where `pipeline pull --shards` left shards out: the numbers of those that are here
```

## Columns of a shard
"""

_FORMAT_REST = """\
Where gold is among the top-N it stands there too, so the kept set is top-N and gold, each id once. `gold_logprob` and
`tail_logmass` are computed from the full distribution in float32 before anything is rounded; at a stored position the
probabilities of the kept set and the tail sum to 1 within rounding. With `1 - p(gold) = UNC`, `log UNC` is the
log-sum-exp of the non-gold entries and the tail.

With 8 bits `top_logprobs` are codes: c stands for `-(step c)^2` nats, the step being in the schema metadata under
`teacher_logit_cache.top_logprobs_step` (0.025 in this version). The largest error is `step sqrt(|logprob|) + step^2/4`.

Encoding: zstd; ids and float32 byte-stream-split; a CRC on every page. The schema metadata of each file names the
format version, the cache id and the number of the shard.

## Sketch

With w the softmax over the tail of `cap(bias + basis (scales * (c - 128)))`, `c` the `sketch_codes` of a position, the
teacher's probability of a tail id is about `exp(tail_logmass)` times its w. `cap(x)` is `soft_cap * tanh(x / soft_cap)`
where the file's metadata names a `soft_cap`, else x. The codes are `encoder (h - mean) / scales`, rounded, of the
teacher's last hidden state h. `residual_samples` correct w without bias. A receipt holds the sum over its positions of
the KL from the teacher to what is given back so.

## manifest.json

{manifest}

`cache_id` is the first 16 hex digits of the sha256 of these fields (without `source` and `made_with`, which inform
only) as canonical JSON. Everything that makes, resumes, reads or trains from a cache compares it.

## Receipt

{receipt}

## Receipt of the tail prior

{prior_receipt}
"""


def _markdown_help(text: str) -> str:
    """Click's help text as Markdown: paragraphs that click keeps as they are become code blocks."""
    blocks = []
    for paragraph in inspect.cleandoc(text.split("\f")[0]).split("\n\n"):
        lines = paragraph.strip("\n").splitlines()
        if not lines or lines[0].strip() != "\b":
            blocks.append("\n".join(line.strip() for line in lines))
            continue
        lines = lines[1:]
        if lines and lines[0].rstrip().endswith(":"):
            blocks.append(lines.pop(0).strip())
        blocks.append("\n".join(["```text", inspect.cleandoc("\n" + "\n".join(lines)), "```"]))
    return "\n\n".join(block for block in blocks if block)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _option_row(option: click.Option, ctx: click.Context) -> str:
    extra = option.get_help_extra(ctx)
    # The short one first, which versions of click do not agree on.
    opts = sorted(option.opts, key=lambda name: name.startswith("--"))
    names = ", ".join(f"`{name}`" for name in [*opts, *option.secondary_opts])
    kind = "flag" if option.is_flag else option.make_metavar(ctx)
    kind = {"INTEGER": "integer", "INTEGER RANGE": "integer", "FLOAT": "number", "FLOAT RANGE": "number"}.get(
        kind, kind
    )
    if bounds := extra.get("range"):
        kind = f"{kind}, {bounds}"
    if option.multiple:
        kind += ", repeatable"
    if option.required:
        default = "required"
    elif isinstance(option.show_default, str):
        default = option.show_default
    else:
        default = extra.get("default", "off" if option.is_flag else "")
    return f"| {names} | {_cell(option.help or '')} | {_cell(kind)} | {_cell(str(default))} |"


def _options_table(command: click.Command, ctx: click.Context, leave_out: tuple[str, ...]) -> str:
    rows = [
        _option_row(param, ctx)
        for param in command.get_params(ctx)
        if isinstance(param, click.Option) and not param.hidden and not set(param.opts) & set(leave_out)
    ]
    if not rows:
        return "It has no options of its own."
    return "\n".join(["| option | meaning | type | default |", "| --- | --- | --- | --- |", *rows])


def _section(command: click.Command, ctx: click.Context, leave_out: tuple[str, ...]) -> str:
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    return "\n\n".join(
        [
            f"```text\n{usage}\n```",
            _markdown_help(command.help or ""),
            _options_table(command, ctx, leave_out),
        ]
    )


def cli_markdown() -> str:
    """The command-line reference."""
    root = click.Context(main, info_name=PROGRAM, **main.context_settings)
    parts = [_NOTE + "# Command line", _CLI_INTRODUCTION.rstrip(), _section(main, root, ())]
    parts.append("\n".join(f"- [`{name}`](#{PROGRAM}-{name}): {entry.summary}" for name, entry in COMMANDS.items()))
    for name in COMMANDS:
        command = main.get_command(root, name)
        assert command is not None, name
        ctx = click.Context(command, info_name=name, parent=root, **command.context_settings)
        parts += [f"## {PROGRAM} {name}", _section(command, ctx, ("--help", "--debug"))]
    return "\n\n".join(parts) + "\n"


def format_markdown() -> str:
    """The reference of the columns."""
    from storage import manifest, schema

    models = {"manifest": manifest.Manifest, "receipt": manifest.Receipt, "prior_receipt": manifest.PriorReceipt}
    rest = _FORMAT_REST.format(**{name: _fields(model) for name, model in models.items()})
    return "\n".join([_NOTE + "# Format of a cache\n", _FORMAT_INTRODUCTION, schema.format_markdown(), rest])


def limits_markdown() -> str:
    """The table of limits."""
    from storage.bundle import MOST_BESIDES, MOST_TIMES
    from storage.limits import LIMITS

    rows = [f"| `{each.variable}` | {_amount(each.default, each.unit)} | {each.bounds} |" for each in LIMITS]
    rest = _LIMITS_REST.format(times=MOST_TIMES, besides=_amount(MOST_BESIDES, "bytes"))
    return _NOTE + "# Limits\n\n" + _LIMITS_INTRODUCTION + "\n".join(rows) + "\n" + rest


def _amount(number: int, unit: str) -> str:
    if unit != "bytes":
        return f"{number} {unit}"
    for power, name in ((30, "GiB"), (20, "MiB")):
        if number % (1 << power) == 0:
            return f"{number >> power} {name}"
    return f"{number} bytes"


def _fields(model: type[BaseModel], prefix: str = "") -> str:
    """A list of a model's fields and, indented, of the models inside it."""
    lines = []
    for name, field in model.model_fields.items():
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        nested = next((t for t in inner if issubclass(t, BaseModel)), None)
        kind = "" if nested else f": {str(field.annotation).replace('typing.', '').removeprefix('<class ').rstrip('>')}"
        lines.append(f"{prefix}- `{name}`{kind.replace(chr(39), '')}")
        if nested:
            lines.append(_fields(nested, prefix + "  "))
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    return {
        DOCS / "cli.md": cli_markdown(),
        DOCS / "format.md": format_markdown(),
        DOCS / "limits.md": limits_markdown(),
        DOCS / "chat-templates.md": chat_templates_markdown(),
    }


def run(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is stale")
    check = parser.parse_args(arguments).check
    stale = False
    for path, text in pages().items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale = True
        if check:
            print(f"docs/{path.name} is stale; run python docs/generate.py", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote docs/{path.name}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(run())
