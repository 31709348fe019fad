"""Start an engine that runs in processes of its own, call it, end it, and say what became of it."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import re
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from stages import engine_log
from stages.parent_watch import announce_parent
from storage.errors import RunError, UserError

_Answer = TypeVar("_Answer")
_Engine = TypeVar("_Engine")

_MEMORY = re.compile(
    r"out of memory|available memory|less than desired|not enough \w*\s?memory|allocate memory|MemoryError|bad_alloc|"
    r"available KV cache",
    re.IGNORECASE,
)
_END_SECONDS = 5.0


class EngineNotUsable(UserError):
    """An engine that cannot serve a model, whoever is to blame. cause: why, in the engine's own words."""

    def __init__(self, sentence: str, cause: str) -> None:
        super().__init__(sentence)
        self.cause = cause


class EngineNotStarted(EngineNotUsable, RunError):
    """An engine that was started and did not come to score."""

    exit_code = RunError.exit_code


class EngineKilled(Exception):
    """A process of the engine is gone without a word."""


class EngineGuard:
    """Calls into an engine that runs in processes of its own, and notices when one of them is killed.

    vLLM tells when its engine fails, but a client that waits for an answer waits for ever when the engine is killed
    from outside, as the kernel does when memory runs out. So the waiting is done in a thread that may be left behind.
    An engine without processes of its own is called directly.

    mark: where the output of this engine begins in the log.
    """

    CHECK_SECONDS = 1.0

    def __init__(self, processes: list[Any], mark: int = 0) -> None:
        self._processes = processes
        self.mark = mark
        self._calls: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._lost = False
        if processes:
            threading.Thread(target=self._work, name="vllm-calls", daemon=True).start()

    def _work(self) -> None:
        while True:
            function = self._calls.get()
            try:
                self._answers.put((function(), None))
            except Exception as error:  # noqa: BLE001 - raised again by the caller
                self._answers.put((None, error))

    def call(self, function: Callable[[], _Answer]) -> _Answer:
        if not self._processes:
            return function()
        if self._lost:
            raise EngineKilled("one of its processes is gone")
        self._calls.put(function)
        grace = 2  # checks in which a dead engine may still have told why
        try:
            while True:
                try:
                    answer, error = self._answers.get(timeout=self.CHECK_SECONDS)
                    break
                except queue.Empty:
                    if not all(process.is_alive() for process in self._processes):
                        grace -= 1
                        if not grace:
                            raise EngineKilled(_exits(self._processes)) from None
        except BaseException:  # an interrupt as well: the answer to this call must not be taken for the next one's
            self._lost = True
            raise
        if error is not None:
            raise error
        return answer

    def end(self) -> None:
        """Kill what is left of the engine's processes. The workers below a killed one end by themselves."""
        end_processes(self._processes)


def end_processes(processes: list[Any]) -> None:
    """Kill the processes that still run, and wait for them."""
    for process in processes:
        with contextlib.suppress(Exception):
            process.kill()
    for process in processes:
        with contextlib.suppress(Exception):
            process.join(_END_SECONDS)


def start_guarded(start: Callable[[], _Engine], model: str, advice: str) -> tuple[_Engine, EngineGuard]:
    """Return the engine that `start` makes, and the guard to call it through.

    advice: what to lower when memory runs out, `memory_options`. Raises EngineNotStarted where it does not start; its
    processes are then gone, as they are when the start is interrupted.
    """
    others, mark = set(multiprocessing.active_children()), engine_log.mark()
    announce_parent()
    try:
        with engine_log.captured():
            engine = start()
    except BaseException as error:
        end_processes([child for child in multiprocessing.active_children() if child not in others])
        if isinstance(error, Exception):
            raise not_started(error, model, advice, mark) from error
        raise
    return engine, EngineGuard([child for child in multiprocessing.active_children() if child not in others], mark)


def not_started(error: Exception, model: str, advice: str, mark: int) -> EngineNotStarted:
    """Return what to say of an engine that failed before its first answer. Arguments as of `start_guarded`."""
    if "head_dtype different from the model dtype" in (cause := cause_of(error, mark)):
        return EngineNotStarted(
            f'{model}: its head is quantized; add --vllm-arg hf_overrides={{"head_dtype":"model"}}',
            "the head of the model is quantized",
        )
    remedy = f"; free memory, or lower {advice}" if ran_out_of_memory(cause) else ""
    return EngineNotStarted(f"vLLM cannot serve {model} ({cause}); {engine_log.named()}{remedy}", cause)


def engine_error(error: Exception, advice: str, mark: int) -> RunError:
    """Return what to say of a failure inside a running engine. advice: `memory_options`; mark: of its guard."""
    cause = cause_of(error, mark)
    killed = isinstance(error, EngineKilled) and cause == str(error)
    what = "died" if killed or type(error).__name__ == "EngineDeadError" else "failed"
    sentence = f"the vLLM engine {what} ({cause}); {engine_log.named()}"
    if ran_out_of_memory(cause):
        return RunError(f"{sentence}; lower {advice} and start the same command again to go on")
    if killed:
        # The kernel kills when memory runs out; a person, or a scheduler, may have done it as well.
        return RunError(f"{sentence}; start the same command again to go on; if it dies again, lower {advice}")
    return RunError(f"{sentence}; if the cause has passed, start the same command again to go on")


def ran_out_of_memory(cause: str) -> bool:
    return _MEMORY.search(cause) is not None


def cause_of(error: BaseException, mark: int) -> str:
    """Return the engine's own last cause of `error`: what its log says behind `mark`, else the error itself."""
    if isinstance(error, UserError):
        return str(error)
    pointing = type(error).__name__ in ("EngineDeadError", "EngineKilled") or "root cause" in str(error)
    logged = engine_log.last_cause(mark) if pointing else None
    return logged or _without_pointer(reason(error))


def _without_pointer(sentence: str) -> str:
    """Return vLLM's sentence that a process failed, without its hint to look above."""
    if failed := re.search(r"Failed core proc\(s\): \{(.*)\}", sentence):
        codes = re.sub(r": -(\d+)", r": killed by signal \1", failed.group(1).replace("'", ""))
        return f"its process ended without a word: {codes}" if codes else "its process ended without a word"
    return sentence


def _exits(processes: list[Any]) -> str:
    """Return how the first of the processes that is gone ended."""
    codes = [code for process in processes if (code := process.exitcode) is not None]
    return f"killed by signal {-codes[0]}" if codes and codes[0] < 0 else "one of its processes is gone"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its name."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def reason(error: BaseException) -> str:
    """Return the sentence inside a pydantic error, or the first line of another."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    said = next((line.removeprefix("Value error, ") for line in lines if line.startswith("Value error, ")), None)
    return (said or (lines[0] if lines else type(error).__name__)).split(" [type=")[0][:300]
