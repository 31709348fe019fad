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
