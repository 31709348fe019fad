"""What a person sees while work runs and when it is done.

On a terminal: a bar. Piped to a file: plain lines, few, of a fixed form. Progress and status go to stderr,
results to stdout, so that `pipeline ... > result.txt` holds only the result.

Rich is imported where it is used, because every command imports this module and `--help` needs none of it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from pipeline.numbers import format_count, format_duration, format_percent, format_rate

if TYPE_CHECKING:
    from typing import Self

    import rich.progress

# The rate looks back over this much time, and over at least this many steps: one step can take minutes.
_WINDOW_SECONDS = 30.0
_WINDOW_STEPS = 8
# Steps closer together than this are one sample.
_SAMPLE_SECONDS = 0.25
# The narrowest bar, with the spaces around it.
_BAR_COLUMNS = 6


def printable(value: object) -> str:
    """One line without control characters: text from a corpus or a file name must not steer a terminal."""
    return "".join(char if char.isprintable() else _escaped(char) for char in str(value))


def _escaped(char: str) -> str:
    return " " if char.isspace() else char.encode("unicode_escape").decode("ascii")


def on_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can redraw a line."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class _Rate:
    """Tokens per second over the recent past; it falls while nothing arrives."""

    def __init__(self, start: float) -> None:
        self.total = 0
        self._samples: deque[tuple[float, int]] = deque([(start, 0)])

    def add(self, tokens: int, now: float) -> None:
        self.total += tokens
        # The first sample is the start; a later one may be moved while it is still fresh.
        if len(self._samples) > 2 and now - self._samples[-2][0] < _SAMPLE_SECONDS:
            self._samples[-1] = (now, self.total)
        else:
            self._samples.append((now, self.total))
        while len(self._samples) > _WINDOW_STEPS + 1 and self._samples[1][0] <= now - _WINDOW_SECONDS:
            self._samples.popleft()

    def per_second(self, now: float) -> float | None:
        since, before = self._samples[0]
        if self.total == 0 or now <= since:
            return None
        return (self.total - before) / (now - since)


class Progress:
    """Progress of `total_tokens` of work, as a context manager.

    Work that begins with loading says so by `advance(0)` once it has loaded: the speed counts from there.

    total_tokens: tokens of the whole work, None where unknown (then there is no share and no time left).
    done_before: tokens of it that an earlier run did; they count as done and never as speed.
    interval: seconds between two lines when stderr is not a terminal.
    """

    def __init__(
        self,
        description: str,
        total_tokens: int | None,
        *,
        done_before: int = 0,
        interval: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._description = printable(description)
        self._total = total_tokens
        self._done_before = done_before
        self._interval = interval
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._lock = threading.Lock()
        self._note = ""
        self._ended: float | None = None
        self._bar: rich.progress.Progress | None = None
        self._start_clock()

    def _start_clock(self) -> None:
        self._started = self._last_line = self._working_since = self._clock()
        self._rate = _Rate(self._started)

    def __enter__(self) -> Self:
        self._start_clock()
        if on_terminal(self._stream):
            self._bar = self._make_bar()
            self._task = self._bar.add_task("", total=self._total, completed=self._done_before)
            self._bar.start()
        elif self._done_before:
            self._write(f"{self._description}: {self._counts()} done before")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended = self._clock()
            line = self._line(self._ended)
        if self._bar is not None:
            self._bar.stop()
        else:
            self._write(f"{line} (stopped)" if kind else line)

    def advance(self, tokens: int, note: str | None = None) -> None:
        """Add finished tokens; `note` is a word on where the work is, kept until the next one."""
        with self._lock:
            now = self._clock()
            if tokens == 0 and self._rate.total == 0:
                self._working_since = self._last_line = now
                self._rate = _Rate(now)
            else:
                self._rate.add(tokens, now)
            if note is not None:
                self._note = printable(note)
            done = self._done_before + self._rate.total
            line = None
            if self._bar is None and now - self._last_line >= self._interval:
                self._last_line = now
                line = self._line(now)
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif line is not None:
            self._write(line)

    def status(self, message: str) -> None:
        """Print one line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(printable(message), markup=False, highlight=False, soft_wrap=True)
        else:
            self._write(printable(message))

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def _counts(self) -> str:
        done = self._done_before + self._rate.total
        if not self._total:
            return f"{format_count(done)} tokens"
        share = format_percent(min(done, self._total), self._total)
        return f"{format_count(done)}/{format_count(self._total)} tokens ({share})"

    def _speed(self, now: float) -> float | None:
        """The recent rate while the work runs, the mean of the whole run once it has ended."""
        if self._ended is None:
            return self._rate.per_second(now)
        elapsed = self._ended - self._working_since
        return self._rate.total / elapsed if self._rate.total and elapsed > 0 else None

    def _left(self, speed: float | None) -> str:
        if not self._total or not speed:
            return ""
        return f"{format_duration(max(0, self._total - self._done_before - self._rate.total) / speed)} left"

    def _in_all(self, now: float) -> str:
        loading = self._working_since - self._started
        of_it = f" ({format_duration(loading)} of it loading)" if loading >= 1 else ""
        return f"{format_duration(now - self._started)} in all{of_it}"

    def _line(self, now: float) -> str:
        speed = self._speed(now)
        time_part = self._left(speed) if self._ended is None else self._in_all(now)
        parts = [self._counts(), format_rate(speed) if speed is not None else "", time_part, self._note]
        return f"{self._description}: {', '.join(part for part in parts if part)}"

    def _terminal_text(self, columns: int) -> str:
        """The words right of the bar, computed at every redraw so that a stall shows.

        Where the terminal is too narrow, the note goes first, then the elapsed time.
        """
        with self._lock:
            now = self._ended if self._ended is not None else self._clock()
            speed = self._speed(now)
            counts, rate = self._counts(), format_rate(speed) if speed is not None else ""
            elapsed = f"{format_duration(now - self._started)} elapsed"
            left = self._left(speed) if self._ended is None else ""
            note = self._note
        room = columns - len(self._description) - _BAR_COLUMNS
        for parts in (
            (counts, rate, elapsed, left, note),
            (counts, rate, elapsed, left),
            (counts, rate, left),
        ):
            text = "  ".join(part for part in parts if part)
            if len(text) <= room:
                break
        return text

    def _make_bar(self) -> rich.progress.Progress:
        from rich.console import Console
        from rich.progress import BarColumn, ProgressColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column
        from rich.text import Text

        console = Console(file=self._stream)
        text_of = self._terminal_text

        class Words(ProgressColumn):
            def render(self, task: rich.progress.Task) -> Text:
                return Text(text_of(console.width))

        return Bar(
            TextColumn(self._description, markup=False),
            BarColumn(bar_width=None),
            # Only the bar may shrink.
            Words(table_column=Column(no_wrap=True)),
            console=console,
            refresh_per_second=4,
            # Rich would send what others print to stdout to the bar's stderr, also when stdout is a file.
            redirect_stdout=sys.stdout.isatty(),
        )


