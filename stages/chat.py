"""From a chat to token ids and the tokens that have a loss: those that the assistant generated.

An assistant turn is trained from the end of its generation prompt to the first token that stops the teacher, that token
included. A template either marks the turns itself with `{% generation %}`, or they are found by rendering prefixes of
the chat. A turn that a template renders otherwise once messages follow it (templates strip earlier thinking) can only
be trained as the last one: `turns` "each" and "last" cut the chat there.

Where even the last turn does not continue its generation prompt (the prompt opens a thought that finished turns do not
show; a system prompt stands in the prompt alone), the sequence is the prompt followed by the finished turn. A message
that is not in its rendered turn is refused by row: nothing that a chat says is dropped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np

from stages.chat_template import (
    CLOSE_THINK,
    THINK,
    ChatTemplate,
    Habits,
    Span,
    Tools,
    closes_thought,
    common_length,
    opens_thought,
)
from stages.encode import check_text, encode_spans
from stages.messages import REASONING_FIELDS, Chat, Message, content_text, tool_names
from stages.said import is_in, not_rendered, said, squeezed, times_named
from storage.errors import UserError

_THINK_TAGS = re.compile(r"</?think>")
# No content begins with both.
_MARKERS = ("\u2603", "\u2604")


class _Undecided(Exception):
    """The template does not show which tokens are the assistant's; the text is the reason."""


@dataclass(frozen=True)
class Rendered:
    """One sequence as text, and its trained stretches as characters.

    without_end: trained turns that end in no token that stops the teacher. open_thoughts: trained turns that answer
    inside the thought that their generation prompt opens.
    """

    text: str
    spans: list[Span]
    without_end: int = 0
    open_thoughts: int = 0


class _Turn(NamedTuple):
    """Characters of an assistant turn: where it begins, where its text ends, and where the first token ends that stops
    the teacher; None without one.
    """

    begin: int
    limit: int
    stop: int | None


