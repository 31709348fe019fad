"""A manifest of somebody else takes memory and time in proportion, and problems are not shown without end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.cache import Cache
from tests.storage.synthetic import make_manifest, write_cache

ROOT = Path(__file__).resolve().parents[2]
BYTES = 20_000_000
SCRIPT = """
import sys
from pathlib import Path
from storage.errors import CacheError
from storage.manifest import read_manifest
try:
    read_manifest(Path(sys.argv[1]))
    print("read")
except CacheError as error:
    print(error)
# Of this program alone: the maximum of getrusage holds what the parent had when it began this one.
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024)
"""


@pytest.mark.parametrize(
    ("place", "item", "sentence"),
    [
        ('"shards": [', "{}", "the manifest is damaged at shards.0"),
        ('"derived_from": [', "{}", "the manifest is damaged at derived_from.0"),
        ('"source": {', '"k%d":[]', "fields in one place"),
        ('"teacher": {', '"k%d":0', "fields in one place"),
        ("{", '"k%d":0', "fields in one place"),
        ('"source": {"a": [', "[]", "read"),
    ],
)
def test_a_large_manifest_takes_memory_in_proportion(place: str, item: str, sentence: str, tmp_path: Path) -> None:
    manifest = make_manifest().model_dump(mode="json")
    text = json.dumps(manifest)
    many = ",".join(item % i if "%" in item else item for i in range(BYTES // (len(item) + 7)))
    if place == "{":
        text = text[:-1] + "," + many + "}"
    elif place.endswith("{"):
        text = text.replace(place, place + many + ",", 1)
    elif place.endswith('"a": ['):
        text = text.replace('"source": {', place + many + "], ", 1)
    else:
        name = place.partition(":")[0].strip('"')
        del manifest[name]
        text = json.dumps(manifest)[:-1] + f', "{name}": [{many}]}}'
    path = tmp_path / "manifest.json"
    path.write_text(text)
    words = [sys.executable, "-c", SCRIPT, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT)
    said, peak = done.stdout.strip().splitlines()
    assert sentence in said and len(said) < 400, said
    assert int(peak) < 1200, peak


def test_problems_are_counted_and_the_first_are_shown(tmp_path: Path, pipeline: Callable[..., Any]) -> None:
    cache = write_cache(tmp_path / "cache", make_manifest((5, 2, 7, 4, 6, 3) * 60, shard_tokens=12))
    shards = len(cache.manifest.shards)
    for index in range(shards):
        Path(str(Cache.open(str(tmp_path / "cache")).receipt_path(index))).unlink()
    ended = pipeline("verify", tmp_path / "cache")
    assert ended.code == 1 and shards > 110
    assert ended.out.count("there is no receipt") == 100
    hidden = int(
        re.search(r"^and ([0-9,]+) problems more; set PIPELINE_SHOWN for another limit$", ended.out, re.MULTILINE)[
            1
        ].replace(",", "")
    )
    # The tokenizer is looked at afterwards, and said in any case.
    assert hidden >= shards - 100 and f"{101 + hidden} problems in this cache" in ended.err
