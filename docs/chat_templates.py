"""The page docs/chat-templates.md: which chats each family of chat templates serves, found by rendering them.

The templates are those of tests/chat_families.py, written in each family's manner.
"""

from __future__ import annotations

from typing import Any

from stages.chat import ChatRenderer
from stages.corpus import TURNS
from stages.messages import read_chat
from storage.errors import UserError
from tests.chat_families import FAMILIES, MOMENT, Family, end_ids, make_tokenizer

_ASK = {"role": "user", "content": "What is 0 plus 0?"}
_ANSWER = {"role": "assistant", "content": "It is 0."}
_ONE = [_ASK, _ANSWER]
_TWO = [*_ONE, {"role": "user", "content": "And 1 plus 1?"}, {"role": "assistant", "content": "It is 2."}]
_SYSTEM = [{"role": "system", "content": "Be brief."}, *_ONE]
_THOUGHT = [_ASK, {"role": "assistant", "content": "<think>\nZero stays zero.\n</think>\n\nIt is 0."}]
_FIELD = [_ASK, {**_ANSWER, "reasoning_content": "Zero stays zero."}]
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
_CALLS = [
    {"role": "user", "content": "Weather in Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]

_INTRODUCTION = """\
# Chat templates

A chat is rendered with the teacher's chat template. The loss lies on the assistant's tokens alone: from the end of the
generation prompt to the first token that stops the teacher, that token included. End tokens are those of the teacher's
`generation_config.json` and the template's own end of turn. Look at the result before a long run: `cache-teacher`
prints the first sequence, and `pipeline inspect cache/ --sequence 12 --masks` prints any other.

`--turns` chooses the assistant turns that have a loss:

| `--turns` | sequences | when to choose it |
| --- | --- | --- |
| `all` | one per chat; every turn has a loss | the default; right wherever an earlier turn stays as it was generated |
| `each` | one per assistant turn, which ends with that turn | templates that strip earlier thinking, or rewrite turns |
| `last` | one per chat; the last turn has a loss | the same, when only the final answer matters |

A chat that a template cannot serve is refused, and the message names the row and a `--turns` that works. Nothing that a
chat says is dropped: a content, a tool call or a thought that is not in its rendered turn is refused by row.

## Families

The table is computed by `python docs/generate.py` from templates in each family's manner
(`tests/chat_families.py`). "two turns" and "tool call" list the values of `--turns` that work. The tool chat is a
question, a call, the tool's reply and an answer; its arguments are JSON text, as APIs return them. The thought stands
in the content (`<think>...</think>`) or in the field `reasoning_content`.

"""

_REST = """
A turn that ends in "nothing" has no token that stops the teacher. Such turns are counted and reported, because a
student of them does not learn to stop.

## Forms of messages

| form | reading |
| --- | --- |
| `messages`, `conversations` or `conversation`: a list, or its JSON text | one chat per row |
| `role` and `content`, or ShareGPT's `from` and `value` | the same |
| roles `human`, `prompter` in any case | `user` |
| roles `gpt`, `model`, `bot`, `chatbot`, `ai` | `assistant` |
| roles `function`, `observation`, `ipython`, `tool_response` | `tool`, or the template's own name |
| role `function_call` | an assistant message with that tool call |
| role `developer` | `system`, where the template does not render it |
| another role | refused by row and name |
| content as text parts | joined where the template wants text; text is wrapped where the template wants parts |
| images, audio and other parts | refused by row |
| `arguments` as JSON text | parsed where the template wants an object; left as text where it wants text |
| `reasoning_content`, `reasoning`, `thinking` | the field that the template reads, else before the answer |
| `weight`, `train`, `trainable`, `training`, `loss` of a message: 0 or false | the message has no loss |
| a conversational `prompt` and `completion` (lists of messages) | loss on the completion's assistant messages |
| tools without `"type": "function"` around them | wrapped, as APIs give them |
| columns `tools` (a list, or JSON text), `system` and `chat_template_kwargs` | given to the template |
| a null that Parquet adds to an object | removed; a null written in JSON stays |

Rows of `input_ids` may have `labels` (-100: no loss), `attention_mask` (padding is cut off), `completion_mask`,
`assistant_masks` or a `loss_mask` of one entry per scored position. Several masks hold together.

Texts, prompts and completions may be chats that were rendered before. They get no second beginning and no second end
of sequence. The loss of a completion ends with the first token that stops the teacher. A row whose `finish_reason` is
`length` (as `pipeline generate` writes) was cut, so its end has no loss.

## Options

- `--chat-template FILE` takes a Jinja file in place of the tokenizer's template. The cache keeps it with the tokenizer.
- `--template-arg enable_thinking=false` sets a variable of the template. A name that the template does not read is
  refused.
- `--template-time 2026-11-26` is the date that a template is told which writes one. The default is the day when the
  cache is begun. The manifest keeps it, so a cache can be resumed on another day.

## Thinking

Where a generation prompt opens `<think>` (R1 distillations, QwQ, Nemotron), a finished turn often shows no thought. The
last turn of a sequence is then the generation prompt, followed by the message's own thought, its answer and the end
token. The opening tag is not repeated. A message without a thought follows the prompt directly; such turns are counted
and reported.
"""

_MADE_UP = ("prints-arguments",)  # in no model's manner, for tests alone


def chat_templates_markdown() -> str:
    """Return the whole page."""
    head = (
        "family",
        "a turn ends in",
        "one turn",
        "system",
        "two turns",
        "tool call",
        "thought in content",
        "in a field",
    )
    rows = [head, ("---",) * len(head), *(_row(family) for family in FAMILIES.values() if family.name not in _MADE_UP)]
    # A bare | would end the cell, also within code.
    lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
    return _INTRODUCTION + "".join(f"| {line} |\n" for line in lines) + _REST


def _row(family: Family) -> tuple[str, ...]:
    def yes(chat: list[dict[str, Any]]) -> str:
        return "yes" if _spoken(family, chat, "all") else "no"

    def turns(chat: list[dict[str, Any]]) -> str:
        return ", ".join(each for each in TURNS if _spoken(family, chat, each)) or "no"

    spoken = _spoken(family, _ONE, "all")
    end = spoken[-1].partition("It is 0.")[2].strip() if spoken else ""
    return (
        f"`{family.name}`",
        f"`{end}`" if end else "nothing",
        yes(_ONE),
        yes(_SYSTEM),
        turns(_TWO),
        turns(_CALLS),
        yes(_THOUGHT),
        yes(_FIELD),
    )


def _spoken(family: Family, chat: list[dict[str, Any]], turns: str) -> list[str]:
    """Return the trained stretches of a chat; empty where it is refused."""
    tokenizer = make_tokenizer(family)
    renderer = ChatRenderer(
        tokenizer, turns=turns, end_ids=end_ids(family, tokenizer), arguments=family.args, moment=MOMENT
    )
    try:
        rendered = renderer.render(read_chat(chat, "the chat"), "the chat")
    except UserError:
        return []
    return [each.text[start:end] for each in rendered for start, end in each.spans]
