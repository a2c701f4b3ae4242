"""The quantization arithmetic: error bounds, exact zeros, packing, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.qtensor import (
    QTensor,
    dequantize,
    empty,
    encode,
    fake_quantize,
    integers,
    qparams,
    quantize,
    quantize_with,
    reduce_blocks,
    value_range,
)
from fewbit.spec import PER_TENSOR, PER_TOKEN, Granularity, QuantSpec, per_channel, per_group

SETTINGS = settings(max_examples=50)
KINDS = [("int8", True), ("int8", False), ("uint8", False), ("int4", True), ("int4", False), ("nf4", True)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ALL_SPECS = [
    pytest.param(QuantSpec(name, granularity, symmetric), id=f"{name}-{symmetric}-{granularity.to_json()}")
    for name, symmetric in KINDS
    for granularity in (PER_TENSOR, PER_TOKEN, per_channel(0), per_channel(1), per_group(3))
]
INTEGER_KINDS = [kind for kind in KINDS if kind[0] != "nf4"]
SCALE_SPECS = [QuantSpec("int8"), QuantSpec("uint8", PER_TENSOR, symmetric=False), QuantSpec("int4", per_group(2))]


@st.composite
def specs(draw: st.DrawFn, axes: int, kinds: list[tuple[str, bool]] = KINDS) -> QuantSpec:
    """A spec for a tensor of this many axes, with plain scales."""
    name, symmetric = draw(st.sampled_from(kinds))
    choices = [st.sampled_from([PER_TENSOR, PER_TOKEN]), st.integers(1, 12).map(per_group)]
    if axes > 1:
        choices.append(st.integers(-axes, axes - 1).map(per_channel))
    granularity = draw(st.one_of(choices))
    return QuantSpec(name, granularity, symmetric)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Normal values of some size about some centre, some of them 0; the last axis is often no multiple of a group."""
    shape = draw(st.lists(st.integers(1, 10), min_size=1, max_size=3))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    size = 10.0 ** draw(st.integers(-4, 3))
    x = torch.randn(shape, dtype=torch.float64) * size + draw(st.sampled_from([0.0, 0.0, 3 * size, -3 * size]))
    x[torch.rand(shape) < 0.2] = 0
    return x.to(draw(st.sampled_from(DTYPES)))


def spread(block_values: Tensor, shape: tuple[int, ...], granularity: Granularity) -> Tensor:
    """One value a block to one value an element."""
    if granularity.kind == "group":
        return block_values.repeat_interleave(granularity.group_size, -1)[..., : shape[-1]]
    return block_values.expand(shape)


def half_gap(spec: QuantSpec) -> float:
    """Half of the largest distance between neighbouring values at scale 1."""
    number = spec.number
    codes = torch.arange(number.code_min, number.code_min + 2**number.bits).to(number.dtype)
    return float(number.decode(codes).diff().max()) / 2


@SETTINGS
@given(st.data())
def test_error_is_at_most_half_a_step(data: st.DataObject) -> None:
    x = data.draw(tensors())
    spec = data.draw(specs(x.ndim))
    q = quantize(x, spec)
    error = (x.double() - dequantize(q).double()).abs()
    step = spread(q.scale_values, q.shape, spec.granularity).double()
    # The excess: rounding of the scale and of codes * scale in float32, up to 255 times 2^-24 of a step each.
    assert bool((error <= step * (half_gap(spec) + 1e-4)).all())


@SETTINGS
@given(st.data())
def test_bfloat16_scales_cost_no_more_than_their_rounding(data: st.DataObject) -> None:
    x = data.draw(tensors())
    plain = data.draw(specs(x.ndim))
    spec = QuantSpec(plain.format, plain.granularity, plain.symmetric, scale_dtype="bfloat16")
    q = quantize(x, spec)
    assert isinstance(q.scale, Tensor)
    assert q.scale.dtype == torch.bfloat16
    error = (x.double() - dequantize(q).double()).abs()
    step = spread(q.scale_values, q.shape, spec.granularity).double()
    low, high = spec.number.bound(spec.symmetric)
    # Codes of the ends of the range move by (high - low) 2^-9 before they are clamped.
    assert bool((error <= step * (half_gap(spec) + (high - low) * 2**-9 + 1e-4)).all())


