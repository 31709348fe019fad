"""Log-probabilities in one byte: the error is what the documentation says, order stays, damage is seen."""

from __future__ import annotations

import numpy as np
import pytest

from storage.quantization import LOGPROB_STEP, decode, encode, rounding
from storage.shard import value_problems
from tests.storage.synthetic import make_manifest, make_rows, replaced


def test_the_error_is_within_what_is_promised_and_order_stays() -> None:
    exact = -np.concatenate([np.geomspace(1e-9, 40, 20_001), np.linspace(0, 40, 20_001)]).astype(np.float32)
    stored = decode(encode(exact))
    assert stored.dtype == np.float32
    error = np.abs(stored.astype(np.float64) - exact)
    assert (error <= LOGPROB_STEP * np.sqrt(-exact.astype(np.float64)) + LOGPROB_STEP**2 / 4 + 1e-6).all()
    assert (error <= rounding(stored, 8) + 1e-6).all()
    # And not much less: the promise is no looser than the codes are.
    assert (error / (rounding(stored, 8) + 1e-9)).max() > 0.99
    descending = np.sort(exact)[::-1]
    assert (np.diff(decode(encode(descending))) <= 0).all()


def test_ends_of_the_range() -> None:
    assert encode(np.array([0.0, 1e-6, -40.6, -41.0, -1e4, -np.inf])).tolist() == [0, 0, 255, 255, 255, 255]
    assert decode(np.array([0], np.uint8))[0] == 0 and not np.signbit(decode(np.array([0], np.uint8))[0])
    assert np.isinf(rounding(decode(np.array([255], np.uint8)), 8))


def test_every_code_comes_back() -> None:
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(encode(decode(codes)), codes)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_positions_shifted_by_one_are_seen(bits: int) -> None:
    """The alignment check allows for the rounding of each width, and for no more."""
    manifest = make_manifest(logprob_bits=bits, top_n=300, vocabulary=300)
    rows, _ = make_rows(manifest, 1, masked=False)
    stored = replaced(rows, top_logprobs=_as_stored(rows["top_logprobs"].values, bits))
    assert value_problems(stored, manifest) == []
    shifted = replaced(stored, gold_logprob=np.roll(rows["gold_logprob"].values, 1))
    assert any("positions shifted?" in problem for problem in value_problems(shifted, manifest))
    lighter = stored["top_logprobs"].values.copy()
    lighter[:300] -= 0.3
    assert any("not 1" in problem for problem in value_problems(replaced(stored, top_logprobs=lighter), manifest))


def _as_stored(logprobs: np.ndarray, bits: int) -> np.ndarray:
    return decode(encode(logprobs)) if bits == 8 else logprobs.astype({16: np.float16, 32: np.float32}[bits])
