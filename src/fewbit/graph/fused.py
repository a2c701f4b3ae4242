"""From the explicit form to a graph on codes: each layer with what follows it is one integer operator, all on codes.

Images are kept in channels-last order; whatever reads or moves them is shown the order it expects.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fewbit.graph.explicit import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE
from fewbit.graph.export import operator_of
from fewbit.graph.integers import AVERAGES, CLAMPS, ELEMENTWISE, LAYERS, MOVES, bounds, first, is_clamp, window

_aten = torch.ops.aten
_fewbit = torch.ops.fewbit
Grid = tuple[float, int]


def fused(module: GraphModule) -> GraphModule:
    """The same function as ``module``, a graph in explicit form, to the last bit of every code but for float rounding
    before a code is chosen. Weights are packed for the CPU at hand."""
    return _Fusion(module).run()


class _Fusion:
    def __init__(self, source: GraphModule) -> None:
        self.source = source
        self.graph = Graph()
        self.graph.set_codegen(source.graph._codegen)
        self.made: dict[str, Tensor] = {}  # new attributes
        self.copies: dict[Node, Node] = {}  # float values, and codes in the order that the source has them
        self.codes: dict[Node, Node] = {}  # of dequantize nodes: codes, images channels-last

    def run(self) -> GraphModule:
        for node in self.source.graph.nodes:
            if node.target is QUANTIZE:
                self.codes[node] = self._quantized(node)
            elif node.target in (DEQUANTIZE, DEQUANTIZE_CHANNELS) or self._is_part(node):
                continue  # made where it is needed
            elif node.target is _aten.sym_size.int and isinstance(node.args[0], Node) and _is_code(node.args[0]):
                axis = (0, 3, 1, 2)[node.args[1]] if self._is_image(first(node)) else node.args[1]
                self.copies[node] = self.graph.call_function(node.target, (self.codes[first(first(node))], axis))
            elif _is_layer(node):
                self.copies[node] = self._layer(node, node, None)
            else:
                self.copies[node] = self.graph.node_copy(node, self._float)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        names = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        return GraphModule({name: self._value(name) for name in sorted(names)}, self.graph)

    def _value(self, name: str) -> Any:
        return self.made[name] if name in self.made else operator.attrgetter(name)(self.source)

    def _is_part(self, node: Node) -> bool:
        """Whether the node is computed only as a part of the operator that makes codes of it."""
        users = list(node.users)
        if len(users) != 1 or node.op != "call_function":
            return False
        if users[0].target is QUANTIZE:
            return self._handler(node) is not None
        if _summed(users[0]) is node:
            return self._is_part(users[0])
        return is_clamp(users[0]) and self._is_part(users[0]) and _source(users[0]) is node

    def _handler(self, node: Node) -> Callable[[Node, Node, Grid], Node] | None:
        """What makes codes of this node's result, if it has only codes to work on."""
        if node.op != "call_function":
            return None
        made = _source(node)
        if _is_layer(made):
            return self._layer
        if _is_addition(made):
            return self._add
        name = operator_of(node)
        given = node.args[0] if name == "cat" else node.args[:1]
        if not _are_codes(given):
            return None
        if name in AVERAGES and self._is_image(first(node)):
            return self._average
        if name == "cat":
            return self._cat
        if name in MOVES:
            return self._move
        if name in ELEMENTWISE or name in CLAMPS:
            return self._lookup
        return None

    def _quantized(self, node: Node) -> Node:
        value = first(node)
        grid: Grid = (node.args[1], node.args[2])  # type: ignore[assignment]
        handler = self._handler(value)
        if handler is not None and list(value.users) == [node]:
            call = _source(value)
            codes = handler(call, value, grid)
            in_order = call.target is LAYERS[1] or handler == self._move
            if value.meta["val"].dim() == 4 and not in_order and not self._is_image(node):
                codes = self._call(_aten.contiguous.default, self._call(_aten.permute.default, codes, [0, 3, 1, 2]))
            return codes
        x = self._float(value)
        if self._is_image(node):
            x = self._call(_aten.permute.default, x, [0, 2, 3, 1])
        return self._call(QUANTIZE, x, *grid)

    def _is_image(self, node: Node) -> bool:
        """Whether codes, given as the node that makes them or as their dequantize node, are kept channels-last: all with
        four axes that are not for linear layers alone."""
        codes = first(node) if node.target is DEQUANTIZE else node
        readers = [reader for rounded in codes.users for reader in rounded.users]
        return first(codes).meta["val"].dim() == 4 and not all(reader.target == LAYERS[1] for reader in readers)

    def _layer(self, call: Node, end: Node, grid: Grid | None, other: Node | None = None) -> Node:
        """A layer with its clamp, to codes or (without a grid) to float. ``other``: codes that are added before the clamp."""
        scale_in, zero_in = _grid(first(call))
        weight, bias = call.args[1], call.args[2] if len(call.args) > 2 else None
        codes, scale = self._constants(weight)
        sums = codes.flatten(1).sum(1, dtype=torch.int64)
        offset = -zero_in * sums
        if isinstance(bias, Node):
            offset = offset + self._constants(bias)[0]
        low, high = bounds(end) if is_clamp(end) else (-math.inf, math.inf)
        multiplier = scale * _float32(scale_in)  # in the order that ONNX Runtime rounds in
        zero_point = None
        if grid is not None:
            multiplier = multiplier / _float32(grid[0])
            zero_point = grid[1]
            low, high = (float(min(255, max(0, _step(bound, grid)))) for bound in (low, high))
        is_conv = call.target is LAYERS[0]
        shape = list(codes.shape) if is_conv else [*codes.shape, 1, 1]
        stride, padding, dilation, groups = _geometry(call) if is_conv else ([1, 1], [0, 0], [1, 1], 1)
        packed = _fewbit.pack_uint8(codes.reshape(shape), groups)
        numbers = [
            self._attribute(f"{call.name}_{name}", tensor)
            for name, tensor in (
                ("packed", packed),
                ("multiplier", multiplier),
                ("offset", offset.to(torch.int32)),
            )
        ]
        rescale = (low, high, zero_point)
        x = self.codes[first(first(call))]
        if not is_conv and self._is_image(first(call)):
            x = self._call(_aten.contiguous.default, self._call(_aten.permute.default, x, [0, 3, 1, 2]))
        if is_conv:
            place = (stride, padding, dilation, groups, zero_in)
            added: tuple[Any, ...] = ()
            if other is not None and grid is not None:
                added = (self.codes[first(other)], _ratio(other, grid), other.args[2])
            y = self._call(_fewbit.conv_uint8.default, x, numbers[0], shape, *numbers[1:], *place, *rescale, *added)
            return y if grid is not None else self._call(_aten.permute.default, y, [0, 3, 1, 2])
        y = self._call(_fewbit.linear_uint8.default, x, numbers[0], shape, *numbers[1:], *rescale)
        if grid is not None and self._is_image(next(iter(end.users))):
            y = self._call(_aten.contiguous.default, self._call(_aten.permute.default, y, [0, 2, 3, 1]))
        return y

    def _add(self, call: Node, end: Node, grid: Grid) -> Node:
        layer = _summed(call)
        if layer is not None:
            return self._layer(layer, end, grid, next(term for term in _terms(call) if term is not layer))
        terms = _terms(call)
        factors: list[Any] = []
        for term in terms:
            factors += [_ratio(term, grid), term.args[2]]
        low, high = bounds(end) if is_clamp(end) else (-math.inf, math.inf)
        ends = (float(min(255, max(0, _step(bound, grid)))) for bound in (low, high))
        codes = [self.codes[first(term)] for term in terms]
        return self._call(_fewbit.add_uint8.default, *codes, *factors, *ends, grid[1])

    def _average(self, call: Node, end: Node, grid: Grid) -> Node:
        found = window(call)
        assert found is not None
        codes = self.codes[first(first(call))]
        kernel: Any = found["kernel"]
        if kernel is None:
            kernel = [self._call(_aten.sym_size.int, codes, axis) for axis in (1, 2)]
            sizes = first(call).meta["val"].shape[2:]
            if all(isinstance(size, int) for size in sizes):
                kernel = list(sizes)
        _, zero_in = _grid(first(call))
        multiplier = _ratio(first(call), grid)
        around = (found["stride"], found["padding"], found["count_include_pad"])
        y = self._call(_fewbit.average_uint8.default, codes, kernel, *around, multiplier, zero_in, grid[1])
        if operator_of(call) == "mean" and not (len(call.args) > 2 and call.args[2]) and not call.kwargs.get("keepdim"):
            return self._call(_aten.flatten.using_ints, y, 1)
        return y

    def _cat(self, call: Node, end: Node, grid: Grid) -> Node:
        values: Any = call.args[0]
        codes = [self._regridded(value, grid) for value in values]
        axis: Any = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
        if self._is_image(values[0]):
            axis = (0, 3, 1, 2)[axis % 4]
        return self._call(_aten.cat.default, codes, axis)

    def _move(self, call: Node, end: Node, grid: Grid) -> Node:
        codes = self._regridded(first(call), grid)
        if self._is_image(first(call)) and operator_of(call) != "max_pool2d":
            codes = self._call(_aten.permute.default, codes, [0, 3, 1, 2])
        arguments = [self._size(argument) for argument in call.args[1:]]
        name = operator_of(call)
        if name == "max_pool2d":
            return self._call(
                _fewbit.max_pool_uint8.default, codes, *_pooling(*arguments, **dict[str, Any](call.kwargs))
            )
        function = _aten.reshape.default if name == "view" else call.target
        kwargs = dict(call.kwargs)
        if name == "pad":
            function, arguments, kwargs = _aten.constant_pad_nd.default, [arguments[0], grid[1]], {}
        moved = self._call(function, codes, *arguments, **kwargs)
        if self._is_image(next(iter(end.users))):
            moved = self._call(_aten.permute.default, moved, [0, 2, 3, 1])
        return self._call(_aten.contiguous.default, moved)

    def _lookup(self, call: Node, end: Node, grid: Grid) -> Node:
        value = first(end)
        every = torch.arange(256, dtype=torch.uint8)
        function: Any = end.target
        results = function(DEQUANTIZE(every, *value.args[1:3]), *end.args[1:], **end.kwargs)
        table = self._attribute(f"{end.name}_table", QUANTIZE(results, *grid))
        return self._call(_fewbit.lookup_uint8.default, self.codes[first(value)], table)

    def _regridded(self, value: Node, grid: Grid) -> Node:
        """The codes of a dequantize node, on another grid if that is not its own."""
        codes = self.codes[first(value)]
        if tuple(value.args[1:3]) == grid:
            return codes
        every = torch.arange(256, dtype=torch.uint8)
        table = self._attribute(f"{value.name}_table", QUANTIZE(DEQUANTIZE(every, *value.args[1:3]), *grid))
        return self._call(_fewbit.lookup_uint8.default, codes, table)

    def _float(self, node: Node) -> Node:
        """A value of the source as it is there."""
        if node not in self.copies:
            if node.target is DEQUANTIZE_CHANNELS:
                self.copies[node] = self.graph.node_copy(node, self._float)
            else:
                assert node.target is DEQUANTIZE, node
                value = self._call(DEQUANTIZE, self.codes[first(node)], *node.args[1:])
                if self._is_image(node):
                    value = self._call(_aten.permute.default, value, [0, 3, 1, 2])
                self.copies[node] = value
        return self.copies[node]

    def _size(self, argument: Any) -> Any:
        return torch.fx.node.map_arg(argument, lambda node: self.copies[node])

    def _constants(self, node: Any) -> tuple[Tensor, Tensor]:
        codes, scale = (self.source.get_buffer(str(argument.target)) for argument in node.args)
        return codes, scale

    def _attribute(self, name: str, tensor: Tensor) -> Node:
        name = f"fewbit_{name}"
        self.made[name] = tensor.contiguous()
        return self.graph.get_attr(name)

    def _call(self, function: Any, *arguments: Any, **keywords: Any) -> Node:
        return self.graph.call_function(function, arguments, keywords)


