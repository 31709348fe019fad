"""Masks that trainers keep beside token ids, each with the loss mask that it means."""

import numpy as np
import pytest

from stages.given_masks import apply_masks
from storage.errors import UserError

IDS = np.array([5, 6, 7, 8])


def masked(**given):
    ids, mask = apply_masks(IDS, given, lambda column: f"row 9, column '{column}'")
    return ids.tolist(), mask.astype(int).tolist()


@pytest.mark.parametrize(
    ("given", "ids", "mask"),
    [
        ({}, [5, 6, 7, 8], [1, 1, 1]),
        ({"labels": None}, [5, 6, 7, 8], [1, 1, 1]),
        ({"labels": [-100, -100, 7, 8]}, [5, 6, 7, 8], [0, 1, 1]),
        ({"labels": [5, -100, 7, -100]}, [5, 6, 7, 8], [0, 1, 0]),
        ({"completion_mask": [0, 0, 1, 1]}, [5, 6, 7, 8], [0, 1, 1]),
        ({"assistant_masks": [1, 0, 0, 1]}, [5, 6, 7, 8], [0, 0, 1]),
        ({"completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}, [5, 6, 7, 8], [1, 0, 1]),
        ({"loss_mask": [True, False, True]}, [5, 6, 7, 8], [1, 0, 1]),
        ({"attention_mask": [1, 1, 1, 0]}, [5, 6, 7], [1, 1]),
        ({"attention_mask": [0, 1, 1, 1]}, [6, 7, 8], [1, 1]),
        ({"attention_mask": [0, 1, 1, 1], "labels": [-100, -100, 7, 8]}, [6, 7, 8], [1, 1]),
        ({"attention_mask": [0, 0, 0, 0]}, [], []),
        ({"attention_mask": [0, 0, 1, 0]}, [7], []),
        ({"position_ids": [0, 1, 2, 3]}, [5, 6, 7, 8], [1, 1, 1]),
        ({"position_ids": [0, 0, 1, 2], "attention_mask": [0, 1, 1, 1]}, [6, 7, 8], [1, 1]),
    ],
)
def test_loss_mask(given, ids, mask):
    assert masked(**given) == (ids, mask)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"labels": [-100, 6, 7]}, "have 3 entries for 4 ids"),
        ({"labels": [6, 7, 8, -100]}, "are shifted by one place"),
        ({"labels": [5, 6, 9, 8]}, "differ from the ids"),
        ({"labels": "x"}, "are not a list of whole numbers"),
        ({"labels": [0.5] * 4}, "are not a list of whole numbers"),
        ({"completion_mask": [0, 1]}, "has 2 entries for 4 ids"),
        ({"completion_mask": [0, 1, 2, 1]}, "is not a list of 0 and 1"),
        ({"loss_mask": [1, 1, 1, 1]}, "name a mask with one entry per id completion_mask"),
        ({"loss_mask": [1, 2, 1]}, "is not a list of true and false"),
        ({"attention_mask": [1, 0, 1, 1]}, "leaves out ids in the middle"),
        ({"position_ids": [0, 1, 0, 1]}, "packs several sequences"),
        ({"position_ids": [0, 1]}, "not one whole number per id"),
    ],
)
def test_refusals(given, says):
    with pytest.raises(UserError) as caught:
        masked(**given)
    assert says in str(caught.value) and f"row 9, column '{next(iter(given))}'" in str(caught.value)
