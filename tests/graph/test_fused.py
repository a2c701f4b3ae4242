"""fused: integer operators that compute what the explicit form says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fewbit
from fewbit.batches import Call
from fewbit.graph import read_graph
from fewbit.graph.explicit import IntegerLayer, explicit
from fewbit.graph.fused import fused
from fewbit.lowering import explicit_graph
from fewbit.targets.target import relative_difference

KINDS = ("conv_uint8", "linear_uint8", "add_uint8", "average_uint8", "lookup_uint8")


def both(model: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Module]:
    """The explicit form and its fusion."""
    return explicit_graph(model, Call((x,), {}))[0], fused(explicit_graph(model, Call((x,), {}))[0])


def kinds(module: Any) -> list[str]:
    """fewbit's operators in a graph, without overloads."""
    return [node.target._opname for node in module.graph.nodes if getattr(node.target, "namespace", "") == "fewbit"]


def test_equals_the_explicit_form_but_for_rounding(quantized: Any) -> None:
    model, network = quantized
    plain, fast = both(model, network.data[0])
    with torch.no_grad():
        for x in network.data:
            assert relative_difference(fast(x), plain(x)) < 0.015


def test_any_batch_size(quantized: Any) -> None:
    model, network = quantized
    rows = torch.cat(network.data)
    first, second = (fewbit.lower(model, rows[:size]) for size in (3, 5))
    assert first.any_batch and second.any_batch
    with torch.no_grad():
        for size in (2, 9):
            found, expected = first(rows[:size]), second(rows[:size])
            assert all(map(torch.equal, pytree.tree_leaves(found), pytree.tree_leaves(expected)))


def test_nothing_between_layers_is_float(build: Any) -> None:
    for name in ("residual", "dense", "inception", "option_a", "shuffle", "hardswish", "avg_pool", "flatten"):
        network = build(name)
        _, fast = both(network.quantized(), network.data[0])
        found = kinds(fast)
        assert found.count("quantize_uint8") == 1 and found.count("dequantize_uint8") == 0, name
        assert not {node.target for node in fast.graph.nodes} & {torch.ops.aten.relu.default, torch.ops.aten.add.Tensor}


SCALE = 2.0**-4


