"""What every entry of fewbit.nn.LAYERS must do, for each scheme that fits it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import PER_TOKEN, QuantSpec, Recipe, Rule, Scheme, per_channel, per_group
from fewbit.nn import LAYERS, QuantizedLayer
from fewbit.transforms.fuse_activation import fuse_activations


def linear_with_gelu() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU())
    fuse_activations(model, [("0", "1", "gelu")])
    return model[0]


def conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(48, 64)
    nn.init.normal_(layer.bias)
    return layer


@dataclass(frozen=True)
class Example:
    """A float layer and inputs for it."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    kind: str  # "linear", "conv", "table" or "recurrent": which schemes fit


EXAMPLES: dict[str, Example] = {
    "torch.nn.modules.linear.Linear": Example(lambda: nn.Linear(64, 48), lambda: (torch.randn(5, 3, 64),), "linear"),
    "transformers.pytorch_utils.Conv1D": Example(conv1d_of_transformers, lambda: (torch.randn(5, 64),), "linear"),
    "fewbit.transforms.fuse_activation.Linear": Example(linear_with_gelu, lambda: (torch.randn(5, 3, 64),), "linear"),
    "torch.nn.modules.conv.Conv1d": Example(
        lambda: nn.Conv1d(8, 12, 5, padding=2), lambda: (torch.randn(2, 8, 20),), "conv"
    ),
    "torch.nn.modules.conv.Conv2d": Example(
        lambda: nn.Conv2d(8, 12, 3, stride=2, groups=2), lambda: (torch.randn(2, 8, 9, 9),), "conv"
    ),
    "torch.nn.modules.conv.Conv3d": Example(
        lambda: nn.Conv3d(4, 6, 3, padding=1), lambda: (torch.randn(2, 4, 5, 5, 5),), "conv"
    ),
    "torch.nn.modules.conv.ConvTranspose1d": Example(
        lambda: nn.ConvTranspose1d(8, 12, 4, stride=2), lambda: (torch.randn(2, 8, 10),), "conv"
    ),
    "torch.nn.modules.conv.ConvTranspose2d": Example(
        lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, groups=2), lambda: (torch.randn(2, 8, 6, 6),), "conv"
    ),
    "torch.nn.modules.conv.ConvTranspose3d": Example(
        lambda: nn.ConvTranspose3d(4, 6, 3), lambda: (torch.randn(2, 4, 4, 4, 4),), "conv"
    ),
    "torch.nn.modules.sparse.Embedding": Example(
        lambda: nn.Embedding(50, 64), lambda: (torch.randint(0, 50, (4, 6)),), "table"
    ),
    "torch.nn.modules.sparse.EmbeddingBag": Example(
        lambda: nn.EmbeddingBag(50, 64), lambda: (torch.randint(0, 50, (4, 6)),), "table"
    ),
    "torch.nn.modules.rnn.LSTM": Example(
        lambda: nn.LSTM(32, 32, num_layers=2), lambda: (torch.randn(5, 3, 32),), "recurrent"
    ),
    "torch.nn.modules.rnn.GRU": Example(
        lambda: nn.GRU(32, 32, bidirectional=True), lambda: (torch.randn(5, 3, 32),), "recurrent"
    ),
}

INT8 = QuantSpec("int8", per_channel(0))
SCHEMES: dict[str, tuple[Scheme, tuple[str, ...]]] = {
    "int8-dynamic": (Scheme(INT8, QuantSpec("int8", PER_TOKEN)), ("linear", "recurrent")),
    "int8-dynamic-per-tensor": (Scheme(INT8, QuantSpec("int8")), ("linear", "conv")),
    "int8-static": (
        Scheme(INT8, QuantSpec("uint8", symmetric=False, observer="minmax"), "mse"),
        ("linear", "conv"),
    ),
    "int8-weight-only": (Scheme(INT8), ("linear", "conv", "table", "recurrent")),
    "int4-dynamic": (
        Scheme(QuantSpec("int4", per_group(32), scale_dtype="bfloat16"), QuantSpec("int8", per_group(32)), "mse"),
        ("linear", "recurrent"),
    ),
    "int4-weight-only": (
        Scheme(QuantSpec("int4", per_group(32), scale_dtype="bfloat16"), method="mse"),
        ("linear", "conv", "table", "recurrent"),
    ),
    "int4-asymmetric": (
        Scheme(QuantSpec("int4", per_group(32), symmetric=False), method="mse"),
        ("linear", "conv", "table", "recurrent"),
    ),
    "int6-dynamic": (
        Scheme(QuantSpec("int6", per_group(32), scale_dtype="bfloat16"), QuantSpec("int8", per_group(32)), "mse"),
        ("linear",),
    ),
    "int4-groups-of-16": (
        Scheme(QuantSpec("int4", per_group(16)), QuantSpec("int8", per_group(16)), "mse"),
        ("linear",),
    ),
    "nf4-weight-only": (
        Scheme(QuantSpec("nf4", per_group(8)), method="mse"),
        ("linear", "conv", "table", "recurrent"),
    ),
    "two-level": (
        Scheme(QuantSpec("int4", per_group(8), scale=QuantSpec("uint8", PER_TOKEN, symmetric=False)), method="mse"),
        ("linear", "conv", "table", "recurrent"),
    ),
}

