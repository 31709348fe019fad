"""Data sets of odd shapes through the command line: what becomes of them is said, or refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished, Tiny

Pipeline = Callable[..., Finished]


@pytest.fixture
def caching(pipeline: Pipeline, tiny: Tiny) -> Pipeline:
    def call(dataset: object, output: object, *more: object) -> Finished:
        words = ("--teacher", tiny.teacher, "--dataset", dataset, "--output", output, "--engine", "transformers")
        return pipeline("cache-teacher", *words, "--top-n", 4, "--processes", 1, *more)

    return call


def test_what_of_the_data_is_not_used_is_said(pipeline: Pipeline, tiny: Tiny, tmp_path: Path) -> None:
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "one <|endoftext|> two"}\n{"text": "three four"}\n')
    (tmp_path / "README.md").write_text("about")
    ended = pipeline("plan", "--teacher", tiny.teacher, "--dataset", tmp_path)
    assert ended.code == 0, ended
    lines = [line for line in ended.err.splitlines() if line.startswith("corpus: ")]
    assert lines[0].startswith("corpus: 2 rows, 2 sequences")
    assert lines[1:] == [
        "corpus: 1 row contains text that the tokenizer reads as special tokens",
        "corpus: 2 sequences end with an end-of-sequence token that has a loss; for rows that are pieces of documents "
        "--no-append-eos leaves it out",
        "corpus: not used, of split validation: validation.jsonl",
        "corpus: passed over: README.md",
    ]
    ended = pipeline("plan", "--teacher", tiny.teacher, "--dataset", tmp_path, "--split", "dev")
    assert ended.code == 2 and "has no split 'dev'; choose one of: train, validation." in ended.err


def test_an_output_inside_the_data(caching: Pipeline, tiny: Tiny, tmp_path: Path) -> None:
    shutil.copy(tiny.corpus, tmp_path / "a.jsonl")
    ended = caching(tmp_path, tmp_path / "cache")
    assert ended.code == 2 and ended.err.count("\n") == 1 and "lies inside the data set" in ended.err, ended
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_changed_corpus_is_called_one(caching: Pipeline, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "one two"}\n{"text": "three"}\n')
    assert caching(data, tmp_path / "cache").code == 0
    data.write_text('{"text": "three"}\n{"text": "one two"}\n')
    ended = caching(data, tmp_path / "cache")
    assert ended.code == 2 and "holds another cache (the corpus changed, by its rows, the tokenizer or" in ended.err
    assert "tokens as before, but not the same ones" in ended.err and "fingerprint" not in ended.err


def test_a_data_file_whose_name_is_not_utf8(caching: Pipeline, tiny: Tiny, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    shutil.copy(tiny.corpus, name)
    ended = caching(name, tmp_path / "cache", "--limit", 3)
    assert ended.code == 0, ended
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["source"]["dataset"] == "caf\ufffd.jsonl"


_ODD = {
    "empty.parquet": b"",
    "nan.jsonl": b'{"text": NaN}',
    "digits.jsonl": b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
    "surrogate.jsonl": b'{"text": "a \\ud800 b"}',
    "surrogate-key.jsonl": b'{"te\\ud800": "a b"}',
    "deep.jsonl": b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
    "deeper.jsonl": b'{"text": ' + b"[" * 9000 + b"]" * 9000 + b"}",
    "utf16.csv": "text\na b\n".encode("utf-16"),
    "open.csv": b'text\n"a b\n',
    "header.tsv": b"text\n",
    "cut.jsonl.gz": b"\x1f\x8b\x08\x00",
    "table.xlsx": b"PK",
}


@pytest.mark.parametrize("name", _ODD)
def test_odd_data_is_one_sentence(pipeline: Pipeline, tiny: Tiny, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(_ODD[name])
    ended = pipeline("plan", "--teacher", tiny.teacher, "--dataset", tmp_path / name)
    assert ended.code == 2 and ended.err.count("\n") == 1, ended
    assert ended.err.startswith("error: ") and "internal" not in ended.err and name in ended.err