@SETTINGS
@given(st.data(), st.sampled_from(SCALE_SPECS))
def test_two_level_scales_round_to_half_a_step_wherever_nothing_is_clamped(
    data: st.DataObject, level: QuantSpec
) -> None:
    x = data.draw(tensors())
    plain = data.draw(specs(x.ndim, INTEGER_KINDS))
    spec = QuantSpec(plain.format, plain.granularity, plain.symmetric, scale=level)
    q = quantize(x, spec)
    assert isinstance(q.scale, QTensor)
    step = spread(q.scale_values, q.shape, spec.granularity).double()
    low, high = spec.number.bound(spec.symmetric)
    inside = (q.codes > low) & (q.codes < high) & (step > 0)
    error = (x.double() - dequantize(q).double()).abs()
    assert bool((error <= step * 0.5001)[inside].all())
    assert bool((dequantize(q)[x == 0] == 0).all())


@SETTINGS
@given(st.data())
def test_codes_follow_the_formula_and_stay_in_bounds(data: st.DataObject) -> None:
    x = data.draw(tensors())
    spec = data.draw(specs(x.ndim, INTEGER_KINDS))
    q = quantize(x, spec)
    working = x if x.dtype == torch.float64 else x.float()
    low, high = spec.number.bound(spec.symmetric)
    expected = torch.round(working / spread(q.scale_values, q.shape, spec.granularity).to(working.dtype))
    if q.zero_point is not None:
        expected += spread(q.zero_point, q.shape, spec.granularity)
    assert q.codes.dtype == spec.number.dtype
    assert q.codes.tolist() == expected.clamp(low, high).tolist()


@SETTINGS
@given(st.data())
def test_zeros_stay_exactly_zero(data: st.DataObject) -> None:
    x = data.draw(tensors())
    spec = data.draw(specs(x.ndim))
    assert bool((dequantize(quantize(x, spec))[x == 0] == 0).all())


@SETTINGS
@given(st.data())
def test_quantizing_again_on_the_same_grid_changes_nothing(data: st.DataObject) -> None:
    x = data.draw(tensors())
    q = quantize(x, data.draw(specs(x.ndim)))
    again = quantize_with(dequantize(q), q.spec, q.scale, q.zero_point)
    assert torch.equal(again.codes, q.codes)


@SETTINGS
@given(st.data())
def test_fake_quantize_is_dequantize_of_quantize(data: st.DataObject) -> None:
    x = data.draw(tensors())
    spec = data.draw(specs(x.ndim))
    q = quantize(x, spec)
    assert torch.equal(fake_quantize(x, spec), dequantize(q, x.dtype))
    assert isinstance(q.scale, Tensor)
    assert torch.equal(fake_quantize(x, spec, q.scale, q.zero_point), dequantize(q, x.dtype))


@SETTINGS
@given(st.data())
def test_integers_are_codes_less_the_zero_point(data: st.DataObject) -> None:
    x = data.draw(tensors()).float()
    spec = data.draw(specs(x.ndim, INTEGER_KINDS))
    q = quantize(x, spec)
    expected = q.codes.float()
    if q.zero_point is not None:
        expected = expected - spread(q.zero_point, q.shape, spec.granularity).float()
    values = integers(x, spec, q.scale_values, q.zero_point)
    assert values.dtype == torch.float32
    assert torch.equal(values, expected)


def test_integers_of_float64_are_rounded_once() -> None:
    x, spec, scale = torch.tensor([0.5 + 1e-12, 127.0], dtype=torch.float64), QuantSpec("int8"), torch.ones(1)
    assert integers(x, spec, scale, None).tolist() == encode(x, spec, scale, None).tolist() == [1, 127]


def test_a_nan_stays_in_its_token_with_two_level_scales() -> None:
    x = torch.ones(3, 4)
    x[1, 1] = float("nan")
    y = fake_quantize(x, QuantSpec("int8", PER_TOKEN, scale=QuantSpec("int8", PER_TOKEN)))
    assert bool(y[[0, 2]].isfinite().all())
    assert bool(y[1].isnan().all())


