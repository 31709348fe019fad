"""Chats for the families of tests/chat_families.py, each with the trained text that is right.

Trained of a turn: from the end of the generation prompt to the first token that stops the teacher, that token with it.
"all": one sequence, possible only if each turn stands in it exactly as it was generated, after the same text.
"each": a sequence for each turn; "last": the last of them. Dates are those of `MOMENT`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A chat and what is right. `right`: the text of each sequence up to its last trained token, [[ and ]] around what
    is trained; None: the row must be refused. `also`: other results that are right, where a family leaves a choice.
    `may_refuse`: a refusal that says why is right, too. `warns`: no token stops the teacher, which must be said."""

    family: str
    chat: Messages
    right: tuple[str, ...] | None
    note: str
    turns: str = "all"
    tools: tuple[dict[str, Any], ...] = ()
    template_args: dict[str, Any] = field(default_factory=dict)
    also: tuple[tuple[str, ...], ...] = ()
    may_refuse: bool = False
    warns: bool = False

    def accepts(self, got: tuple[str, ...] | None) -> bool:
        """Tell whether `got` is right: the marked text of each sequence, or None for a refusal."""
        if got is None:
            return self.right is None or self.may_refuse
        return tuple(got) in (self.right, *self.also)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def call(arguments: Any, content: str | None = None, **fields: Any) -> dict[str, Any]:
    """An assistant's message that calls the tool `weather`."""
    function = {"name": "weather", "arguments": arguments}
    return assistant(content, tool_calls=[{"id": "abcdefghi", "type": "function", "function": function}], **fields)


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tell it.", "parameters": PARAMETERS}}
WEATHER_TEXT = (
    '{"type": "function", "function": {"name": "weather", "description": "Tell it.", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}'
)

Q, A = user("What is 0 plus 0?"), assistant("It is 0.")
Q2, A2 = user("And 1 plus 1?"), assistant("It is 2.")
ONE, TWO = [Q, A], [Q, A, Q2, A2]
BRIEF = system("Be brief.")
THOUGHT = "Zero stays zero."
IN_CONTENT = assistant("<think>\nZero stays zero.\n</think>\n\nIt is 0.")
AS_GENERATED = assistant("Zero stays zero.\n</think>\n\nIt is 0.")
IN_FIELD = assistant("It is 0.", reasoning_content=THOUGHT)
IN_FIELD_2 = assistant("It is 2.", reasoning_content="One more than one.")
IN_CONTENT_2 = assistant("<think>\nOne more than one.\n</think>\n\nIt is 2.")
ASK = user("Weather in Rome?")
ROME, ROME_TEXT = {"city": "Rome"}, '{"city": "Rome"}'
SUNNY = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "sunny"}
SAY = assistant("It is sunny.")
TOOL = [ASK, call(ROME), SUNNY, SAY]
PICTURE = user([{"type": "image"}, {"type": "text", "text": "What is 0 plus 0?"}])

# ChatML and Qwen
USER, USER_2 = "<|im_start|>user\nWhat is 0 plus 0?<|im_end|>\n", "<|im_start|>user\nAnd 1 plus 1?<|im_end|>\n"
USER_ASK = "<|im_start|>user\nWeather in Rome?<|im_end|>\n"
ASSISTANT = "<|im_start|>assistant\n"
QWEN = "<|im_start|>system\nYou are Qwen.<|im_end|>\n"
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
QWEN_REPLY = "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
QWEN_TOOLS = f"\n\n# Tools\n<tools>\n{WEATHER_TEXT}\n</tools><|im_end|>\n"
NO_THINK = "<think>\n\n</think>\n\n"
ZERO, ONE_MORE = "Zero stays zero.\n</think>\n\nIt is 0.", "One more than one.\n</think>\n\nIt is 2."

CHATML_CASES = [
    Case("chatml", ONE, (USER + ASSISTANT + "[[It is 0.<|im_end|>]]",), "a single turn"),
    Case("chatml", ONE, (USER + ASSISTANT + "[[It is 0.<|im_end|>]]",), "a single turn", turns="each"),
    Case("chatml", ONE, (USER + ASSISTANT + "[[It is 0.<|im_end|>]]",), "a single turn", turns="last"),
    Case(
        "chatml",
        TWO,
        (f"{USER}{ASSISTANT}[[It is 0.<|im_end|>]]\n{USER_2}{ASSISTANT}[[It is 2.<|im_end|>]]",),
        "two turns",
    ),
    Case(
        "chatml",
        TWO,
        (
            USER + ASSISTANT + "[[It is 0.<|im_end|>]]",
            f"{USER}{ASSISTANT}It is 0.<|im_end|>\n{USER_2}{ASSISTANT}[[It is 2.<|im_end|>]]",
        ),
        "two turns",
        turns="each",
    ),
    Case(
        "chatml",
        TWO,
        (f"{USER}{ASSISTANT}It is 0.<|im_end|>\n{USER_2}{ASSISTANT}[[It is 2.<|im_end|>]]",),
        "two turns",
        turns="last",
    ),
    Case(
        "chatml",
        [BRIEF, *ONE],
        (f"<|im_start|>system\nBe brief.<|im_end|>\n{USER}{ASSISTANT}[[It is 0.<|im_end|>]]",),
        "a system prompt",
    ),
    Case(
        "chatml",
        [assistant("Hello."), *ONE],
        (f"{ASSISTANT}[[Hello.<|im_end|>]]\n{USER}{ASSISTANT}[[It is 0.<|im_end|>]]",),
        "opened by the assistant",
    ),
    Case(
        "chatml",
        [*ONE, assistant("Surely.")],
        (f"{USER}{ASSISTANT}[[It is 0.<|im_end|>]]\n{ASSISTANT}[[Surely.<|im_end|>]]",),
        "two turns of the assistant in a row",
    ),
    Case("chatml", [*ONE, Q2], (USER + ASSISTANT + "[[It is 0.<|im_end|>]]",), "the user speaks last"),
    Case(
        "chatml",
        [*ONE, Q2],
        (USER + ASSISTANT + "[[It is 0.<|im_end|>]]",),
        "the user speaks last",
        turns="last",
    ),
    Case(
        "chatml",
        [user(parts("What is ", "0 plus 0?")), assistant(parts("It is 0."))],
        (USER + ASSISTANT + "[[It is 0.<|im_end|>]]",),
        "parts where the template joins a string with +",
    ),
    Case(
        "chatml",
        [Q, assistant("  It is 0.\n\n")],
        (USER + ASSISTANT + "[[  It is 0.\n\n<|im_end|>]]",),
        "spaces and line breaks around the content stay where the template keeps them",
    ),
    Case(
        "chatml",
        [user("Grüße aus 東京?"), assistant("Schön, 世界 🌍!")],
        (f"<|im_start|>user\nGrüße aus 東京?<|im_end|>\n{ASSISTANT}[[Schön, 世界 🌍!<|im_end|>]]",),
        "unicode",
    ),
    Case(
        "chatml",
        [Q, IN_CONTENT],
        (f"{USER}{ASSISTANT}[[<think>\nZero stays zero.\n</think>\n\nIt is 0.<|im_end|>]]",),
        "thinking in the content, plain text to this template",
    ),
    Case("chatml", [Q, IN_FIELD], None, "the template does not know the field of the thinking"),
    Case("chatml", [ASK, call(ROME, "")], None, "the template does not know tool calls: an empty turn, ended"),
    Case("chatml", TOOL, None, "content null and a tool call that the template does not know"),
    Case("chatml", [PICTURE, A], None, "an image cannot be scored as text"),
    Case("chatml-base", ONE, (USER + ASSISTANT + "[[It is 0.<|im_end|>]]",), "the template's own end of turn"),
    Case(
        "chatml-base",
        TWO,
        (f"{USER}{ASSISTANT}[[It is 0.<|im_end|>]]\n{USER_2}{ASSISTANT}[[It is 2.<|im_end|>]]",),
        "the template's own end of turn",
    ),
]

