"""Quantization-aware training: the fake-quantized student of a model, and what it becomes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.batches import Call, calls, chunks, peek, run
from fewbit.calibration import calibrate
from fewbit.errors import PlanError
from fewbit.graph import read_graph
from fewbit.nn import LearnedGrid, Student, layer_class, student_class
from fewbit.ops.pairs import has_pairs
from fewbit.pipeline import Decision, decide, finished, result_grids, swap, twin_of, unshare
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
    trainable: float = 1.0,
) -> nn.Module:
    """A copy of ``model`` to be trained as it will be quantized, in train mode. ``model`` itself is not changed.

    It starts as ``quantize`` with the same arguments ends, computes what that model computes, and is an ordinary module: all
    that it learns are parameters. ``convert`` makes the quantized model of it.

    What is frozen in the model stays frozen, unless all of it is. ``trainable``: the share of the quantized layers whose
    weights are trained, those with the largest errors first; steps, biases and what is not quantized are trained anyway.

    Raises what ``quantize`` raises; PlanError for a share outside [0, 1].
    """
    if not 0 <= trainable <= 1:
        raise PlanError(f"trainable must be a share of the layers between 0 and 1, found {trainable:g}.")
    made = decide(model, recipe, calibration, exclude)
    students = _students(made)
    fixed: list[str] = []
    if trainable < 1:
        errors = _errors(made, students, () if calibration is None else made.examples())
        fixed = sorted(errors, key=errors.__getitem__, reverse=True)[math.ceil(trainable * len(errors)) :]
    student = swap(made.twin, dict(students))
    for name, bias in made.biases.items():
        layer = students[name]
        layer._parameters["bias"] = nn.Parameter(bias, requires_grad=layer.get_parameter("bias").requires_grad)
    unshare(student, model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        student.requires_grad_(True)
    for name in fixed:
        for key in students[name].quantized_names:
            students[name].get_parameter(key).requires_grad_(False)
    kept = tuple(chunks(made.examples(), 32, EXAMPLES)) if made.plan.results else ()
    setattr(student, STUDENT, Origin(made.plan, kept))
    return student.train()


def convert(student: nn.Module, calibration: Any = None) -> nn.Module:
    """The quantized model that ``student`` stands for, as ``quantize`` returns it. ``student`` itself is not changed.

    The grids of values that are no layer's input (``plan.results``) are measured again, since training moves values: on
    ``calibration``, or else on the first EXAMPLES calibration examples, which the student keeps.

    PlanError for a model that ``prepare_qat`` did not make, CalibrationError (data).
    """
    origin = origin_of(student)
    examples = origin.examples if calibration is None else calls(student, calibration)
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
    plan = replace(origin.plan, results=_results(student, origin.plan, examples)) if examples else origin.plan
    return finished(swap(twin, layers), student, plan, {})


def origin_of(student: nn.Module) -> Origin:
    """Where a student came from; PlanError for another model."""
    origin = getattr(student, STUDENT, None)
    if not isinstance(origin, Origin):
        raise PlanError(f"this {type(student).__name__} is no student: make one with fewbit.prepare_qat.")
    return origin


def _results(student: nn.Module, plan: Plan, examples: Iterable[Call]) -> Mapping[str, tuple[float, int]]:
    """``plan.results`` as the student's values need them now."""
    twin = twin_of(student)
    named = {name: twin.get_submodule(name) for name in plan.sites}
    static = {name: m for name, m in named.items() if isinstance(m, Student) and m.input_grid is not None}
    model = swap(twin, {name: _rounded_layer(layer) for name, layer in static.items()})
    first, examples = peek(examples)
    graph = read_graph(model, first.args, first.kwargs, static)
    if isinstance(graph, str):
        return plan.results
    for call, name in graph.layers.items():
        call.target = partial(_on_rounded, static[name], call.target)
    statistics = calibrate(model, replace(plan, sites={}), examples, graph)
    return {**plan.results, **result_grids(plan, statistics, graph)}


def _rounded_layer(student: Student) -> nn.Module:
    """The float layer with the rounded weight."""
    layer = student.float_layer
    weight = layer_class(layer).from_matrix(layer, student.rounded().detach())
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return layer


def _on_rounded(student: Student, operator: Any, x: Tensor, *rest: Any, **options: Any) -> Any:
    return operator(student.rounded_input(x), *rest, **options)


def _errors(made: Decision, students: Mapping[str, Student], batches: Iterable[Call]) -> dict[str, float]:
    """How far each student's output is from the float layer's on the same input, as a share; without data, its weight."""
    errors = dict.fromkeys(students, 0.0)
    if not batches:
        for name, student in students.items():
            for key in student.quantized_names:
                matrix = student.matrix(key).detach()
                errors[name] += float(_share(student.rounded(key).detach(), matrix))
        return errors
    model = twin_of(made.twin)

    def measure(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
            found = students[name](*args, **kwargs)
            y, found = (x[0] if isinstance(x, tuple) else x for x in (y, found))
            if isinstance(y, Tensor):
                errors[name] += float(_share(found, y))

        return hook

    for name in students:
        model.get_submodule(name).register_forward_hook(measure(name), with_kwargs=True)
    for number, call in enumerate(chunks(batches, 32, EXAMPLES)):
        run(model, call, f"calibration chunk {number}")
    return errors


def _share(x: Tensor, exact: Tensor) -> Tensor:
    return (x - exact).square().sum() / exact.square().sum().clamp(min=1e-30)


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
                trained = not isinstance(owner, nn.Parameter) or owner.requires_grad
                parameters[owner] = nn.Parameter(start, requires_grad=trained), grid
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
