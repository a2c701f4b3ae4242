"""Operators on uint8 codes: compiled kernels equal the plain-torch reference to the bit; errors; schemas."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.ops import codes, native
from fewbit.qtensor import encode
from fewbit.spec import PER_TENSOR, QuantSpec

INSTRUCTION_SETS = ("scalar", "avx2", "avxvnni", "avx512vnni", "neon_dotprod", "neon_i8mm")
operators = torch.ops.fewbit
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "quantize": codes._quantize,
    "dequantize": codes._dequantize,
    "add": codes._add,
    "average": codes._average,
    "lookup": codes._lookup,
}
Problem = dict[str, Any]


def same(found: Tensor, expected: Tensor, words: object) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype and found.is_contiguous(), words
    assert torch.equal(found, expected), words


def check(name: str, *arguments: Any) -> Tensor:
    found: Tensor = getattr(operators, f"{name}_uint8")(*arguments)
    same(found, REFERENCES[name](*arguments), [name, *(a.shape if isinstance(a, Tensor) else a for a in arguments)])
    return found


def random_codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Geometries of convolutions, and what their operands are like."""
    kind = draw(st.sampled_from(["dense", "pointwise", "grouped", "depthwise"]))
    if kind == "depthwise":
        groups = draw(st.integers(2, 140))
        shape = [groups, 1]
    elif kind == "grouped":
        groups = draw(st.integers(2, 4))
        shape = [groups * draw(st.integers(1, 20)), draw(st.integers(1, 9))]
    else:
        groups = 1
        shape = [draw(st.integers(1, 140)), draw(st.integers(1, 70))]
    two = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(list)
    kernel = [1, 1] if kind == "pointwise" else draw(st.lists(st.sampled_from([1, 2, 3, 5, 7]), min_size=2, max_size=2))
    dilation, padding = draw(two), draw(st.lists(st.integers(0, 4), min_size=2, max_size=2))
    least = [max(1, (kernel[i] - 1) * dilation[i] + 1 - 2 * padding[i]) for i in (0, 1)]
    return {
        "shape": shape + kernel,
        "groups": groups,
        "stride": [1, 1] if kind == "pointwise" and draw(st.booleans()) else draw(two),
        "padding": padding,
        "dilation": dilation,
        "batch": draw(st.integers(0, 2)),
        "size": [least[i] + draw(st.integers(0, 12)) for i in (0, 1)],
        "weight": draw(st.sampled_from(["any", "small", 127, -128, "alternating"])),
        "codes": draw(st.sampled_from(["any", 255])),
        "zero_point": draw(st.sampled_from([0, 7, 255])),
        "out": draw(st.sampled_from([None, 0, 100])),
        "magnitude": draw(st.sampled_from([1e-3, 1e-2, 1.0, 1e7])),
        "other": draw(st.sampled_from([None, 0.37, -1.9, 1e7, -3e30])),  # what codes are multiplied by that are added
    }


def weight_of(p: Problem) -> Tensor:
    if isinstance(p["weight"], int):
        return torch.full(p["shape"], p["weight"], dtype=torch.int8)
    if p["weight"] == "alternating":  # along the rows of the packed weight, and along columns of a depthwise one
        flat = torch.arange(torch.Size(p["shape"]).numel()) % 2 * 255 - 128
        return flat.reshape(p["shape"]).to(torch.int8)
    most = 127 if p["weight"] == "any" else 60
    return torch.randint(-most - 1, most + 1, p["shape"], dtype=torch.int8)


def check_conv(p: Problem) -> None:
    torch.manual_seed(0)
    shape, groups = p["shape"], p["groups"]
    x = random_codes(p["batch"], *p["size"], shape[1] * groups)
    if p["codes"] == 255:
        x.fill_(255)
    weight = weight_of(p)
    multiplier, offset = torch.rand(shape[0]) * p["magnitude"], torch.randint(-(10**5), 10**5, (shape[0],)).int()
    geometry = (p["stride"], p["padding"], p["dilation"], groups, p["zero_point"])
    low, high = (-3.5, 1e6) if p["out"] is None else (3.0, 250.0)
    rest = (low, high, p["out"])
    packed, plain = operators.pack_uint8(weight, groups), codes._pack(weight, groups)

    def same_with_other(name: str, reference: Callable[..., Tensor], *numbers: Any) -> None:
        operator = getattr(operators, name)
        found = operator(x, packed, shape, multiplier, offset, *numbers, *rest)
        same(found, reference(x, plain, shape, multiplier, offset, *numbers, *rest), p)
        if p["other"] is not None and p["out"] is not None:
            other = (random_codes(*found.shape), p["other"], 120)
            found = operator(x, packed, shape, multiplier, offset, *numbers, *rest, *other)
            same(found, reference(x, plain, shape, multiplier, offset, *numbers, *rest, *other), p)

    assert packed.shape == plain.shape == (codes.packed_bytes(shape, groups),)
    same_with_other("conv_uint8", codes._conv, *geometry)
    if groups == 1 and shape[2:] == [1, 1]:
        same_with_other("linear_uint8", codes._linear)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(problems())