# Characters of one value.
_LONGEST_CELL = 2000


def summary(title: str, rows: Iterable[tuple[str, object]], stream: TextIO | None = None) -> None:
    """Print named values to stdout: two columns on a terminal, `name: value` lines when piped."""
    stream = stream if stream is not None else sys.stdout
    cells = [(printable(name), _cell(value)) for name, value in rows]
    if on_terminal(stream):
        _print_table(stream, title, None, cells)
        return
    stream.write("".join(f"{line}\n" for line in [printable(title), *(f"{name}: {value}" for name, value in cells)]))
    stream.flush()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], stream: TextIO | None = None) -> None:
    """Print a table to stdout: aligned on a terminal, tab-separated with a header line when piped."""
    stream = stream if stream is not None else sys.stdout
    cells = [tuple(_cell(value) for value in row) for row in rows]
    if on_terminal(stream):
        _print_table(stream, title, columns, cells)
        return
    lines = [printable(title), "\t".join(columns), *("\t".join(row) for row in cells)]
    stream.write("".join(f"{line}\n" for line in lines))
    stream.flush()


def _cell(value: object) -> str:
    """The text of a value; of a long one the beginning, for it may be somebody else's."""
    text = str(value)
    return printable(text if len(text) <= _LONGEST_CELL else f"{text[:_LONGEST_CELL]}... ({len(text):,} characters)")


def _print_table(stream: TextIO, title: str, columns: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    options: dict[str, Any] = {"title": Text(printable(title), style="bold"), "title_justify": "left"}
    drawn = Table(box=SIMPLE if columns else None, show_header=columns is not None, **options)
    for name in columns or ("", ""):
        # Fold rather than cut: a shortened path or hash cannot be copied.
        drawn.add_column(Text(printable(name)), overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    Console(file=stream).print(drawn)