QWEN25_CASES = [
    Case("qwen2.5", ONE, (QWEN + USER + ASSISTANT + "[[It is 0.<|im_end|>]]",), "the template's own system prompt"),
    Case(
        "qwen2.5",
        [user(parts("What is 0 plus 0?")), assistant(parts("It is ", "0."))],
        (QWEN + USER + ASSISTANT + "[[It is 0.<|im_end|>]]",),
        "parts",
    ),
    *(
        Case(
            "qwen2.5",
            [ASK, call(arguments, content)],
            (f"{QWEN}{USER_ASK}{ASSISTANT}[[{QWEN_CALL}<|im_end|>]]",),
            f"a tool call, its arguments a {type(arguments).__name__}, its content {content!r}",
        )
        for arguments in (ROME, ROME_TEXT)
        for content in (None, "")
    ),
    Case(
        "qwen2.5",
        [ASK, call('{"city":"Z\\u00fcrich"}')],
        (f"{QWEN}{USER_ASK}{ASSISTANT}[[{QWEN_CALL.replace('Rome', 'Zürich')}<|im_end|>]]",),
        "arguments as another JSON text of the same object",
    ),
    Case(
        "qwen2.5",
        [ASK, call(ROME, "Let me look.")],
        (f"{QWEN}{USER_ASK}{ASSISTANT}[[Let me look.\n{QWEN_CALL}<|im_end|>]]",),
        "content and a tool call",
    ),
    Case(
        "qwen2.5",
        [ASK, call(ROME_TEXT), SUNNY, SAY],
        (
            f"<|im_start|>system\nYou are Qwen.{QWEN_TOOLS}{USER_ASK}{ASSISTANT}[[{QWEN_CALL}<|im_end|>]]\n"
            f"{QWEN_REPLY}{ASSISTANT}[[It is sunny.<|im_end|>]]",
        ),
        "tools, a tool's reply, an answer",
        tools=(WEATHER,),
    ),
    Case(
        "qwen2.5",
        [ASK, call(ROME), {**SUNNY, "content": parts("sunny")}, SAY],
        (f"{QWEN}{USER_ASK}{ASSISTANT}[[{QWEN_CALL}<|im_end|>]]\n{QWEN_REPLY}{ASSISTANT}[[It is sunny.<|im_end|>]]",),
        "a tool's reply as parts",
    ),
    Case(
        "qwen2.5",
        [assistant("Hello."), *ONE],
        (f"{QWEN}{ASSISTANT}[[Hello.<|im_end|>]]\n{USER}{ASSISTANT}[[It is 0.<|im_end|>]]",),
        "opened by the assistant; the template cannot render an empty chat",
        may_refuse=True,
    ),
]

QWEN3_CASES = [
    *(
        Case(
            "qwen3",
            [Q, message],
            (f"{USER}{ASSISTANT}[[<think>\n{ZERO}<|im_end|>]]",),
            f"thinking in the {where}",
            turns=turns,
        )
        for where, message in (("content", IN_CONTENT), ("field", IN_FIELD))
        for turns in ("all", "each", "last")
    ),
    Case("qwen3", ONE, (f"{USER}{ASSISTANT}[[{NO_THINK}It is 0.<|im_end|>]]",), "no thinking: an empty block"),
    Case(
        "qwen3",
        [user(parts("What is 0 plus 0?")), assistant(parts("It is 0."))],
        (f"{USER}{ASSISTANT}[[{NO_THINK}It is 0.<|im_end|>]]",),
        "parts where the template drops a content that is no string",
    ),
    Case(
        "qwen3",
        ONE,
        (f"{USER}{ASSISTANT}{NO_THINK}[[It is 0.<|im_end|>]]",),
        "the generation prompt has the empty block",
        template_args={"enable_thinking": False},
    ),
    Case(
        "qwen3",
        [Q, IN_FIELD],
        None,
        "thinking after a generation prompt that has closed the thinking",
        template_args={"enable_thinking": False},
    ),
    Case("qwen3", TWO, None, "the first turn's empty block is not in the whole"),
    Case(
        "qwen3",
        TWO,
        None,
        "the first turn's generation prompt is not in the whole",
        template_args={"enable_thinking": False},
    ),
    Case("qwen3", [Q, IN_FIELD, Q2, IN_FIELD_2], None, "the first turn's thinking is not in the whole"),
    Case(
        "qwen3",
        [Q, IN_FIELD, Q2, IN_CONTENT_2],
        (
            f"{USER}{ASSISTANT}[[<think>\n{ZERO}<|im_end|>]]",
            f"{USER}{ASSISTANT}It is 0.<|im_end|>\n{USER_2}{ASSISTANT}[[<think>\n{ONE_MORE}<|im_end|>]]",
        ),
        "each turn with its thinking, the earlier one's dropped as when it was generated",
        turns="each",
    ),
    Case(
        "qwen3",
        TWO,
        (
            f"{USER}{ASSISTANT}{NO_THINK}[[It is 0.<|im_end|>]]",
            f"{USER}{ASSISTANT}It is 0.<|im_end|>\n{USER_2}{ASSISTANT}{NO_THINK}[[It is 2.<|im_end|>]]",
        ),
        "each turn without thinking",
        turns="each",
        template_args={"enable_thinking": False},
    ),
    Case(
        "qwen3",
        [ASK, call(ROME_TEXT, reasoning_content="Look."), SUNNY, assistant("It is sunny.", reasoning_content="Good.")],
        (
            f"{USER_ASK}{ASSISTANT}[[<think>\nLook.\n</think>\n\n{QWEN_CALL}<|im_end|>]]\n"
            f"{QWEN_REPLY}{ASSISTANT}[[<think>\nGood.\n</think>\n\nIt is sunny.<|im_end|>]]",
        ),
        "thinking since the last query is kept, so both turns stand as generated",
    ),
    Case("qwen3", TOOL, None, "the call's empty think block is not in the whole"),
    Case(
        "qwen3",
        TOOL,
        (
            f"<|im_start|>system\n{QWEN_TOOLS}{USER_ASK}{ASSISTANT}[[{NO_THINK}{QWEN_CALL}<|im_end|>]]",
            f"<|im_start|>system\n{QWEN_TOOLS}{USER_ASK}{ASSISTANT}{QWEN_CALL}<|im_end|>\n"
            f"{QWEN_REPLY}{ASSISTANT}[[{NO_THINK}It is sunny.<|im_end|>]]",
        ),
        "tools, content null, each turn",
        turns="each",
        tools=(WEATHER,),
    ),
]

