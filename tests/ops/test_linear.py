"""The linear layer: agreement with float arithmetic on dequantized operands, gradients, operators, export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewbit.ops import linear, native
from fewbit.ops.linear import ACTIVATIONS, has_kernel, numbers_of
from fewbit.qtensor import QTensor, dequantize, fake_quantize, qparams, quantize
from fewbit.spec import PER_TENSOR, PER_TOKEN, QuantSpec, per_channel, per_group

ROWS, COLUMNS = 10, 45
WEIGHTS = {
    "int8-rows": QuantSpec("int8", per_channel(0)),
    "int8-rows-asymmetric": QuantSpec("int8", per_channel(0), symmetric=False),
    "int8-tensor": QuantSpec("int8", PER_TENSOR),
    "int8-tensor-asymmetric": QuantSpec("uint8", PER_TENSOR, symmetric=False),
    "int8-columns": QuantSpec("int8", per_channel(1)),
    "int8-groups": QuantSpec("int8", per_group(32)),
    "int8-groups-of-16": QuantSpec("int8", per_group(16)),
    "int8-bfloat16-scales": QuantSpec("int8", per_channel(0), scale_dtype="bfloat16"),
    "int4-rows": QuantSpec("int4", PER_TOKEN),
    "int4-groups": QuantSpec("int4", per_group(32), scale_dtype="bfloat16"),
    "int4-groups-of-16": QuantSpec("int4", per_group(16)),
    "int4-groups-asymmetric": QuantSpec("int4", per_group(32), symmetric=False),
    "int4-one-group": QuantSpec("int4", per_group(64), symmetric=False),
    "int4-two-level": QuantSpec("int4", per_group(16), scale=QuantSpec("int8", per_channel(0))),
    "nf4-groups": QuantSpec("nf4", per_group(16)),
    "int6-rows": QuantSpec("int6", per_channel(0)),
}
INPUTS = {
    "token": QuantSpec("int8", PER_TOKEN),
    "token-asymmetric": QuantSpec("uint8", PER_TOKEN, symmetric=False),
    "tensor": QuantSpec("int8", PER_TENSOR),
    "tensor-asymmetric": QuantSpec("int8", PER_TENSOR, symmetric=False),
    "groups": QuantSpec("int8", per_group(32)),
    "groups-of-16": QuantSpec("int8", per_group(16)),
    "groups-asymmetric": QuantSpec("int8", per_group(16), symmetric=False),
    "other-groups": QuantSpec("int8", per_group(8)),
    "channels": QuantSpec("int8", per_channel(-1)),
    "int4": QuantSpec("int4", PER_TOKEN),
    "nf4": QuantSpec("nf4", PER_TOKEN),
    "bfloat16-scales": QuantSpec("int8", PER_TOKEN, scale_dtype="bfloat16"),
}
OTHER_WEIGHTS = {"int8-tensor", "int8-tensor-asymmetric", "int8-columns", "int8-groups-of-16", "int4-groups-of-16"}
OTHER_WEIGHTS |= {"int4-two-level", "nf4-groups", "int6-rows"}
KERNEL_WEIGHTS = [spec for name, spec in WEIGHTS.items() if name not in OTHER_WEIGHTS]
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


@EVERY_WEIGHT
@pytest.mark.parametrize("spec", [None, *INPUTS.values()], ids=["float", *INPUTS])
def test_operators_are_called_for_what_kernels_can_do(weight_spec: QuantSpec, spec: QuantSpec | None) -> None:
    _, weight, _ = operands(weight_spec)
    mine = weight_spec in KERNEL_WEIGHTS
    assert has_kernel(weight) == mine
    groups = 0 if spec is None else spec.granularity.group_size
    agree = groups in (0, 32) and (groups == 0 or weight_spec.granularity.group_size in (0, 32))
    expected = mine and spec in (None, INPUTS["token"], INPUTS["groups"]) and agree
    assert (numbers_of(weight, spec) is not None) == expected


@pytest.mark.parametrize("weight_spec", [WEIGHTS["int8-rows"], WEIGHTS["int4-groups"], WEIGHTS["nf4-groups"]], ids=str)
@pytest.mark.parametrize("spec", [None, INPUTS["token"], INPUTS["tensor"]], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_activation_follows(
    weight_spec: QuantSpec, spec: QuantSpec | None, activation: str, dtype: torch.dtype
) -> None:
    x, weight, bias = operands(weight_spec)
    x, bias = (0.1 * x).to(dtype), bias.to(dtype)
    y = linear(x, weight, bias, spec, activation=activation)
    expected = ACTIVATIONS[activation][0](linear(x, weight, bias, spec))
    assert y.dtype == dtype
    exact = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(y, expected, rtol=exact, atol=exact)


@pytest.mark.parametrize("spec", [None, INPUTS["token"], INPUTS["tensor"]], ids=["float", "token", "tensor"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_through_an_activation(spec: QuantSpec | None, activation: str) -> None:
    x, weight, bias = operands(WEIGHTS["int8-rows"])
    x.requires_grad_()
    bias.requires_grad_()
    y = linear(x, weight, bias, spec, activation=activation)
    with torch.no_grad():
        assert torch.equal(y, linear(x, weight, bias, spec, activation=activation))
    slope = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, bias), slope)
    after = ACTIVATIONS[activation][0](linear(x, weight, bias, spec))
    torch.testing.assert_close(found, torch.autograd.grad(after, (x, bias), slope))


@pytest.mark.parametrize("spec", [None, INPUTS["token"]], ids=["weight-only", "dynamic"])
def test_second_derivatives_through_an_activation(spec: QuantSpec | None) -> None:
    x, weight, bias = operands(WEIGHTS["int8-rows"])
    x.requires_grad_()

    def second(fused: bool) -> Tensor:
        before = linear(x, weight, bias, spec)
        y = linear(x, weight, bias, spec, activation="gelu") if fused else nn.functional.gelu(before)
        [first] = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(True), second(False))


@pytest.mark.parametrize("weight_spec", OPERATOR_WEIGHTS.values(), ids=OPERATOR_WEIGHTS.keys())
@pytest.mark.parametrize("spec", OPERATOR_INPUTS.values(), ids=OPERATOR_INPUTS.keys())
def test_without_gradients_autograd_is_no_part_of_it(weight_spec: QuantSpec, spec: QuantSpec | None) -> None:
    x, weight, bias = operands(weight_spec)
    bias.requires_grad_()
    expected = linear(x, weight, bias, spec)
    assert expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = linear(x, weight, bias, spec)
            assert torch.equal(y, expected) and not y.requires_grad


def test_a_mixed_dtype_bias_and_autocast() -> None:
    """The result has the dtype of x, whatever the bias and autocast."""
    x, weight, bias = operands(WEIGHTS["int8-rows"])
    for spec in (None, INPUTS["token"]):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected = linear(x.to(dtype), weight, bias.to(dtype), spec)
            with torch.autocast("cpu", torch.bfloat16):
                y = linear(x.to(dtype), weight, bias, spec)
            assert y.dtype == dtype
            atol = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
            torch.testing.assert_close(y, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_autocast_does_not_round_float_products(activation: str) -> None:
    """Many rows go through torch's product of matrices."""
    x, weight, bias = operands(WEIGHTS["int4-groups"], (17,))
    for dtype in (torch.float32, torch.bfloat16):
        expected = linear(x.to(dtype), weight, bias, activation=activation)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(linear(x.to(dtype), weight, bias, activation=activation), expected)


