"""PyTorch with fewbit's own integer kernels: one operator a layer, no compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from fewbit.batches import Call
from fewbit.graph import leaves
from fewbit.graph.fused import fused
from fewbit.targets.target import Operator, Target

# They move numbers or ask for a size.
MOVES = {"permute", "contiguous", "sym_size", "flatten", "reshape", "view", "getitem", "transpose"}


class PyTorch(Target):
    """The built-in target."""

    name = "torch"

    def compile(self, module: GraphModule, call: Call) -> tuple[Callable[..., Any], tuple[Operator, ...]]:
        graph = fused(module)
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        for node, value in zip(inputs, leaves((call.args, call.kwargs)), strict=True):
            if not isinstance(value, Tensor):  # a constant of the graph
                graph.graph.erase_node(node)
        # Flat arguments and results; weights found without nn.Module's lookup, which costs more than small operators do.
        graph.graph.set_codegen(CodeGen())
        graph.recompile()
        operators = tuple(
            Operator(node.name, _kind(node), _kind(node).endswith("_uint8"))
            for node in graph.graph.nodes
            if node.op == "call_function" and _kind(node) not in MOVES
        )
        return graph.forward, operators


def _kind(node: Node) -> str:
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))

