"""A teacher behind HTTP: a server on the loopback that misbehaves on demand. Real servers: `test_vllm_server`."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import pytest
import torch

from stages.corpus import Sequence
from stages.statistics import RowStatistics, StatisticsOptions, row_statistics, sample_uniforms
from stages.teacher import Scored
from stages.teacher_server import Patience, ServerTeacher
from stages.vllm_plugin import Chunk, StatisticsCollector, _header
from storage.errors import RunError, UserError
from tests.http_server import LocalServer

VOCABULARY, LONGEST = 211, 64
POOLED = StatisticsOptions(6, (2.0,), 2, seed=11)
PLAIN = StatisticsOptions(6)
IMPATIENT = Patience(attempts=4, timeout=0.6, connect_timeout=0.6, first_wait=0.01)


def nothing(_: int) -> None:
    """No progress wanted."""


def make_sequences(lengths: list[int]) -> list[Sequence]:
    generator = np.random.default_rng(0)
    return [
        Sequence(i, generator.integers(0, VOCABULARY, n).astype(np.int32), generator.random(n - 1) < 0.6)
        for i, n in enumerate(lengths)
    ]


SEQUENCES = make_sequences([2, LONGEST - 1, 20, 7, 33, 5, 40, 12])


class Bigram:
    """A language model that looks at one id: row i of a table is what follows id i."""

    table = torch.from_numpy(np.random.default_rng(5).standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32) * 3)

    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.table[torch.tensor(ids)]

    def packed(self, ids: list[int], options: StatisticsOptions) -> bytes:
        collector = StatisticsCollector(lambda h: h.clone(), options, VOCABULARY)
        ((dense, entries),) = collector.collect(self.logits(ids), [Chunk(np.array(ids), 0, len(ids))])
        header = np.array(_header(options, VOCABULARY, len(dense), len(entries)), "<f4")
        return header.tobytes() + dense.numpy().tobytes() + entries.numpy().tobytes()

    def prompt_logprobs(self, ids: list[int], top_n: int) -> list[Any]:
        """As vLLM writes them: the id itself first, then the top-N, in one dictionary."""
        answer: list[Any] = [None]
        for row, gold in zip(torch.log_softmax(self.logits(ids), 1)[:-1], ids[1:], strict=True):
            order = torch.argsort(row, descending=True, stable=True).tolist()
            entries = {str(gold): {"logprob": float(row[gold]), "rank": order.index(gold) + 1, "decoded_token": "x"}}
            for rank, token in enumerate(order[:top_n]):
                entries[str(token)] = {"logprob": float(row[token]), "rank": rank + 1, "decoded_token": "x"}
            answer.append(entries)
        return answer

    def expected(self, sequence: Sequence, options: StatisticsOptions) -> RowStatistics:
        return row_statistics(
            self.logits(sequence.input_ids.tolist())[:-1].clone(),
            torch.from_numpy(sequence.input_ids[1:].astype(np.int64)),
            options,
            uniforms=torch.from_numpy(sample_uniforms(sequence.input_ids, options)),
        )


class Server:
    """What a vLLM server looks like from outside. `trouble(n)` may spoil the n-th scoring request."""

    def __init__(self, pooled: StatisticsOptions | None) -> None:
        self.pooled = pooled
        self.models = [{"id": "tiny", "root": "/models/tiny", "max_model_len": LONGEST}]
        self.trouble: Callable[[int], str] = lambda n: ""
        self.requests = 0
        self.inside = self.most_inside = 0
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.http = LocalServer(self.handler())
        self.url = self.http.url

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: Any) -> None:
                """Silent."""

            def answer(self, status: int, body: bytes, promise: int | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if promise is None else promise))
                self.end_headers()
                self.wfile.write(body)

            def json(self, status: int, body: Any) -> None:
                self.answer(status, json.dumps(body).encode())

            def do_GET(self) -> None:
                server.headers.append(dict(self.headers))
                if self.path == "/v1/models":
                    self.json(200, {"object": "list", "data": server.models})
                elif self.path == "/version":
                    self.json(200, {"version": "0.99"})
                else:
                    self.json(404, {"detail": "Not Found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                ids = body.get("input", body.get("prompt"))
                with server.lock:
                    server.requests += 1
                    trouble = server.trouble(server.requests)
                    server.inside += 1
                    server.most_inside = max(server.most_inside, server.inside)
                try:
                    self.score(body, ids, trouble)
                finally:
                    with server.lock:
                        server.inside -= 1

            def score(self, body: dict[str, Any], ids: list[int], trouble: str) -> None:
                if trouble == "500":
                    return self.json(500, {"error": {"message": "EngineCore\nencountered an issue"}})
                if trouble == "400":
                    return self.json(400, {"error": {"message": "This model's maximum context length is 3"}})
                if trouble == "slow":
                    time.sleep(1.5)
                if trouble == "reset":
                    # Closing with this option set sends a reset.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return None
                if trouble == "half":
                    self.answer(200, b"x" * 40, promise=4000)
                    self.close_connection = True
                    return None
                if trouble == "garbage":
                    return self.answer(200, b"[1, 2, 3, 4]")
                if server.pooled is not None and self.path == "/pooling":
                    assert body["encoding_format"] == "bytes"
                    return self.answer(200, BIGRAM.packed(ids, server.pooled))
                if server.pooled is None and self.path == "/v1/completions":
                    if max(ids) >= VOCABULARY:
                        return self.json(400, {"error": {"message": f"Token id {max(ids)} is out of vocabulary"}})
                    if body["prompt_logprobs"] > 20:
                        return self.json(400, {"error": {"message": "prompt logprobs of 64, greater than max: 20"}})
                    choice = {"prompt_logprobs": BIGRAM.prompt_logprobs(ids, body["prompt_logprobs"])}
                    return self.json(200, {"choices": [choice]})
                return self.json(404, {"detail": "Not Found"})

        return Handler


BIGRAM = Bigram()


@pytest.fixture(params=["pooling", "completions"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    server = Server(POOLED if request.param == "pooling" else None)
    yield server
    server.http.close()


@pytest.fixture
def pooling() -> Iterator[Server]:
    server = Server(POOLED)
    yield server
    server.http.close()


@pytest.fixture
def completions() -> Iterator[Server]:
    server = Server(None)
    yield server
    server.http.close()


def connect(server: Server, **options: Any) -> ServerTeacher:
    wanted = PLAIN if server.pooled is None else POOLED
    given = {"max_length": LONGEST - 1, "vocabulary_size": VOCABULARY, "patience": IMPATIENT, "concurrency": 3}
    return ServerTeacher(server.url, options.pop("wanted", wanted), **{**given, **options})


def assert_scored(scored: Scored, sequences: list[Sequence], options: StatisticsOptions, *, pooled: bool) -> None:
    assert [s.sequence.sequence_id for s in scored.sequences] == [s.sequence_id for s in sequences]
    assert scored.tail_prior_sum is None
    assert scored.stored_positions == sum(int(s.loss_mask.sum()) for s in sequences)
    for sequence, found in zip(sequences, scored.sequences, strict=True):
        wanted, mask = BIGRAM.expected(sequence, options), sequence.loss_mask
        np.testing.assert_allclose(found.gold_logprob, wanted.gold_logprob, atol=1e-5)
        np.testing.assert_allclose(found.tail_logmass, wanted.tail_logmass, atol=1e-4)
        np.testing.assert_array_equal(found.top_ids, wanted.top_ids.numpy()[mask])
        np.testing.assert_allclose(found.top_logprobs, wanted.top_logprobs.numpy()[mask], atol=1e-5)
        if pooled:
            np.testing.assert_allclose(found.entropy, wanted.entropy, atol=1e-5)
            np.testing.assert_allclose(found.tail_logmass_at, wanted.tail_logmass_at, atol=1e-5)
            np.testing.assert_array_equal(found.tail_samples, wanted.tail_samples.numpy()[mask])
        else:
            assert np.isnan(found.entropy).all()


def test_scores(server: Server) -> None:
    teacher = connect(server)
    progress: list[int] = []
    scored = teacher.score(SEQUENCES, progress.append)
    assert_scored(scored, SEQUENCES, teacher.options, pooled=teacher.uses_pooler)
    assert sum(progress) == sum(len(s.input_ids) for s in SEQUENCES)
    assert teacher.vocabulary_size == VOCABULARY
    assert teacher.description.name == ("server" if teacher.uses_pooler else "server-prompt-logprobs")
    assert teacher.description.versions == {"vllm": "0.99"}
    assert_scored(teacher.score(SEQUENCES, nothing), SEQUENCES, teacher.options, pooled=teacher.uses_pooler)
    assert teacher.score([], nothing).sequences == []
    teacher.close()


def test_asks_several_at_a_time_and_no_more(pooling: Server) -> None:
    teacher = connect(pooling, concurrency=4, patience=Patience(timeout=10))
    pooling.trouble = lambda n: "slow" if n < 6 else ""
    pooling.most_inside = 0
    assert_scored(teacher.score(SEQUENCES, nothing), SEQUENCES, POOLED, pooled=True)
    assert pooling.most_inside == 4


@pytest.mark.parametrize("trouble", ["500", "reset", "half", "slow"])
def test_passing_trouble_is_waited_out(server: Server, trouble: str) -> None:
    teacher = connect(server)
    begin = server.requests
    server.trouble = lambda n: trouble if (n - begin) % 4 == 1 else ""
    assert_scored(teacher.score(SEQUENCES, nothing), SEQUENCES, teacher.options, pooled=teacher.uses_pooler)
    assert server.requests - begin > len(SEQUENCES)


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ("500", "500 EngineCore encountered an issue"),
        ("reset", "last: "),
        ("half", "last: "),
        ("slow", "no answer within"),
    ],
)
def test_lasting_trouble_is_a_run_error(server: Server, trouble: str, told: str) -> None:
    teacher = connect(server)
    begin = server.requests
    server.trouble = lambda n: trouble if n > begin + 3 else ""
    with pytest.raises(RunError, match=told) as caught:
        teacher.score(SEQUENCES, nothing)
    assert "after 4 attempts" in str(caught.value)
    assert "start the same command again to go on" in str(caught.value)
    assert "\n" not in str(caught.value)
    server.trouble = lambda n: ""
    assert_scored(teacher.score(SEQUENCES, nothing), SEQUENCES, teacher.options, pooled=teacher.uses_pooler)


def test_a_server_that_dies_half_way(pooling: Server) -> None:
    teacher = connect(pooling)

    def stop(_: int) -> None:
        pooling.http.server_close()
        pooling.trouble = lambda n: "reset"

    with pytest.raises(RunError, match="start the same command again to go on"):
        teacher.score(SEQUENCES * 4, stop)


def test_a_refused_sequence_is_not_tried_again(server: Server) -> None:
    teacher = connect(server)
    begin = server.requests
    server.trouble = lambda n: "400"
    with pytest.raises(UserError, match="400 This model's maximum context length") as caught:
        teacher.score(SEQUENCES[:1], nothing)
    assert caught.type is UserError
    assert server.requests == begin + 1


def test_an_answer_of_another_kind(server: Server) -> None:
    teacher = connect(server)
    server.trouble = lambda n: "garbage"
    with pytest.raises(RunError, match="not"):
        teacher.score(SEQUENCES[:1], nothing)


def test_an_interrupt_does_not_wait_for_answers(pooling: Server) -> None:
    teacher = connect(pooling, patience=Patience(timeout=60))
    begin = pooling.requests
    pooling.trouble = lambda n: "" if n == begin + 1 else "slow"

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        teacher.score(SEQUENCES, interrupt)
    assert time.monotonic() - started < 1.0


# Before any sequence is sent


def test_a_server_that_is_down(pooling: Server) -> None:
    pooling.http.close()
    with pytest.raises(UserError, match=r"no server answers .*; start it, or correct --server-url") as caught:
        connect(pooling)
    assert caught.type is UserError
    assert "\n" not in str(caught.value)


def test_a_port_where_nobody_speaks() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UserError, match=r"no answer within 0\.6 s"):
            ServerTeacher(url, PLAIN, max_length=8, patience=IMPATIENT)


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:port", ""])
def test_no_url(url: str) -> None:
    with pytest.raises(UserError, match="expected http://host:port"):
        ServerTeacher(url, PLAIN, max_length=8)


def test_another_model(server: Server) -> None:
    for name in ("tiny", "/models/tiny"):
        connect(server, model=name).close()
    with pytest.raises(UserError, match="serves tiny, not large"):
        connect(server, model="large")
    server.models.append({"id": "second"})
    with pytest.raises(UserError, match="serves tiny, second; name one"):
        connect(server)
    server.models[:] = []
    with pytest.raises(UserError, match="serves nothing"):
        connect(server, model="large")


def test_no_vllm_server(pooling: Server) -> None:
    pooling.models = [{"name": "x"}]
    with pytest.raises(UserError, match="is this a vLLM server"):
        connect(pooling)


def test_another_vocabulary(server: Server) -> None:
    for expected in (VOCABULARY - 1, VOCABULARY + 1):
        with pytest.raises(UserError, match=str(expected)):
            connect(server, vocabulary_size=expected)


def test_other_options(pooling: Server) -> None:
    with pytest.raises(UserError, match=r"keeps top 6.*asked for top 7.*--additional-config"):
        connect(pooling, wanted=StatisticsOptions(7, (2.0,), 2, seed=11))
    with pytest.raises(UserError, match=r"seed 11.*seed 12"):
        connect(pooling, wanted=StatisticsOptions(6, (2.0,), 2, seed=12))


def test_too_short_a_server(server: Server) -> None:
    # A completion has one id more.
    limit = LONGEST if server.pooled is not None else LONGEST - 1
    connect(server, max_length=limit).close()
    with pytest.raises(UserError, match=f"up to {limit} ids, the longest here has {limit + 1}"):
        connect(server, max_length=limit + 1)


def test_what_log_probabilities_cannot_give(completions: Server) -> None:
    with pytest.raises(UserError, match=r"without our pooler.*cannot give --temperature .* and --tail-samples"):
        connect(completions, wanted=POOLED)
    with pytest.raises(UserError, match="restart it with --max-logprobs 64"):
        connect(completions, wanted=StatisticsOptions(64))
    with pytest.raises(UserError, match="does not tell its vocabulary"):
        connect(completions, vocabulary_size=None)


def test_a_key_is_sent(pooling: Server) -> None:
    connect(pooling, api_key="open-sesame").close()
    assert pooling.headers[-1]["Authorization"] == "Bearer open-sesame"
