"""Prompts of `generate`: the forms of chats that cache-teacher reads, rendered up to the answer."""

import pytest

from stages.chat import ChatRenderer
from stages.generation import _prompt_ids
from storage.errors import UserError
from tests.chat_families import FAMILIES, MOMENT, make_tokenizer

ASK = [{"role": "user", "content": "Hello"}]
PROMPT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": ASK}, PROMPT),
        ({"messages": '[{"from": "human", "value": "Hello"}]'}, PROMPT),
        ({"messages": [{"role": "User", "content": [{"type": "text", "text": "Hello"}]}]}, PROMPT),
        ({"messages": ASK, "system": "Be brief."}, "<|im_start|>system\nBe brief.<|im_end|>\n" + PROMPT),
        ({"prompt": ASK}, PROMPT),
        ({"prompt": "Hello"}, "Hello"),
    ],
)
def test_forms(row, text):
    tokenizer = make_tokenizer(FAMILIES["qwen3"])
    column = next(iter(row))
    ids = _prompt_ids(tokenizer, ChatRenderer(tokenizer), row, column, column == "messages", "row 3")
    assert tokenizer.decode(ids) == text


def test_arguments_and_time_reach_the_template():
    tokenizer = make_tokenizer(FAMILIES["qwen3"])
    brief = ChatRenderer(tokenizer, arguments={"enable_thinking": False})
    ids = _prompt_ids(tokenizer, brief, {"messages": ASK}, "messages", True, "row 3")
    assert tokenizer.decode(ids) == PROMPT + "<think>\n\n</think>\n\n"
    dated = make_tokenizer(FAMILIES["llama3.1"])
    ids = _prompt_ids(dated, ChatRenderer(dated, moment=MOMENT), {"messages": ASK}, "messages", True, "row 3")
    assert "04 Jul 2025" in dated.decode(ids)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [*ASK, {"role": "assistant", "content": "Hi"}]}, "ends with the assistant's turn"),
        ({"messages": []}, "the chat is empty"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "has the role 'critic'"),
        ({"messages": ASK, "tools": [{"type": "function", "function": {"name": "f"}}]}, "does not render the tool 'f'"),
        ({"prompt": " "}, "not text, or empty"),
    ],
)
def test_refusals_name_the_row(row, says):
    tokenizer = make_tokenizer(FAMILIES["gemma2"])
    column = next(iter(row))
    with pytest.raises(UserError, match=says) as caught:
        _prompt_ids(tokenizer, ChatRenderer(tokenizer), row, column, column == "messages", "row 3")
    assert "row 3" in str(caught.value)