def _source(node: Node) -> Node:
    """What a clamp is applied to, if that is computed together with it; else the node itself."""
    if is_clamp(node):
        value = first(node)
        if list(value.users) == [node] and (_is_layer(value) or _is_addition(value)):
            return value
    return node


def _is_addition(node: Node) -> bool:
    """Whether this adds codes to codes, or to what a layer makes for it."""
    return operator_of(node) == "add" and (_are_codes(node.args[:2]) or _summed(node) is not None)


def _summed(node: Node) -> Node | None:
    """The convolution whose result an addition to codes is the only reader of."""
    if operator_of(node) != "add" or len(terms := _terms(node)) != 2:
        return None
    layer, other = terms if _is_code(terms[1]) else reversed(terms)
    fits = _is_code(other) and _is_layer(layer) and layer.target is LAYERS[0] and list(layer.users) == [node]
    return layer if fits else None


def _terms(node: Node) -> list[Node]:
    return [value for value in node.args[:2] if isinstance(value, Node)]


def _is_code(value: Any) -> bool:
    return isinstance(value, Node) and value.target is DEQUANTIZE


def _are_codes(values: Any) -> bool:
    return bool(values) and all(_is_code(value) for value in values)


def _is_layer(node: Node) -> bool:
    """Whether this is a layer on codes, with integer weights and bias."""
    if node.target not in LAYERS or not _is_code(node.args[0]):
        return False
    constants = [argument for argument in node.args[1:3] if argument is not None]
    return all(isinstance(argument, Node) and argument.target is DEQUANTIZE_CHANNELS for argument in constants)


