"""The forms in which people keep chats, and the fields that say which messages have a loss."""

import json

import pytest

from stages.messages import read_chat, read_completion, read_tools, with_system
from storage.errors import UserError

CALL = {"name": "weather", "arguments": '{"city": "Rome", "unit": null}'}
CANONICAL_CALL = {"type": "function", "function": CALL}
PLAIN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def user(content="q", **fields):
    return {"role": "user", "content": content, **fields}


def assistant(content="a", **fields):
    return {"role": "assistant", "content": content, **fields}


@pytest.mark.parametrize(
    "given",
    [
        PLAIN,
        json.dumps(PLAIN),
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [{"role": "Human", "content": "q"}, {"role": " Assistant ", "content": "a"}],
        [{"role": "prompter", "content": "q"}, {"role": "model", "content": "a"}],
        [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "tool_calls": None}],
        [user(function_call=None, refusal=None), assistant(audio=None, refusal="")],
    ],
)
def test_spellings_of_one_chat(given):
    chat = read_chat(given, "row 1")
    assert chat.messages == PLAIN
    assert chat.trained == [False, True] and chat.turns == [1]


@pytest.mark.parametrize("role", ["function", "observation", "ipython", "Tool"])
def test_replies_of_tools(role):
    chat = read_chat([*PLAIN, {"role": role, "content": "sunny"}], "row 1")
    assert chat.messages[2]["role"] == "tool" and not chat.trained[2]


@pytest.mark.parametrize(
    "message",
    [
        assistant(None, tool_calls=[{"type": "function", "function": CALL}]),
        assistant(None, tool_calls=[CALL]),
        assistant(None, tool_calls=json.dumps([CALL])),
        assistant(None, tool_calls=[json.dumps(CALL)]),
        assistant(None, function_call=CALL),
        assistant(None, tool_calls=[{"name": "weather", "parameters": CALL["arguments"]}]),
        {"from": "function_call", "value": json.dumps(CALL)},
    ],
)
def test_spellings_of_one_tool_call(message):
    chat = read_chat([user(), message], "row 1")
    assert chat.messages[1] == {"role": "assistant", "content": None, "tool_calls": [CANONICAL_CALL]}
    assert chat.trained == [False, True]


def test_parts_of_a_content():
    parts = [{"type": "text", "text": "It is "}, {"type": "output_text", "text": "0.", "image": None}, "!"]
    chat = read_chat([user(), assistant([{"type": "thinking", "thinking": "hm"}, *parts])], "row 1")
    assert "".join(part["text"] for part in chat.messages[1]["content"]) == "It is 0.!"
    assert chat.messages[1]["reasoning_content"] == "hm"
    assert all(set(part) == {"type", "text"} for part in chat.messages[1]["content"])


@pytest.mark.parametrize("name", ["weight", "train", "trainable", "training", "loss"])
def test_fields_that_keep_a_message_out_of_the_loss(name):
    off, on = (0, 1) if name == "weight" else (False, True)
    chat = read_chat([user(), assistant(**{name: off}), user(), assistant(**{name: on}), user(), assistant()], "row 1")
    assert chat.turns == [3, 5]
    assert all(name not in message for message in chat.messages)
    assert read_chat([user(**{name: off}), assistant(**{name: None})], "row 1").turns == [1]


def test_conversational_prompt_and_completion():
    chat = read_completion([*PLAIN, user("q2")], [assistant("a2")], "row 1")
    assert [message["content"] for message in chat.messages] == ["q", "a", "q2", "a2"]
    assert chat.turns == [3]  # the prompt's own assistant turn has no loss
    assert read_completion([user()], "a", "row 1").messages == PLAIN
    with pytest.raises(UserError, match="completion of row 1 has no assistant message"):
        read_completion([user()], [user()], "row 1")


def test_system_prompt_of_a_column():
    chat = read_chat(PLAIN, "row 1")
    with_prompt = with_system(chat, "be brief", "row 1")
    assert with_prompt.messages == [{"role": "system", "content": "be brief"}, *PLAIN] and with_prompt.turns == [2]
    assert with_system(chat, None, "row 1") is chat and with_system(with_prompt, " be brief", "row 1") is with_prompt
    with pytest.raises(UserError, match="system prompts in row 1 differs"):
        with_system(with_prompt, "be long", "row 1")


def test_nulls_of_json_stay_in_arguments_and_tools():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    assert read_tools([json.dumps(tool)], "row 1") == read_tools(json.dumps([tool]), "row 1") == [tool]
    arguments = {"unit": None}
    message = assistant(None, tool_calls=[{"function": {"name": "f", "arguments": arguments}, "id": None}])
    (call,) = read_chat([user(), message], "row 1").messages[1]["tool_calls"]
    assert call == {"type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "critic", "content": "x"}, "Message 1 in row 9 has the role 'critic'"),
        (user(weight=1), "asks for a loss, but its role is 'user'"),
        (assistant(weight=0.5), "has weight = 0.5"),
        (assistant(weight="0"), "has weight = '0'"),
        (assistant(weight=0, train=True), "fields that disagree about its loss (weight, train)"),
        (assistant(train_detail=[{"begin_offset": 0}]), "has the field 'train_detail'"),
        (assistant(images=["x.png"]), "has the field 'images'"),
        (assistant(None, refusal="no"), "has the field 'refusal'"),
        (user([{"type": "image_url", "image_url": "x"}]), "Part 1 of message 1 in row 9 is of type 'image_url'"),
        (user([{"image": "x"}]), "Part 1 of message 1 in row 9 is an object without a type"),
        (user([3]), "Part 1 of message 1 in row 9 is a number without a type"),
        (user([{"type": "text", "text": 3}]), "is of type 'text'"),
        (user(tool_calls=[CALL]), "has tool calls, but its role is 'user'"),
        (assistant(None, tool_calls=[{"arguments": "{}"}]), "a tool call without the name of a function"),
        (assistant(None, tool_calls=["{"]), "has text that is not JSON"),
        (assistant(None, tool_calls=[{"name": "f", "arguments": [1]}]), "whose arguments are a list"),
        (assistant(reasoning="a", thinking="b"), "several thoughts that differ"),
        (assistant(reasoning=["a"]), "has a field 'reasoning' that is a list"),
        (assistant(None), "has no content"),
    ],
)
def test_refusals_name_row_and_message(message, says):
    with pytest.raises(UserError) as caught:
        read_chat([message], "row 9")
    assert says in str(caught.value) and "row 9" in str(caught.value) and str(caught.value).endswith(".")
