"""Chats as people keep them -> the messages and tools that a chat template takes.

Covered forms: messages of role and content; ShareGPT's `from` and `value`; messages and tool calls kept as JSON text;
contents given as parts; OpenAI's `function_call`; fields that keep a message out of the loss. A form that is not known
is refused by row and by name: nothing is dropped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from storage.errors import UserError
from storage.words import listed_briefly

Message = dict[str, Any]

# Columns that hold chats, the usual one first.
MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
# Role as written, in lower case -> role of a chat template.
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "tool_call"),
    "system": "system",
    "developer": "developer",
}
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
# Fields of a message that say whether the message has a loss.
LOSS_FIELDS = ("weight", "train", "trainable", "training", "trained", "loss")
# Fields that would change the loss or the text in ways that are not supported here.
_REFUSED_FIELDS = (
    *("train_detail", "training_detail", "loss_scale", "loss_mask", "mask", "labels"),
    *("image", "images", "audio", "audios", "video", "videos", "refusal"),
)
_TEXT_PARTS = ("text", "input_text", "output_text")
_THINKING_PARTS = ("thinking", "reasoning")


@dataclass(frozen=True)
class Chat:
    """Messages, and one flag for each: does it have a loss? Only assistant messages can have one."""

    messages: list[Message]
    trained: list[bool]

    @property
    def turns(self) -> list[int]:
        """The numbers of the messages with a loss."""
        return [number for number, trained in enumerate(self.trained) if trained]


def read_chat(value: Any, where: str) -> Chat:
    """Return the chat in a cell of a messages column; `where` names the row in errors. Raises UserError."""
    return _chat(_list_of(value, where), where)


def read_completion(prompt: Any, completion: Any, where: str) -> Chat:
    """Return the chat of a conversational prompt and completion; only the completion has a loss. Raises UserError.

    The prompt is a list of messages; the completion is a list of messages, or the assistant's text.
    """
    before = _chat(_list_of(prompt, where, "prompt"), f"the prompt of {where}")
    if isinstance(completion, str) and not is_chat_text(completion):
        completion = [{"role": "assistant", "content": completion}]
    after = _chat(_list_of(completion, where, "completion"), f"the completion of {where}")
    if not any(message["role"] == "assistant" for message in after.messages):
        raise UserError(f"The completion of {where} has no assistant message; give it one.")
    return Chat([*before.messages, *after.messages], [False] * len(before.messages) + after.trained)


def with_system(chat: Chat, system: Any, where: str) -> Chat:
    """Return the chat with the system prompt of a column of its own before it. Raises UserError for two of them."""
    if system is None or system == "":
        return chat
    if not isinstance(system, str):
        raise UserError(f"The system prompt in {where} is {kind_of(system)}; give it text.")
    first = chat.messages[0] if chat.messages else {}
    if first.get("role") in ("system", "developer"):
        if content_text(first.get("content")).strip() == system.strip():
            return chat
        raise UserError(f"The column of system prompts in {where} differs from the chat's own; keep one of them.")
    return Chat([{"role": "system", "content": system}, *chat.messages], [False, *chat.trained])


def read_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """Return tools as a template takes them, None for none: a list of JSON schemas. Raises UserError naming the row.

    A list may be given as JSON text, and so may each of its entries.
    """
    if isinstance(tools, str):
        tools = _parsed(tools, f"The tools in {where}") if tools.strip() else None
    if isinstance(tools, list):
        tools = [
            _parsed(tool, f"Tool {number} in {where}") if isinstance(tool, str) else tool
            for number, tool in enumerate(tools, 1)
        ]
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"The tools in {where} are not a list of objects; give a list of JSON schemas.")
    # Teachers know functions in the form in which APIs give them.
    return [{"type": "function", "function": tool} if "name" in tool else tool for tool in tools]


def is_chat_text(value: Any) -> bool:
    """Return True for text that is a list of messages as JSON."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return False
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return bool(found) and all(isinstance(each, dict) and {"role", "from"} & set(each) for each in found)


def tool_names(tools: Iterable[dict[str, Any]]) -> list[str]:
    """Return the names of the functions that a list of JSON schemas describes."""
    functions = (tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools)
    return [function["name"] for function in functions if isinstance(function.get("name"), str)]


