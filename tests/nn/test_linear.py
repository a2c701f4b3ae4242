"""Linear layers: shapes, dequantized weights, half precision inputs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import fewbit
from fewbit import PER_TOKEN, QuantSpec, Recipe, Rule, Scheme, ops, per_channel, per_group
from fewbit.nn import Linear
from fewbit.qtensor import dequantize, fake_quantize

INT8 = QuantSpec("int8", per_channel(0))
SPECS = {
    "int8": INT8,
    "int8-group": QuantSpec("int8", per_group(8)),
    "int8-tensor": QuantSpec("int8"),
    "uint8": QuantSpec("uint8", per_channel(0), symmetric=False),
    "int4-group": QuantSpec("int4", per_group(8), scale_dtype="bfloat16"),
    "int4-short-group": QuantSpec("int4", per_group(7), symmetric=False),
    "nf4": QuantSpec("nf4", per_group(16)),
    "int6": QuantSpec("int6", per_channel(0)),
    "int6-two-level": QuantSpec("int6", per_group(32), symmetric=False, scale=QuantSpec("int8", per_channel(0))),
}
INPUTS = {
    "float": None,
    "token": QuantSpec("int8", PER_TOKEN),
    "group": QuantSpec("int8", per_group(8)),
    "tensor": QuantSpec("int8"),
    "static": QuantSpec("uint8", symmetric=False, observer="minmax"),
}


def quantized(module: nn.Module, weight: QuantSpec, spec: QuantSpec | None, x: torch.Tensor) -> Linear:
    layer = fewbit.quantize(module, Recipe("test", (Rule("*", Scheme(weight, spec)),)), [x])
    assert isinstance(layer, Linear)
    return layer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("spec", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("weight", SPECS.values(), ids=SPECS)
def test_equals_float_arithmetic_on_dequantized_operands(weight: QuantSpec, spec: QuantSpec | None, bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 30)
    layer = quantized(nn.Linear(30, 12, bias=bias), weight, spec, x)
    expected = linear(layer.quantized_input(x).double(), layer.weight.double(), None)
    if layer.bias is not None:
        expected = expected + layer.bias.double()
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(30,), (1, 30), (0, 30), (2, 0, 30), (2, 3, 4, 30)], ids=str)
@pytest.mark.parametrize("spec", INPUTS.values(), ids=INPUTS)
def test_any_leading_axes(spec: QuantSpec | None, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Linear(30, 12), INT8, spec, torch.randn(4, 30))
    with torch.no_grad():
        y = layer(torch.randn(shape))
    assert y.shape == (*shape[:-1], 12) and y.isfinite().all()


def test_weight_property_is_the_dequantized_weight() -> None:
    layer = quantized(nn.Linear(30, 12), INT8, None, torch.randn(1, 30))
    assert torch.equal(layer.weight, dequantize(layer.qtensor())) and layer.weight.shape == (12, 30)
    assert (layer.in_features, layer.out_features) == (30, 12)


def test_transposed_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    module, x = Conv1D(12, 30), torch.randn(4, 30)
    layer = quantized(module, INT8, None, x)
    assert (layer.in_features, layer.out_features) == (30, 12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.weight.T + module.bias, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_half_precision_layers_give_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(30, 12, dtype=dtype), torch.randn(4, 30, dtype=dtype)
    layer = quantized(module, INT8, QuantSpec("int8", PER_TOKEN), x)
    with torch.no_grad():
        y, exact = layer(x), module(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact.float(), atol=0.05, rtol=0.05)


def test_gradient_is_that_of_the_dequantized_weight() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 30, requires_grad=True)
    layer = quantized(nn.Linear(30, 12), INT8, QuantSpec("int8", PER_TOKEN), x.detach())
    upstream = torch.randn(4, 12)
    layer(x).backward(upstream)
    assert x.grad is not None and layer.bias is not None and layer.bias.grad is not None
    torch.testing.assert_close(x.grad, upstream @ layer.weight)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))


def test_a_row_of_zeros_stays_zero() -> None:
    module = nn.Linear(30, 12, bias=False)
    nn.init.zeros_(module.weight[3:5].detach())
    with torch.no_grad():
        module.weight[3:5] = 0
    x = torch.randn(4, 30)
    with torch.no_grad():
        y = quantized(module, INT8, QuantSpec("int8", PER_TOKEN), x)(x)
    assert (y[:, 3:5] == 0).all() and y.isfinite().all()


def test_an_outlying_row_does_not_disturb_others() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 30)
    layer = quantized(nn.Linear(30, 12), INT8, QuantSpec("int8", PER_TOKEN), x)
    spec = layer.scheme.input
    assert spec is not None
    with torch.no_grad():
        alone = layer(x[:1])
        together = layer(torch.cat([x[:1], 1e4 * x[1:]]))[:1]
    assert torch.equal(alone, together)
    assert torch.equal(fake_quantize(x[:1], spec), fake_quantize(torch.cat([x[:1], 1e4 * x[1:]]), spec)[:1])


@pytest.mark.parametrize("spec", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize(
    "weight", [INT8, QuantSpec("int4", per_group(32), scale_dtype="bfloat16")], ids=["int8", "int4"]
)
def test_a_layer_that_changes_computes_as_it_is_then(weight: QuantSpec, spec: QuantSpec | None) -> None:
    """What is known in advance stays true in copies, without input quantization, in half, and for float64 inputs."""
    torch.manual_seed(0)
    x = torch.randn(3, 30)
    layer = quantized(nn.Linear(30, 12), weight, spec, x)
    for changed in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.weight_only()):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            bias = None if changed.bias is None else changed.bias.to(dtype)
            grid = (changed.input_scale, changed.input_zero_point)
            with torch.no_grad():
                if changed.bias is not None:
                    changed.bias.data = changed.bias.data.to(dtype)
                expected = ops.linear(x.to(dtype), changed.qtensor(), bias, changed.scheme.input, *grid)
                assert torch.equal(changed(x.to(dtype)), expected)
    assert layer.weight_only().scheme.input is None and layer.weight_only()._numbers is not None


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("name", ["int8", "int6", "int6-two-level"])
def test_new_weights_are_used(name: str, assign: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 30)
    first, second = (quantized(nn.Linear(30, 12), SPECS[name], INPUTS["token"], x) for _ in range(2))
    with torch.no_grad():
        expected = second(x)
        assert not torch.equal(first(x), expected)
        assert torch.equal(torch.func.functional_call(first, second.state_dict(), (x,)), expected)
        first.load_state_dict(second.state_dict(), assign=assign)
        assert torch.equal(first(x), expected)


def test_scales_of_a_dtype_that_no_kernel_takes() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 30)
    layer = quantized(nn.Linear(30, 12), INT8, INPUTS["token"], x)
    half = {name: value.half() if name == "weight_scale" else value for name, value in layer.state_dict().items()}
    with torch.no_grad():
        expected = layer(x)
        layer.load_state_dict(half, assign=True)
        torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)


def test_six_bit_codes_are_widened_once_and_not_pickled() -> None:
    x = torch.randn(3, 30)
    layer = quantized(nn.Linear(30, 12), SPECS["int6"], None, x)
    size = len(pickle.dumps(layer))
    with torch.no_grad():
        layer(x)
    codes, scale = layer._for_kernels()
    assert codes.dtype == torch.int8 and torch.equal(codes, layer.qtensor().codes)
    assert layer._for_kernels()[0] is codes and layer._for_kernels()[1] is scale is layer.weight_scale
    assert len(pickle.dumps(layer)) == size


@pytest.mark.parametrize("columns", [1, 2, 7, 8])
def test_pairs_are_neighbours_in_turn(columns: int) -> None:
    [pairs] = Linear.pairs(nn.Linear(columns, 3))
    assert pairs.tolist() == [[2 * number, 2 * number + 1] for number in range(columns // 2)]


def test_from_matrix_is_the_inverse_of_matrices() -> None:
    module = nn.Linear(6, 4)
    assert torch.equal(Linear.from_matrix(module, Linear.matrices(module)["weight"]), module.weight)
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    transposed = pytorch_utils.Conv1D(4, 6)
    matrix = Linear.matrices(transposed)["weight"]
    assert matrix.shape == (4, 6) and torch.equal(Linear.from_matrix(transposed, matrix), transposed.weight)
