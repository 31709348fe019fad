"""From a chat to token ids and the tokens that have a loss: those that the assistant generated.

An assistant turn is trained from the end of its generation prompt to the first token that stops the teacher, that token
included. A turn that a template renders otherwise once messages follow it (templates strip earlier thinking) can only
be trained as the last one: `turns` "each" and "last" cut the chat there. A template that marks the assistant's tokens
with `{% generation %}` narrows the turns to its marks.

A message that is not in its rendered turn is refused by row: nothing that a chat says is dropped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from stages.chat_template import CLOSE_THINK, ChatTemplate, Tools, closes_thought, opens_thought
from stages.chat_turns import ThoughtClosed, Turn, TurnFinder, Undecided, narrowed
from stages.encode import Span, check_text, encode_spans
from stages.messages import REASONING_FIELDS, Chat, Message, content_text, kind_of, tool_names
from stages.said import is_in, not_rendered, said, squeezed, thought_of, times_named
from stages.template_gaps import Gap, TemplateGaps
from storage.errors import UserError

_SWITCH_ON = (
    "set the template argument that switches thinking on, such as enable_thinking or thinking, or remove the thought"
)


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
        self._turns, self._end_ids, self._moment = turns, tuple(end_ids), moment
        self._arguments = dict(arguments or {})
        self._others: dict[str, ChatRenderer] = {}
        ends = {*end_ids, tokenizer.eos_token_id} - {None}
        stops = frozenset(str(tokenizer.convert_ids_to_tokens(int(end))) for end in ends)
        self._template = ChatTemplate(tokenizer, arguments, moment, stops)
        self._finder = TurnFinder(self._template, stops)
        self._gaps = TemplateGaps(self._template)

    def with_arguments(self, arguments: Any, where: str) -> ChatRenderer:
        """Return a renderer with more variables for the template, those of one row. Raises UserError naming the row."""
        if not arguments:
            return self
        if not isinstance(arguments, dict):
            raise UserError(
                f"The chat_template_kwargs of {where} is {kind_of(arguments)}, not an object; mend the row."
            )
        key = json.dumps(arguments, sort_keys=True, default=str)
        if key not in self._others:
            merged = {**self._arguments, **arguments}
            given: Any = {"turns": self._turns, "end_ids": self._end_ids, "moment": self._moment}
            try:
                self._others[key] = ChatRenderer(self._tokenizer, arguments=merged, **given)
            except UserError as error:
                raise UserError(f"In {where}: {error}") from None
        return self._others[key]

    def render(
        self, chat: Chat, where: str = "the chat", tools: Tools = None, *, unfinished: bool = False
    ) -> list[Rendered]:
        """Return the sequences of a chat. `where` names the row in errors. Raises UserError.

        unfinished: the last message was cut when it was written, so it has no end. Without a turn that has a loss there
        is one sequence with no span.
        """
        if not chat.messages:
            return [Rendered("", [])]
        self._template.source(tools, where)
        messages = self._template.adapt(chat.messages, tools, where, unfinished=unfinished)
        wanted = chat.turns
        if not wanted:
            return [self._whole(messages, tools, where)]
        try:
            if self._turns == "all":
                return [self._sequence(messages, tools, where, wanted, unfinished)]
            chosen = wanted[-1:] if self._turns == "last" else wanted
            return self._turn_by_turn(messages, tools, where, chosen, unfinished)
        except ThoughtClosed as error:
            raise UserError(f"In {where} {error}; {_SWITCH_ON}.") from error
        except Undecided as error:
            raise UserError(
                f"The chat template cannot tell which tokens are the assistant's in {where} ({error}); "
                f"{self._advice(messages, tools, where, wanted)}."
            ) from error

    def prompt(self, chat: Chat, where: str = "the chat", tools: Tools = None) -> str:
        """Return the chat with the generation prompt, as text, for the assistant to answer. Raises UserError."""
        self._template.source(tools, where)
        messages = self._template.adapt(chat.messages, tools, where)
        try:
            text = self._template.render(messages, tools, prompt=True)
        except Exception as error:  # a template may raise anything
            raise _refused(where, error) from error
        check_text(text, where)
        self._check_gaps(messages, [], tools, where, self._gaps.find(messages, tools, prompt=True))
        self._check_context(messages, [], text, tools, where)
        return text

    def encode(self, rendered: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return for each sequence its token ids int32 [L], and bool [L]: True for the assistant's tokens.

        No special tokens are added to those that the template writes.
        """
        texts, spans = [each.text for each in rendered], [each.spans for each in rendered]
        return encode_spans(self._tokenizer, texts, spans, add_special_tokens=False) if texts else []

    # ---- sequences ----------------------------------------------------------------------------------------

    def _turn_by_turn(
        self, messages: list[Message], tools: Tools, where: str, wanted: Sequence[int], unfinished: bool = False
    ) -> list[Rendered]:
        last = len(messages) - 1
        return [
            self._sequence(messages[: turn + 1], tools, where, [turn], unfinished and turn == last) for turn in wanted
        ]

    def _advice(self, messages: list[Message], tools: Tools, where: str, wanted: list[int]) -> str:
        """Return the remedy that works for this chat. Raises UserError for a chat that no remedy helps."""
        otherwise = "add {% generation %} marks to the template, or supply prompt and completion columns"
        if self._turns != "all":
            return otherwise
        try:
            self._turn_by_turn(messages, tools, where, wanted)
        except Undecided:
            return otherwise
        return (
            "train on the last turn alone or on each turn in a sequence of its own (--turns last, --turns each), "
            + otherwise
        )

    def _whole(self, messages: list[Message], tools: Tools, where: str) -> Rendered:
        text = self._rendered(messages, tools, where)
        self._check_gaps(messages, [], tools, where, self._gaps.find(messages, tools))
        self._check_context(messages, [], text, tools, where)
        return Rendered(text, [])

    def _sequence(
        self, messages: list[Message], tools: Tools, where: str, wanted: list[int], unfinished: bool = False
    ) -> Rendered:
        """Return one sequence in which the messages `wanted` have a loss. Raises Undecided."""
        whole = self._rendered(messages, tools, where)
        if not self._template.marks_generation(tools):
            return self._by_prompts(messages, tools, where, wanted, whole, None, unfinished)
        marks = self._template.render_marked(messages, tools)[1]
        try:
            return self._by_prompts(messages, tools, where, wanted, whole, marks, unfinished)
        except Undecided:
            return self._by_marks(messages, tools, where, wanted, whole, marks)

    def _by_prompts(
        self,
        messages: list[Message],
        tools: Tools,
        where: str,
        wanted: list[int],
        whole: str,
        marks: list[Span] | None,
        unfinished: bool,
    ) -> Rendered:
        """Return a sequence whose turns begin where their generation prompts end. Raises Undecided."""
        gaps, last = self._gaps.find(messages, tools), len(messages) - 1
        text, begin, by_prompt, restored = whole, 0, False, False
        if wanted[-1] == last:
            text, begin, by_prompt, restored = self._finder.last(messages, tools, whole, gaps, unfinished=unfinished)
        if by_prompt or restored:
            marks = None  # they are those of the finished chat
        spans: list[Span] = []
        without_end = open_thoughts = 0
        for number in wanted:
            is_last = number == last
            if not is_last:
                _refuse_lost_thought(messages[number], number, gaps)
                turn = self._finder.earlier(messages, number, tools, text)
            else:
                turn = Turn(begin, len(text), self._finder.stop(text, begin, len(text), tools))
                closing = "" if turn.stop or unfinished else self._finder.closing(messages, tools, whole)
                if closing:
                    text += closing
                    turn = Turn(begin, len(text), (len(text) - len(closing), len(text)))
            end = self._finder.plain_end(text, turn.limit) if turn.stop is None else turn.stop[1]
            if turn.stop is None and not (unfinished and is_last):
                without_end += not text[turn.begin : end].endswith(tuple(self._template.special_tokens))
            spoken = text[turn.begin : max(turn.limit, end)]
            _check_said(messages[number], text[: turn.begin], spoken, f"message {number + 1} in {where}", tools)
            open_thoughts += opens_thought(text[: turn.begin]) and CLOSE_THINK not in spoken
            spans += narrowed(turn, end, marks)
        check_text(text, where)
        if by_prompt:
            context = self._gaps.find(messages[:-1], tools, prompt=True)
            self._check_gaps(messages[:-1], wanted[:-1], tools, where, context)
            gaps = gaps and frozenset(gap for gap in gaps if gap[0] == last and gap[1] != "tool")
        self._check_gaps(messages, wanted, tools, where, gaps, restored=last if restored or unfinished else None)
        self._check_context(messages, wanted, text, tools, where)
        return Rendered(text, spans, without_end, open_thoughts)

    def _by_marks(
        self,
        messages: list[Message],
        tools: Tools,
        where: str,
        wanted: list[int],
        whole: str,
        marks: list[Span],
    ) -> Rendered:
        """Return the whole chat with the assistant's tokens that its template marks. Raises Undecided."""
        assistants = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if wanted != assistants:
            marks = [mark for turn in wanted for mark in self._finder.marks_of(messages, turn, tools, marks)]
        stops = [self._finder.stop(whole, begin, end, tools) for begin, end in marks]
        spans = [(begin, end if stop is None else stop[1]) for (begin, end), stop in zip(marks, stops, strict=True)]
        spoken = "".join(whole[begin:end] for begin, end in marks)
        for number in wanted:
            _check_said(messages[number], "", spoken, f"message {number + 1} in {where}", tools)
        self._check_gaps(messages, wanted, tools, where, self._gaps.find(messages, tools))
        self._check_context(messages, wanted, whole, tools, where)
        return Rendered(whole, spans, without_end=max(0, len(wanted) - sum(stop is not None for stop in stops)))

    def _rendered(self, messages: list[Message], tools: Tools, where: str) -> str:
        try:
            text = self._template.render(messages, tools)
        except Exception as error:  # a template may raise anything
            raise _refused(where, error) from error
        check_text(text, where)
        return text

    # ---- what must be in the text -------------------------------------------------------------------------

    def _check_gaps(
        self,
        messages: list[Message],
        wanted: Sequence[int],
        tools: Tools,
        where: str,
        gaps: Collection[Gap] | None,
        restored: int | None = None,
    ) -> None:
        """Raise UserError for a part of a message that the template does not render, as its gaps show.

        Earlier thinking may be stripped where it is not trained. restored: a message whose thought was put back.
        """
        for number, part in sorted(gaps or ()):
            if part == "tool":
                names = tool_names(tools or [])
                raise not_rendered(f"the tool {names[number]!r}" if number < len(names) else "a tool", where)
            message, place = messages[number], f"message {number + 1} in {where}"
            if part == "content":
                raise not_rendered("the content", place)
            if part == "call":
                raise not_rendered(f"the tool call {message['tool_calls'][0]['function']['name']!r}", place, tools)
            if number in wanted and part == "reasoning":
                raise not_rendered("the reasoning", place)
            if number in wanted and number != restored and thought_of(content_text(message.get("content"))).strip():
                raise not_rendered("the thought", place)

    def _check_context(
        self, messages: list[Message], wanted: Sequence[int], text: str, tools: Tools, where: str
    ) -> None:
        """Raise UserError unless the other messages and the tools are in the text; earlier thinking may be stripped."""
        text_there = squeezed(text)
        for number, message in enumerate(messages):
            if number in wanted:
                continue
            place = f"message {number + 1} in {where}"
            content = content_text(message.get("content")).rpartition(CLOSE_THINK)[2]
            context = {**message, "content": content}
            for what, piece in said({k: v for k, v in context.items() if k not in REASONING_FIELDS}):
                obeyed = self._template.without_directives(piece, tools)
                if not is_in(piece, text_there) and not is_in(obeyed, text_there):
                    raise not_rendered(what, place)
            _check_calls(message, text, place, tools)
        for name in tool_names(tools or []):
            if not times_named(name, text):
                raise not_rendered(f"the tool {name!r}", where)


