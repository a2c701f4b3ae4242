"""Which values of a graph an engine keeps as 8-bit codes: the one place that decides it.

The input of every static layer is kept as codes. What is made of convolutions and leads to another layer stays in codes on
its way there: residual additions, concatenations, pooling, activations, and what only moves numbers. All else is float: an
encoder's additions, norms and attention between linear layers.

Values that are only moved on (max pooling, reshaping, concatenation) share one grid, so that nothing is rounded twice: that
of where they end up, which rounding commutes with, or that of the first one that has other readers too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from operator import attrgetter, getitem
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fewbit.graph.export import export, module_of, operator_of, signature, takes_any_batch, value_names

LAYERS = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
# Results are among the values of the input, or zero.
MOVES = {
    *("max_pool2d", "flatten", "view", "reshape", "permute", "transpose", "slice", "pad", "unsqueeze", "squeeze"),
    *("contiguous", "clone", "cat"),
}
CLAMPS = {"relu", "relu6", "hardtanh", "clamp", "clamp_min"}
AVERAGES = {"avg_pool2d", "adaptive_avg_pool2d", "mean"}
ELEMENTWISE = {"hardswish", "hardsigmoid", "silu", "sigmoid", "tanh", "gelu", "leaky_relu", "elu"}
DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
IDENTITIES = {*DROPOUTS, "alias", "detach"}


@dataclass(frozen=True)
class Graph:
    """A model's graph. ``layers``: the calls of static layers, with the module's name. ``values``: what is kept as codes,
    each with the value whose grid it has. ``carried``: what is made of convolutions by operators that engines have for
    codes. ``names``: what grids are called that are no layer's. ``signature``: of the arguments that it was made from."""

    module: GraphModule
    layers: Mapping[Node, str]
    values: Mapping[Node, Node]
    carried: Collection[Node]
    names: Mapping[Node, str]
    signature: tuple[Any, ...]
    any_batch: bool

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the graph can be run on these arguments."""
        return signature((args, kwargs), self.any_batch) == self.signature

    def inputs(self) -> dict[Node, list[str]]:
        """The values that layers read, with the layers' names."""
        readers: dict[Node, list[str]] = {}
        for call, name in self.layers.items():
            readers.setdefault(first(call), []).append(name)
        return readers

    def results(self) -> dict[Node, str]:
        """The other values that need a grid, with their names."""
        inputs = self.inputs()
        return {owner: self.names[owner] for owner in self.values.values() if owner not in inputs}


def read_graph(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layers: Collection[str]) -> Graph | str:
    """The graph of ``model`` on these inputs, or why there is none. ``layers``: the modules with a static input."""
    program = export(model, args, kwargs)
    if isinstance(program, str):
        return program
    any_batch = takes_any_batch(program)
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    if reason := _make_functional(module):
        return reason
    _drop_identities(module)
    _spell_padding(module)
    found = ((node, _layer_of(node, model, module)) for node in module.graph.nodes)
    calls = {node: name for node, name in found if name is not None and name in layers}
    made_for = signature((args, kwargs), any_batch)
    carried = _carried(module.graph, calls)
    values = _values(module.graph, calls, carried)
    return Graph(module, calls, values, carried, value_names(module.graph), made_for, any_batch)


def first(node: Node) -> Node:
    """The value that an operator is about: its first argument."""
    value = node.args[0]
    assert isinstance(value, Node)
    return value


def bounds(node: Node) -> tuple[float, float]:
    """The least and the largest result of an operator of CLAMPS."""
    arguments = [*node.args[1:]]
    name = operator_of(node)
    if name in ("relu", "relu6"):
        return 0.0, 6.0 if name == "relu6" else torch.inf
    defaults: list[Any] = [-1.0, 1.0] if name == "hardtanh" else [None, None]
    for index, key in enumerate(("min_val", "max_val") if name == "hardtanh" else ("min", "max")):
        if index < len(arguments):
            defaults[index] = arguments[index]
        defaults[index] = node.kwargs.get(key, defaults[index])
    low, high = defaults
    return (-torch.inf if low is None else float(low)), (torch.inf if high is None else float(high))


