"""Find the begin and the end of an assistant turn in a rendered chat.

A turn begins where the generation prompt ends, which rendering the messages before it shows, and its loss ends with the
first token that stops the teacher. Where a finished turn does not continue its generation prompt (the prompt opens a
thought that finished turns do not show; a system prompt stands in the prompt alone), the last turn is put together:
the prompt, then the finished turn without its header.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from stages.chat_template import (
    CLOSE_THINK,
    FOLDED,
    THINK,
    ChatTemplate,
    Tools,
    closes_thought,
    common_length,
    opens_thought,
)
from stages.encode import Span
from stages.messages import Message, content_text, reasoning_of
from stages.said import squeezed
from stages.template_gaps import Gap, worded_message

# No content begins with both.
_MARKERS = ("\u2603", "\u2604")
_ONLY_TAGS = re.compile(r"\s|</?think>")


class Undecided(Exception):
    """The template does not show which tokens are the assistant's; the text is the reason."""


class ThoughtClosed(Undecided):
    """The generation prompt closes the thought that the last message has."""


class Turn(NamedTuple):
    """Characters of an assistant turn: where it begins, where its text ends, and the first token in it that stops the
    teacher; None without one.
    """

    begin: int
    limit: int
    stop: Span | None


class LastTurn(NamedTuple):
    """A chat as text and where its last turn begins. by_prompt: the text before it is that of the generation prompt,
    not of the finished chat. restored: the turn has a thought that the template strips.
    """

    text: str
    begin: int
    by_prompt: bool
    restored: bool


