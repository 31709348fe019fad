"""Odd chats: thoughts that are empty, cut or doubled, contents that hide a gap, templates with habits of their own."""

import json

import pytest
from tokenizers import AddedToken

from stages.chat import ChatRenderer
from stages.corpus import CorpusOptions, build_corpus
from stages.messages import read_chat, read_tools
from storage.errors import UserError
from tests.chat_families import FAMILIES, MOMENT, end_ids, make_tokenizer

CHATML = FAMILIES["chatml"].template


def user(content="q"):
    return {"role": "user", "content": content}


def answer(content="a", **fields):
    return {"role": "assistant", "content": content, **fields}


def call(name="weather", content=None, **fields):
    function = {"name": name, "arguments": {"city": "Rome"}}
    return answer(content, tool_calls=[{"id": "abcdefghi", "type": "function", "function": function}], **fields)


SUNNY = {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi", "name": "weather"}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Returns None", "parameters": {}}}]


def trained(family, chat, turns="all", *, tools=None, template=None, ends=None, **options):
    """The last trained stretch of each sequence."""
    family = FAMILIES[family]
    tokenizer = make_tokenizer(family)
    if template is not None:
        tokenizer.chat_template = template
    ids = end_ids(family, tokenizer) if ends is None else tokenizer.convert_tokens_to_ids(ends)
    renderer = ChatRenderer(tokenizer, turns=turns, end_ids=ids, arguments=family.args, moment=MOMENT)
    rendered = renderer.render(read_chat(chat, "row 7"), "row 7", read_tools(tools, "row 7"), **options)
    return [each.text[slice(*each.spans[-1])] if each.spans else "" for each in rendered]


