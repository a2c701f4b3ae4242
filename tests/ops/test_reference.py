"""Integer products in plain torch: bit-equal to int64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.ops.reference import (
    EXACT,
    GROUP_PIECE,
    has_integer_product,
    integer_input,
    integer_linear,
    integer_matmul,
    integer_values,
    largest_code,
)
from fewbit.qtensor import quantize
from fewbit.spec import PER_TENSOR, PER_TOKEN, Granularity, QuantSpec, per_channel, per_group


def int64_matmul(a: Tensor, b: Tensor) -> list[object]:
    left, right = a.numpy().astype(np.int64), b.numpy().astype(np.int64)
    return (left @ np.swapaxes(right, -1, -2)).tolist()


@settings(max_examples=50)
@given(
    st.integers(0, 5),
    st.integers(1, 3000),
    st.integers(1, 5),
    st.sampled_from([8, 127, 255]),
    st.sampled_from([8, 127, 255]),
    st.integers(0, 2**16),
)
def test_random_products_are_exact(rows: int, depth: int, columns: int, left: int, right: int, seed: int) -> None:
    torch.manual_seed(seed)
    a = torch.randint(-left, left + 1, (rows, depth)).float()
    b = torch.randint(-right, right + 1, (columns, depth)).float()
    product = integer_matmul(a, b, left * right)
    assert product.dtype == torch.int32
    assert product.tolist() == int64_matmul(a, b)


@pytest.mark.parametrize("depth", [1040, 1041, 4097, 8192])
@pytest.mark.parametrize("largest", [127, 255])
@pytest.mark.parametrize("signs", ["same", "opposite", "alternating"])
def test_worst_case_products_are_exact(depth: int, largest: int, signs: str) -> None:
    a = torch.full((2, depth), float(largest))
    b = torch.full((3, depth), float(largest))
    b[0, 0] -= 1  # an odd sum: float32 holds no odd integers above 2^24
    if signs == "opposite":
        b = -b
    if signs == "alternating":
        b[:, ::2] *= -1
    assert integer_matmul(a, b, largest**2).tolist() == int64_matmul(a, b)


def test_products_of_batches_are_exact() -> None:
    torch.manual_seed(0)
    a = torch.randint(-127, 128, (3, 4, 2100)).float()
    b = torch.randint(-127, 128, (3, 5, 2100)).float()
    assert integer_matmul(a, b, 127 * 127).tolist() == int64_matmul(a, b)


def test_a_single_product_as_large_as_the_exact_range() -> None:
    a, b = torch.full((1, 3), 4096.0), torch.full((1, 3), 4096.0)
    assert integer_matmul(a, b, EXACT).tolist() == [[3 * EXACT]]


@pytest.mark.parametrize("group", [1, 5, 8, 64])
@pytest.mark.parametrize("by_group", ["input", "weight", "both"])
def test_grouped_products_are_the_scaled_sums_of_groups(group: int, by_group: str) -> None:
    torch.manual_seed(0)
    depth, groups = 37, -(-37 // group)
    a, weight = torch.randint(-127, 128, (4, depth)).float(), torch.randint(-8, 8, (6, depth)).float()
    a_scale = torch.rand(4, groups if by_group != "weight" else 1)
    weight_scale = torch.rand(6, groups if by_group != "input" else 1)
    y = integer_linear(a, a_scale, weight, weight_scale, group, 127 * 8)
    left = a.double() * a_scale.double().repeat_interleave(group if by_group != "weight" else depth, 1)[:, :depth]
    right = (
        weight.double() * weight_scale.double().repeat_interleave(group if by_group != "input" else depth, 1)[:, :depth]
    )
    torch.testing.assert_close(y.double(), left @ right.T, rtol=1e-5, atol=1e-3)


def test_groups_are_multiplied_in_parts_when_there_are_many() -> None:
    torch.manual_seed(0)
    rows = 2100  # 2100 x 2100 products a group: more than GROUP_PIECE
    assert rows * rows > GROUP_PIECE
    a, weight = torch.randint(-3, 4, (rows, 4)).float(), torch.randint(-3, 4, (rows, 4)).float()
    y = integer_linear(a, torch.ones(rows, 1), weight, torch.full((rows, 2), 0.5), 2, 9)
    assert torch.equal(y, 0.5 * a @ weight.T)


@pytest.mark.parametrize(
    ("spec", "largest"),
    [
        (QuantSpec("int8"), 127),
        (QuantSpec("int8", symmetric=False), 255),
        (QuantSpec("uint8", symmetric=False), 255),
        (QuantSpec("int4"), 8),
        (QuantSpec("int4", symmetric=False), 15),
    ],
    ids=["int8", "int8-asymmetric", "uint8", "int4", "int4-asymmetric"],
)
def test_largest_code_is_reached_and_never_exceeded(spec: QuantSpec, largest: int) -> None:
    assert largest_code(spec) == largest
    low, high = spec.number.bound(spec.symmetric)
    assert largest == (max(-low, high) if spec.symmetric else high - low)


@pytest.mark.parametrize("granularity", [PER_TENSOR, PER_TOKEN, per_group(4), per_group(16)], ids=str)
def test_integer_values_subtract_each_blocks_zero_point(granularity: Granularity) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 10) + 1
    spec = QuantSpec("uint8", granularity, symmetric=False)
    q = quantize(x, spec)
    values = integer_values(q.codes, q.zero_point, granularity.group_size)
    of_input, scale = integer_input(x, spec, None, None)
    assert torch.equal(values, of_input)
    assert torch.equal(scale, q.scale_values)
    assert int(values.abs().max()) <= largest_code(spec)


@pytest.mark.parametrize(
    ("weight", "spec", "expected"),
    [
        (QuantSpec("int8", per_channel(0)), QuantSpec("int8", PER_TOKEN), True),
        (QuantSpec("int4", per_group(4)), QuantSpec("int8", PER_TENSOR), True),
        (QuantSpec("int4", per_group(4)), QuantSpec("int8", per_group(4)), True),
        (QuantSpec("int4", per_group(4)), QuantSpec("int8", per_group(2)), False),
        (QuantSpec("int8", per_channel(1)), QuantSpec("int8", PER_TOKEN), False),
        (QuantSpec("int8", per_channel(0)), QuantSpec("int8", per_channel(1)), False),
        (QuantSpec("nf4", per_group(4)), QuantSpec("int8", PER_TOKEN), False),
        (QuantSpec("int8", per_channel(0)), QuantSpec("nf4", PER_TOKEN), False),
    ],
    ids=[
        "rows",
        "groups-of-weight",
        "equal-groups",
        "other-groups",
        "columns",
        "channels-of-input",
        "nf4-weight",
        "nf4-input",
    ],
)
def test_has_integer_product(weight: QuantSpec, spec: QuantSpec, expected: bool) -> None:
    assert has_integer_product(quantize(torch.ones(8, 8), weight), spec) is expected
