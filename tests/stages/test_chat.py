"""Which tokens of a chat are the assistant's, token by token, for templates of every temper."""

import json
from datetime import datetime

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from stages.chat import ChatRenderer
from stages.chat_template import ChatTemplate
from stages.encode import encode_spans
from stages.messages import read_chat, read_tools
from storage.errors import UserError

WORDS = ["hello there how are you today", "fine thanks and you", "system be brief user assistant  \n\n"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
    "{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCT = (  # no generation prompt at all, as Mistral's
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
STRIPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADER_WITHOUT_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "fine thanks"},
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": " fine  and you "},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(WORDS * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def marked_runs(tokenizer, ids, marks) -> list[str]:
    """The text of each run of marked tokens."""
    runs, at = [], 0
    for change in [*np.flatnonzero(np.diff(marks.astype(int))) + 1, len(marks)]:
        if marks[at]:
            runs.append(tokenizer.decode(ids[at:change]))
        at = change
    return runs


def render(tokenizer, messages, where="the chat", tools=None, **options) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and marks of each sequence of a chat."""
    renderer = ChatRenderer(tokenizer, **options)
    return renderer.encode(renderer.render(read_chat(messages, where), where, read_tools(tools, where)))


def render_chat(*args, **options) -> tuple[np.ndarray, np.ndarray]:
    (only,) = render(*args, **options)
    return only


def render_turns(*args, last: bool = False, **options) -> list[tuple[np.ndarray, np.ndarray]]:
    return render(*args, turns="last" if last else "each", **options)


def refusal(*args) -> str:
    with pytest.raises(UserError) as caught:
        render_chat(*args)
    message = str(caught.value)
    assert "\n" not in message and message.endswith("."), message
    return message


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_exactly_the_assistants_tokens_are_marked(tokenizer, template):
    tokenizer.chat_template = template
    ids, marks = render_chat(tokenizer, CHAT)
    assert ids.dtype == np.int32 and marks.dtype == bool and len(ids) == len(marks)
    assert marked_runs(tokenizer, ids, marks) == ["fine thanks<|im_end|>", " fine  and you <|im_end|>"]
    # Token by token: what is not marked is the rest of the chat, to the last newline.
    assert tokenizer.decode(ids[~marks]) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello there<|im_end|>\n"
        "<|im_start|>assistant\n\n"
        "<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\n\n"
    )
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert ids.tolist() == tokenizer.apply_chat_template(CHAT)["input_ids"]


def test_a_turn_that_ends_in_a_space_marks_nothing_after_it(tokenizer):
    """`apply_chat_template(return_assistant_tokens_mask=True)` marks the rest of this chat, user and all."""
    tokenizer.chat_template = GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    chat = [{"role": "assistant", "content": " hello "}, {"role": "user", "content": "SECRET"}]
    ids, marks = render_chat(tokenizer, chat)
    # The end of turn stands behind the mark; a loss without it would not teach when to stop.
    assert marked_runs(tokenizer, ids, marks) == [" hello <|im_end|>"]


def test_template_without_generation_prompt(tokenizer):
    tokenizer.chat_template = INSTRUCT
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}] * 2
    assert marked_runs(tokenizer, *render_chat(tokenizer, chat)) == [" fine<|im_end|>", " fine<|im_end|>"]


def test_end_of_turn_that_is_plain_text_is_kept(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert marked_runs(tokenizer, *render_chat(tokenizer, CHAT[1:4]))[0].strip(" ") == "fine thanks\n"


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_assistant_opens_the_chat(tokenizer, template):
    tokenizer.chat_template = template
    chat = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "fine"}]
    assert marked_runs(tokenizer, *render_chat(tokenizer, chat)) == ["hello<|im_end|>"]


def test_two_assistant_turns_running_and_other_roles(tokenizer):
    tokenizer.chat_template = CHATML
    turns = ["user", "assistant", "tool", "assistant", "assistant"]
    chat = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(turns)]
    runs = marked_runs(tokenizer, *render_chat(tokenizer, chat))
    assert runs == [f"assistant {i}<|im_end|>" for i in (1, 3, 4)]


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_no_assistant_turn_marks_nothing(tokenizer, template):
    tokenizer.chat_template = template
    ids, marks = render_chat(tokenizer, CHAT[:2])
    assert len(ids) and not marks.any()
    assert len(render_chat(tokenizer, [])[0]) == 0 or template is GENERATION


@pytest.mark.parametrize("content", ["naïve 日本語 👩‍👩‍👧 x", "", "  ", "fine\n\n", "<|im_end|>"])
def test_unusual_content(tokenizer, content):
    tokenizer.chat_template = CHATML
    chat = [CHAT[1], {"role": "assistant", "content": content}, CHAT[1]]
    ids, marks = render_chat(tokenizer, chat)
    # The teacher stops at the first end of turn, also where the content itself holds one.
    assert tokenizer.decode(ids[marks]) == (content if content == "<|im_end|>" else content + "<|im_end|>")


def test_a_token_that_reaches_into_the_turn_is_the_assistants(tokenizer):
    tokenizer.chat_template = CHATML  # the newline of the header and those of the content are one token
    ids, marks = render_chat(tokenizer, [CHAT[1], {"role": "assistant", "content": "\n\nfine"}])
    assert tokenizer.decode(ids[marks]) == "\n\n\nfine<|im_end|>"


def test_thinking_that_is_stripped_later(tokenizer):
    tokenizer.chat_template = STRIPS_THINKING
    chat = [CHAT[1], {"role": "assistant", "content": "<think>hm</think>fine"}]
    assert marked_runs(tokenizer, *render_chat(tokenizer, chat)) == ["<think>hm</think>fine<|im_end|>"]
    message = refusal(tokenizer, chat * 2, "row 7 of a.jsonl")
    assert "cannot tell which tokens are the assistant's in row 7 of a.jsonl" in message
    assert "{% generation %}" in message and "prompt and completion" in message and "--turns each" in message
    # Turn by turn each thought is there while it is written, and gone before the next.
    first, second = render_turns(tokenizer, chat * 2)
    assert marked_runs(tokenizer, *first) == marked_runs(tokenizer, *second) == ["<think>hm</think>fine<|im_end|>"]
    assert tokenizer.decode(first[0]) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(second[0]) == tokenizer.apply_chat_template(chat * 2, tokenize=False)
    assert tokenizer.decode(second[0]).count("hm") == 1
    (only,) = render_turns(tokenizer, [*chat * 2, CHAT[1]], last=True)
    assert only[0].tolist() == second[0].tolist() and only[1].tolist() == second[1].tolist()


@pytest.mark.parametrize("template", [CHATML, GENERATION, INSTRUCT])
def test_turn_by_turn_marks_what_the_whole_chat_marks(tokenizer, template):
    tokenizer.chat_template = template
    chat = CHAT[1:]
    ids, marks = render_chat(tokenizer, chat)
    turns = render_turns(tokenizer, chat)
    assert [marked_runs(tokenizer, *turn) for turn in turns] == [[run] for run in marked_runs(tokenizer, ids, marks)]
    assert turns[-1][0].tolist() == ids.tolist()
    (unanswered,) = render_turns(tokenizer, chat[:1])
    assert len(unanswered[0]) and not unanswered[1].any()


TOOLS = [{"type": "function", "function": {"name": "fine", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_tools_reach_the_template(tokenizer, template):
    """As `apply_chat_template(tools=)` renders them, and none of them is the assistant's."""
    tokenizer.chat_template = "{% for t in tools or [] %}tool {{ t.function | tojson }}\n{% endfor %}" + template
    ids, marks = render_chat(tokenizer, CHAT, tools=TOOLS)
    whole = tokenizer.apply_chat_template(CHAT, tools=TOOLS, tokenize=False)
    assert tokenizer.decode(ids) == whole and whole.startswith('tool {"name": "fine"')
    assert marked_runs(tokenizer, ids, marks) == ["fine thanks<|im_end|>", " fine  and you <|im_end|>"]
    without, unmarked = render_chat(tokenizer, CHAT)
    assert marks.sum() == unmarked.sum() and len(ids) > len(without)
    assert render_chat(tokenizer, CHAT, tools=json.dumps(TOOLS))[0].tolist() == ids.tolist()
    assert render_chat(tokenizer, CHAT, tools=[json.dumps(tool) for tool in TOOLS])[0].tolist() == ids.tolist()
    assert all(tokenizer.decode(turn[0]).startswith("tool {") for turn in render_turns(tokenizer, CHAT, tools=TOOLS))
    for nothing in (None, [], "", " "):
        assert render_chat(tokenizer, CHAT, tools=nothing)[0].tolist() == without.tolist()


