"""The frame of the command line: what loads when, how each failure ends, and what every command promises."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import click
import pytest

from pipeline import cli
from storage.errors import CacheError, RunError, UserError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "vllm", "numpy", "rich", "yaml", "pydantic"}


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """`run` sets defaults in the environment of its process; give it back as it was."""
    with mock.patch.dict(os.environ):
        os.environ.pop(cli.DEBUG_VARIABLE, None)
        yield


def group_of(action: Callable[[], None]) -> click.Group:
    """A group like ours with one command `act` that does `action`."""
    group = cli.LazyGroup("pipeline")

    @group.command("act")
    @click.option("--count", type=int, default=1, help="Times, default 1.")
    def act(count: int) -> None:
        action()

    return group


def raising(error: BaseException) -> click.Group:
    def fail() -> None:
        raise error

    return group_of(fail)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_help_imports_nothing_heavy() -> None:
    done = python(
        "import sys; from pipeline.cli import main; main(['--help'], standalone_mode=False); "
        f"loaded = {HEAVY!r} & set(sys.modules); assert not loaded, loaded; "
        "assert not [name for name in sys.modules if name.startswith('pipeline.commands.')]"
    )
    assert done.returncode == 0, done.stderr
    for name, entry in cli.COMMANDS.items():
        assert name in done.stdout
        assert entry.summary.split()[0] in done.stdout


def test_help_of_each_command_imports_nothing_slow() -> None:
    """Parsing options must not wait for torch; a command imports it when it starts to work."""
    slow = {"torch", "transformers", "datasets", "vllm"}
    for name in cli.COMMANDS:
        done = python(
            f"import sys; from pipeline.cli import main; main([{name!r}, '--help'], standalone_mode=False); "
            f"loaded = {slow!r} & set(sys.modules); assert not loaded, loaded"
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_an_example_and_every_option_help_and_default(name: str) -> None:
    root = click.Context(cli.main, info_name="pipeline", **cli.main.context_settings)
    command = cli.main.get_command(root, name)
    assert command is not None
    assert command.help
    assert "Example" in command.help
    assert f"pipeline {name}" in command.help, "the example should be the command itself"
    ctx = click.Context(command, info_name=name, parent=root, **command.context_settings)
    for option in command.get_params(ctx):
        if not isinstance(option, click.Option):
            continue
        assert option.help, f"{name} {option.opts[0]} has no help"
        extra = option.get_help_extra(ctx)
        says_default = option.required or "default" in extra or "default" in option.help.lower()
        assert option.is_flag or says_default, f"{name} {option.opts[0]} says no default"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_takes_debug(name: str) -> None:
    root = click.Context(cli.main, info_name="pipeline")
    for _ in range(2):
        command = cli.main.get_command(root, name)
        assert command is not None
        assert sum("--debug" in param.opts for param in command.params) == 1


def test_no_command_shows_help_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 2
    captured = capsys.readouterr()
    assert "Commands:" in captured.err
    assert captured.out == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("importlib.metadata.version", return_value="1.2.3"):
        assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == "pipeline 1.2.3\n"


def test_version_where_nothing_is_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "DISTRIBUTION", "no-such-distribution-anywhere")
    assert cli.run(["--version"]) == 0
    assert "unknown (no-such-distribution-anywhere is not installed)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["verfy"], "error: no such command 'verfy'; did you mean 'verify'? (see 'pipeline --help')\n"),
        (["zzz"], "there are cache-teacher, plan, train-student, generate, inspect, verify"),
        (["--nonsense"], "No such option '--nonsense'"),
    ],
)
def test_unknown_words_are_refused(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    assert expected in capsys.readouterr().err


def test_success_is_zero_and_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["act"], group_of(lambda: None)) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no such corpus: x.jsonl"), 2),
        (CacheError("part-00000 is cut off"), 2),
        (RunError("out of memory"), 1),
    ],
)
def test_our_errors_are_one_sentence(error: UserError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["act"], raising(error)) == code
    captured = capsys.readouterr()
    assert captured.err == f"error: {error}\n"
    assert captured.out == ""


def test_misuse_of_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["act", "--count", "many"], group_of(lambda: None)) == 2
    sentence = "error: Invalid value for '--count': 'many' is not a valid integer (see 'pipeline act --help')\n"
    assert capsys.readouterr().err == sentence


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["act"], raising(UserError("bad row\n\x1b[2Jgone"))) == 2
    assert capsys.readouterr().err == "error: bad row \\x1b[2Jgone\n"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left on device"),
        (errno.EDQUOT, "disk quota exceeded"),
        (errno.EFBIG, "file larger than"),
        (errno.EROFS, "read-only file system"),
        (errno.EACCES, "permission denied"),
    ],
)
def test_a_disk_that_fails_is_one_sentence(number: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["act"], raising(OSError(number, os.strerror(number), "/cache/part-00001"))) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {words}")
    assert "(/cache/part-00001)" in lines[0]


@pytest.mark.parametrize(
    "error", [ValueError("odd"), EOFError("odd"), FileNotFoundError("odd"), BrokenPipeError("odd")]
)
def test_a_bug_names_itself_without_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """Also a broken pipe that is not our stdout: a lost server must not pass in silence."""
    assert cli.run(["act"], raising(error)) == 1
    captured = capsys.readouterr()
    assert captured.err == (f"error: internal: {type(error).__name__}: odd\nrun again with --debug for the traceback\n")


@pytest.mark.parametrize("arguments", [["--debug", "act"], ["act", "--debug"], ["act"]])
@pytest.mark.parametrize("error", [ValueError("odd"), UserError("odd"), OSError(errno.ENOSPC, "full")])
def test_debug_shows_the_traceback(arguments: list[str], error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    if "--debug" not in arguments:
        os.environ[cli.DEBUG_VARIABLE] = "1"
    assert cli.run(arguments, raising(error)) == getattr(error, "exit_code", 1)
    captured = capsys.readouterr()
    assert "Traceback (most recent call last)" in captured.err
    assert "in fail" in captured.err
    assert captured.err.splitlines()[-1].startswith("error: ")


def test_a_debug_after_the_double_dash_is_an_argument() -> None:
    assert not cli._wants_debug(["act", "--", "--debug"])
    assert cli._wants_debug(["act", "--debug", "--"])


def test_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["act"], raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_exit_and_abort_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["act"], group_of(lambda: click.get_current_context().exit(1))) == 1
    assert capsys.readouterr().err == ""
    assert cli.run(["act"], raising(click.Abort())) == 1
    assert capsys.readouterr().err == "error: aborted\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    code = (
        "import click, sys; from pipeline import cli\n"
        "@click.command()\n"
        "def flood():\n"
        "    for i in range(100000): click.echo('line')\n"
        "sys.exit(cli.run([], flood))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_one_sentence() -> None:
    code = (
        "import click, sys; from pipeline import cli\n"
        "@click.command()\n"
        "def say(): sys.stdout.write('result')\n"
        "sys.exit(cli.run([], say))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no space left on device; ")
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_libraries_are_quiet_only_where_nothing_is_set() -> None:
    for name in ("TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_VERBOSITY"):
        os.environ.pop(name, None)
    os.environ["TRANSFORMERS_VERBOSITY"] = "info"
    cli.run(["act", "--debug"], group_of(lambda: None))
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    cli.run(["act"], group_of(lambda: None))
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "nope"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert re.match(r"error: no such command 'nope'; .*\n$", done.stderr)
