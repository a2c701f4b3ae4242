"""Ranges that the error of a layer's output chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import QuantSpec, Recipe, Rule, Scheme, per_channel
from fewbit.batches import Call
from fewbit.calibration import calibrate
from fewbit.observers import OBSERVERS
from fewbit.qtensor import fake_quantize
from fewbit.ranges import input_grids

INPUT = QuantSpec("uint8", symmetric=False, observer="output")
RECIPE = Recipe("output", (Rule("*", Scheme(QuantSpec("int8", per_channel(0)), INPUT), optional=True),))


def with_outlier(important: bool) -> tuple[nn.Module, list[Call]]:
    """Inputs with one far channel, which the layer reads or does not."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    x = torch.randn(64, 16)
    x[:, 0] = 60.0 * torch.rand(64)
    with torch.no_grad():
        layer.weight[:, 0] = 10.0 if important else 0.0
    return nn.Sequential(layer).eval(), [Call((part,), {}) for part in x.split(16)]


@pytest.mark.parametrize("important", [True, False])
def test_the_layer_decides_what_may_be_clipped(important: bool) -> None:
    model, batches = with_outlier(important)
    plan = fewbit.make_plan(model, RECIPE)
    statistics = calibrate(model, plan, batches)
    grids = input_grids(model, plan, statistics, (), batches)
    grid: Any = grids["0"]
    state = statistics["0"]["input"]
    candidates = OBSERVERS["output"].candidates(state, INPUT)
    assert len(candidates) == 4
    x = torch.cat([call.args[0] for call in batches])[:32]

    def error(low: Tensor, high: Tensor) -> float:
        scale, zero_point = fewbit.qtensor.qparams(low.reshape(1), high.reshape(1), INPUT)
        assert isinstance(scale, Tensor)
        with torch.no_grad():
            y = model(fake_quantize(x, INPUT, scale, zero_point))
            return float((y - model(x)).square().sum())

    best = min(range(4), key=lambda index: error(*candidates[index]))
    scale, _ = fewbit.qtensor.qparams(*(end.reshape(1) for end in candidates[best]), INPUT)
    assert torch.equal(grid[0], scale)


def test_readers_of_one_value_share_a_grid() -> None:
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)
            with torch.no_grad():
                self.a.weight[:, 0], self.b.weight[:, 0] = 10.0, 0.0

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    _, batches = with_outlier(True)
    model = Two().eval()
    plan = fewbit.make_plan(model, RECIPE)
    statistics = calibrate(model, plan, batches)
    alone = input_grids(model, plan, statistics, (), batches)
    shared = input_grids(model, plan, statistics, [["a", "b"]], batches)
    assert alone["a"] is not None and alone["b"] is not None and shared["a"] is not None and shared["b"] is not None
    assert torch.equal(shared["a"][0], shared["b"][0])
    assert any(torch.equal(shared["a"][0], grid[0]) for grid in (alone["a"], alone["b"]))


def test_other_observers_need_no_examples(mlp: nn.Module, vectors: list[Tensor]) -> None:
    spec = replace(INPUT, observer="minmax")
    recipe = Recipe("minmax", (Rule("*", Scheme(QuantSpec("int8", per_channel(0)), spec), optional=True),))
    plan = fewbit.make_plan(mlp, recipe)
    statistics = calibrate(mlp, plan, [Call((x,), {}) for x in vectors])
    assert all(grid is not None for grid in input_grids(mlp, plan, statistics, (), ()).values())


def test_preset_with_it(cnn: nn.Module, images: list[Tensor], static: Recipe) -> None:
    rules = tuple(
        replace(rule, scheme=replace(rule.scheme, input=INPUT)) if rule.scheme and rule.scheme.input else rule
        for rule in static.rules[:1]
    )
    quantized = fewbit.quantize(cnn, replace(static, rules=rules), images)
    with torch.no_grad():
        error = (quantized(images[0]) - cnn(images[0])).norm() / cnn(images[0]).norm()
    assert float(error) < 0.1