def test_convolutions_equal_the_reference(p: Problem) -> None:
    check_conv(p)


@pytest.mark.parametrize("weight", [127, -128, "alternating"])
@pytest.mark.parametrize("shape", [[20, 64, 3, 3], [70, 1, 5, 5], [33, 1030, 1, 1]], ids=str)
def test_the_largest_sums_are_exact(shape: list[int], weight: int | str) -> None:
    p = {"shape": shape, "groups": 70 if shape[1] == 1 else 1, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    check_conv(p | {"batch": 1, "size": [6, 9], "weight": weight, "codes": 255, "zero_point": 255} | NO_ROUNDING)


NO_ROUNDING = {"out": None, "magnitude": 1.0, "other": None}


def test_a_sum_is_rounded_once_after_other_codes_are_added() -> None:
    packed, one = operators.pack_uint8(torch.ones(1, 1, 1, 1, dtype=torch.int8), 1), torch.ones(1)
    x, other = torch.tensor([[[[3]], [[200]]]], dtype=torch.uint8), torch.tensor([[[[9]], [[255]]]], dtype=torch.uint8)
    geometry = ([1, 1], [0, 0], [1, 1], 1, 0)
    arguments = (x, packed, [1, 1, 1, 1], one * 0.5, torch.zeros(1, dtype=torch.int32), *geometry, 0.0, 255.0, 10)
    # 1.5 - 0.25 rounds to 1, though 1.5 rounds to 2.
    assert operators.conv_uint8(*arguments, other, 0.25, 10).flatten().tolist() == [11, 171]
    apart = other.repeat_interleave(2, 1)[:, ::2]  # not as it lies in memory
    found = operators.conv_uint8(*arguments, other=apart, other_multiplier=0.5)
    assert found.flatten().tolist() == [16, 238]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 70), st.integers(0, 255))
def test_element_by_element(shape: list[int], channels: int, zero_point: int) -> None:
    torch.manual_seed(0)
    a, b = random_codes(*shape, channels), random_codes(*shape, channels)
    check("add", a, b, 0.4, 3, 1.7, 250, 0.0, 255.0, zero_point)
    check("add", a, b, -3e8, 3, 1.7, 250, 20.0, 200.0, zero_point)
    check("dequantize", a, 0.037, zero_point)
    check("lookup", a, random_codes(256))
    check("lookup", a.transpose(0, -1), random_codes(256))
    check("quantize", torch.randn(*shape, channels) * 3, 0.021, zero_point)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 64, 67, 130])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (20, 19)], ids=str)
def test_quantize_of_any_strides(size: tuple[int, int], channels: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, channels, *size) * 3
    for view in (x, x.permute(0, 2, 3, 1), x[:1].permute(0, 2, 3, 1), x.permute(0, 3, 2, 1), x[:, :, ::2]):
        check("quantize", view, 0.023, 120)
    spec = QuantSpec("uint8", PER_TENSOR, symmetric=False, observer="minmax")
    expected = encode(x, spec, torch.tensor([0.023]), torch.tensor([120], dtype=torch.uint8))
    assert torch.equal(operators.quantize_uint8(x, 0.023, 120), expected)


def test_quantize_rounds_half_to_even_and_clamps() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, torch.inf, -torch.inf])
    assert check("quantize", x, 1.0, 10).tolist() == [10, 12, 12, 10, 8, 255, 0, 255, 0]
    operators.quantize_uint8(torch.full((70,), torch.nan), 1.0, 10)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.booleans(), st.sampled_from([1e-2, 0.8, 1e8]))
