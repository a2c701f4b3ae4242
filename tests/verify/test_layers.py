"""layer_errors: each layer on the float model's own inputs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import PER_TOKEN, QuantSpec, Recipe, Rule, Scheme, per_channel, per_group
from fewbit.batches import Call
from fewbit.verify import layer_errors

WEIGHT = QuantSpec("int8", per_channel(0))
STATIC = QuantSpec("uint8", symmetric=False, observer="minmax")


def as_calls(batches: list[Tensor]) -> list[Call]:
    return [Call((batch,), {}) for batch in batches]


def test_one_entry_a_site_worst_first(cnn: nn.Module, images: list[Tensor]) -> None:
    recipe = replace(fewbit.load_recipe("int8-static"), sensitive=None)
    quantized = fewbit.quantize(cnn, recipe, images)
    errors = layer_errors(cnn, quantized, as_calls(images))
    assert {error.name for error in errors} == set(fewbit.plan_of(quantized).sites)
    assert [error.sqnr for error in errors] == sorted(error.sqnr for error in errors)
    assert {error.type for error in errors} == {"Conv2d", "Linear"}


def test_parts_lose_less_than_the_whole(cnn: nn.Module, images: list[Tensor]) -> None:
    quantized = fewbit.quantize(cnn, "int8-static", images)
    for error in layer_errors(cnn, quantized, as_calls(images)):
        assert error.input_only is not None
        assert 25 < error.sqnr <= min(error.weight_only, error.input_only) + 0.5
        # Independent errors add up.
        noise = 10 ** (-error.weight_only / 10) + 10 ** (-error.input_only / 10)
        assert error.sqnr == pytest.approx(-10 * math.log10(noise), abs=1.5)


def test_against_direct_computation() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(32, 16)
    quantized = fewbit.quantize(model, Recipe("test", (Rule("*", Scheme(WEIGHT, STATIC)),)), [x])
    [error] = layer_errors(model, quantized, as_calls([x]))
    with torch.no_grad():
        exact, found = model(x).double(), quantized(x).double()
    expected = 10 * math.log10(float(exact.square().sum() / (found - exact).square().sum()))
    assert error.name == "0" and error.sqnr == pytest.approx(expected)


def test_errors_of_earlier_layers_do_not_reach_later_ones() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval(), torch.randn(32, 32)
    bad = Scheme(QuantSpec("int4", per_channel(0)))
    alone = fewbit.quantize(model, Recipe("test", (Rule("1", Scheme(WEIGHT)), Rule("*", None))))
    both = fewbit.quantize(model, Recipe("test", (Rule("1", Scheme(WEIGHT)), Rule("*", bad))))
    expected = {error.name: error.sqnr for error in layer_errors(model, alone, as_calls([x]))}
    found = {error.name: error.sqnr for error in layer_errors(model, both, as_calls([x]))}
    assert found["1"] == expected["1"] and found["0"] < found["1"]


def test_weights_on_the_grid_lose_nothing() -> None:
    torch.manual_seed(0)
    # Integers, whose sums do not depend on the order in which a kernel adds.
    model, x = nn.Sequential(nn.Linear(8, 4, bias=False)).eval(), torch.randint(-9, 10, (5, 8)).float()
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(-127, 128, (4, 8)).float())
        model[0].weight[:, 0] = 127
    quantized = fewbit.quantize(model, Recipe("test", (Rule("*", Scheme(WEIGHT)),)))
    [error] = layer_errors(model, quantized, as_calls([x]))
    assert (error.sqnr, error.weight_only, error.input_only) == (math.inf, math.inf, None)


def test_recurrent_layers_have_no_input_figure(tagger: nn.Module, tokens: list[Tensor]) -> None:
    quantized = fewbit.quantize(tagger, "int8-dynamic")
    found = {error.name: error for error in layer_errors(tagger, quantized, as_calls(tokens))}
    assert set(found) == {"embedding", "lstm", "head"}
    assert found["lstm"].input_only is None and found["embedding"].input_only is None
    assert found["lstm"].sqnr > 30 and found["head"].input_only is not None
    assert found["lstm"].sqnr < found["lstm"].weight_only + 0.5


def test_attention_is_compared_by_its_projections(encoder: nn.Module, tokens: list[Tensor]) -> None:
    quantized = fewbit.quantize(encoder, "int4-weight-only")
    errors = layer_errors(encoder, quantized, as_calls(tokens[:1]))
    assert "encoder.layers.0.self_attn.q_proj" in {error.name for error in errors}
    table = errors.pop([error.name for error in errors].index("embedding"))  # 6 bits
    assert 28 < table.sqnr < 35
    assert all(15 < error.sqnr < 30 and error.input_only is None for error in errors)


def test_sites_that_no_batch_reaches_have_no_entry() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Unused().eval()
    scheme = Scheme(QuantSpec("int4", per_group(8)), QuantSpec("int8", PER_TOKEN))
    quantized = fewbit.quantize(model, Recipe("test", (Rule("*", scheme),)))
    assert [error.name for error in layer_errors(model, quantized, as_calls([torch.randn(2, 8)]))] == ["used"]


def test_models_are_left_without_hooks(cnn: nn.Module, images: list[Tensor]) -> None:
    quantized = fewbit.quantize(cnn, "int8-static", images)
    layer_errors(cnn, quantized, as_calls(images))
    for model in (cnn, quantized):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
