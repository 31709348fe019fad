"""Whether a student may be trained from a cache: same tokens, same ids, wide enough a head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from stages.identity import PROBES, probe, tokenizer_identity
from stages.limited import LimitError, limited
from stages.pretrained import load_tokenizer
from storage.cache import TOKENIZER, Cache
from storage.errors import CacheError, UserError
from storage.limits import TOKENIZER_MEMORY, TOKENIZER_SECONDS
from storage.manifest import TokenizerIdentity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
# Bytes of the text of a token, as JSON, and of a text besides: the longest tokens are runs of spaces.
_TOKEN_BYTES, _TEXT_BYTES = 256, 1 << 20


def cache_tokenizer(cache: Cache) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer from the cache's copy.

    It is tried first in a process of its own. Raises CacheError where the copy is not the one that the manifest names,
    and where the trial does not end within its limits.
    """
    path = str(cache.tokenizer_path)
    # The chat template too: it goes with the student, and whoever serves that runs it.
    if _tried(path, str(cache.path / TOKENIZER)) != cache.manifest.tokenizer:
        raise CacheError(f"{cache.path / TOKENIZER}: this is not the tokenizer that the manifest names")
    return load_tokenizer(path)


@functools.cache
def _tried(path: str, shown: str) -> TokenizerIdentity:
    """The identity of a tokenizer whose files lie in a private folder. `shown`: where they come from."""

    def identity() -> dict[str, Any]:
        return tokenizer_identity(load_tokenizer(path)).model_dump()

    try:
        found = limited(identity, memory=TOKENIZER_MEMORY.value, seconds=TOKENIZER_SECONDS.value)
        return TokenizerIdentity.model_validate(found)
    except UserError as error:
        raise CacheError(str(error).replace(path, shown)) from None
    except LimitError as error:
        raise CacheError(
            f"{shown}: the trial of this tokenizer {error}; if you trust it, set {TOKENIZER_SECONDS.variable} or "
            f"{TOKENIZER_MEMORY.variable} for other limits"
        ) from None


def decoded(cache: Cache, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[list[int]]) -> list[str]:
    """The text of some token ids, by the tokenizer of a cache, within its limits. Raises CacheError."""
    tokens = sum(map(len, sequences))
    return within_limits(cache, tokens, lambda: [str(tokenizer.decode(ids)) for ids in sequences])


def within_limits(cache: Cache, tokens: int, call: Callable[[], _T]) -> _T:
    """What `call` returns, the text of `tokens` tokens by the tokenizer of a cache. Raises CacheError where making it
    breaks the limits, and for longer text than tokens have.
    """
    most = _TEXT_BYTES + _TOKEN_BYTES * tokens
    try:
        return limited(call, memory=TOKENIZER_MEMORY.value, seconds=TOKENIZER_SECONDS.value, most_bytes=most)
    except LimitError as error:
        raise CacheError(f"{cache.path / TOKENIZER}: to make text with this tokenizer {error}") from None


def check_tokenizer(cache: Cache, student: PreTrainedTokenizerBase, name: str) -> None:
    """Raises CacheError unless every token of the cache has the same id, and text the same ids, with the student.

    A student may know more tokens than the teacher (added ones); it may not know fewer or others.
    """
    named = cache.manifest.tokenizer
    found = tokenizer_identity(student)
    if (found.vocabulary_sha256, found.behaviour_sha256) == (named.vocabulary_sha256, named.behaviour_sha256):
        return
    teacher = cache_tokenizer(cache)
    theirs = student.get_vocab()
    for token, index in sorted(teacher.get_vocab().items(), key=lambda item: item[1]):
        if theirs.get(token) != index:
            there = f"id {theirs[token]}" if token in theirs else "no token of its own"
            raise CacheError(
                f"{name}: its tokenizer is not the one of the shards (token {token!r} is id {index} in the shards "
                f"and {there} in the student); use a student of the teacher's family, or cache with its teacher"
            )
    for text, ours, other in zip(PROBES, probe(teacher), probe(student), strict=True):
        if ours != other:
            raise CacheError(
                f"{name}: its tokenizer has the shards' vocabulary but splits text differently ({text[:30]!r})"
            )


def check_head(cache: Cache, student_vocabulary: int, name: str) -> None:
    """Raises CacheError where the student's head is too narrow for the tokenizer of the cache."""
    needed = max(cache_tokenizer(cache).get_vocab().values()) + 1
    if student_vocabulary < needed:
        raise CacheError(
            f"{name}: its vocabulary of {student_vocabulary} is smaller than the {needed} ids of the shards' tokenizer"
        )
