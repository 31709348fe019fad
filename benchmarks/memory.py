"""Peak memory of a stretch of work, on a CPU or on a CUDA device."""

from __future__ import annotations

import threading

import psutil


class PeakMemory:
    """Peak resident memory of this process and its children while inside, above what it was on entry.

    With `cuda`, the peak of what torch has allocated on the device instead. `growth_mb` is there after the exit.
    """

    def __init__(self, *, cuda: bool = False) -> None:
        self._cuda = cuda
        self.growth_mb = 0.0

    def __enter__(self) -> PeakMemory:
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        self._stop = threading.Event()
        self._start = self._peak = self._now()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._cuda:
            import torch

            self._peak = torch.cuda.max_memory_allocated()
        else:
            self._stop.set()
            self._thread.join()
        self.growth_mb = (self._peak - self._start) / 1e6

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._peak = max(self._peak, self._now())

    @staticmethod
    def _now() -> int:
        total = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
        return total
