"""The file that an engine's output goes to, and the cause of a failure that the file tells.

vLLM starts processes that print tracebacks of a hundred lines, and libraries below it print warnings of their own.
All of that goes to one file per process of ours, in the directory of temporary files. The file is removed at the end
unless an error has named it. With `show_on_terminal(True)` the output stays where it was, and there is no file.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_on_terminal = False
_path: Path | None = None
_owner = 0
_named = False

# Before a line: vLLM's process, and its logger's level, time and place.
_PREFIX = re.compile(r"^(?:\([^()]*\) ?)?(?:(?P<level>[A-Z]+) \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?")
_EXCEPTION = re.compile(r"^(?P<name>(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Failure))(?:: (?P<said>.*))?$")
_ABORTED = re.compile(r"^(?:\s*what\(\):\s+|Fatal Python error: )(?P<said>.+)$")
# They only say that another process failed, or are how a process hears that another one is gone.
_SECONDARY = re.compile(
    r"root cause|stack trace|Engine core init|EngineDeadError|^(EOF|BrokenPipe|Connection\w*|Cancelled)Error|"
    r"cancelled$|Bad file descriptor|Context was terminated"
)
_PLAIN = ("RuntimeError", "ValueError", "Exception", "OutOfMemoryError", "ValidationError", "TypeError", "RunError")
_LONGEST_CAUSE = 300


def show_on_terminal(shown: bool) -> None:
    """Choose where the output of engines started from now on goes: the terminal, or the file."""
    global _on_terminal
    _on_terminal = shown


def shown_on_terminal() -> bool:
    """Return where the output goes, as `show_on_terminal` chose."""
    return _on_terminal


@contextlib.contextmanager
def captured() -> Iterator[None]:
    """Send this process's standard output and error to the file, and those of each process that is started inside.

    The streams come back at the end; the processes keep the file. Nothing of ours may print inside.
    """
    if _on_terminal:
        yield
        return
    log = os.open(_file(), os.O_WRONLY | os.O_APPEND)
    saved: list[tuple[int, int]] = []
    try:
        _flush()
        for stream in (1, 2):
            with contextlib.suppress(OSError):  # closed: nothing to save, nothing to put back
                saved.append((stream, os.dup(stream)))
                os.dup2(log, stream)
        yield
    finally:
        _flush()
        for stream, copy in saved:
            os.dup2(copy, stream)
            os.close(copy)
        os.close(log)


def take_logger(name: str) -> None:
    """Send what a library logs in this process to the file too, also after `captured`."""
    if _on_terminal:
        return
    for handler in logging.getLogger(name).handlers:
        if type(handler) is logging.StreamHandler and getattr(handler.stream, "name", None) != str(_file()):
            handler.setStream(open(_file(), "a", encoding="utf-8", errors="replace"))  # noqa: SIM115


def mark() -> int:
    """Return the present end of the file, in bytes."""
    return _path.stat().st_size if _path is not None and _owner == os.getpid() and _path.exists() else 0


def last_cause(since: int = 0) -> str | None:
    """Return the engine's own last cause that stands in the file behind `since`, or None."""
    if _path is None or _owner != os.getpid():
        return None
    try:
        with open(_path, "rb") as file:
            file.seek(since)
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    return cause_in(text)


def cause_in(text: str) -> str | None:
    """Return the message of the last exception in an engine's output that does not point to another, or None."""
    prefixed = ((_PREFIX.match(line), line) for line in text.splitlines())
    lines = [(match.group("level"), line[match.end() :]) for match, line in prefixed if match]
    causes: list[str] = []
    for number, (level, line) in enumerate(lines):
        if level not in (None, "ERROR", "CRITICAL"):
            continue
        if found := _EXCEPTION.match(line):
            name, said = found.group("name"), (found.group("said") or "").strip()
            following = lines[number + 1][1].strip() if number + 1 < len(lines) else ""
            if following.startswith("Value error, "):  # pydantic puts the sentence on the next line
                said = following.removeprefix("Value error, ").split(" [type=")[0]
            plain = name.rpartition(".")[2] in _PLAIN and said
            causes.append(said if plain else f"{name}: {said}" if said else name)
        elif found := _ABORTED.match(line):
            causes.append(found.group("said").strip())
    own = [cause for cause in causes if not _SECONDARY.search(cause)]
    return next((cause[:_LONGEST_CAUSE] for cause in reversed(own or causes)), None)


def named() -> str:
    """Return the words that name the file in an error, and keep the file; without a file, say where the output is."""
    global _named
    if _on_terminal or _path is None or _owner != os.getpid():
        return "its own message is above"
    _named = True
    return f"its log is {_path}"


def forget() -> None:
    """Let the file go at the end after all: the failure that named it was got over."""
    global _named
    _named = False


def _file() -> Path:
    """Return the file of this process, made when it is first asked for."""
    global _path, _owner, _named
    if _path is None or _owner != os.getpid() or not _path.exists():
        descriptor, name = tempfile.mkstemp(prefix=f"teacher-logit-cache-engine-{os.getpid()}-", suffix=".log")
        os.close(descriptor)
        _path, _owner, _named = Path(name), os.getpid(), False
        atexit.register(_remove, _path, _owner)
    return _path


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner and not (_named and path == _path):
        path.unlink(missing_ok=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
