"""What a vLLM server looks like from outside, on loopback, and what may be wrong with one. Its model is a table."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import torch

from stages.corpus import Sequence
from stages.statistics import RowStatistics, StatisticsOptions, row_statistics, sample_uniforms
from stages.vllm_plugin import Chunk, StatisticsCollector, _header
from tests.http_server import LocalServer

LONGEST = 64


class Bigram:
    """A language model that looks at one id: row i of a table is what follows id i."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        table = np.random.default_rng(5).standard_normal((vocabulary, vocabulary))
        self.table = torch.from_numpy(table.astype(np.float32) * 3)

    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.table[torch.tensor(ids)]

    def packed(self, ids: list[int], options: StatisticsOptions) -> bytes:
        collector = StatisticsCollector(lambda h: h.clone(), options, self.vocabulary)
        ((dense, entries),) = collector.collect(self.logits(ids), [Chunk(np.array(ids), 0, len(ids))])
        header = np.array(_header(options, self.vocabulary, len(dense), len(entries)), "<f4")
        return header.tobytes() + dense.numpy().tobytes() + entries.numpy().tobytes()

    def prompt_logprobs(self, ids: list[int], top_n: int, raw: float | None = None) -> list[Any]:
        """As vLLM writes them: the id itself first, then the top-N, in one dictionary. raw: logits, plus this."""
        answer: list[Any] = [None]
        logits = self.logits(ids)[:-1]
        scores = torch.log_softmax(logits, 1) if raw is None else logits + raw
        for row, gold in zip(scores, ids[1:], strict=True):
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


class VllmDouble:
    """A server with our pooler, which keeps `pooled`, or without (None).

    `trouble(n)` may spoil the n-th scoring request, `spoil` the `prompt_logprobs` of each. raw: it answers logits, plus
    this. key: it wants one. most: top-N that it allows. refusals: path -> how it is refused, headers with it.
    """

    def __init__(self, pooled: StatisticsOptions | None, model: Bigram) -> None:
        self.pooled, self.model = pooled, model
        self.models: list[dict[str, Any]] = [{"id": "tiny", "root": "/models/tiny", "max_model_len": LONGEST}]
        self.trouble: Callable[[int], str] = lambda n: ""
        self.spoil: Callable[[list[Any]], object] = lambda positions: positions
        self.raw: float | None = None
        self.key: str | None = None
        self.most = 20
        self.refusals: dict[str, tuple[int, str, dict[str, str]]] = {}
        self.refusal = "Requested prompt logprobs of {}, which is greater than max allowed: {} (parameter=x, value=1)"
        self.requests = 0
        self.inside = self.most_inside = 0
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.lock = threading.Lock()
        self.http = LocalServer(self.handler())
        self.url = self.http.url

    def handler(self) -> type[BaseHTTPRequestHandler]:
        double = self

        class Handler(_Handler):
            server_double = double

        return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_double: VllmDouble

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def answer(self, status: int, body: bytes, promise: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if promise is None else promise))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def json(self, status: int, body: Any) -> None:
        self.answer(status, json.dumps(body).encode())

    def is_refused(self) -> bool:
        double = self.server_double
        double.headers.append(dict(self.headers))
        double.paths.append(self.path)
        if double.key is not None and self.headers.get("Authorization") != f"Bearer {double.key}":
            self.json(401, {"error": "Unauthorized"})
            return True
        if self.path in double.refusals:
            status, body, headers = double.refusals[self.path]
            self.answer(status, body.encode(), None, **headers)
            return True
        return False

    def do_GET(self) -> None:
        if self.is_refused():
            return
        if self.path.endswith("/v1/models"):
            self.json(200, {"object": "list", "data": self.server_double.models})
        elif self.path.endswith("/version"):
            self.json(200, {"version": "0.99"})
        else:
            self.json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.is_refused():
            return
        double = self.server_double
        with double.lock:
            double.requests += 1
            trouble = double.trouble(double.requests)
            double.inside += 1
            double.most_inside = max(double.most_inside, double.inside)
        try:
            self.score(body, body.get("input", body.get("prompt")), trouble)
        finally:
            with double.lock:
                double.inside -= 1

    def score(self, body: dict[str, Any], ids: list[int], trouble: str) -> None:
        double = self.server_double
        if trouble == "500":
            return self.json(500, {"error": {"message": "EngineCore\nencountered an issue"}})
        if trouble == "400":
            return self.json(400, {"error": {"message": "This model's maximum context length is 3"}})
        if trouble in ("slow", "stuck"):
            time.sleep(1.5 if trouble == "slow" else 15)
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
        if double.pooled is not None and self.path.endswith("/pooling"):
            assert body["encoding_format"] == "bytes"
            return self.answer(200, double.model.packed(ids, double.pooled))
        if double.pooled is None and self.path.endswith("/v1/completions"):
            top_n = body["prompt_logprobs"]
            if max(ids) >= double.model.vocabulary:
                return self.json(400, {"error": {"message": f"Token id {max(ids)} is out of vocabulary"}})
            if top_n > double.most:
                return self.json(400, {"error": {"message": double.refusal.format(top_n, double.most)}})
            raw = 0.0 if trouble == "raw" else double.raw
            positions = double.spoil(double.model.prompt_logprobs(ids, top_n, raw))
            return self.json(200, {"choices": [{"prompt_logprobs": positions}]})
        return self.json(404, {"detail": "Not Found"})
