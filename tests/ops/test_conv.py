"""Convolutions: geometry, exact integers, and agreement with float arithmetic on dequantized operands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fewbit.ops import Geometry, conv
from fewbit.ops.conv import integer_conv
from fewbit.qtensor import dequantize, fake_quantize, qparams, quantize
from fewbit.spec import PER_TENSOR, PER_TOKEN, Granularity, QuantSpec, per_channel, per_group

CONVS = {
    "1d": nn.Conv1d(6, 8, 3),
    "1d-same": nn.Conv1d(6, 8, 5, padding="same"),
    "1d-stride-dilation": nn.Conv1d(6, 8, 3, stride=2, dilation=2, padding=3),
    "2d": nn.Conv2d(6, 8, 3, padding=1),
    "2d-stride-dilation": nn.Conv2d(6, 8, (3, 2), stride=(1, 2), dilation=(2, 1), padding=(2, 1)),
    "2d-groups": nn.Conv2d(6, 8, 3, groups=2, stride=2),
    "2d-depthwise": nn.Conv2d(6, 12, 3, groups=6, padding=1),
    "2d-pointwise": nn.Conv2d(6, 8, 1),
    "3d": nn.Conv3d(6, 4, (2, 3, 2), stride=(1, 2, 1), padding=(1, 0, 1)),
    "1d-transposed": nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1),
    "2d-transposed": nn.ConvTranspose2d(6, 4, (3, 2), stride=2, padding=1, dilation=(1, 2)),
    "2d-transposed-groups": nn.ConvTranspose2d(6, 4, 3, groups=2, stride=2),
    "3d-transposed": nn.ConvTranspose3d(6, 2, 2, stride=(1, 2, 1), groups=2),
}
EVERY = pytest.mark.parametrize("module", CONVS.values(), ids=CONVS.keys())
LARGE = {
    "1d": (nn.Conv1d(1100, 3, 1), (2, 1100, 4)),
    "2d": (nn.Conv2d(300, 4, 3, padding=1), (1, 300, 5, 5)),
    "2d-large-batch": (nn.Conv2d(160, 4, 3), (16, 160, 6, 6)),
    "2d-stride": (nn.Conv2d(200, 2, 5, stride=2), (1, 200, 9, 9)),
    "2d-groups": (nn.Conv2d(600, 4, 3, groups=2), (1, 600, 4, 4)),
    "2d-one-channel-beyond-float32": (nn.Conv2d(1, 2, 40), (1, 1, 41, 41)),
    "3d": (nn.Conv3d(90, 2, 3), (1, 90, 4, 4, 4)),
    "1d-transposed": (nn.ConvTranspose1d(700, 3, 4, stride=2), (1, 700, 5)),
    "2d-transposed": (nn.ConvTranspose2d(260, 3, 3, padding=1), (1, 260, 4, 4)),
    "2d-transposed-groups": (nn.ConvTranspose2d(520, 4, 3, groups=2), (1, 520, 4, 4)),
}


def geometry_of(module: nn.Module) -> Geometry:
    """The geometry of a torch convolution."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    return Geometry(
        tuple(module.weight.shape),
        module.transposed,
        module.stride,
        module.padding,
        module.output_padding,
        module.dilation,
        module.groups,
    )


def inputs(geometry: Geometry) -> Tensor:
    """Two samples of 6 channels that no sign pattern makes symmetric."""
    torch.manual_seed(0)
    return torch.randn(2, 6, *(9, 8, 7)[: geometry.dims]) + 0.3


def weights(module: nn.Module, spec: QuantSpec) -> tuple[Geometry, Tensor]:
    """The geometry and a random weight matrix in its form, of other size in every row."""
    geometry = geometry_of(module)
    torch.manual_seed(1)
    matrix = geometry.matrix(torch.randn(geometry.weight_shape))
    return geometry, matrix * torch.rand(len(matrix), 1)


