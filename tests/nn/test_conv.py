"""Convolutions: every setting of torch's, exact against float arithmetic on dequantized operands."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import QuantSpec, Recipe, Rule, Scheme, per_channel, per_group
from fewbit.nn import Conv

INT8 = QuantSpec("int8", per_channel(0))
STATIC = QuantSpec("uint8", symmetric=False, observer="minmax")
SCHEMES = {
    "static": Scheme(INT8, STATIC),
    "static-symmetric": Scheme(INT8, QuantSpec("int8", observer="minmax")),
    "dynamic": Scheme(INT8, QuantSpec("int8")),
    "asymmetric-weight": Scheme(QuantSpec("uint8", per_channel(0), symmetric=False), STATIC),
    "per-tensor": Scheme(QuantSpec("int8"), STATIC),
    "weight-only": Scheme(INT8),
    "int4": Scheme(QuantSpec("int4", per_group(8))),
    "int4-static": Scheme(QuantSpec("int4", per_group(8)), STATIC),
}
MODULES: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "1d": (nn.Conv1d, (6, 8, 3), {}, (2, 6, 11)),
    "1d-stride-no-bias": (nn.Conv1d, (6, 8, 3), {"stride": 2, "bias": False}, (2, 6, 11)),
    "1d-same-dilated": (nn.Conv1d, (6, 8, 3), {"padding": "same", "dilation": 2}, (2, 6, 11)),
    "1d-same-even": (nn.Conv1d, (6, 8, 4), {"padding": "same"}, (2, 6, 11)),
    "1d-valid": (nn.Conv1d, (6, 8, 4), {"padding": "valid"}, (2, 6, 11)),
    "2d": (nn.Conv2d, (6, 8, 3), {"padding": 1}, (2, 6, 7, 9)),
    "2d-groups": (nn.Conv2d, (6, 8, 3), {"groups": 2}, (2, 6, 7, 9)),
    "2d-depthwise": (nn.Conv2d, (6, 12, 3), {"groups": 6, "padding": 1}, (2, 6, 7, 9)),
    "2d-dilation": (nn.Conv2d, (6, 8, (3, 2)), {"dilation": (2, 1), "stride": (1, 2)}, (2, 6, 7, 9)),
    "2d-reflect": (nn.Conv2d, (6, 8, 3), {"padding": (1, 2), "padding_mode": "reflect"}, (2, 6, 7, 9)),
    "2d-replicate": (nn.Conv2d, (6, 8, 3), {"padding": 2, "padding_mode": "replicate"}, (2, 6, 7, 9)),
    "2d-circular": (nn.Conv2d, (6, 8, 3), {"padding": (2, 1), "padding_mode": "circular"}, (2, 6, 7, 9)),
    "2d-same-reflect": (nn.Conv2d, (6, 8, 3), {"padding": "same", "padding_mode": "reflect"}, (2, 6, 7, 9)),
    "2d-pointwise": (nn.Conv2d, (6, 8, 1), {}, (2, 6, 7, 9)),
    "2d-unbatched": (nn.Conv2d, (6, 8, 3), {"padding": 1}, (6, 7, 9)),
    "3d": (nn.Conv3d, (4, 6, 3), {"padding": 1, "stride": 2}, (1, 4, 5, 5, 5)),
    "3d-groups": (nn.Conv3d, (4, 6, 3), {"groups": 2}, (1, 4, 5, 5, 5)),
    "transposed-1d": (nn.ConvTranspose1d, (6, 8, 3), {"stride": 2, "output_padding": 1}, (2, 6, 5)),
    "transposed-1d-unbatched": (nn.ConvTranspose1d, (6, 8, 3), {"stride": 2}, (6, 5)),
    "transposed-2d": (nn.ConvTranspose2d, (6, 8, 3), {"stride": 2, "padding": 1}, (2, 6, 5, 4)),
    "transposed-2d-groups": (nn.ConvTranspose2d, (6, 8, 3), {"groups": 2, "dilation": 2}, (2, 6, 5, 4)),
    "transposed-2d-no-bias": (nn.ConvTranspose2d, (6, 8, 3), {"bias": False}, (2, 6, 5, 4)),
    "transposed-3d": (nn.ConvTranspose3d, (4, 6, 3), {"stride": 2}, (1, 4, 3, 3, 3)),
}


def quantized(module: nn.Module, scheme: Scheme, x: Tensor) -> Conv:
    layer = fewbit.quantize(module, Recipe("test", (Rule("*", scheme),)), [x])
    assert isinstance(layer, Conv)
    return layer


def reference(module: nn.Module, layer: Conv, x: Tensor, *args: Any) -> Tensor:
    """The float module in double precision on the operands that the layer sees."""
    double = type(module).__new__(type(module))
    double.__dict__ = {**module.__dict__, "_parameters": dict(module._parameters)}
    double._parameters["weight"] = nn.Parameter(layer.weight.double())
    if layer.bias is not None:
        double._parameters["bias"] = nn.Parameter(layer.bias.double())
    result = double(layer.quantized_input(x).double(), *args)
    assert isinstance(result, Tensor)
    return result.detach()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("name", MODULES)
def test_equals_float_arithmetic_on_dequantized_operands(name: str, scheme: Scheme) -> None:
    torch.manual_seed(0)
    cls, args, kwargs, shape = MODULES[name]
    module, x = cls(*args, **kwargs), torch.randn(shape)
    layer = quantized(module, scheme, x)
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), reference(module, layer, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(9, 9), (10, 9), (10, 10)], ids=str)
def test_output_size_of_a_transposed_convolution(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module, x = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 5, 5)
    layer = quantized(module, SCHEMES["static"], x)
    with torch.no_grad():
        y = layer(x, output_size=list(size))
    assert y.shape == (2, 6, *size)
    torch.testing.assert_close(y.double(), reference(module, layer, x, list(size)), atol=1e-5, rtol=1e-5)


def test_output_size_with_batch_and_channels_and_unbatched() -> None:
    torch.manual_seed(0)
    module, x = nn.ConvTranspose1d(4, 6, 3, stride=2), torch.randn(2, 4, 5)
    layer = quantized(module, SCHEMES["weight-only"], x)
    with torch.no_grad():
        assert layer(x, output_size=[2, 6, 12]).shape == module(x, output_size=[2, 6, 12]).shape
        assert layer(x[0], output_size=[12]).shape == module(x[0], output_size=[12]).shape


def test_impossible_output_size_is_refused() -> None:
    x = torch.randn(2, 4, 5, 5)
    layer = quantized(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), SCHEMES["static"], x)
    with pytest.raises(ValueError, match="output_size"):
        layer(x, output_size=[99, 99])


@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(300, 2, 3), nn.Conv2d(600, 2, 3, groups=2), nn.ConvTranspose2d(300, 2, 3)],
    ids=["pieces", "groups", "transposed"],
)
def test_large_sums_are_exact(module: nn.Module) -> None:
    torch.manual_seed(0)
    nn.init.constant_(module.weight, 1.0)
    nn.init.zeros_(module.bias)
    x = torch.rand(1, module.in_channels, 5, 5)
    x[0, 0, 0, 0] = 1.0
    layer = quantized(module, SCHEMES["static"], x)
    assert layer.input_scale is not None and layer.input_zero_point is not None
    with torch.no_grad():
        y = layer(x)
    # All weights have code 127: sums are 127 times sums of the input's codes, beyond 2^24.
    codes = torch.round(layer.quantized_input(x).double() / layer.input_scale.double())
    ones = reference(module, layer, x) / reference(module, layer, x)
    scales = layer.input_scale.double() * layer.qtensor().scale_values.double().reshape(1, -1, 1, 1)
    sums = torch.round(y.double() / scales)
    float_module = type(module)(module.in_channels, 2, 3, groups=module.groups, bias=False).double()
    nn.init.constant_(float_module.weight, 127.0)
    exact = float_module(codes).detach() * ones
    assert float(exact.max()) > 2**24
    torch.testing.assert_close(sums, exact, atol=0, rtol=2**-23)


def test_weight_property_has_the_float_shape() -> None:
    torch.manual_seed(0)
    for module in (nn.Conv2d(6, 8, 3, groups=2), nn.ConvTranspose2d(6, 8, 3, groups=2)):
        layer = quantized(module, Scheme(INT8), torch.randn(1, 6, 5, 5))
        assert layer.weight.shape == module.weight.shape
        torch.testing.assert_close(layer.weight, module.weight.detach(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("groups", [1, 2], ids=["one-group", "two-groups"])
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d], ids=["plain", "transposed"])
def test_importance_follows_the_channels_that_weights_multiply(cls: type[nn.Module], groups: int) -> None:
    module = cls(4, 6, 2, groups=groups)
    moments = torch.tensor([1.0, 2.0, 3.0, 4.0])
    importance = Conv.importance(module, moments)
    # The same geometry on a weight that holds its input channel's moment.
    channels = moments.reshape(groups, -1)
    if cls is nn.Conv2d:
        weight = channels.repeat_interleave(6 // groups, 0)[:, :, None, None].expand(-1, -1, 2, 2)
    else:
        weight = moments[:, None, None, None].expand(-1, 6 // groups, 2, 2)
    with torch.no_grad():
        module.weight.copy_(weight)
    assert torch.equal(importance, Conv.matrices(module)["weight"].detach())


def pair_names(module: nn.Module) -> list[set[tuple[Any, ...]]]:
    """Each set of pairs, with columns as (channel of the group, kernel position ...)."""
    weight: Any = module.weight
    names = list(itertools.product(*map(range, weight.shape[1:])))
    return [{(names[first], names[second]) for first, second in columns.tolist()} for columns in Conv.pairs(module)]


def test_pairs_of_even_channels_are_neighbours_at_one_kernel_position() -> None:
    [pairs] = pair_names(nn.Conv2d(4, 3, (1, 2)))
    expected = {((c, 0, x), (c + 1, 0, x)) for c in (0, 2) for x in (0, 1)}
    assert pairs == expected


def test_pairs_of_odd_channels_are_also_those_of_all_columns_in_turn() -> None:
    in_turn, by_position = pair_names(nn.Conv2d(3, 2, (1, 2)))
    assert by_position == {((0, 0, x), (1, 0, x)) for x in (0, 1)}
    assert in_turn == {((0, 0, 0), (1, 0, 0)), ((2, 0, 0), (0, 0, 1)), ((1, 0, 1), (2, 0, 1))}


@pytest.mark.parametrize("module", [nn.Conv2d(1, 8, (1, 3)), nn.Conv2d(4, 8, (1, 3), groups=4)], ids=str)
def test_pairs_of_single_channels_that_are_not_depthwise_are_those_of_all_columns_in_turn(module: nn.Module) -> None:
    [pairs] = pair_names(module)
    assert pairs == {((0, 0, 0), (0, 0, 1))}


def test_pairs_are_disjoint_and_within_a_group() -> None:
    for module in (nn.Conv2d(12, 8, 3, groups=2), nn.Conv2d(9, 6, 3, groups=3), nn.Conv1d(5, 4, 3), nn.Conv3d(4, 4, 2)):
        columns = Conv.matrices(module)["weight"].shape[1]
        for pairs in Conv.pairs(module):
            flat = pairs.flatten().tolist()
            assert len(flat) == len({*flat}) and all(0 <= column < columns for column in flat)


@pytest.mark.parametrize("module", [nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(4, 4, 3)], ids=str)
def test_what_engines_compute_in_int32_has_no_pairs(module: nn.Module) -> None:
    assert Conv.pairs(module) == ()


@pytest.mark.parametrize("name", MODULES)
def test_from_matrix_is_the_inverse_of_matrices(name: str) -> None:
    cls, args, kwargs, _ = MODULES[name]
    module = cls(*args, **kwargs)
    assert torch.equal(Conv.from_matrix(module, Conv.matrices(module)["weight"]), module.weight)
