"""Tokenising in several processes: what is said when piped, and that Ctrl-C and errors end all of them in one line."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from stages import counting
from stages.corpus import CorpusOptions, build_corpus
from storage.errors import UserError
from tests.conftest import Tiny

ROOT = Path(__file__).parents[2]


class Slow:
    """A tokenizer that takes its time over each call."""

    def __init__(self, tokenizer: Any, seconds: float) -> None:
        self._tokenizer = tokenizer
        self._seconds = seconds

    def __call__(self, *given: Any, **named: Any) -> Any:
        time.sleep(self._seconds)
        return self._tokenizer(*given, **named)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._tokenizer, name)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "row number {row}"}}\n' for row in range(3000)))
    return path


@pytest.mark.parametrize("processes", [1, 2])
def test_long_tokenising_says_how_far_it_is_when_piped(tiny: Tiny, rows: Path, processes, capfd, monkeypatch):
    monkeypatch.setattr(counting, "INTERVAL", 0.05)
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    slow = build_corpus(str(rows), Slow(tokenizer, 0.1), CorpusOptions(processes=processes))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tokenising")]
    assert lines and all(re.fullmatch(r"tokenising: [\d,]+ of 3,000 rows \(\d+%\), \d s", line) for line in lines)
    monkeypatch.undo()
    assert slow.fingerprint == build_corpus(str(rows), tokenizer, CorpusOptions(processes=3)).fingerprint
    assert capfd.readouterr().err == ""  # what is quick says nothing


def test_the_first_error_ends_the_other_processes(tiny: Tiny, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": 3}\n' + '{"text": "fine"}\n' * 3000)
    before = set(psutil.Process().children(recursive=True))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"The value in row 1 of .*, column 'text' is of type int"):
        build_corpus(str(path), Sleepy(AutoTokenizer.from_pretrained(tiny.tokenizer)), CorpusOptions(processes=2))
    assert time.monotonic() - started < 20
    assert set(psutil.Process().children(recursive=True)) <= before


class Sleepy(Slow):
    """In other processes than this one it would never end."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, 0)
        self._here = os.getpid()

    def __call__(self, *given: Any, **named: Any) -> Any:
        if os.getpid() != self._here:
            time.sleep(600)
        return super().__call__(*given, **named)


_SLOW_COMMAND = """
import sys, time
from stages import row_encoder
encode = row_encoder.encode_spans
def slow(*given, **named):
    time.sleep(0.5)
    return encode(*given, **named)
row_encoder.encode_spans = slow
from pipeline.cli import run
sys.exit(run(sys.argv[1:]))
"""


def test_ctrl_c_while_tokenising_is_one_line(tiny: Tiny, rows: Path, tmp_path: Path):
    words = ["plan", "--teacher", tiny.teacher, "--dataset", rows, "--processes", 3]
    command = [sys.executable, "-c", _SLOW_COMMAND, *map(str, words)]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}
    started = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    )
    ended = time.monotonic() + 60
    while not list(scratch.glob("corpus-*/records-0.arrow")) and time.monotonic() < ended:
        assert started.poll() is None, started.communicate()
        time.sleep(0.02)
    children = psutil.Process(started.pid).children(recursive=True)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to the whole group
    out, err = started.communicate(timeout=60)
    assert (started.returncode, out) == (130, "")
    assert err.count("\n") == 1 and err.startswith("interrupted"), err
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert not list(scratch.iterdir())
