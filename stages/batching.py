"""Which sequences make a batch: padded, grouped by length, or packed to a budget of tokens.

An epoch's batches are planned from lengths alone, by every process the same: batch i is for device i modulo the number
of devices. So the devices' batches together are those of one process, all devices take the same number of steps, and a
run that goes on in the middle of an epoch passes over batches without reading them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch.utils.data import Sampler

from stages.mixing import Mixture
from stages.read_ahead import ReadAhead
from storage.errors import UserError

Batching = Literal["padded", "length-grouped", "packed"]
BATCHINGS: tuple[str, ...] = get_args(Batching)

# Packed batches that are filled at the same time.
_OPEN = 16
# Batches whose sequences are sorted by length together.
_GROUP = 32


@dataclass(frozen=True)
class BatchPlan:
    """How batches are made. sequences: of one padded or length-grouped batch. tokens: of one packed batch, at most.

    devices: how many share an epoch's batches; device: which of them this process is.
    """

    batching: Batching = "padded"
    sequences: int = 8
    tokens: int = 4096
    devices: int = 1
    device: int = 0


class EpochBatches(Sampler[list[int]]):
    """The batches of one device, epoch by epoch, as lists of indices into the mixture.

    lengths: int `[len(mixture)]`, token ids of each sequence; not needed for `padded`. epochs: how many there will be,
    given the batches of one device in each. Trainer counts on every epoch having the same number of batches: as many as
    the epoch that packs worst; in the others some batches are cut in two. Raises UserError for fewer sequences than
    devices.
    """

    def __init__(
        self,
        mixture: Mixture,
        plan: BatchPlan,
        seed: int,
        lengths: np.ndarray | None = None,
        epochs: Callable[[int], int] = lambda batches: 1,
    ) -> None:
        self._mixture = mixture
        self._plan = plan
        self._seed = seed
        self._lengths = lengths
        self._epoch = 0
        if len(mixture) < plan.devices:
            raise UserError(
                f"the caches hold {len(mixture)} sequences to train on, fewer than the {plan.devices} devices"
            )
        self._planned = 1
        self._count = self._divided(len(self._made(0)))
        # Only packing takes more batches for one order than for another; mixed caches differ from epoch to epoch.
        while plan.batching == "packed" and self._planned < epochs(len(self)):
            self._count = max(self._count, self._divided(len(self._made(self._planned))))
            self._planned += 1

    def _divided(self, batches: int) -> int:
        """Batches of an epoch in all, a multiple of the devices."""
        devices = self._plan.devices
        # One more would have to be empty where every batch holds one sequence; then fewer than `devices` are left out.
        return min(-(-batches // devices), len(self._mixture) // devices) * devices

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        """Of this device, in every epoch."""
        return self._count // self._plan.devices

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._epoch_batches(self._epoch)[self._plan.device :: self._plan.devices]
        ahead = ReadAhead(self._mixture, batches)
        for number, batch in enumerate(batches):
            ahead.reach(number)
            yield batch

    def _epoch_batches(self, epoch: int) -> list[list[int]]:
        """Of all devices."""
        if self._plan.batching == "packed" and epoch >= self._planned:
            raise ValueError(f"epoch {epoch} of {self._planned} that were planned")
        return _levelled(self._made(epoch), self._count)

    def _made(self, epoch: int) -> list[list[int]]:
        order, plan = self._mixture.order(self._seed, epoch), self._plan
        if plan.batching == "padded":
            return _cut(order, plan.sequences)
        assert self._lengths is not None
        if plan.batching == "packed":
            return packed(order, self._lengths, plan.tokens)
        return length_grouped(order, self._lengths, plan.sequences, np.random.default_rng([self._seed, epoch, 1]))


def length_grouped(
    order: np.ndarray, lengths: np.ndarray, sequences: int, random: np.random.Generator
) -> list[list[int]]:
    """Batches of sequences of similar length: stretches of the order sorted by length, cut, and the cuts shuffled."""
    batches: list[list[int]] = []
    for start in range(0, len(order), _GROUP * sequences):
        stretch = order[start : start + _GROUP * sequences]
        cuts = _cut(stretch[np.argsort(lengths[stretch], kind="stable")], sequences)
        batches += [cuts[i] for i in random.permutation(len(cuts))]
    return batches


def packed(order: np.ndarray, lengths: np.ndarray, tokens: int) -> list[list[int]]:
    """Batches of at most `tokens` token ids, best fit: each sequence joins the fullest open batch that has room.

    A few batches are open at a time and the oldest is closed first, so a batch holds neighbours of the order and its
    shards are decoded together. A sequence longer than `tokens` stands alone.
    """
    done: list[list[int]] = []
    batches: dict[int, list[int]] = {}
    room: list[tuple[int, int]] = []  # (free tokens, which batch), ascending
    free: dict[int, int] = {}
    for serial, index in enumerate(order.tolist()):
        length = int(lengths[index])
        at = bisect_left(room, (length, -1))
        if at < len(room):
            left, batch = room.pop(at)
        else:
            if len(room) == _OPEN:
                oldest = next(iter(batches))
                del room[bisect_left(room, (free.pop(oldest), oldest))]
                done.append(batches.pop(oldest))
            left, batch = tokens, serial
            batches[batch] = []
        batches[batch].append(index)
        free[batch] = left - length
        insort(room, (free[batch], batch))
    return [*done, *batches.values()]


def _cut(order: np.ndarray, sequences: int) -> list[list[int]]:
    return [order[at : at + sequences].tolist() for at in range(0, len(order), sequences)]


def _levelled(batches: list[list[int]], count: int) -> list[list[int]]:
    """Exactly `count` batches: the last ones left out, or the last of those with most sequences cut in two."""
    batches = batches[:count]
    while len(batches) < count:
        sizes = [len(batch) for batch in batches]
        at = len(sizes) - 1 - sizes[::-1].index(max(sizes))
        half = sizes[at] // 2
        batches[at : at + 1] = [batches[at][:half], batches[at][half:]]
    return batches