def test_average(data: st.DataObject, count_padding: bool, multiplier: float) -> None:
    torch.manual_seed(0)
    kernel = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=2))
    stride = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
    padding = [data.draw(st.integers(0, k - 1)) for k in kernel]
    size = [max(1, kernel[i] - 2 * padding[i]) + data.draw(st.integers(0, 6)) for i in (0, 1)]
    x = random_codes(data.draw(st.integers(0, 2)), *size, data.draw(st.integers(1, 40)))
    check("average", x, kernel, stride, padding, count_padding, multiplier, 17, 100)
    check("average", x, size, [1, 1], [0, 0], count_padding, multiplier, 200, 0)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    for shape, groups in ([48, 64, 3, 3], 1), ([256, 1, 3, 3], 256), ([700, 256, 1, 1], 1), ([64, 32, 3, 3], 2):
        x, weight = random_codes(2, 15, 17, shape[1] * groups), torch.randint(-128, 128, shape, dtype=torch.int8)
        packed, multiplier = operators.pack_uint8(weight, groups), torch.rand(shape[0]) * 1e-3
        pairs = ([1, 1], [1, 1], [1, 1])
        results = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                offset = torch.zeros(shape[0], dtype=torch.int32)
                rest = (groups, 3, 0.0, 255.0, 5)
                results.append(operators.conv_uint8(x, packed, shape, multiplier, offset, *pairs, *rest))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def conv_arguments(**changes: Any) -> dict[str, Any]:
    shape = changes.get("weight_shape", [4, 3, 3, 3])
    weight = torch.randint(-128, 128, (4, 3, 3, 3), dtype=torch.int8)
    arguments = {
        "x": random_codes(1, 5, 6, 3),
        "packed": operators.pack_uint8(weight, 1),
        "weight_shape": shape,
        "multiplier": torch.rand(4) * 1e-3,
        "offset": torch.zeros(4, dtype=torch.int32),
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 1,
        "input_zero_point": 3,
        "low": 0.0,
        "high": 255.0,
        "zero_point": 5,
        "other": None,
        "other_multiplier": 0.5,
        "other_zero_point": 7,
    }
    return arguments | changes


