"""What every teacher is to the rest of the code: something that scores token sequences.

Three implementations, and nobody else asks which one it has: `teacher_transformers` (the embedded default),
`teacher_vllm` (in process) and `teacher_server` (a vLLM server that already runs).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from stages.corpus import Sequence as TokenSequence
from storage.errors import RunError, UserError

if TYPE_CHECKING:
    from stages.sketch import Sketch

SKETCH_ENGINES = "choose --engine transformers, or vllm with its pooling route"


@dataclass
class ScoredSequence:
    """The teacher's statistics of one sequence of L ids; P of its L-1 scored positions have the loss mask set.

    Position t is the distribution after `input_ids[:t+1]`; its gold token is `input_ids[t+1]`.
    All log-probabilities in nats at temperature 1, except `tail_logmass_at`.
    """

    sequence: TokenSequence
    gold_logprob: np.ndarray  # float32 [L-1]
    tail_logmass: np.ndarray  # float32 [L-1]
    entropy: np.ndarray  # float32 [L-1]
    top_ids: np.ndarray  # int32 [P, N], by descending log-probability; -1 where a position keeps fewer
    top_logprobs: np.ndarray  # float32 [P, N], -inf there
    tail_logmass_at: np.ndarray  # float32 [L-1, len(temperatures)]
    tail_samples: np.ndarray  # int32 [P, M]
    # With a sketch (stages.sketch); the KL is that from the teacher to what the codes give back, in nats.
    sketch_codes: np.ndarray | None = None  # uint8 [P, r]
    residual_samples: np.ndarray | None = None  # int32 [P, M]
    residual_mass: np.ndarray | None = None  # float32 [P]
    sketch_kl: np.ndarray | None = None  # float32 [P]


@dataclass
class Scored:
    """What a teacher gives back for one shard: its sequences in the order given, and their summed tail."""

    sequences: list[ScoredSequence]
    tail_prior_sum: np.ndarray | None  # float64 [V]: sum over the P stored positions; None where the engine cannot
    stored_positions: int


@dataclass(frozen=True)
class EngineDescription:
    """Which engine scored, for the manifest. `name` is part of a cache's identity, the versions are not."""

    name: str
    dtype: str
    reason: str = ""
    versions: dict[str, str] = field(default_factory=dict)


class Teacher(ABC):
    """A loaded teacher. `vocabulary_size` is V, the width of its logits (padding of the head included)."""

    vocabulary_size: int
    description: EngineDescription
    # Sentences on how it scores, for whoever starts the run.
    notes: tuple[str, ...] = ()

    @abstractmethod
    def score(self, sequences: Sequence[TokenSequence], progress: Callable[[int], None]) -> Scored:
        """Score one shard. `progress` is called with the number of tokens finished since the last call.

        Deterministic: the same sequences in the same order give the same numbers on the same machine.
        Raises RunError (out of memory, non-finite logits, a dead engine).
        """

    def calibrate(self, sequences: Sequence[TokenSequence], rank: int, progress: Callable[[int], None]) -> Sketch:
        """A sketch of this rank of the hidden states at the positions of `sequences` with a loss.

        `progress` as in `score`; deterministic as `score` is. Raises RunError as `score` does, and UserError for an
        engine that does not see hidden states or a teacher whose head no sketch can follow.
        """
        raise UserError(f"--sketch-rank: the engine {self.description.name} shows no hidden states; {SKETCH_ENGINES}")

    def use_sketch(self, sketch: Sketch) -> None:
        """Code every position that is scored from now on with this sketch. Raises as `calibrate` does."""
        raise UserError(f"--sketch-rank: the engine {self.description.name} shows no hidden states; {SKETCH_ENGINES}")

    def check_length(self, longest: int) -> None:  # noqa: B027 - most engines are told the length when they are loaded
        """UserError where the engine takes no sequences of `longest` ids."""

    def close(self) -> None:  # noqa: B027 - most teachers hold nothing to give back
        """Free the accelerator and end any process of the engine."""


def check_sequences(sequences: Sequence[TokenSequence], max_length: int | None, vocabulary_size: int | None) -> None:
    """UserError for a sequence that the engine could only refuse. None: no limit is known."""
    for sequence in sequences:
        ids = sequence.input_ids
        if len(ids) < 2 or (max_length is not None and len(ids) > max_length):
            most = "or more" if max_length is None else f"to {max_length}"
            raise UserError(f"sequence {sequence.sequence_id} has {len(ids)} ids; the teacher takes 2 {most} of them")
        if vocabulary_size is not None and not (int(ids.min()) >= 0 and int(ids.max()) < vocabulary_size):
            raise UserError(
                f"sequence {sequence.sequence_id} holds id {int(ids.max())}, the teacher's vocabulary has "
                f"{vocabulary_size}: the corpus was tokenized for another model"
            )


def refuse_non_finite(sequence: TokenSequence, *values: np.ndarray) -> None:
    if not all(np.isfinite(v).all() for v in values):
        raise RunError(
            f"the teacher gave a non-finite log-probability in sequence {sequence.sequence_id}; "
            "try --dtype float32 or bfloat16"
        )