def exact(model: nn.Module, x: Tensor, results: Callable[[str], tuple[float, int]]) -> tuple[nn.Module, nn.Module]:
    """The two forms of ``model`` with small integer weights and power-of-two scales, so that all float sums are exact."""
    names = {name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    layers = {}
    for number, name in enumerate(sorted(names)):
        module: Any = model.get_submodule(name)
        codes = torch.randint(-9, 10, module.weight.shape, dtype=torch.int8)
        scale = torch.exp2(torch.randint(-7, -4, (len(codes),)).float())
        bias = torch.randint(-40, 40, (len(codes),)) * scale * SCALE
        layers[name] = IntegerLayer(codes, scale, bias, SCALE, 0 if number else 128)
    made = []
    for make in (lambda module: module, fused):
        graph = read_graph(model, (x,), {}, names)
        assert not isinstance(graph, str), graph
        grids = {name: results(name) for name in graph.results().values()}
        made.append(make(explicit(graph, layers, grids)))
    return made[0], made[1]


EXACT = [
    "residual",
    "dense",
    "inception",
    "max_pool",
    "max_pool_first",
    "option_a",
    "flatten",
    "flatten_pool",
    "tokens",
    "shuffle",
    "split_shuffle",
    "relu6",
    "clamp",
    "clamp_positive",
    "hardswish",
    "same",
    "same_even",
    "groups",
    "reflect",
    "depthwise",
    "multiplier",
    "dilation",
    "pad",
    "linear",
    "linear_3d",
    "linear_4d",
    "there_and_back",
    "cat_rows",
    "channels_last_sum",
    "linear_on_rows",
    "several_outputs",
    "twice",
    "add_itself",
    "cat_input",
    "from_vector",
]


@pytest.mark.parametrize("name", EXACT)
def test_equals_the_explicit_form_to_the_bit_where_float_sums_are_exact(name: str, build: Any) -> None:
    network = build(name)
    torch.manual_seed(1)
    plain, fast = exact(network.model, network.data[0], lambda name: (2.0**-3, 100))
    with torch.no_grad():
        for x in network.data:
            found, expected = fast(x), plain(x)
            for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
                # Means divide, by a number that here is a power of two: also exact.
                assert a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("name", ["avg_pool", "avg_pool_inside", "avg_pool_padded", "mean", "mean_keepdim", "adaptive"])
def test_means_are_within_one_step(name: str, build: Any) -> None:
    network = build(name)
    torch.manual_seed(1)
    plain, fast = exact(network.model, network.data[0], lambda name: (2.0**-3, 100))
    with torch.no_grad():
        for x in network.data:
            found, expected = fast(x), plain(x)
            largest = 9 * 2.0**-5 * SCALE * 3 * 3 * 8  # of one step in every input of the last layer
            assert float((found - expected).abs().max()) <= largest
            assert relative_difference(found, expected) < 0.01


def integer_conv(codes: Tensor, zero_point: int, weight: Tensor, layer: nn.Conv2d) -> Tensor:
    """Sums in int64, one kernel position at a time."""
    (height, width), (p, q), (s, t), (d, e) = weight.shape[2:], layer.padding, layer.stride, layer.dilation
    x = F.pad(codes.long() - zero_point, (q, q, p, p))  # type: ignore[arg-type]
    rows, columns = ((x.shape[2] - (height - 1) * d - 1) // s + 1, (x.shape[3] - (width - 1) * e - 1) // t + 1)
    sums = torch.zeros(len(x), len(weight), rows, columns, dtype=torch.int64)
    per_group, outputs = weight.shape[1], len(weight) // layer.groups
    for group in range(layer.groups):
        image = x[:, group * per_group : (group + 1) * per_group]
        kernel = weight[group * outputs : (group + 1) * outputs].long()
        for i in range(height):
            for j in range(width):
                part = image[:, :, i * d : i * d + (rows - 1) * s + 1 : s, j * e : j * e + (columns - 1) * t + 1 : t]
                for channel in range(per_group):
                    terms = part[:, channel, None] * kernel[None, :, channel, i, j, None, None]
                    sums[:, group * outputs : (group + 1) * outputs] += terms
    return sums


@given(
    seed=st.integers(0, 2**31), groups=st.sampled_from([1, 2, 4]), stride=st.integers(1, 2), dilation=st.integers(1, 2)
)
@settings(max_examples=15)
def test_equals_int64_arithmetic(seed: int, groups: int, stride: int, dilation: int) -> None:
    torch.manual_seed(seed)
    first = nn.Conv2d(4, 8, 3, stride, padding=(1, 2), dilation=dilation, groups=groups)
    model = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).eval()
    x = torch.randn(3, 4, 9, 7)
    with torch.no_grad():
        model(x)
    model = fewbit.quantize(model, replace(fewbit.load_recipe("int8-static"), sensitive=None), [x])
    conv, _, _, linear = model
    with torch.no_grad():
        found = fewbit.lower(model, x)(x)
    scale, zero = float(conv.input_scale), int(conv.input_zero_point)
    codes = ((x / scale).round() + zero).clamp(0, 255).to(torch.uint8)
    weight, weight_scale = conv.geometry.weight(conv.qtensor().codes), conv.qtensor().scale_values[:, 0]
    bias = (conv.bias.double() / (weight_scale.double() * scale)).round().long()
    sums = integer_conv(codes, zero, weight, first) + bias[:, None, None]
    scale_out, zero_out = linear.input_scale.item(), int(linear.input_zero_point)
    multiplier = weight_scale * torch.tensor(scale) / torch.tensor(scale_out)
    hidden = (sums.float() * multiplier[:, None, None]).round().add(zero_out).clamp(max(zero_out, 0), 255).long()
    last = linear.qtensor()
    bias = (linear.bias.double() / (last.scale_values[:, 0].double() * scale_out)).round().long()
    sums = (hidden.flatten(1) - zero_out) @ last.codes.long().T + bias
    assert torch.equal(found, sums.float() * (last.scale_values[:, 0] * torch.tensor(scale_out)))
