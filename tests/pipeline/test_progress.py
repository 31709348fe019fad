"""Progress and results as they really reach a terminal (a pty) and a file, and the numbers in them."""

from __future__ import annotations

import fcntl
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from pipeline.numbers import format_bytes, format_count, format_duration, format_percent, format_rate, format_share
from pipeline.progress import Progress, printable, summary, table
from storage.words import are, counted

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def on_pty(code: str, columns: int = 100) -> tuple[str, str]:
    """Run Python code with stderr on a terminal and stdout on a pipe; what each received."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=child,
        env={**environment, "TERM": "xterm-256color"},
    )
    os.close(child)
    received = b""
    while True:
        try:
            chunk = os.read(parent, 65_536)
        except OSError:
            break  # Linux reports the end of a pty as EIO.
        if not chunk:
            break
        received += chunk
    os.close(parent)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0, received.decode()
    return received.decode(), stdout.decode()


def plain(text: str) -> str:
    """A terminal's text without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_plain_lines_have_a_fixed_form() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress("caching", 5_000_000, stream=out, clock=clock) as progress:
        for _ in range(12):
            clock.now += 5
            progress.advance(100_000)
    assert out.getvalue().splitlines() == [
        "caching: 200.0k/5.0M tokens (4%), 20.0k tokens/s, 4m00s left",
        "caching: 400.0k/5.0M tokens (8%), 20.0k tokens/s, 3m50s left",
        "caching: 600.0k/5.0M tokens (12%), 20.0k tokens/s, 3m40s left",
        "caching: 800.0k/5.0M tokens (16%), 20.0k tokens/s, 3m30s left",
        "caching: 1.0M/5.0M tokens (20%), 20.0k tokens/s, 3m20s left",
        "caching: 1.2M/5.0M tokens (24%), 20.0k tokens/s, 3m10s left",
        "caching: 1.2M/5.0M tokens (24%), 20.0k tokens/s, 1m00s in all",
    ]


def test_work_done_before_is_done_and_not_speed() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress("caching", 1_000_000, done_before=900_000, stream=out, clock=clock) as progress:
        clock.now += 10
        progress.advance(50_000, note="shard 19/20")
        clock.now += 5
        progress.advance(50_000)
    assert out.getvalue().splitlines() == [
        "caching: 900.0k/1.0M tokens (90%) done before",
        "caching: 950.0k/1.0M tokens (95%), 5.0k tokens/s, 10s left, shard 19/20",
        "caching: 1.0M/1.0M tokens (100%), 6.7k tokens/s, 15s in all, shard 19/20",
    ]


def test_nothing_left_to_do() -> None:
    out = io.StringIO()
    with Progress("caching", 100, done_before=100, stream=out, clock=Clock()):
        pass
    assert out.getvalue().splitlines()[-1] == "caching: 100/100 tokens (100%), 0s in all"


def test_unknown_total() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress("reading", None, stream=out, clock=clock) as progress:
        clock.now += 10
        progress.advance(1500)
    assert out.getvalue().splitlines() == [
        "reading: 1.5k tokens, 150 tokens/s",
        "reading: 1.5k tokens, 150 tokens/s, 10s in all",
    ]


def test_rate_is_of_the_recent_past() -> None:
    """A slow start (compilation, a cold disk) must not haunt the time left."""
    out, clock = io.StringIO(), Clock()
    with Progress("caching", 10**9, stream=out, clock=clock) as progress:
        for step in range(200):
            clock.now += 1
            progress.advance(10 if step < 100 else 1000)
        assert "1.0k tokens/s" in out.getvalue().splitlines()[-1]
        clock.now += 1000
        progress.advance(0)
        stalled = re.search(r"([\d.]+) tokens/s", out.getvalue().splitlines()[-1])
        assert stalled is not None
        assert float(stalled.group(1)) < 40


def test_rate_survives_steps_longer_than_its_window() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress("caching", 10**6, stream=out, clock=clock, interval=0) as progress:
        for _ in range(30):
            clock.now += 120
            progress.advance(1200)
            assert "10 tokens/s" in out.getvalue().splitlines()[-1]
        clock.now += 60
        progress.advance(0)
        assert re.search(r"9\.\d tokens/s", out.getvalue().splitlines()[-1])


