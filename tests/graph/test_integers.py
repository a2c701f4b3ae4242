"""read_graph: what is kept as codes, and which values share a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.graph import Graph, read_graph
from fewbit.graph.integers import bounds, is_clamp, window

SCHEME = fewbit.Scheme(fewbit.QuantSpec("int8", fewbit.per_channel(0)))


def graph_of(model: nn.Module, x: Tensor, *without: str) -> Graph:
    layers = {n for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)}
    graph = read_graph(model.eval(), (x,), {}, layers - {*without})
    assert isinstance(graph, Graph), graph
    return graph


def placement(graph: Graph) -> dict[str, list[str]]:
    """What is kept as codes: for each value that has a grid, those that share it, itself first."""

    def name(node: Any) -> str:
        return graph.names.get(node, node.name)

    shared: dict[str, list[str]] = {name(owner): [name(owner)] for owner in graph.values.values()}
    for value, owner in graph.values.items():
        if value is not owner:
            shared[name(owner)].append(name(value))
    return shared


# By model of conftest.py: the grids, without that of the input. Those marked + are the results: no layer's input.
PLACES = {
    # The sum's term without another reader and the sum itself; the shared ReLU is of the convolution before or of the sum.
    "residual": "relu:relu / relu:relu.1 / +c3:conv2d / +relu:relu.2 / :flatten :adaptive_avg_pool2d",
    "add_inplace": "a:conv2d / +:relu / :add",
    "add_itself": "+a:conv2d / :add",
    "add_constant": ":add",
    "add_broadcast": ":add",
    # A concatenation's inputs have its grid if it is their only reader.
    "dense": ":relu / +:relu.1 / :cat / :cat.1 :relu.2",
    "inception": ":relu :max_pool2d / :cat :relu.1 :relu.2 :relu.3",
    "cat_itself": ":cat a:conv2d",
    "cat_rows": ":cat a:conv2d c:conv2d",
    "cat_input": ":cat a:conv2d",
    "max_pool": ":max_pool2d :relu",
    "max_pool_first": "+a:conv2d / :relu",
    "avg_pool": "+:relu / :avg_pool2d",
    "avg_pool_padded": "+a:conv2d / :avg_pool2d",
    "avg_pool_inside": "+a:conv2d / :avg_pool2d",
    "avg_pool_ceil": ":avg_pool2d",
    "mean": "+a:conv2d / :mean",
    "mean_keepdim": "+a:conv2d / :mean",
    "adaptive": "+:relu / :view :adaptive_avg_pool2d",
    "adaptive_two": ":flatten",
    "option_a": ":relu :slice :slice.1 :slice.2 :pad / :relu.1 / +c:conv2d / +:relu.2 / :mean",
    "flatten_one": ":flatten :relu",
    "flatten": ":flatten :relu",
    "flatten_pool": ":flatten :relu :max_pool2d",
    "tokens": ":transpose a:conv2d :flatten",
    "linear_on_rows": ":relu",
    "shuffle": ":view.1 :relu :view :transpose :contiguous",
    "dropout": "act.0:relu",
    "dropout_channels": "act.0:relu",
    "hardswish": "+a:conv2d / act:hardswish",
    "silu": "+a:conv2d / act:silu",
    "sigmoid": "+a:conv2d / act:sigmoid",
    "leaky_relu": "+a:conv2d / act:leaky_relu",
    "gelu_tanh": "+a:conv2d / act:gelu",
    "mish": "act:mish",
    "relu6": "act:hardtanh",
    "hardtanh": "act:hardtanh",
    "clamp": ":clamp",
    "clamp_above": ":clamp",
    "clamp_tensor": ":clamp",
    "clamp_twice": ":clamp",
    # What repeats the image at its borders is computed in float.
    "reflect": "b:pad",
    "circular": "b:pad",
    "pad_reflect": ":pad",
    "pad_ones": ":pad",
    "pad": ":pad a:conv2d",
    "pad_zeros": "act:pad a:conv2d",
    "same": ":relu",
    "same_even": "b:pad :relu",
    "valid": ":relu",
    "groups": ":relu",
    "depthwise": ":relu / :relu.1",
    "squeeze": "+:relu / :adaptive_avg_pool2d / :relu.1 / :mul",
    "linear": ":relu",
    "linear_3d": ":relu",
    "linear_4d": ":relu",
    "convnext": "stem:conv2d / ln:layer_norm / :gelu / :mean",
    "channels_last_sum": "+:permute :relu / +:permute.1 :relu.1 / :add",
    "there_and_back": ":permute :relu / :permute.1",
    "several_outputs": ":relu",
    "twice": ":relu / :relu.1",
    "from_vector": ":view",
    "norm_after": "n:batch_norm",
    "upsample": ":upsample_nearest2d",
}


@pytest.mark.parametrize("name", PLACES)
def test_placement(name: str, build: Callable[[str], Any]) -> None:
    network = build(name)
    graph = graph_of(network.model, network.data[0])
    found = placement(graph)
    found.pop("x", None)
    results = {*graph.results().values()}
    expected = [part.split() for part in PLACES[name].split(" / ")]
    assert {"+" * (owner in results) + owner: {*group} - {owner} for owner, group in found.items()} == {
        group[0]: {*group[1:]} for group in expected
    }


def test_in_encoders_only_inputs_of_linear_layers_are_codes(build: Callable[[str], Any]) -> None:
    network = build("encoder")
    graph = graph_of(network.model, network.data[0])
    assert {*graph.values} == {*graph.inputs()} and not graph.results() and not graph.carried
    assert all(owner is value for value, owner in graph.values.items())


@pytest.mark.parametrize("name", ["residual", "dense", "split_shuffle", "convnext", "encoder"])
def test_names_are_the_same_in_a_second_export_and_with_another_batch(name: str, build: Callable[[str], Any]) -> None:
    network = build(name)
    first = graph_of(network.model, network.data[0])
    second = graph_of(build(name).model, network.data[0][:1])
    assert placement(first) == placement(second)
    assert [*first.results().values()] == [*second.results().values()]
    assert len({*first.names.values()}) == len(first.names)


def test_every_owner_has_its_own_grid(build: Callable[[str], Any]) -> None:
    for name in ("residual", "dense", "inception", "option_a", "shuffle", "convnext"):
        graph = graph_of(build(name).model, build(name).data[0])
        assert all(graph.values[owner] is owner for owner in graph.values.values()), name


def test_float_layers_end_what_is_carried(build: Callable[[str], Any]) -> None:
    network = build("residual")
    graph = graph_of(network.model, network.data[0], "c3")
    assert "c3" not in graph.layers.values()
    assert "c3:conv2d" not in placement(graph) and "relu:relu.2" not in placement(graph)


def test_any_batch_and_what_fits(build: Callable[[str], Any]) -> None:
    network = build("residual")
    x = network.data[0]
    graph = graph_of(network.model, x[:1])
    assert graph.any_batch
    assert graph.fits((x,), {}) and graph.fits((x[:3],), {})
    assert not graph.fits((x[..., 1:],), {}) and not graph.fits((x.double(),), {}) and not graph.fits((), {"x": x})


def test_a_layer_of_two_names_has_the_first() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert [*graph_of(model, torch.randn(2, 4, 5, 5)).layers.values()] == ["0", "0"]


def test_layers_that_share_a_weight_are_layers_each() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    assert [*graph_of(model, torch.randn(2, 4, 5, 5)).layers.values()] == ["0", "2"]


def test_images_without_batch_are_no_layers_inputs() -> None:
    assert not graph_of(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(3, 8, 8)).layers


def written_view(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :2].relu_()
    return m.b(y)


def written_row(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, 0] = 0
    return m.b(y)


def written_chunk(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y.chunk(2, 1)[0].relu_()
    return m.b(y)


def written_after_view(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = y[:, :4]
    y += 1
    return m.b(torch.cat([z, z], 1))


@pytest.mark.parametrize("function", [written_view, written_row, written_chunk, written_after_view])
def test_writing_to_a_view_that_is_read_elsewhere_is_refused(function: Any, net: Any) -> None:
    torch.manual_seed(0)
    model = net(function, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 5, 1)).eval()
    data = [torch.randn(2, 3, 5, 5)]
    reason = read_graph(model, (data[0],), {}, {"a", "b"})
    assert isinstance(reason, str) and "writes to memory that is read in another shape" in reason
    quantized = fewbit.quantize(model, "int8-static", data)
    assert fewbit.plan_of(quantized).skipped == {"values between layers": reason}
    with torch.no_grad():
        torch.testing.assert_close(quantized(data[0]), model(data[0]), atol=0.2, rtol=0)
    with pytest.raises(fewbit.UnsupportedError, match=r"cannot be lowered: .* writes to memory"):
        fewbit.lower(quantized, data[0])


def rewritten(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).flatten(1)
    y.relu_()
    z = y.view(-1, 8, 5, 5)
    z *= 2
    return m.b(z.add_(1))


def test_writing_in_place_where_nothing_else_reads_is_what_it_is_out_of_place(net: Any) -> None:
    torch.manual_seed(0)
    model = net(rewritten, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 5, 1)).eval()
    x = torch.randn(2, 3, 5, 5)
    kept = x.clone()
    graph = graph_of(model, x)
    with torch.no_grad():
        assert torch.equal(graph.module(x), model(x)) and torch.equal(x, kept)
    assert not [node for node in graph.module.graph.nodes if str(node.target).split(".")[1:2] == ["relu_"]]


def test_a_model_with_branches_on_data_does_not_export(net: Any) -> None:
    torch.manual_seed(0)
    model = net(lambda m, x: m.b(m.a(x)) if float(x.sum()) > 0 else m.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)).eval()
    x = torch.rand(3, 4)
    reason = read_graph(model, (x,), {}, {"a", "b"})
    assert isinstance(reason, str) and reason.startswith("torch.export: ")
    plan = fewbit.plan_of(fewbit.quantize(model, "int8-static", [x]))
    assert [*plan.sites] == ["a", "b"] and not plan.results
    assert plan.skipped["values between layers"] == reason
    assert (
        plan.summary().startswith("quantized 2 of 2 layers") and "skipped transform fold_batch_norm" in plan.summary()
    )


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (torch.relu, (0.0, torch.inf)),
        (nn.functional.relu6, (0.0, 6.0)),
        (nn.functional.hardtanh, (-1.0, 1.0)),
        (lambda x: nn.functional.hardtanh(x, -2, 3), (-2.0, 3.0)),
        (lambda x: x.clamp(-2, 3), (-2.0, 3.0)),
        (lambda x: x.clamp(max=3), (-torch.inf, 3.0)),
        (lambda x: x.clamp_min(0.5), (0.5, torch.inf)),
    ],
)
def test_bounds_of_clamps(function: Any, expected: tuple[float, float], net: Any) -> None:
    graph = graph_of(net(lambda m, x: function(m.a(x)), a=nn.Linear(4, 4)), torch.randn(2, 4))
    [clamp] = [node for node in graph.module.graph.nodes if is_clamp(node)]
    assert bounds(clamp) == expected


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (nn.AvgPool2d(3), ([3, 3], [3, 3], [0, 0], True)),
        (nn.AvgPool2d((3, 2), 2, (1, 0), count_include_pad=False), ([3, 2], [2, 2], [1, 0], False)),
        (nn.AdaptiveAvgPool2d(1), (None, [1, 1], [0, 0], True)),
        (nn.AvgPool2d(3, ceil_mode=True), None),
        (nn.AvgPool2d(3, divisor_override=2), None),
        (nn.AdaptiveAvgPool2d((1, 2)), None),
    ],
    ids=str,
)
def test_windows_of_averages(pool: nn.Module, expected: Any) -> None:
    graph = graph_of(nn.Sequential(nn.Conv2d(3, 4, 1), pool), torch.randn(2, 3, 8, 8))
    [node] = [node for node in graph.module.graph.nodes if "avg_pool2d" in str(node.target)]
    found = window(node)
    assert (found and tuple(found.values())) == expected
