"""Nothing outside a cache's directory is read or written, whatever lies in the cache: each attack is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import copies
from storage.cache import Cache
from storage.contained import ContainedPath
from storage.errors import CacheError, UserError
from storage.files import atomic_file, write_bytes
from tests.conftest import Tiny

SECRET = b"-----BEGIN A PRIVATE KEY-----"
SECONDS = 60


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A pipe that is waited for would wait for ever."""

    def late(*_: Any) -> None:
        raise AssertionError(f"still at it after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "id_rsa").write_bytes(SECRET)
    return folder / "id_rsa"


FILES = (
    "manifest.json", "README.md", "tail_prior.parquet", "tail_prior.json", "partial.json", "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json", "shards/part-00000.parquet", "shards/part-00000.json",
    "tail_sums/part-00000.parquet",
)  # fmt: skip
FOLDERS = ("shards", "tail_sums", "tokenizer")
ODD: dict[str, Callable[[Path, Path], object]] = {
    "link": lambda path, secret: path.symlink_to(secret),
    "link to nothing": lambda path, secret: path.symlink_to(secret.with_name("nothing")),
    "link to a device": lambda path, secret: path.symlink_to("/dev/zero"),
    "pipe": lambda path, secret: os.mkfifo(path),
    "folder": lambda path, secret: path.mkdir(),
}
COMMANDS = ("verify", "inspect", "train", "push", "bundle", "pull", "select", "merge")


def run(command: str, cache: Path, tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Any]) -> Any:
    target = tmp_path / "target"
    if command in ("verify", "inspect"):
        return pipeline(command, cache)
    if command == "train":
        given = ("--student", tiny.student, "--shards", cache, "--output", target, "--max-steps", 1)
        return pipeline("train-student", *given, "--trainer", "dataloader_num_workers=0")
    if command == "push":
        return pipeline("push", cache, target.as_uri())
    if command == "bundle":
        return pipeline("bundle", cache, tmp_path / "target.tar.zst")
    if command == "select":
        return pipeline("select", cache, "--output", target, "--top-n", 2)
    if command == "merge":
        other = tmp_path / "other"
        pipeline("select", tiny.root / "cache", "--output", other, "--sequences", "0:5")
        return pipeline("merge", cache, other, "--output", target)
    return pipeline("pull", cache, target)


