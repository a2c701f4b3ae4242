"""The explicit form: it runs in PyTorch, says what the quantized model computes, and its integers hold what they must."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import fewbit
from fewbit.batches import Call
from fewbit.graph.explicit import (
    DEQUANTIZE,
    DEQUANTIZE_CHANNELS,
    LARGEST_BIAS,
    QUANTIZE,
    IntegerLayer,
    integer_weights,
)
from fewbit.graph.fused import fused
from fewbit.lowering import explicit_graph
from fewbit.pipeline import sites_of
from fewbit.targets.target import relative_difference


def graph_of(model: nn.Module, x: Tensor, wide_sums: bool = True) -> GraphModule:
    return explicit_graph(model, Call((x,), {}), wide_sums)[0]


def grids(module: GraphModule) -> list[tuple[float, int]]:
    return [node.args[1:] for node in module.graph.nodes if node.target is QUANTIZE]  # type: ignore[misc]


def test_runs_in_torch_and_stays_close_to_the_quantized_model(quantized: Any) -> None:
    model, network = quantized
    plain = graph_of(model, network.data[0])
    with torch.no_grad():
        for x in (*network.data, torch.cat(network.data)[:5]):
            found, expected = plain(x), model(x)
            assert pytree.tree_structure(found) == pytree.tree_structure(expected)
            assert relative_difference(found, expected) < 0.025
            assert relative_difference(found, network.model(x)) < 0.04


def test_weights_are_int8_and_biases_int32(build: Any) -> None:
    network = build("residual")
    model = network.quantized()
    plain = graph_of(model, network.data[0])
    dtypes = Counter(str(buffer.dtype) for name, buffer in plain.named_buffers() if name.endswith("_codes"))
    assert dtypes == {"torch.int8": 4, "torch.int32": 4}
    assert not [*plain.parameters()]
    for layer, name in (("c2", "conv2d_1"), ("f", "linear")):
        site: Any = model.get_submodule(layer)
        codes = plain.get_buffer(f"{name}_weights_codes")
        assert torch.equal(codes.flatten(1), site.qtensor().codes.flatten(1))
        weight = torch.ops.fewbit.dequantize_channels(codes, plain.get_buffer(f"{name}_weights_scale"))
        assert torch.equal(weight, site.weight)
        bias = torch.ops.fewbit.dequantize_channels(*(plain.get_buffer(f"{name}_bias_{p}") for p in ("codes", "scale")))
        step = plain.get_buffer(f"{name}_bias_scale")
        assert bool(((bias - site.bias).abs() <= step * 0.51 + site.bias.abs() * 1e-6).all())


def test_values_that_are_only_moved_have_one_grid(build: Any) -> None:
    for name, count in (("max_pool", 2), ("shuffle", 2), ("flatten_pool", 2), ("inception", 3), ("tokens", 2)):
        network = build(name)
        plain = graph_of(network.quantized(), network.data[0])
        assert len({*grids(plain)}) == count < len(grids(plain)), name


def test_moving_rounds_nothing_again(build: Any) -> None:
    """Each value that was moved is on its grid already: to quantize it a second time changes nothing."""
    for name in ("max_pool", "shuffle", "option_a", "flatten_pool"):
        network = build(name)
        plain = graph_of(network.quantized(), network.data[0])
        rounded: dict[Any, Tensor] = {}

        class Rounding(torch.fx.Interpreter):
            def run_node(self, n: Any, rounded: dict[Any, Tensor] = rounded) -> Any:
                result = rounded[n] = super().run_node(n)
                return result

        with torch.no_grad():
            Rounding(plain).run(network.data[0], enable_io_processing=False)
        moved = ("max_pool2d", "permute", "transpose", "reshape", "view", "contiguous", "slice", "pad", "flatten")
        checked = 0
        for node in plain.graph.nodes:
            if node.target is QUANTIZE and getattr(node.args[0].target, "_opname", "") in moved:
                [again] = [user for user in node.users if user.target is DEQUANTIZE]
                assert torch.equal(rounded[again], rounded[node.args[0]])
                checked += 1
        assert checked, name


def test_results_are_in_the_plan_and_survive_saving(build: Any, tmp_path: Path) -> None:
    network = build("residual")
    model = network.quantized()
    results = fewbit.plan_of(model).results
    assert {*results} == {"c3:conv2d", "relu:relu.2"}
    assert results["relu:relu.2"][1] == 0 and results["c3:conv2d"][1] > 0
    assert {*results.values()} <= {*grids(graph_of(model, network.data[0], wide_sums=False))}
    fewbit.save(model, tmp_path)
    written = json.loads((tmp_path / "plan.json").read_text())["results"]
    assert {name: tuple(grid) for name, grid in written.items()} == results
    loaded = fewbit.load(tmp_path, network.model)
    assert fewbit.plan_of(loaded).results == results
    x = network.data[1]
    with torch.no_grad():
        assert torch.equal(fewbit.lower(loaded, x)(x), fewbit.lower(model, x)(x))
        assert torch.equal(graph_of(loaded, x)(x), graph_of(model, x)(x))


class Sums(nn.Module):
    """A convolution added to codes, two that are added to each other, one that others read too, one behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c, self.d, self.e = (
            nn.Conv2d(3 if i == 0 else 8, 8, 3, 1, 1) for i in range(6)
        )
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.a(x) + x)
        x = self.b(x) + self.c(x)
        y = self.d(x)
        x = torch.relu(x + y) + y
        return self.head(x + torch.relu(self.e(x)))  # type: ignore[no-any-return]


