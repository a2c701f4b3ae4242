"""calibrate: what sites and values see, from module hooks and from the graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import CalibrationError, Plan, QuantSpec, Recipe, Rule, Scheme, per_channel
from fewbit.batches import Call
from fewbit.calibration import Statistics, calibrate, grid_of, observers_of
from fewbit.graph import Graph, read_graph

WEIGHT = QuantSpec("int8", per_channel(0))
INPUT = QuantSpec("uint8", symmetric=False, observer="minmax")
STATIC = Recipe("static", (Rule("*", Scheme(WEIGHT, INPUT, "mse"), optional=True),), results=INPUT)


def residual(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.a(x))
    return m.f(torch.relu(m.b(x) + x).mean((2, 3)))


@pytest.fixture
def model(net: Any) -> nn.Module:
    torch.manual_seed(0)
    return net(residual, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 3, padding=1), f=nn.Linear(8, 4)).eval()


@pytest.fixture
def batches() -> list[Call]:
    generator = torch.Generator().manual_seed(1)
    return [Call((torch.randn(4, 3, 8, 8, generator=generator),), {}) for _ in range(3)]


def both(model: nn.Module, batches: list[Call], recipe: Recipe = STATIC) -> tuple[Statistics, Statistics, Plan, Graph]:
    """From hooks alone, and with the graph."""
    plan = fewbit.make_plan(model, recipe)
    layers = {
        name for name, site in plan.sites.items() if site.scheme.input is not None and site.scheme.input.is_static
    }
    graph = read_graph(model, batches[0].args, batches[0].kwargs, layers)
    assert isinstance(graph, Graph), graph
    return calibrate(model, plan, batches), calibrate(model, plan, batches, graph), plan, graph


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, state in expected.items():
        assert all(torch.allclose(found[key][name], value, rtol=1e-6) for name, value in state.items()), key


def test_sites_see_the_same_from_the_graph_as_from_hooks(model: nn.Module, batches: list[Call]) -> None:
    hooks, graph, plan, _ = both(model, batches)
    assert {*hooks} == {*plan.sites} == {"a", "b", "f"}
    for name in plan.sites:
        assert {*hooks[name]} == {"input", "second_moment"}
        assert_same(graph[name], hooks[name])


def test_the_range_of_each_value_is_that_of_the_float_model(model: Any, batches: list[Call]) -> None:
    _, found, _, graph = both(model, batches)
    x = torch.cat([call.args[0] for call in batches])
    with torch.no_grad():
        a = torch.relu(model.a(x))
        values = {"b:conv2d": model.b(a), ":relu.1": torch.relu(model.b(a) + a)}
    assert {*graph.results().values()} == {*values}
    for name, value in values.items():
        torch.testing.assert_close(found[name]["result"]["low"].float(), value.min())
        torch.testing.assert_close(found[name]["result"]["high"].float(), value.max())
    torch.testing.assert_close(found["b"]["input"]["high"].float(), a.max())


def test_without_results_in_the_recipe_only_sites_are_seen(model: nn.Module, batches: list[Call]) -> None:
    _, found, plan, _ = both(model, batches, replace(STATIC, results=None))
    assert {*found} == {*plan.sites}


def test_batches_of_other_shapes_are_seen_by_sites_alone(model: nn.Module, batches: list[Call]) -> None:
    other = Call((torch.full((2, 3, 10, 6), 50.0),), {})
    _, found, _, _ = both(model, [*batches, other])
    _, without, _, _ = both(model, batches)
    assert float(found["a"]["input"]["high"]) == 50
    assert_same(found["b:conv2d"], without["b:conv2d"])


@pytest.mark.parametrize("kind", ["transposed", "conv1d", "dynamic", "parametrized"])
def test_layers_that_the_graph_does_not_follow_are_seen_by_hooks(kind: str, net: Any) -> None:
    torch.manual_seed(0)
    odd: nn.Module = {
        "transposed": lambda: nn.ConvTranspose2d(8, 8, 2),
        "conv1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 1), nn.Unflatten(2, (6, 6))),
        "dynamic": lambda: nn.Conv2d(8, 8, 1),
        "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
    }[kind]()

    model = net(lambda m, x: m.b(m.odd(torch.relu(m.a(x)))), a=nn.Conv2d(3, 8, 3), odd=odd, b=nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(4, 3, 8, 8)
    recipe = STATIC
    if kind == "dynamic":
        recipe = recipe.override("odd", Scheme(WEIGHT, QuantSpec("int8"), "mse"))
    hooks, graph, plan, _ = both(model, [Call((x,), {}), Call((x * 2,), {})], recipe)
    for name in hooks:
        assert_same(graph[name], hooks[name])
    assert {*hooks} <= {*graph} and {"a", "b"} <= {*plan.sites}
    quantized = fewbit.quantize(model, replace(recipe, correction="affine"), [x])
    assert "no calibration batch reached it" not in fewbit.plan_of(quantized).skipped.values()
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), model(x), atol=0.1, rtol=0.1)


def test_a_layer_called_twice_sees_both_inputs(net: Any) -> None:
    torch.manual_seed(0)
    model = net(lambda m, x: m.a(torch.relu(m.a(x)) * 100), a=nn.Linear(6, 6)).eval()
    x = torch.randn(4, 6)
    hooks, graph, _, _ = both(model, [Call((x,), {})])
    assert_same(graph["a"], hooks["a"])
    assert float(graph["a"]["input"]["low"]) == float(x.min()) and float(graph["a"]["input"]["high"]) > 10


def test_what_is_not_finite_names_the_batch_and_the_place(model: Any, batches: list[Call]) -> None:
    bad = Call((batches[0].args[0] * torch.nan,), {})
    plan = fewbit.make_plan(model, STATIC)
    for graph in (None, both(model, batches)[3]):
        with pytest.raises(CalibrationError, match="calibration batch 2: the input of 'a' has a NaN or an infinity"):
            calibrate(model, plan, [*batches[:2], bad], graph)
    with torch.no_grad():
        model.b.bias[0] = torch.inf
    graph = read_graph(model, batches[0].args, {}, {"a", "b", "f"})
    assert isinstance(graph, Graph)
    with pytest.raises(CalibrationError, match="calibration batch 0: the value 'b:conv2d' has a NaN or an infinity"):
        calibrate(model, plan, batches, graph)


def test_what_the_model_raises_names_the_batch(model: nn.Module, batches: list[Call]) -> None:
    plan = fewbit.make_plan(model, STATIC)
    wrong = Call((torch.randn(2, 5, 8, 8),), {})
    for graph in (None, both(model, batches)[3]):
        with pytest.raises(
            CalibrationError, match=r"calibration batch 1: Net raised RuntimeError on 0: float32 \[2, 5, 8, 8\]"
        ):
            calibrate(model, plan, [batches[0], wrong], graph)


def test_the_model_keeps_no_hooks(model: nn.Module, batches: list[Call]) -> None:
    both(model, batches)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_keyword_inputs_and_constants() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, *, image: Tensor, gain: float = 1.0) -> Tensor:
            return self.b(torch.relu(self.a(image)) * gain)

    torch.manual_seed(0)
    calls = [Call((), {"image": torch.randn(2, 3, 4, 4), "gain": 2.0}) for _ in range(2)]
    hooks, graph, _, _ = both(Keywords().eval(), calls)
    for name in hooks:
        assert_same(graph[name], hooks[name])


def test_observers_of_sites(cnn: nn.Module) -> None:
    for scheme, expected in (
        (Scheme(WEIGHT), set()),
        (Scheme(WEIGHT, method="mse"), {"second_moment"}),
        (Scheme(WEIGHT, INPUT), {"input"}),
        (Scheme(WEIGHT, INPUT, "pair_safe"), {"input", "second_moment"}),
    ):
        plan = fewbit.make_plan(cnn, Recipe("test", (Rule("*", scheme),)))
        assert {*observers_of(plan.sites["head"], cnn.get_submodule("head"))} == expected


def test_grid_of() -> None:
    state = {"low": torch.tensor(-1.0, dtype=torch.float64), "high": torch.tensor(1.55, dtype=torch.float64)}
    scale, zero_point = grid_of(state, INPUT, "x")
    assert zero_point is not None and abs(float(scale) - 0.01) < 1e-8 and int(zero_point) == 100
    state["high"] = torch.tensor(1e39, dtype=torch.float64)
    with pytest.raises(CalibrationError, match="the value 'x': found a range of"):
        grid_of(state, INPUT, "the value 'x'")