def _geometry(call: Node) -> tuple[Any, Any, Any, int]:
    arguments: list[Any] = [*call.args[3:], *[None] * 4][:4]
    names = ("stride", "padding", "dilation", "groups")
    given = [call.kwargs.get(name, value) for name, value in zip(names, arguments, strict=True)]
    defaults: tuple[Any, ...] = ([1, 1], [0, 0], [1, 1], 1)
    values: list[Any] = [default if value is None else value for value, default in zip(given, defaults, strict=True)]
    pairs = [list(value) * (2 // len(value)) for value in values[:3]]
    return pairs[0], pairs[1], pairs[2], values[3]


def _step(bound: float, grid: Grid) -> float:
    """The code of a bound, unclamped; infinite for none."""
    if math.isinf(bound):
        return bound
    return float(torch.round(torch.tensor(bound, dtype=torch.float32) / grid[0])) + grid[1]


def _float32(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _pooling(
    kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> tuple[Any, ...]:
    """The arguments of max_pool_uint8."""
    values = (kernel_size, stride or kernel_size, padding, dilation)
    pairs = [[value] if isinstance(value, int) else list(value) for value in values]
    return (*(pair * (2 // len(pair)) for pair in pairs), ceil_mode)


def _grid(value: Node) -> Grid:
    """Scale and zero point of a quantize or dequantize node."""
    scale, zero_point = value.args[1:3]
    assert isinstance(scale, float) and isinstance(zero_point, int)
    return scale, zero_point


def _ratio(value: Node, grid: Grid) -> float:
    """The scale of a dequantize node in steps of the grid."""
    return float(_float32(value.args[1]) / _float32(grid[0]))