def test_views_are_like_copies() -> None:
    _, weight, bias = operands(WEIGHTS["int4-groups"])
    x = torch.randn(3, COLUMNS, 2).transpose(1, 2)[:, 1:]
    spread = torch.stack([bias, bias], 1)[:, 0]
    for spec in (None, INPUTS["groups"]):
        torch.testing.assert_close(linear(x, weight, spread, spec), linear(x.contiguous(), weight, bias, spec))


@pytest.mark.parametrize("spec", [None, INPUTS["groups"]], ids=["weight-only", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["operator", "plain"])
@pytest.mark.parametrize("shape", [(3, COLUMNS - 1), (COLUMNS + 1,), (3, 64), ()], ids=str)
def test_inputs_of_the_wrong_size_are_refused(
    shape: tuple[int, ...], dtype: torch.dtype, spec: QuantSpec | None
) -> None:
    _, weight, bias = operands(WEIGHTS["int4-groups"])
    with pytest.raises(RuntimeError):
        linear(torch.randn(shape, dtype=dtype), weight, bias, spec)
    if dtype == torch.float32:
        with pytest.raises(RuntimeError, match=rf"fewbit: x must be \[..., {COLUMNS}\]"):
            linear(torch.randn(shape), weight, bias, spec)
        on_meta = QTensor(weight.packed.to("meta"), weight.scale, None, weight.spec, weight.shape)
        with pytest.raises(RuntimeError, match=rf"fewbit: x must be \[..., {COLUMNS}\]"):
            linear(torch.randn(shape, device="meta"), on_meta, bias, spec)


@pytest.mark.parametrize("name", ["linear_dynamic", "linear_weight_only"])
@pytest.mark.parametrize("wrong", ["packed", "scale", "zero_point", "bias"])
def test_operands_of_the_wrong_size_are_refused(name: str, wrong: str) -> None:
    if not native.LOADED:
        pytest.skip("the reference trusts its callers")
    x, weight, bias = operands(WEIGHTS["int4-groups-asymmetric"])
    tensors: dict[str, Tensor | None] = {
        "packed": weight.packed,
        "scale": weight.scale_values,
        "zero_point": weight.zero_point,
        "bias": bias,
    }
    numbers = (COLUMNS, 4, 32, *((32,) if name == "linear_dynamic" else ()))
    operator = getattr(torch.ops.fewbit, name)
    operator(x, *tensors.values(), *numbers)
    tensor = tensors[wrong]
    assert tensor is not None
    tensors[wrong] = tensor[: ROWS - 1] if wrong == "bias" else tensor[:, :1].contiguous()
    with pytest.raises(RuntimeError, match=f"fewbit: {wrong} must be"):
        operator(x, *tensors.values(), *numbers)


@pytest.mark.parametrize("spec", [None, INPUTS["groups"]], ids=["weight-only", "dynamic"])
@pytest.mark.parametrize("weight_spec", [WEIGHTS["int8-groups"], WEIGHTS["int4-groups"]], ids=["int8", "int4"])
def test_layers_without_inputs_or_outputs(weight_spec: QuantSpec, spec: QuantSpec | None) -> None:
    bias = torch.randn(ROWS)
    assert torch.equal(
        linear(torch.randn(3, 0), quantize(torch.randn(ROWS, 0), weight_spec), bias, spec), bias.expand(3, -1)
    )
    empty = quantize(torch.randn(0, COLUMNS), weight_spec)
    assert linear(torch.randn(3, COLUMNS), empty, None, spec).shape == (3, 0)


def test_meta_tensors() -> None:
    _, weight, _ = operands(WEIGHTS["int8-rows"])
    assert isinstance(weight.scale, Tensor)
    weight = QTensor(weight.packed.to("meta"), weight.scale.to("meta"), None, weight.spec, weight.shape)
    for spec in (None, INPUTS["token"]):
        y = linear(torch.empty(2, 3, COLUMNS, device="meta"), weight, None, spec, activation="gelu")
        assert y.device.type == "meta" and y.shape == (2, 3, ROWS)
        with pytest.raises(RuntimeError, match=r"x is on cpu, a weight on meta\. Load the weights"):
            linear(torch.empty(2, 3, COLUMNS), weight, None, spec)


@pytest.mark.parametrize("spec", [None, INPUTS["token"]], ids=["weight-only", "dynamic"])
def test_one_operand_that_is_not_loaded(spec: QuantSpec | None) -> None:
    x, weight, bias = operands(WEIGHTS["int8-rows"])
    assert isinstance(weight.scale, Tensor)
    for scale, offset in ((weight.scale.to("meta"), bias), (weight.scale, bias.to("meta"))):
        with pytest.raises(RuntimeError, match=r"a weight on meta\. Load the weights"):
            linear(x, QTensor(weight.packed, scale, None, weight.spec, weight.shape), offset, spec)
