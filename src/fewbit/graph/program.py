"""From a graph on codes to few operators: all that can be computed between two float values is one program.

What a program cannot express stays as it is: float operators, and what moves bytes.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from fewbit.graph.export import operator_of
from fewbit.graph.integers import first
from fewbit.ops.program import Kind, Step, Word, assemble

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # orders of an image's axes
MOST_AXES = 8
_permute = torch.ops.aten.permute.default
Order = tuple[int, ...]


def programmed(module: GraphModule, inputs: Sequence[Tensor]) -> tuple[GraphModule, frozenset[Node]]:
    """The same function as ``module``, a graph on codes, for any batch size that it works for; and which of its nodes are in
    programs now. ``inputs`` are an example."""
    reading = _Reading(module, inputs)
    return _Writing(reading).run(), frozenset(reading.drafts)


@dataclass(frozen=True)
class _Input:
    """As a word of a step: a float value from outside."""

    value: Node


@dataclass(frozen=True)
class _Draft:
    """A step; nodes among the words stand for the steps that make them."""

    kind: Kind
    words: tuple[Word | Node | _Input, ...]


@dataclass(frozen=True)
class _View:
    """The result of a step, with its axes in another order."""

    base: Node
    order: Order


class _Reading(Interpreter):
    """What programs can express of a graph, and when it can be computed."""

    def __init__(self, module: GraphModule, inputs: Sequence[Tensor]) -> None:
        super().__init__(module)
        self.tensors: dict[Node, Tensor] = {}  # on the meta device
        self.drafts: dict[Node, _Draft] = {}
        self.views: dict[Node, _View] = {}  # of nodes that are drafts or only show the result of one
        self.stages: dict[Node, int] = {}  # the programs that have to run before a node can be computed
        with torch.no_grad():
            super().run(*inputs)
        for node in self.graph.nodes:
            if (
                node.op == "call_function"
                and node.args
                and node in self.tensors
                and self.tensors[node].dim() <= MOST_AXES
            ):
                self._read(node)
            self.stages[node] = max((self._after(value, node) for value in self.operands(node)), default=0)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.tensors[n] = result.to("meta")
        return result

    def operands(self, node: Node) -> list[Node]:
        """What the node is computed from: sizes of a reshape do not count if they are known."""
        return [value for value in node.all_input_nodes if node not in self.views or value in self.tensors]

    def leaves_program(self, value: Node, node: Node) -> bool:
        """Whether the node reads a program's value from outside."""
        if value not in self.views or self.views[value].base not in self.drafts:
            return False
        inside = node in self.views and (node not in self.drafts or self.drafts[node].kind != Kind.QUANTIZE)
        return not inside or self.stages[value] != self.stages[node]

    def view(self, node: Any) -> _View:
        return self.views.get(node) or _View(node, _same(self.tensors[node].dim()))

    def shape(self, node: Any) -> tuple[int, ...]:
        return tuple(self.tensors[node].shape)

    def _after(self, value: Node, node: Node) -> int:
        self.stages[node] = self.stages[value]
        return self.stages[value] + self.leaves_program(value, node)

    def _read(self, node: Node) -> None:
        name, order = operator_of(node), _same(self.tensors[node].dim())
        draft = None
        if name == "quantize_uint8":
            draft = self._quantize(node)
        elif name in _PLAIN:
            if all(self._in_order(value) for value in node.all_input_nodes if value in self.tensors):
                draft = getattr(self, _PLAIN[name])(node)
        elif name == "lookup_uint8":
            draft = _Draft(Kind.LOOKUP, (first(node), self._constant(node.args[1])))
            order = self.view(first(node)).order
        elif name == "cat":
            draft, order = self._cat(node)
        elif isinstance(node.args[0], Node) and (node.args[0] in self.views or self._are_codes(node.args[0])):
            self._move(node, name)
        if draft is not None:
            self.drafts[node] = draft
            self.views[node] = _View(node, order)

    def _are_codes(self, node: Node) -> bool:
        return node in self.tensors and self.tensors[node].dtype == torch.uint8

    def _in_order(self, node: Any) -> bool:
        order = self.view(node).order
        return order == _same(len(order))

    def _constant(self, node: Any) -> Tensor:
        value: Tensor = operator.attrgetter(node.target)(self.module)
        return value

    def _quantize(self, node: Node) -> _Draft:
        x, scale, zero_point = _arguments(node)
        is_image = operator_of(x) == "permute" and tuple(x.args[1]) == TO_LAST
        return _Draft(Kind.QUANTIZE, (_Input(first(x) if is_image else x), int(is_image), scale, zero_point))

    def _layer(self, node: Node) -> _Draft:
        arguments = _all_arguments(node)
        x, packed, shape, multiplier, offset = arguments[:5]
        low, high, zero_point, other, other_multiplier, other_zero = arguments[-6:]
        stride, padding, dilation, groups, around = arguments[5:-6] or ([], [], [], 1, None)
        factors = self._constant(multiplier)
        weight = (
            *shape,
            groups,
            self._constant(packed),
            factors,
            self._constant(offset),
            int(bool(factors.abs().le(0.25).all())),
        )
        rescale = (float(low), float(high), -1 if zero_point is None else zero_point)
        words = (x, *weight, *rescale, -1 if other is None else other, float(other_multiplier), other_zero)
        if around is None:
            return _Draft(Kind.LINEAR, words)
        return _Draft(Kind.CONV, (*words, *stride, *padding, *dilation, around))

    def _add(self, node: Node) -> _Draft:
        a, b, a_multiplier, a_zero, b_multiplier, b_zero, low, high, zero_point = _arguments(node)
        factors = (float(a_multiplier), a_zero, float(b_multiplier), b_zero)
        return _Draft(Kind.ADD, (a, b, *factors, float(low), float(high), zero_point))

    def _average(self, node: Node) -> _Draft | None:
        x, kernel, stride, padding, count_padding, multiplier, *zero_points = _arguments(node)
        if not all(isinstance(size, int) for size in kernel):
            return None
        return _Draft(
            Kind.AVERAGE, (x, *kernel, *stride, *padding, int(count_padding), float(multiplier), *zero_points)
        )

    def _max_pool(self, node: Node) -> _Draft:
        x, *pairs, ceil_mode = _arguments(node)
        return _Draft(Kind.MAX_POOL, (x, *(size for pair in pairs for size in pair), int(ceil_mode)))

    def _dequantize(self, node: Node) -> _Draft:
        return _Draft(Kind.DEQUANTIZE, tuple(_arguments(node)))

    def _cat(self, node: Node) -> tuple[_Draft | None, Order]:
        values, axis = [*_arguments(node), 0][:2]
        order = self.view(values[0]).order
        if any(self.tensors[value].dtype != torch.uint8 or self.view(value).order != order for value in values):
            return None, order
        return _Draft(Kind.CAT, (order[axis], len(values), *values)), order

    def _move(self, node: Node, name: str) -> None:
        """What has one operand, of codes or a program's result."""
        value = first(node)
        seen, arguments = self.view(value), _arguments(node)[1:]
        if name == "permute":
            self.views[node] = _View(seen.base, tuple(seen.order[axis] for axis in arguments[0]))
        elif not self._are_codes(value):
            return
        elif name == "contiguous" and self._in_order(value) and seen.base in self.drafts:
            self.views[node] = seen
        elif self._keeps_bytes(seen) and _is_for_any_batch(node, name):
            before, after = self.shape(seen.base), self.shape(node)
            self.drafts[node] = _Draft(Kind.RESHAPE, (value, len(before), *before[1:], len(after), *after[1:]))
            self.views[node] = _View(node, _same(len(after)))

    def _keeps_bytes(self, seen: _View) -> bool:
        """Whether only axes of size one are in another place."""
        sizes = self.shape(seen.base)
        moved = [axis for axis in seen.order if axis == 0 or sizes[axis] != 1]
        return seen.order[:1] == (0,) and moved == sorted(moved)