@pytest.mark.parametrize(
    ("tools", "says"), [("{", "are text that is not JSON"), ({"a": 1}, "not a list of objects"), ([1], "not a list of")]
)
def test_malformed_tools_name_the_row(tokenizer, tools, says):
    tokenizer.chat_template = CHATML
    with pytest.raises(UserError, match=f"The tools in row 9 {says}|The tools in row 9 are {says}"):
        render_chat(tokenizer, CHAT, "row 9", tools=tools)


def test_templates_that_cannot_tell(tokenizer):
    tokenizer.chat_template = HEADER_WITHOUT_PROMPT
    assert "no generation prompt" in refusal(tokenizer, CHAT, "row 1")
    tokenizer.chat_template = CHATML.replace(
        "{% for", "{% if messages | length < 3 %}{{ raise_exception('no') }}{% endif %}{% for", 1
    )
    assert "refuses the messages before message 3" in refusal(tokenizer, CHAT, "row 1")
    assert "refuses the messages in row 1: no; mend" in refusal(tokenizer, CHAT[:2], "row 1")
    tokenizer.chat_template = GENERATION + "{{ raise_exception('roles must alternate') }}"
    assert "row 4: roles must alternate" in refusal(tokenizer, CHAT, "row 4")
    tokenizer.chat_template = None
    assert "no chat template, so the chat in row 2" in refusal(tokenizer, CHAT, "row 2")


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "The messages in row 9 are text, not a list"),
        (3, "are a number, not a list"),
        ({"role": "user"}, "are an object, not a list"),
        (["hello"], "Message 1 in row 9 is text, not an object"),
        ([CHAT[1], {"content": "x"}], "Message 2 in row 9 has no role"),
        ([{"role": 3, "content": "x"}], "Message 1 in row 9 has no role"),
        ([{"speaker": "human", "text": "x"}], "Message 1 in row 9 has no role (its fields are speaker, text)"),
        ([{"role": "user"}], "Message 1 in row 9 has no content"),
        ([{"role": "user", "content": None}], "has no content"),
        ([{"role": "user", "content": 3}], "a content that is a number"),
        ([{"role": "user", "content": "\ud800"}], "row 9 holds half of a surrogate pair"),
    ],
)
def test_malformed_messages_name_the_row(tokenizer, messages, says):
    tokenizer.chat_template = CHATML
    assert says in refusal(tokenizer, messages, "row 9")