OPEN = ASSISTANT + "<think>\n"
THINKING_CASES = [
    *(
        Case("qwen3-thinking", [Q, message], (f"{USER}{OPEN}[[{ZERO}<|im_end|>]]",), note)
        for message, note in (
            (IN_FIELD, "thinking in the field; the generation prompt opens it"),
            (IN_CONTENT, "thinking in the content"),
            (AS_GENERATED, "thinking in the content without its opening, as the teacher generates it"),
        )
    ),
    Case(
        "qwen3-thinking",
        ONE,
        (f"{USER}{OPEN}[[\n</think>\n\nIt is 0.<|im_end|>]]",),
        "no thinking: the rest of the empty block. The prompt ends between two line breaks, often one token",
        # The ids are those of the whole text, in which the two line breaks are one token that reaches into the turn.
        also=((f"{USER}{OPEN.rstrip()}[[\n\n</think>\n\nIt is 0.<|im_end|>]]",),),
    ),
    Case("qwen3-thinking", [Q, IN_FIELD, Q2, IN_FIELD_2], None, "the first turn's thinking is not in the whole"),
    Case(
        "qwen3-thinking",
        [Q, IN_FIELD, Q2, IN_FIELD_2],
        (
            f"{USER}{OPEN}[[{ZERO}<|im_end|>]]",
            f"{USER}{ASSISTANT}It is 0.<|im_end|>\n{USER_2}{OPEN}[[{ONE_MORE}<|im_end|>]]",
        ),
        "each turn",
        turns="each",
    ),
    *(
        Case("qwq", [Q, message], (f"{USER}{OPEN}[[{ZERO}<|im_end|>]]",), note, turns=turns)
        for message, note in (
            (IN_CONTENT, "thinking in the content, which the template drops from the last turn, too"),
            (AS_GENERATED, "thinking in the content without its opening, as the teacher generates it"),
        )
        for turns in ("all", "last")
    ),
    Case(
        "qwq",
        [Q, IN_FIELD],
        (f"{USER}{OPEN}[[{ZERO}<|im_end|>]]",),
        "thinking in a field that the template does not know",
        may_refuse=True,
    ),
    Case(
        "qwq",
        [Q, assistant("<think>Zero stays zero.</think>It is 0.")],
        (f"{USER}{OPEN}[[Zero stays zero.</think>It is 0.<|im_end|>]]",),
        "thinking in the content without line breaks: the one that opens it is the prompt's",
        may_refuse=True,
    ),
    Case("qwq", ONE, (f"{USER}{OPEN}[[It is 0.<|im_end|>]]",), "no thinking: the answer right after the prompt"),
    Case("qwq", [Q, IN_CONTENT, Q2, IN_CONTENT_2], None, "the first turn's thinking is not in the whole"),
    Case("qwq", TWO, None, "the first turn's generation prompt is not in the whole"),
    Case(
        "qwq",
        [Q, IN_CONTENT, Q2, IN_CONTENT_2],
        (
            f"{USER}{OPEN}[[{ZERO}<|im_end|>]]",
            f"{USER}{ASSISTANT}It is 0.<|im_end|>\n{USER_2}{OPEN}[[{ONE_MORE}<|im_end|>]]",
        ),
        "each turn",
        turns="each",
    ),
    *(
        Case(
            "qwq",
            [ASK, call(ROME_TEXT, content)],
            (f"{USER_ASK}{OPEN}[[{QWEN_CALL}<|im_end|>]]",),
            f"a tool call with content {content!r}",
            may_refuse=content is None,
        )
        for content in ("", None)
    ),
]

# DeepSeek
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
DEEP, DEEP_2 = f"{BOS}<｜User｜>What is 0 plus 0?<｜Assistant｜>", "<｜User｜>And 1 plus 1?<｜Assistant｜>"
DEEP_ASK = f"{BOS}<｜User｜>Weather in Rome?<｜Assistant｜>"
DEEP_CALL = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Rome"}\n```'
    f"<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
)
DEEP_REPLY = "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
V31_CALL = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜>'
    f"<｜tool▁calls▁end｜>{EOS}"
)

