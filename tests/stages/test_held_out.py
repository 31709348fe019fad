"""All sequences of one row of the data are on one side of the held-out split, whatever made several of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from stages.corpus import CorpusOptions, build_corpus, numbered
from stages.derivation import Selection, plan_merge, plan_selection, write
from stages.held_out import source_rows, split_held_out
from storage.cache import Cache
from storage.errors import CacheError
from tests.conftest import Tiny
from tests.storage.synthetic import make_manifest, write_cache

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one piece and of many; every token says which row it is of, and two rows make nothing."""
    path = tmp_path_factory.mktemp("documents") / "rows.jsonl"
    lengths = [3, 40, 1, 90, 17, 16, 31, 2, 0, 64, 33, 5, 128, 16, 15]
    rows = [{"input_ids": [10 + number] * length} for number, length in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def split_cache(documents: Path, make_cache: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("split") / "cache"
    return make_cache(path, dataset=str(documents), max_length=16, overlong="split", shard_tokens=60)


def rows_by_reading(cache: Cache) -> np.ndarray:
    """Of each sequence the row that its own tokens name."""
    found = np.zeros(cache.manifest.corpus.sequences, np.int64)
    for rows in cache.column("input_ids"):
        for row, sequence in enumerate(rows.sequence_id):
            (found[sequence],) = set(rows["input_ids"][row].tolist())
    return found


def check(cache: Cache) -> None:
    named = rows_by_reading(cache)
    assert cache.manifest.corpus.source_rows == len(np.unique(named))
    own = source_rows(cache)
    # One to one.
    assert len({*zip(named.tolist(), own.tolist(), strict=True)}) == len(np.unique(named)) == len(np.unique(own))
    for share in (0.05, 0.2, 0.5):
        train, held = split_held_out(cache, share)
        assert sorted([*train, *held]) == list(range(len(named)))
        assert not {*named[train]} & {*named[held]}
        assert len({*named[held]}) == max(1, round(share * len(np.unique(named))))


def test_pieces_of_a_document_stay_together(split_cache: Cache) -> None:
    check(split_cache)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=50))
def test_rows_are_counted_over_those_that_made_a_sequence(pieces: list[int]) -> None:
    rows = np.repeat(np.arange(len(pieces)) * 3 + 7, pieces)
    found = numbered(rows) if len(rows) else None
    if len(rows) == 0 or max(pieces) <= 1:
        assert found is None
        return
    assert found is not None
    assert found.tolist() == np.unique(rows, return_inverse=True)[1].tolist()


