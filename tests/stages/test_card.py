"""The dataset card says what the manifest and the shards say, and nothing in it can break out of its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.card import _size_category, card
from stages.summary import summarize
from storage.errors import UserError


def header(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("\n---\n")[0])


def test_the_card_is_filled_in(make_cache: Callable[..., Any], tmp_path: Path) -> None:
    citation = "@misc{text,\n  title = {Text: a `study`}\n}\n```\n# not a heading"
    more = {"license": "cc-by-4.0", "citation": citation, "temperatures": (2.0,), "limit": 20, "tail_samples": 3}
    cache = make_cache(tmp_path / "cache", **more)
    text = (tmp_path / "cache" / "README.md").read_text()
    manifest, numbers = cache.manifest, summarize(cache)
    assert text == card(cache, numbers)
    assert header(text) == {
        "pretty_name": f"Teacher log-probabilities of {manifest.teacher.name}",
        "license": "cc-by-4.0",
        "task_categories": ["text-generation"],
        "size_categories": ["n<1K"],
        "tags": ["knowledge-distillation", "teacher-logits", "teacher-logit-cache"],
        "configs": [{"config_name": "default", "data_files": "shards/*.parquet"}],
    }
    cells = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ") and line.endswith(" |")]
    rows = dict(row for row in cells if len(row) == 2)
    assert rows["licence"] == "cc-by-4.0"
    assert rows["data"] == "`corpus.jsonl`, the first 20 rows"
    assert rows["corpus fingerprint"] == f"`{manifest.corpus.fingerprint}`"
    assert rows["teacher's weights"].split()[1].rstrip(".") == manifest.teacher.weights[:16]
    assert rows["sequences"] == str(manifest.corpus.sequences)
    assert rows["tokens"] == str(manifest.corpus.tokens)
    assert (rows["tail samples per position"], rows["extra temperatures"]) == ("3", "2")
    assert f"transformers {manifest.made_with['transformers']}" in rows["engine"]
    assert all(f"| `{column.name}` |" in text for column in manifest.scoring.columns)
    assert "at the\ntemperatures 1, 2." in text
    # The citation stays inside its block.
    assert text.count("```") % 2 == 0 and "\n'''\n# not a heading\n```\n" in text

    with pytest.raises(UserError, match=r"--license: this cache was begun with 'cc-by-4\.0'"):
        make_cache(tmp_path / "cache", **{**more, "license": "mit"})
    make_cache(tmp_path / "cache", **{**more, "license": None, "citation": None})
    assert (tmp_path / "cache" / "README.md").read_text() == text


def test_without_a_licence_none_is_claimed(cache_path: Path) -> None:
    text = (cache_path / "README.md").read_text()
    assert "license" not in header(text)
    assert "| licence | not stated |" in text and "To cite" not in text


def test_sizes_as_hubs_name_them() -> None:
    sizes = {1: "n<1K", 999: "n<1K", 1000: "1K<n<10K", 99_999: "10K<n<100K", 10**6: "1M<n<10M", 10**12: "n>1T"}
    assert {rows: _size_category(rows) for rows in sizes} == sizes