DEEPSEEK_CASES = [
    *(
        Case("r1-distill", [Q, IN_CONTENT], (f"{DEEP}<think>\n[[{ZERO}{EOS}]]",), "thinking in content", turns=turns)
        for turns in ("all", "each", "last")
    ),
    Case("r1-distill", [Q, AS_GENERATED], (f"{DEEP}<think>\n[[{ZERO}{EOS}]]",), "thinking without its opening"),
    Case("r1-distill", [Q, IN_FIELD], (f"{DEEP}<think>\n[[{ZERO}{EOS}]]",), "an unknown field", may_refuse=True),
    Case("r1-distill", ONE, (f"{DEEP}<think>\n[[It is 0.{EOS}]]",), "no thinking"),
    Case(
        "r1-distill",
        [BRIEF, Q, IN_CONTENT],
        (f"{BOS}Be brief.<｜User｜>What is 0 plus 0?<｜Assistant｜><think>\n[[{ZERO}{EOS}]]",),
        "a system prompt",
    ),
    Case("r1-distill", [Q, IN_CONTENT, Q2, IN_CONTENT_2], None, "the first turn's thinking is not in the whole"),
    Case(
        "r1-distill",
        [Q, IN_CONTENT, Q2, IN_CONTENT_2],
        (f"{DEEP}<think>\n[[{ZERO}{EOS}]]", f"{DEEP}It is 0.{EOS}{DEEP_2}<think>\n[[{ONE_MORE}{EOS}]]"),
        "each turn",
        turns="each",
    ),
    *(
        Case(
            "r1-distill",
            [ASK, call(arguments), SUNNY, SAY],
            (
                f"{DEEP_ASK}<think>\n[[{DEEP_CALL}]]",
                f"{DEEP_ASK}{DEEP_CALL}{DEEP_REPLY}[[It is sunny.{EOS}]]",
            ),
            f"a tool call, its arguments a {type(arguments).__name__}; the answer has no header",
            turns="each",
        )
        for arguments in (ROME, ROME_TEXT)
    ),
    Case("deepseek-v3", TWO, (f"{DEEP}[[It is 0.{EOS}]]{DEEP_2}[[It is 2.{EOS}]]",), "two turns"),
    *(
        Case(
            "deepseek-v3",
            [ASK, call(arguments), SUNNY, SAY],
            (f"{DEEP_ASK}[[{DEEP_CALL}]]{DEEP_REPLY}[[It is sunny.{EOS}]]",),
            f"a tool call, its arguments a {type(arguments).__name__}: the template wants text",
        )
        for arguments in (ROME, ROME_TEXT)
    ),
    Case(
        "deepseek-v3",
        [ASK, call('{"city":"Rome"}')],
        (f"{DEEP_ASK}[[{DEEP_CALL.replace(': ', ':')}]]",),
        "arguments as text stay as they are where the template wants text",
        also=((f"{DEEP_ASK}[[{DEEP_CALL}]]",),),
    ),
    Case(
        "deepseek-v3",
        [ASK, call(ROME, "")],
        (f"{DEEP_ASK}[[{DEEP_CALL}]]",),
        "an empty content beside a call: the template shows calls only where the content is null",
        may_refuse=True,
    ),
    Case("deepseek-v3", [ASK, call(ROME, "Let me look.")], None, "a call beside content, which the template drops"),
    Case("deepseek-v3.1", ONE, (f"{DEEP}</think>[[It is 0.{EOS}]]",), "the generation prompt closes the thinking"),
    Case(
        "deepseek-v3.1",
        TWO,
        (f"{DEEP}</think>[[It is 0.{EOS}]]{DEEP_2}</think>[[It is 2.{EOS}]]",),
        "two turns; the whole has the generation prompt of each",
    ),
    Case(
        "deepseek-v3.1",
        [Q, assistant("<think>Zero stays zero.</think>It is 0.")],
        (f"{DEEP}<think>[[Zero stays zero.</think>It is 0.{EOS}]]",),
        "thinking",
        template_args={"thinking": True},
    ),
    Case(
        "deepseek-v3.1",
        ONE,
        (f"{DEEP}<think>[[</think>It is 0.{EOS}]]",),
        "no thinking: the rest of the whole after the shared beginning",
        template_args={"thinking": True},
        also=((f"{DEEP}<think>[[It is 0.{EOS}]]",),),
        may_refuse=True,
    ),
    Case(
        "deepseek-v3.1",
        [Q, assistant("<think>Zero stays zero.</think>It is 0.")],
        None,
        "thinking after a generation prompt that has closed the thinking",
    ),
    Case(
        "deepseek-v3.1",
        TOOL,
        (f"{DEEP_ASK}</think>[[{V31_CALL}]]<｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜>[[It is sunny.{EOS}]]",),
        "a tool call, its arguments an object where the template wants text; the answer has no header",
    ),
    Case(
        "prints-arguments",
        [ASK, call(ROME)],
        (f'{USER_ASK}{ASSISTANT}[[<tool>weather:{{"city": "Rome"}}</tool><|im_end|>]]',),
        "an object would show as a Python dict",
    ),
    Case(
        "prints-arguments",
        [ASK, call(ROME_TEXT)],
        (f'{USER_ASK}{ASSISTANT}[[<tool>weather:{{"city": "Rome"}}</tool><|im_end|>]]',),
        "arguments as text where the template prints them",
    ),
]

# Llama, Mistral, Gemma
LLAMA_USER = "<|start_header_id|>user<|end_header_id|>\n\nWhat is 0 plus 0?<|eot_id|>"
LLAMA_ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 04 Jul 2025\n\n<|eot_id|>"
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>'
DATE = {"date_string": "04 Jul 2025"}
VISION = f"<|begin_of_text|>{LLAMA_USER}{LLAMA_ASSISTANT}[[It is 0.<|eot_id|>]]"
MISTRAL_CALL = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}, "id": "abcdefghi"}]</s>'
MISTRAL_REPLY = '[TOOL_RESULTS] {"content": sunny, "call_id": "abcdefghi"}[/TOOL_RESULTS]'
SMALL = "<s>[SYSTEM_PROMPT]You are Mistral Small 3. Today is 2025-07-04.[/SYSTEM_PROMPT]"
GEMMA = "<start_of_turn>user\nWhat is 0 plus 0?<end_of_turn>\n<start_of_turn>model\n"
GEMMA_BRIEF = GEMMA.replace("What", "Be brief.\n\nWhat")
GEMMA_2 = "<start_of_turn>user\nAnd 1 plus 1?<end_of_turn>\n<start_of_turn>model\n"

