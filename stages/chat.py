"""From a chat to token ids and the tokens that are the assistant's.

A chat's marked spans are the assistant's turns. A template either marks them itself with `{% generation %}`,
or they are found by rendering prefixes of the chat, which is right only where every prefix renders to a
prefix of the whole; where it does not, the chat is refused rather than guessed at. Templates that render a turn
otherwise once messages follow it (they strip earlier thinking) are served turn by turn: see `render_turns`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from stages.encode import Span, check_text, encode_spans
from storage.errors import UserError

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def render_chat(
    tokenizer: Any, messages: Any, where: str = "the chat", *, tools: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [L] of a chat, and bool [L]: which tokens are the assistant's, end of turn included.

    `messages` is a list of {"role", "content"}; `where` names the row in errors. `tools`: JSON schemas of functions, a
    list or its JSON text, which the template gets as `apply_chat_template(tools=)` gives them. No special tokens are
    added to those the template writes. Without an assistant turn nothing is marked.
    Raises UserError (malformed messages or tools; no template, or one that cannot tell which tokens are whose).
    """
    chat, tools = _checked(messages, where), check_tools(tools, where)
    template = _template(tokenizer, where, tools)
    if _GENERATION.search(template):
        text, spans = _generation_spans(tokenizer, chat, tools, template, where)
    else:
        text, spans = _prefix_spans(tokenizer, chat, tools, where)
    check_text(text, where)
    return encode_spans(tokenizer, [text], [spans], add_special_tokens=False)[0]


def render_turns(
    tokenizer: Any, messages: Any, where: str = "the chat", *, tools: Any = None, last: bool = False
) -> list[tuple[np.ndarray, np.ndarray]]:
    """As `render_chat` for each assistant turn, or the last alone: the chat up to it, with only that turn marked.

    So every turn stands as it was when the assistant wrote it, whatever the template makes of it later. A chat without
    one gives one sequence with nothing marked.
    """
    chat, tools = _checked(messages, where), check_tools(tools, where)
    turns = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
    if not turns:
        return [render_chat(tokenizer, chat, where, tools=tools)]
    template = _template(tokenizer, where, tools)
    texts, spans = [], []
    for turn in turns[-1:] if last else turns:
        so_far = chat[: turn + 1]
        if _GENERATION.search(template):
            text, marked = _generation_spans(tokenizer, so_far, tools, template, where)
            earlier = _generation_spans(tokenizer, chat[:turn], tools, template, where)[1] if turn else []
            marked = marked[len(earlier) :]
        else:
            text, marked = _prefix_spans(tokenizer, so_far, tools, where, first=turn)
        check_text(text, where)
        texts.append(text)
        spans.append(marked)
    return encode_spans(tokenizer, texts, spans, add_special_tokens=False)


# ---- where the assistant's turns are ----------------------------------------------------------------------


def _checked(messages: Any, where: str) -> list[dict[str, Any]]:
    """The messages without keys that are None. Raises UserError naming the row and the message."""
    if not isinstance(messages, (list, tuple)):
        raise UserError(f"The messages in {where} are {_kind(messages)}, not a list; give a list of role and content.")
    chat = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise UserError(
                f"Message {number} in {where} is {_kind(message)}, not an object; give it a role and a content."
            )
        message = {key: value for key, value in message.items() if value is not None}
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise UserError(f"Message {number} in {where} has no role; name one such as user or assistant.")
        if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
            problem = "no content" if content is None else f"a content that is {_kind(content)}"
            raise UserError(f"Message {number} in {where} has {problem}; give it text.")
        chat.append(message)
    return chat


def check_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """Tools as a template takes them, None for none. Raises UserError naming the row."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise UserError(f"The tools in {where} are text that is not JSON; give a list of JSON schemas.") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"The tools in {where} are not a list of objects; give a list of JSON schemas.")
    return _without_nulls(tools)


def _without_nulls(value: Any) -> Any:
    """Columnar files give every object the keys of all others, with null where it had none."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    names = {str: "text", dict: "an object", list: "a list", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _template(tokenizer: Any, where: str, tools: list[dict[str, Any]] | None) -> str:
    try:
        # Some tokenizers have a template of its own for chats with tools.
        return tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise UserError(
            f"The tokenizer has no chat template, so the chat in {where} cannot be rendered; use the "
            "tokenizer of a chat model, or supply prompt and completion columns."
        ) from error


