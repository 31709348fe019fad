"""Words that sentences of every layer are made of."""

from __future__ import annotations


def counted(count: int, noun: str, form: str = "") -> str:
    """Return a count with its noun: 1 shard, 2 shards. form: of the number, "," for 12,000 shards."""
    return f"{count:{form}} {noun}{'' if count == 1 else 's'}"


def are(count: int) -> str:
    """Return the verb that belongs to a count: 1 is, 2 are."""
    return "is" if count == 1 else "are"
