"""Shards as training examples: random access to stored sequences, and the collator that makes them a batch.

A shard is decoded once into flat arrays, its stored positions picked out of them at once, and kept while its sequences
are wanted (`mixing.py` draws them in an order that wants few shards at a time). A sequence is then a handful of views,
and a batch is a handful of concatenations: no Python object per token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from stages import ranking
from stages.divergence import TeacherRows
from stages.objective import Objective
from stages.ranking import HardRatio
from stages.wider_teacher import TeacherArrays, leave_out_beyond
from storage.cache import Cache
from storage.errors import CacheError, UserError
from storage.plan import locate
from storage.rows import Ragged, Rows
from storage.schema import column_temperature
from storage.shard import value_problems

# Shards among which sequences are shuffled; a few more stay decoded, since a packed batch may reach back.
WINDOW = 4
KEPT = WINDOW + 2

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

# Columns that stored positions alone have.
_OF_STORED = ("top_ids", "top_logprobs", "tail_samples", "sketch_codes", "residual_samples", "residual_mass")


@dataclass(frozen=True)
class StoredSequence:
    """One row of a shard: L ids, P stored positions (those with a loss), E entries.

    positions: int64 `[P]`, index of each stored position in the sequence; the rest `[P]`, entries `[E]`, samples
    `[P * M]` and codes `[P * r]` where they were read. source: which cache of the run it comes from.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    gold: np.ndarray
    gold_logprob: np.ndarray
    tail_logmass: np.ndarray
    top_count: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    tail_samples: np.ndarray | None = None
    tail_logmass_at: np.ndarray | None = None
    entropy: np.ndarray | None = None
    sketch_codes: np.ndarray | None = None
    residual_samples: np.ndarray | None = None
    residual_mass: np.ndarray | None = None
    source: int = 0


class DecodedShard:
    """A shard with only its stored positions left, by sequence."""

    def __init__(self, rows: Rows) -> None:
        mask, ids = rows["loss_mask"], rows["input_ids"]
        stored = np.flatnonzero(mask.values)
        before = np.concatenate([[0], np.cumsum(mask.values)])[mask.offsets]
        row_of = np.repeat(np.arange(len(rows)), np.diff(before))

        def picked(name: str) -> Ragged:
            return Ragged(rows[name].values[stored], before)

        self._lists = {
            "input_ids": ids,
            "positions": Ragged(stored - mask.offsets[row_of], before),
            # A sequence has one id more than positions; position t predicts the id at t + 1.
            "gold": Ragged(ids.values[stored + row_of + 1], before),
            **{name: picked(name) for name in ("gold_logprob", "tail_logmass", "top_count")},
            **{name: rows[name] for name in _OF_STORED if name in rows.lists},
        }
        if at := next((name for name in rows.lists if column_temperature(name) is not None), None):
            self._lists["tail_logmass_at"] = picked(at)
        if "entropy" in rows.lists:
            self._lists["entropy"] = picked("entropy")

    def sequence(self, row: int, source: int) -> StoredSequence:
        return StoredSequence(source=source, **{name: ragged[row] for name, ragged in self._lists.items()})


class ShardDataset(Dataset):
    """The sequences `sequence_ids` (int64, ascending) of a cache, by random access.

    extra: optional columns to read too: `tail_samples`, `entropy`, one `tail_logmass_T...`, those of a sketch. source:
    the cache's number in the run. checksums: as in StudentOptions. Every shard's counts and values are checked when it
    is first decoded; raises CacheError for one that is not what it says.
    """

    def __init__(
        self,
        cache: Cache,
        sequence_ids: np.ndarray,
        *,
        extra: Sequence[str] = (),
        source: int = 0,
        checksums: str = "start",
    ) -> None:
        self.cache = cache
        self.source = source
        self.checksums = checksums
        self._columns = (*COLUMNS, *extra)
        self.sequence_ids = sequence_ids
        self.shard_of, self._row_of = locate(cache.manifest.shards, sequence_ids)
        self._decoded: OrderedDict[int, DecodedShard] = OrderedDict()
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return len(self.sequence_ids)

    def __getitem__(self, index: int) -> StoredSequence:
        return self._shard(int(self.shard_of[index])).sequence(int(self._row_of[index]), self.source)

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned decodes for itself.
        return {**self.__dict__, "_decoded": OrderedDict()}

    def _shard(self, shard: int) -> DecodedShard:
        if shard in self._decoded:
            self._decoded.move_to_end(shard)
            return self._decoded[shard]
        if self.checksums == "read" and shard not in self._checked:
            self.cache.check_file(shard)
        rows = self.cache.read_shard(shard, self._columns, page_checksums=self.checksums != "off")
        if shard not in self._checked:
            self.cache.check_counts(shard, rows)
            for problem in value_problems(rows, self.cache.manifest):
                raise CacheError(f"{self.cache.shard_path(shard)}: {problem}")
            self._checked.add(shard)
        self._decoded[shard] = DecodedShard(rows)
        while len(self._decoded) > KEPT:
            self._decoded.popitem(last=False)
        return self._decoded[shard]


