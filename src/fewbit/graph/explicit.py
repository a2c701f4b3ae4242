"""A graph with its quantization spelled out: quantize and dequantize around the values that are kept as codes.

This is the form that all engines are given, each in its own way: fewbit fuses it (``graph.fused``), ONNX files hold it as
QuantizeLinear and DequantizeLinear. As it stands it runs in PyTorch and computes in float what engines compute in integers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import fewbit.ops.channels
import fewbit.ops.codes  # noqa: F401
from fewbit.graph.export import operator_of
from fewbit.graph.integers import LAYERS, Graph, bounds, first, is_clamp

QUANTIZE = torch.ops.fewbit.quantize_uint8.default
DEQUANTIZE = torch.ops.fewbit.dequantize_uint8.default
DEQUANTIZE_CHANNELS = torch.ops.fewbit.dequantize_channels.default
LARGEST_BIAS = 2**30  # leaves room for the products in int32


@dataclass(frozen=True)
class IntegerLayer:
    """A convolution or linear layer: weight codes int8 of the weight's shape, their scales ``[O]``, bias ``[O]`` float or
    None, and the grid of its input as the quantized module has it."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    input_scale: float
    input_zero_point: int


def explicit(
    graph: Graph, layers: Mapping[str, IntegerLayer], results: Mapping[str, tuple[float, int]], wide_sums: bool = True
) -> GraphModule:
    """``graph`` with these layers and grids; ``graph`` itself is used up. ``results``: by value name, see ``Graph.names``.

    ``wide_sums``: the result of a convolution that only an addition reads is not rounded before it.
    """
    module = copy.copy(graph.module)
    inputs = graph.inputs()
    grids: dict[Node, tuple[float, int]] = {}
    for value, owner in graph.values.items():
        readers = inputs.get(owner)
        if readers:
            layer = layers[readers[0]]
            grids[value] = (layer.input_scale, layer.input_zero_point)
        elif graph.names.get(owner) in results:
            grids[value] = results[graph.names[owner]]
    for call, name in graph.layers.items():
        if first(call) in grids:
            _insert_weights(module, call, layers[name], grids[first(call)][0])
    wide = _wide(graph, grids) if wide_sums else set()
    for value, grid in grids.items():
        if value not in wide:
            _insert_grid(module, graph, value, grid)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _wide(graph: Graph, grids: Mapping[Node, tuple[float, int]]) -> set[Node]:
    """Convolutions that are added to codes and read by nothing else. Of two that are added to each other, the later one."""
    wide: set[Node] = set()
    owners = [owner for value, owner in graph.values.items() if owner is not value]
    for node in graph.carried:
        if operator_of(node) != "add" or node.args[0] is node.args[1]:
            continue
        if (node if node in grids else next(iter(node.users), None)) not in grids:
            continue
        terms = [term for term in node.args[:2] if isinstance(term, Node) and term in grids]
        convolutions = [
            term
            for term in terms
            if term in graph.layers
            and term.target is LAYERS[0]
            and first(term) in grids
            and list(term.users) == [node]
            and graph.values[term] is term
            and term not in owners
        ]
        if len(terms) == 2 and convolutions:
            wide.add(max(convolutions))
    return wide


def _insert_grid(module: GraphModule, graph: Graph, value: Node, grid: tuple[float, int]) -> None:
    """What was made of codes is read as codes by everyone; of other values only layers and what goes on in codes get them."""
    everyone = value in graph.carried
    layers = graph.layers
    readers = [
        user
        for user in value.users
        if everyone or user in graph.carried - layers.keys() or (user in layers and first(user) is value)
    ]
    with module.graph.inserting_after(value):
        codes = module.graph.call_function(QUANTIZE, (value, *grid))
    with module.graph.inserting_after(codes):
        rounded = module.graph.call_function(DEQUANTIZE, (codes, *grid))
    rounded.meta["val"] = value.meta["val"]
    for reader in readers:
        reader.replace_input_with(value, rounded)
    if is_clamp(value) and list(value.users) == [codes] and _is_implied(value, grid):
        codes.replace_input_with(value, first(value))
        module.graph.erase_node(value)


def _is_implied(clamp: Node, grid: tuple[float, int]) -> bool:
    """Whether the ends of the codes clamp to the same bounds or narrower ones."""
    scale, zero_point = grid
    low, high = (torch.tensor(end, dtype=torch.float32) for end in bounds(clamp))
    return bool(torch.round(low / scale) + zero_point <= 0) and bool(torch.round(high / scale) + zero_point >= 255)


def _insert_weights(module: GraphModule, call: Node, layer: IntegerLayer, input_scale: float) -> None:
    codes, scale, bias = integer_weights(layer, input_scale)
    stem = f"{call.name}_weights"
    call.update_arg(1, _constant(module, call, stem, codes, scale))
    if bias is not None:
        scale = (scale.double() * input_scale).float()
        call.update_arg(2, _constant(module, call, f"{call.name}_bias", bias, scale))


def integer_weights(layer: IntegerLayer, input_scale: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight codes, their scales, and the bias as int32 codes of the scale ``input_scale * scale``.

    Where the bias of a channel is too large for that, next to nothing weighs its weights: they get a coarser scale. Where they
    are all zero, any scale is theirs: that which the bias needs.
    """
    codes, scale, bias = layer.codes, layer.scale.float(), layer.bias
    if bias is None:
        return codes, scale, None
    least = bias.double().abs() / (input_scale * LARGEST_BIAS)
    empty = ~codes.flatten(1).any(1) & (least > torch.finfo(torch.float32).tiny)
    other = (least > scale) | empty
    if bool(other.any()):
        wider = torch.where(other, least.float(), scale)
        ratio = (scale / wider).reshape(-1, *[1] * (codes.ndim - 1))
        codes, scale = torch.round(codes * ratio).to(torch.int8), wider
    steps = torch.round(bias.double() / (scale.double() * input_scale))
    return codes, scale, steps.clamp(-LARGEST_BIAS, LARGEST_BIAS).to(torch.int32)


def _constant(module: GraphModule, before: Node, stem: str, codes: Tensor, scale: Tensor) -> Node:
    nodes: list[Any] = []
    with module.graph.inserting_before(before):
        for suffix, tensor in (("codes", codes), ("scale", scale)):
            module.register_buffer(f"{stem}_{suffix}", tensor)
            nodes.append(module.graph.get_attr(f"{stem}_{suffix}"))
        return module.graph.call_function(DEQUANTIZE_CHANNELS, tuple(nodes))