class TurnFinder:
    """Finds turns of one template. stops: tokens that stop the teacher, as text."""

    def __init__(self, template: ChatTemplate, stops: frozenset[str]) -> None:
        self._template = template
        self._stops = stops

    def before(self, messages: list[Message], turn: int, tools: Tools, whole: str) -> str:
        """Return the text before an assistant turn, generation prompt included. Raises Undecided."""
        habits = self._template.habits(tools)
        if turn == 0:
            # `transformers` renders no empty chat, so for a chat that the assistant opens the header is looked for.
            if not habits.header or habits.header not in whole:
                raise Undecided("the assistant opens the chat")
            return whole[: whole.index(habits.header) + len(habits.header)] + habits.opening
        try:
            before = self._template.render(messages[:turn], tools, prompt=True)
            bare = self._template.render(messages[:turn], tools)
        except Exception as error:  # a template may raise anything
            raise Undecided(f"it refuses the messages before message {turn + 1}") from error
        # Without a generation prompt all is well only if the turn starts with its content, not with a header.
        content = content_text(messages[turn].get("content")).strip()
        headed = whole.startswith(before) and not whole[len(before) :].lstrip().startswith(content)
        headed = headed and not messages[turn].get("tool_calls")  # a template may show the call alone
        if before == bare and (habits.lead.strip() or headed):
            raise Undecided("it has no generation prompt")
        return before

    def earlier(self, messages: list[Message], turn: int, tools: Tools, text: str) -> Turn:
        """Return a turn that messages follow. Raises Undecided where they change how it is rendered."""
        before = self.before(messages, turn, tools, text)
        try:
            after = self._template.render(messages[: turn + 1], tools)
        except Exception as error:  # a template may raise anything
            raise Undecided(f"it refuses the messages up to message {turn + 1}") from error
        if text.startswith(before):
            limit = common_length(after, text)
            stop = self.stop(text, len(before), limit, tools)
            if stop is not None or text.startswith(after):
                return Turn(len(before), limit, stop)
        raise Undecided(f"message {turn + 1} is rendered differently once messages follow it")

    def last(
        self, messages: list[Message], tools: Tools, whole: str, gaps: Collection[Gap] | None, *, unfinished: bool
    ) -> LastTurn:
        """Return the chat up to its last turn and that turn; of an unfinished one no end. Raises Undecided."""
        number = len(messages) - 1
        before = self.before(messages, number, tools, whole)
        by_prompt = not whole.startswith(before)
        if by_prompt and closes_thought(before) and _has_thought(messages[number]):
            raise ThoughtClosed(f"the generation prompt closes the thought that message {number + 1} has")
        start = len(before)
        if by_prompt:
            start = self._start(messages, tools, whole, before)
            self._check_start(messages, tools)
        folded = messages[number].get(FOLDED, "")
        content = folded + content_text(messages[number].get("content"))
        stripped = True if folded else None if gaps is None else (number, "thought") in gaps
        rest = _with_thought(content, before, whole[start:], stripped)
        restored = rest != whole[start:]
        if unfinished:
            stop = self.stop(rest, 0, len(rest), tools)
            if not messages[number].get("tool_calls"):
                rest = _unfinished(content, reasoning_of(messages[number]) or "", before, rest)
            elif stop is not None:
                rest = rest[: stop[0]]
        return LastTurn(before + rest, len(before), by_prompt, restored)

    def _start(self, messages: list[Message], tools: Tools, whole: str, before: str) -> int:
        """Return where the last turn begins in `whole`, which does not begin with its generation prompt `before`.

        The same chat with another answer parts from `whole` at the answer. The text up to there must end as the
        generation prompt does, but for what the prompt opens.
        """
        habits, last = self._template.habits(tools), len(messages) - 1
        header = before.rfind(habits.header) if habits.header else -1
        end = header + len(habits.header)
        # Behind the header a generation prompt opens or closes a thought, and nothing else.
        is_header = header >= 0 and (before[end:] == habits.opening or not _ONLY_TAGS.sub("", before[end:]))
        base = before[:end] if is_header else before.removesuffix(habits.opening)
        marker = next(m for m in _MARKERS if not content_text(messages[last].get("content")).startswith(m))
        answer = {"role": "assistant", "content": habits.content(marker)}
        try:
            other = self._template.render([*messages[:last], answer], tools)
        except Exception as error:  # a template may raise anything
            raise Undecided(f"it refuses another message {last + 1}") from error
        parting = self._template.token_border(whole, common_length(whole, other))
        starts = {parting, max(0, parting - len(habits.lead))}
        if habits.header and (found := whole.rfind(habits.header, 0, parting)) >= 0:
            starts.add(found + len(habits.header))
        shared, start = max((common_length(whole[:at][::-1], base[::-1]), at) for at in starts)
        if shared < max(len(habits.header), min(4, len(base))):
            raise Undecided(f"message {last + 1} does not continue its generation prompt")
        return start

    def _check_start(self, messages: list[Message], tools: Tools) -> None:
        """Raise Undecided where the last turn, as `_start` finds it, takes in an earlier message.

        Words that nobody writes stand for the contents, so an earlier message is told from one that says the same.
        """
        worded = [worded_message(message, number) for number, message in enumerate(messages)]
        chat = [message for message, _, _ in worded]
        try:
            whole = self._template.render(chat, tools)
            before = self._template.render(chat[:-1], tools, prompt=True)
        except Exception as error:  # a template may refuse contents that mean nothing
            raise Undecided(f"message {len(messages)} does not continue its generation prompt") from error
        rest = whole[self._start(chat, tools, whole, before) :] if not whole.startswith(before) else ""
        if any(word in rest for _, words, _ in worded[:-1] for word in words):
            raise Undecided(f"message {len(messages)} does not continue its generation prompt")

    def stop(self, text: str, begin: int, limit: int, tools: Tools) -> Span | None:
        """Return the first token that stops the teacher and begins in `begin..limit`; None without one."""
        end = self._template.habits(tools).end
        stops = self._stops | ({end} if end else set())
        places = [(at, -len(stop)) for stop in stops if 0 <= (at := text.find(stop, begin)) <= limit]
        if not places:
            return None
        at, negative_length = min(places)
        return at, at - negative_length

    def closing(self, messages: list[Message], tools: Tools, whole: str) -> str:
        """Return the token that stops the teacher after the last turn and that only a next message would write."""
        habits = self._template.habits(tools)
        roles = ("tool", "user") if messages[-1].get("tool_calls") else ("user",)
        for role in roles:
            try:
                longer = self._template.render([*messages, {"role": role, "content": habits.content("x")}], tools)
            except Exception:  # noqa: BLE001 - a template may refuse the order of roles
                continue
            added = longer[len(whole) :]
            stop = max((stop for stop in self._stops if added.startswith(stop)), key=len, default="")
            if stop and longer.startswith(whole):
                return stop
        # The template may strip the thinking of this turn once a message follows, so the probe has to tell.
        return habits.next_header if habits.next_header is not None and habits.next_header in self._stops else ""

    def plain_end(self, text: str, end: int) -> int:
        """Return `end` without white space that follows a special token: no model generates past that token."""
        stripped = text[:end].rstrip()
        return len(stripped) if stripped.endswith(tuple(self._template.special_tokens)) else end

    def marks_of(self, messages: list[Message], turn: int, tools: Tools, marks: list[Span]) -> list[Span]:
        """Return the marks of one turn: those that the chat up to it has more than the chat before it."""
        try:
            earlier = len(self._template.render_marked(messages[:turn], tools)[1])
            upto = len(self._template.render_marked(messages[: turn + 1], tools)[1])
        except Exception as error:  # a template may raise anything
            raise Undecided(f"it refuses the messages before message {turn + 1}") from error
        return marks[earlier:upto]