LLAMA_CASES = [
    Case("llama2", ONE, ("<s>[INST] What is 0 plus 0? [/INST][[ It is 0. </s>]]",), "no generation prompt"),
    Case(
        "llama2",
        [BRIEF, *TWO],
        (
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 0 plus 0? [/INST][[ It is 0. </s>]]"
            "<s>[INST] And 1 plus 1? [/INST][[ It is 2. </s>]]",
        ),
        "a system prompt in the first message of the user",
    ),
    Case(
        "llama2",
        [Q, assistant("\n It is 0.\n")],
        ("<s>[INST] What is 0 plus 0? [/INST][[ It is 0. </s>]]",),
        "the template strips the content",
    ),
    Case("llama2", [assistant("Hello."), *ONE], None, "the template refuses a chat opened by the assistant"),
    Case("llama2", [Q, A, A2], None, "the template refuses two turns in a row"),
    Case(
        "llama3.1",
        TWO,
        (
            f"{LLAMA}{LLAMA_USER}{LLAMA_ASSISTANT}[[It is 0.<|eot_id|>]]<|start_header_id|>user<|end_header_id|>\n\n"
            f"And 1 plus 1?<|eot_id|>{LLAMA_ASSISTANT}[[It is 2.<|eot_id|>]]",
        ),
        "today's date, which is MOMENT's",
    ),
    Case(
        "llama3.1",
        [BRIEF, *ONE],
        (
            f"{LLAMA.replace('2025', '2024').replace('<|eot_id|>', 'Be brief.<|eot_id|>')}{LLAMA_USER}"
            f"{LLAMA_ASSISTANT}[[It is 0.<|eot_id|>]]",
        ),
        "a date that was given",
        template_args={"date_string": "04 Jul 2024"},
    ),
    Case(
        "llama3.1",
        [user(parts("What is 0 plus 0?")), assistant(parts("It is 0."))],
        (f"{LLAMA}{LLAMA_USER}{LLAMA_ASSISTANT}[[It is 0.<|eot_id|>]]",),
        "parts, which `trim` prints as a Python list",
        template_args=DATE,
    ),
    *(
        Case(
            "llama3.1",
            [ASK, call(arguments), SUNNY, SAY],
            (
                "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
                "Today Date: 04 Jul 2025\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nYou have functions."
                f"\n\n{WEATHER_TEXT}\n\nWeather in Rome?<|eot_id|>{LLAMA_ASSISTANT}[[{LLAMA_CALL}]]"
                f'<|start_header_id|>ipython<|end_header_id|>\n\n"sunny"<|eot_id|>{LLAMA_ASSISTANT}'
                "[[It is sunny.<|eot_id|>]]",
            ),
            f"a tool call, its arguments a {type(arguments).__name__}; the reply is written as JSON",
            tools=(WEATHER,),
            template_args=DATE,
        )
        for arguments in (ROME, ROME_TEXT)
    ),
    Case("llama3.1", [ASK, call(ROME, "Let me look.")], None, "content beside a call vanishes", template_args=DATE),
    Case(
        "llama3.1",
        [ASK, assistant(None, tool_calls=call(ROME)["tool_calls"] * 2)],
        None,
        "the template refuses two calls",
        template_args=DATE,
    ),
    Case("llama3.2-vision", ONE, (VISION,), "strings"),
    Case("llama3.2-vision", [user(parts("What is 0 plus 0?")), assistant(parts("It is ", "0."))], (VISION,), "parts"),
    Case("llama3.2-vision", [PICTURE, A], None, "an image cannot be scored as text"),
]

MISTRAL_CASES = [
    Case(
        "mistral-v0.3",
        TWO,
        ("<s>[INST] What is 0 plus 0?[/INST][[ It is 0.</s>]][INST] And 1 plus 1?[/INST][[ It is 2.</s>]]",),
        "no generation prompt; a space before the answer",
    ),
    *(
        Case(
            "mistral-v0.3",
            [BRIEF, *ONE],
            ("<s>[INST] Be brief.\n\nWhat is 0 plus 0?[/INST][[ It is 0.</s>]]",),
            "the system prompt is in the prompt, not in the whole",
            turns=turns,
        )
        for turns in ("all", "each", "last")
    ),
    Case("mistral-v0.3", [BRIEF, *TWO], None, "the first turn's system prompt is not in the whole"),
    Case(
        "mistral-v0.3",
        [BRIEF, *TWO],
        (
            "<s>[INST] Be brief.\n\nWhat is 0 plus 0?[/INST][[ It is 0.</s>]]",
            "<s>[INST] What is 0 plus 0?[/INST] It is 0.</s>[INST] Be brief.\n\nAnd 1 plus 1?[/INST][[ It is 2.</s>]]",
        ),
        "each turn with the system prompt before its question",
        turns="each",
    ),
    *(
        Case(
            "mistral-v0.3",
            [ASK, call(arguments), SUNNY, SAY],
            (
                f"<s>[AVAILABLE_TOOLS] [{WEATHER_TEXT}][/AVAILABLE_TOOLS][INST] Weather in Rome?[/INST]"
                f"[[{MISTRAL_CALL}]]{MISTRAL_REPLY}[[ It is sunny.</s>]]",
            ),
            f"a tool call, its arguments a {type(arguments).__name__}",
            tools=(WEATHER,),
        )
        for arguments in (ROME, ROME_TEXT)
    ),
    Case(
        "mistral-v0.3",
        [ASK, assistant(None, tool_calls=[{**call(ROME)["tool_calls"][0], "id": "1"}])],
        None,
        "the template refuses the id",
    ),
    Case("mistral-v0.3", [ASK, call(ROME, "Let me look.")], None, "content beside a call vanishes"),
    Case(
        "mistral-small-3",
        ONE,
        (SMALL + "[INST]What is 0 plus 0?[/INST][[It is 0.</s>]]",),
        "today's date in the template's own system prompt",
    ),
    Case(
        "mistral-small-3",
        [BRIEF, *TWO],
        (
            "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]What is 0 plus 0?[/INST][[It is 0.</s>]]"
            "[INST]And 1 plus 1?[/INST][[It is 2.</s>]]",
        ),
        "a system prompt",
    ),
    Case("mistral-small-3", [ASK, call(ROME, "")], None, "the template does not know tool calls"),
    Case("mistral-small-3", TOOL, None, "the template does not know tool calls, and refuses a tool's reply"),
    Case("gemma2", TWO, (f"<bos>{GEMMA}[[It is 0.<end_of_turn>]]\n{GEMMA_2}[[It is 2.<end_of_turn>]]",), "two turns"),
    Case("gemma2", [BRIEF, *ONE], None, "the template refuses a system prompt"),
    Case("gemma2", [assistant("Hello."), *ONE], None, "the template refuses a chat opened by the assistant"),
    Case(
        "gemma2",
        [user(parts("What is 0 plus 0?")), assistant("  It is 0.\n")],
        (f"<bos>{GEMMA}[[It is 0.<end_of_turn>]]",),
        "parts, which `trim` prints as a Python list; the template strips the content",
    ),
    Case(
        "gemma3",
        [BRIEF, *TWO],
        (f"<bos>{GEMMA_BRIEF}[[It is 0.<end_of_turn>]]\n{GEMMA_2}[[It is 2.<end_of_turn>]]",),
        "the system prompt stands in the user's first message",
    ),
    Case(
        "gemma3",
        [system(parts("Be brief.")), user(parts("What is 0 plus 0?")), assistant(parts("It is 0."))],
        (f"<bos>{GEMMA_BRIEF}[[It is 0.<end_of_turn>]]",),
        "parts",
    ),
    Case("gemma3", [ASK, call(ROME, "")], None, "the template does not know tool calls: an empty turn, ended"),
    Case("gemma3", [ASK, call(ROME, "Let me look.")], None, "the template does not know tool calls"),
]

