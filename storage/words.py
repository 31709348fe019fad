"""Words that sentences of every layer are made of."""

from __future__ import annotations

from collections.abc import Iterable


def counted(count: int, noun: str, form: str = "") -> str:
    """Return a count with its noun: 1 shard, 2 shards. form: of the number, "," for 12,000 shards."""
    return f"{count:{form}} {noun}{'' if count == 1 else 's'}"


def are(count: int) -> str:
    """Return the verb that belongs to a count: 1 is, 2 are."""
    return "is" if count == 1 else "are"


def part_of(count: int, total: int, noun: str) -> str:
    """Return how many of all, with the verb: 0 of 1 shard is, 1 of 3 shards is, 2 of 3 shards are."""
    return f"{count} of {counted(total, noun)} {are(count if total > 1 else 1)}"


def listed_briefly(names: Iterable[str], shown: int = 12) -> str:
    """Return names with commas; of many the first ones, of long ones the beginning, for they may be somebody else's."""
    every = list(names)
    words = [name if len(name) <= 80 else f"{name[:80]}..." for name in every[:shown]]
    return ", ".join(words) + (f" and {len(every) - shown:,} more" if len(every) > shown else "")
