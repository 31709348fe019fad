"""Log-probabilities in one byte, and what each width of storage may do to a number.

A code c stands for the log-probability `-(step * c)^2` nats. Squares, because what counts is how much of the mass an
error moves: steps are finest where the mass is, and 255 of them still reach -40 nats, where a tail or an uncertain gold
of 1e-17 keeps its place. Codes of descending log-probabilities ascend. In SQL: `-pow(0.025 * code, 2)`.

The largest error is half a step to either neighbour: `step * sqrt(|logprob|) + step^2 / 4`, so 0.025 nats at -1 and
0.05 at -4. Below the last code, at -40.6 nats, everything reads as that.
"""

from __future__ import annotations

import numpy as np

LOGPROB_STEP = 0.025
_LAST = 255
# Relative error of the two floats, with a bit to spare.
_FLOAT_ERROR = {16: 2.0**-10, 32: 2.0**-20}


def encode(logprobs: np.ndarray, step: float = LOGPROB_STEP) -> np.ndarray:
    """uint8 codes of log-probabilities in nats, any shape; what rounding lifted above 0 counts as 0."""
    # In place: a shard holds tens of millions.
    roots = np.negative(logprobs, dtype=np.float32)
    np.maximum(roots, 0, out=roots)
    np.sqrt(roots, out=roots)
    roots *= np.float32(1 / step)
    np.minimum(roots, _LAST, out=roots)
    return np.rint(roots, out=roots).astype(np.uint8)


def decode(codes: np.ndarray, step: float = LOGPROB_STEP) -> np.ndarray:
    """float32 log-probabilities of uint8 codes."""
    roots = codes * np.float32(step)
    np.square(roots, out=roots)
    # Not -0.0.
    return np.subtract(np.float32(0), roots, out=roots)


def rounding(logprobs: np.ndarray, bits: int) -> np.ndarray:
    """float64: by how much a log-probability that reads as `logprobs` may differ from what was stored in `bits`.

    Infinite at the last code, which stands for all below it. 8 bits may have been made from 16.
    """
    size = np.abs(logprobs.astype(np.float64))
    if bits != 8:
        return _FLOAT_ERROR[bits] * size
    error = LOGPROB_STEP * np.sqrt(size) + LOGPROB_STEP**2 / 4 + _FLOAT_ERROR[16] * size
    return np.where(size >= (LOGPROB_STEP * _LAST) ** 2 * (1 - 1e-6), np.inf, error)
