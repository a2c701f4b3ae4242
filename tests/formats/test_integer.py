"""Integer formats: rounding and bounds."""

from __future__ import annotations

import pytest
import torch

from fewbit.formats import FORMATS


@pytest.mark.parametrize(
    ("name", "symmetric", "bound"),
    [
        ("int8", True, (-127.0, 127.0)),
        ("int8", False, (-128.0, 127.0)),
        ("uint8", False, (0.0, 255.0)),
        ("uint4", False, (0.0, 15.0)),
        ("int6", True, (-32.0, 31.0)),
        ("int4", True, (-8.0, 7.0)),
        ("int4", False, (-8.0, 7.0)),
    ],
)
def test_bound(name: str, symmetric: bool, bound: tuple[float, float]) -> None:
    assert FORMATS[name].bound(symmetric) == bound


@pytest.mark.parametrize("name", ["int8", "int6", "int4"])
def test_rounds_half_to_even(name: str) -> None:
    values = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert FORMATS[name].encode(values).tolist() == [-2, -2, 0, 0, 2, 2, 4]


@pytest.mark.parametrize("name", ["int8", "uint8", "int6", "int4", "uint4"])
def test_a_code_is_its_own_value(name: str) -> None:
    codes = torch.arange(0, 8).to(FORMATS[name].dtype)
    assert FORMATS[name].decode(codes).tolist() == list(range(8))
