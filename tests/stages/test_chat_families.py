"""Chats of every template family, against trained text that was worked out without this project's code."""

import pytest

from stages.chat import ChatRenderer
from stages.messages import read_chat, read_tools
from storage.errors import UserError
from tests.chat_cases import CASES, Case
from tests.chat_families import FAMILIES, MOMENT, end_ids, make_tokenizer, marked


def name(case: Case) -> str:
    return f"{case.family}-{case.turns}-{case.note}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_trained_text(case):
    family = FAMILIES[case.family]
    tokenizer = make_tokenizer(family)
    renderer = ChatRenderer(
        tokenizer,
        turns=case.turns,
        end_ids=end_ids(family, tokenizer),
        arguments={**family.args, **case.template_args},
        moment=MOMENT,
    )
    refusal, rendered = "", []
    try:
        rendered = renderer.render(read_chat(case.chat, "row 7"), "row 7", read_tools(list(case.tools), "row 7"))
    except UserError as error:
        refusal = str(error)
    got = tuple(marked(tokenizer, ids, marks) for ids, marks in renderer.encode(rendered)) or None
    assert case.accepts(got), f"got {refusal or got}, right is {case.right}"
    assert not refusal or ("row 7" in refusal and "\n" not in refusal)
    if refusal:
        return
    assert case.warns == any(each.without_end for each in rendered)
