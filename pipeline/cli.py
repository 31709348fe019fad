"""The command line `pipeline`: which commands there are, and how each ends.

Commands are imported when they are called, so `pipeline --help` loads none of them. Whatever goes wrong
leaves through `run`, which turns it into one sentence and an exit code: 2 misuse, 1 failed run.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from pipeline.progress import printable
from pipeline.signals import Stop, stopping
from pipeline.streams import ready_streams, say
from pipeline.threads import bound_spinning
from stages import engine_log
from stages.parent_watch import end_spawned_with_parent
from storage.errors import UserError

# First of all in a process that an engine of ours spawned, which imports this module again.
end_spawned_with_parent()

DISTRIBUTION = "teacher-logit-cache"
PROGRAM = "pipeline"
# Characters of an error; commands to start a server, which some name, are shorter.
_LONGEST_SENTENCE = 6000
DEBUG_VARIABLE = "PIPELINE_DEBUG"
# Where `config_file` leaves the path of the configuration file, for messages about values that came from it.
CONFIG_META = "pipeline.config_file"


@dataclass(frozen=True)
class Entry:
    """A command by name: the module that holds it (as `command`), and its line in `pipeline --help`.

    resumes: whether the same command, started again, skips what is done, however little that is.
    """

    module: str
    summary: str
    resumes: bool = False


COMMANDS: dict[str, Entry] = {
    "cache-teacher": Entry(
        "pipeline.commands.cache_teacher",
        "Run the teacher once over a corpus and write its cache of log-probabilities.",
    ),
    "plan": Entry("pipeline.commands.plan", "Say how large a cache will be and what it will cost, before it is made."),
    "train-student": Entry("pipeline.commands.train_student", "Train a student from a cache; no teacher is needed."),
    "generate": Entry(
        "pipeline.commands.generate", "Let a model write completions for prompts, to be scored or trained on."
    ),
    "inspect": Entry("pipeline.commands.inspect", "Show what a cache holds, or one sequence of it as text."),
    "verify": Entry("pipeline.commands.verify", "Check every shard of a cache against its receipt and the format."),
    "select": Entry("pipeline.commands.select", "Make a smaller cache from one, without the teacher.", resumes=True),
    "merge": Entry("pipeline.commands.merge", "Join caches of one teacher into one.", resumes=True),
    "audit": Entry(
        "pipeline.commands.audit", "Score a sample of a cache again with the live teacher, and say whether it agrees."
    ),
    "push": Entry("pipeline.commands.push", "Copy a cache to a bucket or another place.", resumes=True),
    "pull": Entry(
        "pipeline.commands.pull", "Copy a cache, or some shards of it, from a bucket to a directory.", resumes=True
    ),
    "bundle": Entry("pipeline.commands.bundle", "Pack a cache into one file, to be carried by hand."),
    "unbundle": Entry("pipeline.commands.unbundle", "Unpack and check such a file."),
}


def _debug_option() -> click.Option:
    # `run` looks for the flag itself, because a failure can come before any option is parsed.
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        help=f"Show tracebacks and the warnings of libraries (also: {DEBUG_VARIABLE}=1).",
    )


@dataclass(frozen=True)
class _RefusingEmpty:
    """A callback that refuses empty text, which an unset variable of a shell leaves, and then calls another one."""

    then: Callable[[click.Context, click.Parameter, Any], Any] | None

    def __call__(self, ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        is_given = param.name is not None and ctx.get_parameter_source(param.name) is not ParameterSource.DEFAULT
        if is_given and "" in (value if isinstance(value, (tuple, list)) else (value,)):
            name = max(param.opts, key=len) if isinstance(param, click.Option) else param.make_metavar(ctx)
            raise UserError(f"{name} is empty; give it a value, or check the variable that it stands for")
        return self.then(ctx, param, value) if self.then else value


class LazyGroup(click.Group):
    """A group that imports a command when it is called, and gives each a `--debug` of its own.

    One accepts `pipeline --debug verify` and `pipeline verify --debug` alike.
    """

    def __init__(self, *args: Any, entries: Mapping[str, Entry] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entries: Mapping[str, Entry] = entries or {}
        self.params.append(_debug_option())

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.entries, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.entries:
            command: click.Command | None = importlib.import_module(self.entries[cmd_name].module).command
        else:
            command = super().get_command(ctx, cmd_name)
        if command is not None and not any("--debug" in param.opts for param in command.params):
            command.params.append(_debug_option())
        for param in command.params if command is not None else ():
            if not isinstance(param.callback, _RefusingEmpty):  # commands share parameters
                param.callback = _RefusingEmpty(param.callback)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        known = self.list_commands(ctx)
        if name not in known and not name.startswith("-") and not ctx.resilient_parsing:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            ctx.fail(f"no such command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, entry.summary) for name, entry in self.entries.items()]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def version() -> str:
    """The version of the installed distribution, or a word that says there is none."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    try:
        return installed_version(DISTRIBUTION)
    except PackageNotFoundError:
        return f"unknown ({DISTRIBUTION} is not installed)"


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        say(f"pipeline {version()}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    entries=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and stop.",
)
def main() -> None:
    """Run a large teacher once, keep what it believed about every token, and train students from that.

    \b
    Example:
      pipeline cache-teacher --help
      pipeline train-student --help
    """


