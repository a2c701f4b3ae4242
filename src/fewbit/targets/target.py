"""What a target is: an engine that runs a quantized model in integers."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fewbit.batches import Call
from fewbit.errors import CalibrationError, FewbitError, UnsupportedError
from fewbit.graph import leaves, signature


@dataclass(frozen=True)
class Operator:
    """One thing that the engine really runs: its own name for it, its kind, and whether it works on 8-bit integers."""

    name: str
    kind: str
    is_int8: bool


class Target(ABC):
    """An engine: what it needs to be installed, and how it gets and runs a graph in explicit form."""

    name: str
    packages: tuple[str, ...] = ()
    extra: str = ""  # of fewbit, that installs the packages
    wide_sums = True  # whether it adds a convolution's result to codes before it rounds

    def missing(self) -> str | None:
        """Why it cannot be used here, and what to do; None if it can."""
        absent = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if not absent:
            return None
        return f"target {self.name!r} needs {', '.join(absent)}: pip install 'fewbit[{self.extra}]'."

    @abstractmethod
    def compile(self, module: GraphModule, call: Call) -> tuple[Callable[..., Any], tuple[Operator, ...]]:
        """A function of the tensors among the model's inputs, in order, that returns its output tensors; and what it runs."""


class Lowered(nn.Module):
    """A quantized model as one engine runs it: called as the model is, for any batch size if ``any_batch``.

    ``operators`` are those the engine runs; ``difference`` is the relative L2 distance of its outputs from those of fewbit's
    own integer kernels on the example inputs (0 for target "torch").
    """

    def __init__(
        self,
        target: str,
        run: Callable[..., Any],
        operators: tuple[Operator, ...],
        inputs: tuple[Any, ...],
        any_batch: bool,
        structure: Any,
    ) -> None:
        super().__init__()
        self.target = target
        self.operators = operators
        self.any_batch = any_batch
        self.difference = 0.0
        self._run = run
        self._signature = inputs
        self._structure = structure
        self._is_tensor = structure.is_leaf()
        skip = 1 if any_batch else 0
        # The common case, checked without walking through the arguments: tensors only.
        self._skip = skip
        self._shapes = [part[1] if isinstance(part, tuple) else None for part in inputs[1:]]
        self.train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != len(self._shapes) or not all(map(self._fits, args, self._shapes)):
            if signature((args, kwargs), self.any_batch) != self._signature:
                self._refuse(args, kwargs)
            args = tuple(x for x in leaves((args, kwargs)) if isinstance(x, Tensor))
        results = self._run(*args)
        return results[0] if self._is_tensor else pytree.tree_unflatten(results, self._structure)

    def summary(self) -> str:
        """One line: how much of it the engine runs on 8-bit integers, and what it does not."""
        kinds = [operator.kind for operator in self.operators if not operator.is_int8]
        rest = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        count = len(self.operators) - len(kinds)
        return f"{self.target}: {count} of {len(self.operators)} operators in int8" + (f"; not {rest}" if rest else "")

    def extra_repr(self) -> str:
        return self.summary()

    def _fits(self, x: Any, shape: Any) -> bool:
        return isinstance(x, Tensor) and x.shape[self._skip :] == shape

    def _refuse(self, args: Any, kwargs: Any) -> NoReturn:
        star = "any, " if self.any_batch else ""
        wanted = ", ".join(f"[{star}{', '.join(map(str, shape))}]" for shape in self._shapes if shape is not None)
        raise CalibrationError(
            f"this model was lowered for inputs {wanted}, found {Call(args, kwargs).describe()}: lower it again with "
            "example_inputs of the shape that you need."
        )


def lowered(target: Target, module: GraphModule, call: Call, any_batch: bool) -> Lowered:
    """``module`` as ``target`` runs it; ``module`` is used up."""
    try:
        run, operators = target.compile(module, call)
    except FewbitError:
        raise
    # Engines raise classes of their own for what they do not have.
    except Exception as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
        raise UnsupportedError(f"{target.name} cannot run this model: {' '.join(lines)[:500]}") from error
    inputs = signature((call.args, call.kwargs), any_batch)
    structure = module._out_spec
    return Lowered(target.name, run, operators, inputs, any_batch, structure)


def tensors_of(call: Call) -> list[Tensor]:
    """The tensors among the arguments, in the graph's order."""
    return [x for x in leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]


def relative_difference(results: Any, expected: Any) -> float:
    """L2 distance of all floating-point tensors of ``results`` from ``expected``, over the norm of the latter."""
    difference, size = 0.0, 0.0
    for x, y in zip(pytree.tree_leaves(results), pytree.tree_leaves(expected), strict=True):
        if isinstance(y, Tensor) and y.is_floating_point():
            difference += float((x.double() - y.double()).square().sum())
            size += float(y.double().square().sum())
    return (difference / size) ** 0.5 if size else difference**0.5


def refuse_device(call: Call) -> None:
    """UnsupportedError for tensors that are not on the CPU."""
    for x in tensors_of(call):
        if x.device != torch.device("cpu"):
            raise UnsupportedError(f"models are lowered for the CPU, found example_inputs on {x.device}: move them.")
