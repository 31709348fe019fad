"""The embedded default teacher: a transformers causal LM on CPU, CUDA or MPS.

Batches are formed by token budget from sequences of similar length. The body runs on a batch at once; the head and
the statistics run on slices of rows, so that no `[tokens, vocabulary]` tensor ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from stages.causal_lm import take_apart, vocabulary_size
from stages.corpus import Sequence as TokenSequence
from stages.pretrained import is_quantized, load_causal_lm, load_config
from stages.rope import SequenceRope
from stages.sketch import HiddenMoments, Sketch
from stages.sketch_calibration import calibrate_head, soft_cap_of
from stages.statistics import (
    RowStatistics,
    StatisticsOptions,
    residual_uniforms,
    row_statistics,
    rows_per_slice,
    sample_uniforms,
)
from stages.teacher import EngineDescription, Scored, ScoredSequence, Teacher, check_sequences
from storage.errors import RunError

# What every scored position has; the rest is of those with a loss.
_EVERYWHERE = ("gold_logprob", "tail_logmass", "entropy", "tail_logmass_at")


def default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


class TransformersTeacher(Teacher):
    """Scores with `AutoModelForCausalLM`. `batch_tokens` bounds the tokens, padding included, of one forward pass.

    Raises UserError for a model that cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        options: StatisticsOptions,
        *,
        dtype: str = "float32",
        device: torch.device | str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        batch_tokens: int = 8192,
    ) -> None:
        self.options = options
        self.batch_tokens = batch_tokens
        self.device = torch.device(device) if device is not None else default_device()
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        if is_quantized(load_config(model, **source)):
            # Some kinds of quantised weights cannot be moved once they are loaded.
            loaded = load_causal_lm(model, dtype=getattr(torch, dtype), device_map={"": self.device}, **source)
        else:
            loaded = load_causal_lm(model, dtype=getattr(torch, dtype), **source)
            loaded.to(device=self.device)  # type: ignore[call-arg]
        self._model = loaded.eval()
        self._parts = take_apart(self._model, fp32_head=True)
        self.vocabulary_size = vocabulary_size(self._model)
        self.notes = (self._parts.note,) if self._parts.note else ()
        self._rope = SequenceRope(self._model)
        self._sketch: Sketch | None = None
        import transformers

        self.description = EngineDescription(
            "transformers", dtype, versions={"transformers": transformers.__version__, "torch": torch.__version__}
        )

    @torch.inference_mode()
    def score(self, sequences: Sequence[TokenSequence], progress: Callable[[int], None]) -> Scored:
        check_sequences(sequences, None, self.vocabulary_size)
        results: list[ScoredSequence | None] = [None] * len(sequences)
        # MPS has no float64, so there the sum lives on the CPU.
        place = torch.device("cpu") if self.device.type == "mps" else self.device
        prior_sum = torch.zeros(self.vocabulary_size, dtype=torch.float64, device=place)
        try:
            for batch in batches_by_tokens([len(s.input_ids) for s in sequences], self.batch_tokens):
                for index, scored in zip(
                    batch, self._score_batch([sequences[i] for i in batch], prior_sum), strict=True
                ):
                    results[index] = scored
                progress(sum(len(sequences[i].input_ids) for i in batch))
        except torch.OutOfMemoryError:
            raise self._out_of_memory() from None
        finished = [scored for scored in results if scored is not None]
        return Scored(finished, prior_sum.cpu().numpy(), sum(len(s.top_ids) for s in finished))

    @torch.inference_mode()
    def calibrate(self, sequences: Sequence[TokenSequence], rank: int, progress: Callable[[int], None]) -> Sketch:
        moments: HiddenMoments | None = None
        try:
            for batch in batches_by_tokens([len(s.input_ids) for s in sequences], self.batch_tokens):
                chosen = [sequences[i] for i in batch]
                hidden, rows = self._hidden(chosen)
                stored = rows[np.concatenate([s.loss_mask for s in chosen])]
                moments = moments or HiddenMoments(hidden.shape[1], self.device)
                moments.add(hidden[torch.from_numpy(stored).to(self.device)])
                progress(sum(len(s.input_ids) for s in chosen))
            assert moments is not None
            sketch = calibrate_head(
                moments,
                self._parts.head,
                self.vocabulary_size,
                rank,
                hidden[:0],
                soft_cap=soft_cap_of(self._model.config),
            )
        except torch.OutOfMemoryError:
            raise self._out_of_memory() from None
        assert sketch is not None
        return sketch

    def use_sketch(self, sketch: Sketch) -> None:
        self._sketch = sketch.to(self.device)

    def _out_of_memory(self) -> RunError:
        return RunError(
            f"out of memory on {self.device} with {self.batch_tokens} tokens a batch; lower --batch-tokens "
            "and start the same command again"
        )

    def _hidden(self, batch: Sequence[TokenSequence]) -> tuple[torch.Tensor, np.ndarray]:
        """Return the body's states of a padded batch, `[B * L, H]`, and where in them each scored position is."""
        input_ids, rows = _padded(batch)
        lengths = torch.tensor([len(s.input_ids) for s in batch], device=self.device)
        with self._rope.reading(lengths):
            return self._parts.body(torch.from_numpy(input_ids).to(self.device)).flatten(0, 1), rows

    def _score_batch(self, batch: list[TokenSequence], prior_sum: torch.Tensor) -> list[ScoredSequence]:
        gold = np.concatenate([s.input_ids[1:] for s in batch]).astype(np.int64)
        mask = np.concatenate([s.loss_mask for s in batch])
        uniforms = None
        if self.options.tail_samples:
            uniforms = np.concatenate([sample_uniforms(s.input_ids, self.options) for s in batch])
        residuals = None
        if self.options.residual_samples:
            residuals = np.concatenate([residual_uniforms(s.input_ids, self.options) for s in batch])

        hidden, rows = self._hidden(batch)
        size = rows_per_slice(self.vocabulary_size)
        parts: list[dict[str, np.ndarray]] = []
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            states = hidden[torch.from_numpy(rows[part]).to(self.device)]
            codes = None if self._sketch is None else self._sketch.encode(states)
            statistics = row_statistics(
                self._parts.head(states),
                torch.from_numpy(gold[part]).to(self.device),
                self.options,
                uniforms=None if uniforms is None else torch.from_numpy(uniforms[part]),
                prior_sum=prior_sum,
                prior_rows=torch.from_numpy(mask[part]).to(self.device),
                sketch_logits=None if self._sketch is None or codes is None else self._sketch.logits(codes),
                residual_uniforms=None if residuals is None else torch.from_numpy(residuals[part]),
            )
            parts.append(_to_numpy(statistics, codes, mask[part]))
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if not np.isfinite(whole["gold_logprob"]).all():
            raise RunError(
                f"the teacher gave a non-finite log-probability (sequence {batch[0].sequence_id} or near it); "
                "try --dtype float32 or bfloat16"
            )
        return list(_split(batch, whole))


