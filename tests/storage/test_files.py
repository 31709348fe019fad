"""Files are whole or absent, and what killed writers leave is cleared without touching living ones."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from storage import files
from storage.files import atomic_file, remove_temporaries, sha256_file, write_bytes, write_json


@pytest.fixture
def dead_pid() -> int:
    """Of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def live_pid() -> Iterator[int]:
    """Of another process that runs."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_atomic_file_is_not_there_until_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with atomic_file(target) as file:
        file.write(b"first ")
        assert not target.exists()
        file.write(np.arange(3, dtype=np.int32))
        assert file.tell() == file.size == 18
    data = b"first " + np.arange(3, dtype=np.int32).tobytes()
    assert target.read_bytes() == data
    assert file.sha256 == hashlib.sha256(data).hexdigest() == sha256_file(target)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with atomic_file(tmp_path / "file") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == []


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"old")

    def write() -> None:
        with atomic_file(tmp_path / "file") as file:
            file.write(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="No space"):
        write_bytes(tmp_path / "file", b"data")
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_bytes_are_flushed_to_the_disk_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (events.append("sync"), sync(handle)))
    monkeypatch.setattr(files.os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    write_bytes(tmp_path / "file", b"data")
    assert events == ["sync", "rename", "sync"]  # the file, its name, the folder


def test_a_missing_folder_is_an_error_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_bytes(tmp_path / "nowhere" / "file", b"")
    assert names(tmp_path) == []


def test_json_is_utf8_and_ends_in_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"name": "Größe"})
    assert (tmp_path / "file.json").read_text("utf-8") == '{\n  "name": "Größe"\n}\n'


def test_a_killed_writer_leaves_a_temporary_that_is_cleared(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, pathlib\n"
        "from storage.files import atomic_file\n"
        "with atomic_file(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(files.__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], cwd=root, check=False)
    assert ended.returncode == -9
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].startswith(".tmp-")
    remove_temporaries(tmp_path)
    assert names(tmp_path) == []


def temporary(folder: Path, host: str, pid: int | str, age: float = 0.0) -> Path:
    path = folder / f".tmp-{host}.{pid}.0a1b2c3d.part-00000.parquet"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_temporaries_of_the_living_are_kept(tmp_path: Path, dead_pid: int, live_pid: int) -> None:
    kept = [
        temporary(tmp_path, files._HOST, live_pid, age=3600),
        temporary(tmp_path, files._HOST, os.getpid()),
        temporary(tmp_path, "another-machine", dead_pid, age=3600),
        tmp_path / "part-00000.parquet",
        tmp_path / ".hidden",
    ]
    for path in kept[-2:]:
        path.write_bytes(b"")
    gone = [
        temporary(tmp_path, files._HOST, dead_pid),
        temporary(tmp_path, "another-machine", live_pid, age=2 * 86_400),
    ]
    remove_temporaries(tmp_path)
    assert names(tmp_path) == sorted(path.name for path in kept)
    assert not any(path.exists() for path in gone)


@pytest.mark.parametrize("pid", ["9" * 30, "-1", "0", "x", ""])
def test_strange_names_do_not_stop_the_clearing(tmp_path: Path, dead_pid: int, pid: str) -> None:
    temporary(tmp_path, files._HOST, pid)
    (tmp_path / ".tmp-").touch()
    (tmp_path / ".tmp-odd").touch()
    dead = temporary(tmp_path, files._HOST, dead_pid)
    remove_temporaries(tmp_path)
    assert not dead.exists()
    assert (tmp_path / ".tmp-odd").exists()


def test_folders_of_dead_writers_are_cleared_too(tmp_path: Path, dead_pid: int) -> None:
    alive = files.temporary_for(tmp_path / "tokenizer")
    dead = tmp_path / alive.name.replace(f".{os.getpid()}.", f".{dead_pid}.")
    for folder in (alive, dead):
        folder.mkdir()
        (folder / "file").write_bytes(b"")
    remove_temporaries(tmp_path)
    assert names(tmp_path) == [alive.name]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_an_exclusive_file_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(files.os, "link", refuse)
    write_bytes(tmp_path / "file", b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "file", b"second", exclusive=True)
    assert (tmp_path / "file").read_bytes() == b"first"
    assert names(tmp_path) == ["file"]