class ChatRenderer:
    """Renders chats of one tokenizer. It may be sent to worker processes.

    turns: "all" trains on every assistant turn in one sequence, "each" on every turn in a sequence of its own, "last"
    on the last one. end_ids: token ids that stop the teacher, besides the tokenizer's end of sequence and the
    template's own end of turn. arguments, moment: see `ChatTemplate`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        turns: str = "all",
        end_ids: Sequence[int] = (),
        arguments: Mapping[str, Any] | None = None,
        moment: datetime | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._turns = turns
        self._template = ChatTemplate(tokenizer, arguments, moment)
        ends = {*end_ids, tokenizer.eos_token_id} - {None}
        self._stops = frozenset(str(tokenizer.convert_ids_to_tokens(int(end))) for end in ends)
        self._vanished: dict[Any, frozenset[int]] = {}

    def render(self, chat: Chat, where: str = "the chat", tools: Tools = None) -> list[Rendered]:
        """Return the sequences of a chat. `where` names the row in errors. Raises UserError.

        Without a turn that has a loss there is one sequence with no span.
        """
        if not chat.messages:
            return [Rendered("", [])]
        self._template.source(tools, where)
        messages = self._template.adapt(chat.messages, tools, where)
        wanted = chat.turns
        if not wanted:
            return [self._whole(messages, tools, where)]
        try:
            if self._turns == "all":
                return [self._sequence(messages, tools, where, wanted)]
            return self._turn_by_turn(messages, tools, where, wanted[-1:] if self._turns == "last" else wanted)
        except _Undecided as error:
            raise UserError(
                f"The chat template cannot tell which tokens are the assistant's in {where} ({error}); "
                f"{self._advice(messages, tools, where, wanted)}."
            ) from error

    def encode(self, rendered: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each sequence its token ids int32 [L], and bool [L]: True for the assistant's tokens.

        No special tokens are added to those that the template writes.
        """
        texts, spans = [each.text for each in rendered], [each.spans for each in rendered]
        return encode_spans(self._tokenizer, texts, spans, add_special_tokens=False) if texts else []

    def prompt(self, chat: Chat, where: str = "the chat", tools: Tools = None) -> str:
        """Return the chat with the generation prompt, as text, for the assistant to answer. Raises UserError."""
        self._template.source(tools, where)
        messages = self._template.adapt(chat.messages, tools, where)
        try:
            text = self._template.render(messages, tools, prompt=True)
        except Exception as error:  # a template may raise anything
            raise _refused(where, error) from error
        check_text(text, where)
        self._check_context(messages, [], text, tools, where)
        return text

    # ---- sequences ----------------------------------------------------------------------------------------

    def _turn_by_turn(self, messages: list[Message], tools: Tools, where: str, wanted: Sequence[int]) -> list[Rendered]:
        return [self._sequence(messages[: turn + 1], tools, where, [turn]) for turn in wanted]

    def _advice(self, messages: list[Message], tools: Tools, where: str, wanted: list[int]) -> str:
        """Return the remedy that works for this chat."""
        otherwise = "add {% generation %} marks to the template, or supply prompt and completion columns"
        if self._turns != "all":
            return otherwise
        try:
            self._turn_by_turn(messages, tools, where, wanted)
        except (_Undecided, UserError):
            return otherwise
        return (
            "train on the last turn alone or on each turn in a sequence of its own (--turns last, --turns each), "
            + otherwise
        )

    def _whole(self, messages: list[Message], tools: Tools, where: str) -> Rendered:
        text = self._rendered(messages, tools, where)
        check_text(text, where)
        self._check_context(messages, [], text, tools, where)
        return Rendered(text, [])

    def _sequence(self, messages: list[Message], tools: Tools, where: str, wanted: list[int]) -> Rendered:
        """Return one sequence in which the messages `wanted` have a loss."""
        if self._template.marks_generation(tools):
            return self._marked_sequence(messages, tools, where, wanted)
        habits = self._template.habits(tools)
        whole = text = self._rendered(messages, tools, where)
        last = len(messages) - 1
        last_begin = 0
        if wanted[-1] == last:
            text, last_begin = self._last_turn(messages, tools, whole, habits)
        spans: list[Span] = []
        without_end = open_thoughts = 0
        for number in wanted:
            if number != last:
                turn = self._earlier_turn(messages, number, tools, text, habits)
            else:
                turn = _Turn(last_begin, len(text), self._stop(text, last_begin, len(text), habits))
                if turn.stop is None and (closing := self._closing(messages, tools, whole)):
                    text += closing
                    turn = _Turn(last_begin, len(text), len(text))
            end = self._plain_end(text, turn.limit) if turn.stop is None else turn.stop
            if turn.stop is None:
                without_end += not text[turn.begin : end].endswith(tuple(self._template.special_tokens))
            spoken = text[turn.begin : max(turn.limit, end)]
            self._check_said(messages[number], spoken, f"message {number + 1} in {where}")
            open_thoughts += opens_thought(text[: turn.begin]) and CLOSE_THINK not in spoken
            if end > turn.begin:
                spans.append((turn.begin, end))
        check_text(text, where)
        # Text that the prompt alone has replaces that of the whole chat, so the prompt has to hold the messages.
        self._check_context(messages, wanted, text, tools, where, by_prompt=not text.startswith(whole))
        return Rendered(text, spans, without_end, open_thoughts)

    def _rendered(self, messages: list[Message], tools: Tools, where: str) -> str:
        try:
            return self._template.render(messages, tools)
        except Exception as error:  # a template may raise anything
            raise _refused(where, error) from error

    # ---- turns by prefixes --------------------------------------------------------------------------------

    def _before(self, messages: list[Message], turn: int, tools: Tools, whole: str, habits: Habits) -> str:
        """Return the text before an assistant turn, generation prompt included. Raises _Undecided."""
        if turn == 0:
            # `transformers` renders no empty chat, so for a chat that the assistant opens the header is looked for.
            if not habits.header or habits.header not in whole:
                raise _Undecided("the assistant opens the chat")
            return whole[: whole.index(habits.header) + len(habits.header)] + habits.opening
        try:
            before = self._template.render(messages[:turn], tools, prompt=True)
            bare = self._template.render(messages[:turn], tools)
        except Exception as error:  # a template may raise anything
            raise _Undecided(f"it refuses the messages before message {turn + 1}") from error
        # Without a generation prompt all is well only if the turn starts with its content, not with a header.
        content = content_text(messages[turn].get("content")).strip()
        headed = whole.startswith(before) and not whole[len(before) :].lstrip().startswith(content)
        headed = headed and not messages[turn].get("tool_calls")  # a template may show the call alone
        if before == bare and (habits.lead.strip() or headed):
            raise _Undecided("it has no generation prompt")
        return before

    def _earlier_turn(self, messages: list[Message], turn: int, tools: Tools, text: str, habits: Habits) -> _Turn:
        """Return a turn that messages follow. Raises _Undecided where they change how it is rendered."""
        before = self._before(messages, turn, tools, text, habits)
        try:
            after = self._template.render(messages[: turn + 1], tools)
        except Exception as error:  # a template may raise anything
            raise _Undecided(f"it refuses the messages up to message {turn + 1}") from error
        if text.startswith(before):
            limit = common_length(after, text)
            stop = self._stop(text, len(before), limit, habits)
            if stop is not None or text.startswith(after):
                return _Turn(len(before), limit, stop)
        raise _Undecided(f"message {turn + 1} is rendered differently once messages follow it")

    def _last_turn(self, messages: list[Message], tools: Tools, whole: str, habits: Habits) -> tuple[str, int]:
        """Return the chat as text, and where its last turn begins."""
        last = len(messages) - 1
        before = self._before(messages, last, tools, whole, habits)
        if whole.startswith(before):
            rest = whole[len(before) :]
        else:
            rest = whole[self._turn_start(messages, tools, whole, before, habits) :]
        return before + _with_thought(content_text(messages[last].get("content")), before, rest), len(before)

    def _turn_start(self, messages: list[Message], tools: Tools, whole: str, before: str, habits: Habits) -> int:
        """Return where the last turn begins in `whole`, which does not begin with its generation prompt `before`.

        The same chat with another answer parts from `whole` at the answer. The text up to there must end as the
        generation prompt does, but for what the prompt opens.
        """
        last = len(messages) - 1
        header = before.rfind(habits.header) if habits.header else -1
        base = before[: header + len(habits.header)] if header >= 0 else before.removesuffix(habits.opening)
        marker = next(m for m in _MARKERS if not content_text(messages[last].get("content")).startswith(m))
        answer = {"role": "assistant", "content": habits.content(marker)}
        try:
            other = self._template.render([*messages[:last], answer], tools)
        except Exception as error:  # a template may raise anything
            raise _Undecided(f"it refuses another message {last + 1}") from error
        parting = self._template.token_border(whole, common_length(whole, other))
        starts = {parting, max(0, parting - len(habits.lead))}
        shared, start = max((common_length(whole[:at][::-1], base[::-1]), at) for at in starts)
        if shared < max(len(habits.header), min(4, len(base))):
            raise _Undecided(f"message {last + 1} does not continue its generation prompt")
        return start

    def _stop(self, text: str, begin: int, limit: int, habits: Habits) -> int | None:
        """Return the end of the first token that stops the teacher and begins in `begin..limit`; None without one."""
        stops = self._stops | ({habits.end} if habits.end else set())
        places = [(at, -len(stop)) for stop in stops if 0 <= (at := text.find(stop, begin)) <= limit]
        if not places:
            return None
        at, negative_length = min(places)
        return at - negative_length

    def _closing(self, messages: list[Message], tools: Tools, whole: str) -> str:
        """Return the token that stops the teacher after the last turn and that only a next message would write."""
        content = self._template.habits(tools).content("x")
        roles = ("tool", "user") if messages[-1].get("tool_calls") else ("user",)
        for role in roles:
            try:
                longer = self._template.render([*messages, {"role": role, "content": content}], tools)
            except Exception:  # noqa: BLE001 - a template may refuse the order of roles
                continue
            added = longer[len(whole) :]
            stop = max((stop for stop in self._stops if added.startswith(stop)), key=len, default="")
            if stop and longer.startswith(whole):
                return stop
        # The template may strip the thinking of this turn once a message follows, so the probe has to tell.
        header = self._template.habits(tools).next_header
        return header if header is not None and header in self._stops else ""

    def _plain_end(self, text: str, end: int) -> int:
        """Return `end` without white space that follows a special token: no model generates past that token."""
        stripped = text[:end].rstrip()
        return len(stripped) if stripped.endswith(tuple(self._template.special_tokens)) else end

    # ---- turns by marks -----------------------------------------------------------------------------------

    def _marked_sequence(self, messages: list[Message], tools: Tools, where: str, wanted: list[int]) -> Rendered:
        """Return one sequence whose template marks the assistant's tokens itself."""
        try:
            text, marks = self._template.render_marked(messages, tools)
        except Exception as error:  # a template may raise anything
            raise _refused(where, error) from error
        check_text(text, where)
        habits = self._template.habits(tools)
        assistants = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if wanted != assistants:
            marks = [mark for turn in wanted for mark in self._marks_of(messages, turn, tools, marks)]
        spans = []
        stopped = 0
        starts = [self._prompt_end(messages, turn, tools, text) for turn in wanted]
        for begin, end in marks:
            begin = max([begin, *(start for start in starts if start < end)])
            stop = self._stop(text, begin, end, habits)
            stopped += stop is not None
            spans.append((begin, end if stop is None else stop))
        spoken = "".join(text[begin:end] for begin, end in marks)
        for turn in wanted:
            self._check_said(messages[turn], spoken, f"message {turn + 1} in {where}")
        self._check_context(messages, wanted, text, tools, where)
        return Rendered(text, spans, without_end=max(0, len(wanted) - stopped))

    def _prompt_end(self, messages: list[Message], turn: int, tools: Tools, text: str) -> int:
        """Return where the generation prompt of a turn ends; marks may hold the header, which nobody generates."""
        try:
            before = self._template.render(messages[:turn], tools, prompt=True)
        except Exception:  # noqa: BLE001 - then the marks alone tell
            return 0
        return len(before) if text.startswith(before) else 0

    def _marks_of(self, messages: list[Message], turn: int, tools: Tools, marks: list[Span]) -> list[Span]:
        """Return the marks of one turn: those that the chat up to it has more than the chat before it."""
        try:
            earlier = len(self._template.render_marked(messages[:turn], tools)[1])
            upto = len(self._template.render_marked(messages[: turn + 1], tools)[1])
        except Exception as error:  # a template may raise anything
            raise _Undecided(f"it refuses the messages before message {turn + 1}") from error
        return marks[earlier:upto]

    # ---- what must be in the text -------------------------------------------------------------------------

    def _check_said(self, message: Message, spoken: str, place: str) -> None:
        """Raise UserError unless all that a trained message says is in its rendered turn."""
        text_there = squeezed(spoken)
        for what, piece in said(message):
            if not is_in(piece, text_there):
                raise not_rendered(what, place)
        _check_calls(message, spoken, place)

    def _check_context(
        self,
        messages: list[Message],
        wanted: Sequence[int],
        text: str,
        tools: Tools,
        where: str,
        *,
        by_prompt: bool = False,
    ) -> None:
        """Raise UserError unless the other messages and the tools are in the text; earlier thinking may be stripped.

        A short content may stand in the text by chance, so the same chat with other contents is rendered as well, once
        for all chats of its shape.
        """
        text_there = squeezed(text)
        vanished = self._vanished_messages(messages, tools, by_prompt)
        for number, message in enumerate(messages):
            if number in wanted:
                continue
            place = f"message {number + 1} in {where}"
            if number in vanished:
                raise not_rendered("the content", place)
            content = content_text(message.get("content")).rpartition(CLOSE_THINK)[2]
            context = {**message, "content": content}
            for what, piece in said({k: v for k, v in context.items() if k not in REASONING_FIELDS}):
                obeyed = self._template.without_directives(piece, tools)
                if not is_in(piece, text_there) and not is_in(obeyed, text_there):
                    raise not_rendered(what, place)
            _check_calls(message, text, place)
        for name in tool_names(tools or []):
            if not times_named(name, text):
                raise not_rendered(f"the tool {name!r}", where)

    def _vanished_messages(self, messages: list[Message], tools: Tools, by_prompt: bool) -> frozenset[int]:
        """Return the numbers of the messages whose content the template leaves out in chats of this shape."""
        shape = tuple(
            (m["role"], type(m.get("content")), bool(content_text(m.get("content"))), bool(m.get("tool_calls")))
            for m in messages
        )
        key = (shape, bool(tools), by_prompt)
        if key not in self._vanished:
            names = {n: f"qvz{n}qvz" for n, m in enumerate(messages) if content_text(m.get("content"))}
            chat = [
                {**m, "content": _like(m["content"], names[n])} if n in names else m for n, m in enumerate(messages)
            ]
            try:
                text = self._template.render(chat[:-1] if by_prompt else chat, tools, prompt=by_prompt)
            except Exception:  # noqa: BLE001 - a template may refuse contents that mean nothing
                names = {}
            hidden = {n for n, name in names.items() if name not in text and not (by_prompt and n == len(chat) - 1)}
            self._vanished[key] = frozenset(hidden)
        return self._vanished[key]


