"""A low-rank code of the teacher's logits: a few bytes per position that say what its whole tail looks like.

The logits are `W h`, and hidden states fill their space unevenly. From the mean mu and the covariance C of the last
hidden state over a calibration text, the best rank-r approximation of the logits in the least-squares sense follows in
closed form. With W~ the head centred over the vocabulary (a softmax does not see a shift of all logits) and
`C^1/2 W~' W~ C^1/2 = Q L Q'`,

    W h + b  ~  bias + U z,    bias = W mu + b,    U = W~ C^1/2 Q_r,    z = L_r^-1 Q_r' C^1/2 W~' W~ (h - mu),

up to a shift. This is the projection on the r leading left singular vectors of W~ C^1/2: nothing is divided by C, so
fewer positions than dimensions, or dead dimensions, do no harm. z has unit variance in each dimension; rounded to
integers it is all that a position stores, U and bias are stored once.

Rounding takes steps that are equally long in the logits, whatever the dimension: one standard deviation of the first
dimension that is left out. Each code then loses a twelfth of what that one would have explained, and the codes, once
compressed, take about half the bytes of codes in fine steps of each dimension's own deviation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

# A code reaches at least this many standard deviations.
_REACH = 8.0
# Codes are -127..127 around this: unsigned, as Parquet would store three more bytes of sign.
_ZERO = 128
# Rows of the head that are worked on at once.
_ROWS = 8192


class HiddenMoments:
    """Count, sum and second moment of hidden states, in float64 on one device.

    count: int; total: float64 `[H]`; second: float64 `[H, H]`, the sum of h h'.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        # MPS has no float64.
        place = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64, device=place)
        self.second = torch.zeros((width, width), dtype=torch.float64, device=place)

    @torch.no_grad()
    def add(self, hidden: torch.Tensor) -> None:
        """hidden: `[C, H]`, any float dtype."""
        states = hidden.to(self.total.device).double()
        self.count += len(states)
        self.total += states.sum(0)
        self.second.addmm_(states.T, states)

    def merge(self, other: HiddenMoments) -> None:
        self.count += other.count
        self.total += other.total.to(self.total.device)
        self.second += other.second.to(self.second.device)

    @property
    def mean(self) -> torch.Tensor:
        """float64 `[H]`"""
        return self.total / max(1, self.count)

    @property
    def covariance(self) -> torch.Tensor:
        """float64 `[H, H]`"""
        return self.second / max(1, self.count) - torch.outer(self.mean, self.mean)