# Turns that end otherwise
PHI3 = "<|user|>\nWhat is 0 plus 0?<|end|>\n<|assistant|>\n"
GLM = "[gMASK]<sop><|user|>\nWhat is 0 plus 0?<|assistant|>"
GLM_ASK = "[gMASK]<sop><|user|>\nWeather in Rome?<|assistant|>"
GLM45_CALL = "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"
APERTUS = (
    "<s><|system_start|>You are Apertus.<|system_end|><|developer_start|>Deliberation: disabled<|developer_end|>"
    "<|user_start|>What is 0 plus 0?<|user_end|><|assistant_start|>"
)
HARMONY = "<|start|>system<|message|>You are ChatGPT.\nCurrent date: 2025-07-04<|end|>"
HARMONY_Q = HARMONY + "<|start|>user<|message|>What is 0 plus 0?<|end|><|start|>assistant"
HARMONY_Q2 = "<|start|>user<|message|>And 1 plus 1?<|end|><|start|>assistant"
HARMONY_ASK = HARMONY + "<|start|>user<|message|>Weather in Rome?<|end|><|start|>assistant"
ANALYSIS = f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
TO_WEATHER = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
FROM_WEATHER = '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"sunny"<|end|><|start|>assistant'

END_CASES = [
    *(
        Case("phi3", ONE, (PHI3 + "[[It is 0.<|end|>]]",), "the end of text after the chat is no turn's", turns=turns)
        for turns in ("all", "each", "last")
    ),
    Case(
        "phi3",
        [BRIEF, *TWO],
        (
            f"<|system|>\nBe brief.<|end|>\n{PHI3}[[It is 0.<|end|>]]\n"
            "<|user|>\nAnd 1 plus 1?<|end|>\n<|assistant|>\n[[It is 2.<|end|>]]",
        ),
        "two turns; the end of text after the chat is no turn's",
    ),
    Case(
        "phi3",
        [assistant("Hello."), *ONE],
        (f"<|assistant|>\n[[Hello.<|end|>]]\n{PHI3}[[It is 0.<|end|>]]",),
        "opened by the assistant",
    ),
    Case(
        "glm4",
        [assistant("Hello."), *ONE],
        ("[gMASK]<sop><|assistant|>[[\nHello.<|user|>]]\nWhat is 0 plus 0?<|assistant|>[[\nIt is 0.<|user|>]]",),
        "opened by the assistant",
    ),
    Case("phi3", [ASK, A, SUNNY, SAY], None, "the template drops a tool's reply, which the answer rests on"),
    Case(
        "phi4",
        TWO,
        (
            "<|im_start|>user<|im_sep|>What is 0 plus 0?<|im_end|><|im_start|>assistant<|im_sep|>[[It is 0.<|im_end|>]]"
            "<|im_start|>user<|im_sep|>And 1 plus 1?<|im_end|><|im_start|>assistant<|im_sep|>[[It is 2.<|im_end|>]]",
        ),
        "no line breaks",
    ),
    Case("phi4", [ASK, call(ROME, "")], None, "the template does not know tool calls: an empty turn, ended"),
    *(
        Case("glm4", ONE, (GLM + "[[\nIt is 0.<|user|>]]",), "the stop token is added to the last turn", turns=turns)
        for turns in ("all", "each", "last")
    ),
    Case(
        "glm4",
        TWO,
        (f"{GLM}[[\nIt is 0.<|user|>]]\nAnd 1 plus 1?<|assistant|>[[\nIt is 2.<|user|>]]",),
        "the next header's token stops the turn",
    ),
    *(
        Case(
            "glm4",
            [ASK, call(arguments)],
            (GLM_ASK + '[[weather\n{"city": "Rome"}<|observation|>]]',),
            f"a call, its arguments a {type(arguments).__name__}; the token that opens the reply is added",
        )
        for arguments in (ROME, ROME_TEXT)
    ),
    Case(
        "glm4",
        TOOL,
        (f'{GLM_ASK}[[weather\n{{"city": "Rome"}}<|observation|>]]\nsunny<|assistant|>[[\nIt is sunny.<|user|>]]',),
        "a call, a reply, an answer",
    ),
    Case(
        "glm4.5",
        TWO,
        (
            f"{GLM}[[\n<think></think>\nIt is 0.<|user|>]]\nAnd 1 plus 1?<|assistant|>"
            "[[\n<think></think>\nIt is 2.<|user|>]]",
        ),
        "every turn has its think block",
    ),
    *(
        Case(
            "glm4.5",
            [Q, message],
            (GLM + "[[\n<think>Zero stays zero.</think>\nIt is 0.<|user|>]]",),
            f"thinking in the {where}",
        )
        for where, message in (("content", IN_CONTENT), ("field", IN_FIELD))
    ),
    Case(
        "glm4.5",
        ONE,
        (GLM.replace("0?", "0?/nothink") + "\n<think></think>[[\nIt is 0.<|user|>]]",),
        "the generation prompt has the empty block",
        template_args={"enable_thinking": False},
    ),
    Case("glm4.5", [Q, IN_FIELD, *TWO[2:]], None, "the first turn's thinking is not in the whole"),
    *(
        Case(
            "glm4.5",
            [ASK, call(arguments)],
            (f"{GLM_ASK}[[\n<think></think>{GLM45_CALL}<|observation|>]]",),
            f"a call, its arguments a {type(arguments).__name__}, content null: no `None`",
        )
        for arguments in (ROME, ROME_TEXT)
    ),
    Case(
        "glm4.5",
        TOOL,
        (
            f"{GLM_ASK}[[\n<think></think>{GLM45_CALL}<|observation|>]]\n<tool_response>\nsunny\n</tool_response>"
            "<|assistant|>[[\n<think></think>\nIt is sunny.<|user|>]]",
        ),
        "a call, a reply, an answer",
    ),
    Case("glm4.5", [ASK, call("Rome")], None, "arguments that are no JSON object"),
    *(
        Case("apertus", ONE, (APERTUS + "[[It is 0.<|assistant_end|>]]",), "the end is added", turns=turns)
        for turns in ("all", "each", "last")
    ),
    Case(
        "apertus",
        TWO,
        (
            f"{APERTUS}[[It is 0.<|assistant_end|>]]<|user_start|>And 1 plus 1?<|user_end|><|assistant_start|>"
            "[[It is 2.<|assistant_end|>]]",
        ),
        "the end stands before the user's next message",
    ),
    Case(
        "apertus",
        [ASK, call(ROME_TEXT), SUNNY, SAY],
        (
            APERTUS.replace("What is 0 plus 0?", "Weather in Rome?")
            + '[[<|tools_prefix|>[{"weather": {"city": "Rome"}}]<|tools_suffix|>]][sunny]'
            "[[It is sunny.<|assistant_end|>]]",
        ),
        "a call stops at its suffix; the reply stands within the assistant's turn and has no loss",
    ),
    *(
        Case("harmony", ONE, (f"{HARMONY_Q}[[{FINAL}It is 0.<|return|>]]",), "no thinking", turns=turns)
        for turns in ("all", "last")
    ),
    Case(
        "harmony",
        [Q, assistant("It is 0.", thinking=THOUGHT)],
        (f"{HARMONY_Q}[[{ANALYSIS}{FINAL}It is 0.<|return|>]]",),
        "<|end|> after the analysis does not stop the teacher",
    ),
    Case(
        "harmony",
        [Q, IN_FIELD],
        (f"{HARMONY_Q}[[{ANALYSIS}{FINAL}It is 0.<|return|>]]",),
        "the thinking in a field of another name",
        may_refuse=True,
    ),
    Case("harmony", TWO, None, "the first turn ended with <|return|>, the history has <|end|>"),
    Case(
        "harmony",
        [Q, assistant("It is 0.", thinking=THOUGHT), Q2, A2],
        (
            f"{HARMONY_Q}[[{ANALYSIS}{FINAL}It is 0.<|return|>]]",
            f"{HARMONY_Q}{FINAL}It is 0.<|end|>{HARMONY_Q2}[[{FINAL}It is 2.<|return|>]]",
        ),
        "each turn",
        turns="each",
    ),
    *(
        Case(
            "harmony",
            [ASK, call(arguments), SUNNY, SAY],
            (f"{HARMONY_ASK}[[{TO_WEATHER}]]{FROM_WEATHER}[[{FINAL}It is sunny.<|return|>]]",),
            f"a call, its arguments a {type(arguments).__name__}, a reply, an answer",
        )
        for arguments in (ROME, ROME_TEXT)
    ),
    Case(
        "harmony",
        [ASK, call(ROME, thinking="Look."), SUNNY, SAY],
        None,
        "the call's thinking is not in the whole, but the last generation prompt shows it",
        also=(
            (
                f"{HARMONY_ASK}[[<|channel|>analysis<|message|>Look.<|end|><|start|>assistant{TO_WEATHER}]]"
                f"{FROM_WEATHER}[[{FINAL}It is sunny.<|return|>]]",
            ),
        ),
    ),
    Case(
        "harmony",
        [ASK, assistant(None, tool_calls=call(ROME)["tool_calls"] * 2)],
        None,
        "the template drops the second call",
    ),
]

