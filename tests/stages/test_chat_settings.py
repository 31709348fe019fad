"""A chat template of one's own, its variables, and the time that a template is told."""

from datetime import datetime, timedelta

import pytest

from stages.chat import ChatRenderer
from stages.chat_settings import ChatSettings
from stages.messages import read_chat
from storage.errors import UserError
from tests.chat_families import FAMILIES, make_tokenizer

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
DATED = (
    "{{ strftime_now('%d %b %Y %H:%M') }}|{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer():
    return make_tokenizer(FAMILIES["qwen3"])


def rendered(tokenizer, settings: ChatSettings, begun: str | None = None) -> str:
    moment = settings.moment(tokenizer, begun)
    renderer = ChatRenderer(tokenizer, arguments=settings.values(), moment=moment)
    return renderer.render(read_chat(CHAT, "row 1"), "row 1")[0].text


def test_time_is_given_kept_or_the_start_of_today(tokenizer):
    tokenizer.chat_template = DATED
    assert rendered(tokenizer, ChatSettings(time="2026-11-26")).startswith("26 Nov 2026 00:00|")
    assert rendered(tokenizer, ChatSettings(time="2026-11-26T08:30")).startswith("26 Nov 2026 08:30|")
    assert rendered(tokenizer, ChatSettings(), begun="2025-01-02T00:00:00").startswith("02 Jan 2025 00:00|")
    assert rendered(tokenizer, ChatSettings(time="2025-01-02"), "2025-01-02T00:00:00").startswith("02 Jan 2025")
    moment = ChatSettings().moment(tokenizer)
    assert moment is not None and moment.time() == datetime.min.time()
    assert timedelta(0) <= datetime.now() - moment < timedelta(days=2)
    with pytest.raises(UserError, match="was begun with 2025-01-02T00:00:00"):
        ChatSettings(time="2025-01-03").moment(tokenizer, "2025-01-02T00:00:00")
    with pytest.raises(UserError, match="'tomorrow' is no date"):
        ChatSettings(time="tomorrow").prepare(tokenizer)


def test_templates_that_tell_no_time_have_none(tokenizer):
    assert ChatSettings(time="2026-11-26").moment(tokenizer) is None
    assert ChatSettings().about(None) == {}


def test_arguments_reach_the_template(tokenizer):
    settings = ChatSettings(arguments={"enable_thinking": "false"})
    settings.prepare(tokenizer)
    assert settings.values() == {"enable_thinking": False}
    # Qwen3's prompt then holds the empty thought, so the answer alone is trained.
    text = "<|im_start|>assistant\n<think>\n\n</think>\n\na<|im_end|>"
    (sequence,) = ChatRenderer(tokenizer, arguments=settings.values()).render(read_chat(CHAT, "row 1"))
    assert text in sequence.text and [sequence.text[a:b] for a, b in sequence.spans] == ["a<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "says"),
    [("enable_thinkng", "does not read 'enable_thinkng'"), ("messages", "'messages' is set by this program")],
)
def test_arguments_that_nothing_reads(tokenizer, name, says):
    with pytest.raises(UserError, match=says):
        ChatSettings(arguments={name: "1"}).prepare(tokenizer)


def test_a_template_from_a_file(tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(DATED + "\n", encoding="utf-8")
    ChatSettings(template=str(path)).prepare(tokenizer)
    assert tokenizer.chat_template == DATED
    for text, says in [
        ("{% for %}", "line 1 is not a valid chat template"),
        (" \n", "is empty"),
        ("{{ [1, 2] | random }}", "draws at random"),
    ]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=says):
            ChatSettings(template=str(path)).prepare(tokenizer)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 text"):
        ChatSettings(template=str(path)).prepare(tokenizer)
    with pytest.raises(UserError, match="cannot be read as a chat template"):
        ChatSettings(template=str(tmp_path)).prepare(tokenizer)
