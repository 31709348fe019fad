"""A corpus of real text that needs no download: the documentation and source of Python's standard library.

The demo must run offline and in minutes, yet a teacher trained on made-up sentences has nothing worth
distilling. Every Python carries several megabytes of real prose and code, so the corpus is cut from those.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests and generated tables are large, repetitive and unlike the rest; the others are programs.
EXCLUDED_FOLDERS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata", "plat-")
PIECE_CHARACTERS = 800  # about 230 tokens of the demo's tokenizer, so that nine rows in ten are one sequence
MINIMUM_PIECE_CHARACTERS = 80


class CorpusError(RuntimeError):
    """This Python carries too little text for the corpus that was asked for."""


@dataclass(frozen=True)
class Corpus:
    """Where the three disjoint parts of the corpus lie, and how many characters each holds."""

    teacher: Path
    transfer: Path
    heldout: Path
    characters: dict[str, int]


def build_corpus(
    output_dir: str | Path,
    transfer_characters: int = 600_000,
    heldout_characters: int = 200_000,
    limit_characters: int | None = None,
) -> Corpus:
    """Write `teacher.jsonl`, `transfer.jsonl` and `heldout.jsonl`, rows `{"text": ...}`, no text in two.

    `heldout` is seen by neither the teacher nor a student, so both are measured on it.
    `limit_characters` stops collecting there, for a quick trial. One Python always writes the same bytes.
    """
    # by digest: a shuffle that needs no random generator
    pieces = sorted(_pieces(limit_characters), key=_digest)
    total = sum(map(len, pieces))
    if total < 2 * (transfer_characters + heldout_characters):
        raise CorpusError(
            f"The standard library at {_standard_library()} gave {total:,} characters of text, too few to "
            f"set aside {transfer_characters:,} for the students and {heldout_characters:,} held out and "
            "leave the teacher at least as many. Ask for fewer, or use a Python whose library is installed "
            "as .py files."
        )
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    remaining = iter(pieces)
    paths: dict[str, Path] = {}
    characters: dict[str, int] = {}
    for name, size in (
        ("heldout", heldout_characters),
        ("transfer", transfer_characters),
        ("teacher", total),
    ):
        paths[name] = output_dir / f"{name}.jsonl"
        characters[name] = _write(paths[name], remaining, size)
    return Corpus(**paths, characters=characters)


def read_texts(path: str | Path) -> Iterator[str]:
    """The texts of a JSONL file, in order."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _write(path: Path, pieces: Iterator[str], size: int) -> int:
    """Take pieces until `size` characters are written or none is left; the characters written."""
    written = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        while written < size and (piece := next(pieces, None)) is not None:
            file.write(json.dumps({"text": piece}) + "\n")
            written += len(piece)
    return written


def _pieces(limit_characters: int | None) -> Iterator[str]:
    seen: set[bytes] = set()
    collected = 0
    for document in _documents():
        for piece in _cut(document):
            if (digest := _digest(piece)) not in seen:
                seen.add(digest)
                collected += len(piece)
                yield piece
        if limit_characters is not None and collected >= limit_characters:
            return


def _documents() -> Iterator[str]:
    """The language reference, then of each module its docstrings and its source without them."""
    yield from _topics()
    for path in _sources():
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old modules hold invalid escapes, not ours to report
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):  # unreadable, another encoding, or a template
            continue
        module = ".".join(path.relative_to(_standard_library()).with_suffix("").parts)
        prose, code = _separate(source, tree, module)
        yield prose
        yield code


def _topics() -> list[str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):  # some distributions ship the documentation apart
        return []
    return [topics[name] for name in sorted(topics)]


def _sources() -> list[Path]:
    """The library's modules, in the same order on every machine."""
    root = _standard_library()
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        prefixed = any(part.startswith(EXCLUDED_PREFIXES) for part in parts)
        if not prefixed and EXCLUDED_FOLDERS.isdisjoint(parts):
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _separate(source: str, tree: ast.Module, module: str) -> tuple[str, str]:
    """The docstrings as prose under their names, and the source without them, so that no text comes twice."""
    lines = source.split("\n")  # as ast counts them; splitlines would also break at form feeds
    paragraphs: list[tuple[int, str]] = []
    dropped: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node, clean=False)
        if docstring is None:
            continue
        statement = node.body[0]
        span = range(statement.lineno - 1, statement.end_lineno)
        if not lines[span[0]].lstrip().startswith(("'", '"', "r", "R")):
            continue  # a docstring that shares its line with code stays there
        dropped.update(span)
        name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
        paragraphs.append((statement.lineno, f"{name}\n\n{inspect.cleandoc(docstring)}\n"))
    code = "\n".join(line for index, line in enumerate(lines) if index not in dropped)
    return "\n".join(text for _, text in sorted(paragraphs)), code


def _cut(document: str) -> Iterator[str]:
    """Pieces of about PIECE_CHARACTERS, cut where a line starts at the margin or, failing that, anywhere."""
    piece: list[str] = []
    size = 0
    for line in document.splitlines():
        line = line.rstrip()[: 2 * PIECE_CHARACTERS]
        margin = line[:1].strip() != ""
        too_long = size + len(line) > PIECE_CHARACTERS
        if piece and (too_long or (margin and size > PIECE_CHARACTERS * 3 // 4)):
            yield from _kept(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line) + 1
    yield from _kept(piece)


def _kept(piece: list[str]) -> Iterator[str]:
    text = "\n".join(piece).strip("\n")
    if len(text) >= MINIMUM_PIECE_CHARACTERS:
        yield text
