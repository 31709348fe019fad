"""Rotary positions that depend on a sequence's length, computed for each sequence as if it were alone.

Two kinds of rope in transformers choose their frequencies by the largest position of the whole batch: `longrope` has
one set up to the original context and another beyond it, and `dynamic` stretches them with every length beyond it and
keeps the last ones for the next batch. A sequence's hidden states would then depend on its batch mates. So each such
module is asked once for each length that matters, and gives every token the positions of its own sequence. Batches
stay as they are: padded, grouped or packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class SequenceRope:
    """Find the rotary modules of a loaded model whose frequencies depend on length; from now on they go by sequence."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[_BySequence] = []
        for module in model.modules():
            there = module.__dict__.get("forward")
            if isinstance(there, _BySequence):
                self._modules.append(there)
            elif any(_depends_on_length(kind) for kind in _kinds(getattr(module, "rope_type", None)).values()):
                wrapped = _BySequence(module)
                module.__dict__["forward"] = wrapped
                self._modules.append(wrapped)

    @contextmanager
    def reading(self, lengths: torch.Tensor | None) -> Iterator[None]:
        """Let the model read right-padded rows. lengths: int64 `[B]`, token ids of each row.

        None: every row is full, or holds packed sequences whose positions start anew.
        """
        for module in self._modules:
            module.lengths = lengths
        try:
            yield
        finally:
            for module in self._modules:
                module.lengths = None


class _BySequence:
    """Stand in for the `forward` of one rotary module."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self._forward = module.forward
        self.lengths: torch.Tensor | None = None

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layer_type = args[0] if args else kwargs.get("layer_type")
        kind = _kinds(self._module.rope_type).get(layer_type, "default")
        if not _depends_on_length(kind):
            return self._forward(x, position_ids, *args, **kwargs)
        original = self._original_length(kind, layer_type)
        # Several kinds of position (of images and of text) agree in text.
        lengths = self._lengths(position_ids if position_ids.dim() == 2 else position_ids[0])
        decides = torch.where(lengths > original, lengths.max() if kind == "longrope" else lengths, original)
        position_ids = position_ids.expand(*position_ids.shape[:-2], *decides.shape)
        whole: list[torch.Tensor] = []
        is_tuple = True
        for length in decides.unique().tolist():
            mine = decides == length
            rows = mine.any(1)
            self._forget(kind, layer_type)
            # Padding and packed neighbours may lie further out; what they get here is not used.
            found = self._forward(x, position_ids[..., rows, :].clamp(max=length - 1), *args, **kwargs)
            is_tuple = isinstance(found, tuple)
            parts = found if is_tuple else (found,)
            whole = whole or [p.new_zeros(*p.shape[:-3], len(rows), *p.shape[-2:]) for p in parts]
            for all_rows, part in zip(whole, parts, strict=True):
                all_rows[..., rows, :, :] = torch.where(mine[rows][..., None], part, all_rows[..., rows, :, :])
        return tuple(whole) if is_tuple else whole[0]

    def _lengths(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Return int64 `[B, L]`: the length of the sequence that each token belongs to."""
        if self.lengths is not None:
            return self.lengths[:, None].expand(-1, position_ids.shape[1])
        sequence = ((position_ids == 0).cumsum(1) - 1).clamp(min=0)
        longest = torch.zeros_like(position_ids).scatter_reduce(1, sequence, position_ids + 1, "amax")
        return longest.gather(1, sequence)

    def _original_length(self, kind: str, layer_type: str | None) -> int:
        if kind != "longrope":
            return int(self._module.original_max_seq_len)
        parameters = self._module.config.rope_parameters
        return int((parameters[layer_type] if layer_type is not None else parameters)[_ORIGINAL])

    def _forget(self, kind: str, layer_type: str | None) -> None:
        """Put the module back as it was loaded."""
        module, prefix = self._module, "" if layer_type is None else f"{layer_type}_"
        original = getattr(module, f"{prefix}original_inv_freq")
        setattr(module, f"{prefix}inv_freq", original)
        if kind == "longrope":
            # transformers 5.19 keeps them under this name and fails when it finds them there.
            module.__dict__.pop(f"{prefix}long_inv_freq", None)
        else:
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


_ORIGINAL = "original_max_position_embeddings"


def _depends_on_length(kind: Any) -> bool:
    return isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind)


def _kinds(rope_type: Any) -> dict[str | None, Any]:
    """Return the kind of rope of each type of layer; under None where all have the same."""
    return rope_type if isinstance(rope_type, dict) else {None: rope_type}