def _wants_debug(args: Sequence[str]) -> bool:
    options = args[: args.index("--")] if "--" in args else args
    return "--debug" in options or os.environ.get(DEBUG_VARIABLE, "").lower() not in ("", "0", "false", "no")


def _quiet_libraries() -> None:
    """Keep libraries from talking over our own lines; what the person has set in the environment stands."""
    defaults = {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Of the processes that are started: one of them watches semaphores, and outlives a killed engine.
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning:multiprocessing.resource_tracker",
    }
    if not sys.stderr.isatty():
        # On a terminal a download of gigabytes may show its bar; in a log file it is thousands of lines.
        defaults |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)


_STORAGE_FAILURES = {
    errno.ENOSPC: ("no space left on device", "free some space"),
    errno.EDQUOT: ("disk quota exceeded", "free some space"),
    errno.EFBIG: ("file larger than the file system or the limits of this process allow", "raise the limit"),
    errno.EROFS: ("read-only file system", "make it writable or name another place"),
    errno.EACCES: ("permission denied", "change the permissions or name another place"),
    errno.EIO: ("input/output error", "check the disk or the mount"),
    errno.ESTALE: ("stale file handle", "check the mount"),
    errno.EMFILE: ("too many open files", "raise the limit of this process"),
    errno.ENFILE: ("too many open files on this machine", "raise its limit"),
    errno.ENOMEM: ("out of memory", "give it more memory"),
}


# Names that no file can have.
_IMPOSSIBLE_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)


def _storage_sentence(error: OSError) -> tuple[str, int] | None:
    """One sentence and the exit code for a failure of a disk or a file, which is nobody's bug; None for any other."""
    where = ""
    if isinstance(error.filename, (str, bytes, os.PathLike)):
        name = os.fsdecode(error.filename)
        where = name if len(name) <= 300 else f"{name[:200]}...{name[-50:]}"
    if error.errno in _STORAGE_FAILURES:
        what, remedy = _STORAGE_FAILURES[error.errno]
        named = f" ({where})" if where else ""
        return f"{what}{named}; {remedy} and start the same command again, what is already written is kept", 1
    if error.errno is None or not where:
        return None
    code = UserError.exit_code if error.errno in _IMPOSSIBLE_NAMES else 1
    return f"{where}: {os.strerror(error.errno).lower()}", code


def _usage_sentence(error: click.ClickException) -> str:
    """Click's message in our form: where the value came from, and which help to read."""
    sentence = error.format_message().rstrip(".")
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    if ctx is None:
        return sentence
    if (
        isinstance(error, click.BadParameter)
        and error.param is not None
        and error.param.name is not None
        and ctx.get_parameter_source(error.param.name) is ParameterSource.DEFAULT_MAP
        and CONFIG_META in ctx.meta
    ):
        sentence = f"{ctx.meta[CONFIG_META]}: {sentence}"
    return f"{sentence} (see '{ctx.command_path} --help')"