def narrowed(turn: Turn, end: int, marks: list[Span] | None) -> list[Span]:
    """Return the trained stretches of a turn up to `end`: what the template marks of it, and the token that stops."""
    if marks is None:
        return [(turn.begin, end)] if end > turn.begin else []
    inside = [(max(turn.begin, start), min(end, stop)) for start, stop in marks]
    inside = [span for span in inside if span[1] > span[0]]
    if inside and turn.stop is not None and inside[-1][1] < turn.stop[1]:
        inside.append(turn.stop)
    return inside


def _with_thought(content: str, before: str, rest: str, stripped: bool | None) -> str:
    """Return the finished turn `rest` with the thought of its content, where the template strips it even there.

    before: the text up to the turn; the part of the thought that the generation prompt opens is not repeated.
    stripped: None where that is not known.
    """
    if CLOSE_THINK not in content or closes_thought(before):
        return rest
    thought, _, answer = content.lstrip().rpartition(CLOSE_THINK)
    if stripped is None:
        stripped = squeezed(thought.replace(THINK, "")) not in squeezed(rest)
    if not stripped:
        return rest
    rest = rest.lstrip().removeprefix(CLOSE_THINK) if CLOSE_THINK in rest else rest
    if answer:
        rest = answer[: len(answer) - len(answer.lstrip())] + rest.lstrip()
    return _continued(thought, before) + CLOSE_THINK + rest


def _continued(thought: str, before: str) -> str:
    """Return a thought without the opening that the generation prompt has, white space behind the tag included."""
    if opens_thought(before) and thought.startswith(THINK):
        return thought.removeprefix(THINK).removeprefix(before[len(before.rstrip()) :])
    return thought


def _has_thought(message: Message) -> bool:
    return CLOSE_THINK in content_text(message.get("content")) or reasoning_of(message) is not None


def _unfinished(content: str, reasoning: str, before: str, rest: str) -> str:
    """Return the turn up to the end of its content, which was cut: what the template writes after it did not happen."""
    opened = content.lstrip().startswith(THINK) or opens_thought(before)
    if CLOSE_THINK not in content and opened and not reasoning:
        # A template takes a thought that was cut for an answer.
        return _continued(content.lstrip(), before)
    answer = content.rpartition(CLOSE_THINK)[2].strip()
    spoken = answer or ("" if CLOSE_THINK in content else reasoning.strip())
    at = rest.rfind(spoken) if spoken else -1
    if at >= 0:
        return rest[: at + len(spoken)]
    closed = rest.rfind(CLOSE_THINK)
    return rest[: closed + len(CLOSE_THINK)] if closed >= 0 else content
