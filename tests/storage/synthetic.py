"""Small caches written from made-up distributions: what the tests of `storage` need and no model gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storage import schema
from storage.cache import Cache
from storage.manifest import CorpusIdentity, Manifest, ScoringOptions, TeacherIdentity, TokenizerIdentity
from storage.plan import plan_shards
from storage.rows import Ragged, Rows

LENGTHS = (5, 2, 7, 4, 6, 3)


def make_manifest(
    lengths: Sequence[int] = LENGTHS, *, vocabulary: int = 300, shard_tokens: int = 12, top_n: int = 4, **scoring: Any
) -> Manifest:
    options = {"engine": "made-up", "dtype": "float32", "top_n": top_n, "max_length": 64, **scoring}
    return Manifest(
        teacher=TeacherIdentity(name="nobody", architecture="None", config_sha256="0" * 64),
        tokenizer=TokenizerIdentity(vocabulary_sha256="1" * 64, behaviour_sha256="2" * 64, tokens=vocabulary),
        vocabulary_size=vocabulary,
        corpus=CorpusIdentity(fingerprint="3" * 64, sequences=len(lengths), tokens=sum(lengths)),
        scoring=ScoringOptions(**options),
        shards=plan_shards(np.array(lengths), shard_tokens),
        source={"dataset": "made up"},
        made_with={"numpy": np.__version__},
    )


def make_rows(manifest: Manifest, index: int, *, seed: int = 0, masked: bool = True) -> tuple[Rows, np.ndarray]:
    """The rows of shard `index`, true to the format, and their summed tail (float64 `[V]`).

    Lengths are those of LENGTHS. `masked`: some positions carry no loss; the shard's first row carries none at all.
    """
    planned, scoring, vocabulary = manifest.shards[index], manifest.scoring, manifest.vocabulary_size
    lists: dict[str, list[np.ndarray]] = {column.name: [] for column in scoring.columns if column.is_list}
    tail_sum = np.zeros(vocabulary)
    for sequence in range(planned.first, planned.first + planned.sequences):
        random = np.random.default_rng([seed, sequence])
        length = LENGTHS[sequence % len(LENGTHS)]
        ids = random.integers(0, vocabulary, length)
        logits = random.normal(scale=4.0, size=(length - 1, vocabulary))
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        mask = random.random(length - 1) < 0.7 if masked else np.ones(length - 1, bool)
        if masked and sequence == planned.first:
            mask[:] = False
        gold = ids[1:]
        top = np.argsort(-log_p, 1, kind="stable")[:, : scoring.top_n]
        kept = np.zeros_like(log_p, bool)
        np.put_along_axis(kept, top, True, 1)
        np.put_along_axis(kept, gold[:, None], True, 1)
        tail = np.where(kept, -np.inf, log_p)
        tail_sum += np.exp(tail[mask]).sum(0)
        stored = {
            "input_ids": ids,
            "loss_mask": mask,
            "gold_logprob": np.take_along_axis(log_p, gold[:, None], 1)[:, 0],
            "tail_logmass": _logsumexp(tail),
            "entropy": -(np.exp(log_p) * log_p).sum(1),
            "top_count": np.where(mask, scoring.top_n, 0),
            "top_ids": top[mask].ravel(),
            "top_logprobs": np.take_along_axis(log_p, top, 1)[mask].ravel(),
        }
        for temperature in scoring.temperatures:
            stored[schema.temperature_column(temperature).name] = _logsumexp(tail / temperature)
        if scoring.tail_samples:
            stored["tail_samples"] = np.array(
                [random.choice(np.flatnonzero(~row), scoring.tail_samples) for row in kept[mask]], np.int64
            ).reshape(-1)
        for name, values in stored.items():
            lists[name].append(values)
    rows = Rows(
        np.arange(planned.first, planned.first + planned.sequences, dtype=np.int64),
        {
            column.name: Ragged.from_lists(lists[column.name], column.dtype)
            for column in scoring.columns
            if column.is_list
        },
    )
    return rows, tail_sum


def _logsumexp(values: np.ndarray) -> np.ndarray:
    highest = values.max(1, keepdims=True)
    safe = np.where(np.isfinite(highest), highest, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values - safe).sum(1)) + safe[:, 0]


def write_cache(path: Path, manifest: Manifest, *, seal: bool = True) -> Cache:
    """Work off whatever is pending at `path`, in the order of a real run."""
    cache = Cache.create_or_resume(path, manifest)
    for index in range(len(manifest.shards)):
        if not cache.is_done(index):
            cache.write_shard(index, *make_rows(manifest, index), seconds=0.0)
    if seal:
        cache.seal("the card\n")
    return cache


def replaced(rows: Rows, **lists: np.ndarray) -> Rows:
    """`rows` with the values (not the lengths) of some columns replaced."""
    changed = {name: Ragged(values, rows[name].offsets) for name, values in lists.items()}
    return Rows(rows.sequence_id, {**rows.lists, **changed})
