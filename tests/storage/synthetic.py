"""Small caches written from made-up distributions: what the tests of `storage` need and no model gives."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storage import schema
from storage.cache import Cache
from storage.manifest import (
    CorpusIdentity,
    Manifest,
    ScoringOptions,
    SketchIdentity,
    TeacherIdentity,
    TokenizerIdentity,
)
from storage.plan import plan_shards
from storage.rows import Ragged, Rows
from storage.sketch_file import SHAPES, SketchFile

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
        if scoring.sketch is not None:
            stored |= made_up_residuals(random, np.exp(tail[mask]), kept[mask], scoring.sketch)
        for name, values in stored.items():
            if name in lists:
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


def made_up_residuals(
    random: np.random.Generator, tail: np.ndarray, kept: np.ndarray, sketch: SketchIdentity
) -> dict[str, np.ndarray]:
    """Codes of nothing, and the residuals of some tail w against `tail` (float64 `[P, V]`, 0 where kept)."""
    samples: list[int] = []
    mass: list[float] = []
    for p, inside in zip(tail, kept, strict=True):
        w = np.where(inside, 0.0, random.random(len(p)))
        gap = p / max(p.sum(), 1e-30) - w / max(w.sum(), 1e-30)
        mass.append(np.abs(gap).sum())
        if mass[-1]:
            above, below = np.maximum(gap, 0), np.maximum(-gap, 0)
            more = (sketch.residual_samples + 1) // 2
            samples += random.choice(len(p), more, p=above / above.sum()).tolist()
            samples += random.choice(len(p), sketch.residual_samples - more, p=below / below.sum()).tolist()
        else:
            samples += [0] * sketch.residual_samples
    return {
        "sketch_codes": random.integers(1, 256, len(tail) * sketch.rank),
        "residual_samples": np.array(samples, np.int64),
        "residual_mass": np.array(mass, np.float64),
    }


def make_sketch(rank: int = 3, *, vocabulary: int = 300, hidden: int = 6, seed: int = 0) -> SketchFile:
    random = np.random.default_rng(seed)
    sizes = {"V": vocabulary, "r": rank, "H": hidden, "K": hidden}
    tensors = {
        name: random.random([sizes[dimension] for dimension in dimensions.split()]) + 0.5
        for name, (dimensions, _) in SHAPES.items()
    }
    # As they come back from the file.
    return SketchFile(
        {name: tensors[name].astype(kind) for name, (_, kind) in SHAPES.items()}, {"logit_scale": 1.0, "soft_cap": None}
    )


def sketch_options(sketch: SketchFile, residual_samples: int = 4) -> SketchIdentity:
    """What the manifest says of a cache with this sketch."""
    rank = sketch.tensors["basis"].shape[1]
    digest = hashlib.sha256(sketch.to_bytes()).hexdigest()
    return SketchIdentity(rank=rank, residual_samples=residual_samples, positions=100, sha256=digest)


def _logsumexp(values: np.ndarray) -> np.ndarray:
    highest = values.max(1, keepdims=True)
    safe = np.where(np.isfinite(highest), highest, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values - safe).sum(1)) + safe[:, 0]


def write_cache(path: Path, manifest: Manifest, *, seal: bool = True, sketch: SketchFile | None = None) -> Cache:
    """Work off whatever is pending at `path`, in the order of a real run."""
    if sketch is not None:
        Cache.claim_sketch(path, sketch.to_bytes())
    cache = Cache.create_or_resume(path, manifest)
    for index in range(len(manifest.shards)):
        if not cache.is_done(index):
            kl = 0.5 if sketch is not None else None
            cache.write_shard(index, *make_rows(manifest, index), seconds=0.0, sum_sketch_kl=kl)
    if seal:
        cache.seal("the card\n")
    return cache


def replaced(rows: Rows, **lists: np.ndarray) -> Rows:
    """`rows` with the values (not the lengths) of some columns replaced."""
    changed = {name: Ragged(values, rows[name].offsets) for name, values in lists.items()}
    return Rows(rows.sequence_id, {**rows.lists, **changed})
