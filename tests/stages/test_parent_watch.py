"""Processes that a command spawned end when it is killed, from their first moment on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
# The main module of a command, as far as its children are concerned.
COMMAND = """
import multiprocessing, os, sys, time
from stages.parent_watch import announce_parent, end_spawned_with_parent
end_spawned_with_parent()
def sleep():
    print("started", flush=True)
    time.sleep(100)
if __name__ == "__main__":
    announce_parent()
    child = multiprocessing.get_context("spawn").Process(target=sleep)
    child.start()
    print(child.pid, flush=True)
    if len(sys.argv) > 1:
        time.sleep(float(sys.argv[1]))
        os.kill(os.getpid(), 9)
    time.sleep(100)
"""


def start(tmp_path: Path, *more: object) -> tuple[subprocess.Popen[str], psutil.Process]:
    (tmp_path / "command.py").write_text(COMMAND)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = subprocess.Popen(
        [sys.executable, tmp_path / "command.py", *map(str, more)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert command.stdout is not None
    child = psutil.Process(int(command.stdout.readline()))
    assert more or command.stdout.readline() == "started\n"
    return command, child


def test_a_spawned_process_ends_with_its_command(tmp_path: Path) -> None:
    command, child = start(tmp_path)
    assert child.is_running()
    os.kill(command.pid, signal.SIGKILL)
    command.wait(10)
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not alive


@pytest.mark.parametrize("seconds", [0, 0.02, 0.06])
def test_a_command_that_is_killed_before_its_process_has_begun(seconds: float, tmp_path: Path) -> None:
    command, child = start(tmp_path, seconds)
    command.wait(10)
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not alive


def test_ctrl_c_is_the_commands_and_the_command_outlives_its_shell(tmp_path: Path) -> None:
    command, child = start(tmp_path)
    try:
        child.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert child.is_running() and child.status() != "zombie"
        # It is tied to nobody itself.
        names = {thread.id for thread in psutil.Process(command.pid).threads()}
        assert len(names) == 1
    finally:
        command.kill()
        command.wait(10)
