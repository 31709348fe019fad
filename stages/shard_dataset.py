"""Shards as training batches: random access to stored sequences, their shuffle, and the collator.

A shard is decoded once into flat arrays and kept while its sequences are wanted. The shuffle therefore runs over a
few shards at a time: shards in random order, then the sequences of each window of shards in random order. It depends
on seed and epoch alone, so a resumed run sees the same batches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from stages import ranking
from stages.divergence import TeacherRows
from stages.objective import Objective
from storage.cache import Cache
from storage.errors import CacheError
from storage.rows import Rows
from storage.schema import column_temperature
from storage.shard import value_problems

# Shards decoded at a time, and the width of the shuffle's window.
WINDOW = 4

COLUMNS = (
    "sequence_id",
    "input_ids",
    "loss_mask",
    "gold_logprob",
    "tail_logmass",
    "top_count",
    "top_ids",
    "top_logprobs",
)


@dataclass(frozen=True)
class StoredSequence:
    """One row of a shard: L ids, P stored positions (those with a loss), E entries.

    positions: int64 `[P]`, index of each stored position in the sequence; the rest `[P]`, entries `[E]`, samples
    `[P * M]` where they were read.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    gold_logprob: np.ndarray
    tail_logmass: np.ndarray
    top_count: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    tail_samples: np.ndarray | None = None
    tail_logmass_at: np.ndarray | None = None

    @property
    def gold(self) -> np.ndarray:
        """Position t predicts the id at t + 1."""
        return self.input_ids[self.positions + 1]


def stored_sequence(rows: Rows, row: int) -> StoredSequence:
    mask = rows["loss_mask"][row]
    at = next((name for name in rows.lists if column_temperature(name) is not None), None)
    return StoredSequence(
        input_ids=rows["input_ids"][row],
        positions=np.flatnonzero(mask),
        gold_logprob=rows["gold_logprob"][row][mask],
        tail_logmass=rows["tail_logmass"][row][mask],
        top_count=rows["top_count"][row][mask].astype(np.int64),
        top_ids=rows["top_ids"][row],
        top_logprobs=rows["top_logprobs"][row],
        tail_samples=rows["tail_samples"][row] if "tail_samples" in rows.lists else None,
        tail_logmass_at=None if at is None else rows[at][row][mask],
    )


class ShardDataset(Dataset):
    """The sequences `sequence_ids` (int64, ascending) of a cache, by random access.

    extra: optional columns to read too, `tail_samples` or one `tail_logmass_T...`. Every shard's values are checked
    when it is first decoded; raises CacheError for one that is not what it says.
    """

    def __init__(self, cache: Cache, sequence_ids: np.ndarray, *, extra: Sequence[str] = ()) -> None:
        self.cache = cache
        self._columns = (*COLUMNS, *extra)
        self.sequence_ids = sequence_ids
        firsts = np.array([shard.first for shard in cache.manifest.shards], np.int64)
        self.shard_of = np.searchsorted(firsts, sequence_ids, side="right") - 1
        self._row_of = sequence_ids - firsts[self.shard_of]
        self._decoded: OrderedDict[int, Rows] = OrderedDict()
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return len(self.sequence_ids)

    def __getitem__(self, index: int) -> StoredSequence:
        return stored_sequence(self._rows(int(self.shard_of[index])), int(self._row_of[index]))

    def _rows(self, shard: int) -> Rows:
        if shard in self._decoded:
            self._decoded.move_to_end(shard)
            return self._decoded[shard]
        rows = self.cache.read_shard(shard, self._columns)
        if shard not in self._checked:
            for problem in value_problems(rows, self.cache.manifest):
                raise CacheError(f"{self.cache.shard_path(shard)}: {problem}")
            self._checked.add(shard)
        self._decoded[shard] = rows
        while len(self._decoded) > WINDOW:
            self._decoded.popitem(last=False)
        return rows