_PLAIN = {  # operators that want their operands as they lie in memory
    "conv_uint8": "_layer",
    "linear_uint8": "_layer",
    "add_uint8": "_add",
    "average_uint8": "_average",
    "max_pool_uint8": "_max_pool",
    "dequantize_uint8": "_dequantize",
}


def _arguments(node: Node) -> list[Any]:
    return list(node.args)


def _all_arguments(node: Node) -> list[Any]:
    """With those that have names or are left out."""
    rest = node.target._schema.arguments[len(node.args) :]  # type: ignore[union-attr]
    return [*node.args, *(node.kwargs.get(argument.name, argument.default_value) for argument in rest)]


def _same(axes: int) -> Order:
    return tuple(range(axes))


def _is_for_any_batch(node: Node, name: str) -> bool:
    """Whether the node, if it only reshapes, leaves all but the first axis the sizes that they have for this batch."""
    if name in ("contiguous", "flatten"):
        return True
    if name not in ("view", "reshape"):
        return False
    sizes: Any = node.args[1]
    unknown = [size for size in sizes[1:] if not (isinstance(size, int) and size >= 0)]
    return not unknown or (
        unknown == [-1] and isinstance(sizes[0], Node)
    )  # the batch is given, so that the rest follows


class _Writing:
    """The graph with programs in place of what they express."""

    def __init__(self, reading: _Reading) -> None:
        self.reading = reading
        self.graph = Graph()
        self.programs: dict[str, Tensor] = {}
        self.copies: dict[Node, Node] = {}  # what has been made so far
        self.wanted = {  # results of programs
            reading.view(value).base
            for node in reading.graph.nodes
            for value in reading.operands(node)
            if reading.leaves_program(value, node)
        }

    def run(self) -> GraphModule:
        reading, stages = self.reading, defaultdict[int, list[Node]](list)
        *nodes, result = reading.graph.nodes
        for node in nodes:
            stages[reading.stages[node]].append(node)
        for stage in sorted(stages):
            for node in stages[stage]:
                if node not in reading.views:
                    self.copies[node] = self.graph.node_copy(node, self._outside)
            self._program([node for node in stages[stage] if node in reading.drafts])
        self.graph.node_copy(result, self._outside)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        names = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        attributes = {name: operator.attrgetter(name)(reading.module) for name in names - set(self.programs)}
        return GraphModule({**attributes, **self.programs}, self.graph)

    def _outside(self, node: Node) -> Node:
        if node not in self.copies:
            view = self.reading.view(node)
            self.copies[node] = self.copies[view.base]
            if view.order != _same(len(view.order)):
                self.copies[node] = self.graph.call_function(_permute, (self.copies[view.base], list(view.order)))
        return self.copies[node]

    def _program(self, nodes: list[Node]) -> None:
        wanted = [node for node in nodes if node in self.wanted]
        if not wanted:
            return
        places: dict[Node, int] = {}
        steps: list[Step] = []
        inputs: list[Node] = []

        def add(kind: Kind, words: Sequence[Word], node: Node, reads: Sequence[int] = ()) -> None:
            places[node] = len(steps)
            steps.append(Step(kind, tuple(words), tuple(reads), prod(self.reading.shape(node))))

        def input_of(node: Node) -> int:
            if node not in inputs:
                inputs.append(node)
            return inputs.index(node)

        for node in nodes:
            draft = self.reading.drafts[node]
            words: list[Word] = []
            reads: list[int] = []
            for word in draft.words:
                if isinstance(word, _Input):
                    words.append(input_of(word.value))
                elif isinstance(word, Node):
                    base = self.reading.view(word).base
                    if base not in places:
                        add(Kind.CODES, (input_of(base),), base)
                    reads.append(places[base])
                    words.append(places[base])
                else:
                    words.append(word)
            add(draft.kind, words, node, reads)
        name = f"program_{len(self.programs)}"
        self.programs[name] = assemble(steps, len(inputs), [places[node] for node in wanted])
        given = [self._outside(node) for node in inputs]
        call = self.graph.call_function(torch.ops.fewbit.run_program.default, (given, self.graph.get_attr(name)))
        for i, node in enumerate(wanted):
            self.copies[node] = self.graph.call_function(operator.getitem, (call, i))
