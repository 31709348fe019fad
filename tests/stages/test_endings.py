"""Answers that were cut when they were written have no end token with a loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stages.corpus import CorpusOptions, build_corpus
from stages.endings import was_cut
from storage.errors import UserError
from tests.conftest import Finished, Tiny

END = "<|endoftext|>"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tiny: Tiny) -> Any:
    found = AutoTokenizer.from_pretrained(tiny.tokenizer)
    found.chat_template = TEMPLATE + "{% if add_generation_prompt %}<assistant>{% endif %}"
    return found


@pytest.fixture
def trained(tokenizer: Any, tmp_path: Path) -> Callable[..., list[tuple[str, str]]]:
    """Of each row: the whole text of its sequence, and the trained part."""

    def of(*rows: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        corpus = build_corpus(str(tmp_path / "rows.jsonl"), tokenizer, CorpusOptions(**options))
        sequences = corpus.read(0, len(corpus))
        of.report = corpus.report  # type: ignore[attr-defined]
        return [(tokenizer.decode(s.input_ids), tokenizer.decode(s.input_ids[1:][s.loss_mask])) for s in sequences]

    return of


@pytest.mark.parametrize(
    ("row", "cut"),
    [
        ({"finish_reason": "length"}, True),
        ({"stop_reason": "max_tokens"}, True),
        ({"finish_reason": "MAX_TOKENS"}, True),
        ({"finish_reason": "FinishReason.MAX_TOKENS"}, True),
        ({"finish_reason": "content-filter"}, True),
        ({"finish_reason": None, "truncated": True}, True),
        ({"truncated": "True"}, True),
        ({"truncated": 1}, True),
        ({"truncated": 1.0}, True),
        ({"finish_reason": "stop"}, False),
        ({"finish_reason": "end_turn"}, False),
        ({"finish_reason": None}, False),
        ({"truncated": 0}, False),
        ({"truncated": "False"}, False),
        ({"truncated": None}, False),
        ({}, False),
    ],
)
def test_what_says_that_a_text_was_cut(row: dict[str, Any], cut: bool) -> None:
    assert was_cut(row) == cut


def test_a_word_that_is_neither_yes_nor_no_is_refused() -> None:
    with pytest.raises(UserError, match="The column 'truncated' of row 3 is 'maybe'; give true or false"):
        was_cut({"truncated": "maybe"}, "row 3")


def test_completions(trained: Callable[..., list[tuple[str, str]]]) -> None:
    pair = {"prompt": "ask", "completion": " yes"}
    found = trained(
        {**pair, "finish_reason": "length"},
        {**pair, "finish_reason": "stop"},
        pair,
        {**pair, "stop_reason": "max_tokens"},
    )
    whole, cut = ("ask yes" + END, " yes" + END), ("ask yes", " yes")
    assert found == [cut, whole, whole, cut]
    assert (trained.report.unfinished, trained.report.ended) == (2, 2)  # type: ignore[attr-defined]


def test_texts(trained: Callable[..., list[tuple[str, str]]]) -> None:
    found = trained({"text": "a b", "truncated": True}, {"text": "a b", "truncated": False})
    assert found == [("a b", " b"), ("a b" + END, " b" + END)]


@pytest.mark.parametrize("turns", ["all", "last", "each"])
def test_only_the_last_turn_of_a_chat_was_cut(trained: Callable[..., list[tuple[str, str]]], turns: str) -> None:
    chat = [{"role": role, "content": text} for role, text in [("user", "u"), ("assistant", "one")] * 1]
    chat += [{"role": "user", "content": "v"}, {"role": "assistant", "content": "two"}]
    found = trained({"messages": chat, "finish_reason": "length"}, turns=turns)
    expected = {"all": ["one" + END + "two"], "last": ["two"], "each": ["one" + END, "two"]}[turns]
    assert [marked for _, marked in found] == expected
    assert found[-1][0].endswith("<assistant>two")


@pytest.mark.parametrize("length", range(2, 9))
def test_a_row_cut_at_the_maximum_length_does_not_end(
    trained: Callable[..., list[tuple[str, str]]], tokenizer: Any, length: int
) -> None:
    text = "ab cd ef"
    whole = len(tokenizer(text)["input_ids"])
    [(found, _)] = trained({"text": text}, max_length=length)
    assert found.endswith(END) == (length > whole)
    assert trained.report.ended == int(length > whole)  # type: ignore[attr-defined]


def test_the_corpus_says_what_ends(tiny: Tiny, tmp_path: Path, pipeline: Callable[..., Finished]) -> None:
    rows = [{"text": "a b", "finish_reason": "length"}, {"text": "a b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ("plan", "--teacher", tiny.teacher, "--dataset", tmp_path / "rows.jsonl", "--processes", 1)
    said = pipeline(*base).err
    assert "corpus: 1 row says that the text was cut when it was written, so no end token has a loss\n" in said
    assert "corpus: 1 sequence ends with an end-of-sequence token that has a loss" in said
    assert "end-of-sequence" not in pipeline(*base, "--no-append-eos").err


def test_chats_that_were_rendered_before_get_no_second_end(
    trained: Callable[..., list[tuple[str, str]]], tokenizer: Any
) -> None:
    """`c` stands for another token that stops the teacher, as <|im_end|> does beside an end of text."""
    stop = tokenizer.convert_tokens_to_ids("c")
    ask = {"prompt": "x:"}
    found = trained(
        {**ask, "completion": "yes\nc"},
        {**ask, "completion": "yes" + END + "\n"},
        {**ask, "completion": "yes" + END + "\n<user>more" + END},
        {**ask, "completion": "yes\n"},
        end_ids=(stop,),
    )
    assert [text for _, text in found] == ["yes\nc", "yes" + END, "yes" + END, "yes\n" + END]
    assert [whole.removeprefix("x:") for whole, _ in found] == [
        "yes\nc",
        "yes" + END + "\n",
        "yes" + END + "\n<user>more" + END,
        "yes\n" + END,
    ]
    texts = trained({"text": "yes" + END + "\n"}, {"text": "yes\nc"}, {"text": "c yes"}, end_ids=(stop,))
    assert [whole for whole, _ in texts] == ["yes" + END + "\n", "yes\nc", "c yes" + END]


def test_no_end_is_added_where_none_is_wanted(tokenizer: Any, tmp_path: Path) -> None:
    """Also by a tokenizer that adds one itself; and no beginning in the middle."""
    from tokenizers import processors

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    special = [("<s>", tokenizer.convert_tokens_to_ids("<s>")), (END, tokenizer.convert_tokens_to_ids(END))]
    single = processors.TemplateProcessing(single=f"<s> $A {END}", pair=f"<s> $A $B {END}", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = single
    for row in ({"text": "ask yes"}, {"prompt": "ask", "completion": "<s> yes"}):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        for append, whole in ((True, f"<s>ask yes{END}"), (False, "<s>ask yes")):
            corpus = build_corpus(str(tmp_path / "rows.jsonl"), tokenizer, CorpusOptions(append_eos=append))
            assert tokenizer.decode(corpus.read(0, 1)[0].input_ids) == whole
            assert corpus.report.ended == append
