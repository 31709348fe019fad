"""Which engine runs the teacher: chosen before anything is loaded, named in the manifest, loaded when needed.

transformers              the embedded default
vllm                      vLLM in this process, statistics in its pooler
vllm-prompt-logprobs      vLLM's stock API: gold and top-N only
server                    a vLLM server that runs our pooler
server-prompt-logprobs    any vLLM server: gold and top-N only
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stages import engine_log
from stages.statistics import StatisticsOptions
from stages.teacher import SKETCH_ENGINES, Teacher
from storage.errors import UserError
from storage.manifest import peek_section
from storage.places import Place

if TYPE_CHECKING:
    from stages.engine_guard import EngineNotUsable
    from stages.serve_command import Serving

# Why `auto` takes the engine that a cache names already.
BEGAN = "it began this cache"
ENGINES = ("auto", "transformers", "vllm", "server")


@dataclass(frozen=True)
class EngineOptions:
    """The teacher and how to run it. `engine` is one of ENGINES; the rest belongs to the engines it is named after.

    batch_tokens: tokens of one forward pass of the transformers engine, padding included.
    vllm_args: fields of vLLM's EngineArgs. server_concurrency: requests at a time.
    """

    teacher: str
    engine: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    batch_tokens: int = 8192
    vllm_route: str = "pooling"
    vllm_args: dict[str, object] = field(default_factory=dict)
    server_url: str | None = None
    server_model: str | None = None
    server_concurrency: int = 32

    @property
    def on_server(self) -> bool:
        return self.engine == "server" or bool(self.server_url)


@dataclass(frozen=True)
class Choice:
    """An engine by its name in the manifest, why it was chosen, and its teacher where asking made one already.

    statistics: what it keeps, where that is not what it was asked for. notes: a sentence each, for the reader.
    """

    engine: str
    reason: str
    teacher: Teacher | None = None
    statistics: StatisticsOptions | None = None
    notes: tuple[str, ...] = ()

    @property
    def gives_entropy(self) -> bool:
        return not self.engine.endswith("prompt-logprobs")


def choose(
    options: EngineOptions,
    statistics: StatisticsOptions,
    *,
    max_length: int,
    vocabulary_size: int,
    there: str | None,
    without_pooler: StatisticsOptions | None = None,
    may_keep_fewer: bool = False,
) -> Choice:
    """Decide without loading weights. `there`: the engine of a cache that is to be gone on with, which `auto` follows.

    max_length: ids that sequences may have; how long they are is known later, and a matter of `Teacher.check_length`.
    without_pooler: what a server that has not our pooler is asked for, if that may be less. may_keep_fewer: a server
    without it may keep fewer than the top_n, if it allows no more.

    Raises UserError for an engine that is not installed, cannot serve the teacher or give the statistics.
    """
    if statistics.sketch_rank and options.on_server:
        raise UserError(f"--sketch-rank: a server shows no hidden states; {SKETCH_ENGINES}")
    engine, reason = options.engine, "--engine"
    if engine == "auto":
        engine, reason = _automatic(options, there)
    if engine != "vllm" and (options.vllm_args or options.vllm_route != "pooling"):
        raise UserError(f"--vllm-arg and --vllm-route belong to --engine vllm; this would run on {engine} ({reason})")
    if engine == "server":
        return _server(options, statistics, vocabulary_size, without_pooler, may_keep_fewer)
    for name, value in (("--server-url", options.server_url), ("--server-model", options.server_model)):
        if value:
            raise UserError(f"{name} belongs to --engine server, not to {engine}")
    if engine != "vllm":
        return Choice(engine, reason)
    from stages.vllm_engine import check_engine_args, check_serves
    from stages.vllm_prompt_logprobs import refuse_beyond_logprobs

    check_serves(options.teacher, revision=options.revision, trust_remote_code=options.trust_remote_code)
    check_engine_args(options.vllm_args, max_length)
    if options.vllm_route == "prompt-logprobs":
        if statistics.sketch_rank:
            raise UserError(f"--sketch-rank: --vllm-route prompt-logprobs shows no hidden states; {SKETCH_ENGINES}")
        refuse_beyond_logprobs(statistics, "--vllm-route prompt-logprobs")
        return Choice("vllm-prompt-logprobs", reason)
    return Choice("vllm", reason)


def _automatic(options: EngineOptions, there: str | None) -> tuple[str, str]:
    if options.server_url:
        return "server", "a --server-url is given"
    if there in ("transformers", "vllm"):
        return there, BEGAN
    from stages.vllm_engine import can_serve

    serves, why = can_serve(options.teacher, revision=options.revision, trust_remote_code=options.trust_remote_code)
    return ("vllm" if serves else "transformers"), why


def _server(
    options: EngineOptions,
    statistics: StatisticsOptions,
    vocabulary_size: int,
    without_pooler: StatisticsOptions | None,
    may_keep_fewer: bool,
) -> Choice:
    from stages.http_client import KEY_VARIABLE
    from stages.teacher_server import ServerTeacher

    serving = _serving(options)
    if not options.server_url:
        raise UserError(
            "--engine server needs --server-url http://host:port, of a server that was started with: "
            f"{serving.with_pooler(statistics)}"
        )
    teacher = ServerTeacher(
        options.server_url,
        statistics,
        serving,
        model=options.server_model,
        vocabulary_size=vocabulary_size,
        concurrency=options.server_concurrency,
        api_key=os.environ.get(KEY_VARIABLE),
        without_pooler=without_pooler,
        may_keep_fewer=may_keep_fewer,
    )
    found = teacher.description
    return Choice(found.name, found.reason, teacher, teacher.options, teacher.notes)


def _serving(options: EngineOptions) -> Serving:
    """Return the serving settings of the teacher. Reads its configuration again, which is at hand by now."""
    from stages.identity import architecture_of
    from stages.pretrained import load_config
    from stages.serve_command import Serving
    from stages.teacher_checks import stated_context

    source: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    config = load_config(options.teacher, **source)
    text = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    return Serving(
        os.path.abspath(options.teacher) if os.path.isdir(options.teacher) else options.teacher,
        architecture_of(config),
        dtype="auto" if dtype is None else str(dtype).removeprefix("torch."),
        context=stated_context(config),
        **source,
    )


def load(
    choice: Choice, options: EngineOptions, statistics: StatisticsOptions, *, dtype: str, max_length: int
) -> Teacher:
    """The loaded teacher. Raises UserError where it cannot be loaded, RunError where its engine does not start."""
    if choice.teacher is not None:
        return choice.teacher
    source: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    if choice.engine == "transformers":
        from stages.teacher_transformers import TransformersTeacher

        return TransformersTeacher(
            options.teacher, statistics, dtype=dtype, batch_tokens=options.batch_tokens, **source
        )
    from stages.teacher_vllm import VllmTeacher

    return VllmTeacher(
        options.teacher,
        statistics,
        max_length=max_length,
        dtype=dtype,
        route="prompt-logprobs" if choice.engine == "vllm-prompt-logprobs" else "pooling",
        engine_args=options.vllm_args,
        **source,
    )


def instead(choice: Choice, options: EngineOptions, error: EngineNotUsable) -> Choice:
    """Return what `auto` runs in place of a vLLM that cannot serve the teacher; `error` says why it cannot.

    Raises an error of the same kind, with what to do, where vLLM was asked for or a cache can only go on with it.
    """
    if choice.reason == BEGAN:
        remedy = "only vLLM can go on with it; another engine needs a new --output"
        raise type(error)(f"{error}; the cache was begun with vLLM, {remedy}", error.cause) from error
    if options.engine != "auto" or options.vllm_args or options.vllm_route != "pooling":
        raise type(error)(f"{error}; or choose --engine transformers", error.cause) from error
    engine_log.forget()
    return Choice("transformers", f"vLLM cannot serve the teacher: {error.cause}")


def engine_of(cache: Place) -> str | None:
    """The engine that the manifest in this directory names; None where there is no readable one."""
    engine = peek_section(cache, "scoring").get("engine")
    return engine if isinstance(engine, str) else None


def top_n_of(cache: Place) -> int | None:
    """The top_n of a cache that a server began which allowed no more; None where there is no such cache."""
    scoring = peek_section(cache, "scoring")
    top_n = scoring.get("top_n")
    return top_n if scoring.get("engine") == "server-prompt-logprobs" and isinstance(top_n, int) else None
