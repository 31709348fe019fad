"""Rows to sequences: the mask of every kind of row, nothing lost or doubled, and an identity that travels."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from stages.corpus import Corpus, CorpusOptions, build_corpus
from storage.errors import RunError, UserError

WORDS = [
    "the quick brown fox jumps over the lazy dog",
    "question answer yes no maybe",
    "user assistant \n\n hello",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPTIONS = CorpusOptions(max_length=64)


def make_tokenizer(bos: bool = True, **special) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(WORDS * 5, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **({"eos_token": "<eos>"} | special))
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def write(tmp_path):
    def write(rows: list, name: str = "a.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def everything(corpus: Corpus) -> list:
    return corpus.read(0, len(corpus))


def trained(tokenizer, sequence) -> str:
    """The text of the tokens that are predicted at trained positions."""
    return tokenizer.decode(sequence.input_ids[1:][sequence.loss_mask])


def refusal(*args) -> str:
    with pytest.raises(UserError) as caught:
        build_corpus(*args)
    message = str(caught.value)
    assert "\n" not in message and message.endswith("."), message
    return message


# ---- plain text ----


def test_text_is_tokenised_as_a_whole(tokenizer, write):
    source = write([{"text": "the quick fox"}, {"text": "hello", "other": [1, "x"]}])
    corpus = build_corpus(source, tokenizer, OPTIONS)
    assert len(corpus) == 2 and corpus.lengths.dtype == np.int32
    for number, (sequence, text) in enumerate(zip(everything(corpus), ("the quick fox", "hello"), strict=True)):
        assert sequence.sequence_id == number
        assert sequence.input_ids.dtype == np.int32 and sequence.loss_mask.dtype == bool
        assert sequence.input_ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert tokenizer.decode(sequence.input_ids) == f"<bos>{text}<eos>"
        assert len(sequence.loss_mask) == len(sequence.input_ids) - 1 and sequence.loss_mask.all()
        assert corpus.lengths[number] == len(sequence.input_ids)
    report = corpus.report
    assert (report.rows, report.sequences, report.tokens) == (2, 2, corpus.lengths.sum())
    assert report.scored_positions == report.trained_positions == report.tokens - 2


def test_end_of_sequence(tokenizer, write):
    source = write([{"text": "hello"}, {"text": "hello<eos>"}])
    eos = tokenizer.eos_token_id
    first, second = everything(build_corpus(source, tokenizer, OPTIONS))
    assert first.input_ids.tolist() == second.input_ids.tolist() and list(first.input_ids).count(eos) == 1
    first, _ = everything(build_corpus(source, tokenizer, replace(OPTIONS, append_eos=False)))
    assert tokenizer.decode(first.input_ids) == "<bos>hello"
    first, _ = everything(build_corpus(source, make_tokenizer(eos_token=None), OPTIONS))
    assert tokenizer.decode(first.input_ids) == "<bos>hello"


def test_empty_and_short_rows_are_counted_and_left_out(write):
    bare = make_tokenizer(bos=False)
    rows = [{"text": text} for text in (None, "", " \n\t", "x", "hello x", "y", "the")] + [{"other": 1}]
    corpus = build_corpus(write(rows), bare, replace(OPTIONS, append_eos=False))
    assert [bare.decode(sequence.input_ids) for sequence in everything(corpus)] == ["hello x"]
    report = corpus.report
    assert (report.rows, report.empty, report.too_short, report.without_loss, report.sequences) == (
        8,
        4,
        3,
        0,
        1,
    )


@pytest.mark.parametrize("make", [make_tokenizer, ByT5Tokenizer])
@pytest.mark.parametrize("longest", [2, 3, 7, 64])
def test_cut_keeps_the_first_tokens(write, make, longest):
    made = make()
    texts = ["the lazy dog", "hello", "quick brown fox " * 3]
    corpus = build_corpus(write([{"text": t} for t in texts]), made, CorpusOptions(max_length=longest))
    whole = everything(build_corpus(write([{"text": t} for t in texts]), made, CorpusOptions(max_length=9999)))
    for cut, full in zip(everything(corpus), whole, strict=True):
        assert cut.input_ids.tolist() == full.input_ids[:longest].tolist()
        assert len(cut.loss_mask) == len(cut.input_ids) - 1
    assert corpus.report.cut == sum(len(full.input_ids) > longest for full in whole) and corpus.report.split == 0


@pytest.mark.parametrize("longest", range(2, 14))
def test_split_covers_every_transition_exactly_once(tokenizer, write, longest):
    rows = [{"prompt": "question " * (i % 4), "completion": "the quick fox " * i} for i in range(1, 6)]
    source = write(rows)
    whole = everything(build_corpus(source, tokenizer, CorpusOptions(max_length=9999)))
    corpus = build_corpus(source, tokenizer, CorpusOptions(max_length=longest, overlong="split"))
    pieces = everything(corpus)
    expected, dropped = [], 0
    for full in whole:  # every trained transition, in order, by itself
        expected += [(int(full.input_ids[t]), int(full.input_ids[t + 1])) for t in np.flatnonzero(full.loss_mask)]
        # Where each piece starts, by the definition: at the last token of the piece before.
        starts = range(0, len(full.input_ids) - 1, longest - 1)
        dropped += sum(not full.loss_mask[start : start + longest - 1].any() for start in starts)
    found = [
        (int(piece.input_ids[t]), int(piece.input_ids[t + 1]))
        for piece in pieces
        for t in np.flatnonzero(piece.loss_mask)
    ]
    assert found == expected
    assert all(2 <= len(piece.input_ids) <= longest for piece in pieces)
    assert corpus.report.split == sum(len(full.input_ids) > longest for full in whole) and corpus.report.cut == 0
    assert corpus.report.without_loss == dropped


def test_split_pieces_chain(tokenizer, write):
    source = write([{"text": "the quick brown fox jumps over the lazy dog"}])
    options = CorpusOptions(max_length=4, overlong="split")
    pieces = [piece.input_ids.tolist() for piece in everything(build_corpus(source, tokenizer, options))]
    assert all(before[-1] == after[0] for before, after in itertools.pairwise(pieces))
    (full,) = everything(build_corpus(source, tokenizer))
    assert pieces[0] + [token for piece in pieces[1:] for token in piece[1:]] == full.input_ids.tolist()


# ---- prompt and completion ----


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("question: ", "the answer"),
        ("question:", " the answer"),
        ("question:\n", "\n\nanswer"),
        ("", "answer"),
        (None, "answer"),
        ("日本", "語 👩‍👩‍👧"),
        ("  ", "  yes  "),
    ],
)
@pytest.mark.parametrize("make", [make_tokenizer, ByT5Tokenizer])
def test_loss_is_on_the_completion(write, prompt, completion, make):
    made = make()
    (sequence,) = everything(build_corpus(write([{"prompt": prompt, "completion": completion}]), made, OPTIONS))
    joint = (prompt or "") + completion
    assert made.decode(sequence.input_ids, skip_special_tokens=True) == joint
    assert sequence.input_ids[-1] == made.eos_token_id and sequence.loss_mask[-1]
    if made.is_fast:
        assert sequence.input_ids.tolist() == [*made(joint)["input_ids"], made.eos_token_id]
    predicted = np.concatenate([[False], sequence.loss_mask])
    scored = made.decode(sequence.input_ids[predicted], skip_special_tokens=True)
    masked = made.decode(sequence.input_ids[~predicted], skip_special_tokens=True)
    # The first trained token may begin in the prompt; without a BOS nothing predicts the first token of all.
    if prompt or made.is_fast:
        assert scored.endswith(completion) and len(scored) <= len(completion) + 1
    assert masked + scored == joint


def test_a_token_that_reaches_into_the_completion_is_the_completions(tokenizer, write):
    (sequence,) = everything(build_corpus(write([{"prompt": "the qu", "completion": "ick fox"}]), tokenizer, OPTIONS))
    assert trained(tokenizer, sequence) == " quick fox<eos>"


def test_prompt_that_fills_the_sequence_is_without_loss(tokenizer, write):
    rows = [
        {"prompt": "the lazy dog " * 60, "completion": "yes"},
        {"prompt": "the", "completion": " "},
        {"prompt": "the", "completion": None},
        {"prompt": "the", "completion": "x"},
    ]
    report = build_corpus(write(rows), tokenizer, OPTIONS).report
    assert (report.rows, report.empty, report.without_loss, report.cut, report.sequences) == (4, 2, 1, 1, 1)
    assert report.trained_positions == 2 < report.scored_positions


# ---- chat ----


def test_chat(tokenizer, write):
    chat = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "maybe"},
        {"role": "assistant", "content": "no"},
    ]
    corpus = build_corpus(write([{"messages": m} for m in (chat, chat[:1], [], None)]), tokenizer, OPTIONS)
    (sequence,) = everything(corpus)
    assert trained(tokenizer, sequence) == "yes<|im_end|>no<|im_end|>"
    assert tokenizer.decode(sequence.input_ids) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert (corpus.report.empty, corpus.report.without_loss) == (2, 1)
    # The mask of position t is about input_ids[t+1]: the header's newline predicts the first word.
    first = int(np.argmax(sequence.loss_mask))
    assert tokenizer.decode(sequence.input_ids[first]) == "\n"


def test_turns_and_tools_of_chats(tokenizer, write, tmp_path):
    tokenizer.chat_template = "{{ tools[0].function.name if tools else '' }}" + CHATML
    user, answer = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}
    rows = [
        {"messages": [user, answer, user, answer], "tools": [{"name": "maybe"}]},
        {"messages": [user], "tools": None},
        {"messages": [user, answer]},
    ]
    try:
        found = {}
        for turns, sequences, without in (("all", 2, 1), ("last", 2, 1), ("each", 3, 1)):
            corpus = build_corpus(write(rows), tokenizer, replace(OPTIONS, turns=turns))
            assert (corpus.report.sequences, corpus.report.without_loss) == (sequences, without)
            found[turns] = corpus.read(0, sequences)
        marked = {turns: [trained(tokenizer, s) for s in sequences] for turns, sequences in found.items()}
        one = "yes<|im_end|>"
        assert marked == {"all": [one * 2, one], "last": [one, one], "each": [one, one, one]}
        starts = [tokenizer.decode(s.input_ids).startswith("maybe<|im_start|>") for s in found["each"]]
        assert starts == [True, True, False]
        # Cut at the front of the second turn, so that turn has nothing left to train on.
        short = build_corpus(
            write(rows[:1]), tokenizer, replace(OPTIONS, turns="each", max_length=len(found["each"][0].input_ids))
        )
        assert (short.report.sequences, short.report.without_loss, short.report.cut) == (1, 1, 1)
        # A column of Parquet that holds schemas as text, under a name of its own.
        table = {"messages": [rows[0]["messages"]], "functions": ['[{"name": "maybe"}]']}
        pq.write_table(pa.table(table), tmp_path / "functions.parquet")
        named = build_corpus(str(tmp_path / "functions.parquet"), tokenizer, replace(OPTIONS, tools_column="functions"))
        assert named.read(0, 1)[0].input_ids.tolist() == found["all"][0].input_ids.tolist()
        assert "There is no column 'tool'" in refusal(write(rows), tokenizer, replace(OPTIONS, tools_column="tool"))
        source = write([{"messages": [user, answer], "tools": "{"}])
        assert refusal(source, tokenizer, OPTIONS).startswith(f"The tools in row 1 of {source} are text that is not")
    finally:
        tokenizer.chat_template = CHATML


def test_chat_of_parquet_and_its_errors(tokenizer, write, tmp_path):
    chats = [[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]]
    pq.write_table(pa.table({"messages": chats, "prompt": ["unused"]}), tmp_path / "a.parquet")
    (sequence,) = everything(build_corpus(str(tmp_path / "a.parquet"), tokenizer, OPTIONS))
    assert trained(tokenizer, sequence) == "yes<|im_end|>"
    source = write([{"messages": chats[0]}, {"messages": [{"role": "user"}]}])
    assert refusal(source, tokenizer, OPTIONS).startswith(f"Message 1 in row 2 of {source} has no content")
    source = write([{"messages": "hello"}])
    assert refusal(source, tokenizer, OPTIONS).startswith(f"The messages in row 1 of {source} are text")


# ---- token ids ----


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_token_ids_are_taken_as_they_are(tokenizer, write, tmp_path, kind):
    rows = [
        {"input_ids": [5, 6, 7], "loss_mask": [False, True]},
        {"input_ids": [9, 8], "loss_mask": None},
        {"input_ids": [4, 4, 4], "loss_mask": [False, False]},
        {"input_ids": [3], "loss_mask": []},
        {"input_ids": [], "loss_mask": None},
    ]
    source = write(rows)
    if kind == "parquet":
        source = str(tmp_path / "a.parquet")
        pq.write_table(pa.Table.from_pylist(rows), source)
    corpus = build_corpus(source, tokenizer, OPTIONS)
    first, second = everything(corpus)
    assert first.input_ids.tolist() == [5, 6, 7] and first.loss_mask.tolist() == [False, True]
    assert second.input_ids.tolist() == [9, 8] and second.loss_mask.tolist() == [True]
    report = corpus.report
    assert (report.empty, report.too_short, report.without_loss, report.trained_positions) == (1, 1, 1, 2)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": [1, 999]}, "Token id 999 at place 1 of row 2 of {}, column 'input_ids' is not in"),
        ({"input_ids": [-1, 3]}, "Token id -1 at place 0"),
        ({"input_ids": [1, 2.5]}, "are not a list of whole numbers"),
        ({"input_ids": [1, None]}, "are not a list of whole numbers"),
        ({"input_ids": [True, False]}, "are not a list of whole numbers"),
        ({"input_ids": [[1], [2, 3]]}, "are not a list of whole numbers"),
        ({"input_ids": "text"}, "The token ids in row 2 of {}, column 'input_ids' are not a list"),
        ({"input_ids": [10**30, 1]}, "are not a list of whole numbers"),
        ({"input_ids": [1, 2, 3], "loss_mask": [True] * 3}, "has 3 entries where 3 ids need 2"),
        ({"input_ids": [1, 2, 3], "loss_mask": [True, 7]}, "is not a list of true and false"),
        ({"input_ids": [1, 2, 3], "loss_mask": [True, 0.5]}, "is not a list of true and false"),
        ({"input_ids": [1, 2, 3], "loss_mask": "yes"}, "row 2 of {}, column 'loss_mask' is not a list"),
    ],
)
def test_wrong_token_ids(tokenizer, write, row, says):
    source = write([{"input_ids": [1, 2], "loss_mask": [1]}, row])
    assert says.format(source) in refusal(source, tokenizer, OPTIONS)


# ---- columns and cells ----


def test_named_columns(tokenizer, write):
    row = {"text": "the", "prompt": "hello", "completion": " yes", "q": "question", "a": " no", "body": "fox"}
    row["chat"] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "maybe"}]
    source = write([row])

    def of(**columns: str) -> str:
        (sequence,) = everything(build_corpus(source, tokenizer, replace(OPTIONS, **columns)))
        return trained(tokenizer, sequence)

    assert of(text_column="body") == "fox<eos>"
    assert of(prompt_column="q", completion_column="a") == " no<eos>"
    assert of(prompt_column="q") == " yes<eos>"
    assert of(completion_column="a") == " no<eos>"
    assert of(messages_column="chat") == "maybe<|im_end|>"


def test_columns_that_are_missing_or_ambiguous(tokenizer, write):
    source = write([{"text": "a", "prompt": "b"}, {"completion": "c"}])
    message = refusal(source, tokenizer, OPTIONS)
    assert "text or prompt+completion" in message and "are: text, prompt, completion; name one" in message
    source = write([{"question": "a", "answer": "b"}])
    assert "No column to read: the columns of" in refusal(source, tokenizer, OPTIONS)
    assert "are: question, answer; name" in refusal(source, tokenizer, OPTIONS)
    message = refusal(source, tokenizer, replace(OPTIONS, text_column="body"))
    assert message.startswith("There is no column 'body'") and "question, answer" in message
    message = refusal(source, tokenizer, replace(OPTIONS, prompt_column="question"))
    assert message.startswith("There is no column 'completion'")
    both = replace(OPTIONS, text_column="question", messages_column="answer")
    assert "question or answer" in refusal(source, tokenizer, both)


def test_file_of_a_folder_without_the_column(tokenizer, write, tmp_path):
    write([{"text": "a"}], "data/a.jsonl")
    write([{"words": "a"}], "data/b.jsonl")
    assert f"{tmp_path}/data/b.jsonl has no column 'text'" in refusal(str(tmp_path / "data"), tokenizer, OPTIONS)


@pytest.mark.parametrize("value", [3, 1.5, True, ["a"], {"a": 1}])
def test_cell_that_is_no_text(tokenizer, write, value):
    source = write([{"text": "a"}, {"text": value}])
    kind = type(value).__name__
    expected = f"The value in row 2 of {source}, column 'text' is of type {kind}, not text"
    assert refusal(source, tokenizer, OPTIONS).startswith(expected)
    source = write([{"prompt": "a", "completion": value}])
    assert f"row 1 of {source}, column 'completion'" in refusal(source, tokenizer, OPTIONS)


def test_half_a_surrogate_pair(tokenizer, write):
    source = write([{"text": "ab\ud800"}])
    assert f"row 1 of {source}, column 'text' holds half of a surrogate pair at character 3" in refusal(
        source, tokenizer, OPTIONS
    )


def test_nothing_left(tokenizer, write):
    source = write([{"prompt": "the", "completion": ""}, {"prompt": "the fox " * 50, "completion": "x"}])
    message = refusal(source, tokenizer, replace(OPTIONS, max_length=8))
    assert "of 2 rows, 1 is empty, 0 are shorter than two tokens, and 1 sequence has no trained" in message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_length": 1}, "maximum length is 1"),
        ({"max_length": -5}, "maximum length is -5"),
        ({"overlong": "drop"}, "choose cut or split"),
        ({"processes": 0}, "number of processes is 0"),
    ],
)
def test_options_that_make_no_sense(options, says):
    with pytest.raises(UserError, match=says):
        CorpusOptions(**options)


def test_split_and_limit_reach_the_source(tokenizer, write):
    source = write([{"text": "hello"}] * 5)
    assert build_corpus(source, tokenizer, replace(OPTIONS, limit=2)).report.rows == 2
    assert "no split 'test'" in refusal(source, tokenizer, replace(OPTIONS, split="test"))


# ---- the whole ----


def mixed_rows() -> list:
    return [{"text": "" if i % 7 == 0 else f"the quick fox {i} " * (1 + i % 5)} for i in range(2500)]


@pytest.mark.parametrize("overlong", ["cut", "split"])
def test_read_any_range(tokenizer, write, overlong):
    corpus = build_corpus(write(mixed_rows()), tokenizer, CorpusOptions(max_length=16, overlong=overlong))
    whole = everything(corpus)
    assert [sequence.sequence_id for sequence in whole] == list(range(len(corpus)))
    assert [len(sequence.input_ids) for sequence in whole] == corpus.lengths.tolist()
    for start, stop in ((0, 1), (5, 9), (997, 1003), (len(corpus) - 1, len(corpus)), (4, 4)):
        for found, expected in zip(corpus.read(start, stop), whole[start:stop], strict=True):
            assert found.sequence_id == expected.sequence_id
            assert np.array_equal(found.input_ids, expected.input_ids)
            assert np.array_equal(found.loss_mask, expected.loss_mask)
            found.input_ids[0] = 0  # a copy of the reader's own
    for start, stop in ((-1, 2), (3, 2), (0, len(corpus) + 1)):
        with pytest.raises(IndexError):
            corpus.read(start, stop)
    report = corpus.report
    assert report.rows == 2500 and report.sequences == len(corpus)
    assert report.tokens == corpus.lengths.sum()
    if overlong == "cut":
        assert report.rows == report.empty + report.too_short + report.without_loss + report.sequences
    counts = [value for name, value in asdict(report).items() if name not in ("unread_columns", "notes")]
    assert all(type(value) is int for value in counts)


def test_fingerprint_does_not_depend_on_path_kind_or_processes(tokenizer, write, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)  # set, it would hide the warnings of forks
    rows = mixed_rows()
    corpora = [build_corpus(write(rows), tokenizer, replace(OPTIONS, processes=n)) for n in (1, 2)]
    write(rows[:900], "folder/a.jsonl")
    pq.write_table(pa.Table.from_pylist(rows[900:]), tmp_path / "folder" / "b.parquet")
    corpora.append(build_corpus(str(tmp_path / "folder"), tokenizer, OPTIONS))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    corpora.append(build_corpus(str(tmp_path / "c.parquet"), tokenizer, replace(OPTIONS, processes=2)))
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert len({corpus.report for corpus in corpora}) == 1
    assert re.fullmatch(r"[0-9a-f]{64}", corpora[0].fingerprint)
    for one, other in zip(everything(corpora[0]), everything(corpora[1]), strict=True):
        assert np.array_equal(one.input_ids, other.input_ids)
    assert capfd.readouterr() == ("", "")  # no bars, no warnings of forks


def test_fingerprint_is_what_it_says(tokenizer, write):
    corpus = build_corpus(write([{"input_ids": [5, 6, 7], "loss_mask": [0, 1]}, {"input_ids": [8, 9]}]), tokenizer)
    parts = [
        np.array([3, 2], "<i4").tobytes(),
        np.array([5, 6, 7, 8, 9], "<i4").tobytes(),
        np.array([0, 1, 1], "u1").tobytes(),
    ]
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    assert corpus.fingerprint == hashlib.sha256(digests).hexdigest()


def test_fingerprint_notices_one_token_one_mask_entry_order_and_boundaries(tokenizer, write):
    def of(*rows: tuple) -> str:
        source = write([{"input_ids": ids, "loss_mask": mask} for ids, mask in rows])
        return build_corpus(source, tokenizer, OPTIONS).fingerprint

    variants = [
        of(([5, 6, 7], [1, 1]), ([8, 9], [1])),
        of(([5, 6, 8], [1, 1]), ([8, 9], [1])),
        of(([5, 6, 7], [0, 1]), ([8, 9], [1])),
        of(([8, 9], [1]), ([5, 6, 7], [1, 1])),
        of(([5, 6], [1]), ([7, 8, 9], [1, 1])),
        of(([5, 6, 7], [1, 1])),
    ]
    assert len(set(variants)) == len(variants)
    assert of(([5, 6, 7], [1, 1]), ([], []), ([4], []), ([8, 9], [1])) == variants[0]  # rows left out do not count


def test_an_error_in_another_process_is_the_same_sentence(tokenizer, write):
    rows = mixed_rows()
    rows[1800] = {"text": 3}
    source = write(rows)
    message = refusal(source, tokenizer, replace(OPTIONS, processes=2))
    assert message == refusal(source, tokenizer, replace(OPTIONS, processes=1))
    assert message.startswith(f"The value in row 1801 of {source}, column 'text'")


def test_a_process_that_dies_is_a_run_error(write):
    here = os.getpid()

    class Deadly(PreTrainedTokenizerFast):
        def __call__(self, *args, **kwargs):
            if os.getpid() != here:
                os._exit(9)
            return super().__call__(*args, **kwargs)

    deadly = Deadly(tokenizer_object=make_tokenizer().backend_tokenizer)
    with pytest.raises(RunError, match="died, most likely for want of memory"):
        build_corpus(write([{"text": "hello"}] * 10), deadly, replace(OPTIONS, processes=2))


def test_the_environment_is_left_alone_and_no_files_remain(tokenizer, write, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    before, environ = dict(os.environ), os.environ
    corpus = build_corpus(write([{"text": "hello"}] * 10), tokenizer, replace(OPTIONS, processes=2))
    assert os.environ is environ and dict(os.environ) == before
    assert os.listdir(tmp_path / "scratch") == []
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "scratch"] and len(corpus.read(0, 10)) == 10


def test_long_text_warns_of_nothing_and_settings_of_the_tokenizer_do_not_cut(write, capfd):
    short = make_tokenizer(model_max_length=8)
    short.backend_tokenizer.enable_truncation(8)
    short.backend_tokenizer.enable_padding(length=50)
    corpus = build_corpus(write([{"text": "the quick fox " * 20}]), short, CorpusOptions())
    assert corpus.lengths[0] > 50 and capfd.readouterr().err == ""


def test_importing_is_light():
    code = (
        "import sys, stages.corpus, stages.chat, stages.sources; "
        "print([m for m in ('datasets', 'transformers', 'torch', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "[]\n", done
