"""The graph of a model's forward as torch.export sees it, with a name for every value in it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree


def export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram | str:
    """``model`` in eval mode on these inputs, for any batch size if it can be; or why torch.export cannot do it.

    The batch is the first axis of every input tensor that agrees in it with the others.
    """
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    reason = ""
    try:
        for dynamic in (True, False):
            try:
                # torch.export writes the graph of what does not export to standard error.
                with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
                    warnings.simplefilter("ignore")
                    if not dynamic:
                        return torch.export.export(model, args, kwargs, strict=False)
                    wider = _several((args, kwargs))
                    if wider is not None:
                        shapes = _signature_shapes(model, *wider)
                        program = torch.export.export(model, *wider, dynamic_shapes=shapes, strict=False)
                        if takes_any_batch(program):
                            return program
            # torch.export raises whatever the model's own code raises on traced values: any of it means "does not export".
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[0]
                reason = f"torch.export: {type(error).__name__}: {first[:200]}"
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return reason


def takes_any_batch(program: torch.export.ExportedProgram) -> bool:
    """Whether all inputs have a first axis that may be of any size from two on."""
    inputs = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    given = [inputs[str(name)] for name in program.graph_signature.user_inputs if str(name) in inputs]
    sizes = [x.shape[0] for x in given if isinstance(x, Tensor) and x.dim()]
    # A size that the model's code fixed is still a SymInt, of a number or of a symbol with bounds.
    ranges = [None if isinstance(size, int) else program.range_constraints.get(size.node.expr) for size in sizes]
    return bool(ranges) and all(r is not None and r.lower <= 2 and bool(r.upper > 2**40) for r in ranges)


def leaves(inputs: Any) -> list[Any]:
    """What a graph takes for these arguments, in order: tensors and constants."""
    return list(pytree.tree_leaves(inputs))


def signature(inputs: Any, any_batch: bool) -> tuple[Any, ...]:
    """The structure, dtypes and shapes of arguments; with ``any_batch`` without the first axes."""
    found = [
        (x.dtype, tuple(x.shape[1:] if any_batch else x.shape)) if isinstance(x, Tensor) else x for x in leaves(inputs)
    ]
    return (str(pytree.tree_structure(inputs)), *found)


def batch_size(inputs: Any) -> int | None:
    """The size of the first axis that all tensors with axes share; None if they have none in common."""
    sizes = {len(x) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() > 0}
    return sizes.pop() if len(sizes) == 1 else None


def _several(inputs: tuple[Any, Any]) -> tuple[Any, Any] | None:
    """The inputs with a batch of at least two: torch.export takes a size of one for a constant."""
    size = batch_size(inputs)
    if size is None:
        return None
    if size >= 2:
        return inputs
    widened: tuple[Any, Any] = pytree.tree_map_only(
        Tensor, lambda x: torch.cat([x, x]) if x.dim() and size == 1 else x, inputs
    )
    return widened if size == 1 else None


def _signature_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    import inspect

    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments

    def shape(x: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(x, Tensor) and x.dim() else None

    return {name: pytree.tree_map(shape, value) for name, value in bound.items()}


def value_names(graph: torch.fx.Graph) -> dict[Node, str]:
    """A name for the result of every operator: "module:operator", from the second such on "module:operator.1" and so on.

    They depend on the model's code alone, not on how torch numbers its nodes.
    """
    counts: Counter[str] = Counter()
    names: dict[Node, str] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            name = f"{module_of(node)}:{operator_of(node)}"
            names[node] = f"{name}.{counts[name]}" if counts[name] else name
            counts[name] += 1
    return names


def module_of(node: Node) -> str:
    """The innermost module in whose forward the node was made."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def operator_of(node: Node) -> str:
    """aten's name without overload: "conv2d", "add"."""
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target))).rstrip("_")


class Watched(Interpreter):
    """The model, run node by node; ``watch(node, tensor)`` is called with every floating-point tensor that is made."""

    def __init__(self, module: GraphModule, watch: Callable[[Node, Tensor], None]) -> None:
        super().__init__(module)
        self._watch = watch

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op != "output" and isinstance(result, Tensor) and result.is_floating_point():
            self._watch(n, result)
        return result
