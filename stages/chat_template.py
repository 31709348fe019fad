"""A tokenizer's chat template: rendering, and the habits of the template that rendering probe chats reveals.

Templates differ in the forms that they take: contents as strings or as parts, arguments of tool calls as objects or as
JSON text, reasoning under three names. They differ in what the generation prompt opens and in what closes a turn. One
probe per template finds each of these out, so no list of model names is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from stages.encode import Span
from stages.messages import REASONING_FIELDS, Message, content_text, reasoning_of
from storage.errors import UserError
from storage.json_text import parse_json

Tools = list[dict[str, Any]] | None

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")
_CLOCK = re.compile(r"\bstrftime_now\b")
_DIRECTIVE = re.compile(r"['\"](/\w+)['\"]")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
THINK, CLOSE_THINK = "<think>", "</think>"
# A field of messages with tool calls, which no template reads: a thought to put before the rendered call.
FOLDED = "folded_thought"
# Texts that no template writes by itself.
_USER, _ASSISTANT, _NEXT, _THOUGHT = "qvzuserqvz", "qvzanswerqvz", "qvznextqvz", "qvzthoughtqvz"
_CALL, _KEY, _VALUE = "qvzcall", "qvzkey", "qvzv"
_PROBE_FUNCTION = {"name": "qvztool", "description": "", "parameters": {"type": "object", "properties": {}}}
_PROBE_TOOLS = [{"type": "function", "function": _PROBE_FUNCTION}]


@dataclass(frozen=True)
class Habits:
    """The habits of one template.

    strings: contents are strings, not lists of parts. call_content: the content of a message
    with tool calls and no text. object_arguments: arguments of tool calls are objects, not JSON text. reasoning: the
    fields of reasoning that the template reads. has_prompt: it has a generation prompt. header: the part of the
    generation prompt that stands in finished turns too; opening: the rest of it, such as "<think>\\n". lead: the text
    between header and content in a finished turn. end: the special token that closes every assistant turn.
    """

    strings: bool
    call_content: str | None
    object_arguments: bool
    reasoning: tuple[str, ...]
    has_prompt: bool = False
    header: str = ""
    opening: str = ""
    lead: str = ""
    end: str | None = None
    next_header: str | None = None
    moves_thought: bool = False

    def content(self, text: str) -> Any:
        """Return a text as the content of a message, in a form that the template takes."""
        return text if self.strings else [{"type": "text", "text": text}]

    @property
    def opens_thinking(self) -> bool:
        return opens_thought(self.header + self.opening)


class ChatTemplate:
    """Renders chats as `tokenizer.apply_chat_template` does, with fixed arguments and a fixed moment.

    arguments: variables for the template, e.g. {"enable_thinking": False}. moment: the time that `strftime_now` tells
    the template; None for now. stops: tokens that stop the teacher. Raises UserError for arguments that no template of
    this tokenizer reads, and for a template that draws at random.
    """

    def __init__(
        self,
        tokenizer: Any,
        arguments: Mapping[str, Any] | None = None,
        moment: datetime | None = None,
        stops: frozenset[str] = frozenset(),
    ) -> None:
        self.tokenizer = tokenizer
        self._stops = stops
        self._arguments = dict(arguments or {})
        self._clock = (moment or datetime.now()).strftime
        self._habits: dict[tuple[str, bool], Habits] = {}
        self._roles: dict[tuple[str, bool, str], bool] = {}
        self.special_tokens = _special_tokens(tokenizer)
        check_template(tokenizer, self._arguments)

    def source(self, tools: Tools, where: str = "the chat") -> str:
        """Return the text of the template; some tokenizers have one of its own for chats with tools."""
        try:
            return self.tokenizer.get_chat_template(tools=tools)
        except ValueError as error:
            own = getattr(self.tokenizer, "chat_template", None)
            has = f"has the chat templates {', '.join(own)} and none named default" if own else "has no chat template"
            raise UserError(
                f"The tokenizer {has}, so the chat in {where} cannot be rendered; use the tokenizer of a chat model, "
                "give a chat template, or supply prompt and completion columns."
            ) from error

    def marks_generation(self, tools: Tools) -> bool:
        """Return True where the template marks the assistant's tokens with `{% generation %}`."""
        return _GENERATION.search(self.source(tools)) is not None

    def render(self, messages: Sequence[Message], tools: Tools, *, prompt: bool = False) -> str:
        """Return the chat as text, with the generation prompt where `prompt`. Raises whatever the template raises."""
        if self._renders_itself:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                tokenize=False,
                add_generation_prompt=prompt,
                **{"strftime_now": self._clock, **self._arguments},
            )
        variables = self._variables(messages, tools, prompt=prompt)
        return _compiled(self.tokenizer.get_chat_template(tools=tools)).render(**variables)

    def render_marked(self, messages: Sequence[Message], tools: Tools) -> tuple[str, list[Span]]:
        """Return the chat as text and the spans that `{% generation %}` marks.

        The spans are characters: `apply_chat_template(return_assistant_tokens_mask=True)` would turn them into tokens
        through `char_to_token`, which knows no trimmed space, and so marks the rest of the chat after a turn that
        ends in one.
        """
        from transformers.utils import chat_template_utils

        if not messages:
            return "", []
        rendered, marked = chat_template_utils._render_with_assistant_indices(
            compiled_template=_compiled(self.source(tools)), **self._variables(messages, tools, prompt=False)
        )
        return rendered, [(start, end) for start, end in marked if end > start]

    @property
    def _renders_itself(self) -> bool:
        """True for a tokenizer whose class has an `apply_chat_template` of its own (Mistral's, remote code)."""
        from transformers import PreTrainedTokenizerBase

        own = getattr(type(self.tokenizer), "apply_chat_template", None)
        return own is not PreTrainedTokenizerBase.apply_chat_template

    def _variables(self, messages: Sequence[Message], tools: Tools, *, prompt: bool) -> dict[str, Any]:
        """Return what the template reads.

        `apply_chat_template` of transformers 5.19 passes the same. That of 5.24 drops fields that are None and lets
        no function through, so that a cache would depend on the version and on the day.
        """
        return {
            "documents": None,
            **self.tokenizer.special_tokens_map,
            "strftime_now": self._clock,
            **self._arguments,
            "messages": list(messages),
            "tools": tools,
            "add_generation_prompt": prompt,
        }

    # ---- forms --------------------------------------------------------------------------------------------

    def adapt(
        self, messages: Sequence[Message], tools: Tools, where: str, *, unfinished: bool = False
    ) -> list[Message]:
        """Return the messages in the forms that the template takes. Raises UserError naming the row.

        unfinished: the last message was cut when it was written.
        """
        habits = self.habits(tools)
        places = (f"message {number} in {where}" for number in range(1, len(messages) + 1))
        last = len(messages) - 1
        return [
            self._adapted(message, place, habits, tools, unfinished=unfinished and number == last)
            for number, (message, place) in enumerate(zip(messages, places, strict=True))
        ]

    def _adapted(self, message: Message, place: str, habits: Habits, tools: Tools, *, unfinished: bool) -> Message:
        message = dict(message)
        written = message.pop("written_role", None)
        if message["role"] == "developer":
            message["role"] = "developer" if self._renders("developer", tools) else "system"
        elif written is not None and self._speaks(written, tools) and self._renders(written, tools):
            message["role"] = written
        content = message.get("content")
        if message.get("tool_calls"):
            message["tool_calls"] = [_adapted_call(call, habits, place) for call in message["tool_calls"]]
            content = _without_thought(message, habits)
            if not content_text(content):
                content = habits.call_content
        elif content is None:
            content = ""
        message["content"] = content if content is None else habits.content(content_text(content))
        return _with_reasoning(message, habits, unfinished)

    def _speaks(self, role: str, tools: Tools) -> bool:
        """Return True where the template has this very name for a role."""
        compares = rf"role['\"\]]*\s*(==|!=|in)[^%}}]*['\"]{re.escape(role)}['\"]"
        return f"<|{role}|>" in self.special_tokens or re.search(compares, self.source(tools)) is not None

    def _renders(self, role: str, tools: Tools) -> bool:
        """Return True where the template renders the content of a message of this role."""
        key = (self.source(tools), bool(tools), role)
        if key not in self._roles:
            content = self.habits(tools).content
            asked = {"role": "user", "content": content(_USER)}
            other = {"role": role, "content": content(_NEXT)}
            chat = [other, asked] if role == "developer" else [asked, other]
            self._roles[key] = _NEXT in self._try(chat, _PROBE_TOOLS if tools else None, prompt=True)
        return self._roles[key]

    def without_directives(self, text: str, tools: Tools) -> str:
        """Return a content without the words, such as /no_think, that the template obeys and may not render."""
        for directive in _DIRECTIVE.findall(self.source(tools)):
            text = text.replace(directive, "")
        return text

    # ---- habits -------------------------------------------------------------------------------------------

    def habits(self, tools: Tools) -> Habits:
        """Return the habits of the template that serves chats with tools, or without; found once for each."""
        key = (self.source(tools), bool(tools))
        if key not in self._habits:
            # The tools of one row would decide for all others.
            self._habits[key] = self._find_habits(_PROBE_TOOLS if tools else None)
        return self._habits[key]

    def _find_habits(self, tools: Tools) -> Habits:
        strings = self._takes("string", tools) or not self._takes("parts", tools)
        habits = Habits(strings, *self._call_form(tools, strings), self._reasoning_fields(tools, strings))
        try:
            return self._with_turn(habits, tools)
        except Exception:  # noqa: BLE001 - a template may raise anything on a chat that it does not like
            return habits

    def _reasoning_fields(self, tools: Tools, strings: bool) -> tuple[str, ...]:
        """Return the fields of reasoning that the template renders in the last turn."""

        def content(text: str) -> Any:
            return text if strings else [{"type": "text", "text": text}]

        def text(name: str) -> str:
            answer = {"role": "assistant", "content": content(_ASSISTANT), name: _THOUGHT}
            return self._try([{"role": "user", "content": content(_USER)}, answer], tools)

        return tuple(name for name in REASONING_FIELDS if _THOUGHT in text(name))

    def _try(self, messages: Sequence[Message], tools: Tools, *, prompt: bool = False) -> str:
        """Return the chat as text, "" where the template refuses the chat."""
        try:
            return self.render(messages, tools, prompt=prompt)
        except Exception:  # noqa: BLE001 - a template may raise anything
            return ""

    def _takes(self, form: str, tools: Tools) -> bool:
        def content(text: str) -> Any:
            return text if form == "string" else [{"type": "text", "text": text}]

        chat = [{"role": "user", "content": content(_USER)}, {"role": "assistant", "content": content(_ASSISTANT)}]
        text = self._try(chat, tools)
        printed = any(f"{quote}text{quote}: {quote}{_USER}" in text for quote in "'\"")
        return _USER in text and _ASSISTANT in text and not printed

    def _call_form(self, tools: Tools, strings: bool) -> tuple[str | None, bool]:
        """Return the content of a message that only calls tools, and True where arguments are objects."""
        arguments = {_KEY: _VALUE}
        user = _USER if strings else [{"type": "text", "text": _USER}]
        nothing = self._try([{"role": "user", "content": user}], tools).count("None")
        for content in (None, ""):
            for given in (arguments, json.dumps(arguments)):
                call = {"id": "qvzcall01", "type": "function", "function": {"name": _CALL, "arguments": given}}
                answer: Message = {"role": "assistant", "content": content, "tool_calls": [call]}
                text = self._try([{"role": "user", "content": user}, answer], tools)
                mangled = text.count("None") > nothing or f"'{_KEY}'" in text or f'\\"{_KEY}' in text
                if _CALL in text and _KEY in text and _VALUE in text and not mangled:
                    return content, given is arguments
        return "", True

    def _with_turn(self, habits: Habits, tools: Tools) -> Habits:
        """Return the habits with the parts of a turn, found on a chat of one question and one answer."""

        question = {"role": "user", "content": habits.content(_USER)}
        answer = {"role": "assistant", "content": habits.content(_ASSISTANT)}
        further = {"role": "user", "content": habits.content(_NEXT)}
        bare, prompted = self.render([question], tools), self.render([question], tools, prompt=True)
        whole = self.render([question, answer], tools)
        within = self._try([question, answer, further], tools)
        at = whole.index(_ASSISTANT)
        common = self.token_border(prompted, common_length(prompted, whole[:at]))
        start = common_length(prompted, bare)
        # The closing of the question may be missing from `bare`, so the header starts after the question itself.
        start = max(start, prompted.rindex(_USER) + len(_USER)) if _USER in prompted else start
        return replace(
            habits,
            has_prompt=prompted != bare,
            header=prompted[start:common],
            opening=prompted[common:],
            lead=whole[common:at],
            end=self._own_end(_between(whole, _ASSISTANT), _between(within, _ASSISTANT, _NEXT)),
            moves_thought=self._moves_thought(habits, question, tools),
            next_header=self._at_start(_between(within, _ASSISTANT, _NEXT)),
        )

    def _moves_thought(self, habits: Habits, question: Message, tools: Tools) -> bool:
        """Return True where the template has its own form for a thought in a field, and prints tags as they are."""
        if not habits.reasoning:
            return False
        answer: Message = {"role": "assistant", "content": habits.content(_ASSISTANT), habits.reasoning[0]: _THOUGHT}
        tagged = f"{THINK}\n{_THOUGHT}\n{CLOSE_THINK}\n\n{_ASSISTANT}"
        by_field = self._try([question, answer], tools)
        by_tags = self._try([question, {"role": "assistant", "content": habits.content(tagged)}], tools)
        return THINK in by_tags and THINK not in by_field and _THOUGHT in by_field

    def _own_end(self, last: str, within: str) -> str | None:
        """Return the special token that follows an answer both at the end of a chat and within it."""
        # Other special tokens may stand before the one that stops the teacher.
        shared = [stop for stop in self._stops if stop in last and (not within or stop in within)]
        if shared:
            return min(shared, key=last.index)
        found = self.first_special(last)
        return found if not within or found == self.first_special(within) else None

    def _at_start(self, text: str) -> str | None:
        return max((token for token in self.special_tokens if text.startswith(token)), key=len, default=None)

    def token_border(self, text: str, at: int) -> int:
        """Return `at`, or the start of the special token or thinking tag that `at` would cut in two."""
        for token in (*self.special_tokens, THINK, CLOSE_THINK):
            start = text.find(token, max(0, at - len(token) + 1), at + len(token) - 1)
            if 0 <= start < at < start + len(token):
                at = start
        return at

    def first_special(self, text: str) -> str | None:
        """Return the special token that comes first in a text; of several at one place, the longest."""
        places = [(text.index(token), -len(token), token) for token in self.special_tokens if token in text]
        return min(places)[2] if places else None


