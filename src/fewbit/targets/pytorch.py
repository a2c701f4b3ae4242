"""PyTorch with fewbit's own integer kernels: one operator for all that happens between float values, no compilation."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from types import MethodType, SimpleNamespace
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from fewbit.batches import Call
from fewbit.graph import leaves
from fewbit.graph.fused import fused
from fewbit.graph.program import programmed
from fewbit.ops import native
from fewbit.targets.target import Operator, Target

# They move numbers or ask for a size.
MOVES = {"permute", "contiguous", "sym_size", "flatten", "reshape", "view", "getitem", "transpose"}


class PyTorch(Target):
    """The built-in target."""

    name = "torch"

    def compile(self, module: GraphModule, call: Call) -> tuple[Callable[..., Any], tuple[Operator, ...]]:
        graph = fused(module)
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        tensors = []
        for node, value in zip(inputs, leaves((call.args, call.kwargs)), strict=True):
            if isinstance(value, Tensor):
                tensors.append(value)
            else:  # a constant of the graph
                graph.graph.erase_node(node)
        graph.graph.set_codegen(CodeGen())  # flat arguments and results
        steps = [node for node in graph.graph.nodes if node.op == "call_function" and _kind(node) not in MOVES]
        in_int8 = frozenset(node for node in steps if _kind(node).endswith("_uint8"))
        if native.LOADED:
            graph, in_programs = programmed(graph, tensors)
            in_int8 |= in_programs
        return _function(graph), tuple(Operator(node.name, _kind(node), node in in_int8) for node in steps)


def _kind(node: Node) -> str:
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


def _function(module: GraphModule) -> Callable[..., Any]:
    """The graph's forward. Attributes are found without nn.Module's lookup, which costs more than small operators do."""
    values = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = attrgetter(str(node.target))(module)
            node.target = str(node.target).replace(".", "__")
            values[node.target] = value
    code = module.graph.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)
    return MethodType(names["forward"], SimpleNamespace(**values))
