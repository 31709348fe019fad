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
# One key, because safetensors writes several in any order, and equal sketches must be equal bytes.
_KEY = "teacher_logit_cache.sketch"


@dataclass(frozen=True)
class SketchFile:
    """The tensors by their names in SHAPES, and `about`: plain JSON, the numbers and origins that are no tensors."""

    tensors: Mapping[str, np.ndarray]
    about: Mapping[str, Any] = field(default_factory=dict)

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
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = json.loads(header["__metadata__"][_KEY])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{path}: not a sketch ({str(error)[:120]})") from None
        sizes = {"r": rank, "V": vocabulary_size}
        for name, (dimensions, kind) in SHAPES.items():
            if name not in tensors or tensors[name].ndim != len(dimensions.split()):
                raise CacheError(f"{path}: has no {name} [{dimensions}]")
            for dimension, size in zip(dimensions.split(), tensors[name].shape, strict=True):
                if sizes.setdefault(dimension, size) != size:
                    raise CacheError(f"{path}: {name} has {size} {dimension}, {sizes[dimension]} belong there")
            if tensors[name].dtype != kind or not np.isfinite(tensors[name]).all():
                raise CacheError(f"{path}: {name} is not finite {kind}")
        if not (tensors["scales"] > 0).all():
            raise CacheError(f"{path}: scales are not positive")
        return cls(tensors, about)