# The others
HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
HERMES_REPLY = "<|im_start|>tool\n<tool_response>\nsunny\n</tool_response><|im_end|>"
HERMES_SAID = (
    f"<|begin_of_text|>{USER_ASK}{ASSISTANT}{HERMES_CALL}\n{HERMES_REPLY}{ASSISTANT}[[It is sunny.<|im_end|>]]"
)
NANO = "<SPECIAL_10>System\n\n<SPECIAL_11>User\nWhat is 0 plus 0?\n<SPECIAL_11>Assistant\n"
NANO_2 = "<SPECIAL_11>User\nAnd 1 plus 1?\n<SPECIAL_11>Assistant\n"
SMOL = "<|im_start|>system\nToday Date: 04 July 2025\nReasoning Mode: /think\n\nYou are SmolLM.<|im_end|>\n"
SMOL_NO = SMOL.replace("/think", "/no_think")
GRANITE = "<|start_of_role|>system<|end_of_role|>Today is July 04, 2025. You are Granite.<|end_of_text|>\n"
GRANITE_Q = "<|start_of_role|>user<|end_of_role|>What is 0 plus 0?<|end_of_text|>\n"
GRANITE_A = "<|start_of_role|>assistant<|end_of_role|>"
COMMAND = "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>What is 0 plus 0?<|END_OF_TURN_TOKEN|>"
CHATBOT = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"

