"""A teacher on a vLLM server that already runs, asked over HTTP. Needs no vLLM and no GPU on this side.

Where the server runs our plugin (`server_command` says how to start one), `POST /pooling` answers with the same
packed statistics as the teacher in process. Any other vLLM server is asked for `prompt_logprobs` on
`/v1/completions`, which gives the gold and the top-N log-probabilities only.

Only the standard library talks HTTP here: persistent connections, one per thread.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import shlex
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from stages.corpus import Sequence as TokenSequence
from stages.statistics import StatisticsOptions
from stages.teacher import EngineDescription, Scored, ScoredSequence, Teacher, check_sequences
from stages.vllm_plugin import CONFIG_KEY, PackedStatistics, options_to_config, statistics_architecture
from stages.vllm_pooling import scored_from_packed
from stages.vllm_prompt_logprobs import refuse_beyond_logprobs, scored_from_logprobs
from storage.errors import RunError, UserError

# Worth another try: the server is busy, restarting, or behind a proxy that is.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 30.0  # seconds between two tries
# What vLLM writes into JSON for a log-probability of -inf.
_JSON_MINUS_INFINITY = -9999.0


def server_command(model: str, architecture: str, options: StatisticsOptions) -> str:
    """The shell command that serves `model` with our pooler; `architecture` as in the model's config.json."""
    overrides = {"architectures": [statistics_architecture(architecture), architecture], "head_dtype": "float32"}
    pooler = {"task": "token_embed", "tok_pooling_type": "ALL", "seq_pooling_type": "LAST"}
    command = ["vllm", "serve", model, "--runner", "pooling", "--no-enable-prefix-caching"]
    command += ["--hf-overrides", json.dumps(overrides), "--pooler-config", json.dumps(pooler)]
    command += ["--additional-config", json.dumps({CONFIG_KEY: options_to_config(options)})]
    return shlex.join(command)


@dataclass(frozen=True)
class Patience:
    """How long to wait for the server. Seconds; `attempts` per request, the first one included."""

    attempts: int = 6
    timeout: float = 600.0  # of one answer
    connect_timeout: float = 10.0  # of the questions at the start
    first_wait: float = 0.5  # doubled after each try


