"""End a process when its parent is gone: a killed command must leave no engine behind that holds the device's memory.

A light module: each process that an engine spawns imports it before anything else.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time

_POLL_SECONDS = 0.5
# The names that vLLM gives to its processes.
_ENGINE_NAMES = ("EngineCore", "VllmWorker")
_PR_SET_PDEATHSIG = 1
# In the environment: the process that spawns.
_PARENT = "PIPELINE_PARENT"
_watching = False


def end_with_parent() -> None:
    """Start a thread that ends this process, at once and without cleaning up, when its parent changes.

    A second call only looks whether the parent is still there. A thread sees the parent of the process; the kernel's
    own signal for that (`end_fork_with_parent`) follows the parent's thread, and an engine may be started in a
    short-lived one.
    """
    global _watching
    parent = os.getppid()
    known = multiprocessing.parent_process()
    if known is not None and known.pid != parent:
        os._exit(1)
    if _watching:
        return
    _watching = True

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def end_spawned_with_parent() -> None:
    """Tie a process to the command that spawned it, and leave a terminal's Ctrl-C to that command.

    For the main module of a command: Python imports it again at the start of each process that is spawned, before
    anything else. Does nothing in the command itself, nor where another program imports the module.
    """
    spawning = getattr(multiprocessing.current_process(), "_inheriting", False)
    if spawning and sys.modules["__main__"].__name__ == "__main__":  # `__mp_main__` once that import is over
        # It may be gone before this line is reached; multiprocessing knows it only later.
        if os.environ.get(_PARENT, str(os.getppid())) != str(os.getppid()):
            os._exit(1)
        _ignore_interrupts()
        end_with_parent()
        announce_parent()


def announce_parent() -> None:
    """Tell the processes that this one is going to spawn which process it is."""
    os.environ[_PARENT] = str(os.getpid())


def end_engine_with_parent() -> None:
    """Tie a process of vLLM to the one that started it, whatever program that is; does nothing in any other.

    vLLM has set signal handlers by then; in a process of a command of ours, Ctrl-C is the command's again.
    """
    if _watching:
        _ignore_interrupts()
    if multiprocessing.current_process().name.startswith(_ENGINE_NAMES):
        end_with_parent()


def _ignore_interrupts() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_fork_with_parent(parent: int) -> None:
    """Have the kernel kill this forked process when the thread that forked it ends. parent: its process id.

    Linux alone has this; elsewhere nothing happens. Cheap, and safe right after a fork.
    """
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
