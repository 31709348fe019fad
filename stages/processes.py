"""Rows to records in one or several processes, each with a stretch of the rows and an Arrow file of its own.

The order of the records is that of the rows, however many processes there are. Only the parent hears of Ctrl-C, and
ends the others; the first error of one of them is the error of all.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from stages.counting import counting
from storage.errors import RunError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# A batch of rows, by column, and their numbers -> records.
Encode = Callable[[dict[str, list[Any]], list[int]], "pa.Table"]


def map_rows(
    encode: Encode, dataset: Dataset, folder: str, *, schema: pa.Schema, batch_rows: int, processes: int, what: str
) -> Dataset:
    """The records of all rows, in order, memory-mapped from files in `folder`. `what`: the source, for messages.

    Raises what `encode` raises, and RunError when a process dies.
    """
    from datasets import Dataset, concatenate_datasets

    bounds = [len(dataset) * number // processes for number in range(processes + 1)]
    parts = [
        _Part(encode, dataset, range(bounds[n], bounds[n + 1]), os.path.join(folder, f"records-{n}.arrow"), batch_rows)
        for n in range(processes)
    ]
    if processes == 1:
        with counting("tokenising", len(dataset), "rows") as advance:
            parts[0].write(schema, advance)
    else:
        _run_all(parts, schema, len(dataset), what)
    return concatenate_datasets([Dataset.from_file(part.path) for part in parts])


class _Part:
    """A stretch of the rows, and the file that gets its records."""

    def __init__(self, encode: Encode, dataset: Dataset, rows: range, path: str, batch_rows: int) -> None:
        self.path = path
        self._encode = encode
        self._dataset = dataset
        self._rows = rows
        self._batch_rows = batch_rows

    def write(self, schema: pa.Schema, advance: Callable[[int], Any]) -> None:
        import pyarrow as pa

        with pa.OSFile(self.path, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for start in range(self._rows.start, self._rows.stop, self._batch_rows):
                stop = min(start + self._batch_rows, self._rows.stop)
                writer.write_table(self._encode(self._dataset[start:stop], list(range(start, stop))))
                advance(stop - start)


def _run_all(parts: list[_Part], schema: pa.Schema, rows: int, what: str) -> None:
    """Run each part in a process of its own; those that still run are ended when one fails, or on Ctrl-C."""
    # A child of `fork` has the tokenizer and the mapped rows already; elsewhere both are sent to it.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    started: dict[Connection, Any] = {}
    try:
        with deaf_children(context):
            for part in parts:
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(part, schema, theirs, os.getpid()))
                process.start()
                theirs.close()  # so that the end of the process is the end of the pipe
                started[ours] = process
        with counting("tokenising", rows, "rows") as advance:
            _listen(started, advance, what)
    finally:
        for pipe, process in started.items():
            process.terminate()
            process.join()
            process.close()
            pipe.close()


def _listen(started: dict[Connection, Any], advance: Callable[[int], Any], what: str) -> None:
    """Take what the processes say until all are done: numbers of rows, None at the end, or an error."""
    waiting = list(started)
    while waiting:
        for pipe in wait(waiting):
            assert isinstance(pipe, Connection)
            try:
                said = pipe.recv()
            except EOFError:
                raise RunError(
                    f"A process that tokenised {what} died, most likely for want of memory; use fewer processes."
                ) from None
            if said is None:
                waiting.remove(pipe)
            elif isinstance(said, BaseException):
                raise said
            else:
                advance(said)


def _work(part: _Part, schema: pa.Schema, pipe: Connection, parent: int) -> None:
    """Write a part's records, in a process that says how far it is."""
    hear_signals()

    def advance(count: int) -> None:
        if os.getppid() != parent:  # it was killed
            os._exit(1)
        pipe.send(count)

    try:
        part.write(schema, advance)
        pipe.send(None)
    except Exception as error:  # noqa: BLE001 - every error is the parent's to raise
        try:
            pipe.send(error)
        except (OSError, TypeError, AttributeError, ValueError):
            with contextlib.suppress(OSError):
                pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def hear_signals() -> None:
    """Let this process, which `deaf_children` started, end on SIGTERM and hear no Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


@contextlib.contextmanager
def deaf_children(context: Any) -> Iterator[None]:
    """Let the processes that are started here hear neither Ctrl-C nor what a handler of ours makes of SIGTERM, from
    their first moment on; what reaches this one meanwhile comes afterwards.
    """
    if not hasattr(signal, "pthread_sigmask") or context.get_start_method() != "fork":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
