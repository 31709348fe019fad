"""Whether a student may be trained from a cache: same tokens, same ids, wide enough a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.identity import PROBES, probe, tokenizer_identity
from stages.pretrained import load_tokenizer
from storage.cache import Cache
from storage.errors import CacheError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def cache_tokenizer(cache: Cache) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer from the cache's copy. Raises CacheError where the copy is not the one named."""
    tokenizer = load_tokenizer(str(cache.tokenizer_path))
    # The chat template too: it goes with the student, and whoever serves that runs it.
    if tokenizer_identity(tokenizer) != cache.manifest.tokenizer:
        raise CacheError(f"{cache.tokenizer_path}: this is not the tokenizer that the manifest names")
    return tokenizer


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
