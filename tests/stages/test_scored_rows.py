"""What no engine may have written: a real teacher's numbers, spoiled on their way into a shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages import caching
from stages.cache_options import CacheOptions
from stages.caching import prepare, run
from stages.corpus import Sequence
from stages.engines import EngineOptions
from stages.teacher import Scored, ScoredSequence, Teacher
from storage.errors import RunError
from tests.conftest import VOCABULARY, Tiny

SPOILED = 5  # the sequence


class Spoiled(Teacher):
    """Another teacher, one of whose sequences is spoiled."""

    def __init__(self, teacher: Teacher, spoil: Callable[[ScoredSequence], ScoredSequence | None]) -> None:
        self._teacher, self._spoil = teacher, spoil
        self.vocabulary_size, self.description = teacher.vocabulary_size, teacher.description

    def score(self, sequences: list[Sequence], progress: Callable[[int], None]) -> Scored:
        scored = self._teacher.score(sequences, progress)
        found = [self._spoil(one) if one.sequence.sequence_id == SPOILED else one for one in scored.sequences]
        return replace(scored, sequences=[one for one in found if one is not None])


def logits(scored: ScoredSequence) -> ScoredSequence:
    """What an engine answers that was told to: the same numbers, each position higher by its own."""
    more = np.linspace(5, 9, len(scored.gold_logprob), dtype=np.float32)
    mask = scored.sequence.loss_mask
    return replace(
        scored, gold_logprob=scored.gold_logprob + more, top_logprobs=scored.top_logprobs + more[mask][:, None]
    )


def at(name: str, value: float, place: tuple[int, ...] = (3,)) -> Callable[[ScoredSequence], ScoredSequence]:
    def spoil(scored: ScoredSequence) -> ScoredSequence:
        values = getattr(scored, name).copy()
        values[place] = value
        return replace(scored, **{name: values})

    return spoil


def shifted(scored: ScoredSequence) -> ScoredSequence:
    return replace(scored, top_ids=np.roll(scored.top_ids, 1, 0), top_logprobs=np.roll(scored.top_logprobs, 1, 0))


CASES: dict[str, tuple[Callable[[ScoredSequence], ScoredSequence | None], str]] = {
    "logits": (logits, r"sequence 5, position \d+: gold_logprob is [\d.]+, not a log-probability"),
    "logits below 0": (
        lambda s: replace(s, gold_logprob=s.gold_logprob - 40, top_logprobs=s.top_logprobs - 40),
        r"sequence 5, position 0: the kept set and the tail sum to",
    ),
    "no number": (at("gold_logprob", np.nan), "sequence 5, position 3: gold_logprob is nan"),
    "nothing": (at("gold_logprob", -np.inf), "sequence 5, position 3: gold_logprob is -inf"),
    "no number in the top-N": (at("top_logprobs", np.nan, (3, 1)), "sequence 5, position 3: .*nan"),
    "no number in the tail": (at("tail_logmass", np.nan), "sequence 5, position 3: tail_logmass is nan"),
    "a tail of more than all": (at("tail_logmass", 0.5), "sequence 5, position 3: tail_logmass is 0.5"),
    "a heavy tail": (at("tail_logmass", 0.0), "sequence 5, position 3: the kept set and the tail sum to"),
    "entropy": (at("entropy", -1.0), "sequence 5, position 3: entropy is -1"),
    "beyond the vocabulary": (
        at("top_ids", VOCABULARY, (3, 2)),
        f"sequence 5, position 3: top-N id {VOCABULARY} is outside 0..{VOCABULARY - 1}",
    ),
    "no id": (at("top_ids", -7, (3, 2)), "sequence 5, position 3: top_count is 7, this cache keeps 8"),
    "ascending": (
        lambda s: replace(s, top_ids=s.top_ids[:, ::-1], top_logprobs=s.top_logprobs[:, ::-1]),
        "sequence 5, position 0: top_logprobs do not descend",
    ),
    "another position's": (shifted, "sequence 5, position .*shifted"),
    "a sequence too few": (lambda s: None, "sequences, asked for"),
}


@pytest.mark.parametrize(("case", "bits"), [*((case, 16) for case in CASES), ("logits below 0", 8)])
def test_nothing_that_cannot_be_is_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, bits: int
) -> None:
    spoil, told = CASES[case]
    load = caching.load_teacher
    monkeypatch.setattr(caching, "load_teacher", lambda prepared: Spoiled(load(prepared), spoil))
    engine = EngineOptions(str(tiny.teacher), "transformers")
    given = {"top_n": 8, "tail_samples": 0, "shard_tokens": 300, "processes": 1, "limit": 8, "logprob_bits": bits}
    prepared = prepare(CacheOptions(engine, str(tiny.corpus), str(tmp_path / "cache"), **given))
    bad = next(i for i, s in enumerate(prepared.manifest.shards) if s.first <= SPOILED < s.first + s.sequences)
    with pytest.raises(RunError, match=told) as caught:
        run(prepared, lambda tokens: None)
    said = str(caught.value)
    assert said.startswith(f"the engine transformers gave what cannot be, so shard {bad} is not written: ")
    assert "the fault is the engine's" in said and "\n" not in said
    written = {path.stem for path in (tmp_path / "cache" / "shards").glob("*.json")}
    assert written == {f"part-{index:05}" for index in range(bad)}
    assert said.endswith(f"; {bad} of {len(prepared.manifest.shards)} shards are finished and kept")
    if case == "logits":  # The same command goes on.
        monkeypatch.setattr(caching, "load_teacher", load)
        again = prepare(CacheOptions(engine, str(tiny.corpus), str(tmp_path / "cache"), **given))
        assert again.pending[0] == bad
        assert run(again, lambda tokens: None)[0].is_sealed
