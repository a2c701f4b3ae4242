"""From quantized models to graphs: which layers engines take, as which float layers they are exported, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import PER_TENSOR, PER_TOKEN, QuantSpec, Recipe, Rule, Scheme, UnsupportedError, per_channel, per_group
from fewbit.batches import Call
from fewbit.graph.explicit import DEQUANTIZE_CHANNELS
from fewbit.lowering import explicit_graph, is_integer
from fewbit.nn import QuantizedLayer
from fewbit.targets.target import relative_difference

WEIGHT = QuantSpec("int8", per_channel(0))
INPUT = QuantSpec("uint8", symmetric=False, observer="minmax")
GOOD = Scheme(WEIGHT, INPUT)


def quantized(module: nn.Module, scheme: Scheme, x: Tensor) -> nn.Module:
    return fewbit.quantize(module.eval(), Recipe("test", (Rule("*", scheme),)), [x])


def is_lowered(module: nn.Module, scheme: Scheme, x: Tensor) -> bool:
    layer = quantized(module, scheme, x)
    assert isinstance(layer, QuantizedLayer)
    return is_integer(layer)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (GOOD, True),
        (replace(GOOD, method="pair_safe"), True),
        (Scheme(WEIGHT), False),
        (Scheme(WEIGHT, QuantSpec("int8", PER_TOKEN)), False),
        (Scheme(WEIGHT, QuantSpec("uint8", symmetric=False)), False),
        (Scheme(WEIGHT, QuantSpec("int8", observer="minmax")), False),
        (Scheme(QuantSpec("int8", PER_TENSOR), INPUT), False),
        (Scheme(QuantSpec("int8", per_group(8)), INPUT), False),
        (Scheme(QuantSpec("uint8", per_channel(0), symmetric=False), INPUT), False),
        (Scheme(QuantSpec("int8", per_channel(0), symmetric=False), INPUT), False),
        (Scheme(QuantSpec("int4", per_channel(0)), INPUT), True),
        (Scheme(QuantSpec("int8", per_channel(0), scale=QuantSpec("int8", per_channel(0))), INPUT), False),
    ],
    ids=str,
)
def test_schemes_that_engines_compute(scheme: Scheme, expected: bool) -> None:
    torch.manual_seed(0)
    assert is_lowered(nn.Linear(16, 8), scheme, torch.randn(4, 16)) is expected


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (lambda: nn.Conv2d(4, 8, 3, groups=2, padding="same"), (2, 4, 6, 6), True),
        (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6), True),
        (lambda: nn.Conv1d(4, 8, 3), (2, 4, 6), False),
        (lambda: nn.Conv3d(4, 8, 3), (2, 4, 6, 6, 6), False),
        (lambda: nn.ConvTranspose2d(4, 8, 3), (2, 4, 6, 6), False),
    ],
)
def test_layers_that_engines_compute(make: Any, shape: tuple[int, ...], expected: bool) -> None:
    torch.manual_seed(0)
    assert is_lowered(make(), GOOD, torch.randn(shape)) is expected


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        {"groups": 2},
        {"groups": 6, "padding": 1},
        {"padding": "same"},
        {"padding": "same", "dilation": 2, "padding_mode": "circular"},
        {"padding": "valid"},
        {"padding": (1, 2), "padding_mode": "reflect"},
        {"padding": 2, "padding_mode": "replicate"},
        {"kernel_size": (2, 4), "padding": "same"},
    ],
    ids=str,
)
def test_a_lone_convolution_is_exactly_the_quantized_one(settings: dict[str, Any], bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 9, 8)
    layer = quantized(nn.Conv2d(6, 12, **{"kernel_size": 3, **settings}, bias=bias), GOOD, x)
    lowered = fewbit.lower(layer, x)
    step = float((layer.qtensor().scale_values * layer.input_scale).max())  # type: ignore[operator]
    with torch.no_grad():  # the bias is rounded to steps of the sums
        torch.testing.assert_close(lowered(x), layer(x), atol=0.51 * step + 1e-5 if bias else 1e-5, rtol=1e-5)


def test_layers_without_a_static_input_run_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8), nn.Linear(8, 4)).eval()
    rules = (Rule("0", GOOD), Rule("1", Scheme(WEIGHT, QuantSpec("int8", PER_TOKEN))), Rule("2", Scheme(WEIGHT)))
    x = torch.randn(5, 16)
    model = fewbit.quantize(model, Recipe("mixed", rules), [x])
    module, any_batch = explicit_graph(model, Call((x,), {}))
    assert any_batch and sum(node.target is DEQUANTIZE_CHANNELS for node in module.graph.nodes) == 2
    lowered = fewbit.lower(model, x[:2])
    with torch.no_grad():
        assert relative_difference(lowered(x), model(x)) < 0.005


def test_a_layer_of_two_names() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, padding=1)
    x = torch.randn(2, 4, 6, 6)
    model = quantized(nn.Sequential(layer, nn.ReLU(), layer), GOOD, x)
    lowered = fewbit.lower(model, x)
    assert not [operator.kind for operator in lowered.operators if not operator.is_int8]
    with torch.no_grad():
        assert relative_difference(lowered(x), model(x)) < 0.01


def test_tied_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    x = torch.randn(2, 4, 6, 6)
    model = quantized(model, GOOD, x)
    with torch.no_grad():
        assert relative_difference(fewbit.lower(model, x)(x), model(x)) < 0.01


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int4-weight-only"])
def test_nothing_to_run_in_integers(recipe: str, mlp: nn.Module, vectors: list[Tensor]) -> None:
    model = fewbit.quantize(mlp, recipe)
    with pytest.raises(UnsupportedError, match=f"recipe '{recipe}' left no layer .* quantize with 'int8-static'"):
        fewbit.lower(model, vectors[0])


def test_images_without_batch_are_refused() -> None:
    x = torch.randn(3, 8, 8)
    with pytest.raises(UnsupportedError, match=r"batches of images and vectors, found 0: float32 \[3, 8, 8\]"):
        fewbit.lower(quantized(nn.Conv2d(3, 4, 3), GOOD, x), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, dtype=dtype)
    model = quantized(nn.Sequential(nn.Linear(6, 3)).to(dtype), GOOD, x)
    with pytest.raises(UnsupportedError, match=f"this Sequential is {dtype}: quantize model.float"):
        fewbit.lower(model, x)


def test_the_model_may_be_in_training_mode(cnn: nn.Module, images: list[Tensor], static: Recipe) -> None:
    model = fewbit.quantize(cnn, static, images)
    with torch.no_grad():
        expected = fewbit.lower(model, images[0])(images[0])
        assert torch.equal(fewbit.lower(model.train(), images[0])(images[0]), expected)
    assert model.training
