"""Shards of a cache behind a URL, fetched while the batches before them are trained on.

The process that draws batches knows which shards come next; whoever reads them finds local copies. What is under way is
bounded, also where a resumed run passes over thousands of batches in a moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from stages.shard_dataset import KEPT, WINDOW
from storage.places import RemotePath

if TYPE_CHECKING:
    from stages.mixing import Mixture

# Shards that are fetched before they are reached, at most: those of the next window.
AHEAD = WINDOW


class ReadAhead:
    """Of one epoch's batches of one device. `reach` is told of each batch as it is drawn."""

    def __init__(self, mixture: Mixture, batches: Sequence[Sequence[int]]) -> None:
        self._mixture = mixture
        self._under_way: list[Future[None]] = []
        # When each remote shard is first needed: (batch, part, shard), in that order.
        self._coming: list[tuple[int, int, int]] = []
        self._reached = self._asked = 0  # how many of them
        remote = [isinstance(part.cache.path, RemotePath) for part in mixture.parts]
        if not any(remote):
            return
        indices = np.concatenate([np.asarray(batch, np.int64) for batch in batches])
        batch_of = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
        part_of, shard_of = mixture.places(indices)
        _, first = np.unique(np.stack([part_of, shard_of]), axis=1, return_index=True)
        self._coming = [
            (int(batch_of[at]), int(part_of[at]), int(shard_of[at])) for at in np.sort(first) if remote[part_of[at]]
        ]

    def reach(self, batch: int) -> None:
        """Ask for the shards that come after this batch, as far as there is room for them."""
        self._under_way = [future for future in self._under_way if not future.done()]
        while self._reached < len(self._coming) and self._coming[self._reached][0] <= batch:
            self._reached += 1  # whoever reads it fetches it, if nobody has
        self._asked = max(self._asked, self._reached)
        end = min(self._reached + AHEAD, len(self._coming))
        while self._asked < end and len(self._under_way) < AHEAD:
            _, part, shard = self._coming[self._asked]
            self._asked += 1
            # Shards that are being read must not give way to those that come.
            future = self._mixture.parts[part].cache.prefetch(shard, room=KEPT + AHEAD)
            if future is not None:
                self._under_way.append(future)
