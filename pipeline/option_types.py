"""Types of options that several commands have."""

from __future__ import annotations

import math
from typing import Any

import click


class FloatRange(click.FloatRange):
    """A finite number in a range: click's own lets nan and inf through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class ShareOrWord(FloatRange):
    """A share, 0..1, or one word that stands for a rule."""

    def __init__(self, word: str) -> None:
        super().__init__(0, 1)
        self.word = word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self.word if value == self.word else super().convert(value, param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"SHARE|{self.word}"


class Text(click.ParamType):
    """Text that will be written as UTF-8: bytes of the command line that are none are refused."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            str(value).encode()
        except UnicodeEncodeError:
            self.fail("holds bytes that are no UTF-8", param, ctx)
        return str(value)


# What numpy and torch take.
SEED = click.IntRange(0, 2**32 - 1)