def _padded(batch: Sequence[TokenSequence]) -> tuple[np.ndarray, np.ndarray]:
    """int64 `[B, L]`, right-padded with 0, and int64 `[rows]`: each scored position's index in it, flattened."""
    lengths = [len(s.input_ids) for s in batch]
    width = max(lengths)
    input_ids = np.zeros((len(batch), width), np.int64)
    for row, sequence in enumerate(batch):
        input_ids[row, : lengths[row]] = sequence.input_ids
    # The last id of a sequence predicts nothing inside it: L ids, L-1 scored positions.
    return input_ids, np.concatenate([np.arange(n - 1) + row * width for row, n in enumerate(lengths)])


def batches_by_tokens(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length whose padded size stays within `batch_tokens` (one at the least)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _to_numpy(statistics: RowStatistics, codes: torch.Tensor | None, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Per-position arrays in full; top-N, samples and codes of the masked-in positions only."""
    stored = torch.from_numpy(mask).to(statistics.top_ids.device)
    whole = {
        "gold_logprob": statistics.gold_logprob,
        "tail_logmass": statistics.tail_logmass,
        "entropy": statistics.entropy,
        "tail_logmass_at": statistics.tail_logmass_at,
        "top_ids": statistics.top_ids[stored].int(),
        "top_logprobs": statistics.top_logprobs[stored],
        "tail_samples": statistics.tail_samples[stored].int(),
    }
    if codes is not None:
        whole |= {
            "sketch_codes": codes[stored],
            "residual_samples": statistics.residual_samples[stored].int(),
            "residual_mass": statistics.residual_mass[stored],
            "sketch_kl": statistics.sketch_kl[stored],
        }
    return {name: value.cpu().numpy() for name, value in whole.items()}


def _split(batch: list[TokenSequence], whole: dict[str, np.ndarray]) -> Iterator[ScoredSequence]:
    """Cut the arrays of a batch at its sequences."""
    position = stored = 0
    for sequence in batch:
        positions = slice(position, position + len(sequence.loss_mask))
        entries = slice(stored, stored + int(sequence.loss_mask.sum()))
        position, stored = positions.stop, entries.stop
        yield ScoredSequence(
            sequence,
            **{name: values[positions if name in _EVERYWHERE else entries] for name, values in whole.items()},
        )
