"""The teacher in vLLM, in this process. Two routes to the same interface:

- `pooling` (the default): the teacher runs as a pooling model whose pooler computes every statistic where the logits
  are (`stages.vllm_plugin`). Exact tail, entropy, temperatures, tail samples and the tail prior.
- `prompt-logprobs`: vLLM's stock API, as a fallback and a cross-check (`stages.vllm_prompt_logprobs`).

vLLM is imported when a teacher is made, never before.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stages import engine_log, vllm_pooling, vllm_prompt_logprobs
from stages.corpus import Sequence as TokenSequence
from stages.engine_guard import engine_error, not_started, start_guarded
from stages.sketch_calibration import from_file, soft_cap_of, to_file
from stages.statistics import StatisticsOptions
from stages.teacher import EngineDescription, Scored, ScoredSequence, Teacher, check_sequences
from stages.vllm_engine import create_config, find_architecture, memory_options, merged, set_up
from stages.vllm_plugin import PackedStatistics
from storage.errors import RunError, UserError
from storage.sketch_file import SketchFile

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

    from stages.sketch import Sketch

Route = Literal["pooling", "prompt-logprobs"]
ROUTES: tuple[Route, ...] = ("pooling", "prompt-logprobs")

# Nothing of value is left in an engine between two shards, so it is not waited for longer (seconds).
_SHUTDOWN_SECONDS = 10.0
# Ids that a new engine scores before anyone relies on it.
_TRIED_IDS = 8

_CLOSED = "the vLLM engine is closed; start the same command again to go on"


class VllmTeacher(Teacher):
    """Scores with vLLM in this process.

    max_length: ids of the longest sequence to come. dtype: a torch name, or "auto" for the checkpoint's own.
    engine_args: vLLM's `EngineArgs` by name; strings are read as JSON where they can be.

    On the route `prompt-logprobs`, `entropy` is NaN, `tail_prior_sum` is None, and `tail_logmass` is bounded as
    `stages.vllm_prompt_logprobs` says.

    Raises UserError for what can be told before the weights are read (vLLM missing, an architecture it does not
    serve, an unknown engine argument, too small a `max_model_len`, statistics the route cannot give), and
    EngineNotStarted when the engine then does not start or cannot score a few ids.
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
            vllm_prompt_logprobs.refuse_beyond_logprobs(options, "--vllm-route prompt-logprobs")
        self.options = options
        self.route = route
        self.max_length = max_length
        self._engine: LLMEngine | None = None
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        setup = set_up(model, max_length=max_length, dtype=dtype, engine_args=engine_args, **source)
        given = setup.given
        architecture = find_architecture(model, model_impl=str(given.get("model_impl", "auto")), **source)
        arguments = {
            **setup.ours,
            # Every row must be computed: a cached prefix has no hidden states.
            "enable_prefix_caching": False,
            **(
                vllm_pooling.engine_args(options, architecture)
                if route == "pooling"
                else vllm_prompt_logprobs.engine_args(options, setup.config, max_length)
            ),
        }
        arguments |= {**given, **merged(arguments, given)}
        if route == "pooling":
            arguments.pop("model_impl", None)  # the architecture says it
        config = create_config(arguments, model, allow_longer=route == "prompt-logprobs")
        self.vocabulary_size = int(config.model_config.get_vocab_size())
        if not 1 <= options.top_n <= self.vocabulary_size:
            raise UserError(f"--top-n {options.top_n}: the teacher's vocabulary has {self.vocabulary_size} ids")
        self._soft_cap = soft_cap_of(config.model_config.hf_config)
        # Enough that the engine always has a next step to form, little enough that no result waits long.
        self._queue_tokens = 4 * int(config.scheduler_config.max_num_batched_tokens)
        self._queue_requests = 2 * int(config.scheduler_config.max_num_seqs)
        self._requests = 0
        self._advice = memory_options(config)
        import vllm
        from vllm.v1.engine.llm_engine import LLMEngine

        self._engine, self._guard = start_guarded(
            lambda: LLMEngine.from_vllm_config(config, disable_log_stats=True), model, self._advice
        )
        self._try_out(model)
        self.description = EngineDescription(
            "vllm" if route == "pooling" else "vllm-prompt-logprobs",
            arguments["dtype"],
            versions={"vllm": vllm.__version__, "torch": importlib.metadata.version("torch")},
        )

    def _try_out(self, model: str) -> None:
        """Score a few ids: some engines start and then cannot serve their model. Raises EngineNotStarted."""
        assert self._engine is not None
        engine, ids = self._engine, [0] * min(self.max_length, _TRIED_IDS)
        prompt: Any = {"type": "token", "prompt_token_ids": ids}
        # Without the key of a sequence, so that nothing of it is counted.
        parameters: Any = (
            vllm_pooling.trial_params()
            if self.route == "pooling"
            else vllm_prompt_logprobs.request_params(self.options)
        )
        try:
            with engine_log.captured():
                engine.add_request("0", prompt, parameters)
                while not any(output.finished for output in self._guard.call(engine.step)):
                    pass
        except BaseException as error:
            self.close()
            if isinstance(error, Exception):
                raise not_started(error, model, self._advice, self._guard.mark) from error
            raise

    def score(self, sequences: Sequence[TokenSequence], progress: Callable[[int], None]) -> Scored:
        check_sequences(sequences, self.max_length, self.vocabulary_size)
        if not sequences:
            return Scored([], np.zeros(self.vocabulary_size) if self.route == "pooling" else None, 0)
        results: list[ScoredSequence | None] = [None] * len(sequences)
        if self.route == "pooling":
            self._rpc("teacher_reset_prior")
        with contextlib.closing(self._run(sequences)) as outputs:
            for index, output in outputs:
                results[index] = self._scored(sequences[index], output)
                progress(len(sequences[index].input_ids))
        finished = [scored for scored in results if scored is not None]
        stored = sum(len(s.top_ids) for s in finished)
        return Scored(finished, self._take_prior(stored) if self.route == "pooling" else None, stored)

    def calibrate(self, sequences: Sequence[TokenSequence], rank: int, progress: Callable[[int], None]) -> Sketch:
        if self.route != "pooling":
            return super().calibrate(sequences, rank, progress)
        check_sequences(sequences, self.max_length, self.vocabulary_size)
        self._rpc("teacher_start_moments")
        with contextlib.closing(self._run(sequences)) as outputs:
            for index, _ in outputs:
                progress(len(sequences[index].input_ids))
        answers = [answer for answer in self._rpc("teacher_take_sketch", rank, self._soft_cap) if answer is not None]
        if len(answers) != 1:
            raise RunError(f"{len(answers)} of the engine's workers made a sketch instead of one; please report this")
        return from_file(
            SketchFile.from_bytes(answers[0], "the sketch", rank=rank, vocabulary_size=self.vocabulary_size)
        )

    def use_sketch(self, sketch: Sketch) -> None:
        if self.route != "pooling":
            super().use_sketch(sketch)
        self._rpc("teacher_use_sketch", to_file(sketch, {}).to_bytes())

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
                for output in self._guard.call(engine.step):
                    if output.finished:
                        index, _ = inside.pop(output.request_id)
                        tokens -= len(sequences[index].input_ids)
                        yield index, output
        except Exception as error:
            raise engine_error(error, self._advice, self._guard.mark) from error
        finally:
            if inside:
                with contextlib.suppress(Exception):
                    engine.abort_request([assigned for _, assigned in inside.values()], internal=True)

    def _params(self, index: int, sequence: TokenSequence) -> Any:
        if self.route == "pooling":
            return vllm_pooling.request_params(index, sequence)
        return vllm_prompt_logprobs.request_params(self.options)

    def _scored(self, sequence: TokenSequence, output: Any) -> ScoredSequence:
        if self.route == "pooling":
            return vllm_pooling.scored_from_packed(sequence, PackedStatistics.unpack(output.outputs.data.numpy()))
        flat = output.prompt_logprobs
        return vllm_prompt_logprobs.scored_from_flat(sequence, flat, self.options, self.vocabulary_size)

    def _rpc(self, method: str, *arguments: object) -> list[Any]:
        if self._engine is None:
            raise RunError(_CLOSED)
        engine = self._engine
        try:
            return self._guard.call(lambda: engine.collective_rpc(method, args=arguments))
        except Exception as error:
            raise engine_error(error, self._advice, self._guard.mark) from error

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

    def close(self) -> None:
        if self._engine is not None:
            engine, self._engine = self._engine, None
            try:
                with contextlib.suppress(Exception):
                    engine.engine_core.shutdown(timeout=_SHUTDOWN_SECONDS)
            finally:  # a second interrupt ends the waiting, not the engine's life
                self._guard.end()
