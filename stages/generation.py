"""`pipeline generate`: a model writes completions for a file of prompts, in vLLM.

With a teacher: data for sequence-level distillation. With a student: its own samples (on-policy data), which
`cache-teacher` then lets the teacher score. The output is JSONL with the input's own fields kept, so it can be the
input again. It grows in `OUTPUT.partial` and takes its name when it is whole; what is drawn for a prompt depends on
seed, row and sample alone, so a run that was killed and goes on writes what an undisturbed one would have.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import endings
from stages.chat_settings import TIME, ChatSettings
from stages.identity import teacher_identity
from stages.local_files import check_apart
from stages.messages import MESSAGE_COLUMNS, read_chat, read_tools, with_system
from stages.pretrained import load_config, load_tokenizer
from stages.sources import load_rows
from stages.teacher_checks import stated_context
from storage.errors import UserError
from storage.files import sync_directory, write_json
from storage.json_text import parse_json
from storage.new_path import check_new_path, local_path
from storage.words import listed_briefly

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.chat import ChatRenderer

# Prompts given to the engine between two writes: enough to fill a batch, little to lose.
WINDOW = 256
# Of a generation_config: how its authors let the model sample.
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class GenerateOptions:
    """Lengths in tokens. samples: completions per prompt. token_ids: rows of `input_ids` and `loss_mask` instead of
    text, which say exactly what was drawn (text may be split into other tokens when it is read again). chat: how the
    chat template is used."""

    model: str
    prompts: str
    output: str
    max_new_tokens: int = 512
    max_length: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    token_ids: bool = False
    prompt_column: str | None = None
    messages_column: str | None = None
    chat: ChatSettings = field(default_factory=ChatSettings)
    split: str | None = None
    limit: int | None = None
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    vllm_args: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """One prompt and one sample to draw from it."""

    row: dict[str, Any]
    ids: list[int]
    index: int
    sample: int


@dataclass(frozen=True)
class Generated:
    """Counts the completions that the output holds, and those of them that were cut at the limit of new tokens."""

    completions: int
    cut: int


@dataclass
class PreparedGeneration:
    """Checked, tokenised and ready. identity: what must agree for lines that are there already to belong to this
    command; `done` of them are. engine: once it is loaded."""

    options: GenerateOptions
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    column: str
    chat: bool
    max_length: int
    identity: dict[str, Any]
    done: int = 0
    engine: _Engine | None = None

    def close(self) -> None:
        """End the engine, where there is one."""
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.close()

    @property
    def partial(self) -> Path:
        return Path(f"{self.options.output}.partial")

    @property
    def marker(self) -> Path:
        """Holds the identity for as long as `partial` is there."""
        return Path(f"{self.partial}.json")


def prepare(options: GenerateOptions) -> PreparedGeneration:
    """Raises UserError, with nothing written, for whatever can be told before the model is loaded."""
    from stages.chat import ChatRenderer
    from stages.vllm_engine import check_engine_args, check_serves

    output = local_path(options.output, "the file of completions")
    if output.exists():
        raise UserError(f"{output}: exists already; name another --output or move it away")
    check_new_path(output, "--output wants a file in a folder")
    check_apart(options.prompts, options.output)
    if not output.parent.is_dir():
        raise UserError(f"{output.parent}: no such folder to write {output.name} in; make it first")
    source: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    config = load_config(options.model, **source)
    check_serves(options.model, **source)
    check_engine_args(options.vllm_args, options.max_length or 0)
    tokenizer = load_tokenizer(options.model, **source)
    options.chat.prepare(tokenizer)
    moment = options.chat.moment(tokenizer, _time_begun(options))
    renderer = ChatRenderer(tokenizer, arguments=options.chat.values(), moment=moment)
    context = stated_context(config)
    max_length = options.max_length or context or 4096
    rows = load_rows(options.prompts, split=options.split, limit=options.limit)
    try:
        column, chat = _find_column(rows.column_names, options)
        encoded = [
            (rows[index], _prompt_ids(tokenizer, renderer, rows[index], column, chat, rows.origin.where(index)))
            for index in range(len(rows))
        ]
        for index, (_, ids) in enumerate(encoded):
            if len(ids) + options.max_new_tokens > max_length:
                raise UserError(
                    f"{rows.origin.where(index)}: the prompt has {len(ids)} tokens, and with --max-new-tokens "
                    f"{options.max_new_tokens} that is beyond the {max_length} the model reads"
                )
    finally:
        rows.close()
    prompts = [
        Prompt(row, ids, index, sample) for index, (row, ids) in enumerate(encoded) for sample in range(options.samples)
    ]
    identity = _identity(options, config, encoded) | options.chat.about(moment)
    prepared = PreparedGeneration(options, tokenizer, prompts, column, chat, max_length, identity)
    prepared.done = _lines_done(prepared)
    return prepared


def start(prepared: PreparedGeneration) -> None:
    """Load the model where a completion is missing, before anything is written. Raises UserError or RunError."""
    if prepared.engine is None and prepared.done < len(prepared.prompts):
        prepared.engine = _Engine(prepared)


def run(prepared: PreparedGeneration, progress: Callable[[int], None]) -> Generated:
    """Write what is left; return what the whole output holds. Raises RunError.

    progress: gets new tokens.
    """
    options = prepared.options
    start(prepared)
    engine = prepared.engine
    if not prepared.marker.exists():
        write_json(prepared.marker, prepared.identity)
    with open(prepared.partial, "ab") as file:
        for first in range(prepared.done, len(prepared.prompts), WINDOW):
            window = prepared.prompts[first : first + WINDOW]
            assert engine is not None
            answers = engine.complete(window)
            for prompt, (ids, reason) in zip(window, answers, strict=True):
                row = _row(prepared, prompt, ids, reason)
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            progress(sum(len(ids) for ids, _ in answers))
    cut = sum(parse_json(line).get("finish_reason") == "length" for line in _whole_lines(prepared.partial))
    os.replace(prepared.partial, options.output)
    sync_directory(Path(options.output).absolute().parent)
    prepared.marker.unlink(missing_ok=True)
    return Generated(len(prepared.prompts), cut)


def own_sampling(options: GenerateOptions) -> dict[str, Any]:
    """Return the sampling of the model's generation_config, which `generate` leaves aside; empty where it has none."""
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(
            options.model, revision=options.revision or "main", trust_remote_code=options.trust_remote_code
        ).to_diff_dict()
    except (OSError, ValueError, TypeError):
        return {}
    return {name: config[name] for name in _SAMPLING if name in config}