def _with_thought(content: str, before: str, rest: str) -> str:
    """Return the finished turn `rest` with the thought of its content, which some templates strip even there.

    before: the text up to the turn; the part of the thought that the generation prompt opens is not repeated.
    """
    if CLOSE_THINK not in content or closes_thought(before):
        return rest
    thought, _, answer = content.rpartition(CLOSE_THINK)
    if squeezed(thought.replace(THINK, "")) in squeezed(rest):
        return rest
    if opens_thought(before) and thought.startswith(THINK):
        # The prompt has the white space behind the opening tag too.
        thought = thought.removeprefix(THINK).removeprefix(before[len(before.rstrip()) :])
    rest = rest.lstrip().removeprefix(CLOSE_THINK) if CLOSE_THINK in rest else rest
    if answer.strip():
        rest = answer[: len(answer) - len(answer.lstrip())] + rest.lstrip()
    return thought + CLOSE_THINK + rest


def _check_calls(message: Message, text: str, place: str) -> None:
    """Raise UserError unless the text names every tool that the message calls, as often as the message does."""
    names = [call["function"]["name"] for call in message.get("tool_calls") or []]
    for name in names:
        if times_named(name, text) < names.count(name):
            raise not_rendered(f"the tool call {name!r}", place)


def _like(content: Any, text: str) -> Any:
    return [{"type": "text", "text": text}] if isinstance(content, list) else text


def _refused(where: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return UserError(f"The chat template refuses the messages in {where}: {reason}; mend or remove the row.")