def is_clamp(node: Node) -> bool:
    if operator_of(node) not in CLAMPS or node.op != "call_function":
        return False
    return all(isinstance(end, (int, float, type(None))) for end in (*node.args[1:], *node.kwargs.values()))


def before_clamp(node: Node) -> Node | None:
    """The clamp that is the only reader of this value, so that the value itself is never needed."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_clamp(users[0]) else None


def _layer_of(call: Node, model: nn.Module, module: GraphModule) -> str | None:
    """The first name of the module that makes this call with its own weight."""
    weight = call.args[1] if call.target in LAYERS else None
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return None
    if call.target is LAYERS[0] and first(call).meta["val"].dim() != 4:  # an image without batch
        return None
    owner = model.get_submodule(module_of(call))
    own = owner._parameters.get("weight")
    if own is None or own.data_ptr() != attrgetter(str(weight.target))(module).data_ptr():
        return None
    return next(name for name, found in model.named_modules() if found is owner)


def _make_functional(module: GraphModule) -> str:
    """Operators that write to their first argument replaced by those that do not; who reads it later reads the result.

    Returns why that cannot be, "" if it can: what is written to is read later as another view of the same memory.
    """
    for node in list(module.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.name.endswith("_") or schema.name.endswith("__"):
            continue
        namespace, name = schema.name.split("::")
        functional = getattr(getattr(torch.ops, namespace), name[:-1], None)
        overload = node.target._overloadname or "default"
        written = first(node)
        others = _views(_base(written)) - {written, node}
        if (
            functional is None
            or overload not in functional.overloads()
            or any(node < u for v in others for u in v.users)
        ):
            return f"{operator_of(node)} writes to memory that is read in another shape: write {operator_of(node)}(x) there"
        for user in list(written.users):
            if node < user:
                user.replace_input_with(written, node)
        node.target = getattr(functional, overload)
    return ""


def _base(value: Node) -> Node:
    """What a value is a view of."""
    while _is_view(value):
        value = first(value)
    return value


def _views(base: Node) -> set[Node]:
    """A value and all views of it."""
    return {base}.union(*(_views(user) for user in base.users if _is_view(user) and first(user) is base))


def _is_view(node: Node) -> bool:
    if node.target is getitem:
        return True
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return bool(node.args) and any(part.alias_info is not None and not part.alias_info.is_write for part in returns)


def _drop_identities(module: GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.op == "call_function" and operator_of(node) in IDENTITIES:
            if operator_of(node) not in DROPOUTS or node.args[2] is False:
                node.replace_all_uses_with(first(node))
                module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _spell_padding(module: GraphModule) -> None:
    """The paddings "same" and "valid" of convolutions as numbers, what is odd of them as a pad before."""
    for node in list(module.graph.nodes):
        if node.target is not torch.ops.aten.conv2d.padding:
            continue
        x, weight = node.args[:2]
        names = ("bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, node.args[2:], strict=False)) | dict(node.kwargs)
        kernel, dilation = weight.meta["val"].shape[2:], _pair(given.get("dilation", 1))
        total = [(kernel[i] - 1) * dilation[i] if given.get("padding") == "same" else 0 for i in (0, 1)]
        if total[0] % 2 or total[1] % 2:
            *outer, height, width = x.meta["val"].shape
            value = x.meta["val"].new_empty(*outer, height + total[0] % 2, width + total[1] % 2)
            with module.graph.inserting_before(node):
                x = module.graph.call_function(torch.ops.aten.pad.default, (x, [0, total[1] % 2, 0, total[0] % 2]))
            x.meta = {**node.meta, "val": value}
        padding = [total[0] // 2, total[1] // 2]
        node.target = torch.ops.aten.conv2d.default
        node.args = (
            x,
            weight,
            given.get("bias"),
            _pair(given.get("stride", 1)),
            padding,
            dilation,
            given.get("groups", 1),
        )
        node.kwargs = {}


def _carried(graph: torch.fx.Graph, layers: Mapping[Node, str]) -> set[Node]:
    inputs = {first(call) for call in layers}  # codes already: one of them may be the other term of an addition
    carried: set[Node] = set()
    for node in graph.nodes:
        is_conv = node in layers and node.target == LAYERS[0]
        if is_conv or (_can_carry(node) and _operands(node) <= carried | inputs and _operands(node) & carried):
            carried.add(node)
    return carried


def _values(graph: torch.fx.Graph, layers: Mapping[Node, str], carried: set[Node]) -> dict[Node, Node]:
    useful: set[Node] = set()
    for node in reversed(graph.nodes):
        readers = list(node.users)
        if any(
            (reader in layers and first(reader) is node) or (reader in carried and reader in useful)
            for reader in readers
        ):
            useful.add(node)
    inputs = {first(call) for call in layers}
    kept = {node for node in carried & useful if before_clamp(node) is None} | inputs
    order = [node for node in graph.nodes if node in kept]
    group = {node: node for node in order}
    for node in order:
        if node.op == "call_function" and operator_of(node) in MOVES:
            alone = operator_of(node) != "cat"
            for value in _operands(node) & kept:
                if alone or len(value.users) == 1:
                    _join(group, value, node)
    owners: dict[Node, Node] = {}  # by the group's representative
    for node in order:
        root = _root(group, node)
        if root not in owners or len(owners[root].users) == 1:
            owners[root] = node
    return {node: owners[_root(group, node)] for node in order}


def _root(group: dict[Node, Node], node: Node) -> Node:
    while group[node] is not node:
        node = group[node]
    return node


def _join(group: dict[Node, Node], first: Node, second: Node) -> None:
    group[_root(group, first)] = _root(group, second)


def _operands(node: Node) -> set[Node]:
    """The values that a carrying operator works on."""
    given = (
        node.args[0] if operator_of(node) == "cat" else node.args[:2] if operator_of(node) == "add" else node.args[:1]
    )
    return {value for value in given if isinstance(value, Node)}  # type: ignore[union-attr]


def _can_carry(node: Node) -> bool:
    if node.op != "call_function":
        return False
    name = operator_of(node)
    if name == "add":
        values = node.args[:2]
        shapes = [value.meta["val"].shape for value in values if isinstance(value, Node)]
        return len(shapes) == 2 and shapes[0] == shapes[1] and not node.kwargs and len(node.args) == 2
    if name == "pad":
        arguments = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | dict(node.kwargs)
        return arguments.get("mode", "constant") == "constant" and not arguments.get("value")
    if name == "max_pool2d":
        return True
    if name in AVERAGES:
        return window(node) is not None
    return is_clamp(node) or name in MOVES or name in ELEMENTWISE


def window(node: Node) -> dict[str, Any] | None:
    """What an operator of AVERAGES does, as the arguments of average_uint8; None if it is something else.

    ``kernel`` None: all positions.
    """
    name = operator_of(node)
    arguments = dict(zip(_SIGNATURES[name], node.args[1:], strict=False)) | dict(node.kwargs)
    everything = {"kernel": None, "stride": [1, 1], "padding": [0, 0], "count_include_pad": True}
    if name == "adaptive_avg_pool2d":
        return everything if arguments["output_size"] in ([1, 1], [1], 1) else None
    if name == "mean":
        dims = arguments.get("dim")
        rank = first(node).meta["val"].dim()
        axes = sorted(axis % rank for axis in dims) if isinstance(dims, (list, tuple)) else None
        return everything if rank == 4 and axes == [2, 3] and arguments.get("dtype") is None else None
    if arguments.get("ceil_mode") or arguments.get("divisor_override") is not None:
        return None
    kernel = _pair(arguments["kernel_size"])
    stride = _pair(arguments.get("stride") or kernel)
    padding = _pair(arguments.get("padding", 0))
    return {
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "count_include_pad": bool(arguments.get("count_include_pad", True)),
    }


_SIGNATURES = {
    "avg_pool2d": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive_avg_pool2d": ("output_size",),
    "mean": ("dim", "keepdim"),
}


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values
