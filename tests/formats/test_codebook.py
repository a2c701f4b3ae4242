"""Codebook formats: the nearest value, ties to the lower one."""

from __future__ import annotations

import pytest
import torch

from fewbit.formats import FORMATS, Codebook
from fewbit.formats.codebook import NF4_VALUES

NF4 = FORMATS["nf4"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nf4_takes_the_nearest_value(dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 1, 10_001, dtype=dtype)
    table = torch.tensor(NF4_VALUES, dtype=torch.float64)
    distances = (values.double()[:, None] - table).abs()
    chosen = distances.gather(1, NF4.encode(values).long()[:, None])[:, 0]
    assert bool((chosen <= distances.amin(1) + 1e-7).all())


def test_nf4_table_is_ascending_with_sixteen_values_and_an_exact_zero() -> None:
    assert list(NF4_VALUES) == sorted(set(NF4_VALUES))
    assert len(NF4_VALUES) == 16
    assert (NF4_VALUES[0], NF4_VALUES[7], NF4_VALUES[-1]) == (-1.0, 0.0, 1.0)


def test_a_tie_goes_to_the_lower_value() -> None:
    book = Codebook("two-bit", 2, (-1.0, 0.0, 1.0, 2.0))
    assert book.encode(torch.tensor([-0.5, 0.5, 1.5])).tolist() == [0, 1, 2]


def test_encode_keeps_the_shape_of_many_axes() -> None:
    values = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    codes = NF4.encode(values)
    assert codes.shape == values.shape
    assert torch.equal(codes.reshape(-1), NF4.encode(values.reshape(-1)))