def refusal(*args, **options):
    with pytest.raises(UserError, match="row 7") as caught:
        trained(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize(("family", "end"), [("r1-distill", "<｜end▁of▁sentence｜>"), ("qwq", "<|im_end|>")])
@pytest.mark.parametrize(
    ("content", "right"),
    [
        ("<think>\n\n</think>\n\nIt is 0.", "\n</think>\n\nIt is 0."),
        ("<think>\n0\n</think>\n\nIt is 0.", "0\n</think>\n\nIt is 0."),
        ("\n<think>\nhm\n</think>\n\nIt is 0.", "hm\n</think>\n\nIt is 0."),
        ("hm\n</think>\n\nIt is 0.", "hm\n</think>\n\nIt is 0."),
    ],
)
def test_thoughts_that_the_template_strips(family, end, content, right):
    assert trained(family, [user(), answer(content)]) == [right + end]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_in_a_field_once(field):
    right = "<think>\nIt is 0.\n</think>\n\nIt is 0.<|im_end|>"
    for content in ("It is 0.", "<think>\nIt is 0.\n</think>\n\nIt is 0."):
        assert trained("qwen3", [user(), answer(content, **{field: "<think>\nIt is 0.\n</think>"})]) == [right]
    # A part of the answer is no proof that the thought is rendered.
    assert "the reasoning of message 2" in refusal("chatml", [user(), answer("It is 0.", **{field: "0"})])


@pytest.mark.parametrize(
    ("family", "content", "right"),
    [
        ("qwen3", "<think>\nI was thinking", "<think>\nI was thinking"),
        ("qwen3-thinking", "I was thinking", "I was thinking"),
        ("r1-distill", "<think>\nI was thinking", "I was thinking"),
        ("qwen3", "<think>\nhm\n</think>\n\nIt is", "<think>\nhm\n</think>\n\nIt is"),
        ("qwen2.5", "It is", "It is"),
        ("plain", "It is", " It is"),
        ("glm4", "It is", "\nIt is"),
    ],
)
def test_answers_that_were_cut_have_no_end(family, content, right):
    assert trained(family, [user(), answer(content)], unfinished=True) == [right]


def test_only_a_last_message_is_cut():
    chat = [user(), answer("one"), user(), answer("cut", train=False)]
    assert trained("chatml", chat, unfinished=True) == ["one<|im_end|>"]
    assert trained("chatml", chat, "last", unfinished=True) == ["one<|im_end|>"]
    assert trained("chatml", [user(), answer("one"), user()], unfinished=True) == ["one<|im_end|>"]


def test_a_call_that_only_the_content_names():
    talks = call(content="I call weather for Rome.")
    assert "the tool call 'weather' of message 2" in refusal("chatml", [user(), talks])
    context = [user("Call weather for Rome"), call(), {**SUNNY}, answer()]
    assert "the tool call 'weather' of message 2" in refusal("chatml", context, "last")
    assert "the tool 'weather'" in refusal("chatml", [user("Which weather?"), answer()], tools=TOOLS)
    assert "give the row its tools" in refusal("chatml", [user(), call()])


def test_the_tools_of_the_first_row_decide_nothing():
    told = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + FAMILIES["prints-arguments"].template
    ends = ["<|im_end|>"]
    for tools in (TOOLS, [{**TOOLS[0], "function": {**TOOLS[0]["function"], "description": "Returns it"}}]):
        (text,) = trained("prints-arguments", [user(), call()], tools=tools, template=told, ends=ends)
        assert '{"city": "Rome"}' in text and "'city'" not in text
    none = CHATML.replace("{% for", "Reasoning: None\n{% for", 1)
    assert trained("chatml", [user(), answer("a")], template=none) == ["a<|im_end|>"]


def test_other_special_tokens_before_the_one_that_stops():
    wrapped = CHATML.replace(
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}",
        "{{ '<|im_start|>' + m.role + '\\n' + ('<a>' + m.content + '</a>' if m.role == 'assistant' else m.content)"
        " + '<|im_end|>\\n' }}",
    )
    assert wrapped != CHATML
    tokenizer = make_tokenizer(FAMILIES["chatml"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "</a>"]})
    tokenizer.chat_template = wrapped
    renderer = ChatRenderer(tokenizer, end_ids=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    (sequence,) = renderer.render(read_chat([user(), answer("a"), user(), answer("b")], "row 7"), "row 7")
    assert [sequence.text[a:b] for a, b in sequence.spans] == ["<a>a</a><|im_end|>", "<a>b</a><|im_end|>"]


def test_a_header_that_swallows_white_space_has_no_loss():
    tokenizer = make_tokenizer(FAMILIES["phi3"])
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True, special=True, normalized=False)])
    renderer = ChatRenderer(tokenizer, end_ids=[tokenizer.convert_tokens_to_ids("<|end|>")])
    rendered = renderer.render(read_chat([user(), answer(" It is 0.")], "row 7"), "row 7")
    ((ids, marks),) = renderer.encode(rendered)
    assert "<|assistant|>" not in tokenizer.decode(ids[marks]) and "It is 0.<|end|>" in tokenizer.decode(ids[marks])


MARKS = CHATML.replace(
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endgeneration %}{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}",
)


def test_marks_that_hold_the_header():
    assert trained("chatml", [answer("Hello"), user(), answer("a")], template=MARKS) == ["a<|im_end|>"]
    assert trained("chatml", [answer("Hello")], template=MARKS) == ["Hello<|im_end|>"]


def test_marks_of_a_part_of_the_turn_are_kept():
    part = CHATML.replace(
        "m.content +", "(m.content if m.role != 'assistant' else '') + ('XX' if m.role == 'assistant' else '') +"
    ).replace(
        "{{ '<|im_start|>' + m.role",
        "{% if m.role == 'assistant' %}<|im_start|>assistant\nskip {% generation %}{{ m.content }}{% endgeneration %}"
        "<|im_end|>\n{% else %}{{ '<|im_start|>' + m.role",
        1,
    )
    part = part.replace("'<|im_end|>\\n' }}", "'<|im_end|>\\n' }}{% endif %}", 1)
    assert "endif" in part
    family = make_tokenizer(FAMILIES["chatml"])
    family.chat_template = part
    renderer = ChatRenderer(family)
    (sequence,) = renderer.render(read_chat([user(), answer("a"), user(), answer("b")], "row 7"), "row 7")
    trained_text = "".join(sequence.text[a:b] for a, b in sequence.spans)
    assert trained_text == "a<|im_end|>b<|im_end|>"


