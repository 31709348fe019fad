"""The file that an engine's output goes to, and the cause that is read from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages import engine_log
from stages.engine_guard import EngineKilled, EngineNotStarted, engine_error, not_started, ran_out_of_memory
from stages.engines import BEGAN, Choice, EngineOptions, instead

# Of vLLM 0.32, shortened.
A_WORKER_FAILED = """\
FutureWarning: `torch.distributed.reduce_op` is deprecated
(Worker pid=6844) ERROR 11-26 01:04:04 [multiproc_executor.py:1063] Traceback (most recent call last):
(Worker pid=6844) ERROR 11-26 01:04:04 [multiproc_executor.py:1063]     return self._op(*args, **kwargs)
(Worker pid=6844) ERROR 11-26 01:04:04 [multiproc_executor.py:1063] RuntimeError: Unsupported head_dim=16 isa=2
(EngineCore pid=6805) ERROR 11-26 01:04:04 [core.py:1512] EngineCore encountered a fatal error.
(EngineCore pid=6805) ERROR 11-26 01:04:04 [core.py:1512] RuntimeError: Worker failed with error 'Unsupported \
head_dim=16 isa=2', please check the stack trace above for the root cause
Process EngineCore:
RuntimeError: Worker failed with error 'Unsupported head_dim=16 isa=2', please check the stack trace above for the \
root cause
"""


@pytest.fixture(autouse=True)
def own_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_log, "_path", None)
    monkeypatch.setattr(engine_log, "_on_terminal", False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (A_WORKER_FAILED, "Unsupported head_dim=16 isa=2"),
        (
            "(EngineCore pid=1) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n",
            "CUDA out of memory",
        ),
        ("ImportError: libcudart.so.12: cannot open\n", "ImportError: libcudart.so.12"),
        ("AssertionError\n", "AssertionError"),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, No supported config format [type=value_error, input_value=1]\n",
            "No supported config format",
        ),
        ("terminate called after throwing an instance of 'c10::Error'\n  what():  invalid device\n", "invalid device"),
        ("Fatal Python error: Segmentation fault\n", "Segmentation fault"),
        ("(W pid=1) WARNING 11-26 01:04:04 [a.py:1] ValueError: tried, and went on\n", None),
        ("nothing went wrong\n", None),
    ],
)
def test_the_last_cause_of_an_output(text: str, cause: str | None) -> None:
    found = engine_log.cause_in(text)
    assert found is None if cause is None else found is not None and found.startswith(cause)


def test_what_processes_print_goes_to_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with engine_log.captured():
        os.write(1, b"of this process\n")
        subprocess.run([sys.executable, "-c", "raise ValueError('of another')"], check=False)
    print("ours again")
    mark = engine_log.mark()
    assert mark > 0
    assert engine_log.last_cause() == "of another"
    assert engine_log.last_cause(mark) is None
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("ours again\n", "")
    [log] = tmp_path.iterdir()
    assert "of this process" in log.read_text()
    assert engine_log.named() == f"its log is {log}"


def test_on_the_terminal_nothing_is_taken_away(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine_log.show_on_terminal(True)
    with engine_log.captured():
        os.write(2, b"a traceback\n")
    assert capfd.readouterr().err == "a traceback\n"
    assert engine_log.named() == "its own message is above"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("closed", [1, 2])
def test_a_stream_that_is_closed(closed: int) -> None:
    """As with `2>&-`."""
    code = (
        f"import os; os.close({closed}); from stages import engine_log\n"
        "with engine_log.captured(): os.write(1, b'x') if False else None\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_log_stays_only_where_an_error_names_it(tmp_path: Path) -> None:
    for keeps, left in [("engine_log.named()", 1), ("engine_log.named(); engine_log.forget()", 0), ("None", 0)]:
        code = f"from stages import engine_log\nwith engine_log.captured(): print('x')\n{keeps}"
        folder = tmp_path / str(len(keeps))
        folder.mkdir()
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TMPDIR": str(folder)})
        assert len(list(folder.iterdir())) == left, keeps


def test_advice_only_where_it_can_help() -> None:
    memory = "lower --vllm-arg max_num_batched_tokens=…"
    advice = memory.removeprefix("lower ")
    unsupported = not_started(RuntimeError("Unsupported head_dim=16"), "m", advice, 0)
    assert unsupported.cause == "Unsupported head_dim=16"
    assert "lower" not in str(unsupported) and "again" not in str(unsupported)
    full = not_started(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "m", advice, 0)
    assert memory in str(full) and "again" not in str(full)
    assert memory in str(engine_error(RuntimeError("CUDA out of memory"), advice, 0))
    killed = str(engine_error(EngineKilled("killed by signal 9"), advice, 0))
    assert "died (killed by signal 9)" in killed and "start the same command again" in killed and memory in killed
    assert "lower" not in str(engine_error(RuntimeError("an index is out of bounds"), advice, 0))


@pytest.mark.parametrize(
    "cause",
    [
        "CUDA out of memory. Tried to allocate 20 GiB",
        "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "Free memory on device (3/80 GiB) on startup is less than desired GPU memory utilization (0.9, 72 GiB)",
        "2.0 GiB KV cache is needed, which is larger than the available KV cache memory (1.0 GiB)",
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried",
        "std::bad_alloc",
    ],
)
def test_causes_that_are_memory(cause: str) -> None:
    assert ran_out_of_memory(cause)


def test_what_auto_runs_where_vllm_cannot_serve() -> None:
    error = EngineNotStarted("vLLM cannot serve m (no kernel); its log is l", "no kernel")
    chosen = instead(Choice("vllm", "vLLM is installed"), EngineOptions("m"), error)
    assert (chosen.engine, chosen.reason) == ("transformers", "vLLM cannot serve the teacher: no kernel")
    for reason, options, said in [
        (BEGAN, EngineOptions("m"), "the cache was begun with vLLM, only vLLM can go on with it"),
        ("--engine", EngineOptions("m", "vllm"), "or choose --engine transformers"),
        ("it is installed", EngineOptions("m", vllm_args={"seed": 1}), "or choose --engine transformers"),
    ]:
        with pytest.raises(EngineNotStarted, match=said) as caught:
            instead(Choice("vllm", reason), options, error)
        assert "no kernel" in str(caught.value) and caught.value.exit_code == 1
