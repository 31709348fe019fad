"""Random chats of every template family: a turn follows its exact generation prompt, says its message, and stops."""

import random

import pytest

from stages.chat import ChatRenderer, Rendered
from stages.messages import Chat, read_chat
from stages.said import squeezed
from storage.errors import UserError
from tests.chat_families import FAMILIES, MOMENT, end_ids, make_tokenizer

WORDS = [
    "It is 0.",
    "",
    " lead",
    "trail \n",
    "a\n\nb",
    "naïve 日本語 👩‍🚀",
    "{{ x }} {% y %}",
    "assistant",
    "<b>",
    "q",
    "q",
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}


def random_chat(dice: random.Random) -> list[dict]:
    chat = [{"role": "system", "content": "Be brief."}] if dice.random() < 0.3 else []
    for _ in range(dice.randint(1, 3)):
        chat.append({"role": "user", "content": dice.choice(WORDS) or "q"})
        if dice.random() < 0.2:
            chat.append({"role": "assistant", "content": None, "tool_calls": [CALL]})
            chat.append({"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi", "name": "weather"})
        answer = {"role": "assistant", "content": dice.choice(WORDS)}
        if dice.random() < 0.2:
            answer["content"] = f"<think>\n{dice.choice(['hm', '0', 'q'])}\n</think>\n\n{answer['content']}"
        elif dice.random() < 0.1:
            answer["reasoning_content"] = "hm"
        if dice.random() < 0.15:
            answer["weight"] = 0
        chat.append(answer)
    return chat


def rendered(renderer: ChatRenderer, chat: Chat) -> list[Rendered] | None:
    """The sequences of a chat; None where it is refused in a sentence, as other tests hold it to be right."""
    try:
        return renderer.render(chat, "row 7")
    except UserError:
        return None


@pytest.mark.parametrize("name", FAMILIES)
def test_turns(name):
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    dice = random.Random(name)
    renderers = {
        turns: ChatRenderer(
            tokenizer, turns=turns, end_ids=end_ids(family, tokenizer), arguments=family.args, moment=MOMENT
        )
        for turns in ("all", "each")
    }
    served = 0
    for _ in range(30):
        given, turns = random_chat(dice), dice.choice(("all", "each"))
        chat, renderer = read_chat(given, "row 7"), renderers[turns]
        sequences = rendered(renderer, chat)
        if sequences is None:
            continue
        wanted = chat.turns
        if not wanted:
            assert not any(sequence.spans for sequence in sequences)
            continue
        served += 1
        found = [(sequence, span) for sequence in sequences for span in sequence.spans]
        assert len(found) == len(wanted)
        messages = renderer._template.adapt(chat.messages, None, "row 7")
        for turn, (sequence, (begin, end)) in zip(wanted, found, strict=True):
            spoken = sequence.text[begin:end]
            prompt = renderer._template.render(messages[:turn], None, prompt=True)
            assert sequence.text[:begin] == prompt, (given, turns)
            content = given[turn]["content"] or ""
            assert squeezed(content.rpartition("</think>")[2]) in squeezed(spoken), (given, turns)
            if "</think>" in content:
                assert squeezed(content.partition("</think>")[0].rpartition("<think>")[2]) in squeezed(spoken)
            stops = [stop for stop in family.ends if stop in spoken]
            if not sequence.without_end:
                assert any(spoken.rstrip("\n").endswith(stop) for stop in (*family.ends, family.eos)) or not stops
            assert all(spoken.index(stop) + len(stop) == len(spoken) for stop in stops), (given, turns)
    assert served > 3