def test_turns_of_a_chat_stay_together(tiny: Tiny, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    chats = []
    for turns in (1, 3, 2, 1):
        chat = []
        for turn in range(turns):
            chat += [{"role": "user", "content": f"q{turn}"}, {"role": "assistant", "content": f"a{turn}"}]
        chats.append({"messages": chat})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    each = build_corpus(str(path), tokenizer, CorpusOptions(turns="each", processes=1))
    assert each.source_rows is not None and each.source_rows.tolist() == [0, 1, 1, 1, 2, 2, 3]
    assert [sequence.source_row for sequence in each.read(2, 5)] == [1, 1, 2]
    whole = build_corpus(str(path), tokenizer, CorpusOptions(processes=1))
    assert whole.source_rows is None and whole.read(0, 1)[0].source_row is None


def test_the_same_sequences_of_other_rows_are_another_corpus(tiny: Tiny, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)

    def fingerprint(name: str, *rows: list[int]) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        return build_corpus(
            str(path), tokenizer, CorpusOptions(max_length=4, overlong="split", processes=1)
        ).fingerprint

    pieces = fingerprint("one", [1, 2, 3, 4, 5, 6, 7], [8, 9])
    assert pieces != fingerprint("two", [1, 2, 3, 4], [4, 5, 6, 7], [8, 9])
    assert pieces == fingerprint("again", [1, 2, 3, 4, 5, 6, 7], [8, 9])


def test_a_cache_of_one_sequence_a_row_keeps_its_split(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", make_manifest((5, 2, 7, 4, 6, 3) * 4))
    assert "source_row" not in [column.name for column in cache.manifest.columns]
    assert "source_rows" not in cache.manifest.identity["corpus"]
    assert split_held_out(cache, 0.2)[1].tolist() == [7, 9, 10, 20, 21]


# ---- caches made from caches ------------------------------------------------------------------------------------


def test_selections_and_merges_keep_rows_together(split_cache: Cache, tmp_path: Path) -> None:
    last = split_cache.manifest.corpus.sequences
    some, _ = write(plan_selection(split_cache, Selection(first=2, stop=last - 3, top_n=4)), str(tmp_path / "some"))
    check(some)
    # Two caches whose rows have the same numbers and are not the same.
    other, _ = write(plan_selection(split_cache, Selection(first=0, stop=9)), str(tmp_path / "other"))
    later, _ = write(plan_selection(split_cache, Selection(first=9)), str(tmp_path / "later"))
    merged, _ = write(plan_merge([other, later]), str(tmp_path / "merged"))
    rows = source_rows(merged)
    assert merged.manifest.corpus.source_rows == (
        (other.manifest.corpus.source_rows or other.manifest.corpus.sequences)
        + (later.manifest.corpus.source_rows or later.manifest.corpus.sequences)
    )
    assert rows[:9].max() < rows[9:].min()


def test_a_selection_of_one_sequence_a_row_needs_no_rows(split_cache: Cache, tmp_path: Path) -> None:
    alone = [s for s, n in enumerate(np.bincount(source_rows(split_cache))[source_rows(split_cache)]) if n == 1]
    first = alone[0]
    one, _ = write(plan_selection(split_cache, Selection(first=first, stop=first + 1)), str(tmp_path / "one"))
    assert one.manifest.corpus.source_rows is None


def test_a_part_holds_out_what_the_whole_does(split_cache: Cache, tmp_path: Path, pipeline: Callable[..., Any]) -> None:
    assert pipeline("pull", split_cache.path, tmp_path / "part", "--shards", "4:9").code == 0
    part = Cache.open(str(tmp_path / "part"))
    assert part.is_partial
    train, held = split_held_out(part, 0.4)
    all_train, all_held = split_held_out(split_cache, 0.4)
    assert {*train} <= {*all_train} and {*held} <= {*all_held}
    pulled = pipeline("verify", tmp_path / "part")
    assert pulled.code == 0, pulled.err


def test_merged_parts_of_one_cache_know_their_common_rows(
    split_cache: Cache, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    # Cut inside a document, and the later part first.
    for name, chosen in (("first", "0:4"), ("later", f"4:{len(split_cache.manifest.shards)}")):
        assert pipeline("pull", split_cache.path, tmp_path / name, "--shards", chosen).code == 0
    parts = [Cache.open(str(tmp_path / name)) for name in ("later", "first")]
    border = split_cache.manifest.shards[4].first
    assert source_rows(split_cache)[border - 1] == source_rows(split_cache)[border]
    merged, _ = write(plan_merge(parts), str(tmp_path / "merged"))
    check(merged)


# ---- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_a_row_that_cannot_be_is_found(
    wrong: int, split_cache: Cache, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    shutil.copytree(split_cache.path, tmp_path / "cache")
    cache = Cache.open(str(tmp_path / "cache"))
    rows = cache.read_shard(1)
    assert rows.source_row is not None
    spoilt = rows.source_row.copy()
    spoilt[0] = wrong
    cache.write_shard(1, type(rows)(rows.sequence_id, rows.lists, spoilt), cache.tail_sum(1), 0.0)
    most = split_cache.manifest.corpus.source_rows - 1
    sentence = f"row 0: source_row {wrong} is outside 0..{most}"
    found = pipeline("verify", tmp_path / "cache")
    assert found.code == 1 and sentence in found.out + found.err
    with pytest.raises(CacheError, match=sentence):
        split_held_out(cache, 0.2)


def test_rows_that_are_missing_are_refused(split_cache: Cache, tmp_path: Path) -> None:
    shutil.copytree(split_cache.path, tmp_path / "cache")
    cache = Cache.open(str(tmp_path / "cache"))
    rows = cache.read_shard(0)
    with pytest.raises(ValueError, match="these rows have no source_row"):
        cache.write_shard(0, type(rows)(rows.sequence_id, rows.lists), cache.tail_sum(0), 0.0)


def test_it_trains_resumes_and_says_how_many(
    split_cache: Cache, tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Any]
) -> None:
    _, held = split_held_out(split_cache, 0.2)
    ended = pipeline(
        "train-student", "--student", tiny.student, "--shards", split_cache.path, "--output", tmp_path / "out",
        "--max-steps", 2, "--eval-share", 0.2, "--trainer", "dataloader_num_workers=0",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["held_out_sequences"] == len(held)
    shown = pipeline("inspect", split_cache.path)
    assert f"{split_cache.manifest.corpus.source_rows}, held out with all their sequences" in shown.out