def assert_close(y: Tensor, expected: Tensor) -> None:
    """Equal within 1e-5 of the largest value."""
    torch.testing.assert_close(y.double(), expected.double(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@EVERY
def test_a_geometry_computes_what_the_module_does(module: nn.Module) -> None:
    geometry = geometry_of(module)
    x = inputs(geometry)
    assert torch.equal(geometry(x, module.weight, module.bias), module(x))


@EVERY
def test_weight_is_the_inverse_of_matrix(module: nn.Module) -> None:
    geometry = geometry_of(module)
    weight = torch.arange(float(module.weight.numel())).reshape(geometry.weight_shape)
    matrix = geometry.matrix(weight)
    assert matrix.shape == (module.out_channels, geometry.terms)
    assert torch.equal(geometry.weight(matrix), weight)


@EVERY
def test_a_row_of_the_matrix_is_all_that_one_output_channel_depends_on(module: nn.Module) -> None:
    geometry = geometry_of(module)
    x, channel = inputs(geometry), module.out_channels - 1
    matrix = torch.zeros(module.out_channels, geometry.terms)
    matrix[channel] = 1
    y = geometry(x, geometry.weight(matrix))
    assert bool((y[:, :channel] == 0).all())
    assert bool((y[:, channel] != 0).any())


@EVERY
@pytest.mark.parametrize("largest", [127, 255])
def test_integer_conv_is_exact(module: nn.Module, largest: int) -> None:
    geometry = geometry_of(module)
    x = torch.randint_like(inputs(geometry), -largest, largest + 1)
    weight = torch.randint(-largest, largest + 1, geometry.weight_shape).float()
    y = integer_conv(x, weight, largest**2, geometry)
    assert torch.equal(y.double(), geometry(x.double(), weight.double()))


@pytest.mark.parametrize(("module", "shape"), LARGE.values(), ids=LARGE.keys())
@pytest.mark.parametrize("worst", [True, False], ids=["worst", "random"])
def test_integer_conv_is_exact_beyond_2_to_24(module: nn.Module, shape: tuple[int, ...], worst: bool) -> None:
    geometry = geometry_of(module)
    assert geometry.terms * 127 * 127 > 2**24
    torch.manual_seed(0)
    x = torch.full(shape, 127.0) if worst else torch.randint(-127, 128, shape).float()
    weight = (
        torch.full(geometry.weight_shape, 127.0) if worst else torch.randint(-127, 128, geometry.weight_shape).float()
    )
    x.view(-1)[0] = 126  # an odd sum somewhere
    y = integer_conv(x, weight, 127 * 127, geometry)
    assert torch.equal(y.double(), geometry(x.double(), weight.double()))


@EVERY
@pytest.mark.parametrize(
    ("weight_spec", "spec"),
    [
        (QuantSpec("int8", per_channel(0)), QuantSpec("int8")),
        (QuantSpec("int8", per_channel(0)), QuantSpec("uint8", symmetric=False)),
        (QuantSpec("int8", PER_TENSOR, symmetric=False), QuantSpec("int8", symmetric=False)),
        (QuantSpec("int4", PER_TOKEN), QuantSpec("int8")),
        (QuantSpec("int4", per_group(5)), QuantSpec("int8")),
        (QuantSpec("nf4", per_channel(0)), QuantSpec("uint8", symmetric=False)),
        (QuantSpec("int8", per_channel(0)), QuantSpec("int8", per_channel(1))),
        (QuantSpec("int4", per_group(4)), None),
        (QuantSpec("int8", per_channel(0), scale=QuantSpec("int8")), QuantSpec("int8")),
    ],
    ids=[
        "int8",
        "uint8-input",
        "asymmetric-both",
        "int4",
        "int4-groups",
        "nf4",
        "channels-of-input",
        "weight-only",
        "two-level",
    ],
)
def test_conv_equals_float_arithmetic_on_what_the_codes_stand_for(
    module: nn.Module, weight_spec: QuantSpec, spec: QuantSpec | None
) -> None:
    geometry, matrix = weights(module, weight_spec)
    q, bias, x = quantize(matrix, weight_spec), torch.randn(len(matrix)), inputs(geometry)
    rounded = x if spec is None else fake_quantize(x, spec)
    expected = geometry(rounded.double(), geometry.weight(dequantize(q)).double(), bias.double())
    assert_close(conv(x, q, bias, geometry, spec), expected)


@EVERY
@pytest.mark.parametrize("symmetric", [True, False])
def test_conv_with_a_static_grid(module: nn.Module, symmetric: bool) -> None:
    weight_spec, spec = QuantSpec("int8", per_channel(0)), QuantSpec("int8", PER_TENSOR, symmetric, observer="minmax")
    geometry, matrix = weights(module, weight_spec)
    q, x = quantize(matrix, weight_spec), inputs(geometry)
    scale, zero_point = qparams(torch.tensor([-0.7]), torch.tensor([1.5]), spec)  # clips
    assert isinstance(scale, Tensor)
    rounded = fake_quantize(x, spec, scale, zero_point)
    expected = geometry(rounded.double(), geometry.weight(dequantize(q)).double())
    assert_close(conv(x, q, None, geometry, spec, scale, zero_point), expected)


@EVERY
def test_gradients_are_those_of_the_float_convolution(module: nn.Module) -> None:
    geometry, matrix = weights(module, QuantSpec("int8"))
    q, x = quantize(matrix, QuantSpec("int8", per_channel(0))), inputs(geometry).requires_grad_()
    bias = torch.randn(len(matrix), requires_grad=True)
    y = conv(x, q, bias, geometry, QuantSpec("int8"))
    slope = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, bias), slope)
    expected = torch.autograd.grad(geometry(x, geometry.weight(dequantize(q)), bias), (x, bias), slope)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity", [per_channel(0), per_group(4)], ids=["integer", "float"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_conv_returns_the_dtype_of_its_input(granularity: Granularity, dtype: torch.dtype) -> None:
    geometry, matrix = weights(CONVS["2d"], QuantSpec("int8"))
    q = quantize(matrix, QuantSpec("int8", granularity))
    assert conv(inputs(geometry).to(dtype), q, None, geometry, QuantSpec("int8")).dtype == dtype


