"""Which engine runs the teacher: chosen before anything is loaded, named in the manifest, loaded when needed.

transformers              the embedded default
vllm                      vLLM in this process, statistics in its pooler
vllm-prompt-logprobs      vLLM's stock API: gold and top-N only
server                    a vLLM server that runs our pooler
server-prompt-logprobs    any vLLM server: gold and top-N only
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from stages.statistics import StatisticsOptions
from stages.teacher import SKETCH_ENGINES, Teacher
from storage.errors import UserError
from storage.places import Place

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


@dataclass(frozen=True)
class Choice:
    """An engine by its name in the manifest, why it was chosen, and its teacher where asking made one already."""

    engine: str
    reason: str
    teacher: Teacher | None = None

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
) -> Choice:
    """Decide without loading weights. `there`: the engine of a cache that is to be gone on with, which `auto` follows.

    without_pooler: what a server that has not our pooler is asked for, if that may be less.

    Raises UserError for an engine that is not installed, cannot serve the teacher or give the statistics.
    """
    if statistics.sketch_rank and (options.engine == "server" or options.server_url):
        raise UserError(f"--sketch-rank: a server shows no hidden states; {SKETCH_ENGINES}")
    engine, reason = options.engine, "--engine"
    if engine == "auto":
        engine, reason = _automatic(options, there)
    if engine == "server":
        return _server(options, statistics, max_length, vocabulary_size, without_pooler)
    if options.server_url:
        raise UserError(f"--server-url belongs to --engine server, not to {engine}")
    if engine != "vllm":
        if options.vllm_args or options.vllm_route != "pooling":
            raise UserError(
                f"--vllm-arg and --vllm-route belong to --engine vllm; this would run on {engine} ({reason})"
            )
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
        return there, "it began this cache"
    from stages.vllm_engine import can_serve

    serves, why = can_serve(options.teacher, revision=options.revision, trust_remote_code=options.trust_remote_code)
    return ("vllm" if serves else "transformers"), why


def _server(
    options: EngineOptions,
    statistics: StatisticsOptions,
    max_length: int,
    vocabulary_size: int,
    without_pooler: StatisticsOptions | None,
) -> Choice:
    if not options.server_url:
        raise UserError("--engine server needs --server-url http://host:port")
    from stages.teacher_server import ServerTeacher

    teacher = ServerTeacher(
        options.server_url,
        statistics,
        max_length=max_length,
        model=options.server_model,
        vocabulary_size=vocabulary_size,
        concurrency=options.server_concurrency,
        without_pooler=without_pooler,
    )
    return Choice(teacher.description.name, teacher.description.reason, teacher)


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


def engine_of(cache: Place) -> str | None:
    """The engine that the manifest in this directory names; None where there is no readable one."""
    try:
        return str(json.loads((cache / "manifest.json").read_bytes())["scoring"]["engine"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