OTHER = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(1, 5, 6, 3)}, "x must be uint8"),
    ({"x": torch.zeros(5, 6, 3, dtype=torch.uint8)}, "x must"),
    ({"x": torch.zeros(1, 5, 6, 4, dtype=torch.uint8)}, "x must have 3 channels"),
    ({"weight_shape": [4, 3, 3]}, "a weight must be"),
    ({"weight_shape": [4, 3, 3, -3]}, "a weight must be"),
    ({"weight_shape": [4, 3, 100, 1000]}, "300000 products|3e\\+05 products"),
    ({"weight_shape": [4, 3, 3, 2]}, "packed must be"),
    ({"packed": torch.zeros(7, dtype=torch.uint8)}, "packed must be"),
    ({"groups": 3}, "groups must divide"),
    ({"groups": 0}, "groups must divide"),
    ({"stride": [0, 1]}, "stride must be two numbers of at least 1"),
    ({"stride": [1]}, "stride must be two numbers"),
    ({"padding": [-1, 0]}, "padding must be two numbers of at least 0"),
    ({"dilation": [1, 0]}, "dilation must be two numbers of at least 1"),
    ({"dilation": [3, 1]}, "larger than the image"),
    ({"other": OTHER.float()}, "other must be uint8"),
    ({"other": OTHER[:, 1:]}, r"other must be of the result's shape \[1, 3, 4, 4\], found \[1, 2, 4, 4\]"),
    ({"other": OTHER[0]}, "other must be of the result's shape"),
    ({"other": OTHER, "zero_point": None}, "zero_point is missing"),
]
REFUSED_BY_KERNELS: list[tuple[dict[str, Any], str]] = [
    ({"multiplier": torch.ones(3)}, r"multiplier must be contiguous float32 \[4\], found float32 \[3\]\."),
    ({"offset": torch.ones(4)}, r"offset must be contiguous int32 \[4\], found float32 \[4\]\."),
    ({"zero_point": 256}, "zero_point must be 0 to 255"),
    ({"input_zero_point": -1}, "input_zero_point must be 0 to 255"),
    ({"other": OTHER, "other_zero_point": 256}, "other_zero_point must be 0 to 255"),
    ({"low": 0.5}, "whole numbers"),
    ({"low": 7.0, "high": 6.0}, "whole numbers"),
    ({"packed": torch.zeros(64 + 16 * 28, dtype=torch.uint8)}, "packed must be"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_what_the_convolution_refuses(changes: dict[str, Any], message: str) -> None:
    arguments = conv_arguments(**changes)
    with pytest.raises(RuntimeError, match=message):
        operators.conv_uint8(*arguments.values())
    with pytest.raises(RuntimeError, match=message):
        codes._conv(**arguments)


@pytest.mark.skipif(not native.LOADED, reason="no compiled kernels")
@pytest.mark.parametrize(("changes", "message"), REFUSED_BY_KERNELS, ids=str)
def test_what_the_kernels_refuse(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        operators.conv_uint8(*conv_arguments(**changes).values())


def test_what_the_others_refuse() -> None:
    x = random_codes(1, 4, 4, 3)
    wrong: list[tuple[Any, tuple[Any, ...], str]] = [
        (operators.quantize_uint8, (x, 1.0, 0), "x must be float32"),
        (operators.dequantize_uint8, (x.float(), 1.0, 0), "codes must be uint8"),
        (operators.pack_uint8, (x, 1), "weight must be int8"),
        (operators.add_uint8, (x, x[:, :2], 1.0, 0, 1.0, 0, 0.0, 255.0, 0), "of the same shape"),
        (operators.average_uint8, (x, [5, 1], [1, 1], [0, 0], True, 1.0, 0, 0), "larger than the image"),
        (operators.average_uint8, (x, [2, 2], [1, 1], [2, 0], True, 1.0, 0, 0), "less than the kernel"),
        (operators.lookup_uint8, (x, random_codes(255)), r"table must be uint8 \[256\]"),
        (operators.lookup_uint8, (x.int(), random_codes(256)), "x must be uint8"),
    ]
    for operator, arguments, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)


def test_schemas_and_fakes() -> None:
    x, weight = random_codes(2, 5, 6, 3), torch.randint(-128, 128, (4, 3, 1, 1), dtype=torch.int8)
    a = conv_arguments()
    linear = {k: v for k, v in a.items() if k not in ("stride", "padding", "dilation", "groups", "input_zero_point")}
    linear |= {"weight_shape": [4, 3, 1, 1], "packed": operators.pack_uint8(weight, 1)}
    samples = [
        (operators.quantize_uint8, (torch.randn(2, 3, 4), 0.1, 3)),
        (operators.dequantize_uint8, (x, 0.1, 3)),
        (operators.pack_uint8, (weight, 1)),
        (operators.conv_uint8, tuple(a.values())),
        (operators.conv_uint8, tuple((a | {"zero_point": None}).values())),
        (operators.conv_uint8, tuple((a | {"other": OTHER}).values())),
        (operators.linear_uint8, tuple(linear.values())),
        (operators.linear_uint8, tuple((linear | {"other": random_codes(1, 5, 6, 4)}).values())),
        (operators.add_uint8, (x, x, 1.0, 0, 1.0, 0, 0.0, 255.0, 0)),
        (operators.average_uint8, (x, [2, 3], [1, 2], [0, 1], True, 1.0, 0, 0)),
        (operators.max_pool_uint8, (x, [2, 3], [1, 2], [0, 1], [1, 1], True)),
        (operators.lookup_uint8, (x, random_codes(256))),
    ]
    for operator, arguments in samples:
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.skipif(not native.LOADED, reason="no compiled kernels")
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_instruction_set(name: str) -> None:
    environment = {**os.environ, "FEWBIT_ISA": name, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    if "this CPU and build allow" in result.stderr:
        pytest.skip(f"this CPU has no {name}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == name


if __name__ == "__main__":
    isa = native.isa()
    test_convolutions_equal_the_reference()
    test_element_by_element()
    test_average()
    test_quantize_rounds_half_to_even_and_clamps()
    for tested_channels in (3, 5, 67):
        test_quantize_of_any_strides((20, 19), tested_channels)
    for tested_shape in ([20, 64, 3, 3], [70, 1, 5, 5], [33, 1030, 1, 1]):
        for tested_weight in (127, -128, "alternating"):
            test_the_largest_sums_are_exact(tested_shape, tested_weight)
    print(isa)
