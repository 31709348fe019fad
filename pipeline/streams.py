"""stdout and stderr as every command needs them: open, and able to write any text."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress
from typing import TextIO

import click

from storage.redact import without_secrets

_ASCII = "terminal_ascii"


def ready_streams() -> None:
    """Open closed standard streams on nothing, and escape characters that a terminal's encoding lacks.

    A closed stream leaves its number to the next file that is opened. Libraries that print would then write into a
    shard. Text becomes `\\u2026` where the terminal has no such character, in place of an error.
    """
    _fill_closed()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is None:
            continue
        with suppress(LookupError):
            if codecs.lookup(stream.encoding).name == "ascii":
                # click takes a stream that says "ascii" for one that says nothing, and writes UTF-8 to it.
                reconfigure(encoding=_ASCII)
        reconfigure(errors="backslashreplace")


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Write a text to stdout, or stderr, without secrets and with everything escaped that could steer a terminal.

    The one way for commands to write: names, notes and messages in it may come from a cache, a server or a file of
    somebody else. err: to stderr. nl: end it with a line break.
    """
    click.echo(printable_text(without_secrets(text)), err=err, nl=nl)


def printable_text(text: str) -> str:
    """Return text that cannot steer a terminal: as it is but for control characters, which are escaped.

    Those that reverse the direction of writing or take no room are among them.
    """
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode("ascii") for char in text
    )


def has_characters(stream: TextIO, text: str) -> bool:
    """Return True if the encoding of `stream` holds every character of `text`."""
    try:
        text.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _fill_closed() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # It takes the lowest free number, which is this one.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _find(name: str) -> codecs.CodecInfo | None:
    if name != _ASCII:
        return None
    ascii_codec = codecs.lookup("ascii")
    return codecs.CodecInfo(
        ascii_codec.encode,
        ascii_codec.decode,
        ascii_codec.streamreader,
        ascii_codec.streamwriter,
        ascii_codec.incrementalencoder,
        ascii_codec.incrementaldecoder,
        name=_ASCII,
    )


codecs.register(_find)