def split_held_out(cache: Cache, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out sequence ids, both ascending.

    The choice depends on the cache's size and `seed` alone, so students of one cache are compared on the same
    sequences. At least one sequence is held out when `share` > 0. Raises CacheError where nothing is left to train on.
    """
    total = cache.manifest.corpus.sequences
    held = min(total, max(1, round(share * total))) if share > 0 else 0
    if held >= total:
        raise CacheError(
            f"{cache.path}: holds {total} sequence{'s' * (total > 1)}, too few to hold out a share of {share:g} and "
            "train on the rest; lower --eval-share or set it to 0"
        )
    order = np.random.default_rng([seed, 0x5EED]).permutation(total)
    return np.sort(order[held:]).astype(np.int64), np.sort(order[:held]).astype(np.int64)


class WindowShuffle(Sampler[int]):
    """Indices of a ShardDataset: shards shuffled, then sequences shuffled within each window of shards."""

    def __init__(self, dataset: ShardDataset, seed: int, window: int = WINDOW) -> None:
        self._shard_of = dataset.shard_of
        self._seed = seed
        self._window = window
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._shard_of)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self._seed, self._epoch])
        shards = generator.permutation(np.unique(self._shard_of))
        for start in range(0, len(shards), self._window):
            inside = np.flatnonzero(np.isin(self._shard_of, shards[start : start + self._window]))
            yield from generator.permutation(inside).tolist()


@dataclass(frozen=True)
class Collator:
    """Sequences -> one batch of tensors.

    objective: decides rank scope and hard ratio. vocabulary_size: the student's; entries beyond it join the tail,
    since no student id stands for them. corpus_threshold: log p(gold) at or below which a token is hard, for the
    rank scope `corpus`.

    The batch: `input_ids` int64 `[B, L]`, right-padded with 0; `rows` int64 `[R]`, index of each stored position in
    the flattened `[B * L]`; `sequence_of` int64 `[R]`; `is_hard` bool `[R]`; and the fields of TeacherRows.
    """

    objective: Objective
    vocabulary_size: int
    corpus_threshold: float | None = None

    def __call__(self, sequences: Sequence[StoredSequence]) -> dict[str, torch.Tensor]:
        width = max(len(s.input_ids) for s in sequences)
        input_ids = np.zeros((len(sequences), width), np.int64)
        for row, sequence in enumerate(sequences):
            input_ids[row, : len(sequence.input_ids)] = sequence.input_ids
        counts = [len(s.positions) for s in sequences]
        gold_logprob = np.concatenate([s.gold_logprob for s in sequences])
        tail_logmass = np.concatenate([s.tail_logmass for s in sequences])
        tail_at = None
        if sequences[0].tail_logmass_at is not None:
            tail_at = np.concatenate([s.tail_logmass_at for s in sequences if s.tail_logmass_at is not None])
        top_ids, top_logprobs = self._padded_entries(sequences)
        if (beyond := top_ids >= self.vocabulary_size).any():
            lost = np.where(beyond, top_logprobs, -np.inf)
            tail_logmass = np.logaddexp(tail_logmass, np.logaddexp.reduce(lost, axis=1)).astype(np.float32)
            if tail_at is not None:
                lost /= self.objective.temperature
                tail_at = np.logaddexp(tail_at, np.logaddexp.reduce(lost, axis=1)).astype(np.float32)
            top_logprobs = np.where(beyond, np.float32(-np.inf), top_logprobs)
            top_ids = np.where(beyond, 0, top_ids)
        batch = {
            "input_ids": input_ids,
            "rows": np.concatenate([s.positions + row * width for row, s in enumerate(sequences)]),
            "sequence_of": np.repeat(np.arange(len(sequences)), counts),
            "is_hard": self._is_hard(gold_logprob, counts),
            "gold": np.concatenate([s.gold for s in sequences]).astype(np.int64),
            "gold_logprob": gold_logprob,
            "tail_logmass": tail_logmass,
            "top_ids": top_ids,
            "top_logprobs": top_logprobs,
        }
        if tail_at is not None:
            batch["tail_logmass_at"] = tail_at
        if sequences[0].tail_samples is not None:
            samples = np.concatenate([s.tail_samples for s in sequences if s.tail_samples is not None])
            batch["tail_samples"] = samples.reshape(len(gold_logprob), -1).astype(np.int64)
            # Like the entries: what the student has no id for is not drawn.
            batch["tail_samples"][batch["tail_samples"] >= self.vocabulary_size] = -1
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.items()}

    def _padded_entries(self, sequences: Sequence[StoredSequence]) -> tuple[np.ndarray, np.ndarray]:
        """Entries as `[R, N]`, N the widest of the batch, padded with id 0 and -inf."""
        count = np.concatenate([s.top_count for s in sequences])
        ids = np.concatenate([s.top_ids for s in sequences])
        logprobs = np.concatenate([s.top_logprobs for s in sequences]).astype(np.float32)
        width = int(count.max(initial=1))
        if (count == width).all():
            return ids.reshape(-1, width).astype(np.int64), logprobs.reshape(-1, width)
        present = np.arange(width) < count[:, None]
        padded_ids = np.zeros(present.shape, np.int64)
        padded_logprobs = np.full(present.shape, -np.inf, np.float32)
        padded_ids[present] = ids
        padded_logprobs[present] = logprobs
        return padded_ids, padded_logprobs

    def _is_hard(self, gold_logprob: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        scope, ratio = self.objective.rank_scope, self.objective.hard_ratio
        if scope == "corpus":
            if self.corpus_threshold is None:
                raise ValueError("the rank scope `corpus` needs the corpus threshold")
            return gold_logprob <= self.corpus_threshold
        if scope == "sequence":
            return ranking.is_hard_by_sequence(gold_logprob, counts, ratio)
        return ranking.is_hard(gold_logprob, ratio)


def teacher_rows(batch: dict[str, torch.Tensor]) -> TeacherRows:
    return TeacherRows(
        batch["gold"],
        batch["gold_logprob"],
        batch["tail_logmass"],
        batch["top_ids"],
        batch["top_logprobs"],
        batch.get("tail_samples"),
    )


def corpus_threshold(cache: Cache, sequence_ids: np.ndarray, hard_ratio: float) -> float:
    """The threshold of the rank scope `corpus`: over the stored positions of these sequences, all at once."""
    wanted = np.zeros(cache.manifest.corpus.sequences, bool)
    wanted[sequence_ids] = True
    gold: list[np.ndarray] = []
    for rows in cache.column("sequence_id", "loss_mask", "gold_logprob"):
        mask = rows["loss_mask"]
        keep = mask.values & np.repeat(wanted[rows.sequence_id], mask.lengths)
        gold.append(rows["gold_logprob"].values[keep])
    return ranking.hard_threshold(np.concatenate(gold), hard_ratio)
