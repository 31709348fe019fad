"""A cache as one file: the same in, the same out, and nothing that leaves the target."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard

from storage.bundle import bundle, checksum_path, unbundle
from storage.cache import Cache
from storage.errors import CacheError, UserError
from storage.integrity import problems
from storage.transfer import copy_cache
from tests.storage.s3 import files
from tests.storage.synthetic import make_manifest, make_rows, write_cache

MANIFEST = make_manifest(vocabulary=40, top_n=16)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    made = write_cache(tmp_path / "cache", MANIFEST)
    made.write_tokenizer(lambda folder: (folder / "tokenizer.json").write_text("{}"))
    return made


@pytest.fixture
def packed(cache: Cache, tmp_path: Path) -> Path:
    bundle(cache, tmp_path / "cache.tar.zst")
    return tmp_path / "cache.tar.zst"


def test_there_and_back_again(cache: Cache, packed: Path, tmp_path: Path) -> None:
    opened = unbundle(packed, tmp_path / "deep" / "back")
    assert files(tmp_path / "deep" / "back") == files(tmp_path / "cache")
    assert list(problems(opened)) == [] and opened.manifest == cache.manifest


def test_equal_caches_give_equal_bundles(cache: Cache, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "cache" / ".tmp-somebody").touch()
    os.utime(tmp_path / "cache" / "manifest.json", (1, 1))
    seen: list[int] = []
    digest = bundle(cache, tmp_path / "again.tar.zst", seen.append)
    assert (tmp_path / "again.tar.zst").read_bytes() == packed.read_bytes()
    assert digest == hashlib.sha256(packed.read_bytes()).hexdigest()
    assert seen == list(range(len(MANIFEST.shards)))


def test_other_tools_read_it(packed: Path, tmp_path: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--quiet", checksum_path(packed).name], cwd=tmp_path, check=True)
    with zstandard.open(packed, "rb") as raw, tarfile.open(fileobj=raw, mode="r|") as tar:
        names = tar.getnames()
    assert names[0] == "manifest.json" and names[-1] == "README.md" and "shards/part-00002.json" in names


@pytest.mark.parametrize("at", [10, 1000, -1])
def test_a_changed_byte_is_noticed(packed: Path, tmp_path: Path, at: int) -> None:
    raw = bytearray(packed.read_bytes())
    raw[at] ^= 1
    packed.write_bytes(raw)
    with pytest.raises(CacheError, match=r"sha256 is not the one in cache\.tar\.zst\.sha256"):
        unbundle(packed, tmp_path / "back")
    checksum_path(packed).unlink()
    with pytest.raises(CacheError, match=r"cache\.tar\.zst: "):
        unbundle(packed, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "cache.tar.zst"]


@pytest.mark.parametrize("length", [0, 100, -5000])
def test_a_bundle_cut_short(packed: Path, tmp_path: Path, length: int) -> None:
    packed.write_bytes(packed.read_bytes()[:length])
    checksum_path(packed).unlink()
    with pytest.raises(CacheError, match=r"cache\.tar\.zst: "):
        unbundle(packed, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


@pytest.mark.parametrize(
    "evil",
    [
        member("../evil"),
        member("shards/../../evil"),
        member("/tmp/evil"),
        member("..\\evil"),
        member("C:evil"),
        member("."),
        member("evil", tarfile.SYMTYPE, "/etc/passwd"),
        member("evil", tarfile.SYMTYPE, ".."),
        member("evil", tarfile.LNKTYPE, "manifest.json"),
        member("evil", tarfile.FIFOTYPE),
        member("evil", tarfile.CHRTYPE),
        member("evil", tarfile.DIRTYPE),
    ],
    ids=lambda member: f"{member.name} {member.type!r}",
)
def test_members_that_leave_the_target(tmp_path: Path, packed: Path, evil: tarfile.TarInfo) -> None:
    checksum_path(packed).unlink()
    with zstandard.open(packed, "rb") as raw:
        plain = io.BytesIO(raw.read())
    with tarfile.open(fileobj=plain, mode="a") as tar:
        tar.addfile(evil)
    packed.write_bytes(zstandard.compress(plain.getvalue()))
    with pytest.raises(CacheError, match="nothing was unpacked"):
        unbundle(packed, tmp_path / "in" / "back")
    assert not any(path.name in ("evil", "back") for path in tmp_path.rglob("*"))


def rebundled(packed: Path, *members: tuple[tarfile.TarInfo, bytes]) -> None:
    """The bundle with further members, and no checksum beside it."""
    checksum_path(packed).unlink()
    with zstandard.open(packed, "rb") as raw:
        plain = io.BytesIO(raw.read())
    with tarfile.open(fileobj=plain, mode="a", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    packed.write_bytes(zstandard.compress(plain.getvalue()))


def test_members_that_are_no_files_of_a_cache(packed: Path, tmp_path: Path) -> None:
    rebundled(packed, (member("shards/run.py"), b"print()"))
    with pytest.raises(CacheError, match=r"'shards/run\.py' is no file of a cache"):
        unbundle(packed, tmp_path / "back")


def test_a_bundle_that_unpacks_to_far_more_than_its_size(packed: Path, tmp_path: Path) -> None:
    rebundled(packed, (member("tokenizer/zeros"), bytes(80 << 20)))
    assert packed.stat().st_size < 1 << 20
    with pytest.raises(CacheError, match="unpacks to more than 64 times its size"):
        unbundle(packed, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
def test_headers_and_holes_that_would_fill_the_memory(packed: Path, tmp_path: Path, kind: bytes) -> None:
    rebundled(packed, (member("tokenizer/a", kind), bytes(1 << 20)))
    with pytest.raises(CacheError, match=r"cache\.tar\.zst: "):
        unbundle(packed, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_links_do_not_go_into_a_bundle(cache: Cache, tmp_path: Path) -> None:
    """One in the tokenizer would take any file of this machine along."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "cache" / "tokenizer" / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CacheError, match=r"merges\.txt: is a link"):
        bundle(cache, tmp_path / "cache.tar.zst")
    with pytest.raises(CacheError, match=r"merges\.txt: is a link"):
        copy_cache(cache, tmp_path / "there")


def test_a_file_twice_in_a_bundle(tmp_path: Path, packed: Path) -> None:
    checksum_path(packed).unlink()
    with zstandard.open(packed, "rb") as raw:
        plain = io.BytesIO(raw.read())
    with tarfile.open(fileobj=plain, mode="a") as tar:
        tar.addfile(member("manifest.json"))
    packed.write_bytes(zstandard.compress(plain.getvalue()))
    with pytest.raises(CacheError, match=r"'manifest\.json' stands twice"):
        unbundle(packed, tmp_path / "back")


def test_a_target_that_holds_something(packed: Path, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        unbundle(packed, tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    unbundle(packed, tmp_path / "empty")
    with pytest.raises(UserError, match="no such file"):
        unbundle(tmp_path / "nothing.tar.zst", tmp_path / "back")


def test_an_unfinished_or_damaged_cache_is_not_bundled(cache: Cache, tmp_path: Path) -> None:
    begun = Cache.create_or_resume(tmp_path / "begun", MANIFEST)
    begun.write_shard(0, *make_rows(MANIFEST, 0), 0.0)
    with pytest.raises(CacheError, match="unfinished"):
        bundle(begun, tmp_path / "begun.tar.zst")
    (tmp_path / "cache" / "shards" / "part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(CacheError, match=r"part-00001\.parquet: 4 bytes"):
        bundle(cache, tmp_path / "cache.tar.zst")
    assert not list(tmp_path.glob("*.zst*"))
