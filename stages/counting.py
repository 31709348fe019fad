"""Report the progress of a long reading or tokenising: a bar on a terminal, plain lines of a fixed form elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# Seconds between two lines; work that is shorter says nothing.
INTERVAL = 10.0


@contextlib.contextmanager
def counting(doing: str, total: int | None, unit: str) -> Iterator[Callable[[int], Any]]:
    """Give a function that takes finished units, of `total` (None: unknown), for as long as the work takes.

    `unit`: `B` for bytes, else the plural of a noun. Lines go to stderr, from a thread, so they also come while one
    step takes long. Start processes before it rather than inside it.
    """
    if sys.stderr.isatty() and total is None:
        yield lambda count: None  # whoever works without a total shows bars of its own
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        scale = {"unit": "B", "unit_scale": True} if unit == "B" else {"unit": f" {unit}"}
        with tqdm(total=total, desc=doing.capitalize(), delay=1, **scale) as bar:
            yield bar.update
        return
    done, ended, started = [0], threading.Event(), time.monotonic()

    def advance(count: int) -> None:
        done[0] += count

    def speak() -> None:
        while not ended.wait(INTERVAL):
            seconds = time.monotonic() - started
            with contextlib.suppress(OSError, ValueError):  # nobody reads them any more
                print(_line(doing, done[0], total, unit, seconds), file=sys.stderr, flush=True)

    speaker = threading.Thread(target=speak, name="counting", daemon=True)
    speaker.start()
    try:
        yield advance
    finally:
        ended.set()
        speaker.join()


def _line(doing: str, done: int, total: int | None, unit: str, seconds: float) -> str:
    """`tokenising: 1,200 of 5,000 rows (24%), 30 s`."""
    if total is None and not done:
        return f"{doing}: {seconds:.0f} s"
    scale, unit = (1e6, "MB") if unit == "B" else (1.0, unit)
    counts = f"{done / scale:,.0f}"
    if total is not None:
        counts += f" of {total / scale:,.0f}"
    share = f" ({min(100, 100 * done // total)}%)" if total else ""
    return f"{doing}: {counts} {unit}{share}, {seconds:.0f} s"