def content_text(content: Any) -> str:
    """Return the text of a message's content: a string, text parts, or None."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def kind_of(value: Any) -> str:
    """Return the word for a JSON value's type, with its article."""
    names = {str: "text", dict: "an object", list: "a list", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


# ---- one chat ---------------------------------------------------------------------------------------------


def _list_of(value: Any, where: str, name: str = "messages") -> list[Any]:
    given = value
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = _parsed(value, f"The {name} in {where}")
    if not isinstance(value, (list, tuple)):
        raise UserError(f"The {name} in {where} are {kind_of(given)}, not a list; give a list of role and content.")
    return list(value)


def _chat(values: list[Any], where: str) -> Chat:
    messages: list[Message] = []
    trained: list[bool] = []
    for number, value in enumerate(values, 1):
        place = f"Message {number} in {where}"
        if not isinstance(value, dict):
            raise UserError(f"{place} is {kind_of(value)}, not an object; give it a role and a content.")
        message = _message(value, place)
        wanted = _wants_loss(value, place)
        is_assistant = message["role"] == "assistant"
        if wanted and not is_assistant:
            raise UserError(
                f"{place} asks for a loss, but its role is {message['role']!r} and only assistant messages have one; "
                "remove the field or set it to 0."
            )
        messages.append(message)
        trained.append(is_assistant and wanted is not False)
    return Chat(messages, trained)


def _message(value: dict[str, Any], place: str) -> Message:
    """Return the message under the usual names. Fields of the message that are null carry nothing and go."""
    message = {key: inner for key, inner in value.items() if inner is not None and key not in LOSS_FIELDS}
    for name in _REFUSED_FIELDS:
        if message.get(name) not in (None, [], "", {}):
            raise UserError(f"{place} has the field {name!r}, which is not supported; remove the field or the row.")
        message.pop(name, None)
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    role = message.get("role")
    if not isinstance(role, str) or not role.strip():
        keys = f"its fields are {listed_briefly(sorted(map(str, value)))}" if value else "it has no field"
        raise UserError(f"{place} has no role ({keys}); name one such as user or assistant.")
    _name_role(message, role.strip(), place)
    if calls := _tool_calls(message, place):
        message["tool_calls"] = calls
    _read_content(message, value, place)
    return message


def _name_role(message: Message, role: str, place: str) -> None:
    """Set the role that a template knows; `tool_call` becomes the assistant's message with that call."""
    known = ROLES.get(role.lower().replace("-", "_"))
    if known == "tool_call":
        known = "assistant"
        if "tool_calls" not in message and "function_call" not in message:
            calls = message.pop("content", None)
            calls = _parsed(calls, place) if isinstance(calls, str) else calls
            message["tool_calls"] = calls if isinstance(calls, list) else [calls]
    if known is None:
        raise UserError(
            f"{place} has the role {role!r}, which is not known; use system, developer, user, assistant or tool."
        )
    message["role"] = known
    if known == "developer" or (known == "tool" and role.lower() != "tool"):
        message["written_role"] = role  # a template may have a name of its own for it


def _read_content(message: Message, value: dict[str, Any], place: str) -> None:
    content = message.get("content")
    if isinstance(content, list):
        message["content"], thoughts = _text_parts(content, place)
        if thoughts:
            message.setdefault(REASONING_FIELDS[0], thoughts)
    elif content is None:
        empty_allowed = message["role"] == "assistant" and (message.get("tool_calls") or reasoning_of(message))
        if not empty_allowed:
            raise UserError(f"{place} has no content; give it text.")
        message["content"] = None
    elif not isinstance(content, str):
        raise UserError(f"{place} has a content that is {kind_of(content)}; give it text.")
    for name in REASONING_FIELDS:
        if name in message and not isinstance(message[name], str):
            raise UserError(f"{place} has a field {name!r} that is {kind_of(message[name])}; give it text.")
    _read_reasoning(message, place)


def _read_reasoning(message: Message, place: str) -> None:
    """Keep one thought: the field without its tags, or that in the content. Raises UserError where they differ."""
    thoughts = {name: message[name].strip() for name in REASONING_FIELDS if message.get(name)}
    thoughts = {name: text.removeprefix("<think>").removesuffix("</think>") for name, text in thoughts.items()}
    message.update(thoughts)
    said = {"".join(text.split()) for text in thoughts.values()}
    inside, closed, _ = content_text(message.get("content")).rpartition("</think>")
    if thoughts and closed:
        said.add("".join(inside.replace("<think>", "").split()))
        for name in thoughts:
            del message[name]
    if len(said) > 1:
        raise UserError(f"{place} has several thoughts that differ; keep one.")


def reasoning_of(message: Message) -> str | None:
    """Return the reasoning that a message has in a field of its own."""
    return next((message[name] for name in REASONING_FIELDS if message.get(name)), None)


def _text_parts(parts: list[Any], place: str) -> tuple[list[dict[str, str]], str]:
    """Return the text parts of a content, and the reasoning in its parts. Raises UserError for any other part."""
    texts: list[dict[str, str]] = []
    thoughts: list[str] = []
    for number, part in enumerate(parts, 1):
        if isinstance(part, str):
            texts.append({"type": "text", "text": part})
            continue
        kind = _part_type(part)
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append({"type": "text", "text": part["text"]})
        elif kind in _THINKING_PARTS:
            inner = part.get(kind, part.get("text"))
            inner = [inner] if isinstance(inner, str) else inner
            if not isinstance(inner, list):
                raise UserError(f"Part {number} of {place[0].lower()}{place[1:]} has no text; give it text.")
            thoughts.append(content_text(_text_parts(inner, place)[0]))
        else:
            said = f"is of type {kind!r}" if isinstance(kind, str) else f"is {kind_of(part)} without a type"
            raise UserError(
                f"Part {number} of {place[0].lower()}{place[1:]} {said}; only text can be scored: remove the row."
            )
    return texts, "".join(thoughts)


def _part_type(part: Any) -> str | None:
    if not isinstance(part, dict):
        return None
    return part.get("type") or ("text" if isinstance(part.get("text"), str) else None)


def _tool_calls(message: Message, place: str) -> list[dict[str, Any]]:
    """Return the tool calls of a message, each as {"type", "function": {"name", "arguments"}} and its id if it has one.

    `arguments` stay as they are written: an object, or JSON text.
    """
    calls = message.pop("tool_calls", None) or []
    if isinstance(calls, str):
        calls = _parsed(calls, f"{place}: the text of its tool calls")
    calls = [calls] if isinstance(calls, dict) else calls
    if (old := message.pop("function_call", None)) is not None:
        calls = [*calls, _parsed(old, place) if isinstance(old, str) else old]
    if not isinstance(calls, list):
        raise UserError(f"{place} has tool calls that are {kind_of(calls)}; give a list of objects.")
    found = []
    for call in calls:
        call = _parsed(call, place) if isinstance(call, str) else call
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise UserError(f"{place} has a tool call without the name of a function; give it one.")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, (dict, str)):
            raise UserError(f"{place} has a tool call whose arguments are {kind_of(arguments)}; give an object.")
        kept = {"id": call["id"]} if call.get("id") is not None else {}
        found.append({**kept, "type": "function", "function": {"name": name, "arguments": arguments}})
    if found and message["role"] != "assistant":
        raise UserError(f"{place} has tool calls, but its role is {message['role']!r}; only the assistant calls tools.")
    return found


def _wants_loss(value: dict[str, Any], place: str) -> bool | None:
    """Return what the fields of a message say about its loss; None where they say nothing."""
    said: dict[str, bool] = {}
    for name in LOSS_FIELDS:
        given = value.get(name)
        if given is None:
            continue
        if not isinstance(given, (bool, int, float)) or given not in (0, 1):
            raise UserError(f"{place} has {name} = {given!r}, but a message has a loss or none; give 0 or 1.")
        said[name] = bool(given)
    if len(set(said.values())) > 1:
        raise UserError(f"{place} has fields that disagree about its loss ({', '.join(said)}); keep one.")
    return next(iter(said.values()), None)


def _parsed(text: Any, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        said = "are text that is not JSON" if what.startswith("The ") else "has text that is not JSON"
        raise UserError(f"{what} {said}; mend or remove the row.") from None
