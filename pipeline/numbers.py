"""Numbers as a person reads and writes them: short, with a unit, and never rounded up to a goal not yet reached."""

from __future__ import annotations

import math
import re

from storage.errors import UserError
from storage.words import counted

_DASH = "unknown"


def _short(value: float, prefixes: tuple[str, ...]) -> str:
    """Scale by 1000 until three figures are left before the point; one decimal once scaled."""
    magnitude = abs(value)
    for index, prefix in enumerate(prefixes):
        scaled = magnitude / 1000**index
        digits = 1 if index else 0
        # Compare what would be printed, so that 999,950 is 1.0M and not 1000.0k.
        if round(scaled, digits) < 1000 or index == len(prefixes) - 1:
            return f"{'-' if value < 0 else ''}{scaled:.{digits}f}{prefix}"
    raise AssertionError("unreachable: the last prefix always fits")


def format_count(value: float) -> str:
    """A count in decimal steps: 950, 12.3k, 1.2M, 5.0G."""
    if not math.isfinite(value):
        return _DASH
    return _short(value, ("", "k", "M", "G", "T"))


def format_bytes(value: float) -> str:
    """A size in decimal units, as disks are sold and buckets billed: 950 B, 12.3 kB, 1.2 GB."""
    if not math.isfinite(value):
        return _DASH
    return _short(value, (" B", " kB", " MB", " GB", " TB", " PB"))


def format_duration(seconds: float) -> str:
    """A duration in its two largest units: 45s, 5m12s, 2h03m, 3d04h."""
    if not math.isfinite(seconds) or seconds < 0:
        return _DASH
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86_400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86_400}d{total % 86_400 // 3600:02d}h"


def format_percent(part: float, whole: float) -> str:
    """A share in whole percent, rounded down, so that 100% means done."""
    if not (math.isfinite(part) and math.isfinite(whole)) or whole <= 0:
        return _DASH
    return f"{math.floor(100 * part / whole)}%"


def format_share(share: float) -> str:
    """A measured share, 0 to 1, as a percentage with one decimal: 0.8%, 97.3%."""
    return f"{share:.1%}" if math.isfinite(share) else _DASH


def format_rate(per_second: float, unit: str = "tokens") -> str:
    """A rate: 12.3k tokens/s. Slow ones keep a decimal: 0.4 tokens/s."""
    if not math.isfinite(per_second):
        return _DASH
    number = f"{per_second:.1f}" if 0 < round(abs(per_second), 1) < 10 else format_count(per_second)
    return f"{number} {unit}/s"


def parse_range(text: str | None, option: str, count: int, unit: str) -> range:
    """The part of `range(count)` that `FIRST:STOP` names, either of which may be left out; None is all.

    Raises UserError for anything else, and where it names nothing. unit: a noun in the singular, for the sentence.
    """
    found = re.fullmatch(r"(\d*):(\d*)", ":" if text is None else text)
    chosen = range(count)[int(found[1] or 0) : int(found[2]) if found[2] else None] if found else range(0)
    if not chosen:
        raise UserError(
            f"{option} {text}: wants FIRST:STOP, as in 0:100; this cache has {counted(count, unit)}, from 0"
        )
    return chosen