def test_sums_for_an_addition_alone_are_not_rounded() -> None:
    torch.manual_seed(0)
    model, x = Sums(), torch.randn(2, 3, 8, 8)
    quantized = fewbit.quantize(model, replace(fewbit.load_recipe("int8-static"), sensitive=None), [x])

    def float_terms(wide_sums: bool) -> list[str]:
        nodes = graph_of(quantized, x, wide_sums).graph.nodes
        added = [term for node in nodes if node.target is torch.ops.aten.add.Tensor for term in node.args[:2]]
        return [term.name for term in added if term.target is not DEQUANTIZE]

    assert float_terms(True) == ["conv2d_1", "conv2d_3"]  # a, and of b and c the later one
    assert float_terms(False) == []
    for wide_sums in (True, False):
        fast = fused(graph_of(quantized, x, wide_sums))
        with torch.no_grad():
            assert relative_difference(fast(x), model(x)) < 0.03
        with_sums = [
            node for node in fast.graph.nodes if str(node.target).startswith("fewbit.conv") and len(node.args) > 13
        ]
        assert len(with_sums) == (2 if wide_sums else 0)


def test_values_without_a_grid_stay_float(build: Any) -> None:
    network = build("residual")
    recipe = fewbit.load_recipe("int8-static")
    without = fewbit.Recipe("without", recipe.rules, recipe.transforms)
    model = fewbit.quantize(network.model, without, network.data)
    assert not fewbit.plan_of(model).results
    lowered = fewbit.lower(model, network.data[0])
    with torch.no_grad():
        assert relative_difference(lowered(network.data[0]), model(network.data[0])) < 0.02
    assert "add" in [operator.kind for operator in lowered.operators if not operator.is_int8]


def test_a_clamp_that_the_codes_imply_is_left_out(build: Any) -> None:
    kept = {}
    for name in ("max_pool", "relu6", "clamp", "clamp_positive"):
        network = build(name)
        plain = graph_of(network.quantized(), network.data[0])
        kept[name] = any("relu" in str(n.target) or "clamp" in str(n.target) for n in plain.graph.nodes)
    assert kept["max_pool"] is False and kept["clamp_positive"] is True


