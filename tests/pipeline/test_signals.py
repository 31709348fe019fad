"""Signals that stop a command, in processes of their own: the exit code, the one line, what is left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import click
import psutil
import pytest

from pipeline.signals import saying
from tests.conftest import Tiny
from tests.pipeline import apart

SECONDS = 20


def ended(target: Callable[..., int], *arguments: object, errors: Path) -> tuple[int, str]:
    """How `target` ended in a process of its own, and its standard error."""
    child = apart.start(target, *arguments, errors=str(errors))
    child.join(SECONDS)
    assert child.exitcode is not None, f"it still runs: {errors.read_text()}"
    return child.exitcode, errors.read_text()


def running(action: Callable[[], None]) -> int:
    """The exit code of a command that does `action`."""
    from pipeline.cli import run

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    return run(["act"], click.Group("pipeline", {"act": click.Command("act", callback=action)}))


def stopped_by(number: int) -> int:
    def action() -> None:
        with saying(lambda: "3 of the 10 shards are kept"):
            os.kill(os.getpid(), number)
            time.sleep(SECONDS)

    return running(action)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGHUP, 129, "stopped by SIGHUP"),
    ],
)
def test_a_signal_is_one_line_and_an_exit_code(number: int, code: int, word: str, tmp_path: Path) -> None:
    found = ended(stopped_by, number, errors=tmp_path / "errors")
    assert found == (code, f"{word}; 3 of the 10 shards are kept\n")


def ignored_at_first() -> int:
    """As under `nohup`: the command goes on."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return running(lambda: os.kill(os.getpid(), signal.SIGHUP))


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    assert ended(ignored_at_first, errors=tmp_path / "errors") == (0, "")


class _Swallows:
    """What raises in here is printed by Python and forgotten."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)


def swallowed(how: str) -> int:
    def action() -> None:
        if how == "in a callback":
            _Swallows()
        else:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            except KeyboardInterrupt:
                pass
        time.sleep(SECONDS)

    return running(action)


@pytest.mark.parametrize("how", ["in a callback", "caught"])
def test_a_signal_that_a_library_swallows_comes_again(how: str, tmp_path: Path) -> None:
    assert ended(swallowed, how, errors=tmp_path / "errors") == (143, "stopped by SIGTERM\n")


def turned_into_another_error() -> int:
    def action() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except KeyboardInterrupt as error:
            raise OSError("the connection is gone") from error

    return running(action)


def test_the_error_that_a_signal_became_is_the_signal(tmp_path: Path) -> None:
    assert ended(turned_into_another_error, errors=tmp_path / "errors") == (143, "stopped by SIGTERM\n")


def stuck() -> int:
    def action() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGINT)  # as from `timeout`, which sends two: the same signal
            print("cleaning up", file=os.fdopen(2, "w", closefd=False), flush=True)
            while True:
                time.sleep(1.1)
                os.kill(os.getpid(), signal.SIGINT)

    return running(action)


def test_a_second_signal_ends_a_command_that_is_stuck(tmp_path: Path) -> None:
    assert ended(stuck, errors=tmp_path / "errors") == (130, "cleaning up\n")


def with_a_fork(pid_file: str, how: str) -> int:
    def action() -> None:
        worker = os.fork()
        if worker == 0:
            time.sleep(10 * SECONDS)
            os._exit(0)
        Path(pid_file).write_text(str(worker))
        time.sleep(0.2)
        os.kill(worker, signal.SIGINT)  # a terminal sends it to both
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        alive = psutil.pid_exists(worker)
        os.kill(worker, signal.SIGTERM)
        _, status = os.waitpid(worker, 0)
        assert alive and os.waitstatus_to_exitcode(status) == -signal.SIGTERM

    return running(action)


@pytest.mark.parametrize("how", ["terminated", "killed"])
def test_a_forked_worker_goes_with_its_command(how: str, tmp_path: Path) -> None:
    """And says nothing: not at a Ctrl-C, not when it is terminated."""
    pid = tmp_path / "worker"
    code, said = ended(with_a_fork, str(pid), how, errors=tmp_path / "errors")
    assert (code, said) == ((0, "") if how == "terminated" else (-signal.SIGKILL, ""))
    deadline = time.monotonic() + SECONDS
    while psutil.pid_exists(int(pid.read_text())) and psutil.Process(int(pid.read_text())).status() != "zombie":
        assert time.monotonic() < deadline, "the worker outlives its command"
        time.sleep(0.05)


def test_an_interrupted_cache_says_what_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    words = ["cache-teacher", "--teacher", tiny.teacher, "--dataset", tiny.corpus, "--output", tmp_path / "cache"]
    words += ["--engine", "transformers", "--shard-tokens", 300, "--batch-tokens", 128, "--processes", 1]
    child = apart.start(apart.command, [str(word) for word in words], errors=str(tmp_path / "errors"))
    while not list((tmp_path / "cache" / "shards").glob("*.json")):
        assert child.exitcode is None
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGTERM)
    child.join(SECONDS)
    done = len(list((tmp_path / "cache" / "shards").glob("*.json")))
    total = len(json.loads((tmp_path / "cache" / "manifest.json").read_text())["shards"])
    last = (tmp_path / "errors").read_text().splitlines()[-1]
    assert child.exitcode == 143
    assert last == f"stopped by SIGTERM; {done} of the {total} shards are kept; start the same command again to go on"
    assert 0 < done < total