def _compiled(source: str) -> Any:
    """Return the template as transformers compiles it: in a sandbox, with its filters and `{% generation %}`."""
    from transformers.utils import chat_template_utils

    return chat_template_utils._compile_jinja_template(source)


def check_template(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Raise UserError for template arguments that nothing reads, and for a template that draws at random."""
    templates = getattr(tokenizer, "chat_template", None)
    sources = list(templates.values()) if isinstance(templates, dict) else [templates] if templates else []
    for name in arguments:
        if name in _RESERVED:
            raise UserError(f"The template argument {name!r} is set by this program; leave it out.")
        if not any(re.search(rf"\b{re.escape(name)}\b", source) for source in sources):
            raise UserError(f"The chat template does not read {name!r}; correct the name or leave the argument out.")
    if any(_RANDOM.search(source) for source in sources):
        raise UserError(
            "The chat template draws at random, so a chat has no fixed tokens; give a chat template that does not."
        )


def tells_time(tokenizer: Any) -> bool:
    """Return True where a chat template of this tokenizer writes the date or the time."""
    templates = getattr(tokenizer, "chat_template", None)
    sources = templates.values() if isinstance(templates, dict) else [templates or ""]
    return any(_CLOCK.search(source) for source in sources)


def opens_thought(prompt: str) -> bool:
    """Return True where a text ends in the start of a thought, as the generation prompts of some templates do."""
    return prompt.rstrip().endswith(THINK)


def closes_thought(prompt: str) -> bool:
    """Return True where a text ends in the end of a thought."""
    return prompt.rstrip().endswith(CLOSE_THINK)


def _between(text: str, start: str, stop: str | None = None) -> str:
    """Return the text after `start`, up to `stop`; "" where one of them is missing."""
    _, found, rest = text.partition(start)
    if not found or (stop is not None and stop not in rest):
        return ""
    return rest if stop is None else rest.partition(stop)[0]


def common_length(one: str, other: str) -> int:
    """Return the number of characters that two texts share at their start."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _special_tokens(tokenizer: Any) -> frozenset[str]:
    added = (str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values())
    return frozenset({*tokenizer.all_special_tokens, *added} - {""})


def _adapted_call(call: dict[str, Any], habits: Habits, place: str) -> dict[str, Any]:
    """Return a tool call whose arguments have the form that the template takes."""
    arguments = call["function"]["arguments"]
    if habits.object_arguments and isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else {}
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise UserError(
                f"A tool call of {place} has arguments that are not a JSON object, and the chat template takes no "
                "other; mend or remove the row."
            )
    elif not habits.object_arguments and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _without_thought(message: Message, habits: Habits) -> Any:
    """Return the content of a message with tool calls; its thought goes to FOLDED where the template shows none there.

    Templates whose prompt opens a thought render either a content or a call.
    """
    content = content_text(message.get("content"))
    thought, closed, answer = content.rpartition(CLOSE_THINK)
    if habits.reasoning or not habits.opens_thinking or answer.strip():
        return message.get("content")
    reasoning = reasoning_of(message)
    if closed:
        message[FOLDED] = thought + CLOSE_THINK + answer
    elif reasoning is not None:
        message[FOLDED] = f"{THINK}\n{reasoning.strip()}\n{CLOSE_THINK}\n\n"
        for name in REASONING_FIELDS:
            message.pop(name, None)
    return "" if FOLDED in message else message.get("content")


def _with_reasoning(message: Message, habits: Habits, unfinished: bool) -> Message:
    """Return the message with its reasoning in the field that the template reads, or before its text."""
    reasoning, text = reasoning_of(message), content_text(message["content"])
    if reasoning is None:
        thought, closed, answer = text.rpartition(CLOSE_THINK)
        if habits.opens_thinking and closed and THINK not in thought:
            # A completion as the teacher writes it: the generation prompt has the opening.
            message["content"] = habits.content(f"{THINK}\n{text.lstrip()}")
        elif habits.moves_thought and closed and thought.lstrip().startswith(THINK):
            message[habits.reasoning[0]] = thought.lstrip().removeprefix(THINK).strip()
            message["content"] = habits.content(answer.strip())
        return message
    given = next(name for name in REASONING_FIELDS if message.get(name))
    if not habits.reasoning and habits.opens_thinking:
        # A thought that was cut has no end.
        end = "" if unfinished and not text.strip() else f"\n{CLOSE_THINK}\n\n{text}"
        message["content"] = habits.content(f"{THINK}\n{reasoning.strip()}{end}")
        return {key: value for key, value in message.items() if key not in REASONING_FIELDS}
    if habits.reasoning and given not in habits.reasoning:
        message[habits.reasoning[0]] = message.pop(given)
    return message
