"""Compare how much a student can read with how long a cache's sequences are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stages.shard_dataset import sequence_lengths
from stages.teacher_checks import context_length
from storage.cache import Cache
from storage.errors import CacheError
from storage.words import counted

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_context(caches: Sequence[Cache], config: PretrainedConfig, name: str) -> None:
    """Raise CacheError where a sequence that is here has more ids than the student reads.

    A student whose configuration states no context (relative positions, states along the row) reads any length.
    """
    context = context_length(config)
    if context is None:
        return
    for cache in caches:
        # No sequence is longer than the cache's bound, so that lengths are read only where some may be.
        if cache.manifest.scoring.max_length <= context:
            continue
        lengths = sequence_lengths(cache)
        if (beyond := int(np.count_nonzero(lengths > context))) > 0:
            longer = "is longer" if beyond == 1 else "are longer"
            raise CacheError(
                f"{name}: reads at most {context:,} tokens, and {beyond:,} of "
                f"{counted(int(np.count_nonzero(lengths)), 'sequence', ',')} of {cache.path} {longer}, up to "
                f"{int(lengths.max()):,}; use a student with a longer context, or make a cache of shorter sequences"
            )