@SETTINGS
@given(st.data(), st.none() | st.sampled_from(SCALE_SPECS), st.sampled_from(["float32", "bfloat16"]))
def test_empty_has_the_shapes_and_dtypes_of_quantize(data: st.DataObject, level: QuantSpec | None, dtype: str) -> None:
    x = data.draw(tensors())
    plain = data.draw(specs(x.ndim))
    spec = QuantSpec(plain.format, plain.granularity, plain.symmetric, scale=level, scale_dtype=dtype)
    full, bare = quantize(x, spec), empty(tuple(x.shape), spec)
    assert described(bare) == described(full)
    assert bare.nbytes == full.nbytes
    assert bare.packed.is_meta


def described(q: QTensor) -> list[object]:
    """Shape and dtype of every buffer."""
    scale = described(q.scale) if isinstance(q.scale, QTensor) else [q.scale.shape, q.scale.dtype]
    zero_point = None if q.zero_point is None else (q.zero_point.shape, q.zero_point.dtype)
    return [q.shape, q.packed.shape, q.packed.dtype, *scale, zero_point]


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_all_zeros_have_scale_one(spec: QuantSpec) -> None:
    q = quantize(torch.zeros(4, 7), spec)
    assert bool((q.scale_values == 1).all())
    assert bool((dequantize(q) == 0).all())


@pytest.mark.parametrize("value", [2.5, -2.5, 1e-3])
@pytest.mark.parametrize("spec", ALL_SPECS)
def test_a_constant_comes_back(spec: QuantSpec, value: float) -> None:
    restored = dequantize(quantize(torch.full((4, 7), value), spec))
    torch.testing.assert_close(restored, torch.full((4, 7), value), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", ALL_SPECS)
@pytest.mark.parametrize("largest", [3e38, 1e-40, 1e-45])
def test_ranges_at_the_ends_of_float32_stay_finite(spec: QuantSpec, largest: float) -> None:
    x = torch.tensor([[-largest, 0.0, largest], [largest / 3, largest, 0.0]])
    q = quantize(x, spec)
    restored = dequantize(q)
    step = spread(q.scale_values, q.shape, spec.granularity).double()
    assert bool(restored.isfinite().all())
    assert bool((q.scale_values >= torch.finfo(torch.float32).tiny).all())
    assert bool(((restored.double() - x.double()).abs() <= step * (half_gap(spec) + 1e-4)).all())


@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("granularity", [PER_TENSOR, PER_TOKEN, per_channel(0), per_group(3)], ids=lambda g: g.kind)
def test_no_elements(shape: tuple[int, ...], kind: tuple[str, bool], granularity: Granularity) -> None:
    q = quantize(torch.zeros(shape), QuantSpec(kind[0], granularity, kind[1]))
    assert dequantize(q).shape == shape
    assert q.codes.numel() == 0
    assert bool((q.scale_values == 1).all())


@pytest.mark.parametrize("name", ["int4", "nf4"])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 5)], ids=str)
def test_four_bit_tensors_without_rows(name: str, shape: tuple[int, ...]) -> None:
    spec = QuantSpec(name, per_group(4))
    q = quantize(torch.zeros(shape), spec)
    assert dequantize(q).shape == shape
    assert q.packed.shape == empty(shape, spec).packed.shape


@pytest.mark.parametrize("axis", [0, -1])
def test_each_element_of_a_vector_may_be_a_channel(axis: int) -> None:
    x = torch.tensor([1.0, -2.0, 0.0])
    q = quantize(x, QuantSpec("int8", per_channel(axis)))
    assert q.scale_values.shape == (3,)
    torch.testing.assert_close(dequantize(q), x)


@pytest.mark.parametrize("spec", ALL_SPECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_and_counted(spec: QuantSpec, bad: float) -> None:
    x = torch.ones(4, 7)
    x[1, 2] = x[3, 0] = bad
    with pytest.raises(ValueError, match="found 2 NaN or infinite of 28 values"):
        quantize(x, spec)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_a_range_beyond_float32_is_refused(scale_dtype: str) -> None:
    with pytest.raises(ValueError, match=r"at most 3\.37e\+38 fits"):
        quantize(torch.tensor([1.0, 1e42], dtype=torch.float64), QuantSpec("int8", scale_dtype=scale_dtype))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_largest_float32_is_refused(symmetric: bool) -> None:
    largest = torch.finfo(torch.float32).max
    with pytest.raises(ValueError, match=r"found a range of -3\.40282e\+38 to 3\.40282e\+38"):
        quantize(torch.tensor([largest, -largest]), QuantSpec("int8", symmetric=symmetric))


def test_rounds_half_to_even() -> None:
    q = quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.0]), QuantSpec("int8"))
    assert q.codes.tolist() == [0, 2, 2, 0, -2, -2, 127]


