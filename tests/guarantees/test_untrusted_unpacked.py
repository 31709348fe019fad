"""A small file of somebody else that unpacks far: a shard, a mean tail, a Parquet corpus. Refused in bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.parquet_files import parquet_rows, read_schema, write_columns
from storage.cache import Cache
from storage.errors import CacheError, UserError
from storage.rows import Ragged, Rows
from tests.storage.synthetic import make_manifest, write_cache

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
# Runs a command line, then says the most memory that it held, in MiB.
SCRIPT = """
import re, sys
from pathlib import Path
from pipeline.cli import run
try:
    run(sys.argv[1:])
except SystemExit:
    pass
# Of this program alone: what `getrusage` says begins with the process that started it.
print("peak", int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def command(*words: object, **environment: str) -> tuple[str, int]:
    """What a command says, and MiB that it held at most."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip
    assert "internal" not in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.stdout + done.stderr, int(done.stdout.rpartition("peak ")[2])


def constant_shard(tokens: int) -> Rows:
    """One sequence of the token 0, scored everywhere, without any position kept."""
    scored = np.array([0, tokens - 1])
    nothing = np.zeros(2, np.int64)
    lists = {
        "input_ids": Ragged(np.zeros(tokens, np.int32), np.array([0, tokens])),
        "loss_mask": Ragged(np.zeros(tokens - 1, bool), scored),
        "top_count": Ragged(np.zeros(tokens - 1, np.uint8), scored),
        "top_ids": Ragged(np.zeros(0, np.int32), nothing),
        "top_logprobs": Ragged(np.zeros(0, np.float16), nothing),
        "gold_logprob": Ragged(np.full(tokens - 1, -1, np.float32), scored),
        "tail_logmass": Ragged(np.full(tokens - 1, -1, np.float32), scored),
        "entropy": Ragged(np.full(tokens - 1, 1, np.float16), scored),
    }
    return Rows(np.zeros(1, np.int64), lists)


def bomb(path: Path, tokens: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made by somebody who lifted the limit."""
    monkeypatch.setenv("PIPELINE_SHARD_BYTES", str(1 << 40))
    manifest = make_manifest((tokens,), shard_tokens=tokens, max_length=tokens)
    cache = Cache.create_or_resume(str(path), manifest)
    cache.write_shard(0, constant_shard(tokens), None, 1.0)
    cache.seal("card")
    monkeypatch.delenv("PIPELINE_SHARD_BYTES")
    return path


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_a_small_cache_that_unpacks_far_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = bomb(tmp_path / "cache", 40_000_000, monkeypatch)
    assert size_of(cache) < MIB
    for name in ("verify", "inspect"):
        said, peak = command(name, cache)
        assert "values and more, too many for its length; set PIPELINE_SHARD_BYTES for another limit" in said
        assert peak < 1000, peak


def test_the_most_that_is_allowed_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = bomb(tmp_path / "cache", 2_700_000, monkeypatch)
    said, peak = command("verify", cache)
    assert "PIPELINE_SHARD_BYTES" not in said and "sums of tail mass" not in said
    assert peak < 1200, peak


@pytest.mark.parametrize(("tokens", "taken"), [(130_000, True), (500_000, False)])
def test_samples_of_nothing_take_bounded_memory(
    tokens: int, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tens of kilobytes: every position stored, its 110 samples all the same id."""
    monkeypatch.setenv("PIPELINE_SHARD_BYTES", str(1 << 40))
    manifest = make_manifest((tokens,), shard_tokens=tokens, max_length=tokens, top_n=1, tail_samples=110)
    cache = Cache.create_or_resume(str(tmp_path / "cache"), manifest)
    rows, each = constant_shard(tokens), np.array([0, tokens - 1])
    lists = rows.lists | {
        "loss_mask": Ragged(np.ones(tokens - 1, bool), each),
        "top_count": Ragged(np.ones(tokens - 1, np.uint8), each),
        "top_ids": Ragged(np.zeros(tokens - 1, np.int32), each),
        "top_logprobs": Ragged(np.full(tokens - 1, -1, np.float16), each),
        "tail_samples": Ragged(np.ones(110 * (tokens - 1), np.int32), 110 * each),
    }
    cache.write_shard(0, Rows(rows.sequence_id, lists), np.zeros(300), 1.0)
    monkeypatch.delenv("PIPELINE_SHARD_BYTES")
    (tmp_path / "cache/tokenizer").mkdir()
    (tmp_path / "cache/tokenizer/tokenizer.json").write_text("{}")
    assert size_of(tmp_path / "cache") < MIB
    for name in ("verify", "select"):
        more = ("--output", tmp_path / "other", "--top-n", 1, "--drop", "entropy") if name == "select" else ()
        said, peak = command(name, tmp_path / "cache", *more)
        assert ("PIPELINE_SHARD_BYTES" in said) is not taken, said
        assert peak < 1500, (name, peak)


def test_a_shard_that_no_reader_takes_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_manifest((100_000,), shard_tokens=100_000, max_length=100_000)
    cache = Cache.create_or_resume(str(tmp_path / "cache"), manifest)
    monkeypatch.setenv("PIPELINE_SHARD_BYTES", "1000")
    with pytest.raises(CacheError, match="readers refuse what unpacks so far; choose fewer --shard-tokens"):
        cache.write_shard(0, constant_shard(100_000), None, 1.0)
    assert not cache.receipt_path(0).exists()


def test_a_plan_of_more_tokens_than_bytes_can_hold_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", make_manifest())
    receipt = tmp_path / "cache/shards/part-00000.json"
    said = json.loads(receipt.read_text())
    receipt.write_text(json.dumps(said | {"tokens": 1 << 40}))
    text, _ = command("verify", tmp_path / "cache")
    assert "says 1,099,511,627,776 tokens in" in text


def test_a_mean_tail_of_a_claimed_vocabulary_is_refused(tmp_path: Path) -> None:
    vocabulary = 1 << 27
    manifest = make_manifest(vocabulary=vocabulary)
    write_cache(tmp_path / "cache", make_manifest())
    raw = json.loads((tmp_path / "cache/manifest.json").read_text())
    raw["vocabulary_size"] = vocabulary
    (tmp_path / "cache/manifest.json").write_text(json.dumps(raw))
    for receipt in (tmp_path / "cache/shards").glob("*.json"):
        receipt.write_text(
            json.dumps(
                json.loads(receipt.read_text()) | {"cache_id": Cache.open(str(tmp_path / "cache")).manifest.cache_id}
            )
        )
    prior = tmp_path / "cache/tail_prior.parquet"
    table = pa.table({"tail_prior": pa.array(np.zeros(vocabulary, np.float32))}, metadata={"stored_positions": "9"})
    pq.write_table(table, prior, compression="zstd", use_dictionary=False, write_page_checksum=True)
    said = {
        "cache_id": Cache.open(str(tmp_path / "cache")).manifest.cache_id,
        "sha256": hashlib.sha256(prior.read_bytes()).hexdigest(),
    }
    (tmp_path / "cache/tail_prior.json").write_text(json.dumps(said))
    assert prior.stat().st_size < MIB and manifest.vocabulary_size == vocabulary
    text, peak = command("verify", tmp_path / "cache")
    assert "tail_prior.parquet: unreadable" in text and "PIPELINE_SHARD_BYTES" in text and peak < 1000, (text, peak)


# ---- corpora ----------------------------------------------------------------------------------------------------

ROWS = 1000


def repeated_text(path: Path) -> None:
    """Each row is one long text, which stands in the file once."""
    text = pa.array(["x" * (16 * MIB)])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * ROWS, pa.int32()), text)
    pq.write_table(pa.table({"text": column}), path, compression="zstd", store_schema=False)


def nested_text(path: Path) -> None:
    text = pa.DictionaryArray.from_arrays(pa.array([0] * ROWS, pa.int32()), pa.array(["x" * (16 * MIB)]))
    messages = pa.StructArray.from_arrays([pa.array(["user"] * ROWS), text], ["role", "content"])
    column = pa.ListArray.from_arrays(pa.array(range(ROWS + 1), pa.int32()), messages)
    pq.write_table(pa.table({"messages": column}), path, compression="zstd", store_schema=False)


def prefixed_text(path: Path) -> None:
    column = pa.array(["x" * (MIB // 2)] * ROWS)
    pq.write_table(
        pa.table({"text": column}), path, compression="zstd", use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
    )  # fmt: skip


def one_long_list(path: Path) -> None:
    column = pa.ListArray.from_arrays(pa.array([0, 1 << 26], pa.int32()), pa.array(np.zeros(1 << 26, np.int32)))
    pq.write_table(pa.table({"input_ids": column}), path, compression="zstd")


BOMBS = [repeated_text, nested_text, prefixed_text, one_long_list]


@pytest.mark.parametrize("make", BOMBS)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_small_parquet_corpus_that_unpacks_far_is_refused(make: object, mixed: bool, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    make(path)  # type: ignore[operator]
    assert path.stat().st_size < 2 * MIB, path.stat().st_size
    script = (
        "import os, resource, sys\n"
        "from pathlib import Path\n"
        "from stages.parquet_files import parquet_rows, read_schema, write_columns\n"
        "from storage.errors import CacheError, UserError\n"
        "path, target, mixed = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == 'True'\n"
        "try:\n"
        "    if mixed: sum(1 for _ in parquet_rows(path, lambda n: None))\n"
        "    else: write_columns([path], read_schema(path)[0].names, target, 10**9, lambda n: None)\n"
        "except UserError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)\n"
    )
    words = [sys.executable, "-c", script, str(path), str(tmp_path / "target"), str(mixed)]
    environment = {**os.environ, "PIPELINE_CORPUS_MEMORY": str(200 * MIB)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-1000:]
    said, peak = done.stdout.strip().splitlines()
    assert said.startswith(str(path)) and ("PIPELINE_CORPUS_MEMORY" in said or "PIPELINE_ROW_BYTES" in said), said
    assert 0 < int(peak) < 700, (said, peak)


def test_a_row_of_parquet_has_the_limit_of_any_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_ROW_BYTES", "1000")
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["x" * 500, "y" * 1001]}), path)
    for read in (
        lambda: list(parquet_rows(path, lambda n: None)),
        lambda: write_columns([path], read_schema(path)[0].names, str(tmp_path / "target"), 9, lambda n: None),
    ):
        with pytest.raises(UserError, match="has a row that is longer than 1,000 bytes"):
            read()


def test_what_is_read_in_a_process_of_its_own_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and progress of a file, whichever process reads it."""
    path = tmp_path / "rows.parquet"
    rows = [{"text": f"{i} \udc80é".encode("utf-8", "replace").decode(), "n": i} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    seen: list[object] = []
    for small in (1 << 30, 0):
        monkeypatch.setattr("stages.parquet_files._SMALL", small)
        counts: list[int] = []
        target = tmp_path / f"target-{small}"
        encoded = write_columns([path], ["text", "n"], str(target), 2400, counts.append)
        with pa.memory_map(str(target)) as source:
            table = pa.ipc.open_stream(source).read_all()
        seen.append((list(parquet_rows(path, counts.append)), table.to_pylist(), encoded, counts))
    assert seen[0] == seen[1] and seen[0][1] == rows[:2400]  # type: ignore[index]