@pytest.mark.parametrize("name", ["1d", "2d-groups", "2d-transposed"])
def test_conv_takes_an_input_without_a_batch_axis(name: str) -> None:
    geometry, matrix = weights(CONVS[name], QuantSpec("int8"))
    q, x = quantize(matrix, QuantSpec("int8", per_channel(0))), inputs(geometry)[:1]
    bias = torch.randn(len(matrix))
    spec = QuantSpec("int8")
    assert torch.equal(conv(x[0], q, bias, geometry, spec), conv(x, q, bias, geometry, spec)[0])


@pytest.mark.parametrize(
    "module",
    [
        nn.ConvTranspose1d(6, 4, 3, stride=3),
        nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1, dilation=2, groups=2),
        nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 3), padding=(1, 0)),
        nn.ConvTranspose3d(6, 4, 2, stride=2),
    ],
    ids=["1d", "1d-groups-dilation", "2d", "3d"],
)
@pytest.mark.parametrize("extra", [-1, 0, 1, 2, 3])
def test_with_output_size_agrees_with_torch(module: nn.Module, extra: int) -> None:
    geometry = geometry_of(module)
    x = inputs(geometry)[:, :, :4]
    size = [length + extra for length in module(x).shape[2:]]
    try:
        expected = module(x, output_size=size)
    except ValueError:
        with pytest.raises(ValueError, match="output_size"):
            geometry.with_output_size(tuple(x.shape), size)
        return
    resized = geometry.with_output_size(tuple(x.shape), size)
    assert resized == replace(geometry, output_padding=resized.output_padding)
    assert torch.equal(resized(x, module.weight, module.bias), expected)
