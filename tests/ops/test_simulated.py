"""Layers in training: to the bit what the quantized layer gives, with the gradients of the float product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fewbit.nn.conv import geometry_of
from fewbit.ops import Geometry, conv, linear
from fewbit.ops.linear import ACTIVATIONS
from fewbit.ops.simulated import simulated_conv, simulated_linear
from fewbit.qtensor import dequantize, fake_quantize, qparams, quantize
from fewbit.spec import PER_TOKEN, QuantSpec, per_channel, per_group

INT8, UINT8 = QuantSpec("int8", per_channel(0)), QuantSpec("uint8", symmetric=False, observer="minmax")
CONVS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "padding": (partial(nn.Conv2d, 6, 8, 3, padding=1), (2, 6, 9, 8)),
    "stride-dilation": (partial(nn.Conv2d, 6, 8, (3, 2), stride=(1, 2), dilation=(2, 1), padding=(2, 1)), (2, 6, 9, 8)),
    "depthwise": (partial(nn.Conv2d, 6, 6, 3, groups=6, padding=1), (2, 6, 9, 8)),
    "one-image": (partial(nn.Conv2d, 6, 8, 3), (6, 9, 8)),
    "no-bias": (partial(nn.Conv2d, 6, 8, 1, bias=False), (2, 6, 9, 8)),
    "same": (partial(nn.Conv1d, 6, 8, 5, padding="same"), (2, 6, 9)),
    "same-uneven": (partial(nn.Conv2d, 6, 8, (2, 3), padding="same"), (2, 6, 9, 8)),
    "valid": (partial(nn.Conv2d, 6, 8, 3, padding="valid"), (2, 6, 9, 8)),
    "transposed": (partial(nn.ConvTranspose2d, 6, 4, 3, stride=2, output_padding=1, groups=2), (2, 6, 5, 5)),
    "3d": (partial(nn.Conv3d, 6, 4, (2, 3, 2), padding=(1, 0, 1)), (2, 6, 4, 5, 6)),
    "sums-beyond-2-to-24": (partial(nn.Conv2d, 300, 4, 3, padding=1), (1, 300, 5, 5)),
}


def gradients(y: Tensor, of: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad((y * torch.randn_like(y)).sum(), of))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("spec", [UINT8, QuantSpec("int8")], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize(("make", "shape"), CONVS.values(), ids=CONVS.keys())
def test_convolutions(make: Callable[[], nn.Module], shape: tuple[int, ...], spec: QuantSpec) -> None:
    torch.manual_seed(0)
    module = make()
    geometry: Geometry = geometry_of(module)
    x = torch.randn(shape) + 0.3
    bias = module._parameters["bias"]
    grid = qparams(torch.tensor([-2.0]), torch.tensor([3.0]), spec)
    weight = quantize(geometry.matrix(module.get_parameter("weight").detach()), INT8)
    rounded = [fake_quantize(x, spec, *grid).requires_grad_(), geometry.weight(dequantize(weight)).requires_grad_()]

    y = simulated_conv(*rounded, bias, geometry, (spec, INT8), (grid[0], weight.scale_values))
    with torch.no_grad():
        assert torch.equal(y, conv(x, weight, bias, geometry, spec, *grid))
    inputs = rounded if bias is None else [*rounded, bias]
    for found, expected in zip(gradients(y, inputs), gradients(geometry(*rounded, bias), inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("weight_spec", "spec"),
    [
        (INT8, QuantSpec("int8", PER_TOKEN)),
        (INT8, UINT8),
        (QuantSpec("int4", per_group(32), scale_dtype="bfloat16"), QuantSpec("int8", per_group(32))),
        (QuantSpec("int4", per_group(32), symmetric=False), QuantSpec("int8", per_group(32))),
    ],
    ids=["per-token", "static", "groups", "groups-asymmetric"],
)
def test_linear_layers(weight_spec: QuantSpec, spec: QuantSpec, activation: str) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(2, 3, 64) + 0.3, nn.Parameter(torch.randn(24))
    grid = qparams(torch.tensor([-2.0]), torch.tensor([3.0]), spec) if spec.is_static else (None, None)
    codes = quantize(torch.randn(24, 64), weight_spec)
    rounded = [fake_quantize(x, spec, *grid).requires_grad_(), dequantize(codes).requires_grad_()]

    y = simulated_linear(x, *rounded, bias, codes, spec, grid, activation)
    with torch.no_grad():
        assert torch.equal(y, linear(x, codes, bias, spec, *grid, activation=activation))
    inputs = [*rounded, bias]
    exact = ACTIVATIONS[activation][0](nn.functional.linear(*rounded, bias))
    for found, expected in zip(gradients(y, inputs), gradients(exact, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_channels_last_and_what_is_frozen() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(6, 8, 3, padding=1)
    geometry, spec = geometry_of(module), QuantSpec("int8")
    grid = qparams(torch.tensor([-2.0]), torch.tensor([2.0]), spec)
    weight = quantize(geometry.matrix(module.weight.detach()), INT8)
    x = fake_quantize(torch.randn(2, 6, 9, 8), spec, *grid)
    rounded, scales = geometry.weight(dequantize(weight)), (grid[0], weight.scale_values)
    expected = simulated_conv(x, rounded, None, geometry, (spec, INT8), scales)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    y = simulated_conv(last, rounded, None, geometry, (spec, INT8), scales)
    assert torch.equal(y, expected)
    [found] = gradients(y, [last])
    [exact] = gradients(geometry(last, rounded), [last])
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_what_an_input_of_zeros_gives() -> None:
    geometry = geometry_of(nn.Conv2d(2, 3, 1))
    weight, bias = torch.ones(3, 2, 1, 1), torch.tensor([1.0, 2.0, 3.0])
    x = torch.zeros(1, 2, 4, 4)
    y = simulated_conv(
        x, weight, bias, geometry, (QuantSpec("int8"), INT8), (torch.zeros(1), torch.full((3, 1), 1 / 127))
    )
    assert torch.equal(y, bias[:, None, None].expand(1, 3, 4, 4))
