"""Affine correction: what quantization shifts and shrinks on average is given back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import QuantSpec, Recipe, Rule, Scheme, per_channel
from fewbit.batches import Call
from fewbit.calibration import Grid
from fewbit.correction import CHANGE, EXAMPLES, correct
from fewbit.plan import Plan
from fewbit.qtensor import QTensor, dequantize, qparams, quantize
from fewbit.targets.target import relative_difference

WEIGHT = QuantSpec("int8", per_channel(0))
INPUT = QuantSpec("uint8", symmetric=False, observer="minmax")
PRESET = replace(fewbit.load_recipe("int8-static"), sensitive=None)
STATIC = Recipe("static", (Rule("*", Scheme(WEIGHT, INPUT, "mse"), optional=True),), correction="affine")


def prepared(model: nn.Module) -> tuple[Plan, dict[str, dict[str, QTensor]], dict[str, Grid | None]]:
    """A plan for every layer, weights rounded to nearest, and input grids of [-4, 4]."""
    plan = fewbit.make_plan(model, STATIC)
    grid: Any = qparams(torch.tensor([-4.0]), torch.tensor([4.0]), INPUT)
    sites: dict[str, Any] = {name: model.get_submodule(name) for name in plan.sites}
    return (
        plan,
        {n: {"weight": quantize(m.weight.flatten(1), WEIGHT)} for n, m in sites.items()},
        dict.fromkeys(sites, grid),
    )


def spoiled(weight: QTensor, factors: Tensor) -> QTensor:
    return replace(weight, scale=weight.scale * factors.reshape(-1, 1))


def batches(*shape: int) -> list[Call]:
    generator = torch.Generator().manual_seed(1)
    return [Call((torch.randn(50, *shape, generator=generator).clamp(-4, 4),), {}) for _ in range(4)]


@pytest.mark.parametrize("kind", ["linear", "conv", "conv-groups"])
def test_a_known_gain_and_offset_are_recovered(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = {
        "linear": lambda: nn.Sequential(nn.Linear(16, 6)),
        "conv": lambda: nn.Sequential(nn.Conv2d(4, 6, 3)),
        "conv-groups": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)),
    }[kind]()
    plan, weights, grids = prepared(model)
    gain = torch.tensor([1.0, 0.95, 1.05, 0.92, 1.08, 0.5])
    weights["0"]["weight"] = spoiled(weights["0"]["weight"], gain)
    data = batches(*((16,) if kind == "linear" else (4, 6, 6)))
    found, biases = correct(model, plan, weights, grids, data, "affine")
    factors = (dequantize(found["0"]["weight"]) / dequantize(weights["0"]["weight"])).nanmean(1)
    torch.testing.assert_close(factors, (1 / gain).clamp(1 - CHANGE, 1 + CHANGE), atol=0.01, rtol=0)
    torch.testing.assert_close(biases["0"][:5], model[0].bias.detach()[:5], atol=0.02, rtol=0)
    assert torch.equal(found["0"]["weight"].codes, weights["0"]["weight"].codes)


def test_an_offset_becomes_the_biass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 6))
    plan, weights, grids = prepared(model)
    grids["0"] = qparams(torch.tensor([0.0]), torch.tensor([4.0]), INPUT)  # type: ignore[assignment]
    data = batches(16)
    found, biases = correct(model, plan, weights, grids, data, "bias")
    x = torch.cat([call.args[0] for call in data])
    with torch.no_grad():
        seen = ((x / grids["0"][0]).round().clamp(0, 255) * grids["0"][0]) @ dequantize(weights["0"]["weight"]).T  # type: ignore[index]
        expected = (model(x) - seen).mean(0)
    torch.testing.assert_close(biases["0"], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found["0"]["weight"].scale_values, weights["0"]["weight"].scale_values)


def test_later_layers_are_fitted_to_what_the_earlier_ones_now_give() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    plan, weights, grids = prepared(model)
    weights["0"]["weight"] = spoiled(weights["0"]["weight"], torch.full((16,), 0.95))
    found, _ = correct(model, plan, weights, grids, batches(16), "affine")
    factors = [found[n]["weight"].scale_values / weights[n]["weight"].scale_values for n in ("0", "2")]
    assert bool(((factors[0] - 1 / 0.95).abs() < 0.01).all()) and bool(((factors[1] - 1).abs() < 0.01).all())


def recipe(correction: str | None) -> Recipe:
    return replace(PRESET, name=str(correction), correction=correction)


def test_affine_is_better_than_none_on_a_real_model(fashion: fewbit.Task) -> None:
    data = fashion.calibration[0].split(50)
    held_out = fashion.calibration[1]
    errors = {}
    with torch.no_grad():
        expected = fashion.model(held_out)
        for correction in (None, "affine"):
            model = fewbit.quantize(fashion.model, recipe(correction), data)
            errors[correction] = relative_difference(model(held_out), expected)
    assert errors["affine"] < 0.95 * errors[None]


def scales_and_biases(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    state = model.state_dict()
    return [v for n, v in state.items() if n.endswith("weight_scale")], [
        v for n, v in state.items() if n.endswith("bias")
    ]


def test_bias_keeps_scales_and_affine_changes_them(cnn: nn.Module, images: list[Tensor]) -> None:
    none, bias, affine = (scales_and_biases(fewbit.quantize(cnn, recipe(c), images)) for c in (None, "bias", "affine"))
    assert all(map(torch.equal, none[0], bias[0])) and not any(map(torch.equal, none[0], affine[0]))
    assert not all(map(torch.equal, none[1], bias[1]))
    for before, after in zip(none[0], affine[0], strict=True):
        assert bool(((after / before - 1).abs() <= CHANGE + 1e-6).all())


@pytest.mark.parametrize("correction", ["bias", "affine"])
def test_the_users_model_is_unchanged(correction: str, cnn: nn.Module, images: list[Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in cnn.state_dict().items()}
    ids = {name: id(parameter) for name, parameter in cnn.named_parameters()}
    cnn.train()
    fewbit.quantize(cnn, recipe(correction), images)
    assert {name: id(parameter) for name, parameter in cnn.named_parameters()} == ids
    assert all(torch.equal(tensor, before[name]) for name, tensor in cnn.state_dict().items())
    assert cnn.training and not any(m._forward_hooks or m._forward_pre_hooks for m in cnn.modules())


def test_an_iterator_gives_what_a_list_gives(cnn: nn.Module, images: list[Tensor]) -> None:
    def once() -> Iterator[Tensor]:
        yield from images

    first, second = fewbit.quantize(cnn, PRESET, images).state_dict(), fewbit.quantize(cnn, PRESET, once()).state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_how_the_data_are_batched_hardly_matters(cnn: nn.Module, images: list[Tensor]) -> None:
    rows = torch.cat(images)
    outputs = []
    with torch.no_grad():
        for data in ([rows], [*rows.split(1)], [*rows.split(5)]):
            outputs.append(fewbit.quantize(cnn, PRESET, data)(rows))
    assert all(relative_difference(other, outputs[0]) < 0.01 for other in outputs[1:])


def test_layers_without_bias_and_tied_layers_are_left_alone() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
    ).eval()
    model[4].weight = model[2].weight
    data = [torch.randn(8, 4, 6, 6)]
    none, affine = (fewbit.quantize(model, recipe(c), data).state_dict() for c in (None, "affine"))
    changed = {name for name in none if not torch.equal(none[name], affine[name])}
    assert changed == {"5.weight_scale", "5.bias"}


def test_what_writes_to_a_layers_result_does_not_spoil_it() -> None:
    models = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 8, 3), nn.Hardswish(inplace), nn.Conv2d(8, 2, 1)
        models.append(nn.Sequential(*layers).eval())
    data = [torch.randn(8, 3, 9, 9)]
    first, second = (fewbit.quantize(model, PRESET, data).state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_first_examples_only(net: Any) -> None:
    seen: list[int] = []

    def counting(m: Any, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            seen.append(len(x))
        return m.a(x)

    torch.manual_seed(0)
    model = net(counting, a=nn.Linear(4, 4)).eval()
    data = [torch.randn(128, 4) for _ in range(20)]
    plan, weights, grids = prepared(model)
    correct(model, plan, weights, grids, [Call((x,), {}) for x in data], "affine")
    assert sum(seen) == 1 + 2 * EXAMPLES


def test_chunks_when_results_are_large(monkeypatch: pytest.MonkeyPatch, cnn: nn.Module, images: list[Tensor]) -> None:
    whole = fewbit.quantize(cnn, PRESET, [torch.cat(images)])
    monkeypatch.setattr("fewbit.correction.CHUNK_BYTES", 1)
    parts = fewbit.quantize(cnn, PRESET, [torch.cat(images)])
    with torch.no_grad():
        assert relative_difference(parts(images[0]), whole(images[0])) < 0.02


@pytest.mark.parametrize("shape", [(16,), (7, 16)], ids=str)
def test_inputs_without_a_batch_axis(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(*shape)
    with torch.no_grad():
        assert relative_difference(fewbit.quantize(model, PRESET, [x])(x), model(x)) < 0.05
    image = torch.randn(3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        assert relative_difference(fewbit.quantize(model, PRESET, [image])(image), model(image)) < 0.05


class Routed(nn.Module):
    """Each row goes to one of two layers, as its first number says; at times a layer gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            result[chosen == number] = expert(x[chosen == number])
        return result


def test_rows_that_take_another_way_when_quantized() -> None:
    torch.manual_seed(0)
    model = Routed().eval()
    with torch.no_grad():
        model.gate.weight *= 1e-3  # close decisions
    data = [torch.randn(64, 8), torch.randn(1, 8), torch.randn(2, 8)]
    quantized = fewbit.quantize(model, STATIC, data)
    assert all(
        bool(tensor.isfinite().all()) for tensor in quantized.state_dict().values() if tensor.is_floating_point()
    )


def test_a_model_is_as_it_was_for_a_second_quantize(cnn: nn.Module, images: list[Tensor]) -> None:
    twin = copy.deepcopy(cnn)
    first = fewbit.quantize(cnn, PRESET, images).state_dict()
    again, other = (fewbit.quantize(model, PRESET, images).state_dict() for model in (cnn, twin))
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], other[name]) for name in first)