CASES = [
    pytest.param(entry, scheme, id=f"{entry.rpartition('.')[2]}-{scheme}")
    for entry, example in EXAMPLES.items()
    for scheme, (_, kinds) in SCHEMES.items()
    if example.kind in kinds
]
DIFFERENTIABLE = [case for case in CASES if EXAMPLES[str(case.values[0])].kind != "table"]
EXPORTED = [
    case
    for case in CASES
    if EXAMPLES[str(case.values[0])].kind != "recurrent" and case.values[1] in ("int8-static", "int4-weight-only")
]


def made(entry: str, scheme: str) -> tuple[nn.Module, QuantizedLayer, tuple[Tensor, ...]]:
    """The float layer, its quantized twin and inputs."""
    torch.manual_seed(0)
    layer = EXAMPLES[entry].make().eval()
    inputs = EXAMPLES[entry].inputs()
    recipe = Recipe(scheme, (Rule("*", SCHEMES[scheme][0]),))
    quantized = fewbit.quantize(layer, recipe, [inputs] if recipe.needs_calibration else None)
    assert isinstance(quantized, LAYERS[entry])
    return layer, quantized, inputs


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a layer's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in tensors(part)]


def outputs(layer: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return tensors(layer(*inputs))


def assert_equal(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_every_layer_has_an_example() -> None:
    assert EXAMPLES.keys() == LAYERS.keys()


@pytest.mark.parametrize(("entry", "scheme"), CASES)
def test_output_is_like_the_float_layers_and_near_it(entry: str, scheme: str) -> None:
    layer, quantized, inputs = made(entry, scheme)
    for exact, found in zip(outputs(layer, inputs), outputs(quantized, inputs), strict=True):
        assert found.shape == exact.shape and found.dtype == exact.dtype
        sqnr = 10 * math.log10(float(exact.square().sum() / (found - exact).square().sum()))
        assert sqnr > (30 if scheme.startswith("int8") else 20)


@pytest.mark.parametrize(("entry", "scheme"), CASES)
def test_float_layer_is_untouched(entry: str, scheme: str) -> None:
    torch.manual_seed(0)
    before = EXAMPLES[entry].make().eval()
    layer, quantized, inputs = made(entry, scheme)
    outputs(quantized, inputs)
    assert layer.__dict__.keys() == before.__dict__.keys()
    assert_equal(list(layer.state_dict().values()), list(before.state_dict().values()))


@pytest.mark.parametrize(("entry", "scheme"), CASES)
def test_state_dict_round_trip_is_bit_equal(entry: str, scheme: str) -> None:
    _, quantized, inputs = made(entry, scheme)
    other = copy.deepcopy(quantized)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(quantized.state_dict(), strict=True)
    assert_equal(outputs(other, inputs), outputs(quantized, inputs))


@pytest.mark.parametrize(("entry", "scheme"), CASES)
def test_deepcopy_and_pickle_are_bit_equal_and_independent(entry: str, scheme: str) -> None:
    _, quantized, inputs = made(entry, scheme)
    expected = outputs(quantized, inputs)
    for twin in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert_equal(outputs(twin, inputs), expected)
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert_equal(outputs(quantized, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
@pytest.mark.parametrize(("entry", "scheme"), CASES)
def test_cast_to_half_keeps_codes_and_scales(entry: str, scheme: str, dtype: torch.dtype) -> None:
    _, quantized, inputs = made(entry, scheme)
    before = {name: buffer.clone() for name, buffer in quantized.named_buffers()}
    expected = outputs(quantized, inputs)
    quantized.to(dtype)
    for name, buffer in quantized.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name]), name
    assert all(parameter.dtype == dtype for parameter in quantized.parameters())
    cast = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    for found, exact in zip(outputs(quantized, cast), expected, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("entry", "scheme"), CASES)
def test_weight_only_shares_buffers_and_leaves_the_input_float(entry: str, scheme: str) -> None:
    _, quantized, inputs = made(entry, scheme)
    twin = quantized.weight_only()
    assert type(twin) is type(quantized) and twin.scheme.input is None
    assert twin.scheme.weight == quantized.scheme.weight
    for name, buffer in quantized.named_buffers():
        assert twin.get_buffer(name) is buffer
    if quantized.scheme.input is None:
        assert_equal(outputs(twin, inputs), outputs(quantized, inputs))


@pytest.mark.parametrize(("entry", "scheme"), DIFFERENTIABLE)
def test_results_are_the_same_with_and_without_gradients(entry: str, scheme: str) -> None:
    _, quantized, inputs = made(entry, scheme)
    expected = outputs(quantized, inputs)
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    assert_equal(tensors(quantized(*leaves)), expected)


@pytest.mark.parametrize(("entry", "scheme"), DIFFERENTIABLE)
def test_backward_reaches_the_input(entry: str, scheme: str) -> None:
    layer, quantized, inputs = made(entry, scheme)
    gradients = []
    for each in (layer, quantized):
        leaf = inputs[0].clone().requires_grad_()
        tensors(each(leaf))[0].square().sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    # Straight-through: near the float layer's gradient in direction.
    assert torch.nn.functional.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > 0.95


@pytest.mark.parametrize(("entry", "scheme"), EXPORTED)
def test_exported_layer_gives_equal_results(entry: str, scheme: str) -> None:
    _, quantized, inputs = made(entry, scheme)
    exported = torch.export.export(quantized, inputs).module()
    assert_equal(outputs(exported, inputs), outputs(quantized, inputs))


def student_of(entry: str, scheme: str) -> tuple[nn.Module, tuple[Tensor, ...], Recipe]:
    torch.manual_seed(0)
    layer = EXAMPLES[entry].make().eval()
    inputs = EXAMPLES[entry].inputs()
    recipe = Recipe(scheme, (Rule("*", SCHEMES[scheme][0]),))
    return layer, inputs, recipe


def assert_simulated(entry: str, recipe: Recipe, found: list[Tensor], exact: list[Tensor], atol: float) -> None:
    """To the bit where inputs are rounded; recurrent layers, and products of float inputs, are float sums."""
    [rule] = recipe.rules
    if EXAMPLES[entry].kind in ("linear", "conv") and rule.scheme is not None and rule.scheme.input is not None:
        assert_equal(found, exact)
    else:
        for x, y in zip(found, exact, strict=True):
            torch.testing.assert_close(x, y, atol=atol, rtol=1e-5)


@pytest.mark.parametrize(("entry", "scheme"), CASES)
def test_student_starts_as_the_quantized_layer(entry: str, scheme: str) -> None:
    layer, inputs, recipe = student_of(entry, scheme)
    data = [inputs] if recipe.needs_calibration else None
    student = fewbit.prepare_qat(layer, recipe, data)
    assert student.training and not layer.training
    quantized = fewbit.quantize(layer, recipe, data)
    assert_simulated(entry, recipe, outputs(student.eval(), inputs), outputs(quantized, inputs), 2e-5)
    assert_equal(list(fewbit.convert(student).state_dict().values()), list(quantized.state_dict().values()))


@pytest.mark.parametrize(("entry", "scheme"), CASES)
def test_trained_student_computes_what_it_becomes(entry: str, scheme: str) -> None:
    layer, inputs, recipe = student_of(entry, scheme)
    student = fewbit.prepare_qat(layer, recipe, [inputs] if recipe.needs_calibration else None)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        tensors(student(*inputs))[0].square().sum().backward()
        assert all(parameter.grad is not None for parameter in student.parameters())
        optimizer.step()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    quantized = fewbit.convert(student)
    assert isinstance(quantized, LAYERS[entry])
    assert_simulated(entry, recipe, outputs(student.eval(), inputs), outputs(quantized, inputs), 5e-5)
    assert all(torch.equal(student.state_dict()[name], tensor) for name, tensor in before.items())
    theirs = {tensor.untyped_storage().data_ptr() for tensor in (*student.parameters(), *student.buffers())}
    ours = {tensor.untyped_storage().data_ptr() for tensor in (*quantized.parameters(), *quantized.buffers())}
    assert not theirs & ours


@pytest.mark.parametrize(("entry", "scheme"), CASES)
def test_student_can_be_copied_pickled_and_resumed(entry: str, scheme: str) -> None:
    layer, inputs, recipe = student_of(entry, scheme)
    student = fewbit.prepare_qat(layer, recipe, [inputs] if recipe.needs_calibration else None)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    expected = outputs(student.eval(), inputs)
    resumed = fewbit.prepare_qat(layer, recipe, [inputs] if recipe.needs_calibration else None).eval()
    resumed.load_state_dict(student.state_dict())
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student)), resumed):
        assert_equal(outputs(twin, inputs), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert_equal(outputs(student, inputs), expected)
