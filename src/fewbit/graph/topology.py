"""Who feeds whom, read from torch.export: the one place that looks at graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from fewbit.graph.export import export, module_of, operator_of


@dataclass(frozen=True)
class Call:
    """One call of an operator on parameters of a module."""

    operator: str  # aten's name without overload: "conv2d", "batch_norm", "linear"
    module: str  # the module that owns its weight
    alone: bool  # in that module's own forward, and nothing else reads the parameters
    feeds: tuple[Call | None, ...]  # the calls that read its result; None for any other reader


@dataclass(frozen=True)
class Topology:
    """The operators of a model that own parameters, in order of execution, and which module feeds which.

    ``flows``: (a, b) if in the forward of module b something is read that was made in that of a, each the innermost one.
    What comes from outside, goes out or happens in the model's own forward has the name ""; here a module of several names
    has the first of them.
    """

    calls: tuple[Call, ...]
    flows: frozenset[tuple[str, str]] = frozenset()

    def calls_of(self, module: str) -> list[Call]:
        return [call for call in self.calls if call.module == module]

    def sources(self, module: str) -> set[str]:
        """The modules whose results ``module`` reads: itself too if it reads those of another of its calls."""
        return {source for source, reader in self.flows if reader == module}

    def readers(self, module: str) -> set[str]:
        """The modules that read results of ``module``: itself too if another of its calls reads them."""
        return {reader for source, reader in self.flows if source == module}


def read_topology(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Topology | str:
    """The topology of ``model`` in eval mode on these inputs, or why torch.export cannot give it."""
    program = export(model, args, kwargs)
    if isinstance(program, str):
        return program
    signature = program.graph_signature
    owners = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    calls: dict[Node, Call] = {}
    for node in reversed(program.graph.nodes):
        owner = _owner(node, owners)
        if owner is not None:
            feeds = tuple(calls.get(user) for user in node.users)
            calls[node] = Call(operator_of(node), owner, _is_alone(node, owner, owners), feeds)
    first_names = {module: name for name, module in model.named_modules()}
    names = {name: first_names[module] for name, module in model.named_modules(remove_duplicate=False)}

    def made_in(node: Node) -> str:
        return names.get(module_of(node), module_of(node))

    pairs = ((node, user) for node in program.graph.nodes for user in node.users)
    flows = ((made_in(node), made_in(user)) for node, user in pairs if not _in_one_call(node, user))
    return Topology(tuple(reversed(calls.values())), frozenset(flows))


def _in_one_call(node: Node, user: Node) -> bool:
    """Whether both were made in one call of the same module: torch numbers the calls in the keys."""
    return list(node.meta.get("nn_module_stack", ())) == list(user.meta.get("nn_module_stack", ()))


def _owner(node: Node, owners: dict[str, str]) -> str | None:
    """The module whose parameter or buffer the operator takes as an argument after its first."""
    if node.op != "call_function":
        return None
    for argument in node.args[1:]:
        if isinstance(argument, Node) and argument.name in owners:
            return owners[argument.name].rpartition(".")[0]
    return None


def _is_alone(node: Node, owner: str, owners: dict[str, str]) -> bool:
    parameters = [argument for argument in node.args if isinstance(argument, Node) and argument.name in owners]
    inside = bool(node.meta.get("nn_module_stack")) and module_of(node) == owner
    return inside and all(len(parameter.users) == 1 for parameter in parameters)
