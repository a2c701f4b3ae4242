"""Learned rounding: the codes of ``encode``, gradients as formulas in plain autograd give them, kernels like the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit import PER_TENSOR, PER_TOKEN, QuantSpec, per_channel, per_group
from fewbit.ops.fake_quantize import dynamic, gradients, learned
from fewbit.ops.pairs import LIMIT, bounded
from fewbit.qtensor import decode, encode, fake_quantize, scale_shape

SPECS = [
    QuantSpec("uint8", symmetric=False, observer="minmax"),
    QuantSpec("uint4", symmetric=False, observer="minmax"),
    QuantSpec("int8", per_channel(0)),
    QuantSpec("int4", per_channel(0), symmetric=False),
    QuantSpec("int4", per_group(8)),
    QuantSpec("int4", per_group(5), symmetric=False),
    QuantSpec("nf4", per_group(8)),
]
specs = st.sampled_from(SPECS)
seeds = st.integers(0, 2**32 - 1)


def made(spec: QuantSpec, seed: int, shape: tuple[int, ...] = (6, 16)) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Values, the grid's scale and zero point, and a gradient."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random)
    blocks = (1,) if spec.granularity == PER_TENSOR else scale_shape(x.shape, spec.granularity)
    low, high = spec.number.bound(spec.symmetric)
    scale = (torch.rand(blocks, generator=random) + 0.5) * 4 / (high - low)  # about half of the range is clipped
    zero_point = None
    if not spec.symmetric:
        zero_point = torch.randint(int(low), int(high) + 1, blocks, generator=random).to(spec.number.dtype)
    return x, scale, zero_point, torch.randn(shape, generator=random)


def wide(t: Tensor, spec: QuantSpec, x: Tensor) -> Tensor:
    """One value an element from one a block."""
    if spec.granularity.kind == "group":
        t = t.repeat_interleave(spec.granularity.group_size, -1)[..., : x.shape[-1]]
    return t.expand(x.shape)


@given(specs, seeds)
@settings(max_examples=60, deadline=None)
def test_values_are_those_of_the_codes(spec: QuantSpec, seed: int) -> None:
    x, scale, zero_point, _ = made(spec, seed)
    expected = decode(encode(x, spec, scale, zero_point), spec, scale, zero_point)
    assert torch.equal(learned(x, spec, scale, zero_point), expected)
    assert torch.equal(fake_quantize(x, spec, scale, zero_point), expected)


@given(specs.filter(lambda spec: spec.number.is_integer), seeds)
@settings(max_examples=60, deadline=None)
def test_gradients_are_those_of_lsq(spec: QuantSpec, seed: int) -> None:
    x, scale, zero_point, slope = made(spec, seed)
    log_scale = torch.zeros_like(scale).requires_grad_()
    static = spec.is_static
    shift = torch.zeros(1).requires_grad_() if static else None
    leaf = x.clone().requires_grad_()
    learned(leaf, spec, scale, zero_point, log_scale, shift).backward(slope)
    # The same in plain autograd: round as the identity, clamp as itself.
    low, high = spec.number.bound(spec.symmetric)
    plain, log, offset = (t.double().clone().requires_grad_() for t in (x, torch.zeros_like(scale), torch.zeros(1)))
    s = wide(scale.double() * log.exp(), spec, x)
    z = 0 if zero_point is None else wide(zero_point.double(), spec, x) + offset * (high - low)
    v = (
        (plain / s).clamp(low - z, high - z)
        if isinstance(z, int)
        else torch.maximum(torch.minimum(plain / s, high - z), low - z)
    )
    rounded = v + (v.round() - v).detach()
    (rounded * s).backward(slope.double())
    elements = x.numel() / scale.numel() / (len(x) if static else 1)
    largest = high - low if zero_point is not None else max(-low, high)
    factor = 1 / math.sqrt(elements * largest)
    assert leaf.grad is not None and plain.grad is not None and log_scale.grad is not None and log.grad is not None
    torch.testing.assert_close(leaf.grad, plain.grad.float())
    torch.testing.assert_close(log_scale.grad, (log.grad * factor).float(), atol=1e-5, rtol=1e-4)
    if shift is not None:
        assert shift.grad is not None and offset.grad is not None
        torch.testing.assert_close(shift.grad, (offset.grad * factor).float(), atol=1e-5, rtol=1e-4)


@given(specs.filter(lambda spec: spec.number.is_integer), seeds, st.sampled_from([(6, 16), (3, 8, 5, 16), (5000, 8)]))
@settings(max_examples=40, deadline=None)
def test_kernels_equal_the_reference(spec: QuantSpec, seed: int, shape: tuple[int, ...]) -> None:
    if spec.granularity.kind == "channel" and len(shape) > 2:
        return
    x, scale, zero_point, slope = made(spec, seed, shape)
    found = gradients(slope, x, None, spec, scale, zero_point)
    expected = gradients(slope.double(), x.double(), None, spec, scale, zero_point)  # no operator takes float64
    assert torch.equal(found[0], expected[0].float())
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b.float(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_have_the_codes_of_encode(value: float) -> None:
    for spec in SPECS:
        x, scale, zero_point, _ = made(spec, 0)
        x[1, 2] = value
        expected = decode(encode(x, spec, scale, zero_point), spec, scale, zero_point)
        assert torch.equal(learned(x, spec, scale, zero_point), expected)


def test_channels_last_stays_channels_last() -> None:
    spec = SPECS[0]
    x, scale, zero_point, slope = made(spec, 1, (2, 8, 5, 6))
    log_scale = torch.zeros(1).requires_grad_()
    leaves = [x.clone().requires_grad_(), x.to(memory_format=torch.channels_last).requires_grad_()]
    results = [learned(leaf, spec, scale, zero_point, log_scale) for leaf in leaves]
    assert torch.equal(*results) and results[1].is_contiguous(memory_format=torch.channels_last)
    for leaf, result in zip(leaves, results, strict=True):
        result.backward(slope)
        assert leaf.grad is not None
    assert torch.equal(leaves[0].grad, leaves[1].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for spec in SPECS:
        x, scale, zero_point, slope = made(spec, 2)
        leaf = x.to(dtype).requires_grad_()
        log_scale = torch.zeros_like(scale).requires_grad_()
        y = learned(leaf, spec, scale, zero_point, log_scale)
        y.backward(slope.to(dtype))
        assert y.dtype == dtype and leaf.grad is not None and leaf.grad.dtype == dtype
        assert torch.equal(y, fake_quantize(x.to(dtype), spec, scale, zero_point))


@pytest.mark.parametrize("spec", [QuantSpec("int8", PER_TOKEN), QuantSpec("int8", per_group(8)), QuantSpec("int8")])
def test_dynamic_rounds_and_passes_the_gradient(spec: QuantSpec) -> None:
    x = torch.randn(3, 4, 16, requires_grad=True)
    y = dynamic(x, spec)
    assert torch.equal(y, fake_quantize(x.detach(), spec))
    slope = torch.randn_like(x)
    y.backward(slope)
    assert torch.equal(x.grad, slope)  # type: ignore[arg-type]


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_bounded_pairs_are_bounded_and_others_as_they_were(seed: int) -> None:
    codes = torch.randint(-127, 128, (5, 12), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    pairs = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).reshape(-1, 2)[:5]
    before = codes.clone()
    found = bounded(codes, (pairs,)).int()
    assert torch.equal(codes, before)
    chosen, old = found[:, pairs], codes.int()[:, pairs]
    for sign in (1, -1):
        sums = (chosen * sign).clamp(min=0).sum(2)
        assert torch.equal(sums, (old * sign).clamp(min=0).sum(2).clamp(max=LIMIT))
    others = [column for column in range(12) if column not in pairs]
    assert torch.equal(found[:, others], codes.int()[:, others])


def test_rounding_can_be_compiled_into_a_graph() -> None:
    spec = SPECS[0]
    x, scale, zero_point, _ = made(spec, 3)
    exported = torch.export.export(Rounding(spec, scale, zero_point), (x,)).module()
    assert torch.equal(exported(x), learned(x, spec, scale, zero_point))


class Rounding(torch.nn.Module):
    def __init__(self, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> None:
        super().__init__()
        self.spec, self.scale, self.zero_point = spec, scale, zero_point

    def forward(self, x: Tensor) -> Tensor:
        return learned(x, self.spec, self.scale, self.zero_point)
