"""Chat templates in the manner of the common model families, with what each tokenizer and generation_config says.

The templates are the tests' own. They behave as the families' templates do in headers, generation prompt, end of turn,
thinking, tools and system prompt, and are shorter. tests/chat_cases.py has chats with the trained text that is right.
A template that writes today's date is right at `MOMENT`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

MOMENT = datetime(2025, 7, 4, 12, 0)


@dataclass(frozen=True)
class Family:
    """A template and its tokens. `special`: added tokens; `ends`: generation_config's end tokens; `bos`: what the
    tokenizer puts before a text, None if nothing; `args`: template variables that every chat of the family gets."""

    name: str
    template: str
    special: tuple[str, ...]
    eos: str
    ends: tuple[str, ...]
    bos: str | None = None
    args: dict[str, Any] = field(default_factory=dict)


def _joined(lines: str) -> str:
    """Return a template without the line breaks and the indentation that it was written with."""
    return "".join(line.strip() for line in lines.splitlines())


@lru_cache
def _bare_tokenizer() -> str:
    """Return a byte-level BPE tokenizer without special tokens, as JSON text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from tests.conftest import texts

    tokenizer = Tokenizer(models.BPE())
    # Line breaks stay together and apart from the word that follows, as in the families' own tokenizers.
    words = Regex(r"\s*[\r\n]+| ?[\p{L}\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+")
    split = pre_tokenizers.Split(words, "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text[:1500] for text in texts()[:40]], trainer)
    return tokenizer.to_str()


def make_tokenizer(family: Family) -> Any:
    """Return the family's tokenizer: a PreTrainedTokenizerFast that puts `bos` before a text and has the template."""
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(_bare_tokenizer())
    bos = [family.bos] if family.bos else []
    tokens = dict.fromkeys([family.eos, *bos, *family.ends, *family.special])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if family.bos:
        first = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A $B", special_tokens=[first]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=family.eos, bos_token=family.bos, pad_token=family.eos
    )
    fast.chat_template = family.template
    return fast


def end_ids(family: Family, tokenizer: Any) -> list[int]:
    """Return the ids of generation_config's end tokens."""
    return [tokenizer.convert_tokens_to_ids(token) for token in family.ends]


