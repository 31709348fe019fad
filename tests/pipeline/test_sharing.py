"""Commands on a bucket: the same results as on a disk, and one sentence for whatever goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished, Tiny
from tests.storage.s3 import Fault, Proxy, files

Pipeline = Callable[..., Finished]
URL = "s3://bucket/team/cache"


def one_sentence(ended: Finished, code: int, *parts: str) -> None:
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert ended.code == code and len(lines) == 1, ended
    assert "Traceback" not in ended.err and "internal" not in lines[0], ended.err
    for part in parts:
        assert part in lines[0], lines[0]


def shown(ended: Finished) -> list[str]:
    assert ended.code == 0, ended.err
    return [line for line in ended.out.splitlines() if not line.startswith("where: ")]


def training(tiny: Tiny, shards: object, output: Path) -> list[object]:
    words = ["train-student", "--student", tiny.student, "--shards", shards, "--output", output]
    return [*words, "--max-steps", 3, "--batch-size", 4, "--rank-scope", "corpus", "--tail", "prior"]


def measures(output: Path) -> dict[str, float]:
    metrics = json.loads((output / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if name.startswith(("eval_", "train_loss"))}


def test_two_teams_and_one_bucket(pipeline: Pipeline, tiny: Tiny, cache_path: Path, s3: Proxy, tmp_path: Path) -> None:
    """docs/sharing.md: push, look, verify, train from the URL, pull."""
    assert "copied now" in pipeline("push", cache_path, URL).out
    assert shown(pipeline("inspect", URL)) == shown(pipeline("inspect", cache_path))
    assert "all sound" in pipeline("verify", URL).out
    s3.faults += [Fault("500", 4), Fault("cut", 2, lambda method, path: method == "GET" and path.endswith(".parquet"))]
    for shards, name in ((URL, "far"), (cache_path, "near")):
        ended = pipeline(*training(tiny, shards, tmp_path / name))
        assert ended.code == 0, ended.err
    assert measures(tmp_path / "far") == pytest.approx(measures(tmp_path / "near"), rel=1e-6)
    assert all(fault.hit == fault.times for fault in s3.faults)
    assert pipeline("pull", URL, tmp_path / "back").code == 0
    assert files(tmp_path / "back") == files(cache_path)
    assert ", 0 of them copied now" in pipeline("push", tmp_path / "back", URL).out


def test_caching_straight_into_a_bucket(
    pipeline: Pipeline, tiny: Tiny, cache_path: Path, s3: Proxy, tmp_path: Path
) -> None:
    words: list[object] = ["cache-teacher", "--teacher", tiny.teacher, "--dataset", tiny.corpus, "--output", URL]
    words += ["--engine", "transformers", "--top-n", 8, "--tail-samples", 0, "--shard-tokens", 1500, "--processes", 1]
    s3.faults.append(Fault("drop", 10**6, lambda method, path: method == "PUT" and "part-00002.parquet" in path))
    one_sentence(pipeline(*words), 1, f"{URL}/shards/part-00002.parquet", "after 5 tries")
    s3.faults.clear()
    ended = pipeline(*words)
    assert ended.code == 0 and "2 of 6 shards are done already" in ended.err, ended.err
    assert pipeline("pull", URL, tmp_path / "back").code == 0
    ours, theirs = files(tmp_path / "back"), files(cache_path)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= {n for n in ours if n.endswith("json")}
    s3.seen.clear()
    assert "6 of 6 shards are done already" in pipeline(*words).err
    assert s3.requests("PUT") == 0
    one_sentence(pipeline(*words, "--top-n", 4), 2, URL, "holds another cache", "top_n: 8, not 4")
    words[6] = "s3://nobucket/cache"
    one_sentence(pipeline(*words), 2, "there is no bucket s3://nobucket")


def test_a_part_to_train_from(pipeline: Pipeline, tiny: Tiny, cache_path: Path, s3: Proxy, tmp_path: Path) -> None:
    assert pipeline("push", cache_path, URL).code == 0
    part = tmp_path / "part"
    assert "2 of 6 shards" in pipeline("pull", URL, part, "--shards", "1:3").out
    lines = shown(pipeline("inspect", part))
    assert "shards: 2 of 6" in lines
    assert "2 shards" in pipeline("verify", part).out
    one_sentence(pipeline("inspect", part, "--sequence", 0), 2, "--sequence 0: is in shard 0, which was not pulled")
    ended = pipeline(*training(tiny, part, tmp_path / "out"), "--eval-share", 0.2)
    assert ended.code == 0, ended.err
    assert f"{part}: a part, 2 of 6 shards with " in ended.err and " of 59 sequences (" in ended.err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["shards"] == {"part": [2, 6]}
    one_sentence(pipeline("push", part, "s3://bucket/part"), 2, "holds 2 of 6 shards")
    assert pipeline("bundle", part, tmp_path / "part.tar.zst").code == 0
    assert "2 shards" in pipeline("unbundle", tmp_path / "part.tar.zst", tmp_path / "there").out
    assert shown(pipeline("inspect", tmp_path / "there")) == lines
    assert pipeline("pull", URL, part).code == 0
    assert files(part) == files(cache_path)


@pytest.mark.parametrize("shards", ["6:9", "2:2", "a:b", "3", "-1:2", " "])
def test_shards_that_are_none(pipeline: Pipeline, cache_path: Path, tmp_path: Path, shards: str) -> None:
    ended = pipeline("pull", f"file://{cache_path}", tmp_path / "back", "--shards", shards)
    one_sentence(ended, 2, f"--shards {shards}: wants FIRST:STOP", "6 shards")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("inspect", "s3://bucket/nothing"), 2, "s3://bucket/nothing/manifest.json: there is no manifest here"),
        (("verify", "s3://nobucket/cache"), 2, "s3://nobucket/cache/manifest.json: there is no manifest here"),
        (("verify", "magic://bucket/cache"), 2, "magic://bucket/cache: caches lie at s3://"),
        (("pull", "s3://bucket/nothing", "back"), 2, "there is no manifest here"),
        (("push", "nowhere", URL), 2, "nowhere: no such directory"),
        (("bundle", "nowhere", "cache.tar.zst"), 2, "nowhere: no such directory"),
        (("bundle", "nowhere", "cache.zip"), 2, "cache.zip: a bundle's name ends in .tar.zst"),
        (("bundle", URL, "cache.tar.zst"), 2, "there is no manifest here"),
        (("unbundle", "nowhere.tar.zst", "back"), 2, "nowhere.tar.zst: no such file"),
    ],
    ids=str,
)
def test_places_that_are_none(
    pipeline: Pipeline,
    s3: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    one_sentence(pipeline(*words), code, says)
    assert {path.name for path in tmp_path.iterdir()} <= {"copies"}


def test_a_server_that_is_gone(pipeline: Pipeline, s3: Proxy) -> None:
    s3.faults.append(Fault("500", 10**6))
    one_sentence(pipeline("inspect", URL), 1, URL, "after 5 tries")


def test_a_bucket_that_may_not_be_read(pipeline: Pipeline, s3: Proxy) -> None:
    s3.faults.append(Fault("403", 10**6))
    one_sentence(pipeline("verify", URL), 1, URL, "access denied; check the credentials")
    assert len(s3.seen) == 1


def test_workers_read_from_the_bucket(
    pipeline: Pipeline, tiny: Tiny, cache_path: Path, s3: Proxy, tmp_path: Path
) -> None:
    assert pipeline("push", cache_path, URL).code == 0
    ended = pipeline(*training(tiny, URL, tmp_path / "out"), "--trainer", "dataloader_num_workers=2")
    assert ended.code == 0, ended.err


def test_no_push_over_another_cache(
    pipeline: Pipeline, make_cache: Callable, cache_path: Path, s3: Proxy, tmp_path: Path
) -> None:
    assert pipeline("push", cache_path, URL).code == 0
    make_cache(tmp_path / "other", top_n=4)
    one_sentence(pipeline("push", tmp_path / "other", URL), 2, URL, "holds another cache")
    one_sentence(pipeline("pull", URL, tmp_path / "other"), 2, "other", "holds another cache")


def test_by_hand_to_a_machine_without_network(pipeline: Pipeline, cache_path: Path, tmp_path: Path) -> None:
    assert pipeline("bundle", cache_path, tmp_path / "cache.tar.zst").code == 0
    ended = pipeline("unbundle", tmp_path / "cache.tar.zst", tmp_path / "there")
    assert "6 shards, all sound" in ended.out
    assert files(tmp_path / "there") == files(cache_path)
    one_sentence(pipeline("unbundle", tmp_path / "cache.tar.zst", cache_path), 2, "exists already")