def _refuse_lost_thought(message: Message, number: int, gaps: Collection[Gap] | None) -> None:
    """Raise Undecided for an earlier turn without the thought that it had when it was written."""
    thought = thought_of(content_text(message.get("content"))).strip()
    lost = gaps and ((number, "reasoning") in gaps or ((number, "thought") in gaps and thought))
    if lost:
        raise Undecided(f"message {number + 1} loses its thought once messages follow it")


def _check_said(message: Message, before: str, spoken: str, place: str, tools: Tools) -> None:
    """Raise UserError unless all that a trained message says is in its rendered turn."""
    _check_calls(message, spoken, place, tools)
    text_there = squeezed(spoken)
    for what, piece in said(message):
        if not is_in(piece, text_there):
            if closes_thought(before) and (CLOSE_THINK in content_text(message.get("content"))):
                raise UserError(f"The generation prompt closes the thought that {place} has; {_SWITCH_ON}.")
            raise not_rendered(what, place)


def _check_calls(message: Message, text: str, place: str, tools: Tools = None) -> None:
    """Raise UserError unless the text names every tool that the message calls, as often as the message does."""
    names = [call["function"]["name"] for call in message.get("tool_calls") or []]
    for name in names:
        if times_named(name, text) < names.count(name):
            raise not_rendered(f"the tool call {name!r}", place, tools)


def _refused(where: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return UserError(f"The chat template refuses the messages in {where}: {reason}; mend or remove the row.")