def _undecided(where: str, why: str) -> UserError:
    return UserError(
        f"The chat template cannot tell which tokens are the assistant's in {where} ({why}); "
        "train on the last turn alone or on each turn in a sequence of its own (--turns last, --turns each), "
        "add {% generation %} marks to the template, or supply prompt and completion columns."
    )


def _generation_spans(
    tokenizer: Any, chat: list[dict[str, Any]], tools: list[dict[str, Any]] | None, template: str, where: str
) -> tuple[str, list[Span]]:
    """The rendered chat and the spans its template marks.

    The spans are taken as characters: `apply_chat_template(return_assistant_tokens_mask=True)` would turn
    them into tokens through `char_to_token`, which knows no trimmed space, and so marks the rest of the chat
    after a turn that ends in one.
    """
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template  # its annotation says str, it returns two lists
    try:
        rendered, marked = render(
            conversations=[chat],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template may raise anything
        raise _refused(where, error) from error
    return rendered[0], [(start, end) for start, end in marked[0] if end > start]


def _prefix_spans(
    tokenizer: Any, chat: list[dict[str, Any]], tools: list[dict[str, Any]] | None, where: str, first: int = 0
) -> tuple[str, list[Span]]:
    """The rendered chat and its assistant turns from message `first` on, each from after its generation prompt to its
    end of turn.
    """
    if not chat:
        return "", []

    def render(chat: list[dict[str, Any]], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=prompt)

    try:
        whole = render(chat)
    except Exception as error:  # a template may raise anything
        raise _refused(where, error) from error
    spans = []
    for turn, message in enumerate(chat):
        if turn < first or message["role"] != "assistant":
            continue
        try:
            before = _before_turn(render, chat, turn, whole)
            after = whole if turn + 1 == len(chat) else render(chat[: turn + 1])
            headless = render(chat[:turn]) if turn else None
        except Exception as error:  # a template may raise anything
            raise _undecided(where, f"it refuses the messages before message {turn + 1}") from error
        if before is None or not (whole.startswith(after) and after.startswith(before)):
            raise _undecided(where, f"message {turn + 1} is rendered differently once messages follow it")
        span = (len(before), _end_of_turn(tokenizer, whole, len(after)))
        # Without a generation prompt all is well only if the turn starts with its content, not a header.
        content = message.get("content")
        spoken = whole[span[0] : span[1]].lstrip()
        if before == headless and isinstance(content, str) and not spoken.startswith(content.strip()):
            raise _undecided(where, "it has no generation prompt")
        if span[1] > span[0]:
            spans.append(span)
    return whole, spans


def _before_turn(render: Callable[..., str], chat: list[dict[str, Any]], turn: int, whole: str) -> str | None:
    """What stands before an assistant turn, generation prompt included; None where that cannot be told."""
    if turn:
        return render(chat[:turn], prompt=True)
    # `transformers` renders no empty chat, so for a chat that the assistant opens the prompt is looked for.
    opening = [{"role": "user", "content": "x"}]
    bare, prompted = render(opening), render(opening, prompt=True)
    header = prompted[len(bare) :] if prompted.startswith(bare) else ""
    return whole[: whole.index(header) + len(header)] if header and header in whole else None


def _end_of_turn(tokenizer: Any, text: str, end: int) -> int:
    """`end` without white space that follows an end-of-turn token: no model generates past that token."""
    stripped = text[:end].rstrip()
    special = {
        *tokenizer.all_special_tokens,
        *(str(token) for token in tokenizer.added_tokens_decoder.values()),
    }
    return len(stripped) if stripped.endswith(tuple(special - {""})) else end


def _refused(where: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return UserError(f"The chat template refuses the messages in {where}: {reason}; mend or remove the row.")
