"""The ids of the whole text, always: in stretches, without offsets, with a beginning of its own; where spans lie."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from stages import encode, seams
from stages.corpus import CorpusOptions, build_corpus
from stages.encode import encode_spans, has_special_text, special_pattern
from stages.regex_reach import NotUnderstood, Reach
from tests.conftest import texts

SPECIAL = ["<unk>", "<s>", "</s>"]
FOREIGN = ["日本語のテキスト、そして漢字。\n" * 20, "Straße über naïve café — “quoted” …", "👩‍👩‍👧 émoji"]
# As Llama 3 splits, but digits in threes from the right: what stands at the end of a number decides.
DIGITS_FROM_THE_RIGHT = (
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _fast(backend: Tokenizer, trainer: Any, **options: Any) -> PreTrainedTokenizerFast:
    backend.train_from_iterator([*texts()[:12], *FOREIGN], trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**names, **options})


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(DIGITS_FROM_THE_RIGHT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return _fast(backend, trainer)


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """As Llama 2: no words, a space in front, bytes for what is unknown."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    made = _fast(backend, trainers.BpeTrainer(vocab_size=900, special_tokens=specials, show_progress=False))
    inside = made.backend_tokenizer
    inside.pre_tokenizer = None
    inside.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def sentencepiece_unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return _fast(
        backend,
        trainers.UnigramTrainer(vocab_size=700, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
    )


def word_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _fast(backend, trainers.WordPieceTrainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False))


@pytest.fixture(scope="module")
def makes() -> dict[str, PreTrainedTokenizerFast]:
    kinds = (byte_level, sentencepiece_bpe, sentencepiece_unigram, word_piece)
    return {make.__name__: make() for make in kinds}