class _Engine:
    """vLLM generating from token ids."""

    def __init__(self, prepared: PreparedGeneration) -> None:
        from stages.vllm_engine import generating_llm

        options = prepared.options
        self._prepared = prepared
        self._llm, self._guard = generating_llm(
            options.model,
            max_length=prepared.max_length,
            dtype=options.dtype,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            engine_args=options.vllm_args,
        )
        generation = self._llm.model_config.try_get_generation_config() or {}
        ends = generation.get("eos_token_id", prepared.tokenizer.eos_token_id)
        self._ends = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]

    def close(self) -> None:
        """End the processes of the engine."""
        try:
            with contextlib.suppress(Exception):
                self._llm.llm_engine.engine_core.shutdown()
        finally:
            self._guard.end()

    def complete(self, window: list[Prompt]) -> list[tuple[list[int], str]]:
        """New token ids of each prompt, the end token included, and why it ended (stop or length)."""
        from vllm import SamplingParams

        from stages.engine_guard import engine_error
        from stages.vllm_engine import memory_options

        options = self._prepared.options
        parameters = [
            SamplingParams(
                temperature=options.temperature,
                top_p=options.top_p,
                max_tokens=options.max_new_tokens,
                seed=_seed(options.seed, prompt),
                stop_token_ids=self._ends,
                detokenize=False,
            )
            for prompt in window
        ]
        prompts: Any = [{"prompt_token_ids": prompt.ids} for prompt in window]
        try:
            outputs = self._guard.call(lambda: self._llm.generate(prompts, parameters, use_tqdm=False))
        except Exception as error:
            advice = memory_options(self._llm.llm_engine.vllm_config)
            raise engine_error(error, advice, self._guard.mark) from error
        return [(list(output.outputs[0].token_ids), str(output.outputs[0].finish_reason)) for output in outputs]


