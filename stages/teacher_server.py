"""A teacher on a vLLM server that already runs, asked over HTTP. Needs no vLLM and no GPU on this side.

Where the server runs our plugin (`stages.serve_command` says how to start one), `POST /pooling` answers with the same
packed statistics as the teacher in process. Any other vLLM server is asked for `prompt_logprobs` on
`/v1/completions`, which gives the gold and the top-N log-probabilities only.
"""

from __future__ import annotations

import json
import re
import shlex
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import numpy as np

from stages.corpus import Sequence as TokenSequence
from stages.http_client import PASSING, HttpClient, Patience, message_of
from stages.scored_rows import likely_cause, problem_of
from stages.serve_command import Serving
from stages.statistics import StatisticsOptions
from stages.teacher import EngineDescription, Scored, ScoredSequence, Teacher, check_sequences
from stages.vllm_plugin import PackedStatistics
from stages.vllm_pooling import scored_from_packed
from stages.vllm_prompt_logprobs import refuse_beyond_logprobs, scored_from_json
from storage.errors import RunError, UserError
from storage.words import listed_briefly

# What vLLM allows where it is not told otherwise.
_STOCK_TOP_N = 20
# Ids of a probe.
_PROBED = 17
_ANY_LENGTH = 1 << 30
# Characters of a name that a server gives: paths are shorter.
_LONGEST_NAME = 1024


