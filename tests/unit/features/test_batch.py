from __future__ import annotations

import pytest
import torch

from domlora.features.batch import Batch

BATCH = Batch(
    ids=torch.arange(8).reshape(4, 2),
    dense=torch.arange(4.0).reshape(4, 1),
    domain=torch.tensor([1, 0, 1, -1]),
    label=torch.tensor([0.0, 1.0, 1.0, 0.0]),
    user=torch.tensor([9, 8, 7, 6]),
)


def test_num_rows() -> None:
    assert BATCH.num_rows == 4


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (torch.tensor([3, 0]), [3, 0]),
        (torch.tensor([False, True, False, True]), [1, 3]),
        (slice(1, 3), [1, 2]),
        (slice(4, 9), []),
    ],
)
def test_take_picks_the_same_rows_of_every_column(rows, expected) -> None:
    taken = BATCH.take(rows)
    assert isinstance(taken, Batch)
    assert taken.num_rows == len(expected)
    for name, column in taken._asdict().items():
        whole = getattr(BATCH, name)
        if whole is None:
            assert column is None
        else:
            assert column.tolist() == [whole[row].tolist() for row in expected]
            assert column.dtype == whole.dtype


def test_a_slice_is_a_view() -> None:
    assert BATCH.take(slice(1, 3)).ids.data_ptr() == BATCH.ids[1:].data_ptr()
