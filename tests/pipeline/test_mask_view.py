"""A sequence as text with its trained tokens marked: in `inspect --masks` and at the start of `cache-teacher`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipeline.mask_view import between_marks, printable_text, shortened, show, stretches
from tests.conftest import Finished, Tiny

Pipeline = Callable[..., Finished]


@pytest.fixture(scope="module")
def tokenizer(tiny: Tiny) -> Any:
    return AutoTokenizer.from_pretrained(tiny.tokenizer)


def view_of(tokenizer: Any, *parts: tuple[str, bool]) -> list[tuple[str, bool]]:
    """The view of a sequence that was encoded part by part."""
    ids: list[int] = []
    marks: list[bool] = []
    for text, marked in parts:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += own
        marks += [marked] * len(own)
    return stretches(tokenizer, np.array(ids), np.array(marks[1:]))


def test_the_text_of_each_stretch(tokenizer: Any) -> None:
    parts = [("Q: what?\n", False), (" A: this.\n", True), ("Q: é?", False), ("日本<|endoftext|>", True)]
    assert view_of(tokenizer, *parts) == parts


def test_pieces_of_one_character_are_no_replacement_characters(tokenizer: Any) -> None:
    """A loss that begins or ends inside a character: each of its tokens is a byte."""
    ids = np.array(tokenizer("a😀b", add_special_tokens=False)["input_ids"])
    assert len(ids) == 6
    for mask in range(32):
        marks = np.array([bool(mask >> bit & 1) for bit in range(5)])
        view = stretches(tokenizer, ids, marks)
        assert "".join(text for text, _ in view) == "a😀b"
        assert [marked for text, marked in view if "😀" in text] == [bool(marks[:4].any())]
        assert [marked for text, marked in view if "b" in text] == [bool(marks[4])]


def test_a_character_that_is_never_completed(tokenizer: Any) -> None:
    ids = np.array(tokenizer("a😀", add_special_tokens=False)["input_ids"])[:3]
    assert stretches(tokenizer, ids, np.array([True, True])) == [("a", False), ("\ufffd", True)]


@pytest.mark.parametrize(
    ("view", "text"),
    [
        ([("ask ", False), ("answer", True), (" end", False)], "ask [[answer]] end"),
        ([("a[", False), ("x", True)], "a[<<<x>>>"),
        ([("[[a]] ", False), ("<|end|>", True)], "[[a]] {{{<|end|>}}}"),
        ([("[[ <<< {{{", False), ("x", True)], "[[ <<< {{{[1[x]1]"),
        ([("", True)], "[[]]"),
        ([("no mark ]] at all", False)], "no mark ]] at all"),
    ],
)
def test_marks_can_be_told_from_the_text(view: list[tuple[str, bool]], text: str) -> None:
    assert between_marks(view)[0] == text


def test_control_characters_are_escaped_and_lines_stay_lines() -> None:
    assert printable_text("a\x1b[2J\r\tb\n\u202ec\xa0") == "a\\x1b[2J\\r\tb\n\\u202ec\\xa0"


def test_a_long_sequence_is_cut_around_what_is_trained() -> None:
    view = [("p" * 1000, False), ("A" + "a" * 1000 + "Z", True), ("q" * 1000, False)]
    found = shortened(view)
    text = "".join(part for part, _ in found)
    assert len(text) < 650
    assert text.startswith(" ... ppp") and text.endswith("qqq ... ")
    assert "pAaa" in text and "aaZq" in text and "aa ... aa" in text
    assert [part for part, marked in found if marked] == ["A" + "a" * 199, "a" * 149 + "Z"]
    short = [("p", False), ("a", True), ("q", False)]
    assert shortened(short) == short
    assert shortened([("p", False)]) == [("p", False)]


def test_the_headline_counts_and_names_the_marks() -> None:
    out = io.StringIO()
    show([("a", False), ("b\n", True)], "sequence 3", np.arange(5), np.array([0, 1, 1, 0], bool), out)
    assert out.getvalue() == "sequence 3: 5 tokens, 2 trained, between [[ and ]]\na[[b\n]]\n"


def test_inspect_shows_what_the_corpus_marked(
    tiny: Tiny, tmp_path: Path, pipeline: Pipeline, make_cache: Callable[..., Any]
) -> None:
    rows = [{"prompt": "Why?\n", "completion": " Because é.\n"}, {"prompt": "And", "completion": " so"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_cache(tmp_path / "cache", dataset=str(tmp_path / "rows.jsonl"))
    shown = pipeline("inspect", tmp_path / "cache", "--sequence", 0, "--masks")
    assert shown.code == 0, shown.err
    headline, _, text = shown.out.partition("\n")
    assert headline.startswith("sequence 0 of 2: ") and headline.endswith("between [[ and ]]")
    assert text == "Why?\n[[ Because é.\n<|endoftext|>]]\n"
    refused = pipeline("inspect", tmp_path / "cache", "--masks", "--position", 1)
    assert refused.code == 2 and "leave out --position" in refused.err


def test_caching_shows_the_first_sequence(tiny: Tiny, tmp_path: Path, pipeline: Pipeline) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "x" * 700, "completion": " yes"}) + "\n")
    base = ("cache-teacher", "--teacher", tiny.teacher, "--engine", "transformers", "--overlong", "split")
    done = pipeline(*base, "--dataset", tmp_path / "rows.jsonl", "-o", tmp_path / "cache", "--processes", 1)
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("the first sequence: "))
    assert at < next(number for number, line in enumerate(lines) if line == "loading the teacher")
    assert lines[at + 1].endswith("x[[ yes<|endoftext|>]]")
    assert "the first sequence" not in done.out