@dataclass(frozen=True)
class Sketch:
    """What turns hidden states into codes and codes into logits. All float32, of rank r, on one device.

    basis: `[V, r]`; bias: `[V]`; encoder: `[r, H]`; mean: `[H]`; scales: `[r]`, the step of each code;
    explained: `[H]`, the share of the logits' variance that rank 1, 2, ... explains, before rounding.
    logit_scale, soft_cap: as the model does after its output layer, `x * scale`, then `cap * tanh(x / cap)`.
    """

    basis: torch.Tensor
    bias: torch.Tensor
    encoder: torch.Tensor
    mean: torch.Tensor
    scales: torch.Tensor
    explained: torch.Tensor
    logit_scale: float = 1.0
    soft_cap: float | None = None

    @property
    def rank(self) -> int:
        return len(self.scales)

    @property
    def vocabulary_size(self) -> int:
        return len(self.bias)

    def to(self, device: torch.device | str) -> Sketch:
        # Of the fields alone: what is made from them is made again there.
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)

    @cached_property
    def _table(self) -> torch.Tensor:
        """float32 `[r + 1, V]`: a plain product is several times faster than that of a transposed basis with a bias."""
        return torch.cat([self.basis.T, self.bias[None]]).contiguous()

    def encode(self, hidden: torch.Tensor) -> torch.Tensor:
        """uint8 `[C, r]`, 128 for 0, of hidden states `[C, H]`."""
        z = (hidden.float() - self.mean) @ self.encoder.T
        return (z / self.scales).round_().clamp_(-127, 127).add_(_ZERO).to(torch.uint8)

    def logits(self, codes: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """float32 `[C, V]` of codes uint8 `[C, r]`, up to a shift of each row. out: memory for it, or for the logits of
        the first ids alone."""
        return self.decode((codes.float() - _ZERO) * self.scales, out=out)

    def decode(self, z: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """The same of codes before rounding, float32 `[C, r]`."""
        table = self._table if out is None else self._table[:, : out.shape[1]]
        x = torch.mm(torch.nn.functional.pad(z, (0, 1), value=1.0), table, out=out)
        if self.logit_scale != 1.0:
            x.mul_(self.logit_scale)
        if self.soft_cap is not None:
            x.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return x


@dataclass(frozen=True)
class Sketches:
    """Several sketches of one vocabulary and one rank, for rows of several caches: the first code of each row says
    which sketch the others are for.
    """

    parts: tuple[Sketch, ...]

    def __post_init__(self) -> None:
        if len({(len(part.bias), part.rank) for part in self.parts}) != 1:
            raise ValueError("sketches of one run have one vocabulary and one rank")
        if len(self.parts) > 256:
            raise ValueError("a code of a byte tells 256 sketches apart")

    @property
    def vocabulary_size(self) -> int:
        return self.parts[0].vocabulary_size

    def to(self, device: torch.device | str) -> Sketches:
        return Sketches(tuple(part.to(device) for part in self.parts))

    def logits(self, codes: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """As `Sketch.logits`, of codes uint8 `[C, 1 + r]`."""
        which, codes = codes[:, 0], codes[:, 1:]
        if out is None:
            out = torch.empty((len(codes), self.vocabulary_size), device=codes.device)
        for number, part in enumerate(self.parts):
            rows = (which == number).nonzero()[:, 0]
            if len(rows) == len(codes):
                part.logits(codes, out=out)
            elif len(rows):
                out[rows] = part.logits(codes[rows])
        return out


@torch.no_grad()
def calibrate(
    moments: HiddenMoments,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    rank: int,
    *,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
) -> Sketch:
    """The sketch of a head `[V, H]` (bias `[V]` or None) on hidden states that are distributed as `moments`.

    rank: r, 1..H. The basis is rounded to what float16 holds, as it is stored. Same inputs, same sketch, on one device.
    Raises ValueError for a rank out of range and for moments of nothing.
    """
    width = head_weight.shape[1]
    if not 1 <= rank <= width:
        raise ValueError(f"the rank of a sketch is 1 to the hidden size {width}, not {rank}")
    if moments.count == 0:
        raise ValueError("a sketch needs hidden states to calibrate on")
    place = moments.total.device
    mean = moments.mean
    root = _root(moments.covariance)
    # A cap is no longer blind to a shift of all logits, so there the head stays as it is.
    shift = torch.zeros(width, dtype=torch.float64, device=place)
    if soft_cap is None:
        for part in head_weight.split(_ROWS):
            shift += part.to(place).double().sum(0)
        shift /= len(head_weight)
    gram = torch.zeros((width, width), dtype=torch.float64, device=place)
    for part in head_weight.split(_ROWS):
        centred = part.to(place).double() - shift
        gram.addmm_(centred.T, centred)
    values, vectors = torch.linalg.eigh(root @ gram @ root)
    values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
    # A sign of its own, so that machines agree: the largest entry of each vector is positive.
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    leading, q = values[:rank], vectors[:, :rank]
    present = leading > values[0] * width * torch.finfo(torch.float64).eps
    inverse = torch.where(present, 1.0 / leading.clamp(min=1e-300), 0.0)
    dropped = values[rank] if rank < width else values.new_zeros(())
    towards = root @ q * present
    encoder = (towards * inverse).T @ gram
    basis, bias = [], []
    for part in head_weight.split(_ROWS):
        weight = part.to(place).double()
        basis.append(((weight - shift) @ towards).half().float())
        bias.append((weight @ mean).float())
    whole_bias = torch.cat(bias)
    if head_bias is not None:
        whole_bias += head_bias.to(place).float()
    total = values.sum().clamp(min=1e-300)
    return Sketch(
        basis=torch.cat(basis),
        bias=whole_bias,
        encoder=encoder.float(),
        mean=mean.float(),
        scales=(dropped / leading.clamp(min=1e-300)).sqrt().clamp(min=_REACH / 127, max=1.0).float(),
        explained=(values.cumsum(0) / total).float(),
        logit_scale=logit_scale,
        soft_cap=soft_cap,
    )


def _root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive semi-definite matrix, rounding below 0 taken as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
