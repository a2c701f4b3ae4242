"""What all quantized layers share: buffers, names, moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fewbit
from fewbit import PER_TOKEN, QuantSpec, Recipe, Rule, Scheme, per_channel, per_group
from fewbit.nn import LAYERS, Conv, Linear, QuantizedLayer, float_class, input_placeholder, qualified_name
from fewbit.qtensor import dequantize

INT8 = QuantSpec("int8", per_channel(0))
STATIC = QuantSpec("uint8", symmetric=False, observer="minmax")


def quantized(module: nn.Module, scheme: Scheme, *inputs: torch.Tensor) -> QuantizedLayer:
    layer = fewbit.quantize(module, Recipe("test", (Rule("*", scheme),)), [inputs] if inputs else None)
    assert isinstance(layer, QuantizedLayer)
    return layer


def test_names_of_buffers() -> None:
    layer = quantized(nn.Linear(8, 4), Scheme(INT8, STATIC), torch.randn(2, 8))
    expected = {"bias", "weight_packed", "weight_scale", "input_scale", "input_zero_point"}
    assert set(layer.state_dict()) == expected


def test_names_of_buffers_with_zero_points_and_two_level_scales() -> None:
    spec = QuantSpec("int4", per_group(4), symmetric=False, scale=QuantSpec("uint8", PER_TOKEN, symmetric=False))
    layer = quantized(nn.Linear(8, 4, bias=False), Scheme(spec))
    assert set(layer.state_dict()) == {
        "weight_packed",
        "weight_zero_point",
        "weight_scale_packed",
        "weight_scale_scale",
        "weight_scale_zero_point",
    }


def test_qtensor_is_the_weight() -> None:
    torch.manual_seed(0)
    module = nn.Linear(8, 4)
    layer = quantized(module, Scheme(INT8))
    weight = layer.qtensor()
    assert weight.shape == (4, 8) and weight.spec == INT8
    step = module.weight.abs().amax(1, keepdim=True) / 127
    assert ((dequantize(weight) - module.weight).abs() <= step / 2 + 1e-6).all()


def test_quantized_input_is_on_the_grid() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    layer = quantized(nn.Linear(8, 4), Scheme(INT8, STATIC), x)
    assert layer.input_scale is not None and layer.input_zero_point is not None
    rounded = layer.quantized_input(x)
    codes = rounded / layer.input_scale
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert ((rounded - x).abs() <= layer.input_scale / 2 + 1e-6).all()
    assert layer.weight_only().quantized_input(x) is x


def test_static_range_clips_what_is_beyond_it() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 8)
    layer = quantized(nn.Linear(8, 4), Scheme(INT8, STATIC), x)
    with torch.no_grad():
        assert torch.equal(layer(torch.full((1, 8), 1e6)), layer(torch.full((1, 8), 2e6)))


def test_training_flag_is_the_models() -> None:
    layer = quantized(nn.Linear(8, 4).train(), Scheme(INT8))
    assert not layer.training


def test_double_keeps_scales_and_casts_the_bias() -> None:
    layer = quantized(nn.Linear(8, 4), Scheme(INT8)).double()
    assert layer.get_buffer("weight_scale").dtype == torch.float32
    assert layer.get_parameter("bias").dtype == torch.float64
    assert layer(torch.randn(2, 8, dtype=torch.float64)).dtype == torch.float64


def test_to_meta_and_to_empty() -> None:
    layer = quantized(nn.Linear(8, 4), Scheme(INT8)).to("meta")
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (None, None),
        (QuantSpec("int8", PER_TOKEN), None),
        (QuantSpec("int8", observer="minmax"), (torch.float32, None)),
        (STATIC, (torch.float32, torch.uint8)),
    ],
    ids=["float", "dynamic", "symmetric", "asymmetric"],
)
def test_input_placeholder(spec: QuantSpec | None, shapes: tuple[torch.dtype, torch.dtype | None] | None) -> None:
    found = input_placeholder(spec)
    if shapes is None:
        assert found is None
    else:
        assert found is not None
        assert all(part is None or (part.is_meta and part.shape == (1,)) for part in found)
        assert tuple(None if part is None else part.dtype for part in found) == shapes


def test_float_class_finds_subclasses_and_nothing_else() -> None:
    class Mine(nn.Conv2d):
        pass

    assert float_class(Mine(1, 1, 1)) is nn.Conv2d
    assert float_class(nn.ReLU()) is None
    assert LAYERS[qualified_name(nn.Conv2d)] is Conv and LAYERS[qualified_name(nn.Linear)] is Linear


def test_repr_says_what_is_quantized_how() -> None:
    layer = quantized(nn.Linear(8, 4), Scheme(INT8, QuantSpec("int8", PER_TOKEN)))
    assert repr(layer) == "Linear(8 -> 4, weight int8 per channel, input int8 per token)"
