"""More bits where they count: the sensitivities against the divergence itself, budgets, formats, errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.batches import calls
from fewbit.methods import METHODS
from fewbit.pipeline import float_twin
from fewbit.qtensor import dequantize
from fewbit.search.mixed_precision import sensitivities


def network(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        model[4].weight.mul_(scale)
    return model.eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 64, generator=generator) for _ in range(8)]


def divergence(model: nn.Module, other: nn.Module) -> float:
    x = torch.cat(batches())
    with torch.no_grad():
        p, q = model(x).log_softmax(1), other(x).log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def test_sensitivity_is_the_divergence_that_rounding_one_layer_makes() -> None:
    model = network(3.0)
    plan = fewbit.make_plan(model, "int4-weight-only")
    runs = [sensitivities(float_twin(model, plan), plan, calls(model, batches()[n : n + 1]), n) for n in range(8)]
    for name, site in plan.sites.items():
        rounded = copy.deepcopy(model)
        weight = rounded.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_(dequantize(METHODS["rtn"].quantize(weight.detach(), site.scheme.weight)))
        mean = sum(run[name] for run in runs) / len(runs)
        assert mean == pytest.approx(divergence(model, rounded), rel=0.35)


def test_budgets_are_kept_and_used_where_it_helps_most() -> None:
    model, data = network(3.0), batches()
    before = [parameter.clone() for parameter in model.parameters()]
    plain = fewbit.make_plan(model, "int4-weight-only")
    whole = plain.nbytes
    losses = []
    for size in (whole + 1400, whole + 3000, 10**6):
        recipe = fewbit.mixed_precision(model, "int4-weight-only", data, size=size)
        plan = fewbit.make_plan(model, recipe)
        assert recipe.name == "int4-weight-only-mixed" and plan.nbytes <= size
        losses.append(divergence(model, fewbit.quantize(model, recipe)))
    assert divergence(model, fewbit.quantize(model, "int4-weight-only")) > losses[0] > losses[1] > losses[2]
    assert {site.scheme.weight.format for site in plan.sites.values()} == {"int8"}
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old) and parameter.grad is None and parameter.requires_grad


def test_bits_are_those_of_a_weight_on_average() -> None:
    model, data = network(), batches()
    recipe = fewbit.mixed_precision(model, "int4-weight-only", data, bits=6.0)
    sites = fewbit.make_plan(model, recipe).sites.values()
    bits = 8 * sum(site.nbytes for site in sites) / sum(site.count for site in sites)
    assert 5.0 < bits <= 6.0
    assert recipe == fewbit.mixed_precision(model, "int4-weight-only", data, bits=6.0)


def test_a_language_model_with_a_tied_table(decoder: Any, tmp_path: Path) -> None:
    model = decoder("llama", tie_word_embeddings=True)
    windows = [
        {"input_ids": torch.randint(3, 192, (2, 16), generator=torch.Generator().manual_seed(n))} for n in (0, 1)
    ]
    size = fewbit.make_plan(model, "int4-weight-only").nbytes
    recipe = fewbit.mixed_precision(model, "int4-weight-only", windows, size=round(1.1 * size))
    quantized = fewbit.quantize(model, recipe, windows)
    assert fewbit.plan_of(quantized).nbytes <= 1.1 * size
    formats = {name: site.scheme.weight.format for name, site in fewbit.plan_of(quantized).sites.items()}
    assert formats["model.embed_tokens"] == formats["lm_head"] and len(set(formats.values())) > 1
    fewbit.save(quantized, tmp_path)
    with torch.no_grad():
        assert torch.equal(fewbit.load(tmp_path)(**windows[0]).logits, quantized(**windows[0]).logits)


def test_recurrent_and_static_recipes() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(64, 64, batch_first=True).eval()
    recipe = fewbit.mixed_precision(lstm, "int4-dynamic", [torch.randn(2, 5, 64)], bits=8.6, finer=("int8",))
    assert fewbit.make_plan(lstm, recipe).sites[""].scheme.weight.format == "int8"
    images = [torch.randn(4, 3, 8, 8)]
    cnn = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten()).eval()
    recipe = fewbit.mixed_precision(cnn, "int4-static", images, bits=9.0)
    quantized = fewbit.quantize(cnn, recipe, images)
    assert fewbit.plan_of(quantized).sites["3"].scheme.weight.format == "int8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give bits or size, one of them"),
        ({"bits": 5.0, "size": 10}, "give bits or size, one of them"),
        ({"bits": 3.0}, r"int4-weight-only takes 5\.125 bits a weight, found bits = 3"),
        ({"size": "2KB"}, r"int4-weight-only takes 0\.01 MB, found size = 2KB"),
        ({"bits": 5.0, "finer": ("int9",)}, "unknown format 'int9'"),
    ],
)
def test_bad_budgets(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fewbit.PlanError, match=message):
        fewbit.mixed_precision(network(), "int4-weight-only", batches(), **options)


def test_bad_data() -> None:
    with pytest.raises(fewbit.CalibrationError, match="found no batch"):
        fewbit.mixed_precision(network(), "int4-weight-only", [], bits=6.0)
    with pytest.raises(fewbit.CalibrationError, match="example 0: Sequential raised"):
        fewbit.mixed_precision(network(), "int4-weight-only", [torch.randn(2, 7)], bits=6.0)
