"""What every entry of FORMATS must satisfy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbit.formats import FORMATS, Format
from fewbit.spec import QuantSpec

EVERY = pytest.mark.parametrize("number", FORMATS.values(), ids=FORMATS.keys())


def all_codes(number: Format) -> Tensor:
    return torch.arange(number.code_min, number.code_min + 2**number.bits).to(number.dtype)


@EVERY
def test_encode_is_the_inverse_of_decode(number: Format) -> None:
    codes = all_codes(number)
    again = number.encode(number.decode(codes))
    assert again.dtype == number.dtype
    assert torch.equal(again, codes)


@EVERY
def test_all_codes_fit_the_dtype(number: Format) -> None:
    codes = all_codes(number)
    assert len(codes.unique()) == 2**number.bits
    assert number.decode(codes).dtype == torch.float32


@EVERY
def test_zero_is_exact(number: Format) -> None:
    assert number.decode(number.encode(torch.zeros(3))).tolist() == [0.0, 0.0, 0.0]


@EVERY
def test_decode_ascends_with_the_code(number: Format) -> None:
    assert bool((number.decode(all_codes(number)).diff() > 0).all())


@EVERY
@pytest.mark.parametrize("symmetric", [True, False])
def test_bounds_are_values_of_codes_around_zero(number: Format, symmetric: bool) -> None:
    low, high = number.bound(symmetric)
    assert low <= 0 < high
    ends = torch.tensor([low, high])
    assert torch.equal(number.decode(number.encode(ends)), ends)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_encode_takes_the_nearest_value(number: Format, dtype: torch.dtype) -> None:
    low, high = number.bound(symmetric=False)
    values = torch.linspace(low, high, 4001, dtype=dtype)
    table = number.decode(all_codes(number)).double()
    distance = (number.decode(number.encode(values)).double() - values.double()).abs()
    nearest = (values.double()[:, None] - table).abs().amin(1)
    assert bool((distance <= nearest + 1e-6).all())


@EVERY
def test_encode_leaves_its_argument_alone(number: Format) -> None:
    values = torch.linspace(*number.bound(symmetric=False), 17)
    before = values.clone()
    number.encode(values)
    assert torch.equal(values, before)


@pytest.mark.parametrize("name", FORMATS)
def test_the_name_goes_through_json_to_the_same_format(name: str) -> None:
    number = FORMATS[name]
    spec = QuantSpec(name, symmetric=number.bound(symmetric=True)[0] < 0)
    assert number.name == name
    assert QuantSpec.from_json(spec.to_json(), "spec").number is number