class ServerTeacher(Teacher):
    """Scores on the server at `url` (`http://host:port`, with or without `/v1`).

    serving: how the teacher is served, for the commands in messages; its model is the teacher that is expected there.
    model: its name as served, or as the server loaded it; may be left out where the server has one model, and that is
    called as the teacher is. vocabulary_size: V as expected, which is checked; needed for a server without our pooler,
    which does not tell. concurrency: requests at a time. api_key: sent as a bearer token. without_pooler: what a
    server without our pooler is asked for, if that may be less. may_keep_fewer: it may keep fewer than top_n, down to
    what it allows.

    `options` is what is kept, which may be less than was asked for; `notes` says so, a sentence each.
    `tail_prior_sum` is None: it would cost V numbers per request. Without our pooler also `entropy` is NaN and
    `tail_logmass` is bounded as `stages.vllm_prompt_logprobs` says.

    Raises UserError where nothing answers at `url`, or something other than what was expected. How long sequences may
    be is `check_length`'s, for when that is known.
    """

    def __init__(
        self,
        url: str,
        options: StatisticsOptions,
        serving: Serving,
        *,
        model: str | None = None,
        vocabulary_size: int | None = None,
        concurrency: int = 32,
        api_key: str | None = None,
        patience: Patience | None = None,
        without_pooler: StatisticsOptions | None = None,
        may_keep_fewer: bool = False,
    ) -> None:
        if concurrency < 1:
            raise UserError(f"--server-concurrency {concurrency}: give at least 1")
        self.options = self._asked = options
        self.concurrency = concurrency
        self.notes: tuple[str, ...] = ()
        self._may_keep_fewer = may_keep_fewer
        self._http = HttpClient(url, api_key, patience or Patience())
        self._serving = replace(serving, port=self._http.port)
        try:
            self._choose_model(model)
            self.uses_pooler = self._find_pooler(vocabulary_size)
            if not self.uses_pooler:
                self.options = without_pooler or options
                self._check_completions(vocabulary_size)
            # By which it may choose how positions are encoded.
            self.served_length = self._max_model_len
            version = self._version()
        except BaseException:
            self._http.close()
            raise
        self.description = EngineDescription(
            "server" if self.uses_pooler else "server-prompt-logprobs",
            "as served",
            reason=f"{self._model} at {self._http.url}",
            versions={"vllm": version} if version else {},
        )

    # What the server is

    def _choose_model(self, wanted: str | None) -> None:
        """Take the name to ask for and the ids that the server reads."""
        models = self._ask("GET", "/v1/models").get("data")
        if not isinstance(models, list) or not all(
            isinstance(m, dict) and _is_name(m.get("id")) and (m.get("root") is None or _is_name(m["root"]))
            for m in models
        ):
            raise UserError(f"{self._http.url}: /v1/models does not answer as vLLM does; is this a vLLM server?")
        served = listed_briefly(str(m["id"]) for m in models) or "nothing"
        if wanted is None and len(models) != 1:
            raise UserError(f"{self._http.url} serves {served}; name one of them (--server-model)")
        found = [m for m in models if wanted is None or wanted in (m["id"], m.get("root"))]
        if not found:
            raise UserError(f"{self._http.url} serves {served}, not {wanted}")
        model = found[0]
        name, root = str(model["id"]), model.get("root")
        if wanted is None and not (self._serving.is_called(name) or self._serving.is_called(root)):
            loaded = f" (loaded from {root})" if root not in (None, name) else ""
            raise UserError(
                f"{self._http.url} serves {name}{loaded}, the teacher here is {self._serving.model}; if they are the "
                f"same weights, confirm it with --server-model {shlex.quote(name)}"
            )
        longest = model.get("max_model_len")
        if longest is not None and (type(longest) is not int or longest < 2):
            raise UserError(f"{self._http.url}: /v1/models gives {name} a max_model_len of {repr(longest)[:40]}")
        self._model, self._max_model_len = name, longest
        self._serving = self._serving.as_served(root, name)

    def check_length(self, longest: int) -> None:
        """UserError, with the command that would serve them, where sequences of `longest` ids are too long."""
        if self._max_model_len is None or longest <= self.max_length:
            return
        says = f"{self._http.url}: takes sequences of up to {self.max_length} ids, the longest here has {longest}; "
        if self.uses_pooler:
            raise UserError(f"{says}start it with: {self._serving.with_pooler(self.options, longest)}")
        context = self._serving.context
        if context is not None and longest + 1 > context:
            raise UserError(
                f"{says}a server without our pooler reads one id more, and this teacher {context} at most: lower the "
                f"longest length to {context - 1}, or start it with: {self._serving.with_pooler(self._asked)}"
            )
        raise UserError(f"{says}start it with: {self._serving.stock(self.options.top_n, longest)}")

    @property
    def max_length(self) -> int:
        """Ids of the longest sequence that the server takes."""
        if self._max_model_len is None:
            return _ANY_LENGTH
        # A completion has at least one id, even when nobody wants it.
        return self._max_model_len - (0 if self.uses_pooler else 1)

    def _find_pooler(self, vocabulary_size: int | None) -> bool:
        """Tell whether the model there is ours to pool; UserError for one with other options or vocabulary."""
        probe = [0, 0]
        status, body = self._http.once("POST", "/pooling", self._pooling_body(probe))
        if status != 200:
            said = message_of(body)
            if status in PASSING and "support" not in said:
                raise UserError(f"{self._http.url}/pooling: answers {status} {said}; try again when the server is up")
            self.notes += (
                f"{self._http.url}/pooling answers {status}, so the server runs without our pooler and only gold and "
                "top-N log-probabilities are kept; for all statistics start it, with this package installed there, "
                f"with: {self._serving.with_pooler(self.options)}",
            )
            return False
        try:
            packed = _unpack(body)
        except ValueError:
            raise UserError(
                f"{self._http.url}: serves {self._model} as a pooling model of another kind; start it with: "
                f"{self._serving.with_pooler(self.options)}"
            ) from None
        wanted = self.options if self.options.tail_samples else _without_seed(self.options)
        there = packed.options if packed.options.tail_samples else _without_seed(packed.options)
        if _comparable(wanted) != _comparable(there):
            raise UserError(
                f"{self._http.url}: keeps {_in_words(packed.options)}, asked for {_in_words(self.options)}; ask for "
                f"what it keeps, or start it with: {self._serving.with_pooler(self.options)}"
            )
        if vocabulary_size is not None and packed.vocabulary_size != vocabulary_size:
            raise UserError(
                f"{self._http.url}: {self._model} has a vocabulary of {packed.vocabulary_size} ids, expected "
                f"{vocabulary_size}"
            )
        self.vocabulary_size = packed.vocabulary_size
        sequence = _probe(probe)
        self._check_answer(lambda: scored_from_packed(sequence, packed))
        return True

    def _check_completions(self, vocabulary_size: int | None) -> None:
        """Refuse what `/v1/completions` does not give from a vocabulary of exactly the expected size."""
        try:
            refuse_beyond_logprobs(self.options, f"{self._http.url} (a server without our pooler)")
        except UserError as error:
            raise UserError(f"{error}; for them start it with: {self._serving.with_pooler(self.options)}") from None
        if vocabulary_size is None:
            raise UserError(
                f"{self._http.url}: a server without our pooler does not tell its vocabulary; name the model"
            )
        if not 1 <= self.options.top_n <= vocabulary_size:
            raise UserError(f"--top-n {self.options.top_n}: the teacher's vocabulary has {vocabulary_size} ids")
        self.vocabulary_size = vocabulary_size
        sequence = _probe(_spread_ids(vocabulary_size, self.max_length))
        status, body = self._complete(sequence)
        if status != 200 and "logprobs" in message_of(body).lower():
            self._keep_fewer(message_of(body))
            status, body = self._complete(sequence)
        if status != 200:
            said = message_of(body)
            hint = f"; {vocabulary_size} ids were expected" if "vocab" in said.lower() else ""
            raise UserError(f"{self._http.url}: {self._model} refuses a probe with {status}: {said}{hint}")
        self._check_answer(lambda: scored_from_json(sequence, body, self.options, vocabulary_size))
        status, _ = self._complete(_probe([0, vocabulary_size]))
        if status == 200:
            raise UserError(
                f"{self._http.url}: {self._model} knows id {vocabulary_size}, so its vocabulary is larger than the "
                f"expected {vocabulary_size} ids"
            )

    def _keep_fewer(self, refusal: str) -> None:
        """Lower top_n to what the server's `refusal` allows, where it may be; UserError where not."""
        asked = self.options.top_n
        found = re.search(r"max\D*(\d+)", refusal)
        most = int(found[1]) if found else _STOCK_TOP_N
        if not self._may_keep_fewer or not self.options.min_n <= most < asked:
            limit = f"allows the top {most}" if found else f"refuses a probe ({refusal})"
            raise UserError(
                f"{self._http.url}: {limit}, asked for {asked}; ask for fewer, or start it with: "
                f"{self._serving.stock(asked)}"
            )
        self.options = replace(self.options, top_n=most)
        self.notes += (
            f"the server allows the top {most}, so {most} are kept and not {asked}; for {asked} start it with: "
            f"{self._serving.stock(asked)}",
        )

    def _complete(self, sequence: TokenSequence) -> tuple[int, bytes]:
        return self._http.once("POST", "/v1/completions", self._completion_body(sequence.input_ids.tolist()))

    def _check_answer(self, scored: Callable[[], ScoredSequence]) -> None:
        """UserError where the answer to a probe is none, or cannot be."""
        try:
            problem = problem_of(scored(), self.options, self.vocabulary_size)
        except (ValueError, RunError) as error:
            problem = str(error)
        if problem is not None:
            engine = "server" if self.uses_pooler else "server-prompt-logprobs"
            raise UserError(f"{self._http.url}: answers a probe with what cannot be: {problem}; {likely_cause(engine)}")

    def _version(self) -> str | None:
        status, body = self._http.once("GET", "/version")
        try:
            version = json.loads(body)["version"] if status == 200 else None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return version if _is_name(version) else None

    def _ask(self, method: str, path: str) -> dict[str, Any]:
        """A question at the start: one that stays without an answer is a UserError."""
        status, body = self._http.once(method, path)
        if status != 200:
            hint = "; is --server-url the address of a vLLM server?" if status == 404 else ""
            raise UserError(f"{self._http.url}{path}: answers {status} {message_of(body)}{hint}")
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise UserError(f"{self._http.url}{path}: does not answer in JSON; is this a vLLM server?")
        return answer

    # Scoring

    def score(self, sequences: Sequence[TokenSequence], progress: Callable[[int], None]) -> Scored:
        self.check_length(max((len(s.input_ids) for s in sequences), default=0))
        check_sequences(sequences, self.max_length, self.vocabulary_size)
        results: list[ScoredSequence | None] = [None] * len(sequences)
        stop = threading.Event()
        waiting: dict[Future[ScoredSequence], int] = {}
        upcoming = 0
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="teacher-server") as pool:
            try:
                while upcoming < len(sequences) or waiting:
                    while upcoming < len(sequences) and len(waiting) < 2 * self.concurrency:
                        waiting[pool.submit(self._score_one, sequences[upcoming], stop)] = upcoming
                        upcoming += 1
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        index = waiting.pop(future)
                        results[index] = future.result()
                        progress(len(sequences[index].input_ids))
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            finally:
                # Whoever still waits for an answer must not keep the program from ending.
                self._http.close()
        finished = [scored for scored in results if scored is not None]
        return Scored(finished, None, sum(len(s.top_ids) for s in finished))

    def _score_one(self, sequence: TokenSequence, stop: threading.Event) -> ScoredSequence:
        ids = sequence.input_ids.tolist()
        if self.uses_pooler:
            try:
                packed = self._http.patiently("/pooling", self._pooling_body(ids), stop, _unpack)
            except ValueError as error:
                raise RunError(f"{self._http.url}: {error} (sequence {sequence.sequence_id})") from None
            if packed.vocabulary_size != self.vocabulary_size or packed.options.top_n != self.options.top_n:
                raise RunError(f"{self._http.url}: changed its model or options while it was asked")
            return scored_from_packed(sequence, packed)
        try:
            return self._http.patiently(
                "/v1/completions",
                self._completion_body(ids),
                stop,
                lambda body: scored_from_json(sequence, body, self.options, self.vocabulary_size),
            )
        except ValueError as error:
            raise RunError(f"{self._http.url}: sequence {sequence.sequence_id}: {error}") from None

    def _pooling_body(self, ids: list[int]) -> dict[str, Any]:
        return {
            "model": self._model,
            "task": "token_embed",
            "input": ids,
            "add_special_tokens": False,
            "encoding_format": "bytes",
            "embed_dtype": "float32",
            "endianness": "little",
        }

    def _completion_body(self, ids: list[int]) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": ids,
            "add_special_tokens": False,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self.options.top_n,
        }

    def close(self) -> None:
        self._http.close()


