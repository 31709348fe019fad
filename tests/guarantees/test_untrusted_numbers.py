"""A server of somebody else: a shard holds what can be true, or none is written. Loopback alone."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import teacher_server
from stages.http_client import Patience
from stages.statistics import StatisticsOptions
from stages.vllm_plugin import _FIXED_HEADER
from tests.conftest import VOCABULARY, Finished, Tiny
from tests.vllm_double import Bigram, VllmDouble

TOP_N, SAMPLES = 8, 4
POOLED = StatisticsOptions(TOP_N, (), SAMPLES)
ODD = [
    math.nan,
    math.inf,
    -math.inf,
    1e30,
    0.5,
    1e-3,
    -1.0,
    -1e4,
    0.0,
    7.5,
    float(VOCABULARY),
    -2.0,
    float(1 << 24),
    1e-40,
]


class Packed(Bigram):
    """Answers as it should, but for what `spoil` makes of the numbers once the probe is over."""

    spoil: Callable[[np.ndarray], None] | None = None

    def packed(self, ids: list[int], options: StatisticsOptions) -> bytes:
        numbers = np.frombuffer(super().packed(ids, options), "<f4").copy()
        if len(ids) > 2 and self.spoil is not None:
            self.spoil(numbers)
        return numbers.tobytes()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_server, "Patience", functools.partial(Patience, attempts=2, first_wait=0.01))


@pytest.fixture
def ask(tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Finished]) -> Iterator[Callable[..., Finished]]:
    rows = [{"input_ids": [(7 * row + place) % VOCABULARY for place in range(30 - row)]} for row in range(3)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    servers: list[VllmDouble] = []
    runs = iter(range(10**6))

    def call(server: VllmDouble, *more: object) -> Finished:
        server.models[0].setdefault("root", str(tiny.teacher))
        if server.models[0]["root"] == "/models/tiny":
            server.models[0]["root"] = str(tiny.teacher)
        servers.append(server)
        output = tmp_path / f"cache-{next(runs)}"
        words = ["cache-teacher", "--teacher", tiny.teacher, "--dataset", tmp_path / "corpus.jsonl", "--output", output]
        words += ["--processes", 1, "--server-url", server.url, "--server-concurrency", 1, "--top-n", TOP_N, *more]
        ended = pipeline(*words)
        assert "internal" not in ended.err and "Traceback" not in ended.err, ended.err
        said = [line for line in ended.err.splitlines() if line.startswith("error")]
        assert len(said) == (ended.code != 0) and all(line.isprintable() and len(line) < 1200 for line in said), said
        if ended.code:
            assert not list(output.glob("shards/*")), said
        else:
            assert pipeline("verify", output).code == 0
        return ended

    yield call
    for server in {id(server): server for server in servers}.values():
        server.http.close()


def where() -> dict[str, Callable[[np.ndarray], int]]:
    """Names of places in an answer, each with a function that finds it."""
    start, dense = _FIXED_HEADER, 3

    def entry(column: int) -> Callable[[np.ndarray], int]:
        return lambda numbers: start + dense * ((len(numbers) - start) // (dense + 2 * TOP_N + SAMPLES)) + column

    return {
        "gold": lambda numbers: start, "tail": lambda numbers: start + 1, "entropy": lambda numbers: start + 2,
        "first id": entry(0), "last id": entry(TOP_N - 1), "first logprob": entry(TOP_N),
        "last logprob": entry(2 * TOP_N - 1), "sample": entry(2 * TOP_N),
    }  # fmt: skip


@pytest.mark.parametrize("place", where())
def test_a_packed_number_that_cannot_be_is_refused(place: str, ask: Callable[..., Finished]) -> None:
    model = Packed(VOCABULARY)
    server = VllmDouble(POOLED, model)
    refused = 0
    assert ask(server, "--tail-samples", SAMPLES).code == 0
    for value in ODD:
        model.spoil = lambda numbers, value=value: numbers.__setitem__(where()[place](numbers), value)  # type: ignore[misc]
        refused += ask(server, "--tail-samples", SAMPLES).code != 0
    # An entropy may be any number up to log V, of which some are odd ones.
    assert refused >= (9 if place == "entropy" else len(ODD) - 2), (place, refused)


def test_any_numbers_in_any_places(ask: Callable[..., Finished]) -> None:
    """Headers, too; what is not refused is a cache that `verify` calls sound."""
    model = Packed(VOCABULARY)
    server = VllmDouble(POOLED, model)
    for seed in range(40):
        dice = random.Random(seed)

        def spoil(numbers: np.ndarray, dice: random.Random = dice) -> None:
            for _ in range(dice.randint(1, 4)):
                high = _FIXED_HEADER if dice.random() < 0.3 else len(numbers)
                numbers[dice.randrange(high)] = dice.choice([*ODD, dice.uniform(-20, 0.0), float(dice.randrange(600))])

        model.spoil = spoil
        ask(server, "--tail-samples", SAMPLES)


def scaled(factor: float) -> Callable[[list[Any]], object]:
    """All log-probabilities times so much: sums that are not 1."""

    def spoil(positions: list[Any]) -> list[Any]:
        for position in positions[1:]:
            for entry in position.values():
                entry["logprob"] *= factor
        return positions

    return spoil


def deep(levels: int) -> Any:
    found: Any = []
    for _ in range(levels):
        found = [found]
    return found


def entry(logprob: float, rank: int) -> dict[str, float]:
    return {"logprob": logprob, "rank": rank}


SPOILED: dict[str, Callable[[list[Any]], object]] = {
    "sums above 1": scaled(0.5),
    "above 0": scaled(-1.0),
    "deep": lambda positions: deep(900),
    "entries of entries": lambda positions: [None, *({"1": {"1": {"1": {}}}} for _ in positions[1:])],
    "surrogates": lambda positions: [None, *({"\ud800": {"logprob": -1, "rank": 1}} for _ in positions[1:])],
    "digits of another script": lambda p: [None, *({"\u0663": {"logprob": -1.0, "rank": 1}} for _ in p[1:])],
    "numbers of many digits": lambda p: [None, *({"9" * 5000: {"logprob": -1.0, "rank": 1}} for _ in p[1:])],
    "a rank of many digits": lambda p: [None, *({str(i): entry(-1.0, 10**400) for i in range(9)} for _ in p[1:])],
    "a logprob of many digits": lambda p: [None, *({str(i): entry(-(10**400), i) for i in range(9)} for _ in p[1:])],
    "an object": lambda positions: {"0": positions},
    "text": lambda positions: "x" * 1000,
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILED)
def test_log_probabilities_that_cannot_be_are_refused(kind: str, ask: Callable[..., Finished]) -> None:
    server = VllmDouble(None, Bigram(VOCABULARY))
    honest = 2  # the probes
    counts = {"asked": 0}

    def spoil(positions: list[Any]) -> object:
        counts["asked"] += 1
        return positions if counts["asked"] < honest else SPOILED[kind](positions)

    server.spoil = spoil
    assert ask(server).code, kind
    assert counts["asked"] >= honest


VALUES: list[Any] = [
    None, True, -1, 1.5, 10**30, 1e308, "", "\x1b[31mred", "\ud800", "x" * 100_000, [], {}, [[]], {"id": 1}, deep(900),
    "\u202egpj.exe", "../../etc", "a\nb",
]  # fmt: skip


@pytest.mark.parametrize("field", ["id", "root", "max_model_len", "object"])
def test_any_value_of_a_field_of_a_model(field: str, ask: Callable[..., Finished]) -> None:
    for value in VALUES:
        server = VllmDouble(None, Bigram(VOCABULARY))
        server.models[0][field] = value
        ask(server)


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/pooling", "/v1/completions"])
def test_any_document_at_any_path(path: str, ask: Callable[..., Finished]) -> None:
    texts = [
        "", "null", "[]", "{}", "NaN", '"' + "x" * 5000 + '"', "[" * 100_000, '{"a":' * 50_000, "\x00\xff", "9" * 5000,
        '{"data": 7}', '{"data": [7]}', '{"data": [{}]}', '{"data": [{"id": null}]}', '{"version": {"a": []}}',
        '{"choices": [{"prompt_logprobs": 7}]}', '{"choices": 7}', '{"error": {"message": ["\\u001b[31m"]}}',
        '{"detail": {"loc": "\\ud800"}}',
    ]  # fmt: skip
    for text in texts:
        for status in (200, 400, 404):
            server = VllmDouble(None, Bigram(VOCABULARY))
            server.refusals[path] = (status, text, {"Retry-After": "nan"})
            ask(server)
