"""Odd values in a cache of somebody else: each command ends in a sentence, shows little, and takes its time alone."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.mask_view import between_marks, stretches
from stages.identity import tokenizer_identity
from stages.pretrained import load_tokenizer
from storage.cache import Cache
from storage.files import sha256_file
from storage.rows import Ragged, Rows
from storage.schema import META_CACHE_ID
from tests.conftest import Tiny

COMMANDS = {
    "verify": ["verify", "{cache}"],
    "inspect": ["inspect", "{cache}"],
    "masks": ["inspect", "{cache}", "--masks"],
    "select": ["select", "{cache}", "-o", "{out}", "--top-n", "1"],
    "merge": ["merge", "{cache}", "{sound}", "-o", "{out}"],
    "bundle": ["bundle", "{cache}", "{out}.tar.zst"],
    "pull": ["pull", "{cache}", "{out}"],
    "train": [
        "train-student",
        "--student",
        "{student}",
        "--shards",
        "{cache}",
        "--output",
        "{out}",
        "--max-steps",
        "1",
    ],
}


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = {"a": value}
    return value


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a negative seed": lambda m: m["scoring"].update(seed=-1),
    "a seed of many digits": lambda m: m["scoring"].update(seed=10**30),
    "a deep source": lambda m: m["source"].update(x=deep(400)),
    "half a character": lambda m: m["source"].update(dataset="\ud800"),
    "half a character in a name": lambda m: m["made_with"].update({"\udfff": "1"}),
    "a long maker": lambda m: m["made_with"].update(torch="9" * 4_000_000),
    "many makers": lambda m: m["made_with"].update({f"x{i}": "1" for i in range(4000)}),
    "a long data set": lambda m: m["source"].update(dataset="d" * 4_000_000),
    "a long teacher": lambda m: m["teacher"].update(name="t" * 4_000_000),
}
SHARDS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "a column twice": lambda t: t.append_column("input_ids", t["input_ids"]),
    "another column": lambda t: t.append_column("x", pa.array([1] * len(t))),
    "a sure impossibility": lambda t: replaced(t, "gold_logprob", 1e30),
    "a great mass": lambda t: replaced(t, "tail_logmass", 1e30),
    "no number": lambda t: replaced(t, "gold_logprob", float("nan")),
    "an endless entropy": lambda t: replaced(t, "entropy", float("inf")),
}


def replaced(table: pa.Table, name: str, value: float) -> pa.Table:
    kind = table.schema.field(name).type
    lists = [[value] * len(each) for each in table[name].to_pylist()]
    return table.set_column(table.schema.get_field_index(name), name, pa.array(lists, kind))


def ran(command: str, cache: Path, tmp_path: Path, tiny: Tiny, pipeline: Callable[..., Any]) -> Any:
    out = tmp_path / f"out-{command}"
    words = [
        word.format(cache=cache, out=out, student=tiny.student, sound=tiny.root / "cache") for word in COMMANDS[command]
    ]
    begin = time.monotonic()
    ended = pipeline(*words)
    assert time.monotonic() - begin < 30
    assert "internal" not in ended.err and "Warning" not in ended.err, ended.err[:2000]
    assert len(ended.err) < 8000 and len(ended.out) < 20_000, (len(ended.err), len(ended.out))
    return ended


@pytest.mark.parametrize("kind", MANIFESTS)
def test_odd_manifests(kind: str, cache_path: Path, tmp_path: Path, tiny: Tiny, pipeline: Callable[..., Any]) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(cache_path, cache)
    manifest = json.loads((cache / "manifest.json").read_text())
    MANIFESTS[kind](manifest)
    (cache / "manifest.json").write_text(json.dumps(manifest))
    for command in COMMANDS:
        ran(command, cache, tmp_path, tiny, pipeline)


@pytest.mark.parametrize("kind", SHARDS)
def test_odd_shards(kind: str, cache_path: Path, tmp_path: Path, tiny: Tiny, pipeline: Callable[..., Any]) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(cache_path, cache)
    for path in (cache / "shards").glob("*.parquet"):
        table = pq.read_table(path)
        written = SHARDS[kind](table)
        dictionary = ["x"] if "x" in written.column_names else False
        pq.write_table(written, path, compression="zstd", use_dictionary=dictionary, write_page_checksum=True)
        receipt = path.with_suffix(".json")
        said = json.loads(receipt.read_text()) | {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        receipt.write_text(json.dumps(said))
    for command in COMMANDS:
        ended = ran(command, cache, tmp_path, tiny, pipeline)
        if kind not in ("another column",) and command in ("verify", "inspect"):
            assert ended.code, (command, ended.out)


def test_a_cache_without_a_loss(cache_path: Path, tmp_path: Path, tiny: Tiny, pipeline: Callable[..., Any]) -> None:
    made = Cache.open(str(cache_path))
    cache = Cache.create_or_resume(str(tmp_path / "cache"), made.manifest)
    for index in range(len(made.manifest.shards)):
        rows = made.read_shard(index)
        nothing = np.zeros(len(rows) + 1, np.int64)
        lists = rows.lists | {
            name: Ragged(rows[name].values[:0], nothing) for name in ("top_ids", "top_logprobs") if name in rows.lists
        }
        for name in ("loss_mask", "top_count"):
            lists[name] = Ragged(np.zeros_like(rows[name].values), rows[name].offsets)
        cache.write_shard(index, Rows(rows.sequence_id, lists), np.zeros(made.manifest.vocabulary_size), 1.0)
    shutil.copytree(cache_path / "tokenizer", tmp_path / "cache" / "tokenizer")
    cache.seal("card")
    for command in COMMANDS:
        ended = ran(command, tmp_path / "cache", tmp_path, tiny, pipeline)
        if command == "train":
            assert ended.code == 2 and "no position has a loss, so there is nothing to train on" in ended.err
        elif command != "merge":
            assert ended.code == 0, (command, ended.err)


def test_a_tokenizer_of_many_folders(
    cache_path: Path, tmp_path: Path, tiny: Tiny, pipeline: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(cache_path, cache)
    folder = os.open(cache / "tokenizer", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("a", dir_fd=folder)
        below = os.open("a", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    for command in ("verify", "inspect", "bundle", "train"):
        ended = ran(command, cache, tmp_path, tiny, pipeline)
        assert ended.code and "lies deeper than any folder of a cache" in ended.err + ended.out
    subprocess.run(["rm", "-r", str(cache)], check=True)


@pytest.mark.parametrize("more", [[], ["--masks"]])
def test_tokens_of_endless_text_are_not_shown(
    more: list[str], cache_path: Path, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(cache_path, cache)
    tokenizer = json.loads((cache / "tokenizer/tokenizer.json").read_text())
    steps = [{"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 60}] * 4
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"], *steps]}
    (cache / "tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    # As the one who made this cache would have it: the manifest names this very tokenizer.
    identity = tokenizer_identity(load_tokenizer(str(cache / "tokenizer"))).model_dump()
    manifest = json.loads((cache / "manifest.json").read_text()) | {"tokenizer": identity}
    (cache / "manifest.json").write_text(json.dumps(manifest))
    adopt_receipts(cache)
    ended = pipeline("inspect", cache, *more)
    assert ended.code and "to make text with this tokenizer gives more than" in ended.err, ended.err[:500]
    assert len(ended.out) < 20_000


def adopt_receipts(cache: Path) -> None:
    """Let all receipts, and the metadata of shards, name the id that the manifest now has."""
    identity = Cache.open(str(cache)).manifest.cache_id
    for path in (cache / "shards").glob("*.parquet"):
        table = pq.read_table(path)
        metadata = {**(table.schema.metadata or {}), META_CACHE_ID: identity.encode()}
        pq.write_table(
            table.replace_schema_metadata(metadata), path, compression="zstd", use_dictionary=False,
            write_page_checksum=True,
        )  # fmt: skip
        receipt = path.with_suffix(".json")
        new = {"cache_id": identity, "sha256": sha256_file(path), "bytes": path.stat().st_size}
        receipt.write_text(json.dumps(json.loads(receipt.read_text()) | new))
    prior = cache / "tail_prior.json"
    if prior.exists():
        prior.write_text(json.dumps(json.loads(prior.read_text()) | {"cache_id": identity}))


# ---- masks ------------------------------------------------------------------------------------------------------


class Letters:
    """Decodes an id to its letter."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def test_a_mask_that_changes_at_every_token_takes_its_time_alone() -> None:
    ids = np.full(200_001, ord("a"))
    begin = time.monotonic()
    view = stretches(Letters(), ids, np.arange(200_000) % 2 == 0)
    text, opening, closing = between_marks(view)
    assert time.monotonic() - begin < 20
    assert len(view) == 200_001 and text.startswith(f"a{opening}a{closing}a")


