"""The signals that stop a command: Ctrl-C, and those of Slurm, Kubernetes, `timeout` and a terminal that closes.

Each becomes an exception, so that a command ends as it does after Ctrl-C: its engine and workers end, what is written
stays whole. A second signal ends the process at once, for where the first one is stuck.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stages.parent_watch import end_fork_with_parent

_STOPPING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]  # Windows has no SIGHUP
# `timeout` sends its signal to the process and to its group, and a hand on Ctrl-C trembles: that is one signal.
_SAME_SECONDS = 1.0
_AGAIN_SECONDS = 0.1


@dataclass
class Stop:
    """Holds the `number` of a signal that has come, and the moment, by time.monotonic.

    reported: it reached the end of the command. lost: a library has swallowed it, and it is on its way again.
    """

    number: int | None = None
    at: float = 0.0
    reported: bool = False
    lost: bool = False

    @property
    def exit_code(self) -> int:
        return 128 + (self.number or signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal asks this command to stop."""

    def __init__(self, stop: Stop) -> None:
        super().__init__()
        self._stop = stop

    def __del__(self) -> None:
        """Send the signal again: whoever caught this, or was called back by code that cannot raise, goes on."""
        stop = self._stop
        if not stop.reported and stop is _active and stop.number is not None:
            stop.lost = True
            threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), stop.number)).start()


_active: Stop | None = None
_fork_hook = False


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Raise Stopped in the main thread at a signal. A signal that is ignored, as under `nohup`, stays ignored.

    In another thread, or inside another `stopping`, nothing is changed.
    """
    global _active
    stop = Stop()
    if threading.current_thread() is not threading.main_thread() or _active is not None:
        yield stop
        return

    def handle(number: int, _frame: object) -> None:
        now = time.monotonic()
        if stop.number is None:
            stop.number, stop.at = number, now
            raise Stopped(stop)
        if stop.lost:
            stop.lost = False
            raise Stopped(stop)
        if now - stop.at > _SAME_SECONDS:
            _end_now(stop.exit_code)

    def unraisable(found: sys.UnraisableHookArgs) -> None:
        if not issubclass(found.exc_type, Stopped):  # it comes again
            print_unraisable(found)

    _hook_forks()
    print_unraisable = sys.unraisablehook
    before = {number: signal.getsignal(number) for number in _STOPPING}
    mine = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    try:
        _active = stop
        for number in mine:
            signal.signal(number, handle)
        sys.unraisablehook = unraisable
        yield stop
    finally:
        for number in mine:
            signal.signal(number, before[number])
        sys.unraisablehook = print_unraisable
        _active = None


def _end_now(code: int) -> None:
    """End this process and its children without a word or a delay."""
    for child in multiprocessing.active_children():
        with contextlib.suppress(Exception):
            child.kill()
    os._exit(code)


def _hook_forks() -> None:
    global _fork_hook
    if not _fork_hook and hasattr(os, "register_at_fork"):
        _fork_hook = True
        os.register_at_fork(after_in_child=_in_fork, before=_before_fork)


_forking = 0


def _before_fork() -> None:
    global _forking
    _forking = os.getpid()


def _in_fork() -> None:
    """In a forked worker of a command: a terminal's Ctrl-C is the command's, `terminate()` ends the worker without a
    word, and the worker goes when the command is killed.
    """
    global _active
    if _active is None:
        return
    _active = None
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    end_fork_with_parent(_forking)


@contextlib.contextmanager
def saying(kept: Callable[[], str]) -> Iterator[None]:
    """Add to an interrupt the sentence that `kept` makes: what is kept of the work, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        with contextlib.suppress(Exception):
            error.add_note(kept())
        raise