def marked(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> str:
    """Return the text of `ids` up to the last trained token, with [[ and ]] around each trained stretch.

    `trained[i]` says whether token i has a loss. A text after the last trained token has no effect on training, so
    it is cut, as in `Case.right`. Runs are decoded as a whole: a character may take several tokens.
    """
    runs: list[tuple[bool, list[int]]] = []
    for token, on in zip(ids, trained, strict=True):
        if not runs or runs[-1][0] != bool(on):
            runs.append((bool(on), []))
        runs[-1][1].append(token)
    while runs and not runs[-1][0]:
        runs.pop()
    decoded = [(on, tokenizer.decode(run, clean_up_tokenization_spaces=False)) for on, run in runs]
    return "".join(f"[[{text}]]" if on else text for on, text in decoded)


def split_marks(text: str) -> list[tuple[bool, str]]:
    """Return the stretches of a marked text in order: (trained, text)."""
    parts = re.split(r"\[\[(.*?)\]\](?!\])", text, flags=re.DOTALL)
    return [(bool(index % 2), part) for index, part in enumerate(parts) if part]


CHATML = _joined(r"""
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""")

# Qwen's way to tell of tools and to write calls and replies; shared by Qwen2.5, Qwen3 and QwQ.
QWEN_TOOLS = r"""{{ '\n\n# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}
{{ '\n</tools>' }}"""
QWEN_REPLY = r"""
{% if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{ '\n<tool_response>\n' + TEXT + '\n</tool_response>' }}
{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"""
QWEN_CALL = r"""
{% set call = call.function or call %}
{{ '<tool_call>\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}\n</tool_call>' }}"""

QWEN25 = _joined(
    r"""
{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
{% else %}{% set system = 'You are Qwen.' %}{% endif %}
{{ '<|im_start|>system\n' + system }}{% if tools %}"""
    + QWEN_TOOLS
    + r"""{% endif %}{{ '<|im_end|>\n' }}
{% for m in messages %}
{% if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and not m.tool_calls) %}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{% elif m.role == 'assistant' %}
{{ '<|im_start|>assistant' }}{% if m.content %}{{ '\n' + m.content }}{% endif %}
{% for call in m.tool_calls %}{{ '\n' }}"""
    + QWEN_CALL
    + r"""{% endfor %}{{ '<|im_end|>\n' }}
{% elif m.role == 'tool' %}"""
    + QWEN_REPLY.replace("TEXT", "m.content")
    + r"""{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
)

# Thinking is kept in the turns after the last query; the last turn always has a think block. PROMPT: what follows the
# header of the generation prompt.
_QWEN3 = (
    r"""
{% if tools or (messages and messages[0].role == 'system') %}
{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{% if tools %}"""
    + QWEN_TOOLS
    + r"""{% endif %}{{ '<|im_end|>\n' }}{% endif %}
{% set at = namespace(query=messages | length - 1, looking=true) %}
{% for m in messages[::-1] %}
{% if at.looking and m.role == 'user' and m.content is string and not m.content.startswith('<tool_response>') %}
{% set at.looking = false %}{% set at.query = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{% set text = m.content if m.content is string else '' %}
{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}
{% elif m.role == 'assistant' %}
{% set thought = '' %}
{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{% elif '</think>' in text %}
{% set thought = text.split('</think>')[0].split('<think>')[-1] %}{% set text = text.split('</think>')[-1] %}
{% set text = text.lstrip('\n') %}
{% endif %}
{{ '<|im_start|>assistant\n' }}
{% if loop.index0 > at.query and (loop.last or thought) %}
{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}
{% else %}{{ text }}{% endif %}
{% for call in m.tool_calls or [] %}{% if text or not loop.first %}{{ '\n' }}{% endif %}"""
    + QWEN_CALL.replace(
        "(call.arguments | tojson)", "(call.arguments if call.arguments is string else call.arguments | tojson)"
    )
    + r"""{% endfor %}{{ '<|im_end|>\n' }}
{% elif m.role == 'tool' %}"""
    + QWEN_REPLY.replace("TEXT", "text")
    + r"""{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}PROMPT{% endif %}"""
)
QWEN3 = _joined(
    _QWEN3.replace(
        "PROMPT",
        r"{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    )
)
QWEN3_THINKING = _joined(_QWEN3.replace("PROMPT", r"{{ '<think>\n' }}"))

# No turn keeps its thinking, the last neither; the generation prompt opens a think block. Needs a text as content.
QWQ = _joined(
    r"""
{% if tools or messages[0]['role'] == 'system' %}
{{ '<|im_start|>system\n' }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}
{% if tools %}"""
    + QWEN_TOOLS
    + r"""{% endif %}{{ '<|im_end|>\n' }}{% endif %}
{% for m in messages %}
{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{% elif m.role == 'assistant' %}
{% set text = m.content.split('</think>')[-1].lstrip('\n') %}
{{ '<|im_start|>assistant' }}{% if text or not m.tool_calls %}{{ '\n' + text }}{% endif %}
{% for call in m.tool_calls or [] %}{{ '\n' }}"""
    + QWEN_CALL
    + r"""{% endfor %}{{ '<|im_end|>\n' }}
{% elif m.role == 'tool' %}"""
    + QWEN_REPLY.replace("TEXT", "m.content")
    + r"""{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""
)

# Arguments are text that is joined with `+`. After a tool's reply the answer follows without a header. PROMPT: what the
# generation prompt opens; ANSWER: what a turn with a header shows of a message.
_DEEPSEEK = r"""
{{ bos_token }}{% set at = namespace(reply=false, first=true) %}
{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}
{% for m in messages %}
{% if m.role == 'user' %}{% set at.reply = false %}{{ '<｜User｜>' + m.content }}
{% elif m.role == 'assistant' and m.content is none %}
{% set at.reply = false %}{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
{% for call in m.tool_calls %}{% if not loop.first %}{{ '\n' }}{% endif %}
{{ '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\n```json\n'
+ call.function.arguments + '\n```<｜tool▁call▁end｜>' }}{% endfor %}
{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
{% elif m.role == 'assistant' %}
{% if at.reply %}{{ '<｜tool▁outputs▁end｜>' + m.content }}{% set at.reply = false %}
{% else %}{{ '<｜Assistant｜>' + ANSWER }}{% endif %}{{ '<｜end▁of▁sentence｜>' }}
{% elif m.role == 'tool' %}
{{ '\n' if at.reply else '<｜tool▁outputs▁begin｜>' }}{% set at.reply = true %}
{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{% endif %}{% endfor %}
{% if at.reply %}{{ '<｜tool▁outputs▁end｜>' }}
{% elif add_generation_prompt %}{{ '<｜Assistant｜>PROMPT' }}{% endif %}"""
R1_DISTILL = _joined(
    _DEEPSEEK.replace("PROMPT", r"<think>\n").replace("ANSWER", "m.content.split('</think>')[-1].lstrip('\\n')")
)
DEEPSEEK_V3 = _joined(_DEEPSEEK.replace("PROMPT", "").replace("ANSWER", "m.content"))

DEEPSEEK_V31 = _joined(r"""
{% set thinking = thinking if thinking is defined else false %}
{{ bos_token }}{% set at = namespace(user=false, reply=false) %}
{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}
{% for m in messages %}
{% if m.role == 'user' %}{% set at.user = true %}{% set at.reply = false %}{{ '<｜User｜>' + m.content }}
{% elif m.role == 'assistant' %}
{% if at.user %}{{ '<｜Assistant｜></think>' }}{% endif %}
{% set at.user = false %}{% set at.reply = false %}
{{ (m.content or '').split('</think>', 1)[-1] }}
{% if m.tool_calls %}{{ '<｜tool▁calls▁begin｜>' }}{% for call in m.tool_calls %}
{{ '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments
+ '<｜tool▁call▁end｜>' }}{% endfor %}{{ '<｜tool▁calls▁end｜>' }}{% endif %}
{{ '<｜end▁of▁sentence｜>' }}
{% elif m.role == 'tool' %}{% set at.reply = true %}
{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{% endif %}{% endfor %}
{% if add_generation_prompt and at.user and not at.reply %}
{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}""")

# Prints the arguments as they come: an object would show as a Python dict.
PRINTS_ARGUMENTS = _joined(r"""
{% for m in messages %}
{{ '<|im_start|>' + m.role + '\n' }}{{ m.content or '' }}
{% for call in m.tool_calls or [] %}
<tool>{{ call.function.name }}:{{ call.function.arguments }}</tool>
{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""")

LLAMA2 = _joined(r"""
{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{% else %}{% set system = none %}{% set rest = messages %}{% endif %}
{% for m in rest %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}{% endif %}
{% if m.role == 'user' %}
{% set start = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '' %}
{{ bos_token + '[INST] ' + (start + m.content).strip() + ' [/INST]' }}
{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}
{% endif %}{% endfor %}""")

LLAMA31 = _joined(r"""
{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{{ bos_token }}
{% if messages and messages[0].role == 'system' %}
{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{% else %}{% set system = '' %}{% endif %}
{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{% if tools %}{{ 'Environment: ipython\n' }}{% endif %}
{{ 'Today Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}
{% if tools %}
{{ '<|start_header_id|>user<|end_header_id|>\n\nYou have functions.\n\n' }}
{% for tool in tools %}{{ (tool | tojson) + '\n\n' }}{% endfor %}
{{ (messages[0].content | trim) + '<|eot_id|>' }}{% set messages = messages[1:] %}{% endif %}
{% for m in messages %}
{% if m.tool_calls %}
{% if m.tool_calls | length != 1 %}{{ raise_exception('This model makes one tool call at a time.') }}{% endif %}
{% set call = m.tool_calls[0].function %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{ (call.arguments | tojson) + '}<|eot_id|>' }}
{% elif m.role == 'tool' or m.role == 'ipython' %}
{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
{% if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}
{% else %}{{ m.content }}{% endif %}{{ '<|eot_id|>' }}
{% else %}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}
{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""")

LLAMA32_VISION = _joined(r"""
{{ bos_token }}
{% for m in messages %}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{% if m.content is string %}{{ m.content }}
{% else %}{% for part in m.content %}
{% if part.type == 'image' %}<|image|>{% elif part.type == 'text' %}{{ part.text }}{% endif %}
{% endfor %}{% endif %}{{ '<|eot_id|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""")

# The system prompt and the tools are written into the last user message, the system prompt only where no turn follows.
MISTRAL_V03 = _joined(r"""
{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{% else %}{% set rest = messages %}{% endif %}
{% set asked = rest | selectattr('role', 'equalto', 'user') | list %}
{% set at = namespace(turn=0) %}
{% for m in rest %}{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
{% if (m.role == 'user') != (at.turn % 2 == 0) %}
{{ raise_exception('After the system prompt, user and assistant must alternate.') }}{% endif %}
{% set at.turn = at.turn + 1 %}{% endif %}{% endfor %}
{{ bos_token }}
{% for m in rest %}
{% if m.role == 'user' %}
{% if tools and m == asked[-1] %}
{{ '[AVAILABLE_TOOLS] [' }}{% for tool in tools %}{{ tool | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}
{{ '][/AVAILABLE_TOOLS]' }}{% endif %}
{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}
{% elif m.tool_calls %}
{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}
{% if not call.id is defined or call.id | length != 9 %}
{{ raise_exception('Tool call ids have nine characters.') }}{% endif %}
{{ (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{% if not loop.last %}{{ ', ' }}{% endif %}
{% endfor %}{{ ']' + eos_token }}
{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
{% elif m.role == 'tool' %}
{{ '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{% endif %}{% endfor %}""")

MISTRAL_SMALL_3 = _joined(r"""
{{ bos_token }}
{% if messages and messages[0].role == 'system' %}
{{ '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}{% set messages = messages[1:] %}
{% else %}
{{ '[SYSTEM_PROMPT]You are Mistral Small 3. Today is ' + strftime_now('%Y-%m-%d') + '.[/SYSTEM_PROMPT]' }}{% endif %}
{% for m in messages %}
{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}
{% elif m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}
{% elif m.role == 'assistant' %}{{ m.content + eos_token }}
{% else %}{{ raise_exception('Only user, system and assistant have a place here.') }}{% endif %}{% endfor %}""")

GEMMA2 = _joined(r"""
{{ bos_token }}
{% if messages and messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate.') }}{% endif %}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim
+ '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""")

GEMMA3 = _joined(r"""
{{ bos_token }}{% set start = '' %}
{% if messages and messages[0].role == 'system' %}
{% set start = (messages[0].content if messages[0].content is string else messages[0].content[0].text) + '\n\n' %}
{% set messages = messages[1:] %}{% endif %}
{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate.') }}{% endif %}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (start if loop.first else '') }}
{% if m.content is string %}{{ m.content | trim }}
{% elif m.content is iterable %}{% for part in m.content %}
{% if part.type == 'image' %}<start_of_image>{% elif part.type == 'text' %}{{ part.text | trim }}{% endif %}
{% endfor %}
{% else %}{{ raise_exception('Invalid content type') }}{% endif %}
{{ '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""")

PHI3 = _joined(r"""
{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}
{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""")

PHI4 = _joined(r"""
{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}
{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}""")

# A turn ends where the next role's token stands. The model writes the line break after its own role's token.
GLM4 = _joined(r"""
{{ '[gMASK]<sop>' }}
{% if tools %}{{ '<|system|>\n# Tools' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{% endif %}
{% for m in messages %}
{% if m.role == 'assistant' and m.tool_calls %}{% for call in m.tool_calls %}
{{ '<|assistant|>' + call.function.name + '\n' + (call.function.arguments | tojson) }}{% endfor %}
{% elif m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}
{% else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""")

# `seen` prints a content of null as "None".
GLM45 = _joined(r"""
{{ '[gMASK]<sop>' }}
{% macro seen(content) %}{% if content is string %}{{ content }}
{% elif content is iterable %}{% for part in content %}{{ part.text if part is mapping else part }}{% endfor %}
{% else %}{{ content }}{% endif %}{% endmacro %}
{% if tools %}{{ '<|system|>\n# Tools' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{% endif %}
{% set at = namespace(user=-1) %}
{% for m in messages %}{% if m.role == 'user' %}{% set at.user = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{% if m.role == 'user' %}
{{ '<|user|>\n' + seen(m.content) }}
{% if enable_thinking is defined and not enable_thinking %}{{ '/nothink' }}{% endif %}
{% elif m.role == 'assistant' %}
{% set thought = '' %}{% set text = seen(m.content) %}
{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{% elif '</think>' in text %}
{% set thought = text.split('</think>')[0].split('<think>')[-1] %}{% set text = text.split('</think>')[-1] %}{% endif %}
{{ '<|assistant|>\n<think>' + (thought.strip() if loop.index0 > at.user else '') + '</think>' }}
{% if text.strip() %}{{ '\n' + text.strip() }}{% endif %}
{% for call in m.tool_calls or [] %}{% set call = call.function or call %}
{{ '\n<tool_call>' + call.name + '\n' }}
{% for key, value in call.arguments.items() %}
{{ '<arg_key>' + key + '</arg_key>\n<arg_value>' }}{{ value if value is string else value | tojson }}
{{ '</arg_value>\n' }}{% endfor %}{{ '</tool_call>' }}{% endfor %}
{% elif m.role == 'tool' %}
{% if loop.first or loop.previtem.role != 'tool' %}{{ '<|observation|>' }}{% endif %}
{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{% elif m.role == 'system' %}{{ '<|system|>\n' + seen(m.content) }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}
{% if enable_thinking is defined and not enable_thinking %}{{ '\n<think></think>' }}{% endif %}{% endif %}""")

# The end of the assistant's turn is written when the user's next message comes; a tool's reply stands in the turn.
APERTUS = _joined(r"""
{{ bos_token }}
{% if messages and messages[0].role == 'system' %}{% set system = messages[0].content %}
{% else %}{% set system = 'You are Apertus.' %}{% endif %}
{{ '<|system_start|>' + system + '<|system_end|><|developer_start|>Deliberation: disabled<|developer_end|>' }}
{% set at = namespace(open=false) %}
{% for m in messages %}
{% if m.role == 'user' %}
{% if at.open %}{{ '<|assistant_end|>' }}{% set at.open = false %}{% endif %}
{{ '<|user_start|>' + m.content + '<|user_end|>' }}
{% elif m.role == 'assistant' %}
{% if not at.open %}{{ '<|assistant_start|>' }}{% set at.open = true %}{% endif %}
{{ m.content or '' }}
{% if m.tool_calls %}{{ '<|tools_prefix|>[' }}{% for call in m.tool_calls %}
{{ '{"' + call.function.name + '": ' + (call.function.arguments | tojson) + '}' }}
{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']<|tools_suffix|>' }}{% endif %}
{% elif m.role == 'tool' %}{{ '[' + m.content + ']' }}
{% endif %}{% endfor %}
{% if add_generation_prompt and not at.open %}{{ '<|assistant_start|>' }}{% endif %}""")

# <|end|> ends a message within a turn and in the history; <|return|> and <|call|> stop the model.
HARMONY = _joined(r"""
{{ '<|start|>system<|message|>You are ChatGPT.\nCurrent date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{% if messages and messages[0].role in ['system', 'developer'] %}
{{ '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '<|end|>' }}
{% set messages = messages[1:] %}{% endif %}
{% set at = namespace(tool='', final=-1) %}
{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}
{% set at.final = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
{% elif m.role == 'tool' %}
{{ '<|start|>functions.' + at.tool + ' to=assistant<|channel|>commentary<|message|>' + (m.content | tojson) }}
{{ '<|end|>' }}
{% elif m.tool_calls %}
{% if m.content and m.thinking %}{{ raise_exception('Content and thinking beside a tool call.') }}{% endif %}
{% set thought = m.content or m.thinking %}
{% if thought and loop.index0 > at.final %}
{{ '<|start|>assistant<|channel|>analysis<|message|>' + thought + '<|end|>' }}{% endif %}
{% set call = m.tool_calls[0].function %}{% set at.tool = call.name %}
{{ '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{ (call.arguments | tojson) + '<|call|>' }}
{% elif m.role == 'assistant' %}
{% if loop.last and m.thinking and not add_generation_prompt %}
{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}""")

# A tool's reply is closed with one line break more when a message follows. Content beside a call is not shown.
HERMES3 = _joined(r"""
{{ bos_token }}
{% if tools %}{{ '<|im_start|>system\nYou call functions. <tools>' }}
{% for tool in tools %} {{ tool | tojson }}{% endfor %}{{ ' </tools><|im_end|>\n' }}{% endif %}
{% for m in messages %}
{% if m.role != 'tool' and not m.tool_calls %}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{% elif m.role == 'assistant' %}
{{ '<|im_start|>assistant' }}{% for call in m.tool_calls %}
{{ '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{% else %}
{% if not loop.previtem or loop.previtem.role != 'tool' %}{{ '<|im_start|>tool\n' }}{% endif %}
{{ '<tool_response>\n' + m.content + '\n</tool_response>' }}{% if not loop.last %}{{ '\n' }}{% endif %}
{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>' }}{% endif %}
{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""")

# A line break stands before the end token. The system prompt says whether to think.
NEMOTRON_NANO = _joined(r"""
{% set at = namespace(thinking=true) %}
{% if messages and messages[0].role == 'system' %}{% set system = messages[0].content %}
{% if '/no_think' in system %}{% set at.thinking = false %}{% endif %}
{{ '<SPECIAL_10>System\n' + system.replace('/no_think', '').replace('/think', '').strip() + '\n' }}
{% set messages = messages[1:] %}{% else %}{{ '<SPECIAL_10>System\n\n' }}{% endif %}
{% for m in messages %}
{% if m.role == 'user' %}{{ '<SPECIAL_11>User\n' + m.content.strip() + '\n' }}
{% elif m.role == 'assistant' %}
{{ '<SPECIAL_11>Assistant\n' + m.content.split('</think>')[-1].strip() + '\n<SPECIAL_12>\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}
{{ '<SPECIAL_11>Assistant\n' + ('<think>\n' if at.thinking else '<think></think>') }}{% endif %}""")

# The marks hold the header and the line break after the end token, too.
SMOLLM3 = _joined(r"""
{% set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}
{% set system = 'You are SmolLM.' %}
{% if messages and messages[0].role == 'system' %}
{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{{ '<|im_start|>system\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' + mode + '\n\n' }}
{{ system + '<|im_end|>\n' }}
{% for m in messages %}
{% set text = m.content if m.content is string else '' %}
{% if m.role == 'assistant' %}{% generation %}
{{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if mode == '/no_think' else '') + text.lstrip('\n') }}
{{ '<|im_end|>\n' }}{% endgeneration %}
{% else %}{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' + text + '<|im_end|>\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if mode == '/no_think' else '') }}{% endif %}""")

GRANITE = _joined(r"""
{% if messages and messages[0].role == 'system' %}
{% set system = messages[0].content %}{% set messages = messages[1:] %}
{% else %}{% set system = 'Today is ' + strftime_now('%B %d, %Y') + '. You are Granite.' %}{% endif %}
{{ '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}
{% for m in messages %}
{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}
{% if loop.last and add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}
{% endfor %}""")

COMMAND_R = _joined(r"""
{{ bos_token }}
{% if messages and messages[0].role == 'system' %}
{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0].content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{% set messages = messages[1:] %}{% endif %}
{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate.') }}{% endif %}
{{ '<|START_OF_TURN_TOKEN|>' + ('<|USER_TOKEN|>' if m.role == 'user' else '<|CHATBOT_TOKEN|>') }}
{{ m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}""")

# The token that begins a text also ends a turn; the role headers are plain text.
OLMO2 = _joined(r"""
{{ bos_token }}
{% for m in messages %}
{% if m.role == 'assistant' %}
{{ '<|assistant|>\n' + m.content + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}
{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}""")

ZEPHYR = _joined(r"""
{% for m in messages %}
{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}""")

# Content is a list of parts: a string would be read letter by letter, and nothing of it shown.
LLAVA = _joined(r"""
{% for m in messages %}
{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' if m.role == 'assistant' else '' }}
{% for part in m.content %}{% if part.type == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}
{% for part in m.content %}{% if part.type == 'text' %}{{ part.text + ' ' }}{% endif %}{% endfor %}
{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""")

SMOLVLM = _joined(r"""
{{ '<|im_start|>' }}
{% for m in messages %}
{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}
{% for part in m.content %}
{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}<image>{% endif %}{% endfor %}
{{ '<end_of_utterance>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}""")

PLAIN = _joined(r"""
{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}""")

_IM = ("<|im_start|>", "<|im_end|>")
_QWEN = ("<|im_start|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_THINK = ("<think>", "</think>")
_TOOLS = tuple(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"))
_TOOLS += tuple(f"<｜tool▁{name}｜>" for name in ("outputs▁begin", "outputs▁end", "output▁begin", "output▁end"))
_DEEP = ("<｜User｜>", "<｜Assistant｜>", *_TOOLS)
_LLAMA = ("<|start_header_id|>", "<|end_header_id|>")
_INST = ("[INST]", "[/INST]")
_GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_GLM_ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")
_QWEN_ENDS = ("<|im_end|>", "<|endoftext|>")
_LLAMA_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
_DEEP_BOS, _DEEP_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_APERTUS = ("<|system_start|>", "<|system_end|>", "<|developer_start|>", "<|developer_end|>", "<|user_start|>")
_APERTUS += ("<|user_end|>", "<|assistant_start|>", "<|tools_prefix|>")
_HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>")

FAMILIES = {
    family.name: family
    for family in (
        Family("chatml", CHATML, _IM, "<|im_end|>", ("<|im_end|>",)),
        # A base model with a template: no end token of generation_config stands in the chat.
        Family("chatml-base", CHATML, _IM, "<|endoftext|>", ("<|endoftext|>",)),
        Family("qwen2.5", QWEN25, _QWEN, "<|im_end|>", _QWEN_ENDS),
        Family("qwen3", QWEN3, _QWEN + _THINK, "<|im_end|>", _QWEN_ENDS),
        Family("qwen3-thinking", QWEN3_THINKING, _QWEN + _THINK, "<|im_end|>", _QWEN_ENDS),
        Family("qwq", QWQ, _QWEN + _THINK, "<|im_end|>", _QWEN_ENDS),
        Family("r1-distill", R1_DISTILL, _DEEP + _THINK, _DEEP_EOS, (_DEEP_EOS,), _DEEP_BOS),
        Family("deepseek-v3", DEEPSEEK_V3, _DEEP, _DEEP_EOS, (_DEEP_EOS,), _DEEP_BOS),
        Family("deepseek-v3.1", DEEPSEEK_V31, _DEEP + _THINK, _DEEP_EOS, (_DEEP_EOS,), _DEEP_BOS),
        Family("prints-arguments", PRINTS_ARGUMENTS, _IM, "<|im_end|>", ("<|im_end|>",)),
        Family("llama2", LLAMA2, (), "</s>", ("</s>",), "<s>"),
        Family("llama3.1", LLAMA31, _LLAMA, "<|eot_id|>", _LLAMA_ENDS, "<|begin_of_text|>"),
        Family(
            "llama3.2-vision", LLAMA32_VISION, (*_LLAMA, "<|image|>"), "<|eot_id|>", _LLAMA_ENDS, "<|begin_of_text|>"
        ),
        Family(
            "mistral-v0.3",
            MISTRAL_V03,
            (*_INST, "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
            "</s>",
            ("</s>",),
            "<s>",
        ),
        Family(
            "mistral-small-3",
            MISTRAL_SMALL_3,
            (*_INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
            "</s>",
            ("</s>",),
            "<s>",
        ),
        Family("gemma2", GEMMA2, ("<start_of_turn>",), "<eos>", ("<eos>", "<end_of_turn>"), "<bos>"),
        Family("gemma3", GEMMA3, ("<start_of_turn>", "<start_of_image>"), "<eos>", ("<eos>", "<end_of_turn>"), "<bos>"),
        Family(
            "phi3", PHI3, ("<|system|>", "<|user|>"), "<|endoftext|>", ("<|endoftext|>", "<|assistant|>", "<|end|>")
        ),
        Family("phi4", PHI4, ("<|im_start|>", "<|im_sep|>"), "<|im_end|>", ("<|im_end|>",)),
        Family("glm4", GLM4, _GLM, "<|endoftext|>", _GLM_ENDS),
        Family("glm4.5", GLM45, _GLM + _THINK, "<|endoftext|>", _GLM_ENDS),
        Family("apertus", APERTUS, _APERTUS, "<|assistant_end|>", ("<|assistant_end|>", "<|tools_suffix|>"), "<s>"),
        Family("harmony", HARMONY, _HARMONY, "<|return|>", ("<|return|>", "<|endoftext|>", "<|call|>")),
        Family("hermes3", HERMES3, _IM, "<|im_end|>", ("<|im_end|>",), "<|begin_of_text|>"),
        Family(
            "nemotron-nano",
            NEMOTRON_NANO,
            ("<SPECIAL_10>", "<SPECIAL_11>", *_THINK),
            "<SPECIAL_12>",
            ("</s>", "<SPECIAL_12>"),
        ),
        Family("smollm3", SMOLLM3, _IM + _THINK, "<|im_end|>", ("<|im_end|>",)),
        Family("granite", GRANITE, ("<|start_of_role|>", "<|end_of_role|>"), "<|end_of_text|>", ("<|end_of_text|>",)),
        Family(
            "command-r",
            COMMAND_R,
            ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
            "<|END_OF_TURN_TOKEN|>",
            ("<|END_OF_TURN_TOKEN|>",),
            "<BOS_TOKEN>",
        ),
        Family("olmo2", OLMO2, (), "<|endoftext|>", ("<|endoftext|>",), "<|endoftext|>"),
        Family("zephyr", ZEPHYR, (), "</s>", ("</s>",), "<s>"),
        Family("llava", LLAVA, ("<image>",), "</s>", ("</s>",), "<s>"),
        Family("smolvlm", SMOLVLM, ("<|im_start|>", "<image>"), "<end_of_utterance>", ("<end_of_utterance>",)),
        Family("plain", PLAIN, (), "<|endoftext|>", ("<|endoftext|>",)),
    )
}
