"""Every message of docs/server.md, from the command line, with a server that is made to earn it."""

from __future__ import annotations

import functools
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages import teacher_server
from stages.http_client import KEY_VARIABLE, Patience
from stages.statistics import StatisticsOptions
from storage.cache import Cache
from tests.conftest import VOCABULARY, Finished, Tiny
from tests.pipeline.test_bad_input import one_sentence
from tests.vllm_double import Bigram, VllmDouble

PAGE = Path(__file__).resolve().parents[2] / "docs" / "server.md"
BIGRAM, SMALLER = Bigram(VOCABULARY), Bigram(VOCABULARY - 1)
LONGEST_ROW = 40  # ids


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts, but as long a time for each as a busy machine may need."""
    monkeypatch.setattr(teacher_server, "Patience", functools.partial(Patience, attempts=2, first_wait=0.01))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


class Scene:
    """The teacher, a corpus of twelve short rows, and a server that has the teacher; `ask` caches with it."""

    def __init__(self, tiny: Tiny, folder: Path, pipeline: Callable[..., Finished]) -> None:
        self.tiny, self.folder, self._pipeline = tiny, folder, pipeline
        self.doubles: list[VllmDouble] = []
        rows = [[(7 * row + place) % VOCABULARY for place in range(LONGEST_ROW - row)] for row in range(12)]
        text = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
        (folder / "corpus.jsonl").write_text(text)

    def server(self, pooled: StatisticsOptions | None = None, model: Bigram = BIGRAM) -> VllmDouble:
        double = VllmDouble(pooled, model)
        double.models[0]["root"] = str(self.tiny.teacher)
        self.doubles.append(double)
        return double

    def ask(self, url: str, *more: object) -> Finished:
        base = ["cache-teacher", "--teacher", self.tiny.teacher, "--dataset", self.folder / "corpus.jsonl"]
        base += ["--output", self.folder / "cache", "--processes", 1, "--shard-tokens", 100, "--server-url", url]
        return self._pipeline(*base, "--server-concurrency", 1, *more)


@pytest.fixture
def scene(tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Finished]) -> Iterator[Scene]:
    scene = Scene(tiny, tmp_path, pipeline)
    yield scene
    for double in scene.doubles:
        double.http.close()


def nobody(scene: Scene) -> Finished:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return scene.ask(f"http://127.0.0.1:{free.getsockname()[1]}")


def silence(scene: Scene) -> Finished:
    with socket.socket() as listener, pytest.MonkeyPatch.context() as context:
        context.setattr(teacher_server, "Patience", functools.partial(Patience, connect_timeout=0.3))
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        return scene.ask(f"http://127.0.0.1:{listener.getsockname()[1]}")


def another_page(scene: Scene) -> Finished:
    double = scene.server()
    double.refusals["/v1/models"] = (200, "<html>", {})
    return scene.ask(double.url)


def no_key(scene: Scene) -> Finished:
    double = scene.server()
    double.key = "open-sesame"
    return scene.ask(double.url)


def wrong_key(scene: Scene) -> Finished:
    with pytest.MonkeyPatch.context() as context:
        context.setenv(KEY_VARIABLE, "abracadabra")
        return no_key(scene)


def another_name(scene: Scene) -> Finished:
    double = scene.server()
    double.models[0]["root"] = "/models/large"
    return scene.ask(double.url)


def another_vocabulary(scene: Scene) -> Finished:
    return scene.ask(scene.server(StatisticsOptions(64), SMALLER).url)


def stock(scene: Scene) -> Finished:
    return scene.ask(scene.server().url)


def more_than_allowed(scene: Scene) -> Finished:
    return scene.ask(scene.server().url, "--top-n", 64)


def other_options(scene: Scene) -> Finished:
    return scene.ask(scene.server(StatisticsOptions(16)).url)


def samples_without_pooler(scene: Scene) -> Finished:
    return scene.ask(scene.server().url, "--tail-samples", 4)


def too_long(scene: Scene) -> Finished:
    double = scene.server()
    double.models[0]["max_model_len"] = LONGEST_ROW
    return scene.ask(double.url)


def precision(scene: Scene) -> Finished:
    return scene.ask(scene.server().url, "--dtype", "float32")


def logits(scene: Scene) -> Finished:
    double = scene.server()
    double.raw = 0.0
    return scene.ask(double.url)


def logits_later(scene: Scene) -> Finished:
    """From the second shard on."""
    double = scene.server()
    double.trouble = lambda n: "raw" if n > 3 + 6 else ""
    return scene.ask(double.url)


def refused(scene: Scene) -> Finished:
    double = scene.server()
    double.trouble = lambda n: "400" if n > 4 + 2 else ""  # two are asked to see that the teacher reads no token ahead
    return scene.ask(double.url)


def dead(scene: Scene) -> Finished:
    double = scene.server()
    double.trouble = lambda n: "reset" if n > 4 + 2 else ""
    return scene.ask(double.url)


MESSAGES: dict[str, tuple[int, Callable[[Scene], Finished]]] = {
    "no server answers": (2, nobody),
    "no answer within": (2, silence),
    "is this a vLLM server?": (2, another_page),
    "wants a key (401)": (2, no_key),
    "refuses the key": (2, wrong_key),
    "the teacher here is": (2, another_name),
    "ids, expected": (2, another_vocabulary),
    "runs without our pooler": (0, stock),
    "the server allows the top": (0, stock),
    "ask for fewer, or start it with": (2, more_than_allowed),
    "ask for what it keeps, or start it with": (2, other_options),
    "cannot give": (2, samples_without_pooler),
    "the longest here has": (2, too_long),
    "a server decided its precision": (2, precision),
    "answers a probe with what cannot be": (2, logits),
    "gave what cannot be": (1, logits_later),
    "refuses a sequence with": (2, refused),
    "still failing after": (1, dead),
}


def test_the_page_has_every_message() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("## What the messages mean")[2]
    assert re.findall(r"^\| `([^`]*)` \|", table, re.MULTILINE) == list(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message(scene: Scene, message: str) -> None:
    code, cause = MESSAGES[message]
    ended = cause(scene)
    if code == 0:
        assert ended.code == 0, ended
        assert sum(message in line for line in ended.err.splitlines()) == 1, ended.err
    else:
        one_sentence(ended, code, message)
    # Before a sequence is scored there is nothing.
    assert (scene.folder / "cache").exists() == (code != 2 or message == "refuses a sequence with")


def test_only_the_longest_row_counts(scene: Scene) -> None:
    """Not the 128 ids that rows of this teacher may have."""
    double = scene.server()
    double.models[0]["max_model_len"] = LONGEST_ROW + 1
    done = scene.ask(double.url)
    assert done.code == 0, done.err
    scoring = Cache.open(scene.folder / "cache").manifest.scoring
    assert (scoring.max_length, scoring.top_n, scoring.engine) == (128, 20, "server-prompt-logprobs")


def test_a_cache_goes_on_with_what_it_began_with(scene: Scene) -> None:
    double = scene.server()
    assert scene.ask(double.url).code == 0
    first = Cache.open(scene.folder / "cache").shard_path(1)
    begun = first.read_bytes()
    first.unlink()
    # The server was started again meanwhile, and allows more.
    double.most = 64
    done = scene.ask(double.url)
    assert done.code == 0 and "1 to score" in done.err, done.err
    assert first.read_bytes() == begun


def test_no_shard_of_logits_is_written(scene: Scene) -> None:
    """A server that passed its probe may be started again in another way; what it gave before is kept."""
    said = one_sentence(logits_later(scene), 1, "sequence ", ", position ", "--logprobs-mode raw_logits")
    cache = Cache.open(scene.folder / "cache")
    shards = len(cache.manifest.shards)
    written = sorted(path.name for path in (scene.folder / "cache" / "shards").glob("*.parquet"))
    assert 0 < len(written) < shards
    assert said.endswith(f"{len(written)} of {shards} shards are finished and kept")
    (bad,) = re.findall(r"so shard (\d+) is not written: sequence (\d+)", said)
    planned = cache.manifest.shards[int(bad[0])]
    assert planned.first <= int(bad[1]) < planned.first + planned.sequences


def test_a_death_before_the_first_shard(scene: Scene) -> None:
    nothing = "; no shard is finished, nothing is kept"
    assert one_sentence(dead(scene), 1).endswith(f"start the same command again to go on{nothing}")
    assert one_sentence(refused(scene), 2, "maximum context length is 3").endswith(nothing)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--engine", "transformers", "--server-model", "x"), "--server-model belongs to --engine server"),
        (("--engine", "server", "--vllm-arg", "max_num_seqs=2"), "--vllm-arg and --vllm-route belong to --engine vllm"),
        (("--engine", "transformers"), "--server-url belongs to --engine server"),
    ],
)
def test_options_of_other_engines(scene: Scene, options: tuple[str, ...], told: str) -> None:
    if "--server-model" in options:
        base = ("--teacher", scene.tiny.teacher, "--dataset", scene.tiny.corpus, "--output", scene.folder / "cache")
        ended = scene._pipeline("cache-teacher", *base, *options)
    else:
        ended = scene.ask(scene.server().url, *options)
    one_sentence(ended, 2, told)


def test_the_key_of_the_environment(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "open-sesame")
    double = scene.server()
    double.key = "open-sesame"
    assert scene.ask(double.url).code == 0