OTHER_CASES = [
    Case(
        "hermes3",
        [ASK, call(ROME_TEXT), SUNNY, SAY],
        (HERMES_SAID.replace(HERMES_CALL, f"[[{HERMES_CALL}]]"),),
        "the reply is closed as in the last turn's prompt; the call before it stands as generated",
        may_refuse=True,
    ),
    *(
        Case("hermes3", TOOL, right, "the reply is closed as in the prompt", turns=turns)
        for turns, right in (
            ("last", (HERMES_SAID,)),
            ("each", (f"<|begin_of_text|>{USER_ASK}{ASSISTANT}[[{HERMES_CALL}]]", HERMES_SAID)),
        )
    ),
    Case("hermes3", [*TOOL, Q2, A2], None, "the prompt of the answer is closed otherwise in the whole"),
    Case("hermes3", [ASK, call(ROME, "Let me look.")], None, "content beside a call vanishes"),
    *(
        Case("nemotron-nano", [Q, message], (f"{NANO}<think>\n[[{ZERO}\n<SPECIAL_12>]]",), note)
        for message, note in ((IN_CONTENT, "thinking in the content"), (AS_GENERATED, "thinking without its opening"))
    ),
    Case("nemotron-nano", ONE, (f"{NANO}<think>\n[[It is 0.\n<SPECIAL_12>]]",), "no thinking"),
    Case(
        "nemotron-nano",
        [system("/no_think"), *ONE],
        (f"{NANO}<think></think>[[It is 0.\n<SPECIAL_12>]]",),
        "the generation prompt has an empty block, the whole has none",
    ),
    Case("nemotron-nano", [Q, IN_CONTENT, Q2, IN_CONTENT_2], None, "the first turn's thinking is not in the whole"),
    Case(
        "nemotron-nano",
        [Q, IN_CONTENT, Q2, IN_CONTENT_2],
        (
            f"{NANO}<think>\n[[{ZERO}\n<SPECIAL_12>]]",
            f"{NANO}It is 0.\n<SPECIAL_12>\n{NANO_2}<think>\n[[{ONE_MORE}\n<SPECIAL_12>]]",
        ),
        "each turn",
        turns="each",
    ),
    Case(
        "smollm3",
        TWO,
        (f"{SMOL}{USER}{ASSISTANT}[[It is 0.<|im_end|>]]\n{USER_2}{ASSISTANT}[[It is 2.<|im_end|>]]",),
        "the marks hold header and line break, which the teacher does not generate",
    ),
    Case(
        "smollm3",
        [user(parts("What is 0 plus 0?")), assistant(parts("It is 0."))],
        (f"{SMOL_NO}{USER}{ASSISTANT}<think>\n\n</think>\n[[It is 0.<|im_end|>]]",),
        "parts, which the template drops; the generation prompt has the empty block",
        template_args={"enable_thinking": False},
    ),
    Case(
        "smollm3",
        [Q, IN_CONTENT],
        (f"{SMOL}{USER}{ASSISTANT}[[<think>\n{ZERO}<|im_end|>]]",),
        "thinking in the content, shown as it is",
    ),
    Case("smollm3", [ASK, call(ROME, "")], None, "the template does not know tool calls: an empty turn, ended"),
    Case("granite", ONE, (f"{GRANITE}{GRANITE_Q}{GRANITE_A}[[It is 0.<|end_of_text|>]]",), "today's date"),
    Case(
        "granite",
        [BRIEF, Q, A, Q2, A2],
        (
            f"<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n{GRANITE_Q}{GRANITE_A}"
            "[[It is 0.<|end_of_text|>]]\n<|start_of_role|>user<|end_of_role|>And 1 plus 1?<|end_of_text|>\n"
            f"{GRANITE_A}[[It is 2.<|end_of_text|>]]",
        ),
        "two turns",
    ),
    Case(
        "command-r",
        [BRIEF, *TWO],
        (
            f"<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>{COMMAND}{CHATBOT}"
            "[[It is 0.<|END_OF_TURN_TOKEN|>]]<|START_OF_TURN_TOKEN|><|USER_TOKEN|>And 1 plus 1?<|END_OF_TURN_TOKEN|>"
            f"{CHATBOT}[[It is 2.<|END_OF_TURN_TOKEN|>]]",
        ),
        "two turns",
    ),
    Case(
        "olmo2",
        TWO,
        (
            "<|endoftext|><|user|>\nWhat is 0 plus 0?\n<|assistant|>\n[[It is 0.<|endoftext|>]]\n"
            "<|user|>\nAnd 1 plus 1?\n<|assistant|>\n[[It is 2.<|endoftext|>]]",
        ),
        "the token that begins the text ends a turn; the last turn has no line break",
    ),
    Case(
        "zephyr",
        [BRIEF, *TWO],
        (
            "<|system|>\nBe brief.</s>\n<|user|>\nWhat is 0 plus 0?</s>\n<|assistant|>\n[[It is 0.</s>]]\n"
            "<|user|>\nAnd 1 plus 1?</s>\n<|assistant|>\n[[It is 2.</s>]]",
        ),
        "the tokenizer's beginning of text is not in the template",
    ),
    Case(
        "zephyr",
        [assistant("Hello."), *ONE],
        ("<|assistant|>\n[[Hello.</s>]]\n<|user|>\nWhat is 0 plus 0?</s>\n<|assistant|>\n[[It is 0.</s>]]",),
        "opened by the assistant; the generation prompt of an empty chat is empty",
        may_refuse=True,
    ),
    Case(
        "llava",
        ONE,
        ("USER: What is 0 plus 0? ASSISTANT:[[ It is 0. ]]",),
        "strings where the template takes only parts; nothing stops the teacher",
        also=(("USER: What is 0 plus 0? ASSISTANT:[[ It is 0.]]",),),
        warns=True,
    ),
    *(
        Case(
            "smolvlm",
            chat,
            (
                "<|im_start|>User: What is 0 plus 0?<end_of_utterance>\nAssistant:[[ It is 0.<end_of_utterance>]]\n"
                "User: And 1 plus 1?<end_of_utterance>\nAssistant:[[ It is 2.<end_of_utterance>]]",
            ),
            note,
        )
        for chat, note in (
            (TWO, "strings where the template takes only parts"),
            ([{**message, "content": parts(message["content"])} for message in TWO], "parts"),
            ([user(parts("What is 0 plus 0?")), A, user("And 1 plus 1?"), assistant(parts("It is 2."))], "both"),
        )
    ),
    Case("smolvlm", [PICTURE, A], None, "an image cannot be scored as text"),
    Case(
        "plain",
        TWO,
        ("user: What is 0 plus 0?\nassistant:[[ It is 0.\n]]user: And 1 plus 1?\nassistant:[[ It is 2.\n]]",),
        "no token stops the teacher: the line break is the template's own end of turn",
        also=(("user: What is 0 plus 0?\nassistant:[[ It is 0.]]\nuser: And 1 plus 1?\nassistant:[[ It is 2.]]",),),
        warns=True,
    ),
]

CASES = [
    *CHATML_CASES,
    *QWEN25_CASES,
    *QWEN3_CASES,
    *THINKING_CASES,
    *DEEPSEEK_CASES,
    *LLAMA_CASES,
    *MISTRAL_CASES,
    *END_CASES,
    *OTHER_CASES,
]