def test_slow_tokenizer():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML
    ids, marks = render_chat(tokenizer, CHAT)
    assert tokenizer.decode(ids[marks]) == "fine thanks<|im_end|>\n fine  and you <|im_end|>\n"
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_spans_and_added_special_tokens(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 0), ("<|im_end|>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    for added in (fast, ByT5Tokenizer()):
        text = "hello there"
        (ids, marks), (_, unmarked) = encode_spans(added, [text] * 2, [[(5, 11)], [(0, 3)]], add_special_tokens=True)
        assert ids.tolist() == added(text)["input_ids"]
        assert added.decode(ids[marks], skip_special_tokens=True) == " there"
        assert marks[-1] and not marks[0] and not unmarked[-1]


def test_a_tokenizer_that_renders_by_itself_is_asked(tokenizer):
    class Shouting(PreTrainedTokenizerFast):
        def apply_chat_template(self, messages, tools=None, *, tokenize, add_generation_prompt, **variables):
            text = "".join(f"<|im_start|>{m['role']}\n{m['content']}!<|im_end|>\n" for m in messages)
            return text + "<|im_start|>assistant\n" * add_generation_prompt

    own = Shouting(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", chat_template=CHATML)
    ids, marks = render_chat(own, CHAT[:3])
    assert marked_runs(own, ids, marks) == ["fine thanks!<|im_end|>"]


def test_fields_that_are_none_and_functions_reach_the_template(tokenizer):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{{ strftime_now('%Y') }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.name is defined }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nFalse{% endif %}"
    )
    template = ChatTemplate(tokenizer, moment=datetime(1999, 1, 1))
    rendered = template.render([{"role": "user", "content": "hi", "name": None}], None)
    assert rendered == "1999<|im_start|>user\nTruehi<|im_end|>\n"