def told(tmp_path: Path) -> bool:
    """Whether anything that was written holds the secret."""
    return any(SECRET in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.fixture
def spoilt(cache_path: Path, secret: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    def make(name: str, kind: str) -> Path:
        cache = tmp_path / "cache"
        shutil.copytree(cache_path, cache)
        path = cache / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        ODD[kind](path, secret)
        return cache

    return make


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", FILES)
def test_no_command_takes_an_odd_file_for_one_of_a_cache(
    name: str, kind: str, spoilt: Callable[[str, str], Path], tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    cache = spoilt(name, kind)
    if kind == "folder" and name.startswith("tokenizer/"):
        return  # an empty one is nothing
    for command in COMMANDS:
        (tmp_path / command).mkdir()
        ended = run(command, cache, tiny, tmp_path / command, pipeline)
        said = ended.out + ended.err
        assert "internal" not in said and "Traceback" not in said, (command, said)
        assert SECRET.decode() not in said
        assert not told(tmp_path / command), command
        # A command may not need this file; that it then reads it is what must not be.
        if ended.code == 0:
            assert (command, name) in UNREAD | (UNSEALED if "link" not in kind else set()), (command, said)
        elif kind.startswith("link"):
            assert "is a link, and may lead to a file that is no part of the cache" in said, (command, said)


# Without its card a cache is not sealed, which the copy is then neither.
UNSEALED = {("push", "README.md"), ("pull", "README.md")}
# Files that a command has no use for.
UNREAD = {
    ("inspect", "tail_sums/part-00000.parquet"),
    ("train", "tail_prior.parquet"),
    ("select", "README.md"),
    ("merge", "README.md"),
    ("select", "tail_prior.parquet"),
    ("merge", "tail_prior.parquet"),
    ("select", "tail_prior.json"),
    ("merge", "tail_prior.json"),
    ("verify", "README.md"),
    ("inspect", "README.md"),
    ("inspect", "tail_prior.parquet"),
    ("inspect", "tail_prior.json"),
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_a_link_is_not_entered(
    name: str, command: str, cache_path: Path, tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(cache_path, cache)
    (cache / name).rename(tmp_path / "moved")
    (cache / name).symlink_to(tmp_path / "moved")
    (tmp_path / command).mkdir()
    ended = run(command, cache, tiny, tmp_path / command, pipeline)
    assert ended.code != 0 or (command, f"{name}/part-00000.parquet") in UNREAD
    assert ended.code == 0 or f"{cache / name}" in ended.err + ended.out


@pytest.mark.parametrize("name", FOLDERS)
def test_a_target_whose_folder_is_a_link_is_not_written_through(
    name: str, cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    """As a shared directory that others may write might be prepared."""
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "target"
    elsewhere.mkdir()
    target.mkdir()
    (elsewhere / "part-00000.parquet").write_bytes(b"precious")
    shutil.copy(cache_path / "manifest.json", target)
    (target / name).symlink_to(elsewhere)
    ended = pipeline("pull", cache_path, target)
    assert ended.code != 0 and "is a link" in ended.err
    assert [path.name for path in elsewhere.iterdir()] == ["part-00000.parquet"]
    assert (elsewhere / "part-00000.parquet").read_bytes() == b"precious"


def test_a_file_of_a_target_that_is_a_link_is_replaced_or_refused_and_never_followed(
    cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    precious, target = tmp_path / "precious", tmp_path / "target"
    for name in ("README.md", "shards/part-00000.parquet", "shards/part-00000.json", "tail_prior.json"):
        precious.write_bytes(b"precious")
        shutil.rmtree(target, ignore_errors=True)
        (target / "shards").mkdir(parents=True)
        shutil.copy(cache_path / "manifest.json", target)
        (target / name).symlink_to(precious)
        pipeline("pull", cache_path, target)
        assert precious.read_bytes() == b"precious", name


def test_the_directory_itself_may_be_a_link(cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]) -> None:
    """It is the user's own word."""
    (tmp_path / "link").symlink_to(cache_path)
    assert pipeline("verify", tmp_path / "link").code == 0
    (tmp_path / "far").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "far")
    assert pipeline("pull", cache_path, tmp_path / "out").code == 0
    assert (tmp_path / "far" / "manifest.json").exists()


# ---- the tokenizer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fast_tokenizer_files", ["../../elsewhere/tokenizer.5.0.0.json"]),
        ("fast_tokenizer_files", ["tokenizer.0.0.1.json"]),
        ("vocab", "/nowhere/vocab.json"),
        ("merges", "merges.of.somebody.txt"),
        ("source_spm", "../x.model"),
        ("target_spm", "/nowhere/x.model"),
        ("model_path", "x"),
        ("anything", __file__),
        ("several", ["a", __file__]),
        ("vocab_file", "{elsewhere}/tokenizer.json"),
        ("tokenizer_file", "{elsewhere}/tokenizer.json"),
        ("merges_file", "../../../etc/hosts"),
        ("chat_template_file", 7),
    ],
)
def test_a_tokenizer_that_names_other_files_is_refused(
    key: str, value: Any, cache_path: Path, tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    shutil.copytree(cache_path, cache)
    shutil.copytree(tiny.tokenizer, elsewhere)
    config = json.loads((cache / "tokenizer" / "tokenizer_config.json").read_text())
    config[key] = value.format(elsewhere=elsewhere) if isinstance(value, str) else value
    (cache / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    for command in ("inspect", "train", "verify", "bundle", "push"):
        (tmp_path / command).mkdir()
        ended = run(command, cache, tiny, tmp_path / command, pipeline)
        said = ended.out + ended.err
        assert ended.code != 0 and f"{key} names a file that is not the tokenizer's own" in said, (command, said)


def test_what_loads_a_tokenizer_sees_a_copy_that_nobody_can_swap(cache_path: Path) -> None:
    cache = Cache.open(str(cache_path))
    copied = cache.tokenizer_path
    assert cache_path not in copied.parents
    assert stat.S_IMODE(copied.parent.stat().st_mode) == 0o700
    assert (copied / "tokenizer.json").read_bytes() == (cache_path / "tokenizer" / "tokenizer.json").read_bytes()


# ---- the opener -------------------------------------------------------------------------------------------------


def test_a_path_keeps_its_root_wherever_it_goes(tmp_path: Path) -> None:
    root = ContainedPath(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"1")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path in (
        root / "b" / "file", root / "b/file", root.joinpath("b", "file"), (root / "b" / "x").with_name("file"),
        (root / "b" / "x" / "y").parent.parent / "file", pickle.loads(pickle.dumps(root / "b" / "file")),
    ):  # fmt: skip
        for use in ("read_bytes", "exists", "stat", "is_file", "open", "unlink"):
            with pytest.raises(CacheError, match="is a link"):
                getattr(path, use)()
        with pytest.raises(CacheError, match="is a link"), atomic_file(path) as file:
            file.write(b"2")
    assert (root / "a" / "file").read_bytes() == b"1"
    write_bytes(root / "a" / "new", b"3")
    assert (tmp_path / "a" / "new").read_bytes() == b"3"
    with pytest.raises(FileExistsError):
        write_bytes(root / "a" / "new", b"4", exclusive=True)
    with pytest.raises(CacheError, match="is a link"):
        list(root.files())


def test_a_folder_that_is_swapped_while_a_file_is_written_gets_nothing(tmp_path: Path) -> None:
    root, elsewhere = ContainedPath(tmp_path / "root"), tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (root / "shards").mkdir()
    with atomic_file(root / "shards" / "part") as file:
        file.write(b"1")
        (tmp_path / "root" / "shards").rename(tmp_path / "root" / "before")
        (tmp_path / "root" / "shards").symlink_to(elsewhere)
    assert list(elsewhere.iterdir()) == []
    assert (tmp_path / "root" / "before" / "part").read_bytes() == b"1"


def test_a_file_longer_than_it_may_be_is_not_read(tmp_path: Path) -> None:
    root = ContainedPath(tmp_path)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CacheError, match="more than the 1,000 that a card may have"):
        (root / "large").read_at_most(1000, "a card")


# ---- local copies of remote shards, and places ------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_copies_are_not_taken_from_a_folder_that_others_can_write(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    folder.chmod(mode)
    monkeypatch.setenv("PIPELINE_COPIES", str(folder))
    with pytest.raises(UserError, match="others can write into it; let PIPELINE_COPIES name a folder that belongs"):
        copies.folder()
    folder.chmod(0o755)
    assert copies.folder() == folder


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
def test_copies_are_not_taken_from_somebody_else_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "copies"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, -1)
    monkeypatch.setenv("PIPELINE_COPIES", str(folder))
    with pytest.raises(UserError, match="others can write into it"):
        copies.folder()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("github://org:repo@main/cache", "to allow github:// as well, set PIPELINE_SCHEMES=github"),
        ("sftp://host/cache", "to allow sftp:// as well"),
        ("memory://cache", "to allow memory:// as well"),
        ("http://127.0.0.1/cache", "to allow http:// as well"),
        ("reference://cache", "to allow reference:// as well"),
        ("simplecache::s3://bucket/cache", "a place inside another one"),
        ("zip://inside::file:///etc/archive.zip", "a place inside another one"),
        ("filecache::file:///etc", "a place inside another one"),
        ("s3://AKIA123:wJalrXUtnFEMI@bucket/cache", "a name or key in a URL is not taken"),
        ("https://user:wJalrXUtnFEMI@host/cache", "a name or key in a URL is not taken"),
        ("s3://bucket/cache?X-Amz-Signature=wJalrXUtnFEMI", "has a part behind ? or #"),
        ("gs://bucket/cache#wJalrXUtnFEMI", "has a part behind ? or #"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "train", "pull", "select"])
def test_places_are_of_known_kinds_and_hold_no_secret(
    url: str, sentence: str, command: str, tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    ended = run(command, url, tiny, tmp_path, pipeline)  # type: ignore[arg-type]
    assert ended.code == 2 and sentence in ended.err, ended.err
    assert "wJalr" not in ended.err + ended.out
    assert list(tmp_path.iterdir()) == []


def test_a_variable_allows_a_further_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.places import RemotePath, place

    with pytest.raises(UserError):
        place("memory://cache")
    monkeypatch.setenv("PIPELINE_SCHEMES", "sftp,memory")
    assert isinstance(place("memory://cache"), RemotePath)