def sequence_lengths(cache: Cache) -> np.ndarray:
    """int64 `[S]`: token ids of every sequence of a cache, from the offsets of its smallest column; 0 for one that is
    not here."""
    lengths = np.zeros(cache.manifest.corpus.sequences, np.int64)
    for rows in cache.column("loss_mask"):
        lengths[rows.sequence_id] = rows["loss_mask"].lengths + 1
    return lengths


def sequences_here(cache: Cache) -> np.ndarray:
    """bool `[S]`: which sequences the shards that are here hold."""
    here = np.zeros(cache.manifest.corpus.sequences, bool)
    for index in cache.shards_here:
        planned = cache.manifest.shards[index]
        here[planned.first : planned.first + planned.sequences] = True
    return here


@dataclass(frozen=True)
class Collator:
    """Sequences -> one batch.

    Of arrays, because they leave a worker by value: tensors would pass through shared memory, of which containers have
    little, and through a thread that complains when it is interrupted. `as_tensors` is the rest of the way.

    objective: decides rank scope and hard ratio. vocabulary_size: the student's. corpus_threshold: log p(gold) at or
    below which a token is hard, for the rank scope `corpus`. packed: one row that holds all sequences, told apart by
    positions that start anew. sketches: for each cache of the run the number of its sketch, which then comes before its
    codes (`Sketches`); None where all have the same one. shares_within: float64 `[C, 2]` of
    `wider_teacher.shares_within`, where a teacher has more ids than the student.

    The batch: `input_ids` int64 `[B, L]`, right-padded with 0, and `lengths` int64 `[B]`, or packed `[1, T]` with
    `position_ids` int64 `[1, T]`;
    `rows` int64 `[R]`, index of each stored position in the flattened input; `sequence_of` int64 `[R]`; `source`
    int64 `[sequences]`, the cache each sequence comes from; `is_hard` bool `[R]`; and the fields of TeacherRows, in
    the dtypes of the shard. With the rank scope `global-batch`, `is_hard` is right where the batch is the whole
    step, and whoever accumulates or has several devices ranks again (`DistillationTrainer.get_batch_samples`), by
    `rank_logprob` where that is not `gold_logprob`.
    """

    objective: Objective
    vocabulary_size: int
    corpus_threshold: float | None = None
    packed: bool = False
    sketches: tuple[int, ...] | None = None
    shares_within: np.ndarray | None = None

    def __call__(self, sequences: Sequence[StoredSequence] | UserError) -> dict[str, np.ndarray] | UserError:
        # What a worker could not read, on its way to the process that reports it.
        if isinstance(sequences, UserError):
            return sequences
        largest = max(int(s.input_ids.max()) for s in sequences)
        if largest >= self.vocabulary_size:
            return CacheError(
                f"a sequence of the shards holds the token id {largest}, and the student has {self.vocabulary_size} "
                "ids; use a student with a wider head"
            )
        return self.batch(sequences)

    def batch(self, sequences: Sequence[StoredSequence]) -> dict[str, np.ndarray]:
        counts = np.array([len(s.positions) for s in sequences])
        batch, starts = self._inputs(sequences)
        gold_logprob = np.concatenate([s.gold_logprob for s in sequences])
        tail_logmass = np.concatenate([s.tail_logmass for s in sequences])
        tail_at = None
        if sequences[0].tail_logmass_at is not None:
            tail_at = np.concatenate([s.tail_logmass_at for s in sequences if s.tail_logmass_at is not None])
        samples = entropy = None
        if sequences[0].tail_samples is not None:
            samples = np.concatenate([s.tail_samples for s in sequences if s.tail_samples is not None])
            samples = samples.reshape(len(gold_logprob), -1)
        if all(s.entropy is not None for s in sequences):
            entropy = np.concatenate([s.entropy for s in sequences if s.entropy is not None])
        gold = np.concatenate([s.gold for s in sequences])
        rows = TeacherArrays(gold, gold_logprob, tail_logmass, *_padded_entries(sequences), tail_at, samples, entropy)
        source = np.array([s.source for s in sequences])
        batch["is_hard"] = self._is_hard(gold_logprob, counts)
        if self.shares_within is not None:
            # Ranks are the teacher's own.
            batch["rank_logprob"] = gold_logprob
            within = np.repeat(self.shares_within[source], counts, axis=0)
            rows = leave_out_beyond(rows, self.vocabulary_size, within, self.objective.temperature)
        batch |= {
            "rows": np.concatenate([s.positions for s in sequences]) + np.repeat(starts, counts),
            "sequence_of": np.repeat(np.arange(len(sequences)), counts),
            "source": source,
            **{name: values for name, values in vars(rows).items() if values is not None},
        }
        for name in ("sketch_codes", "residual_samples", "residual_mass"):
            if getattr(sequences[0], name) is not None:
                values = np.concatenate([getattr(s, name) for s in sequences])
                batch[name] = values if name == "residual_mass" else values.reshape(len(gold_logprob), -1)
        if self.sketches is not None and "sketch_codes" in batch:
            which = np.repeat([self.sketches[s.source] for s in sequences], counts).astype(np.uint8)
            batch["sketch_codes"] = np.concatenate([which[:, None], batch["sketch_codes"]], 1)
        return batch

    def _inputs(self, sequences: Sequence[StoredSequence]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """What the body reads, and where each sequence starts in it, flattened."""
        lengths = np.array([len(s.input_ids) for s in sequences])
        ids = np.concatenate([s.input_ids for s in sequences])
        if self.packed:
            starts = np.cumsum(lengths) - lengths
            positions = np.arange(len(ids)) - np.repeat(starts, lengths)
            return {"input_ids": ids[None].astype(np.int64), "position_ids": positions[None]}, starts
        padded = np.zeros((len(sequences), lengths.max()), np.int64)
        padded[np.arange(padded.shape[1]) < lengths[:, None]] = ids
        return {"input_ids": padded, "lengths": lengths}, np.arange(len(sequences)) * padded.shape[1]

    def _is_hard(self, gold_logprob: np.ndarray, counts: np.ndarray) -> np.ndarray:
        scope, ratio = self.objective.rank_scope, self.objective.hard_ratio
        if scope == "corpus":
            if self.corpus_threshold is None:
                raise ValueError("the rank scope `corpus` needs the corpus threshold")
            return gold_logprob <= self.corpus_threshold
        if scope == "sequence":
            return ranking.is_hard_by_sequence(gold_logprob, counts, ratio)
        return ranking.is_hard(gold_logprob, ratio)


def as_tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """A batch of the Collator as the model takes it, on the CPU, without a copy."""
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _padded_entries(sequences: Sequence[StoredSequence]) -> tuple[np.ndarray, np.ndarray]:
    """Entries as `[R, N]`, N the widest of the batch, padded with id 0 and -inf; arrays of their own."""
    count = np.concatenate([s.top_count for s in sequences])
    ids = np.concatenate([s.top_ids for s in sequences])
    logprobs = np.concatenate([s.top_logprobs for s in sequences])
    width = int(count.max(initial=1))
    if (count == width).all():
        return ids.reshape(-1, width), logprobs.reshape(-1, width)
    present = np.arange(width) < count[:, None]
    padded_ids = np.zeros(present.shape, ids.dtype)
    padded_logprobs = np.full(present.shape, -np.inf, logprobs.dtype)
    padded_ids[present] = ids
    padded_logprobs[present] = logprobs
    return padded_ids, padded_logprobs


def teacher_rows(batch: dict[str, torch.Tensor]) -> TeacherRows:
    """A batch's rows in the dtypes of the arithmetic; widened here, on the device, and not on the way to it."""
    samples, residual = batch.get("tail_samples"), batch.get("residual_samples")
    return TeacherRows(
        batch["gold"].long(),
        batch["gold_logprob"],
        batch["tail_logmass"],
        batch["top_ids"].long(),
        batch["top_logprobs"].float(),
        None if samples is None else samples.long(),
        batch.get("entropy"),
        batch.get("sketch_codes"),
        None if residual is None else residual.long(),
        batch.get("residual_mass"),
    )


def corpus_threshold(parts: Iterable[tuple[Cache, np.ndarray]], hard_ratio: HardRatio) -> float:
    """The threshold of the rank scope `corpus`: over the stored positions of these sequences, all at once.

    parts: caches, each with the ids of its sequences that count.
    """
    gold: list[np.ndarray] = []
    for cache, sequence_ids in parts:
        wanted = np.zeros(cache.manifest.corpus.sequences, bool)
        wanted[sequence_ids] = True
        for rows in cache.column("sequence_id", "loss_mask", "gold_logprob"):
            mask = rows["loss_mask"]
            keep = mask.values & np.repeat(wanted[rows.sequence_id], mask.lengths)
            gold.append(rows["gold_logprob"].values[keep])
    return ranking.hard_threshold(np.concatenate(gold), hard_ratio)
