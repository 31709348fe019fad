"""Turn the answers of a teacher into the rows of a shard, and refuse answers that cannot be true.

The rows are held against the checks that every reader of a cache makes, before anything is written: an engine that
answers something else, raw logits say, would cost the whole run otherwise.
"""

from __future__ import annotations

import re

import numpy as np

from stages.statistics import StatisticsOptions
from stages.teacher import ScoredSequence
from storage import schema
from storage.errors import RunError
from storage.manifest import CorpusIdentity, Manifest, PlannedShard, ScoringOptions
from storage.rows import Ragged, Rows
from storage.shard import structure_problems, value_problems

# What is likely behind numbers that are no log-probabilities, by the engine's name in the manifest.
_CAUSES = {
    "vllm-prompt-logprobs": "does vLLM answer logits (its argument logprobs_mode)? Leave that argument out",
    "server-prompt-logprobs": "was the server started with --logprobs-mode raw_logits or processed_logits? Start it "
    "without that option",
}
_OTHER_CAUSE = "the fault is the engine's, not the corpus's: score with another engine"


def refuse_impossible(rows: Rows, manifest: Manifest, index: int) -> None:
    """RunError for rows of shard `index` that break the format, naming engine, sequence and position."""
    problem = first_problem(rows, manifest, index)
    if problem is not None:
        engine = manifest.scoring.engine
        raise RunError(
            f"the engine {engine} gave what cannot be, so shard {index} is not written: {problem}; "
            f"{likely_cause(engine)}"
        )


def likely_cause(engine: str) -> str:
    """Return the likely cause of impossible numbers of this engine, by its name in the manifest."""
    return _CAUSES.get(engine, _OTHER_CAUSE)


def problem_of(scored: ScoredSequence, options: StatisticsOptions, vocabulary_size: int) -> str | None:
    """The first break of the format in one sequence, number 0, that belongs to no cache."""
    length = len(scored.sequence.input_ids)
    scoring = ScoringOptions(
        engine="",
        dtype="",
        top_n=options.top_n,
        logprob_bits=32,
        temperatures=options.temperatures,
        tail_samples=options.tail_samples,
        entropy=not np.isnan(scored.entropy).any(),
        max_length=length,
        tail_epsilon=options.tail_epsilon,
        min_n=options.min_n,
    )
    shard = PlannedShard(first=0, sequences=1, tokens=length)
    corpus = CorpusIdentity(fingerprint="", sequences=1, tokens=2)
    manifest = Manifest.model_construct(
        scoring=scoring, vocabulary_size=vocabulary_size, shards=(shard,), corpus=corpus
    )
    return first_problem(rows_from_scored([scored], scoring), manifest, 0)


def first_problem(rows: Rows, manifest: Manifest, index: int) -> str | None:
    """The first break of the format in rows that are to be shard `index`; None where there is none."""
    planned = manifest.shards[index]
    if len(rows) != planned.sequences:
        return f"{len(rows)} sequences, asked for {planned.sequences}"
    problems = list(structure_problems(rows, manifest, index)) or value_problems(rows, manifest)
    # Whoever reads this knows sequences, not rows of a shard that is not there.
    return re.sub(r"^row (\d+)", lambda m: f"sequence {planned.first + int(m[1])}", problems[0]) if problems else None


def rows_from_scored(sequences: list[ScoredSequence], scoring: ScoringOptions) -> Rows:
    """The rows of a shard: statistics in float32 become the columns of the format."""
    kept = [s.top_ids >= 0 for s in sequences]
    lists = {
        "input_ids": [s.sequence.input_ids for s in sequences],
        "loss_mask": [s.sequence.loss_mask for s in sequences],
        "gold_logprob": [s.gold_logprob for s in sequences],
        "tail_logmass": [s.tail_logmass for s in sequences],
        "entropy": [s.entropy for s in sequences],  # NaN where the engine cannot tell; then there is no such column
        "top_count": [_at_stored(s.sequence.loss_mask, _counts(k)) for s, k in zip(sequences, kept, strict=True)],
        "top_ids": [_picked(s.top_ids, k) for s, k in zip(sequences, kept, strict=True)],
        "top_logprobs": [
            rounded(_picked(s.top_logprobs, k), scoring.logprob_bits) for s, k in zip(sequences, kept, strict=True)
        ],
        "tail_samples": [s.tail_samples.ravel() for s in sequences],
        "sketch_codes": [s.sketch_codes.ravel() for s in sequences if s.sketch_codes is not None],
        "residual_samples": [s.residual_samples.ravel() for s in sequences if s.residual_samples is not None],
        "residual_mass": [s.residual_mass for s in sequences if s.residual_mass is not None],
    }
    for column, temperature in enumerate(scoring.temperatures):
        name = schema.temperature_column(temperature).name
        lists[name] = [s.tail_logmass_at[:, column] for s in sequences]
    source_rows = [s.sequence.source_row for s in sequences if s.sequence.source_row is not None]
    return Rows(
        np.array([s.sequence.sequence_id for s in sequences], np.int64),
        {
            column.name: Ragged.from_lists(lists[column.name], column.dtype)
            for column in scoring.columns
            if column.is_list
        },
        np.array(source_rows, np.int64) if source_rows else None,
    )


def _picked(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The entries that are kept, flat."""
    return values.ravel() if kept.all() else values[kept]


def _counts(kept: np.ndarray) -> np.ndarray:
    """Return the number of entries that each position keeps."""
    return np.full(len(kept), kept.shape[1]) if kept.all() else kept.sum(1)


def rounded(logprobs: np.ndarray, bits: int) -> np.ndarray:
    """As float16 where that is what is stored: torch rounds as numpy does, ten times as fast."""
    import torch

    return torch.from_numpy(logprobs).half().numpy() if bits == 16 else logprobs


def _at_stored(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One value per position, 0 where the loss mask is not set."""
    whole = np.zeros(len(mask), values.dtype)
    whole[mask] = values
    return whole