def _reader_left() -> bool:
    """Whether whoever reads our stdout or stderr is gone, as with `| head`.

    A broken pipe can also be a lost server, and that must not pass in silence.
    """
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        try:
            poll.register(stream.fileno(), 0)
        except (OSError, ValueError):
            continue
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop_output() -> None:
    """Point stdout and stderr at nothing, so that the interpreter's last flush does not complain."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            os.dup2(nothing, stream.fileno())
        except (OSError, ValueError):
            continue
    os.close(nothing)


def _report(error: BaseException, debug: bool) -> int:
    """Say on stderr what went wrong, and return the exit code."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        say(error.format_message(), err=True)
        return error.exit_code
    if isinstance(error, BrokenPipeError) and _reader_left():
        _drop_output()
        return 1

    if debug:
        say("".join(traceback.format_exception(error)), err=True, nl=False)
    hint = None
    if isinstance(error, UserError):
        sentence, code = str(error), error.exit_code
    elif isinstance(error, click.ClickException):
        sentence, code = _usage_sentence(error), error.exit_code
    elif isinstance(error, click.Abort):
        sentence, code = "aborted", 1
    elif isinstance(error, MemoryError):
        sentence, code = "out of memory; give it more and start the same command again", 1
    elif isinstance(error, OSError) and (known := _storage_sentence(error)) is not None:
        sentence, code = known
    else:
        sentence, code = f"internal: {type(error).__name__}: {error}", 1
        hint = None if debug else "run again with --debug for the traceback"
    # Names and values of others may be of any length.
    if len(sentence) > _LONGEST_SENTENCE:
        sentence = f"{sentence[:_LONGEST_SENTENCE]}..."
    say(f"error: {printable(sentence)}", err=True)
    if hint:
        say(hint, err=True)
    return code


def _report_stop(error: BaseException, stop: Stop, debug: bool, command: str | None) -> int:
    """Say on stderr that a signal stopped the command and what is kept; return the exit code.

    error: what came of the signal, which some libraries turn into an error of their own.
    """
    notes = getattr(error, "__notes__", [])
    if not notes and command in COMMANDS and COMMANDS[command].resumes:
        notes = ["start the same command again to go on where it stopped"]
    terminated = stop.number not in (None, signal.SIGINT)
    what = f"stopped by {signal.Signals(stop.number or signal.SIGINT).name}" if terminated else "interrupted"
    with contextlib.suppress(OSError):  # the terminal may be gone
        if debug:
            say("".join(traceback.format_exception(error)), err=True, nl=False)
        say(printable("; ".join([what, *notes])), err=True)
    return stop.exit_code


def run(args: Sequence[str] | None = None, command: click.Command = main) -> int:
    """The entry point: run `command` with `args` (default: the process's) and return its exit code."""
    if f"_{PROGRAM.upper()}_COMPLETE" in os.environ:
        command.main(prog_name=PROGRAM)  # The shell asks for completions; this does not return.
    args = list(sys.argv[1:] if args is None else args)
    debug = _wants_debug(args)
    ready_streams()
    bound_spinning()
    if not debug:
        _quiet_libraries()
    engine_log.show_on_terminal(debug)
    ctx: click.Context | None = None
    with stopping() as stop:
        try:
            if any("\0" in word for word in args):
                raise UserError("a word of this command line holds a null character, which no name can hold; remove it")
            # Not `command.main`: it hides broken pipes of every kind, and turns EOFError into an abort.
            with command.make_context(PROGRAM, args) as ctx:
                command.invoke(ctx)
            sys.stdout.flush()
        except click.exceptions.Exit as done:
            return done.exit_code
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last stop before the person
            stop.reported = True
            if isinstance(error, KeyboardInterrupt) or stop.number is not None:
                return _report_stop(error, stop, debug, ctx.invoked_subcommand if ctx else None)
            return _report(error, debug)
    return 0


if __name__ == "__main__":
    sys.exit(run())
