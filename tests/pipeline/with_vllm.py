"""Programs in processes of their own that need not import vLLM first: forked from one that has, which takes 15 s once.

The engine of a forked command starts as ever, in that process or in processes that it spawns.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

# None of it computes anything: all else is forked off.
_IMPORTED = [
    "datasets",
    "stages.caching",
    "stages.generation",
    "stages.teacher_vllm",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
]


class Process:
    """A forked program, its standard error in a file; the counterpart of subprocess.Popen."""

    def __init__(self, forks: Forks, pid: int, errors: Path) -> None:
        self._forks, self.pid, self.errors = forks, pid, errors
        self.returncode: int | None = None

    @property
    def said(self) -> str:
        return self.errors.read_text(errors="replace")

    def poll(self) -> int | None:
        """Its exit code, negative for a signal, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._forks.ask({"poll": self.pid})
        return self.returncode

    def wait(self, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"still running after {seconds} s: {self.said[-2000:]}")
            time.sleep(0.05)
        return code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Forks:
    """The process that everything is forked from."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._started = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(folder)},  # of the engines' logs
        )

    def start(self, module: str, *words: object, **environment: str) -> Process:
        """`python -m module words...`, with more environment."""
        self._started += 1
        errors = self._folder / str(self._started)
        asked = {"module": module, "words": [str(word) for word in words], "errors": str(errors)}
        pid = self.ask({**asked, "environment": environment})
        assert pid is not None
        return Process(self, pid, errors)

    def ask(self, question: dict[str, object]) -> int | None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the process that forks has died; its message is above"
        return json.loads(answer)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(20)


def _serve() -> None:
    from stages.vllm_engine import import_vllm

    import_vllm()
    for module in _IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        asked = json.loads(line)
        if "poll" in asked:
            ended, status = os.waitpid(asked["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if ended else None), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            _become(asked)


def _become(asked: dict) -> None:
    """In the fork: never returns."""
    for descriptor, path, how in ((0, os.devnull, os.O_RDONLY), (1, os.devnull, os.O_WRONLY)):
        os.dup2(os.open(path, how), descriptor)
    os.dup2(os.open(asked["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(asked["environment"])
    sys.argv = [asked["module"], *asked["words"]]
    code: object = 0
    try:
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001 - it is the end of the process
        traceback.print_exc()
        code = 99
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _serve()