class ServerTeacher(Teacher):
    """Scores on the server at `url` (`http://host:port`, with or without `/v1`).

    max_length: ids of the longest sequence to come. model: its name as served, or as the server loaded it; may be
    left out where the server has one model. vocabulary_size: V as expected, which is checked; needed for a server
    without our pooler, which does not tell. concurrency: requests at a time. api_key: sent as a bearer token.

    `tail_prior_sum` is None: it would cost V numbers per request. Without our pooler also `entropy` is NaN and
    `tail_logmass` is bounded as `stages.vllm_prompt_logprobs` says.

    Raises UserError where nothing answers at `url`, or something other than what was expected.
    """

    def __init__(
        self,
        url: str,
        options: StatisticsOptions,
        *,
        max_length: int,
        model: str | None = None,
        vocabulary_size: int | None = None,
        concurrency: int = 32,
        api_key: str | None = None,
        patience: Patience | None = None,
        without_pooler: StatisticsOptions | None = None,
    ) -> None:
        if concurrency < 1:
            raise UserError(f"--server-concurrency {concurrency}: give at least 1")
        self.options = options
        self.max_length = max_length
        self.concurrency = concurrency
        self._http = _Http(url, api_key, patience or Patience())
        try:
            self._model, longest = self._choose_model(model)
            self.uses_pooler = self._find_pooler(vocabulary_size)
            if not self.uses_pooler:
                self.options = without_pooler or options
                self._check_completions(vocabulary_size)
            # A completion has at least one id, even when nobody wants it.
            room = 0 if self.uses_pooler else 1
            if longest is not None and max_length + room > longest:
                raise UserError(
                    f"{self._http.url}: takes sequences of up to {longest - room} ids, the longest here has "
                    f"{max_length}; restart it with --max-model-len {max_length + room}"
                )
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

    def _choose_model(self, wanted: str | None) -> tuple[str, int | None]:
        """(name to ask for, ids it takes)"""
        models = self._ask("GET", "/v1/models").get("data")
        if not isinstance(models, list) or not all(isinstance(m, dict) and "id" in m for m in models):
            raise UserError(f"{self._http.url}: /v1/models does not answer as vLLM does; is this a vLLM server?")
        served = ", ".join(str(m["id"]) for m in models) or "nothing"
        if wanted is None and len(models) != 1:
            raise UserError(f"{self._http.url} serves {served}; name one of them")
        for model in models:
            if wanted is None or wanted in (model["id"], model.get("root")):
                longest = model.get("max_model_len")
                return str(model["id"]), int(longest) if longest is not None else None
        raise UserError(f"{self._http.url} serves {served}, not {wanted}")

    def _find_pooler(self, vocabulary_size: int | None) -> bool:
        """Whether the model there is ours to pool; raises UserError for one with other options or vocabulary."""
        status, body = self._http.once("POST", "/pooling", self._pooling_body([0, 0]))
        if status != 200:
            return False
        try:
            packed = _unpack(body)
        except ValueError:
            raise UserError(
                f"{self._http.url}: serves {self._model} as a pooling model of another kind; start it with our "
                "pooler, or as a generating model"
            ) from None
        wanted = self.options if self.options.tail_samples else _without_seed(self.options)
        there = packed.options if packed.options.tail_samples else _without_seed(packed.options)
        if _comparable(wanted) != _comparable(there):
            raise UserError(
                f"{self._http.url}: keeps {_in_words(packed.options)}, asked for {_in_words(self.options)}; restart it "
                f"with --additional-config '{json.dumps({CONFIG_KEY: options_to_config(self.options)})}'"
            )
        if vocabulary_size is not None and packed.vocabulary_size != vocabulary_size:
            raise UserError(
                f"{self._http.url}: {self._model} has a vocabulary of {packed.vocabulary_size} ids, expected "
                f"{vocabulary_size}"
            )
        self.vocabulary_size = packed.vocabulary_size
        return True

    def _check_completions(self, vocabulary_size: int | None) -> None:
        """That `/v1/completions` gives what is asked for, from a vocabulary of exactly the expected size."""
        refuse_beyond_logprobs(self.options, f"{self._http.url} (a server without our pooler)")
        if vocabulary_size is None:
            raise UserError(
                f"{self._http.url}: a server without our pooler does not tell its vocabulary; name the model"
            )
        if not 1 <= self.options.top_n <= vocabulary_size:
            raise UserError(f"--top-n {self.options.top_n}: the teacher's vocabulary has {vocabulary_size} ids")
        self.vocabulary_size = vocabulary_size
        status, body = self._http.once("POST", "/v1/completions", self._completion_body([0, vocabulary_size - 1]))
        if status != 200:
            hint = ""
            if "logprobs" in _message(body).lower():
                hint = f"; restart it with --max-logprobs {self.options.top_n}"
            elif "vocab" in _message(body).lower():
                hint = f"; {vocabulary_size} ids were expected"
            raise UserError(f"{self._http.url}: {self._model} refuses a probe with {status}: {_message(body)}{hint}")
        self._parse_completion(TokenSequence(-1, np.array([0, vocabulary_size - 1], np.int32), np.ones(1, bool)), body)
        status, _ = self._http.once("POST", "/v1/completions", self._completion_body([0, vocabulary_size]))
        if status == 200:
            raise UserError(
                f"{self._http.url}: {self._model} knows id {vocabulary_size}, so its vocabulary is larger than the "
                f"expected {vocabulary_size} ids"
            )

    def _version(self) -> str | None:
        status, body = self._http.once("GET", "/version")
        try:
            return str(json.loads(body)["version"]) if status == 200 else None
        except (ValueError, KeyError, TypeError):
            return None

    def _ask(self, method: str, path: str) -> dict[str, Any]:
        """A question at the start: one that stays without an answer is a UserError."""
        status, body = self._http.once(method, path)
        if status in (401, 403):
            raise UserError(f"{self._http.url}: refuses the API key ({status})")
        if status != 200:
            raise UserError(f"{self._http.url}{path}: answers {status} {_message(body)}")
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise UserError(f"{self._http.url}{path}: does not answer in JSON; is this a vLLM server?")
        return answer

    # Scoring

    def score(self, sequences: Sequence[TokenSequence], progress: Callable[[int], None]) -> Scored:
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
            body = self._http.patiently("/pooling", self._pooling_body(ids), stop)
            try:
                packed = _unpack(body)
            except ValueError as error:
                raise RunError(f"{self._http.url}: {error} (sequence {sequence.sequence_id})") from None
            if packed.vocabulary_size != self.vocabulary_size or packed.options.top_n != self.options.top_n:
                raise RunError(f"{self._http.url}: changed its model or options while it was asked")
            return scored_from_packed(sequence, packed)
        return self._parse_completion(
            sequence, self._http.patiently("/v1/completions", self._completion_body(ids), stop)
        )

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

    def _parse_completion(self, sequence: TokenSequence, body: bytes) -> ScoredSequence:
        """One dictionary per id after the first: N or N+1 ids (the gold among them), each with its log-probability."""
        golds = sequence.input_ids[1:].tolist()
        top_n = self.options.top_n
        ids = np.empty((len(golds), top_n), np.int32)
        top = np.empty((len(golds), top_n), np.float32)
        gold = np.empty(len(golds), np.float32)
        try:
            positions = json.loads(body)["choices"][0]["prompt_logprobs"][1:]
            for row, (token, position) in enumerate(zip(golds, positions, strict=True)):
                gold[row] = position[str(token)]["logprob"]
                # The gold token is there whatever its rank; the rank tells whether it is among the N.
                ranked = sorted(((e["rank"], -e["logprob"], int(i)) for i, e in position.items()))[:top_n]
                ids[row] = [i for _, _, i in ranked]
                top[row] = [-negative for _, negative, _ in ranked]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise RunError(
                f"{self._http.url}: the log-probabilities of sequence {sequence.sequence_id} are not what vLLM sends"
            ) from None
        order = np.argsort(-top, axis=1, kind="stable")
        ids, top = np.take_along_axis(ids, order, 1), np.take_along_axis(top, order, 1)
        for values in (top, gold):
            values[values <= _JSON_MINUS_INFINITY] = -1e4
        return scored_from_logprobs(sequence, ids, top, gold, self.options, self.vocabulary_size)

    def close(self) -> None:
        self._http.close()


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


