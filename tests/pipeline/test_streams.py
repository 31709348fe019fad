"""Terminals and files that are not UTF-8, and standard streams that are closed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli

ROOT = Path(__file__).resolve().parents[2]
SAY = r"""
import click, sys; from pipeline import cli; from pipeline.progress import Progress, summary, table
@click.command()
def say():
    click.echo('A\u00e4\u2026\U0001f600')
    click.echo('B\u00e4\u2026', err=True)
    summary('t\u00eft', [('n', '\u65e5')]); table('t', ['\u00e4'], [['\u65e5']])
    with Progress('w\u00f6rk', 10) as progress: progress.advance(10); progress.status('\u65e5')
sys.exit(cli.run([], say))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(
    ("environment", "encoding", "first"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "ascii", r"A\xe4\u2026\U0001f600"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "ascii", r"A\xe4\u2026\U0001f600"),
        ({"PYTHONIOENCODING": "latin-1"}, "latin-1", "A\u00e4\\u2026\\U0001f600"),
        ({"PYTHONIOENCODING": "utf-8"}, "utf-8", "A\u00e4\u2026\U0001f600"),
    ],
)
def test_characters_that_the_encoding_lacks_are_escaped(environment: dict[str, str], encoding: str, first: str) -> None:
    done = run(SAY, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).splitlines()[0] == first
    assert done.stderr.decode(encoding).splitlines()[0].startswith("B")


def test_a_bar_on_a_terminal_that_has_only_ascii() -> None:
    from tests.pipeline.test_progress import on_pty

    code = "import os, sys; sys.stderr.reconfigure(encoding='ascii', errors='strict')\n" + SAY
    stderr, _ = on_pty(code)
    assert stderr.isascii()
    assert r"w\xf6rk" in stderr


@contextmanager
def ascii_stdout() -> Iterator[None]:
    """This process's stdout as on a terminal of that encoding."""
    with open(1, "w", encoding="ascii", closefd=False) as stream:
        before, sys.stdout = sys.stdout, stream
        try:
            yield
        finally:
            sys.stdout = before


@pytest.mark.parametrize("name", [None, *cli.COMMANDS])
def test_help_on_ascii(name: str | None, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    with ascii_stdout():
        assert cli.run([*([name] if name else []), "--help"]) == 0
    assert capfdbinary.readouterr().out.decode("ascii").strip()


def test_closed_streams_are_no_error_and_no_file_takes_their_numbers(tmp_path: Path) -> None:
    code = (
        "import os; [os.close(fd) for fd in (0, 1, 2)]\n"
        "import sys; sys.stdout = sys.stderr = None\n"
        "import click; from pipeline import cli\n"
        "@click.command()\n"
        "def write():\n"
        f"    with open({str(tmp_path / 'shard')!r}, 'w') as file:\n"
        "        assert file.fileno() > 2; file.write('good'); file.flush()\n"
        "        click.echo('said'); os.write(2, b'by a library')\n"
        "code = cli.run([], write)\n"
        f"open({str(tmp_path / 'code')!r}, 'w').write(str(code))"
    )
    run(code)
    assert (tmp_path / "code").read_text() == "0"
    assert (tmp_path / "shard").read_text() == "good"


def test_inspect_of_text_that_ascii_lacks(
    tmp_path: Path, make_cache: Callable[..., Any], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """The fault as it was found: a cache of text beyond ASCII, read where the output is ASCII."""
    (tmp_path / "rows.jsonl").write_text('{"text": "\u00ef\u65e5"}\n')
    make_cache(tmp_path / "cache", dataset=str(tmp_path / "rows.jsonl"))
    for more in ([], ["--masks"]):
        capfdbinary.readouterr()
        with ascii_stdout():
            assert cli.run(["inspect", str(tmp_path / "cache"), *more]) == 0
        assert b"\\xef" in capfdbinary.readouterr().out
