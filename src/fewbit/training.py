"""Quantization-aware training: the fake-quantized student of a model, and what it becomes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.batches import Call, chunks
from fewbit.errors import PlanError
from fewbit.nn import LearnedGrid, Student, layer_class, student_class
from fewbit.ops.pairs import has_pairs
from fewbit.pipeline import Decision, decide, finished, swap, twin_of, unshare
from fewbit.plan import Plan, Recipe
from fewbit.qtensor import QTensor, dequantize

STUDENT = "fewbit_student"  # the attribute of a student that holds where it came from
EXAMPLES = 64  # calibration examples that a student keeps


@dataclass(frozen=True)
class Origin:
    """Where a student came from: the plan that it is trained for, and calibration examples to measure again what no
    layer's parameters say."""

    plan: Plan
    examples: tuple[Call, ...]


def prepare_qat(
    model: nn.Module,
    recipe: str | Path | Recipe,
    calibration: Any = None,
    exclude: Iterable[str] = (),
) -> nn.Module:
    """A copy of ``model`` to be trained as it will be quantized, in train mode. ``model`` itself is not changed.

    It starts as ``quantize`` with the same arguments ends, computes in float what that model computes in integers, and is an
    ordinary module: all that it learns are parameters. ``convert`` makes the quantized model of it.

    Raises what ``quantize`` raises.
    """
    made = decide(model, recipe, calibration, exclude)
    student = swap(made.twin, _students(made))
    for name, bias in made.biases.items():
        student.get_submodule(name)._parameters["bias"] = nn.Parameter(bias)
    unshare(student, model)
    kept = tuple(chunks(made.examples(), 32, EXAMPLES)) if made.plan.results else ()
    setattr(student, STUDENT, Origin(made.plan, kept))
    return student.train()


def convert(student: nn.Module) -> nn.Module:
    """The quantized model that ``student`` stands for, as ``quantize`` returns it. ``student`` itself is not changed.

    PlanError for a model that ``prepare_qat`` did not make.
    """
    origin = origin_of(student)
    twin = twin_of(student)
    weights: dict[nn.Parameter, QTensor] = {}  # what is tied stays tied
    layers: dict[str, nn.Module] = {}
    for name, site in origin.plan.sites.items():
        layer = twin.get_submodule(name)
        assert isinstance(layer, Student)
        own: dict[str, QTensor] = {}
        for key in layer.quantized_names:
            parameter = layer.get_parameter(key)
            if parameter not in weights:
                weights[parameter] = layer.quantized(key)
            own[key] = weights[parameter]
        module = layer.float_layer
        layers[name] = layer_class(module)(module, site.scheme, own, layer.static_grid())
    return finished(swap(twin, layers), student, origin.plan, {})


def origin_of(student: nn.Module) -> Origin:
    """Where a student came from; PlanError for another model."""
    origin = getattr(student, STUDENT, None)
    if not isinstance(origin, Origin):
        raise PlanError(f"this {type(student).__name__} is no student: make one with fewbit.prepare_qat.")
    return origin


def _students(made: Decision) -> dict[str, Student]:
    """The student of each site by name. What is tied, and the grid of a value that several sites read, they share."""
    parameters: dict[Any, tuple[nn.Parameter, LearnedGrid]] = {}
    inputs = _input_grids(made)
    students: dict[str, Student] = {}
    for name, site in made.plan.sites.items():
        module = made.twin.get_submodule(name)
        layer = layer_class(module)
        pairs = layer.pairs(module) if site.scheme.method == "pair_safe" and has_pairs(site.scheme.weight) else ()
        weights: dict[str, tuple[nn.Parameter, LearnedGrid]] = {}
        for key, weight in made.weights[name].items():
            owner = module._parameters.get(key, (name, key))  # a parametrized weight is nobody else's
            if owner not in parameters:
                grid = LearnedGrid(weight.spec, weight.shape, weight.scale, weight.zero_point, pairs)
                start = _start(layer.matrices(module)[key].detach(), made.rounded[name][key], weight, grid)
                start = layer.from_matrix(module, start).clone(memory_format=torch.contiguous_format)
                parameters[owner] = nn.Parameter(start), grid
            weights[key] = parameters[owner]
        students[name] = student_class(module)(module, site.scheme, weights, inputs.get(name))
    return students


def _input_grids(made: Decision) -> dict[str, LearnedGrid]:
    """By site. Layers that read one value have one grid if they start with one: engines keep the value but once."""
    grids: dict[str, LearnedGrid] = {}
    for names in [*made.shared, *([name] for name in made.plan.sites)]:
        for name in names:
            spec = made.plan.sites[name].scheme.input if name in made.plan.sites else None
            grid = made.grids[name]
            if name in grids or grid is None or spec is None:
                continue
            same = (grids[other] for other in names if other in grids)
            alike = (one for one in same if one.spec == spec and one.starts_as(*grid))
            grids[name] = next(alike, None) or LearnedGrid(spec, (1,), *grid)
    return grids


def _start(matrix: Tensor, rounded: QTensor, weight: QTensor, grid: LearnedGrid) -> Tensor:
    """The float weights that round to the codes of ``weight``, near ``matrix`` where that is possible."""
    if weight is not rounded and isinstance(weight.scale, Tensor) and isinstance(rounded.scale, Tensor):
        matrix = matrix * (weight.scale / rounded.scale).to(matrix.dtype)  # correction scales rows
    # Codes that a method did not get by rounding to the nearest start in the middle of their cell.
    return torch.where(grid.quantize(matrix).codes == weight.codes, matrix, dequantize(weight, matrix.dtype))