def test_marks_are_found_in_a_text_of_marks() -> None:
    """Each number of a mark that might be taken stands in the text."""
    text = "".join(f"[{n}[ ]{n}] [[ ]] <<< >>> {{{{{{ }}}}}}" for n in range(1, 60_000))
    begin = time.monotonic()
    shown, opening, closing = between_marks([(text, False), ("b", True)])
    assert time.monotonic() - begin < 10
    assert (opening, closing) == ("[60000[", "]60000]") and shown.endswith("[60000[b]60000]")


@pytest.mark.parametrize("seed", range(50))
def test_marked_text_can_be_read_back(seed: int) -> None:
    random_ = random.Random(seed)
    pieces = ["[", "]", "[[", "]]", "<<<", ">", "{{{", "}", "1", "[1[", "]1]", "2", "a"]
    view = [("".join(random_.choices(pieces, k=random_.randrange(1, 9))), bool(i % 2)) for i in range(6)]
    shown, opening, closing = between_marks(view)
    found, marked = [], False
    for part in re.split(f"({re.escape(opening)}|{re.escape(closing)})", shown):
        if part in (opening, closing) and part == (closing if marked else opening):
            marked = not marked
        elif part:
            found.append((part, marked))
    joined = [("".join(t for t, _ in group), m) for m, group in itertools.groupby(found, key=lambda each: each[1])]
    assert joined == view
