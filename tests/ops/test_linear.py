"""The linear layer: agreement with float arithmetic on dequantized operands, gradients, operators, export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewbit.ops import linear
from fewbit.qtensor import QTensor, dequantize, fake_quantize, qparams, quantize
from fewbit.spec import PER_TENSOR, PER_TOKEN, Granularity, QuantSpec, per_channel, per_group

ROWS, COLUMNS = 10, 45
WEIGHTS = {
    "int8-rows": QuantSpec("int8", per_channel(0)),
    "int8-rows-asymmetric": QuantSpec("int8", per_channel(0), symmetric=False),
    "int8-tensor": QuantSpec("int8", PER_TENSOR),
    "int8-tensor-asymmetric": QuantSpec("uint8", PER_TENSOR, symmetric=False),
    "int8-columns": QuantSpec("int8", per_channel(1)),
    "int8-groups": QuantSpec("int8", per_group(16)),
    "int8-bfloat16-scales": QuantSpec("int8", per_channel(0), scale_dtype="bfloat16"),
    "int4-rows": QuantSpec("int4", PER_TOKEN),
    "int4-groups": QuantSpec("int4", per_group(16)),
    "int4-groups-asymmetric": QuantSpec("int4", per_group(16), symmetric=False),
    "int4-one-group": QuantSpec("int4", per_group(64), symmetric=False),
    "int4-two-level": QuantSpec("int4", per_group(16), scale=QuantSpec("int8", per_channel(0))),
    "nf4-groups": QuantSpec("nf4", per_group(16)),
}
INPUTS = {
    "token": QuantSpec("int8", PER_TOKEN),
    "token-asymmetric": QuantSpec("uint8", PER_TOKEN, symmetric=False),
    "tensor": QuantSpec("int8", PER_TENSOR),
    "tensor-asymmetric": QuantSpec("int8", PER_TENSOR, symmetric=False),
    "groups": QuantSpec("int8", per_group(16)),
    "groups-asymmetric": QuantSpec("int8", per_group(16), symmetric=False),
    "other-groups": QuantSpec("int8", per_group(8)),
    "channels": QuantSpec("int8", per_channel(-1)),
    "int4": QuantSpec("int4", PER_TOKEN),
    "nf4": QuantSpec("nf4", PER_TOKEN),
}
EVERY_WEIGHT = pytest.mark.parametrize("weight_spec", WEIGHTS.values(), ids=WEIGHTS.keys())
OPERATOR_WEIGHTS = {name: WEIGHTS[name] for name in ("int8-rows", "int8-rows-asymmetric", "int4-groups-asymmetric")}
OPERATOR_INPUTS = {"token": INPUTS["token"], "groups": INPUTS["groups"], "float": None}


def operands(weight_spec: QuantSpec, shape: tuple[int, ...] = (2, 3)) -> tuple[Tensor, QTensor, Tensor]:
    """An input, a quantized weight and a bias."""
    torch.manual_seed(0)
    x = torch.randn(*shape, COLUMNS) * 10 ** torch.randn(*shape, 1) + 0.2
    return x, quantize(torch.randn(ROWS, COLUMNS) + 0.1, weight_spec), torch.randn(ROWS)


def float_linear(x: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    """float64 arithmetic on what the codes stand for."""
    return nn.functional.linear(x.double(), dequantize(weight).double(), None if bias is None else bias.double())


def assert_close(y: Tensor, expected: Tensor) -> None:
    """Equal within 1e-5 of the largest value of each row."""
    error = (y.double() - expected).abs().amax(-1)
    assert bool((error <= 1e-5 * expected.abs().amax(-1)).all())


@EVERY_WEIGHT
@pytest.mark.parametrize("spec", INPUTS.values(), ids=INPUTS.keys())
def test_linear_equals_float_arithmetic_on_what_the_codes_stand_for(weight_spec: QuantSpec, spec: QuantSpec) -> None:
    x, weight, bias = operands(weight_spec)
    y = linear(x, weight, bias, spec)
    assert y.shape == (2, 3, ROWS)
    rounded = fake_quantize(x.reshape(-1, COLUMNS), spec).reshape(x.shape)
    assert_close(y - bias, float_linear(rounded, weight, None))


@EVERY_WEIGHT
@pytest.mark.parametrize("symmetric", [True, False])
def test_linear_with_a_static_grid(weight_spec: QuantSpec, symmetric: bool) -> None:
    x, weight, _ = operands(weight_spec)
    spec = QuantSpec("int8", PER_TENSOR, symmetric, observer="minmax")
    scale, zero_point = qparams(torch.tensor([-1.0]), torch.tensor([2.0]), spec)  # clips
    assert isinstance(scale, Tensor)
    expected = float_linear(fake_quantize(x, spec, scale, zero_point), weight, None)
    assert_close(linear(x, weight, None, spec, scale, zero_point), expected)


@EVERY_WEIGHT
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_weight_only_is_a_float_layer_with_the_dequantized_weight(weight_spec: QuantSpec, with_bias: bool) -> None:
    x, weight, bias = operands(weight_spec)
    y = linear(x, weight, bias if with_bias else None)
    assert_close(y, float_linear(x, weight, bias if with_bias else None))


@pytest.mark.parametrize("depth", [1041, 4100])
def test_long_sums_of_the_largest_codes_are_exact(depth: int) -> None:
    x = torch.full((1, depth), 127.0)
    x[0, 0] = 126
    weight = quantize(torch.full((2, depth), 127.0), QuantSpec("int8", per_channel(0)))
    exact = 127 * (127 * depth - 1)
    assert linear(x, weight, None, QuantSpec("int8", PER_TOKEN)).tolist() == [[float(torch.tensor(float(exact)))] * 2]


def test_sums_beyond_int32_do_not_overflow() -> None:
    x = torch.ones(1, 40_000)  # 40,000 products of up to 255 * 255
    weight = quantize(torch.cat([x, 0 * x]), QuantSpec("uint8", PER_TENSOR, symmetric=False))
    y = linear(x, weight, None, QuantSpec("uint8", PER_TOKEN, symmetric=False))
    torch.testing.assert_close(y, torch.tensor([[40_000.0, 0.0]]))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("spec", [None, INPUTS["token"], INPUTS["tensor"], INPUTS["groups"]], ids=str)
def test_any_number_of_leading_axes(shape: tuple[int, ...], spec: QuantSpec | None) -> None:
    x, weight, bias = operands(WEIGHTS["int4-groups"], shape)
    y = linear(x, weight, bias, spec)
    assert y.shape == (*shape, ROWS)
    if spec != INPUTS["tensor"]:  # one scale for all
        one_by_one = [linear(row, weight, bias, spec) - bias for row in x.reshape(-1, COLUMNS)]
        for row, expected in zip(y.reshape(-1, ROWS), one_by_one, strict=True):
            assert_close(row - bias, expected.double())


@pytest.mark.parametrize("spec", [None, INPUTS["token"], INPUTS["tensor"], INPUTS["nf4"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_linear_returns_the_dtype_of_its_input(spec: QuantSpec | None, dtype: torch.dtype) -> None:
    x, weight, bias = operands(WEIGHTS["int8-rows"])
    x, bias = x.to(dtype), bias.to(dtype)
    y = linear(x, weight, bias, spec)
    assert y.dtype == dtype
    expected = linear(x.float(), weight, bias.float(), spec)
    tolerance = 4 * max(torch.finfo(dtype).eps, 1e-6) * float(expected.abs().max())
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("spec", [INPUTS["token"], INPUTS["token-asymmetric"], INPUTS["groups"]], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_does_not_spoil_the_others(spec: QuantSpec, bad: float) -> None:
    x, weight, bias = operands(WEIGHTS["int8-rows"], (4,))
    expected = linear(x, weight, bias, spec)
    x[2, 5] = bad
    y = linear(x, weight, bias, spec)
    keep = torch.tensor([0, 1, 3])
    torch.testing.assert_close(y[keep], expected[keep])
    assert not bool(y[2].isfinite().any())


@pytest.mark.parametrize("weight_spec", OPERATOR_WEIGHTS.values(), ids=OPERATOR_WEIGHTS.keys())
@pytest.mark.parametrize("spec", OPERATOR_INPUTS.values(), ids=OPERATOR_INPUTS.keys())
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
def test_gradients_are_those_of_the_float_layer(
    weight_spec: QuantSpec, spec: QuantSpec | None, shape: tuple[int, ...]
) -> None:
    x, weight, bias = operands(weight_spec, shape)
    x.requires_grad_()
    bias.requires_grad_()
    y = linear(x, weight, bias, spec)
    slope = torch.randn_like(y)
    of_x, of_bias = torch.autograd.grad(y, (x, bias), slope)
    torch.testing.assert_close(of_x, slope @ dequantize(weight))
    torch.testing.assert_close(of_bias, slope.reshape(-1, ROWS).sum(0))


@pytest.mark.parametrize("spec", [INPUTS["tensor"], INPUTS["token-asymmetric"]], ids=["tensor", "token-asymmetric"])
def test_gradients_of_integer_products_that_are_no_operator(spec: QuantSpec) -> None:
    x, weight, bias = operands(WEIGHTS["int8-rows"])
    x.requires_grad_()
    bias.requires_grad_()
    y = linear(x, weight, bias, spec)
    slope = torch.randn_like(y)
    of_x, of_bias = torch.autograd.grad(y, (x, bias), slope)
    torch.testing.assert_close(of_x, slope @ dequantize(weight))
    torch.testing.assert_close(of_bias, slope.reshape(-1, ROWS).sum(0))


@pytest.mark.parametrize("shape", [(4,), (2, 3)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("weight_spec", OPERATOR_WEIGHTS.values(), ids=OPERATOR_WEIGHTS.keys())
@pytest.mark.parametrize("name", ["linear_dynamic", "linear_weight_only"])
def test_the_operators_pass_opcheck(name: str, weight_spec: QuantSpec, with_bias: bool, shape: tuple[int, ...]) -> None:
    x, weight, bias = operands(weight_spec, shape)
    x.requires_grad_()
    bias.requires_grad_()
    group = weight_spec.granularity.group_size
    arguments = (x, weight.packed, weight.scale, weight.zero_point, bias if with_bias else None, COLUMNS)
    numbers = (weight_spec.number.bits, group, *((group,) if name == "linear_dynamic" else ()))
    torch.library.opcheck(getattr(torch.ops.fewbit, name).default, (*arguments, *numbers))


class Layer(nn.Module):
    """A linear layer with plain buffers."""

    def __init__(self, weight: QTensor, bias: Tensor, spec: QuantSpec | None) -> None:
        super().__init__()
        self.weight_spec, self.weight_shape, self.spec = weight.spec, weight.shape, spec
        assert isinstance(weight.scale, Tensor)
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = QTensor(self.packed, self.scale, self.zero_point, self.weight_spec, self.weight_shape)
        return linear(x, weight, self.bias, self.spec)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *((name, None) for name in ("int8-rows", "int4-groups-asymmetric", "nf4-groups")),
        *((name, "token") for name in ("int8-rows", "int4-groups-asymmetric", "nf4-groups")),
        *((name, "tensor") for name in ("int8-rows", "int4-groups", "nf4-groups")),
        *((name, "token-asymmetric") for name in ("int8-rows", "int4-groups", "nf4-groups")),
    ],
)
def test_an_exported_layer_gives_equal_results(name: str, spec: str | None) -> None:
    x, weight, bias = operands(WEIGHTS[name])
    layer = Layer(weight, bias, None if spec is None else INPUTS[spec])
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    assert torch.equal(exported.module()(x), layer(x))
    more = torch.cat([x, -x, 2 * x])
    assert torch.equal(exported.module()(more), layer(more))


@pytest.mark.parametrize("granularity", [per_channel(0), per_group(16)], ids=["rows", "groups"])
@pytest.mark.parametrize("spec", [None, INPUTS["token"]], ids=["weight-only", "dynamic"])
def test_layers_with_compiled_kernels_are_one_operator_in_the_graph(
    granularity: Granularity, spec: QuantSpec | None
) -> None:
    x, weight, bias = operands(QuantSpec("int8", granularity))
    graph = torch.export.export(Layer(weight, bias, spec), (x,)).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called == [f"fewbit.linear_{'weight_only' if spec is None else 'dynamic'}.default"]
