"""The demo's corpus and teacher, at a size that takes seconds."""

from __future__ import annotations

import ast
import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIZES = {"transfer_characters": 30_000, "heldout_characters": 10_000, "limit_characters": 200_000}


def demo_module(name: str) -> ModuleType:
    """Import from the `examples` folder, which is not installed and shares its name with `tests/examples`."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(f"demo.{name}")


corpus = demo_module("corpus")


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory: pytest.TempPathFactory):
    return corpus.build_corpus(tmp_path_factory.mktemp("corpus"), **SIZES)


def parts(built) -> list[list[str]]:
    return [list(corpus.read_texts(path)) for path in (built.teacher, built.transfer, built.heldout)]


def test_parts_are_disjoint_and_hold_no_duplicates(small_corpus):
    texts = [text for part in parts(small_corpus) for text in part]
    assert len(set(texts)) == len(texts)
    assert all(len(text) >= corpus.MINIMUM_PIECE_CHARACTERS for text in texts)


def test_sizes_are_those_asked_for_and_reported(small_corpus):
    teacher, transfer, heldout = (sum(map(len, part)) for part in parts(small_corpus))
    assert small_corpus.characters == {"teacher": teacher, "transfer": transfer, "heldout": heldout}
    assert 30_000 <= transfer < 32_000
    assert 10_000 <= heldout < 12_000
    assert teacher > transfer


def test_the_same_python_writes_the_same_bytes(small_corpus, tmp_path):
    again = corpus.build_corpus(tmp_path, **SIZES)
    for name in ("teacher", "transfer", "heldout"):
        assert getattr(again, name).read_bytes() == getattr(small_corpus, name).read_bytes()


def test_without_the_language_reference_the_source_is_enough(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # importing it now fails
    built = corpus.build_corpus(tmp_path, **SIZES)
    assert built.characters["teacher"] > 60_000


def test_too_little_text_is_said_plainly(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "_topics", list)
    monkeypatch.setattr(corpus, "_standard_library", lambda: tmp_path)
    (tmp_path / "only.py").write_text("VALUE = 1\n" * 30)
    with pytest.raises(corpus.CorpusError, match="too few"):
        corpus.build_corpus(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_docstrings_become_prose_and_leave_the_source():
    source = '"""About it."""\n\n\ndef f():\n    r"""Does\n    this."""\n    return 1\n\n\ndef g(): "one line"\n'
    prose, code = corpus._separate(source, ast.parse(source), "package.module")
    assert prose == "package.module\n\nAbout it.\n\npackage.module.f\n\nDoes\nthis.\n"
    assert code.strip().splitlines() == ["def f():", "    return 1", "", "", 'def g(): "one line"']


def test_form_feeds_do_not_shift_the_lines_that_are_removed():
    source = 'A = 1\n\x0c\ndef f():\n    """Words."""\n    return A\n'
    _, code = corpus._separate(source, ast.parse(source), "m")
    assert "Words" not in code
    assert "return A" in code


def test_a_teacher_of_three_steps_loads_like_any_model(small_corpus, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    teacher = demo_module("teacher")

    tokenizer = teacher.train_tokenizer(corpus.read_texts(small_corpus.teacher), tmp_path / "tokenizer", vocab_size=512)
    config = teacher._config(tokenizer, hidden_size=32, layers=1, heads=2)

    def train(name: str):
        return teacher.train_teacher(
            small_corpus.teacher,
            tokenizer,
            tmp_path / name,
            steps=3,
            config=config,
            batch_size=2,
            heldout_path=small_corpus.heldout,
        )

    trained = train("teacher")
    printed = capsys.readouterr().out
    assert "step 3/3" in printed
    assert "tokens/s" in printed
    assert "held-out loss" in printed

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "teacher")
    assert len(loaded) == 512 == model.config.vocab_size
    assert loaded.eos_token == "<|endoftext|>"
    assert model.config.eos_token_id == loaded.eos_token_id
    text = "def naïve(x):\n    return  x  # 日本\n"
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert model.dtype == torch.float32

    loss = teacher.heldout_loss(model, loaded, small_corpus.heldout)
    assert loss == pytest.approx(teacher.heldout_loss(trained, tokenizer, small_corpus.heldout))
    assert 0 < loss < math.log(512) + 1

    for first, second in zip(trained.parameters(), train("again").parameters(), strict=True):
        assert torch.equal(first, second), "the same seed and steps must give the same teacher"


def test_the_student_is_about_a_quarter_of_the_teacher(small_corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    teacher = demo_module("teacher")
    tokenizer = teacher.train_tokenizer(corpus.read_texts(small_corpus.teacher), tmp_path, vocab_size=512)

    def size(config) -> int:
        config.vocab_size = 4096
        return transformers.LlamaForCausalLM(config).num_parameters()

    assert 3 < size(teacher.teacher_config(tokenizer)) / size(teacher.student_config(tokenizer)) < 5


def test_too_few_tokens_for_a_row_is_said_plainly(small_corpus, tmp_path):
    pytest.importorskip("transformers")
    teacher = demo_module("teacher")
    tokenizer = teacher.train_tokenizer(corpus.read_texts(small_corpus.heldout), tmp_path, vocab_size=300)
    with pytest.raises(ValueError, match="at least 256"):
        teacher.pack(tokenizer, ["short"])