def _message(body: bytes) -> str:
    """What an error answer says, in one short line."""
    text = body.decode("utf-8", "replace")
    try:
        answer = json.loads(text)
        answer = answer.get("error", answer) if isinstance(answer, dict) else answer
        text = str(answer.get("message", answer.get("detail", text)) if isinstance(answer, dict) else answer)
    except ValueError:
        pass
    return " ".join(text.split())[:300]


class _Http:
    """Requests to one server, with a connection per thread that stays open between them."""

    def __init__(self, url: str, api_key: str | None, patience: Patience) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise UserError(f"--server-url {url}: expected http://host:port")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{self._prefix}"
        self._headers = {"Content-Type": "application/json", "Accept": "*/*"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.patience = patience
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: set[http.client.HTTPConnection] = set()

    def once(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """One question at the start, asked again only while the server is busy. Raises UserError without an answer."""
        status, answer = 0, b""
        # The first forward pass of a server may compile.
        timeout = self.patience.connect_timeout if method == "GET" else self.patience.timeout
        for attempt in range(3):
            try:
                status, answer, _ = self._exchange(method, path, body, timeout)
            except TimeoutError:
                raise UserError(
                    f"{self.url}{path}: no answer within {timeout:g} s; is it up, and is this a vLLM server?"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                raise UserError(
                    f"{self.url}: no server answers ({_cause(error)}); start it, or correct --server-url"
                ) from None
            if status not in _PASSING:
                break
            time.sleep(min(self.patience.first_wait * 2**attempt, _LONGEST_WAIT))
        return status, answer

    def patiently(self, path: str, body: dict[str, Any], stop: threading.Event) -> bytes:
        """The body of a successful POST. Raises RunError after the last attempt, UserError for a refusal."""
        trouble = ""
        for attempt in range(self.patience.attempts):
            if stop.is_set():
                raise RunError("stopped")
            retry_after = None
            try:
                status, answer, retry_after = self._exchange("POST", path, body, self.patience.timeout)
            except TimeoutError:
                trouble = f"no answer within {self.patience.timeout:g} s"
            except (OSError, http.client.HTTPException) as error:
                trouble = _cause(error)
            else:
                if status == 200:
                    return answer
                trouble = f"{status} {_message(answer)}".strip()
                if status not in _PASSING:
                    raise UserError(f"{self.url}{path}: refuses a sequence with {trouble}")
            if attempt + 1 < self.patience.attempts:
                pause = min(self.patience.first_wait * 2**attempt, _LONGEST_WAIT) * random.uniform(0.75, 1.25)
                stop.wait(max(pause, min(retry_after or 0.0, _LONGEST_WAIT)))
        raise RunError(
            f"{self.url}: still failing after {self.patience.attempts} attempts (last: {trouble}); what is finished is "
            "kept: start the same command again to go on"
        )

    def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None, timeout: float
    ) -> tuple[int, bytes, float | None]:
        """(status, body, seconds to wait before the next try where the server says so)"""
        connection = self._connection(timeout)
        try:
            payload = None if body is None else json.dumps(body, separators=(",", ":")).encode()
            connection.request(method, self._prefix + path, payload, self._headers)
            response = connection.getresponse()
            answer = response.read()
        except BaseException:
            self._drop(connection)
            raise
        if response.will_close:
            self._drop(connection)
        try:
            retry_after = float(response.headers.get("Retry-After", ""))
        except ValueError:
            retry_after = None
        return response.status, answer, retry_after

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
            connection = kind(self._host, self._port, timeout=timeout)
            self._local.connection = connection
            with self._lock:
                self._open.add(connection)
        connection.timeout = timeout
        if connection.sock is not None:
            connection.sock.settimeout(timeout)
        return connection

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        connection.close()
        self._local.connection = None
        with self._lock:
            self._open.discard(connection)

    def close(self) -> None:
        """Close every connection; a thread that waits on one gets an error at once."""
        with self._lock:
            connections, self._open = list(self._open), set()
        for connection in connections:
            sock = connection.sock
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()


def _cause(error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())[:200]