def test_many_small_steps_keep_few_samples() -> None:
    clock = Clock()
    with Progress("caching", 10**6, stream=io.StringIO(), clock=clock) as progress:
        for _ in range(100_000):
            clock.now += 0.001
            progress.advance(1)
        assert len(progress._rate._samples) < 200
        rate = progress._rate.per_second(clock.now)
        assert rate is not None
        assert math.isclose(rate, 1000, rel_tol=0.05)


def test_a_failure_says_stopped() -> None:
    out, clock = io.StringIO(), Clock()

    def fail() -> None:
        with Progress("caching", 100, stream=out, clock=clock) as progress:
            clock.now += 1
            progress.advance(50)
            raise ValueError("odd")

    with pytest.raises(ValueError, match="odd"):
        fail()
    assert out.getvalue() == "caching: 50/100 tokens (50%), 50 tokens/s, 1s in all (stopped)\n"


def test_advance_from_many_threads_loses_nothing() -> None:
    out = io.StringIO()

    def work(progress: Progress) -> None:
        for _ in range(2000):
            progress.advance(1)

    with Progress("caching", 16_000, stream=out, interval=0) as progress:
        threads = [threading.Thread(target=work, args=(progress,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = out.getvalue().splitlines()
    assert lines[-1].startswith("caching: 16.0k/16.0k tokens (100%), ")
    assert all(line.startswith("caching: ") for line in lines)


def test_status_and_note_are_escaped_when_piped() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress("caching", 100, stream=out, clock=clock, interval=0) as progress:
        progress.status("skipped \x1b[31m[red]row[/red]\nnext")
        clock.now += 1
        progress.advance(100, note="\x07x")
    assert out.getvalue().splitlines()[0] == "skipped \\x1b[31m[red]row[/red] next"
    assert out.getvalue().splitlines()[1].endswith(", \\x07x")


WORK = """
import sys, time
from pipeline.progress import Progress, summary
with Progress("caching", 2000, done_before=1000) as progress:
    for i in range(10):
        progress.advance(100, note=f"shard {i}")
        if i == 5:
            progress.status("kept [bold]as it is[/bold]")
            print("a result")
        time.sleep(0.1)
summary("Cache", [("tokens", 2000)])
"""


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_gets_a_bar(columns: int) -> None:
    stderr, stdout = on_pty(WORK, columns)
    text = plain(stderr)
    frames = [frame.strip() for frame in re.split(r"[\r\n]+", text) if frame.strip()]
    assert "kept [bold]as it is[/bold]" in frames
    assert stdout == "a result\nCache\ntokens: 2000\n", "stdout belongs to the result"
    bars = [frame for frame in frames if frame.startswith("caching")]
    assert len(bars) > 2
    assert all(len(bar) <= columns for bar in bars)
    words = r"[━╸╺] 1\.\dk/2\.0k tokens \(\d+%\)  [\d.]+k? tokens/s  \d+s elapsed  \d+s left"
    assert any(re.search(words, bar) for bar in bars)
    assert any("shard 9" in bar for bar in bars)
    assert re.search(r"2\.0k/2\.0k tokens \(100%\)  [\d.]+k? tokens/s  \d+s elapsed", bars[-1])
    assert "\x1b[?25h" in stderr, "the cursor is shown again"


def test_a_narrow_terminal_keeps_what_matters() -> None:
    stderr, _ = on_pty(WORK.replace("shard {i}", "shard {i} of a long name"), 60)
    bars = [frame for frame in re.split(r"[\r\n]+", plain(stderr)) if frame.startswith("caching")]
    assert any(re.search(r"[━╸╺] 1\.\dk/2\.0k tokens \(\d+%\)  [\d.]+k? tokens/s  \d+s left$", bar) for bar in bars)
    assert not any("…" in bar or "shard" in bar for bar in bars)


def test_a_dumb_terminal_gets_lines() -> None:
    stderr, _ = on_pty("import os; os.environ['TERM'] = 'dumb'\n" + WORK)
    assert "\x1b" not in stderr
    assert "caching: 2.0k/2.0k tokens (100%), " in stderr


def test_summary_and_table_piped() -> None:
    out = io.StringIO()
    summary("Cache", [("teacher", "org/model"), ("tokens", 5), ("note", "a\tb\x1b[0m")], stream=out)
    assert out.getvalue() == "Cache\nteacher: org/model\ntokens: 5\nnote: a b\\x1b[0m\n"
    out = io.StringIO()
    table("Shards", ["shard", "rows"], [["part-00000", 12], ["part-00001", 7]], stream=out)
    assert out.getvalue() == "Shards\nshard\trows\npart-00000\t12\npart-00001\t7\n"


def test_summary_and_table_on_a_terminal() -> None:
    path = "/very/long/" + "x" * 100 + "/path"
    text, _ = on_pty(
        "import sys\nfrom pipeline.progress import summary, table\n"
        f"summary('Cache', [('path', {path!r}), ('markup', '[red]x[/red]')], stream=sys.stderr)\n"
        "table('Shards', ['shard', 'rows'], [['part-00000', 12]], stream=sys.stderr)\n",
        columns=60,
    )
    text = plain(text)
    assert "[red]x[/red]" in text
    assert "Shards" in text
    assert "part-00000" in text
    assert "…" not in text
    assert text.count("x") > 100, "a long path is folded, not cut"


def test_printable() -> None:
    assert printable("a\u202eb") == "a\\u202eb"
    assert printable("naïve 模型 🙂\u00a0ok") == "naïve 模型 🙂 ok"
    assert printable(5) == "5"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (format_count(0), "0"),
        (format_count(999), "999"),
        (format_count(1000), "1.0k"),
        (format_count(12_345), "12.3k"),
        (format_count(999_949), "999.9k"),
        (format_count(999_950), "1.0M"),
        (format_count(-1500), "-1.5k"),
        (format_count(7.5e15), "7500.0T"),
        (format_count(math.nan), "unknown"),
        (format_bytes(950), "950 B"),
        (format_bytes(1_234_000_000), "1.2 GB"),
        (format_bytes(math.inf), "unknown"),
        (format_duration(0), "0s"),
        (format_duration(59.6), "1m00s"),
        (format_duration(312), "5m12s"),
        (format_duration(3599.5), "1h00m"),
        (format_duration(7380), "2h03m"),
        (format_duration(273_600), "3d04h"),
        (format_duration(math.inf), "unknown"),
        (format_duration(-1), "unknown"),
        (format_percent(1.2, 5), "24%"),
        (format_percent(99_999, 100_000), "99%"),
        (format_percent(1, 0), "unknown"),
        (format_rate(12_345), "12.3k tokens/s"),
        (format_rate(0.42), "0.4 tokens/s"),
        (format_rate(0), "0 tokens/s"),
        (format_rate(9.99, "sequences"), "10 sequences/s"),
        (format_rate(math.nan), "unknown"),
    ],
)
def test_numbers(shown: str, expected: str) -> None:
    assert shown == expected


def test_loading_is_no_part_of_the_rate() -> None:
    """Twenty minutes of loading before fifty seconds of work must not say that hours are left."""
    out, clock = io.StringIO(), Clock()
    with Progress("caching", 100_000, stream=out, clock=clock) as progress:
        clock.now += 1200
        progress.advance(0)
        for _ in range(4):
            clock.now += 10
            progress.advance(20_000)
    assert out.getvalue().splitlines() == [
        "caching: 20.0k/100.0k tokens (20%), 2.0k tokens/s, 40s left",
        "caching: 40.0k/100.0k tokens (40%), 2.0k tokens/s, 30s left",
        "caching: 60.0k/100.0k tokens (60%), 2.0k tokens/s, 20s left",
        "caching: 80.0k/100.0k tokens (80%), 2.0k tokens/s, 10s left",
        "caching: 80.0k/100.0k tokens (80%), 2.0k tokens/s, 20m40s in all (20m00s of it loading)",
    ]


def test_a_note_without_tokens_does_not_start_the_clock_anew() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress("training", 100, stream=out, clock=clock) as progress:
        clock.now += 5
        progress.advance(50)
        clock.now += 5
        progress.advance(0, note="loss 1")
    assert out.getvalue().splitlines()[-1] == "training: 50/100 tokens (50%), 5.0 tokens/s, 10s in all, loss 1"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (counted(1, "shard"), "1 shard"),
        (counted(0, "shard"), "0 shards"),
        (counted(12_000, "shard"), "12000 shards"),
        (counted(12_000, "shard", ","), "12,000 shards"),
        (are(1) + are(0) + are(2), "isareare"),
        (format_share(0.0076), "0.8%"),
        (format_share(1.0), "100.0%"),
        (format_share(math.nan), "unknown"),
    ],
)
def test_words(shown: str, expected: str) -> None:
    assert shown == expected
