"""The sketch of a teacher, made once per cache from what it says about the first positions of the corpus.

Every engine has two things to give: the moments of its hidden states, and a head `[C, H] -> [C, V]`, of which nothing
is known but what it does. Fed with unit vectors, it shows its own weight matrix, with whatever scale the model puts on
its logits inside and however its rows are spread over devices. Only a cap on the logits must be known by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from stages.corpus import Corpus
from stages.corpus import Sequence as TokenSequence
from stages.sketch import HiddenMoments, Sketch, calibrate
from storage.errors import RunError, UserError
from storage.manifest import Manifest
from storage.sketch_file import SHAPES, SketchFile

# `[C, H] -> [C, V]`; None on the tensor-parallel ranks that only take part in the gather.
Head = Callable[[torch.Tensor], torch.Tensor | None]

DEFAULT_POSITIONS = 1 << 15
# Bytes of logits at a time while the head is fed with unit vectors.
_HEAD_BYTES = 64 << 20
# Sequences read from the corpus at a time.
_READ = 256


def calibration_sequences(corpus: Corpus, positions: int) -> list[TokenSequence]:
    """The first sequences of the corpus that have `positions` positions with a loss together, or all of them."""
    sequences: list[TokenSequence] = []
    found = 0
    for start in range(0, len(corpus), _READ):
        for sequence in corpus.read(start, min(start + _READ, len(corpus))):
            sequences.append(sequence)
            found += int(sequence.loss_mask.sum())
            if found >= positions:
                return sequences
    return sequences


def calibration_id(manifest: Manifest) -> str:
    """What a sketch was made from, so that one that lies about is not taken for another: hex of a sha256."""
    scoring, sketch = manifest.scoring, manifest.scoring.sketch
    assert sketch is not None
    identity = {
        "teacher": manifest.teacher.model_dump(mode="json"),
        "corpus": manifest.corpus.fingerprint,
        "engine": [scoring.engine, scoring.dtype],
        "sketch": [sketch.rank, sketch.positions],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def soft_cap_of(config: Any) -> float | None:
    """The cap on its logits that a model's configuration names (Gemma 2), or None."""
    cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return float(cap) if cap else None


@torch.no_grad()
def calibrate_head(
    moments: HiddenMoments,
    head: Head,
    vocabulary_size: int,
    rank: int,
    like: torch.Tensor,
    *,
    soft_cap: float | None = None,
    collects: bool = True,
) -> Sketch | None:
    """The sketch of `head` on hidden states `[.., H]` of these moments; on the device of the moments.

    like: a tensor of the dtype and on the device in which the head takes hidden states. collects: whether this process
    has the logits; one that has not takes part in the same calls with the same moments, and gets None. The head's
    matrix lies on the CPU meanwhile, 4 V H bytes. Raises UserError for a head that is not linear up to its cap,
    RunError for hidden states or logits that are not finite.
    """
    if not (moments.total.isfinite().all() and moments.second.isfinite().all()):
        raise RunError("the teacher gave hidden states that are not finite; try --dtype float32 or bfloat16")
    width = len(moments.total)
    bias = _uncapped(head(like.new_zeros((1, width))), soft_cap)
    weight = torch.empty((vocabulary_size if collects else 0, width))
    size = max(1, min(width, _HEAD_BYTES // (4 * vocabulary_size)))
    for start in range(0, width, size):
        unit = torch.zeros((min(size, width - start), width)).fill_diagonal_(1.0).roll(start, 1)
        block = _uncapped(head(unit.to(like)), soft_cap)
        if collects and block is not None and bias is not None:
            weight[:, start : start + size] = (block - bias).T
    # What the matrix says of states like those that were seen, against the head itself.
    spread = moments.covariance.diagonal().clamp(min=0.0).sqrt()
    noise = torch.randn((4, width), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = (moments.mean + spread * noise.to(spread)).to(like)
    said = head(states)
    if not collects:
        return None
    if said is None or bias is None:
        raise RuntimeError("the rank that keeps the sketch has no logits")
    if said.isnan().any():
        raise RunError("the teacher gave logits that are not finite; try --dtype float32 or bfloat16")
    wanted = states.float().cpu() @ weight.T + bias
    if soft_cap is not None:
        wanted = soft_cap * torch.tanh(wanted / soft_cap)
    said = said.float().cpu()
    if not (wanted - said).abs().max() <= 2e-2 * said.abs().max().clamp(min=1e-3):
        raise UserError(
            "--sketch-rank: this teacher's logits are not a linear function of its last hidden state; leave it out"
        )
    head_bias = bias[0] if bias.any() else None
    try:
        return calibrate(moments, weight, head_bias, rank, soft_cap=soft_cap)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        moments.total, moments.second = moments.total.cpu(), moments.second.cpu()
        return calibrate(moments, weight, head_bias, rank, soft_cap=soft_cap)


def _uncapped(logits: torch.Tensor | None, soft_cap: float | None) -> torch.Tensor | None:
    """float32 `[C, V]` on the CPU."""
    if logits is None:
        return None
    x = logits.float().cpu()
    return x if soft_cap is None else soft_cap * torch.atanh(x / soft_cap)


def to_file(sketch: Sketch, about: Mapping[str, Any]) -> SketchFile:
    """about: what else the file is to say, plain JSON."""
    tensors = {name: getattr(sketch, name).cpu().numpy() for name in SHAPES}
    return SketchFile(tensors, {**about, "logit_scale": sketch.logit_scale, "soft_cap": sketch.soft_cap})


def from_file(file: SketchFile) -> Sketch:
    """float32, on the CPU."""
    tensors = {name: torch.from_numpy(file.tensors[name]).float() for name in SHAPES}
    return Sketch(**tensors, logit_scale=float(file.about["logit_scale"]), soft_cap=file.about["soft_cap"])