def test_harmony_thinks_around_a_tool():
    chat = [user(), call(thinking="look"), SUNNY, answer("ok", thinking="sure")]
    right = "<|channel|>analysis<|message|>sure<|end|><|start|>assistant<|channel|>final<|message|>ok<|return|>"
    assert trained("harmony", chat, "last") == [right]


@pytest.mark.parametrize("thought", [{"reasoning_content": "look"}, {"content": "<think>\nlook\n</think>\n\n"}])
@pytest.mark.parametrize(("family", "end"), [("r1-distill", "<｜end▁of▁sentence｜>"), ("qwq", "<|im_end|>")])
def test_a_thought_before_a_call(family, end, thought):
    (text,) = trained(family, [user(), call(**thought)])
    assert text.startswith("look\n</think>\n\n") and "weather" in text and text.endswith(end)
    # Earlier thoughts are stripped, as the template strips those of answers.
    assert "look" not in trained(family, [user(), call(**thought), SUNNY, answer("ok")], "last")[0]


def test_a_dict_of_templates_without_a_default():
    tokenizer = make_tokenizer(FAMILIES["chatml"])
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(UserError, match="has the chat templates rag and none named default"):
        ChatRenderer(tokenizer).render(read_chat([user(), answer()], "row 7"), "row 7")


def test_roles_that_a_template_only_mentions_are_mapped():
    told = FAMILIES["hermes3"].template
    assert trained("hermes3", [user(), call(), {"role": "function", "content": "sunny"}, answer("ok")], "last")
    template = told.replace("tool_call", "tool_call", 1) + "{# 'function' #}"
    chat = [user(), call(), {"role": "function", "content": "sunny"}, answer("ok")]
    assert trained("hermes3", chat, "last", template=template) == ["ok<|im_end|>"]


@pytest.mark.parametrize("family", ["gemma3", "glm4.5", "llama3.1"])
def test_parts_in_every_role(family):
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    chat = [{"role": "system", "content": parts}, user(parts), answer(parts)]
    assert "Be brief." in trained(family, chat)[0]


def test_thinking_after_a_prompt_that_closes_it_names_the_argument():
    said = refusal("deepseek-v3.1", [user(), answer("<think>hm</think>a")])
    assert "closes the thought" in said and "template argument" in said


# ---- rows ------------------------------------------------------------------------------------------------


def rows_trained(tmp_path, *rows, **options):
    tokenizer = make_tokenizer(FAMILIES["chatml"])
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = build_corpus(str(path), tokenizer, CorpusOptions(processes=1, **options))
    return [tokenizer.decode(s.input_ids[1:][s.loss_mask]) for s in corpus.read(0, len(corpus))]


def test_conversational_pairs_as_json_text(tmp_path):
    pair = {"prompt": json.dumps([user()]), "completion": json.dumps([answer()])}
    assert rows_trained(tmp_path, pair) == ["a<|im_end|>"]
    # Text that is JSON but no chat stays text.
    plain = {"prompt": "[1, 2]", "completion": '[{"a": 1}]'}
    assert rows_trained(tmp_path, plain)[0].startswith('[{"a": 1}]')


@pytest.mark.parametrize("beside", [{"system": "be brief"}, {"tools": TOOLS}])
def test_what_stands_beside_a_text_prompt_is_not_dropped(tmp_path, beside):
    with pytest.raises(UserError, match=f"The column '{next(iter(beside))}' of row 1 .* beside a prompt that is text"):
        rows_trained(tmp_path, {"prompt": "q", "completion": "a", **beside})


@pytest.mark.parametrize("name", ["response_mask", "prompt_mask", "loss_weights", "label", "seq_lengths"])
def test_masks_of_other_trainers_are_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match=f"The column '{name}' of .* may say which ids have a loss"):
        rows_trained(tmp_path, {"input_ids": [5, 6, 7], name: [1, 1, 1]})


# ---- last turns, thoughts and calls that were cut -------------------------------------------------------------


def oslo():
    function = {"name": "weather", "arguments": {"city": "Oslo"}}
    return answer(None, tool_calls=[{"id": "abcdefghi", "type": "function", "function": function}])


