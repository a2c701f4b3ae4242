"""Which of the first and the last layer stay float: measured on the outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import PlanError, Recipe

PRESET = fewbit.load_recipe("int8-static")


def narrow_first(spread: float) -> tuple[nn.Module, list[Tensor]]:
    """A small first layer that reads small and (``spread`` times) large numbers, of which only the small ones matter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96)).eval()
    with torch.no_grad():
        model[0].weight[:, 0] = 0.0
    x = torch.randn(4, 64, 4)
    x[..., 0] *= spread
    return model, list(x)


def test_a_sensitive_first_layer_stays_float() -> None:
    model, batches = narrow_first(spread=500.0)
    quantized = fewbit.quantize(model, PRESET, batches)
    plan = fewbit.plan_of(quantized)
    assert list(plan.sites) == ["2", "4"] and plan.skipped["0"].startswith("sensitive: in 8 bits it makes ")
    assert type(quantized[0]) is nn.Linear
    with torch.no_grad():
        kept = (quantized(batches[0]) - model(batches[0])).norm()
        everything = fewbit.quantize(model, replace(PRESET, sensitive=None), batches)
        assert float(kept) < 0.5 * float((everything(batches[0]) - model(batches[0])).norm())


def test_what_costs_little_is_quantized() -> None:
    model, batches = narrow_first(spread=1.0)
    recipe = replace(PRESET, sensitive=0.9)
    assert list(fewbit.plan_of(fewbit.quantize(model, recipe, batches)).sites) == ["0", "2", "4"]


def test_large_layers_are_quantized_whatever_they_cost() -> None:
    model, batches = narrow_first(spread=500.0)
    wide = nn.Sequential(nn.Linear(4, 96), nn.ReLU(), nn.Linear(96, 8)).eval()
    wide[0].load_state_dict(model[0].state_dict())
    assert list(fewbit.plan_of(fewbit.quantize(wide, PRESET, batches)).sites) == ["0", "2"]


def test_without_correction_too() -> None:
    model, batches = narrow_first(spread=500.0)
    recipe = replace(PRESET, correction=None)
    assert "0" in fewbit.plan_of(fewbit.quantize(model, recipe, batches)).skipped


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(PlanError, match="sensitive must be a share between 0 and 1"):
        Recipe("r", PRESET.rules, sensitive=share)


def test_json() -> None:
    recipe = Recipe("r", PRESET.rules, sensitive=0.5)
    assert Recipe.from_json(recipe.to_json(), "r") == recipe
    with pytest.raises(PlanError, match=r"r\.sensitive"):
        Recipe.from_json({**recipe.to_json(), "sensitive": "much"}, "r")