def with_bos(tokenizer: PreTrainedTokenizerFast, single: str = "<s> $A") -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def hostile_text(rand: random.Random, longest: int) -> str:
    """Code, between runs in which only the start, or the end, decides where tokens begin."""
    runs = [
        lambda n: " " * n,
        lambda n: "a" * n,
        lambda n: "ab" * (n // 2),
        lambda n: "-" * n,
        lambda n: "".join(rand.choice("0123456789") for _ in range(n)),
        lambda n: "".join(rand.choice("ACGT") for _ in range(n)),
        lambda n: "日本語のテキスト" * (n // 8),
        lambda n: "👩‍👩‍👧" * (n // 5),
        lambda n: "".join(rand.choice(["the ", "\n\n", "<s>", "</s>", " é"]) for _ in range(n // 4)),
    ]
    text = ""
    while len(text) < 9000:
        source = rand.choice(texts())
        text += source[: rand.randrange(1500)] + rand.choice(runs)(rand.randrange(longest))
    return text


# ---- stretches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_bpe", "sentencepiece_unigram", "word_piece"])
def test_a_text_in_stretches_has_the_ids_of_the_whole(makes, name, monkeypatch):
    tokenizer = makes[name]
    rand = random.Random(7)
    monkeypatch.setattr(encode, "_STRETCH", 2048)
    sizes: list[int] = []
    encoded = encode._encoded
    monkeypatch.setattr(encode, "_encoded", lambda *given: sizes.append(len(given[1][0])) or encoded(*given))
    joined = 0
    for case in range(8):
        text = hostile_text(rand, 600 if case % 2 else 12)
        sizes.clear()
        ((ids, marks),) = encode_spans(tokenizer, [text], [[(100, 5000)]], add_special_tokens=False)
        joined += len(text) not in sizes  # else it was encoded as a whole in the end
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ids.tolist() == whole["input_ids"]
        expected = [end > 100 and min(start, end - 1) < 5000 for start, end in whole["offset_mapping"]]
        assert marks.tolist() == expected
        ((start, _),) = encode_spans(tokenizer, [text], [[]], add_special_tokens=False, limit=100)
        assert start[:100].tolist() == whole["input_ids"][:100]
    assert joined >= 2


def test_stretches_are_joined_only_where_that_is_safe(makes, monkeypatch):
    monkeypatch.setattr(encode, "_STRETCH", 1024)
    for tokenizer in makes.values():
        for text in ("a" * 9000, "7" * 9001, "ab " * 3000, " " * 9000):
            ((ids, _),) = encode_spans(tokenizer, [text], [[]], add_special_tokens=False)
            assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def unbounded_quotes() -> PreTrainedTokenizerFast:
    """A quotation is one piece: a quote without a partner looks for it to the end of the text."""
    backend = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex('"[^"]*"'), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_lines_without_spaces_and_far_looking_patterns_have_the_ids_of_the_whole(makes, monkeypatch):
    rand = random.Random(3)
    unigram = makes["sentencepiece_unigram"]
    one_word = Tokenizer.from_str(unigram.backend_tokenizer.to_str())
    one_word.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    dashes = "".join("-" * rand.randint(1, 200) + "\n" for _ in range(80))
    rules = "".join(f"|{'|'.join('-' * rand.randint(3, 9) for _ in range(4))}|\n" for _ in range(250))
    lines = "".join(rand.choice(texts()).replace(" ", "") + "\n" for _ in range(40))[:9000]
    quoted = "".join(rand.choice(texts())[: rand.randrange(900)] + rand.choice(['"', ""]) for _ in range(20))
    monkeypatch.setattr(encode, "_STRETCH", 1024)
    for tokenizer in (unigram, PreTrainedTokenizerFast(tokenizer_object=one_word), unbounded_quotes()):
        for text in (dashes, rules, lines, quoted):
            ((ids, _),) = encode_spans(tokenizer, [text], [[]], add_special_tokens=False)
            assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("pattern", "apart", "crossed"),
    [
        (GPT2, ["a ", "a.", "1 ", ". ", "a1", "。\n"], [" a", "'s", "  ", "aa", "\n\n"]),
        (DIGITS_FROM_THE_RIGHT, ["a ", "a.", "1a", ". "], [" a", ".a", ".\n", "11"]),
        (r"(?i:'s|'LL)?[^\r\n\p{L}]?[\p{Lu}\p{M}]*[\p{Ll}[0-9]]+", ["a ", "a."], ["'L", "lA", "1a", " 1", "Aa"]),
        (r'"[^"]*"', [], ["a ", '"a', ". "]),
        (r"\w+(?=[^#]*#)|x{2,}|y{2}", [], ["a ", "a#", "xx", "yy"]),
        (r"x{2,}|y{1}z?|\.?\]", ["zz", "zy", "yy"], ["xx", "yz", ".]"]),
        (r"(?>a|b)++c*?|[\]a&&[^b]]d", ["ca", "da"], ["ab", "ba", "bc", "cc", "ad"]),
    ],
)
def test_the_reach_of_a_pattern_is_read_from_it(pattern, apart, crossed):
    reach = Reach(pattern)
    assert [pair for pair in apart if reach.crosses(*pair, seams._matches)] == []
    assert [pair for pair in crossed if not reach.crosses(*pair, seams._matches)] == []


@pytest.mark.parametrize(
    "pattern", [r"(?<=a)b", r"(a)\1", r"\Aa", r"a\z", r"\X", r"(?<n>a)", r"(?i:ß)", "(a", "a)", "[a"]
)
def test_a_pattern_whose_reach_cannot_be_told_is_said_to_be_so(pattern):
    with pytest.raises(NotUnderstood):
        Reach(pattern)


def test_of_a_long_document_only_what_is_kept_is_encoded(makes, tmp_path, monkeypatch):
    tokenizer, seen = with_bos(makes["byte_level"]), []
    encoded = encode._encoded
    monkeypatch.setattr(encode, "_encoded", lambda *given: seen.append(sum(map(len, given[1]))) or encoded(*given))
    monkeypatch.setattr(encode, "_STRETCH", 4096)
    text = "".join(texts())[:60_000] * 2
    (tmp_path / "a.txt").write_text(text)
    corpus = build_corpus(str(tmp_path / "a.txt"), tokenizer, CorpusOptions(max_length=512))
    assert corpus.report.cut == 1 and sum(seen) < len(text) // 4
    assert corpus.read(0, 1)[0].input_ids.tolist() == tokenizer(text[:4000])["input_ids"][:512]
    seen.clear()
    parts = build_corpus(str(tmp_path / "a.txt"), tokenizer, CorpusOptions(max_length=512, overlong="split"))
    assert max(seen) <= 4096
    pieces = [part.input_ids.tolist() for part in parts.read(0, len(parts))]
    whole = [*pieces[0], *(id for piece in pieces[1:] for id in piece[1:])]
    assert whole == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


# ---- a beginning of its own -------------------------------------------------------------------------------


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece_bpe"])
def test_a_text_that_begins_or_ends_as_the_tokenizer_would_gets_no_second(makes, name, single):
    tokenizer = with_bos(makes[name], single)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    given = ["Hello there", "<s>Hello there", "<s>Hello there</s>", "<s><s>Hello there"]
    found = encode_spans(tokenizer, given, [[(0, len(text))] for text in given], add_special_tokens=True)
    own = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in given]
    ends = [eos] if single.endswith("</s>") else []
    assert found[0][0].tolist() == [bos, *own[0], *ends] and not found[0][1][0] and found[0][1][1:].all()
    assert found[1][0].tolist() == [*own[1], *ends] and found[1][0].tolist().count(bos) == 1
    assert found[2][0].tolist() == own[2] and found[2][0].tolist().count(eos) == 1
    assert found[3][0].tolist() == [*own[3], *ends]  # what the text has itself stays


def test_no_row_has_a_doubled_beginning(makes, tmp_path):
    tokenizer = with_bos(makes["byte_level"])
    (tmp_path / "text.jsonl").write_text('{"text": "<s>Hello there</s>"}\n{"text": "Hello there"}\n')
    first, second = build_corpus(str(tmp_path / "text.jsonl"), tokenizer).read(0, 2)
    assert first.input_ids.tolist() == second.input_ids.tolist()
    assert first.loss_mask.all() and tokenizer.bos_token_id not in first.input_ids[1:]
    (tmp_path / "pair.jsonl").write_text(
        '{"prompt": "<s>Hello", "completion": " there"}\n{"prompt": "Hello", "completion": " there</s>"}\n'
        '{"prompt": "", "completion": "<s>Hello there"}\n'
    )
    first, second, third = build_corpus(str(tmp_path / "pair.jsonl"), tokenizer).read(0, 3)
    assert first.input_ids.tolist() == second.input_ids.tolist() == third.input_ids.tolist()
    assert first.loss_mask.tolist() == second.loss_mask.tolist()
    assert tokenizer.decode(first.input_ids[1:][first.loss_mask]) == " there</s>"
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 5, 6]}')
    assert build_corpus(str(tmp_path / "ids.jsonl"), tokenizer).read(0, 1)[0].input_ids.tolist() == [1, 5, 6]


# ---- tokenizers without offsets ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SentencePiece itself, through a tokenizer that has no offsets."""
    spm = pytest.importorskip("sentencepiece")
    from transformers.models.gpt_sw3.tokenization_gpt_sw3 import GPTSw3Tokenizer

    folder: Path = tmp_path_factory.mktemp("slow")
    words = ["Question what is the weather", "Answer it is four words", "the user asked and it answered"]
    (folder / "words.txt").write_text("\n".join(words * 30))
    spm.SentencePieceTrainer.train(
        input=str(folder / "words.txt"),
        model_prefix=str(folder / "spm"),
        vocab_size=285,
        byte_fallback=True,
        minloglevel=2,
    )
    names = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return GPTSw3Tokenizer(str(folder / "spm.model"), name_or_path="none", **names)


@pytest.mark.parametrize(
    ("prompt", "completion", "trained"),
    [
        ("Question:", "Answer", "Answer"),
        ("Question: ", "Answer", " Answer"),  # a token that reaches over the border is the completion's
        ("Question:", " Answer", " Answer"),
        ("Quest", "ion what", "ion what"),
        ("", "Answer it", " Answer it"),
        ("the wea", "ther is 日本 é", None),
        ("日本 is", " 日本語 four", " 日本語 four"),
    ],
)
def test_without_offsets_the_ids_are_those_of_the_whole(slow, prompt, completion, trained):
    text = prompt + completion
    ((ids, marks),) = encode_spans(slow, [text], [[(len(prompt), len(text))]], add_special_tokens=False)
    assert ids.tolist() == slow(text, add_special_tokens=False)["input_ids"]
    found = "".join(slow.convert_ids_to_tokens(ids[marks].tolist())).replace("▁", " ")
    raw = b"".join(
        bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.replace("▁", " ").encode()
        for piece in slow.convert_ids_to_tokens(ids[marks].tolist())
    ).decode()
    assert raw == trained if trained else raw.endswith(completion), found
    # The mask changes once: from the prompt to the completion.
    assert np.count_nonzero(np.diff(marks.astype(int))) <= 1 and marks[-1]


def test_without_offsets_many_spans_and_long_texts(slow, monkeypatch):
    parts = ["Question what", " is it", "Answer", " it is four", " words"] * 3
    text = "".join(parts)
    ends = np.cumsum([len(part) for part in parts])
    spans = [(int(ends[n] - len(parts[n])), int(ends[n])) for n in range(1, len(parts), 2)]
    ((ids, marks),) = encode_spans(slow, [text], [spans], add_special_tokens=False)
    assert ids.tolist() == slow(text, add_special_tokens=False)["input_ids"]
    pieces = slow.convert_ids_to_tokens(ids.tolist())
    at = np.cumsum([len(piece) for piece in pieces]) - 1  # one character in front of the text
    inside = [
        any(end > start and end - len(piece) < stop for start, stop in spans)
        for piece, end in zip(pieces, at.tolist(), strict=True)
    ]
    assert marks.tolist() == inside
    monkeypatch.setattr(encode, "_STRETCH", 64)
    ((start, _),) = encode_spans(slow, [text * 20], [[(3, 900)]], add_special_tokens=True, limit=30)
    assert start.tolist() == slow(text * 20)["input_ids"][:30]


# ---- special tokens in text -------------------------------------------------------------------------------


def test_special_text_is_what_the_tokenizer_reads_so(makes):
    pattern = special_pattern(makes["byte_level"])
    assert has_special_text(pattern, "say </s> and go on") and not has_special_text(pattern, "a </ s> <S>")
    chat = [{"role": "user", "content": [{"type": "text", "text": "<s>"}]}]
    assert has_special_text(pattern, chat) and not has_special_text(pattern, [{"role": "user", "content": None}])
    assert special_pattern(makes["word_piece"]) is not None
    plain = with_bos(makes["byte_level"])
    plain.split_special_tokens = True
    assert special_pattern(plain) is None and not has_special_text(None, "</s>")
    assert has_special_text(special_pattern(ByT5Tokenizer()), "x</s>")


def test_rows_with_special_text_are_counted(makes, tmp_path):
    tokenizer = with_bos(makes["byte_level"])
    (tmp_path / "a.jsonl").write_text('{"text": "say </s> twice </s>"}\n{"text": "say it"}\n{"text": "<s>"}\n')
    assert build_corpus(str(tmp_path / "a.jsonl"), tokenizer).report.special_text == 2
    (tmp_path / "b.jsonl").write_text('{"prompt": "<s>a", "completion": "b"}\n{"prompt": "a", "completion": "b"}\n')
    assert build_corpus(str(tmp_path / "b.jsonl"), tokenizer).report.special_text == 1
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    user = '{"role": "user", "content": "%s"}, {"role": "assistant", "content": "yes"}'
    rows = [f'{{"messages": [{user % content}]}}\n' for content in ("hello", "hello </s>")]
    (tmp_path / "c.jsonl").write_text("".join(rows))
    assert build_corpus(str(tmp_path / "c.jsonl"), tokenizer).report.special_text == 1
