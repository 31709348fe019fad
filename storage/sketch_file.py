"""`sketch.safetensors`: what turns the codes of a position into logits; one file per cache, made before any shard.

z = round(encoder (h - mean) / scales)     the codes of a hidden state h, clipped to -127..127
logits = bias + basis (scales * z)         then the cap of the model's head, where it has one
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from storage.errors import CacheError
from storage.json_text import parse_json
from storage.places import Place

NAME = "sketch.safetensors"
# V ids, H hidden dimensions, r codes, K ranks of which the share is known.
SHAPES: dict[str, tuple[str, str]] = {
    "basis": ("V r", "float16"),
    "bias": ("V", "float32"),
    "encoder": ("r H", "float32"),
    "mean": ("H", "float32"),
    "scales": ("r", "float32"),
    "explained": ("K", "float32"),
}
# Far from what teachers have; within them no logit overflows.
_LARGEST = 1e12
_LARGEST_SCALE = 1e3
_WIDEST = 1 << 18
# One key, because safetensors writes several in any order, and equal sketches must be equal bytes.
_KEY = "teacher_logit_cache.sketch"


@dataclass(frozen=True)
class SketchFile:
    """The tensors by their names in SHAPES, and `about`: plain JSON, the numbers and origins that are no tensors.

    about: `logit_scale`, a number, and `soft_cap`, one above 0 or None, are always there (see Sketch).
    """

    tensors: Mapping[str, np.ndarray]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def explained(self) -> float:
        """The share of the variance of the teacher's logits that this rank explains, on what it was calibrated on."""
        known = self.tensors["explained"]
        return float(known[min(len(self.tensors["scales"]), len(known)) - 1])

    def to_bytes(self) -> bytes:
        from safetensors.numpy import save

        tensors = {name: np.ascontiguousarray(self.tensors[name], kind) for name, (_, kind) in SHAPES.items()}
        return save(tensors, {_KEY: json.dumps(self.about, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes, path: Place | str, *, rank: int, vocabulary_size: int) -> SketchFile:
        """Raises CacheError for anything but a sketch of this size; path: what the sentence names."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(data)
            header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = parse_json(header["__metadata__"][_KEY])
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CacheError(f"{path}: not a sketch ({' '.join(str(error).split())[:120]})") from None
        sizes = {"r": rank, "V": vocabulary_size}
        for name, (dimensions, kind) in SHAPES.items():
            if name not in tensors or tensors[name].ndim != len(dimensions.split()):
                raise CacheError(f"{path}: has no {name} [{dimensions}]")
            for dimension, size in zip(dimensions.split(), tensors[name].shape, strict=True):
                if sizes.setdefault(dimension, size) != size:
                    raise CacheError(f"{path}: {name} has {size} {dimension}, {sizes[dimension]} belong there")
                if size == 0:
                    raise CacheError(f"{path}: {name} is empty")
            if tensors[name].dtype != kind or not np.isfinite(tensors[name]).all():
                raise CacheError(f"{path}: {name} is not finite {kind}")
        if not (np.abs(tensors["bias"]) <= _LARGEST).all():
            raise CacheError(f"{path}: bias is above {_LARGEST:g}")
        if not ((tensors["scales"] > 0) & (tensors["scales"] <= _LARGEST_SCALE)).all():
            raise CacheError(f"{path}: scales are not positive, up to {_LARGEST_SCALE:g}")
        if not isinstance(about, dict) or not _is_number(about.get("logit_scale")):
            raise CacheError(f"{path}: names no logit_scale")
        cap = about.get("soft_cap")
        if not (cap is None or (_is_number(cap) and cap > 0)):
            raise CacheError(f"{path}: its soft_cap is no number above 0")
        return cls(tensors, about)


def most_bytes(rank: int, vocabulary_size: int) -> int:
    """More than any sketch of this size has, so that none is read that is no sketch."""
    return (2 * rank + 4) * vocabulary_size + (4 * rank + 8) * _WIDEST + (1 << 20)


def _is_number(value: Any) -> bool:
    """Within what a float32 holds, and not 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-12 <= abs(value) <= _LARGEST
