"""Commands in processes of their own that may be killed or starved, forked from a server that has done the imports."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from storage.manifest import Manifest
from tests.storage.synthetic import make_manifest, make_sketch, sketch_options, write_cache

# Of the made-up cache.
SKETCH = make_sketch()

# What a command imports, done once. None of it may start a thread or compute anything, since all else is forked off.
_PRELOAD = [
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "datasets",
    "stages.caching",
    "stages.student",
    "stages.teacher_transformers",
    "stages.training",
    "pipeline.training_progress",
    "tests.pipeline.apart",
]


def processes() -> Any:
    """The multiprocessing context whose children start in a few milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def start(target: Callable[..., object], *arguments: object, errors: str) -> Any:
    """`target(*arguments)` in a process of its own, which ends with what it returns; stderr goes to a file."""
    child = processes().Process(target=_call, args=(target, arguments, errors))
    child.start()
    return child


def _call(target: Callable[..., int | None], arguments: tuple, errors: str) -> None:
    handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(handle, 2)
    os.dup2(nothing, 1)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    # SIGKILL takes nothing from the kernel's cache, so flushing it would only cost time.
    os.fsync = lambda handle: None  # type: ignore[assignment]
    # Two threads that wait for each other on a busy machine are many times slower than one.
    torch.set_num_threads(1)
    code = 99
    try:
        code = target(*arguments) or 0
    except BaseException:  # noqa: BLE001 - it is the end of the process
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def command(words: list[str], limit: int = 0) -> int:
    """The real command; `limit`: bytes beyond which no file may grow."""
    import resource

    from pipeline.cli import run

    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return run(words)


def made_up_manifest() -> Manifest:
    return make_manifest(shard_tokens=14, sketch=sketch_options(SKETCH))  # two shards


def command_killed_in(words: list[str], function: str, times: int, needle: str = "") -> int:
    """The real command, which SIGKILLs itself on entry to the `times`-th call of `module:name`.

    `needle`: only calls count whose arguments, as text, contain it.
    """
    module, _, name = function.partition(":")
    *owners, last = name.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    real = getattr(owner, last)
    calls = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += needle in repr((arguments, named))
        if calls == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    setattr(owner, last, counted)
    return command(words)


def write_made_up_cache(path: str, last_step: int) -> int:
    """Write a made-up cache, and SIGKILL this process before the `last_step`-th thing it does to the disk."""
    from storage import files

    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            step()
            return real(*arguments, **named)

        return call

    write = files.HashingFile.write

    def halves(file: Any, data: Any) -> int:
        view = memoryview(data).cast("B")
        written = write(file, view[: len(view) // 2])
        file._raw.flush()
        step()
        return written + write(file, view[len(view) // 2 :])

    files.HashingFile.write = halves  # type: ignore[method-assign]
    for name in ("fsync", "replace", "link", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    write_cache(Path(path), made_up_manifest(), sketch=SKETCH)
    return 0
