"""Chats through the command line: the options of the template, the time that it is told, what the corpus lines say."""

import json
from datetime import datetime, timedelta

import pytest

from stages import chat_settings
from tests.conftest import make_model, make_tokenizer

TEMPLATE = (
    "{{ strftime_now('%Y-%m-%d') }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if brief %}brief {% endif %}{% endif %}"
)
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "teacher"
    tokenizer = make_tokenizer(path)
    tokenizer.chat_template = TEMPLATE
    make_model(path, tokenizer)
    return path


@pytest.fixture
def cache(teacher, tmp_path, pipeline):
    """Runs cache-teacher on rows; the first shard's sequences and the command's end."""

    def run(rows, *options, output="cache"):
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        given = ["--teacher", teacher, "--dataset", source, "--output", tmp_path / output, "--engine", "transformers"]
        return pipeline("cache-teacher", *given, "--processes", 1, *options)

    return run


def manifest(path):
    return json.loads((path / "manifest.json").read_text(encoding="utf-8"))


def test_a_cache_keeps_its_date(cache, tmp_path):
    rows = [{"messages": CHAT}]
    begun = cache(rows, "--template-time", "2025-01-02")
    assert begun.code == 0, begun.err
    assert manifest(tmp_path / "cache")["source"]["template_time"] == "2025-01-02T00:00:00"
    # Without the option today's date would make another corpus.
    again = cache(rows)
    assert again.code == 0 and "1 of 1 shard" in again.err, again.err
    other = cache(rows, "--template-time", "2025-01-03")
    assert other.code == 2 and "was begun with 2025-01-02" in other.err
    today = cache(rows, output="today")
    assert today.code == 0
    fingerprints = [manifest(tmp_path / name)["corpus"]["fingerprint"] for name in ("cache", "today")]
    assert len(set(fingerprints)) == 2


def test_midnight_passes_while_a_cache_is_begun(cache, tmp_path, monkeypatch):
    """The manifest names the day with which the chats were rendered, so the cache can be resumed."""

    class Clock(datetime):
        days = 0

        @classmethod
        def now(cls, tz=None):
            cls.days += 1  # each look at the clock is a day later
            return datetime(2026, 11, 26, 23, 59, tzinfo=tz) + timedelta(days=cls.days)

    monkeypatch.setattr(chat_settings, "datetime", Clock)
    rows = [{"messages": CHAT}]
    assert cache(rows).code == 0
    again = cache(rows)
    assert again.code == 0 and "1 of 1 shard" in again.err, again.err


def test_arguments_and_a_template_file(cache, tmp_path):
    rows = [{"messages": CHAT}]
    wrong = cache(rows, "--template-arg", "breif=true")
    assert wrong.code == 2 and "does not read 'breif'" in wrong.err
    given = cache(rows, "--template-arg", "brief=true", output="brief")
    assert given.code == 0, given.err
    assert manifest(tmp_path / "brief")["source"]["template_arguments"] == {"brief": True}
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE.replace("assistant: ", "answer: ").replace("{{ m.role }}", "answer"), encoding="utf-8")
    own = cache(rows, "--chat-template", file, output="own")
    assert own.code == 0, own.err
    hashes = [manifest(tmp_path / name)["tokenizer"]["chat_template_sha256"] for name in ("brief", "own")]
    assert len(set(hashes)) == 2
    text = cache([{"text": "hello"}], "--template-arg", "brief=true", output="text")
    assert text.code == 2 and "Template arguments belong to chats" in text.err


def test_the_corpus_lines_say_what_is_not_read(cache):
    done = cache([{"conversations": CHAT, "id": 3, "source": "x"}])
    assert done.code == 0, done.err
    assert "columns that are not read: id, source" in done.err


@pytest.mark.parametrize(
    "message", [{"role": "critic", "content": "x"}, {"role": "assistant", "content": [{"image": "x"}]}]
)
def test_refusals_name_file_and_row(cache, tmp_path, message):
    refused = cache([{"messages": CHAT}, {"messages": [*CHAT, message]}])
    assert refused.code == 2 and "message 3 in row 2 of" in refused.err.lower() and "rows.jsonl" in refused.err
    assert not (tmp_path / "cache").exists()