def test_layers_with_other_schemes_keep_their_own_operators(build: Any) -> None:
    network = build("residual")
    dynamic = fewbit.Scheme(fewbit.QuantSpec("int8", fewbit.per_channel(0)), fewbit.QuantSpec("int8", fewbit.PER_TOKEN))
    recipe = replace(fewbit.load_recipe("int8-static"), sensitive=None).override("f", dynamic)
    model = fewbit.quantize(network.model, recipe, network.data)
    plain = graph_of(model, network.data[0])
    assert sum(node.target is DEQUANTIZE_CHANNELS for node in plain.graph.nodes) == 2 * 3
    lowered = fewbit.lower(model, network.data[0])
    with torch.no_grad():
        for x in network.data:
            assert relative_difference(lowered(x), model(x)) < 0.02


def layer(codes: list[list[int]], scale: list[float], bias: list[float] | None) -> IntegerLayer:
    tensors = torch.tensor(codes, dtype=torch.int8), torch.tensor(scale)
    return IntegerLayer(*tensors, None if bias is None else torch.tensor(bias), 0.5, 0)


def test_weights_without_bias_are_as_they_were() -> None:
    given = layer([[3, -128], [0, 0]], [1e-30, 1.0], None)
    codes, scale, bias = integer_weights(given, 0.5)
    assert bias is None and torch.equal(codes, given.codes) and torch.equal(scale, given.scale)


def test_a_bias_too_large_for_int32_makes_its_channel_coarser() -> None:
    codes, scale, bias = integer_weights(layer([[100, -128], [100, -128]], [1e-20, 0.25], [3.0, 3.0]), 0.5)
    assert bias is not None and bias.dtype == torch.int32
    assert codes.tolist() == [[0, 0], [100, -128]] and float(scale[1]) == 0.25
    assert int(bias[1]) == 24 and abs(int(bias[0])) <= LARGEST_BIAS
    assert abs(int(bias[0]) * float(scale[0]) * 0.5 - 3.0) < 1e-6


@given(
    st.lists(st.integers(-127, 127), min_size=1, max_size=6),
    st.floats(-40, 10),
    st.floats(-1e6, 1e6),
    st.floats(-12, 3),
)
@settings(max_examples=200, deadline=None)
def test_any_weight_and_bias_are_near(codes: list[int], magnitude: float, bias: float, input_magnitude: float) -> None:
    scale, input_scale = 2.0**magnitude, 2.0**input_magnitude
    found, wider, steps = integer_weights(layer([codes], [scale], [bias]), input_scale)
    assert steps is not None and abs(int(steps)) <= LARGEST_BIAS
    unit = float(wider) * input_scale
    assert abs(int(steps) * unit - bias) <= 0.5 * unit + 1e-6 * abs(bias)
    weights, expected = found.double() * wider.double(), torch.tensor(codes).double() * scale
    coarser = float(wider) > scale * 1.001
    allowed = 0.51 * float(wider) if coarser else 1e-6 * float(expected.abs().max())
    assert bool(((weights - expected).abs() <= allowed).all())
    if not any(codes):
        assert abs(int(steps) * unit - bias) <= 1e-6 * abs(bias) + 1e-30
    # What is lost of a weight is nothing beside the bias: less than 2^-22 of it for the largest input.
    assert 255 * input_scale * float((weights - expected).abs().max()) <= 2.0**-21 * abs(
        bias
    ) + 1e-6 * 255 * input_scale * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["tiny", "zero", "all-zero"])
def test_dead_channels_and_zero_weights(kind: str, build: Any) -> None:
    network = build("max_pool")
    a: Any = network.model.a
    with torch.no_grad():
        a.weight[2] *= 1e-25 if kind == "tiny" else 0
        a.bias[2] = 3.0
        if kind == "all-zero":
            a.weight.zero_()
            network.model.b.weight.zero_()
    model = network.quantized()
    lowered = fewbit.lower(model, network.data[0])
    with torch.no_grad():
        for x in network.data:
            assert relative_difference(lowered(x), network.model(x)) < 0.02


def test_the_quantized_model_is_unchanged(build: Any) -> None:
    network = build("residual")
    model = network.quantized()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: id(module) for name, module in model.named_modules()}
    graph_of(model, network.data[0])
    fewbit.lower(model, network.data[0])
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [name for name, _ in sites_of(model)] == ["c1", "c2", "c3", "f"]