@pytest.mark.parametrize("turns", ["all", "each", "last"])
@pytest.mark.parametrize("family", ["deepseek-v3", "r1-distill", "qwen3", "qwq", "llama3.1", "glm4.5"])
def test_a_second_call_is_never_taken_for_the_first(family, turns):
    # In the first two a call after a tool's reply has no header; the others rewrite earlier turns.
    if family in ("deepseek-v3", "r1-distill") or (family, turns) in (("qwen3", "all"), ("qwq", "all")):
        refusal(family, [user(), call(), SUNNY, oslo()], turns)
        return
    stretches = trained(family, [user(), call(), SUNNY, oslo()], turns)
    assert "Oslo" in stretches[-1] and "Rome" not in stretches[-1]


@pytest.mark.parametrize("content", ["", None])
@pytest.mark.parametrize("family", ["qwen3", "qwq", "r1-distill", "glm4.5"])
def test_a_thought_that_was_cut_in_its_field_has_no_end(family, content):
    (text,) = trained(family, [user(), answer(content, reasoning_content="half a th")], unfinished=True)
    assert text.endswith("half a th") and "</think>" not in text


@pytest.mark.parametrize(
    ("family", "message", "right"),
    [
        ("qwen3-thinking", answer("It is 0.", reasoning_content="0"), "0\n</think>\n\nIt is 0."),
        ("glm4.5", answer("<think>\nIt is\n</think>\n\nIt is"), "\n<think>It is</think>\nIt is"),
        ("glm4.5", answer(" It is"), "\n<think></think>\nIt is"),
        ("qwen2.5", call(), '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'),
    ],
)
def test_cut_answers_keep_what_they_say(family, message, right):
    assert trained(family, [user(), message], unfinished=True) == [right]


def test_a_thought_in_tags_goes_to_the_channel_of_harmony():
    (text,) = trained("harmony", [user(), answer("<think>\nhm\n</think>\n\nok")])
    assert text == ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>ok<|return|>")


def test_bare_tool_schemas_are_wrapped():
    bare = [{"name": "weather", "description": "", "parameters": {}}]
    assert read_tools(bare, "row 7") == [{"type": "function", "function": bare[0]}]


def test_roles_are_those_that_the_template_renders():
    observed = [user(), call(), {"role": "observation", "content": "sunny"}, answer("ok")]
    for family in ("glm4.5", "qwen2.5", "hermes3"):
        assert trained(family, observed, "last")[0].lstrip("\n").endswith(("ok<|im_end|>", "ok<|user|>"))
    developer = [{"role": "developer", "content": "Be brief."}, user(), answer("ok")]
    for family in ("phi3", "gemma3", "qwen2.5"):
        assert "ok" in trained(family, developer)[0]


def test_a_closed_thought_names_the_argument_that_opens_it():
    family = FAMILIES["qwen3"]
    tokenizer = make_tokenizer(family)
    renderer = ChatRenderer(tokenizer, arguments={"enable_thinking": False})
    with pytest.raises(UserError, match=r"In row 7 the generation prompt closes the thought.*enable_thinking"):
        renderer.render(read_chat([user(), answer("a", reasoning_content="hm")], "row 7"), "row 7")


def test_arguments_of_a_row_reach_its_template(tmp_path):
    tokenizer = make_tokenizer(FAMILIES["qwen3"])
    given = (None, {"enable_thinking": False})
    rows = [{"messages": [user(), answer()], "chat_template_kwargs": arguments} for arguments in given]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = build_corpus(str(path), tokenizer, CorpusOptions(processes=1))
    texts = [tokenizer.decode(s.input_ids[1:][s.loss_mask]) for s in corpus.read(0, 2)]
    assert texts == ["<think>\n\n</think>\n\na<|im_end|>", "a<|im_end|>"]
    assert corpus.report.unread_columns == ()
    for wrong, says in (({"enable_thinkng": 1}, "does not read 'enable_thinkng'"), ("x", "is text, not an object")):
        path.write_text(json.dumps({"messages": [user(), answer()], "chat_template_kwargs": wrong}) + "\n")
        with pytest.raises(UserError, match=says):
            build_corpus(str(path), tokenizer, CorpusOptions(processes=1))