def _is_name(value: object) -> bool:
    """Whether a server may call something so: it goes into messages and files."""
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME and value.isprintable()


def _probe(ids: list[int]) -> TokenSequence:
    return TokenSequence(0, np.array(ids, np.int32), np.ones(len(ids) - 1, bool))


def _spread_ids(vocabulary_size: int, longest: int) -> list[int]:
    """Ids from the first to the last: at several positions, since logits may pass for log-probabilities at one."""
    return np.linspace(0, vocabulary_size - 1, max(2, min(_PROBED, longest))).astype(int).tolist()


def _unpack(body: bytes) -> PackedStatistics:
    if len(body) % 4:
        raise ValueError(f"an answer of {len(body)} bytes is no list of float32")
    # A copy, which may be written to, as torch wants it.
    return PackedStatistics.unpack(np.frombuffer(body, "<f4").astype(np.float32))


def _without_seed(options: StatisticsOptions) -> StatisticsOptions:
    return replace(options, seed=0)


def _comparable(options: StatisticsOptions) -> tuple[object, ...]:
    temperatures = tuple(np.float32(t) for t in options.temperatures)
    adaptive = np.float32(options.tail_epsilon), options.min_n if options.tail_epsilon else 1
    return options.top_n, temperatures, options.tail_samples, options.seed, *adaptive


def _in_words(options: StatisticsOptions) -> str:
    words = f"top {options.top_n}, temperatures {list(options.temperatures)}, {options.tail_samples} tail samples"
    if options.tail_epsilon:
        words += f", tails below {options.tail_epsilon:g} (at least {options.min_n})"
    return words + (f" (seed {options.seed})" if options.tail_samples else "")
