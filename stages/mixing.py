"""Several caches in one run: how many sequences each gives to an epoch, and in which order they are drawn.

Every cache is a stream without end: pass after pass over its sequences, each pass shuffled anew, first its shards and
then the sequences inside each window of shards, so that few shards have to be decoded at a time. An epoch is as many
sequences as all caches hold together. Each cache gives its share of them and goes on in the next epoch where it
stopped, so all sequences of a cache are seen equally often, whatever the shares are; by default the shares follow the
sizes, and an epoch is every sequence once. All of it depends on seed and epoch alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from stages.shard_dataset import WINDOW, ShardDataset, StoredSequence
from storage.errors import UserError


def shares(sizes: Sequence[int], mix: Sequence[float] | None) -> np.ndarray:
    """int64 `[C]`: sequences that each cache gives to an epoch; they sum to the sum of `sizes`.

    mix: weights, any positive numbers; the sizes themselves when None. What does not divide goes to the largest rests.
    """
    weights = np.asarray(sizes if mix is None else mix, np.float64)
    exact = weights / weights.sum() * sum(sizes)
    whole = np.floor(exact + 1e-9).astype(np.int64)
    rest = sum(sizes) - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:rest]] += 1
    return whole


class Mixture(Dataset):
    """The training sequences of all caches under one index, and the order of each epoch."""

    def __init__(self, parts: Sequence[ShardDataset], mix: Sequence[float] | None = None) -> None:
        self.parts = list(parts)
        self.shares = shares([len(part) for part in parts], mix)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> StoredSequence:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part][index - int(self._starts[part])]

    def __getitems__(self, indices: Sequence[int]) -> list[StoredSequence] | UserError:
        """A batch, or the sentence on what is wrong with it: raised in a worker, it would arrive as a traceback."""
        try:
            return [self[index] for index in indices]
        except UserError as error:
            return error

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 `[K]` each, of K indices: which cache, and which shard of it."""
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        shards = np.concatenate([part.shard_of for part in self.parts])[indices]
        return parts, shards

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """int64 `[len(self)]`: indices in the order in which an epoch draws them."""
        turns = np.repeat(np.arange(len(self.parts)), self.shares)
        turns = np.random.default_rng([seed, epoch]).permutation(turns)
        order = np.empty(len(turns), np.int64)
        for number, share in enumerate(self.shares.tolist()):
            order[turns == number] = self._starts[number] + self._stream(number, seed, epoch * share, share)
        return order

    def _stream(self, number: int, seed: int, start: int, count: int) -> np.ndarray:
        """`count` indices of one cache from place `start` of its endless stream of passes."""
        size = len(self.parts[number])
        first, last = start // size, (start + max(count, 1) - 1) // size
        passes = [
            _shuffled(self.parts[number].shard_of, np.random.default_rng([seed, number, turn]))
            for turn in range(first, last + 1)
        ]
        return np.concatenate(passes)[start - first * size :][:count]


def _shuffled(shard_of: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Indices of `shard_of` (ascending): shards shuffled, then the sequences inside each window of shards."""
    shards, starts = np.unique(shard_of, return_index=True)
    runs = np.split(np.arange(len(shard_of)), starts[1:])
    turns = random.permutation(len(shards))
    windows = [
        random.permutation(np.concatenate([runs[turn] for turn in turns[at : at + WINDOW]]))
        for at in range(0, len(turns), WINDOW)
    ]
    return np.concatenate(windows)
