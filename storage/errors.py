"""The errors that a person at the terminal is meant to read.

Each is one sentence: what is wrong, where (file, row, column), and what to do. The command line prints
it without a traceback and exits with `exit_code`. Anything else that escapes is a bug of ours.
"""


class UserError(Exception):
    """Misuse or bad input: nothing was done, nothing written is changed."""

    exit_code = 2


class CacheError(UserError):
    """A cache, or one file of it, is not what it says it is."""


class RunError(UserError):
    """Good input, but the run could not finish (disk full, out of memory, engine died)."""

    exit_code = 1
