"""How much is read of a cache, a store, a server or a corpus, of which any may be somebody else's.

Each limit is an environment variable with a default, so that it holds for every command alike, and the message of what
breaks it names the variable. `docs/generate.py` writes docs/limits.md from `LIMITS`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from storage.errors import CacheError, UserError


@dataclass(frozen=True)
class Limit:
    """One limit. variable: that sets another number than `default`, in `unit`; bounds: what it is a limit of."""

    variable: str
    default: int
    unit: str
    bounds: str

    @property
    def value(self) -> int:
        """Return the number that holds. Raise UserError for a variable that is no number above 0."""
        text = os.environ.get(self.variable) or str(self.default)
        # Longer ones overflow what they are compared with: sizes of C, and clocks.
        longest = 18 if self.unit == "bytes" else 8
        if not (text.isascii() and text.isdecimal() and len(text) <= longest and int(text)):
            raise UserError(f"{self.variable}={text[:40]}: wants a number of {self.unit}, as in {self.default}")
        return int(text)

    def check(self, path: object, size: int, what: str) -> None:
        """Raise CacheError where `size` bytes are more than this limit allows; `what`: the file, as "a manifest"."""
        if size > self.value:
            raise CacheError(
                f"{path}: has {size:,} bytes, more than the {self.value:,} that {what} may have; {self.advice}"
            )

    @property
    def advice(self) -> str:
        """Return the end of a message: which variable sets another number."""
        return f"set {self.variable} for another limit"


ROW_BYTES = Limit(
    "PIPELINE_ROW_BYTES", 256 << 20, "bytes", "one row of a corpus, unpacked; a JSON document has 16 of it"
)
CORPUS_MEMORY = Limit(
    "PIPELINE_CORPUS_MEMORY", 8 << 30, "bytes", "the memory to read a Parquet file of a corpus, where it unpacks far"
)
JSON_BYTES = Limit("PIPELINE_JSON_BYTES", 64 << 20, "bytes", "a manifest, a receipt or a card of a cache")
SHARD_BYTES = Limit(
    "PIPELINE_SHARD_BYTES",
    128 << 20,
    "bytes",
    "a shard in memory, each value counted with 8 bytes; 64 more for each byte of its file",
)
TOKENIZER_BYTES = Limit("PIPELINE_TOKENIZER_BYTES", 256 << 20, "bytes", "all files of a cache's tokenizer")
TOKENIZER_SECONDS = Limit(
    "PIPELINE_TOKENIZER_SECONDS", 120, "seconds", "the trial of a cache's tokenizer, and each text made with it"
)
TOKENIZER_MEMORY = Limit("PIPELINE_TOKENIZER_MEMORY", 8 << 30, "bytes", "the memory of that")
STORE_SECONDS = Limit("PIPELINE_STORE_SECONDS", 120, "seconds", "one request to a store, but an upload")
LISTING_BYTES = Limit("PIPELINE_LISTING_BYTES", 64 << 20, "bytes", "a store's list of the files of a folder")
COPIES_BYTES = Limit("PIPELINE_COPIES_BYTES", 20 << 30, "bytes", "the local copies of remote shards, all together")
ANSWER_SECONDS = Limit("PIPELINE_ANSWER_SECONDS", 600, "seconds", "one answer of a server")
ANSWER_BYTES = Limit("PIPELINE_ANSWER_BYTES", 256 << 20, "bytes", "one answer of a server")
SHOWN = Limit("PIPELINE_SHOWN", 100, "lines", "the problems that `verify` shows; the others are counted")

LIMITS = (
    ROW_BYTES,
    CORPUS_MEMORY,
    JSON_BYTES,
    SHARD_BYTES,
    TOKENIZER_BYTES,
    TOKENIZER_SECONDS,
    TOKENIZER_MEMORY,
    STORE_SECONDS,
    LISTING_BYTES,
    COPIES_BYTES,
    ANSWER_SECONDS,
    ANSWER_BYTES,
    SHOWN,
)
# Bytes that a shard may have in memory for each byte of its file, beside SHARD_BYTES.
UNPACKED_PER_BYTE = 64
