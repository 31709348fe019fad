"""A corpus of somebody else: a small file that unpacks into gigabytes is refused before it does."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zstandard

from stages.sources import load_rows
from stages.text_files import text_rows
from storage.errors import UserError
from storage.limits import ROW_BYTES
from tests.conftest import Tiny

MIB = 1 << 20


def packed(path: Path, unpacked: int) -> int:
    """Write one JSON string of so many bytes, compressed; returns the length of the file."""
    piece = b" " * MIB
    if path.suffix == ".zst":
        compressor = zstandard.ZstdCompressor(level=19)
        with path.open("wb") as raw, compressor.stream_writer(raw) as file:
            file.write(b'{"text": "')
            for _ in range(unpacked // MIB):
                file.write(piece)
            file.write(b'"}\n')
    else:
        with gzip.open(path, "wb", compresslevel=9) as file:
            file.write(b'{"text": "')
            for _ in range(unpacked // MIB):
                file.write(piece)
            file.write(b'"}\n')
    return path.stat().st_size


@pytest.mark.parametrize("ending", [".jsonl.zst", ".jsonl.gz", ".txt.zst", ".csv.zst", ".json.gz"])
def test_a_bomb_is_refused_within_bounded_memory(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    # A whole document may be longer than a row.
    unpacked, environment = 1 << 30, {"PIPELINE_ROW_BYTES": str(16 * MIB)} if ending.startswith(".json.") else {}
    assert packed(path, unpacked) < unpacked // 500
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from stages.text_files import text_rows\n"
        "from storage.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "try:\n"
        "    for row in text_rows(Path(sys.argv[1]), sys.argv[2], lambda n: None): pass\n"
        "except UserError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    words = [sys.executable, "-c", script, str(path), ending]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=120, cwd=root, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said, peak = done.stdout.strip().splitlines()
    assert "bytes, the most that" in said and "PIPELINE_ROW_BYTES" in said
    assert int(peak) * 1024 < 1.5 * (1 << 30), peak


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.zst", ".jsonl.gz"])
def test_the_limit_is_that_of_one_row(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_ROW_BYTES", "2000")
    row = json.dumps({"text": "x" * (2000 - len('{"text": ""}'))})
    assert len(row) == 2000
    text = "\n".join([row] * 50).encode()
    path = tmp_path / f"rows{ending}"
    pack: dict[str, Callable[[bytes], bytes]] = {
        ".jsonl": bytes, ".jsonl.zst": zstandard.ZstdCompressor().compress, ".jsonl.gz": gzip.compress,
    }  # fmt: skip
    path.write_bytes(pack[ending](text))
    assert len(list(text_rows(path, ending, lambda n: None))) == 50
    path.write_bytes(pack[ending](text + b"\n" + row[:-2].encode() + b'x"}\n'))
    with pytest.raises(
        UserError, match=r", line \d+ is longer than 2,000 bytes, the most that a row may have; split it"
    ):
        list(text_rows(path, ending, lambda n: None))


def test_a_limit_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setenv("PIPELINE_ROW_BYTES", "much")
    with pytest.raises(UserError, match="PIPELINE_ROW_BYTES=much: wants a number of bytes"):
        list(text_rows(tmp_path / "a.jsonl", ".jsonl", lambda n: None))
    monkeypatch.delenv("PIPELINE_ROW_BYTES")
    assert ROW_BYTES.default == 256 * MIB and len(list(text_rows(tmp_path / "a.jsonl", ".jsonl", lambda n: None))) == 1


# ---- folders ----------------------------------------------------------------------------------------------------


def saved(folder: Path, *names: str) -> Path:
    import datasets

    data = {name: datasets.Dataset.from_dict({"text": ["a", "b"]}) for name in names}
    (datasets.DatasetDict(data) if names != ("",) else data[""]).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("splits", [("",), ("train", "test")])
@pytest.mark.parametrize("name", ["../../secret.arrow", "{elsewhere}/data-00000-of-00001.arrow", "sub/../x.arrow", 7])
def test_a_saved_data_set_names_no_files_elsewhere(splits: tuple[str, ...], name: object, tmp_path: Path) -> None:
    folder, elsewhere = saved(tmp_path / "saved", *splits), saved(tmp_path / "elsewhere", "")
    state = next(iter(sorted(folder.rglob("state.json"))))
    said = json.loads(state.read_text())
    said["_data_files"] = [{"filename": name.format(elsewhere=elsewhere) if isinstance(name, str) else name}]
    state.write_text(json.dumps(said))
    with pytest.raises(UserError, match="which is not of its folder; mend or remove it"):
        load_rows(str(folder))


def test_a_saved_data_set_has_no_links_out_of_it(tmp_path: Path) -> None:
    folder, elsewhere = saved(tmp_path / "saved", ""), saved(tmp_path / "elsewhere", "")
    assert len(load_rows(str(folder))) == 2
    data = next(folder.glob("*.arrow"))
    data.unlink()
    data.symlink_to(next(elsewhere.glob("*.arrow")))
    with pytest.raises(UserError, match="is a link out of the folder"):
        load_rows(str(folder))


def test_splits_of_a_saved_data_set_are_its_own_folders(tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", "train", "test")
    saved(tmp_path / "elsewhere", "")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "../elsewhere"]}))
    with pytest.raises(UserError, match=r"names the file '\.\./elsewhere', which is not of its folder"):
        load_rows(str(folder))


# ---- cards ------------------------------------------------------------------------------------------------------

LEVELS = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
BOMB = "a0: &a0 [x, x]\n" + "\n".join(LEVELS) + "\n"
STARS = "*a" * 40 + "b"
CARDS = {
    "a folder of aliases": BOMB + "configs:\n- data_dir: *a9\n",
    "a split of aliases": BOMB + "configs:\n- data_files:\n  - split: *a9\n    path: x\n",
    "a path of aliases": BOMB + "configs:\n- data_files:\n  - split: train\n    path: [*a9]\n",
    "files of aliases": BOMB + "configs:\n- data_files: *a9\n",
    "names of aliases": BOMB + "configs:\n- config_name: *a9\n- config_name: b\n",
    "merges of merges": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
    "a pattern of stars": f"configs:\n- data_files:\n  - split: train\n    path: '{STARS}'\n",
    "a pattern of folders": f"configs:\n- data_files: '{'**/*a' * 30}b'\n",
    "a pattern that is none": "configs:\n- data_files: 'x[z-a]'\n",
    "a truth that is none": "configs: !!bool maybe\n",
    "a number that is none": "configs: !!int ''\n",
    "a fraction that is none": "configs: !!float ''\n",
    "a time that is none": "configs: !!timestamp foo\n",
    "bytes that are none": "configs: !!binary x\n",
    "a set of sets": "configs: !!set {[a]: b}\n",
    "a number of many digits": "configs:\n- data_dir: " + "9" * 100_000 + "\n",
    "nested": "configs: " + "[" * 50_000 + "\n",
    "code": "configs: !!python/object/apply:os.system [echo]\n",
}


@pytest.mark.parametrize("kind", CARDS)
def test_a_card_of_a_data_set_is_read_in_bounded_time(kind: str, tmp_path: Path, pipeline: Callable[..., Any]) -> None:
    folder = tmp_path / "data" / "/".join(["a" * 60] * 20)
    folder.mkdir(parents=True)
    (folder / ("a" * 200 + ".jsonl")).write_text('{"text": "A dog ran."}\n')
    (tmp_path / "data" / "README.md").write_text(f"---\n{CARDS[kind]}---\n")
    begin = time.monotonic()
    ended = pipeline("plan", "--teacher", tmp_path / "none", "--dataset", tmp_path / "data")
    assert ended.code == 2 and "internal" not in ended.err and len(ended.err) < 1500, ended.err[:2000]
    with suppress(UserError):
        load_rows(str(tmp_path / "data"))
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_a_deep_file_of_a_saved_data_set_is_refused(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", "")
    (folder / name).write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(UserError, match="cannot be opened"):
        load_rows(str(folder))


def test_a_header_of_many_columns_is_read_in_time(tmp_path: Path) -> None:
    names = ",".join(f"c{i}" for i in range(300_000)) + ",c1"
    (tmp_path / "a.csv").write_text(f"{names}\n{','.join('1' * 300_001)}\n")
    begin = time.monotonic()
    rows = load_rows(str(tmp_path / "a.csv"))
    assert len(rows) == 1 and time.monotonic() - begin < 20


def test_many_columns_are_named_briefly(tmp_path: Path, tiny: Tiny, pipeline: Callable[..., Any]) -> None:
    row = {f"c{i}": "x" for i in range(30_000)} | {"y" * 9000: "x"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    ended = pipeline("plan", "--teacher", tiny.teacher, "--dataset", tmp_path / "a.jsonl")
    assert ended.code == 2 and len(ended.err) < 1500, len(ended.err)
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"text": "A dog ran."}) + "\n")
    ended = pipeline(
        "cache-teacher", "--teacher", tiny.teacher, "--dataset", tmp_path / "a.jsonl", "--output", tmp_path / "c",
        "--engine", "transformers",
    )  # fmt: skip
    assert ended.code == 0 and "and 29,989 more" in ended.err and len(ended.err) < 3000, len(ended.err)