def _seed(seed: int, prompt: Prompt) -> int:
    digest = hashlib.blake2b(f"{seed}/{prompt.index}/{prompt.sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _row(prepared: PreparedGeneration, prompt: Prompt, ids: list[int], reason: str) -> dict[str, Any]:
    if prepared.options.token_ids:
        # Position t predicts id t + 1: the completion's ids are predicted from the last id of the prompt on.
        mask = [False] * (len(prompt.ids) - 1) + [True] * len(ids)
        return {"input_ids": prompt.ids + ids, "loss_mask": mask, "finish_reason": reason}
    text = str(prepared.tokenizer.decode(ids, skip_special_tokens=True))
    if reason == "length":
        text = text.rstrip("\ufffd")  # Half of a character that its other tokens would have completed.
    # What the row says of the end of another text would be taken for this one's.
    row = {name: value for name, value in prompt.row.items() if name not in endings.COLUMNS}
    row["finish_reason"] = reason
    if prepared.options.samples > 1:
        row["sample"] = prompt.sample
    if prepared.chat:
        asked = prompt.row[prepared.column]
        messages = parse_json(asked) if isinstance(asked, str) else asked
        return {**row, prepared.column: [*messages, {"role": "assistant", "content": text}]}
    return {**row, "completion": text}


def _find_column(there: Sequence[str], options: GenerateOptions) -> tuple[str, bool]:
    """Name of the column of prompts, and whether it holds chats."""
    if options.prompt_column and options.messages_column:
        raise UserError("--prompt-column and --messages-column exclude each other; give one")
    wanted = options.prompt_column or options.messages_column
    if wanted is None:
        usual = ("prompt", *MESSAGE_COLUMNS)
        found = [name for name in usual if name in there]
        if len(found) != 1:
            raise UserError(
                f"{options.prompts}: {'several' if found else 'none'} of the columns {', '.join(usual)} among "
                f"{listed_briefly(there)}; name one with --prompt-column or --messages-column"
            )
        wanted = found[0]
    if wanted not in there:
        raise UserError(f"{options.prompts}: has no column {wanted!r}; its columns are {listed_briefly(there)}")
    chats = (options.messages_column,) if options.messages_column else MESSAGE_COLUMNS
    return wanted, wanted in chats and not options.prompt_column


def _time_begun(options: GenerateOptions) -> str | None:
    """Return the template time of an earlier, killed run of this command."""
    try:
        found = parse_json(Path(f"{options.output}.partial.json").read_bytes())[TIME]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _prompt_ids(
    tokenizer: Any, renderer: ChatRenderer, row: dict[str, Any], column: str, chat: bool, where: str
) -> list[int]:
    value = row.get(column)
    if chat or isinstance(value, list):
        asked = read_chat(value, where)
        if not asked.messages or asked.messages[-1]["role"] == "assistant":
            last = "is empty" if not asked.messages else "ends with the assistant's turn"
            raise UserError(f"{where}: the chat {last}; there is nothing left to answer")
        asked = with_system(asked, row.get("system"), where)
        text = renderer.prompt(asked, where, read_tools(row.get("tools"), where))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: the prompt is not text, or empty; mend or remove the row")
        ids = _text_ids(tokenizer, value)
    if not ids:
        raise UserError(f"{where}: the prompt has no tokens")
    return list(ids)


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    """A prompt's ids with what the tokenizer puts before a text, where the text does not begin with it already.

    What a tokenizer puts after a text is left out: the completion follows.
    """
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    full = list(tokenizer(text)["input_ids"])
    starts = range(len(full) - len(plain) + 1)
    start = next((at for at in starts if full[at : at + len(plain)] == plain), None)
    if start is None:
        return full
    lead = full[:start]
    return plain if plain[:start] == lead else lead + plain


def _identity(options: GenerateOptions, config: Any, encoded: list[tuple[dict[str, Any], list[int]]]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for row, ids in encoded:
        digest.update(json.dumps([row, ids], sort_keys=True, default=str).encode())
    names = ("max_new_tokens", "temperature", "top_p", "samples", "seed", "token_ids", "dtype")
    return {
        "model": teacher_identity(options.model, config).model_dump(mode="json"),
        "prompts": digest.hexdigest(),
        **{name: getattr(options, name) for name in names},
    }


def _lines_done(prepared: PreparedGeneration) -> int:
    """Whole lines of an earlier, killed run of this command; half a line at its end is cut off."""
    marker, identity = prepared.marker, prepared.identity
    if not prepared.partial.exists() and not marker.exists():
        return 0
    try:
        there = parse_json(marker.read_bytes())
    except (OSError, ValueError):
        there = {}
    if there != identity:
        differing = [name for name in identity if there.get(name) != identity[name]]
        raise UserError(
            f"{prepared.partial}: belongs to another command, which differs in {', '.join(differing)}; "
            "name another --output or move it away"
        )
    if not prepared.partial.exists():
        return 0
    end = lines = 0
    for line in _whole_lines(prepared.partial):
        end += len(line)
        lines += 1
    with open(prepared.partial, "r+b") as file:
        file.truncate(end)
    return lines


def completions_there(prepared: PreparedGeneration) -> int:
    """Return how many completions are written, by this run and earlier ones."""
    return sum(1 for _ in _whole_lines(prepared.partial)) if prepared.partial.exists() else 0


def _whole_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line
