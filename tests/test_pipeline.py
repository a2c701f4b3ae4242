"""quantize: a copy, made the same way each time, that leaves the float model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import fewbit
from fewbit import PER_TOKEN, CalibrationError, FewbitError, PlanError, QuantSpec, Recipe, Rule, Scheme, per_channel
from fewbit.nn import QuantizedLayer
from fewbit.pipeline import float_twin, sites_of, skeleton
from fewbit.qtensor import dequantize
from fewbit.qtensor import quantize as quantize_tensor

WEIGHT = QuantSpec("int8", per_channel(0))
INT8 = Scheme(WEIGHT)
ALL = Recipe("all", (Rule("*", INT8),))
STATIC = Recipe("static", (Rule("*", Scheme(WEIGHT, QuantSpec("uint8", symmetric=False, observer="minmax"), "mse")),))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that must not change."""
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "types": {name: type(module) for name, module in model.named_modules()},
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._state_dict_hooks))
            for name, m in model.named_modules()
        },
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    tensors, found = before.pop("tensors"), after.pop("tensors")
    assert after == before
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def equal(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(params=["cnn-static", "tagger-dynamic", "encoder-int4", "encoder-static"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, str, list[Tensor]]:
    name, recipe = request.param.split("-")
    data = request.getfixturevalue("images" if name == "cnn" else "tokens")
    recipes = {"static": "int8-static", "dynamic": "int8-dynamic", "int4": "int4-weight-only"}
    return request.getfixturevalue(name), recipes[recipe], data


def test_float_model_is_unchanged(case: tuple[nn.Module, str, list[Tensor]]) -> None:
    model, recipe, data = case
    model.train()
    next(model.children()).eval()  # modes may be mixed
    next(iter(model.parameters())).requires_grad_(False)
    before = snapshot(model)
    fewbit.quantize(model, recipe, data)
    assert_unchanged(model, before)


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-static", "int4-weight-only"])
def test_result_is_in_eval_mode(encoder: nn.Module, tokens: list[Tensor], recipe: str) -> None:
    quantized = fewbit.quantize(encoder.train(), recipe, tokens)
    assert not any(module.training for module in quantized.modules())


@pytest.mark.parametrize("failing", ["bad-batch", "raising-generator", "nan-weight", "nan-batch"])
def test_float_model_is_unchanged_when_quantize_raises(cnn: nn.Module, images: list[Tensor], failing: str) -> None:
    def broken() -> Any:
        yield images[0]
        raise ZeroDivisionError

    data: Any = {
        "bad-batch": [*images, torch.randn(1, 7, 8, 8)],
        "raising-generator": broken(),
        "nan-weight": images,
        "nan-batch": [*images, images[0] * torch.nan],
    }[failing]
    if failing == "nan-weight":
        with torch.no_grad():
            cnn.get_parameter("head.weight")[0, 0] = torch.inf
    cnn.train()
    before = snapshot(cnn)
    with pytest.raises((FewbitError, ZeroDivisionError)):
        fewbit.quantize(cnn, "int8-static", data)
    assert_unchanged(cnn, before)


def test_result_shares_no_storage_with_the_float_model(case: tuple[nn.Module, str, list[Tensor]]) -> None:
    model, recipe, data = case
    quantized = fewbit.quantize(model, recipe, data)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    ours = {tensor.untyped_storage().data_ptr() for tensor in (*quantized.parameters(), *quantized.buffers())}
    assert not (theirs & ours)


def test_result_does_not_change_with_the_float_model(case: tuple[nn.Module, str, list[Tensor]]) -> None:
    model, recipe, data = case
    quantized = fewbit.quantize(model, recipe, data)
    with torch.no_grad():
        expected = quantized(data[0])
        for tensor in model.state_dict().values():
            tensor.zero_()
        assert torch.equal(quantized(data[0]), expected)


def test_quantize_is_deterministic_whatever_the_seed(case: tuple[nn.Module, str, list[Tensor]]) -> None:
    model, recipe, data = case
    torch.manual_seed(1)
    first = fewbit.quantize(model, recipe, data)
    torch.manual_seed(2)
    second = fewbit.quantize(model, recipe, iter(data))
    assert equal(first, second) and fewbit.plan_of(first) == fewbit.plan_of(second)
    with torch.no_grad():
        assert torch.equal(first(data[0]), second(data[0]))


def test_quantize_leaves_the_random_state_alone(cnn: nn.Module, images: list[Tensor]) -> None:
    state = torch.get_rng_state()
    fewbit.quantize(cnn, "int8-static", images)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["conv", "encoder"])
def test_result_is_near_float(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue("cnn" if kind == "conv" else "encoder")
    data = request.getfixturevalue("images" if kind == "conv" else "tokens")
    quantized = fewbit.quantize(model, "int8-static" if kind == "conv" else "int8-dynamic", data)
    with torch.no_grad():
        exact, found = model(data[0]), quantized(data[0])
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.05


def forms(images: list[Tensor]) -> dict[str, Callable[[], Any]]:
    data = torch.cat(images)
    labels = torch.arange(len(data))
    return {
        "tuples": lambda: [(x,) for x in images],
        "dicts": lambda: [{"x": x} for x in images],
        "dicts-with-labels": lambda: [{"x": x, "labels": labels} for x in images],
        "generator": lambda: (x for x in images),
        "loader": lambda: DataLoader(TensorDataset(data), batch_size=4),
        "loader-with-labels": lambda: DataLoader(TensorDataset(data, labels), batch_size=4),
    }


@pytest.mark.parametrize("form", ["tuples", "dicts", "dicts-with-labels", "generator", "loader", "loader-with-labels"])
def test_all_forms_of_calibration_give_the_same_model(cnn: nn.Module, images: list[Tensor], form: str) -> None:
    expected = fewbit.quantize(cnn, "int8-static", images)
    assert equal(fewbit.quantize(cnn, "int8-static", forms(images)[form]()), expected)


def test_split_batches_give_the_same_static_ranges(cnn: nn.Module, images: list[Tensor]) -> None:
    whole = fewbit.quantize(cnn, STATIC, [torch.cat(images)])
    parts = fewbit.quantize(cnn, STATIC, images)
    for (name, a), (_, b) in zip(sites_of(whole), sites_of(parts), strict=True):
        assert a.input_scale is not None and b.input_scale is not None
        torch.testing.assert_close(a.input_scale, b.input_scale, atol=0, rtol=1e-5, msg=name)


def test_static_ranges_cover_the_data(cnn: nn.Module, images: list[Tensor]) -> None:
    quantized = fewbit.quantize(cnn, STATIC, images)
    twin = float_twin(cnn, fewbit.plan_of(quantized))
    seen: dict[str, list[Tensor]] = {}
    for name, _ in sites_of(quantized):
        keep = seen.setdefault(name, [])
        twin.get_submodule(name).register_forward_pre_hook(lambda _, args, keep=keep: keep.append(args[0]))
    with torch.no_grad():
        for x in images:
            twin(x)
    for name, layer in sites_of(quantized):
        assert layer.input_scale is not None
        for x in seen[name]:
            error = (layer.quantized_input(x) - x).abs().max()
            assert float(error) <= float(layer.input_scale) * 0.5001 + 1e-6, name


def test_layers_that_calibration_does_not_reach_are_skipped() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    quantized = fewbit.quantize(Unused(), STATIC, [torch.randn(4, 8)])
    plan = fewbit.plan_of(quantized)
    assert list(plan.sites) == ["used"] and plan.skipped == {"unused": "no calibration batch reached it"}
    assert type(quantized.get_submodule("unused")) is nn.Linear and plan.recipe == STATIC
    assert plan.float_weights == 64 + 16


def test_layers_that_calibration_does_not_reach_and_do_not_need_it_are_quantized() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    model.forward = lambda x: x  # type: ignore[method-assign]
    recipe = Recipe("test", (Rule("*", Scheme(WEIGHT, method="mse")),))
    assert list(fewbit.plan_of(fewbit.quantize(model, recipe, [torch.randn(4, 8)])).sites) == ["a"]


def test_calibration_data_improve_weights_where_the_method_can() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    x = torch.randn(256, 64) * torch.logspace(-2, 1, 64)
    recipe = Recipe("test", (Rule("*", Scheme(QuantSpec("int4", fewbit.per_group(32)), method="mse")),))
    blind, informed = fewbit.quantize(model, recipe), fewbit.quantize(model, recipe, [x])
    with torch.no_grad():
        exact = model(x)
        assert float((informed(x) - exact).square().sum()) < float((blind(x) - exact).square().sum())


def test_missing_calibration_is_named() -> None:
    with pytest.raises(CalibrationError, match="'int8-static' fixes input ranges: it needs calibration"):
        fewbit.quantize(nn.Linear(8, 8), "int8-static")


def test_exclude() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantized = fewbit.quantize(model, ALL, exclude=["1"])
    assert list(fewbit.plan_of(quantized).sites) == ["0"] and type(quantized.get_submodule("1")) is nn.Linear


def test_exclude_takes_one_pattern_as_it_is() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    plan = fewbit.plan_of(fewbit.quantize(model, ALL, exclude="head"))
    assert list(plan.sites) == ["body"] and plan.skipped == {"head": "excluded by 'head'"}


class ByKeyword(nn.Module):
    """Calls its layer with the keyword that torch's layers name their argument by."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(input=x)


@pytest.mark.parametrize(
    ("layer", "x", "recipe"),
    [
        (nn.Linear(8, 8), torch.ones(2, 8), STATIC),
        (nn.Conv2d(4, 4, 3), torch.ones(2, 4, 5, 5), STATIC),
        (nn.Embedding(9, 8), torch.arange(9), ALL),
        (nn.LSTM(8, 8), torch.ones(3, 2, 8), ALL),
    ],
    ids=["Linear", "Conv2d", "Embedding", "LSTM"],
)
def test_layers_are_called_by_keyword(layer: nn.Module, x: Tensor, recipe: Recipe) -> None:
    model = ByKeyword(layer).eval()
    quantized = fewbit.quantize(model, recipe, [x])
    assert isinstance(quantized.get_submodule("layer"), QuantizedLayer)
    with torch.no_grad():
        exact, found = model(x), quantized(x)
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0.05)
    [error] = fewbit.compare(model, quantized, [x]).layers
    assert error.name == "layer" and error.sqnr > 20


def test_plan_of_a_float_model_is_refused(cnn: nn.Module) -> None:
    with pytest.raises(PlanError, match="ConvNet was not quantized by fewbit"):
        fewbit.plan_of(cnn)


def test_a_model_that_is_one_layer() -> None:
    quantized = fewbit.quantize(nn.Linear(8, 8), ALL)
    assert isinstance(quantized, QuantizedLayer) and list(fewbit.plan_of(quantized).sites) == [""]


def test_quantized_layers_of_a_quantized_model_keep_what_was_frozen() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].bias.requires_grad_(False)
    quantized = fewbit.quantize(model, ALL)
    assert not quantized.get_parameter("0.bias").requires_grad and quantized.get_parameter("1.bias").requires_grad


def test_a_quantized_model_is_not_quantized_again(mlp: nn.Module) -> None:
    with pytest.raises(PlanError, match="quantized already"):
        fewbit.quantize(fewbit.quantize(mlp, ALL), ALL)


def test_weight_norm_is_quantized_as_it_computes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 8)), nn.ReLU())
    before, x = snapshot(model), torch.randn(4, 16)
    quantized = fewbit.quantize(model, ALL)
    assert_unchanged(model, before)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), model(x), atol=0.02, rtol=0.02)


def test_each_parametrized_layer_is_quantized_with_its_own_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(16, 16)) for _ in range(2))).eval()
    quantized = fewbit.quantize(model, ALL)
    for name, layer in sites_of(quantized):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        assert torch.equal(dequantize(layer.qtensor()), dequantize(quantize_tensor(weight.detach(), WEIGHT)))
    assert fewbit.plan_of(quantized).ties == () and len(list(sites_of(quantized))) == 2


def test_empty_batches_are_passed_over() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(4, 8)
    expected = fewbit.quantize(model, STATIC, [x])
    assert equal(fewbit.quantize(model, STATIC, [x, torch.empty(0, 8)]), expected)


def test_float_twin_computes_the_same_and_shares_parameters(cnn: nn.Module, images: list[Tensor]) -> None:
    plan = fewbit.plan_of(fewbit.quantize(cnn, "int8-static", images))
    twin = float_twin(cnn, plan)
    with torch.no_grad():
        torch.testing.assert_close(twin(images[0]), cnn(images[0]), atol=1e-5, rtol=1e-5)
    assert twin.get_parameter("head.weight") is cnn.get_parameter("head.weight")
    with torch.device("meta"):
        meta = copy.deepcopy(cnn).to("meta")
    assert {name: tuple(t.shape) for name, t in skeleton(meta, plan).state_dict().items()} == {
        name: tuple(t.shape) for name, t in fewbit.quantize(cnn, "int8-static", images).state_dict().items()
    }


def test_plan_that_does_not_fit_names_the_site(mlp: nn.Module, cnn: nn.Module, tagger: nn.Module) -> None:
    plan = fewbit.plan_of(fewbit.quantize(mlp, "int8-dynamic"))
    with pytest.raises(PlanError, match=r"plan.sites.0: needs a Linear, found no such layer in this ConvNet"):
        skeleton(cnn, plan)
    other = nn.Sequential(nn.Linear(256, 193), nn.ReLU(), nn.Linear(193, 256), nn.ReLU(), nn.Linear(256, 4))
    with pytest.raises(PlanError, match=r"plan.sites.0: needs weights .*192.*found .*193"):
        skeleton(other, plan)


def test_half_precision_model_stays_half(mlp: nn.Module, vectors: list[Tensor]) -> None:
    model = mlp.to(torch.bfloat16)
    quantized = fewbit.quantize(model, "int8-dynamic")
    x = vectors[0].to(torch.bfloat16)
    with torch.no_grad():
        y, exact = quantized(x), model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, exact, atol=0.1, rtol=0.1)


def test_dynamic_input_needs_no_data_and_ignores_them(mlp: nn.Module, vectors: list[Tensor]) -> None:
    recipe = Recipe("test", (Rule("*", Scheme(WEIGHT, QuantSpec("int8", PER_TOKEN))),))
    assert equal(fewbit.quantize(mlp, recipe), fewbit.quantize(mlp, recipe, vectors))


def test_quantized_model_is_copied_moved_and_exported(mlp: nn.Module, vectors: list[Tensor]) -> None:
    quantized = fewbit.quantize(mlp, "int8-dynamic")
    twin = copy.deepcopy(quantized)
    assert fewbit.plan_of(twin) == fewbit.plan_of(quantized) and equal(twin, quantized)
    exported = torch.export.export(quantized, (vectors[0],)).module()
    with torch.no_grad():
        assert torch.equal(exported(vectors[0]), quantized(vectors[0]))
        assert torch.equal(twin(vectors[0]), quantized(vectors[0]))
