"""Work on what may be somebody else's program or bomb, in a process of its own with limits on memory and time.

A tokenizer is a program: its normalisers may explode, its regular expressions backtrack without end or panic. A Parquet
file of a kilobyte may unpack into more than a machine has. There the system ends a process of ours, not this one.

On Linux; elsewhere the work is done in this process, without the limits.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

from stages.parent_watch import end_fork_with_parent
from stages.processes import deaf_children, hear_signals
from storage.errors import UserError

_T = TypeVar("_T")
# Bytes of one thing that a process sends.
_MOST_SENT = 1 << 30
Send = Callable[[Any], None]


class LimitError(Exception):
    """The process was ended: by its time, its memory, or a crash. Its text is a reason, as in "takes more than 2 s"."""


def limited(call: Callable[[], _T], *, memory: int, seconds: float | None = None, most_bytes: int = _MOST_SENT) -> _T:
    """Return what `call` returns, which JSON has a word for, as `items` does what it sends."""
    found: list[_T] = list(items(lambda send: send(call()), memory=memory, seconds=seconds, most_bytes=most_bytes))
    return found[0]


def items(
    work: Callable[[Send], None], *, memory: int, seconds: float | None = None, most_bytes: int = _MOST_SENT
) -> Iterator[Any]:
    """Yield what `work` sends, in order: JSON values, from a process that may take `memory` bytes more than this one.

    seconds: for all of it. most_bytes: of one value as JSON. Raises LimitError, and the UserError that `work` raises;
    any other error of it is a LimitError too, for nothing is known of a program of others.
    """
    if sys.platform != "linux":
        found: list[Any] = []
        work(found.append)
        yield from found
        return
    context: Any = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    parent = os.getpid()
    with deaf_children(context):
        # Not a Process, of which a daemon may have none.
        child = os.fork()
        if not child:
            _work(work, theirs, memory, parent)
    theirs.close()
    until = None if seconds is None else time.monotonic() + seconds
    try:
        while True:
            if not ours.poll(None if until is None else max(0.0, until - time.monotonic())):
                raise LimitError(f"takes more than {seconds:g} s")
            try:
                kind, value = json.loads(ours.recv_bytes(most_bytes))
            except EOFError:
                # By the kernel's killer of processes, or by Arrow and Rust, which end where there is no memory.
                raise LimitError("ends the process that works on it") from None
            except OSError:
                raise LimitError(f"gives more than {most_bytes:,} bytes at once") from None
            if kind == "done":
                return
            if kind == "limit":
                raise LimitError(value)
            if kind == "refused":
                raise UserError(value)
            yield value
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
        ours.close()


def _work(work: Callable[[Send], None], pipe: Connection, memory: int, parent: int) -> NoReturn:
    """Do the work and end the process, whatever happens."""
    try:
        _send_all(work, pipe, memory, parent)
    finally:
        # Nothing of the parent's is to be put in order here.
        os._exit(0)


def _send_all(work: Callable[[Send], None], pipe: Connection, memory: int, parent: int) -> None:
    end_fork_with_parent(parent)
    hear_signals()
    # What it may say of its own end is no message of ours.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    faulthandler.disable()
    _limit_memory(memory)

    def send(value: Any) -> None:
        if os.getppid() != parent:
            os._exit(1)
        pipe.send_bytes(_text("item", value))

    try:
        work(send)
        answer = _text("done", None)
    except UserError as error:
        answer = _text("refused", str(error))
    except MemoryError:
        answer = _text("limit", f"takes more than {memory:,} bytes of memory")
    except BaseException as error:  # noqa: BLE001 - a panic of Rust is no Exception
        said = " ".join(str(error).split())[:160]
        answer = _text("limit", f"fails with {type(error).__name__}{': ' if said else ''}{said}")
    with suppress(OSError):
        pipe.send_bytes(answer)
    pipe.close()


def _text(kind: str, value: Any) -> bytes:
    # JSON, for a pickle would be a way out of the process.
    return json.dumps([kind, value]).encode()


def _limit_memory(memory: int) -> None:
    import resource

    with open("/proc/self/statm") as file:
        # Of the data segment, which RLIMIT_DATA counts, this is an upper bound: all that is mapped for writing.
        data = int(file.read().split()[5]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = data + memory
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    # A core file of a crash would be as large.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