def test_asymmetric_rounds_before_the_zero_point_is_added() -> None:
    # scale 1, zero point 1: round(0.5) + 1 is 1, where round(0.5 + 1) would be 2.
    q = quantize(torch.tensor([-1.0, 0.5, 1.5, 254.0]), QuantSpec("uint8", symmetric=False))
    assert q.zero_point is not None
    assert (q.scale_values.tolist(), q.zero_point.tolist()) == ([1.0], [1])
    assert q.codes.tolist() == [0, 1, 3, 255]


@pytest.mark.parametrize("values", [[-5.0, 1.0], [-128.0, 127.0], [-1e-30, 0.0]], ids=str)
def test_symmetric_int8_leaves_out_minus_128(values: list[float]) -> None:
    q = quantize(torch.tensor(values), QuantSpec("int8"))
    assert int(q.codes.min()) == -127


def test_symmetric_int8_codes_mirror() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 20)
    spec = QuantSpec("int8", per_channel(0))
    assert torch.equal(quantize(-x, spec).codes, -quantize(x, spec).codes)


@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
@pytest.mark.parametrize("beyond", [1e4, float("inf")])
def test_encode_clamps_what_is_outside_and_takes_nan_as_zero(kind: tuple[str, bool], beyond: float) -> None:
    spec = QuantSpec(kind[0], PER_TENSOR, kind[1])
    zero_point = None if kind[1] else torch.tensor([3]).to(spec.number.dtype)
    codes = encode(torch.tensor([-beyond, float("nan"), beyond]), spec, torch.tensor([0.5]), zero_point)
    low, high = spec.number.bound(spec.symmetric)
    assert codes.tolist() == [low, 0 if zero_point is None else 3, high]


def test_encode_gives_a_block_of_scale_zero_the_code_of_zero() -> None:
    spec = QuantSpec("int8", PER_TOKEN)
    assert encode(torch.ones(2, 2), spec, torch.tensor([[0.0], [1.0]]), None).tolist() == [[0, 0], [1, 1]]


def test_value_range_and_sum_of_each_group() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0, 5.0], [-1.0, -1.0, -1.0, -7.0, -6.0]])
    low, high = value_range(x, QuantSpec("int8", per_group(2)))
    # The short last group is filled up with zeros, which every range contains in the end.
    assert (low.tolist(), high.tolist()) == ([[-2, 3, 0], [-1, -7, -6]], [[1, 4, 5], [-1, -1, 0]])
    assert reduce_blocks(x, per_group(2)).tolist() == [[-1, 7, 5], [-2, -8, -6]]
    assert reduce_blocks(x, per_channel(1)).tolist() == [[0, -3, 2, -3, -1]]


@pytest.mark.parametrize(("low", "high"), [(1.0, 3.0), (-3.0, -1.0)], ids=["positive", "negative"])
def test_an_asymmetric_range_is_widened_to_zero(low: float, high: float) -> None:
    scale, zero_point = qparams(torch.tensor([low]), torch.tensor([high]), QuantSpec("uint8", symmetric=False))
    assert isinstance(scale, Tensor)
    assert zero_point is not None
    assert float(scale) == pytest.approx(3 / 255)
    assert int(zero_point) == (0 if low > 0 else 255)


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_quantize_leaves_its_argument_alone(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 7)
    before = x.clone()
    quantize(x, spec)
    fake_quantize(x, spec)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("granularity", [PER_TENSOR, PER_TOKEN, per_channel(0), per_group(3)], ids=lambda g: g.kind)
def test_memory_layout_does_not_matter(kind: tuple[str, bool], granularity: Granularity) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 4)
    spec = QuantSpec(kind[0], granularity, kind[1])
    assert torch.equal(quantize(x.T, spec).codes, quantize(x.T.contiguous(), spec).codes)
