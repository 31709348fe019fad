"""Caches in a bucket, over a real S3 API, also when the line is bad."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage import copies
from storage.cache import Cache
from storage.errors import CacheError, RunError, UserError
from storage.integrity import problems
from storage.manifest import read_manifest, write_model
from storage.places import TRIES, RemotePath, place
from storage.transfer import copy_cache
from tests.storage.s3 import Fault, Proxy, files
from tests.storage.synthetic import LENGTHS, make_manifest, make_rows, write_cache

URL = "s3://bucket/team/cache"
MANIFEST = make_manifest(vocabulary=40, top_n=16)
SHARDS = len(MANIFEST.shards)


def save_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    # As transformers keeps further chat templates.
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")


@pytest.fixture
def local(tmp_path: Path) -> Cache:
    cache = write_cache(tmp_path / "local", MANIFEST)
    cache.write_tokenizer(save_tokenizer)
    return cache


@pytest.fixture
def remote(local: Cache, s3: Proxy) -> Cache:
    """The same cache in the bucket; the proxy has forgotten how it came there."""
    copy_cache(local, URL)
    s3.seen.clear()
    return Cache.open(URL)


def same_rows(ours: Cache, theirs: Cache) -> None:
    for index in range(SHARDS):
        one, other = ours.read_shard(index), theirs.read_shard(index)
        assert one.lists.keys() == other.lists.keys()
        for name in one.lists:
            np.testing.assert_array_equal(one[name].values, other[name].values)


def test_a_cache_written_to_a_bucket_is_the_cache_written_to_a_disk(local: Cache, s3: Proxy) -> None:
    cache = write_cache(URL, MANIFEST)
    cache.write_tokenizer(save_tokenizer)
    copy_cache(Cache.open(URL), local.path.parent / "back")
    assert files(local.path.parent / "back") == files(local.path)
    puts = [path for method, path, _ in s3.seen if method == "PUT"]
    for index in range(SHARDS):
        shard, tail, receipt = (
            next(i for i, path in enumerate(puts) if path.endswith(name))
            for name in (
                f"shards/part-0000{index}.parquet",
                f"tail_sums/part-0000{index}.parquet",
                f"shards/part-0000{index}.json",
            )
        )
        assert shard < tail < receipt, puts


def test_writing_goes_on_where_it_stopped(s3: Proxy) -> None:
    cache = Cache.create_or_resume(URL, MANIFEST)
    cache.write_shard(0, *make_rows(MANIFEST, 0), 0.0)
    (cache.shard_path(1)).upload(Path(__file__))  # what a kill before the receipt leaves
    with pytest.raises(CacheError, match="unfinished, 2 of 3 shards"):
        Cache.open(URL).receipts()
    again = Cache.create_or_resume(URL, MANIFEST)
    assert [again.is_done(index) for index in range(SHARDS)] == [True, False, False]
    assert list(problems(write_cache(URL, MANIFEST))) == []
    with pytest.raises(CacheError, match=r"holds another cache \("):
        Cache.resume(URL, make_manifest(vocabulary=41, top_n=16))


def test_a_failed_upload_leaves_no_receipt(s3: Proxy) -> None:
    cache = Cache.create_or_resume(URL, MANIFEST)
    s3.faults.append(Fault("500", 99, lambda method, path: method == "PUT" and path.endswith("part-00000.parquet")))
    with pytest.raises(RunError, match=rf"{URL}/shards/part-00000.parquet: .* after {TRIES} tries"):
        cache.write_shard(0, *make_rows(MANIFEST, 0), 0.0)
    assert s3.requests("PUT", "part-00000.parquet") == TRIES
    assert not cache.receipt_path(0).exists() and not cache.is_done(0)


@pytest.mark.parametrize("kind", ["500", "cut", "slow", "drop"])
def test_reading_survives_a_bad_line(local: Cache, remote: Cache, s3: Proxy, kind: str) -> None:
    fault = Fault(kind, TRIES - 1, lambda method, path: method == "GET" and path.endswith("part-00001.parquet"))
    s3.faults.append(fault)
    same_rows(remote, local)
    assert fault.hit == (1 if kind == "slow" else TRIES - 1)
    np.testing.assert_array_equal(remote.tail_prior(), local.tail_prior())


@pytest.mark.parametrize("kind", ["500", "drop", "slow"])
def test_writing_survives_a_bad_line(s3: Proxy, kind: str) -> None:
    s3.faults.append(Fault(kind, 3, lambda method, path: method == "PUT" and "part-00001" in path))
    s3.faults.append(Fault(kind, 2, lambda method, path: method == "HEAD"))
    assert list(problems(write_cache(URL, MANIFEST))) == []
    assert all(fault.hit == fault.times for fault in s3.faults)


def test_a_line_that_stays_bad_ends_with_one_sentence(remote: Cache, s3: Proxy) -> None:
    s3.faults.append(Fault("drop", 10**6))
    s3.seen.clear()
    with pytest.raises(RunError, match=rf"^{URL}/shards/part-00000\.json: .* after {TRIES} tries$"):
        remote.read_shard(0)
    # The client itself may repeat a request on a connection that was kept open.
    assert TRIES <= len([seen for seen in s3.seen if "part-00000" in seen[1]]) <= 2 * TRIES


def test_a_shard_is_fetched_once(local: Cache, remote: Cache, s3: Proxy) -> None:
    for _ in range(3):
        remote.read_shard(1)
    same_rows(pickle.loads(pickle.dumps(remote)), local)
    for index in range(SHARDS):
        assert s3.requests("GET", f"part-0000{index}.parquet") == 1


def test_copies_stay_within_their_bound(remote: Cache, s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [receipt.bytes for receipt in remote.receipts()]
    (copies.folder() / "thesis.tex").touch()
    monkeypatch.setenv("PIPELINE_COPIES_BYTES", str(max(sizes) * 2 + 10))
    for index in (0, 1, 0, 2, 0, 1):
        remote.read_shard(index)
        held = sum(path.stat().st_size for path in copies.folder().iterdir())
        assert held <= max(sizes) * 2 + 10
        time.sleep(0.01)  # apart in time of use
    # The least recently used gave way: 1 for 2, then 2 for 1.
    assert [s3.requests("GET", f"part-0000{index}.parquet") for index in range(SHARDS)] == [1, 2, 1]
    assert (copies.folder() / "thesis.tex").exists()
    monkeypatch.setenv("PIPELINE_COPIES_BYTES", "many")
    with pytest.raises(UserError, match="PIPELINE_COPIES_BYTES=many: wants a number"):
        remote.read_shard(2)


def test_a_reader_keeps_the_copy_that_gives_way(remote: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = remote.receipt(0)
    path = remote.shard_path(0)
    assert isinstance(path, RemotePath)
    monkeypatch.setenv("PIPELINE_COPIES_BYTES", "1")
    with copies.open_copy(path, receipt.sha256, receipt.bytes) as file:
        remote.read_shard(1)
        assert not (copies.folder() / receipt.sha256).exists()
        assert len(file.read()) == receipt.bytes


def test_prefetching_fetches_in_the_background(local: Cache, remote: Cache, s3: Proxy) -> None:
    remote.prefetch(2)
    remote.prefetch(0)
    wanted = {remote.receipt(index).sha256 for index in (0, 2)}
    for _ in range(500):
        if wanted <= {path.name for path in copies.folder().iterdir()}:
            break
        time.sleep(0.01)
    before = s3.requests("GET", ".parquet")
    assert before == 2
    remote.read_shard(0), remote.read_shard(2)
    assert s3.requests("GET", ".parquet") == before
    local.prefetch(0)  # nothing to do


def test_other_processes_read_after_a_fork(local: Cache, remote: Cache) -> None:
    remote.read_shard(0)
    child = os.fork()
    if child == 0:
        try:
            remote.prefetch(1)
            same_rows(remote, local)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def overwrite(path: object, change: Callable[[bytearray], object]) -> None:
    assert isinstance(path, RemotePath)
    raw = bytearray(path.read_at_most(1 << 30, "a file"))
    change(raw)
    with path.atomic_file() as file:
        file.write(raw)


def test_changed_bytes_are_noticed_when_they_come(remote: Cache) -> None:
    overwrite(remote.shard_path(1), lambda raw: raw.__setitem__(len(raw) // 2, raw[len(raw) // 2] ^ 1))
    assert remote.check_file(1).shard == 1  # its length is right
    with pytest.raises(CacheError, match=r"part-00001\.parquet: its bytes have changed"):
        remote.read_shard(1)
    assert [problem.partition(": ")[2][:22] for problem in problems(remote)] == ["its bytes have changed"]
    overwrite(remote.shard_path(2), lambda raw: raw.pop())
    with pytest.raises(CacheError, match=r"part-00002\.parquet: \d+ bytes, its receipt says \d+"):
        remote.check_file(2)
    assert len(list(problems(remote))) == 2


def test_verify_reads_the_bucket_and_not_the_copy(remote: Cache) -> None:
    remote.read_shard(1)
    overwrite(remote.shard_path(1), lambda raw: raw.__setitem__(9, raw[9] ^ 1))
    assert any("part-00001.parquet: its bytes have changed" in problem for problem in problems(remote))


def test_only_the_columns_asked_for_are_fetched(tmp_path: Path, s3: Proxy) -> None:
    # make_rows repeats LENGTHS, so the plan is made from those.
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(600)]
    manifest = make_manifest(lengths, vocabulary=300, shard_tokens=10**6, top_n=64)
    write_cache(URL, manifest)
    s3.seen.clear()
    [rows] = Cache.open(URL).column("loss_mask", "gold_logprob")
    expected, _ = make_rows(manifest, 0)
    np.testing.assert_array_equal(rows["gold_logprob"].values, expected["gold_logprob"].values)
    ranges = [seen[2].removeprefix("bytes=").split("-") for seen in s3.seen if seen[1].endswith(".parquet") and seen[2]]
    fetched = sum(int(end) - int(start) + 1 for start, end in ranges)
    assert ranges and fetched < Cache.open(URL).receipt(0).bytes / 3


# ---- push and pull ----------------------------------------------------------------------------------------


def test_there_and_back_again(local: Cache, s3: Proxy, tmp_path: Path) -> None:
    seen: list[int] = []
    assert copy_cache(local, URL, progress=seen.append) == SHARDS
    assert sorted(seen) == list(range(SHARDS))
    assert copy_cache(Cache.open(URL), tmp_path / "back") == SHARDS
    assert files(tmp_path / "back") == files(local.path)
    assert list(problems(Cache.open(URL))) == []


def test_again_copies_nothing(local: Cache, remote: Cache, s3: Proxy, tmp_path: Path) -> None:
    assert copy_cache(local, URL) == 0
    assert s3.requests("PUT", "part-") == 0
    copy_cache(remote, tmp_path / "back")
    s3.seen.clear()
    assert copy_cache(Cache.open(URL), tmp_path / "back") == 0
    assert s3.requests("GET", ".parquet") == 1  # the tail prior


def test_a_push_that_broke_off_goes_on(local: Cache, s3: Proxy) -> None:
    s3.faults.append(Fault("drop", 10**6, lambda method, path: method == "PUT" and path.endswith("part-00002.parquet")))
    with pytest.raises(RunError, match="part-00002"):
        copy_cache(local, URL, jobs=1)
    assert not Cache.open(URL).is_sealed
    s3.faults.clear()
    assert copy_cache(local, URL) == 1
    assert list(problems(Cache.open(URL))) == []


def test_a_pull_that_broke_off_goes_on(local: Cache, remote: Cache, s3: Proxy, tmp_path: Path) -> None:
    back = tmp_path / "back"
    s3.faults.append(Fault("cut", 10**6, lambda method, path: method == "GET" and path.endswith("part-00001.parquet")))
    with pytest.raises(RunError, match="part-00001"):
        copy_cache(remote, back, jobs=1)
    assert not list(back.rglob(".tmp-*"))
    with pytest.raises(CacheError, match="unfinished"):
        Cache.open(back).receipts()
    s3.faults.clear()
    # Damaged meanwhile: fetched again.
    (back / "shards" / "part-00000.parquet").write_bytes(b"PAR1")
    assert copy_cache(remote, back) >= 2
    assert files(back) == files(local.path)


def test_a_damaged_source_is_not_copied(local: Cache, remote: Cache, tmp_path: Path) -> None:
    overwrite(remote.tail_sum_path(1), lambda raw: raw.__setitem__(9, raw[9] ^ 1))
    with pytest.raises(CacheError, match=r"tail_sums/part-00001\.parquet: its bytes have changed"):
        copy_cache(remote, tmp_path / "back")
    assert not (tmp_path / "back" / "shards" / "part-00001.json").exists()
    path = local.shard_path(0)
    assert isinstance(path, Path)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheError, match=r"part-00000\.parquet: its bytes have changed"):
        copy_cache(local, "s3://bucket/other")


def test_another_cache_at_the_target_is_left_alone(remote: Cache, tmp_path: Path) -> None:
    other = write_cache(tmp_path / "other", make_manifest(vocabulary=41, top_n=16))
    before = files(tmp_path / "other")
    with pytest.raises(CacheError, match="holds another cache"):
        copy_cache(remote, tmp_path / "other")
    with pytest.raises(CacheError, match="holds another cache"):
        copy_cache(other, URL)
    assert files(tmp_path / "other") == before
    RemotePath("s3://bucket/thesis/chapter.tex").upload(Path(__file__))
    with pytest.raises(CacheError, match=r"holds other files \(chapter\.tex\)"):
        copy_cache(other, "s3://bucket/thesis")


def test_a_part_grows_into_the_whole(local: Cache, remote: Cache, tmp_path: Path) -> None:
    back = tmp_path / "back"
    assert copy_cache(remote, back, shards=range(1, 2)) == 1
    part = Cache.open(back)
    assert part.is_partial and list(part.shards_here) == [1] and list(problems(part)) == []
    assert [len(rows) for rows in part.column("input_ids")] == [MANIFEST.shards[1].sequences]
    assert part.receipts(partial=True) == [local.receipt(1)]
    with pytest.raises(CacheError, match="holds 1 of 3 shards, pulled with --shards"):
        part.receipts()
    copy_cache(remote, back, shards=[2])
    assert list(Cache.open(back).shards_here) == [1, 2]
    (back / "shards" / "part-00001.json").unlink()
    assert any("part-00001" in problem for problem in problems(Cache.open(back)))
    copy_cache(remote, back)
    assert files(back) == files(local.path)
    (back / "partial.json").write_text("[]")
    with pytest.raises(CacheError, match=r"partial\.json: the list of shards is not"):
        Cache.open(back).receipts()


def test_of_two_claims_at_the_same_moment_one_wins(
    s3: Proxy, local: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has looked before, and seen nothing."""
    ours, theirs = local.manifest, make_manifest(vocabulary=41, top_n=16)
    Cache.create_or_resume("s3://bucket/claimed", ours)
    monkeypatch.setattr(RemotePath, "exists", lambda path: False)
    with pytest.raises(FileExistsError):
        write_model(RemotePath("s3://bucket/claimed/manifest.json"), theirs, exclusive=True)
    assert read_manifest(RemotePath("s3://bucket/claimed/manifest.json")) == ours


# ---- places that are none ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nosuch://bucket/cache", "nosuch://bucket/cache: caches lie at s3://"),
        ("s3://", "names no bucket"),
        ("s3://bucket/nothing", "s3://bucket/nothing/manifest.json: there is no manifest here"),
        ("s3://nobucket/cache", "s3://nobucket/cache/manifest.json: there is no manifest here"),
    ],
)
def test_no_cache_there(s3: Proxy, url: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        Cache.open(url)
    assert "\n" not in str(caught.value)


def test_no_bucket_to_write_to(s3: Proxy) -> None:
    with pytest.raises(UserError, match="there is no bucket s3://nobucket"):
        Cache.check_target("s3://nobucket/cache")


def test_no_credentials(s3: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(RunError, match="no credentials found"):
        Cache.open("s3://bucket/fresh")


def test_a_file_system_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs:// is not installed; install 'teacher-logit-cache\[gcs\]'"):
        place("gs://bucket/cache")


def test_file_urls_are_paths(local: Cache) -> None:
    assert place(f"file://{local.path}") == local.path
    assert list(problems(Cache.open(f"file://{local.path}"))) == []
