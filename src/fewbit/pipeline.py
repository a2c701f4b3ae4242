"""The verbs: plan and quantize."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fewbit.batches import Call, calls
from fewbit.calibration import Grid, Statistics, calibrate, grid_of, observers_of
from fewbit.correction import EXAMPLES, correct
from fewbit.errors import CalibrationError, PlanError, UnsupportedError
from fewbit.graph import Graph, Topology, read_graph, read_topology
from fewbit.methods import METHODS
from fewbit.nn import QuantizedLayer, float_class, input_placeholder, layer_class
from fewbit.observers import SecondMoment
from fewbit.plan import Plan, Recipe, load_recipe, make_plan
from fewbit.progress import progress
from fewbit.qtensor import QTensor, empty
from fewbit.ranges import input_grids
from fewbit.sensitivity import sensitive_ends
from fewbit.sequential import Walk, Weights, find_walk, quantize_blocks, quantize_outside
from fewbit.transforms import TRANSFORMS

PLAN = "fewbit_plan"  # the attribute of a quantized model that holds its plan


def quantize(
    model: nn.Module,
    recipe: str | Path | Recipe,
    calibration: Any = None,
    exclude: Iterable[str] = (),
) -> nn.Module:
    """A quantized copy of ``model``, in eval mode. ``model`` itself is not changed.

    ``recipe``: a preset's name (see ``fewbit.presets()``: "int8-dynamic", ...), a TOML file or a Recipe.
    ``calibration``: an iterable of batches (see ``fewbit.batches.calls``); recipes with static ranges need it, others use
    it if it is given and the method can. ``exclude``: patterns of layers to leave in float (see ``Rule``).

    Raises PlanError (recipe or weights), CalibrationError (data), UnsupportedError (a model that cannot be copied).
    """
    recipe = load_recipe(recipe, exclude)
    if next(sites_of(model), None) is not None:
        raise PlanError(f"this {type(model).__name__} is quantized already: quantize the float model it came from.")
    if recipe.needs_calibration and calibration is None:
        raise CalibrationError(f"recipe {recipe.name!r} fixes input ranges: it needs calibration batches.")
    batches = None if calibration is None else calls(model, calibration)
    twin = _twin(model)
    first = next(batches) if batches is not None else None
    twin, places, unread = _find_transforms(twin, recipe, first)
    plan = make_plan(twin, recipe)
    plan = replace(plan, transforms=places, skipped={**plan.skipped, **unread})
    statistics: Statistics = {}
    graph: Graph | None = None
    again: list[Call] = []  # what an iterator gives only once
    walk = Walk({}, {}) if calibration is None else find_walk(twin, plan.sites)
    observed = replace(plan, sites={name: site for name, site in plan.sites.items() if name not in walk.names})
    stream = iter(()) if batches is None or first is None else itertools.chain([first], batches)
    if isinstance(calibration, Iterator):
        again = list(itertools.islice(stream, None if walk.names else EXAMPLES))
        stream = itertools.chain(again, stream)
    if first is not None and any(observers_of(site, twin.get_submodule(name)) for name, site in observed.sites.items()):
        # On a twin of its own: modules may count their calls or keep what they saw.
        graph, unread = _find_graph(_twin(twin), plan, first)
        statistics = calibrate(_twin(twin), observed, stream, graph)
        plan = _without_unreached(plan, statistics, twin)
        plan = replace(plan, skipped={**plan.skipped, **unread}, results=_results(plan, statistics, graph))

    def examples() -> Iterable[Call]:
        return again or calls(model, calibration)

    known = quantize_outside(_twin(twin), walk, examples()) if walk.outside else {}
    rounded = _quantized_weights(twin, observed, statistics, known)
    if walk.blocks:
        rounded.update(quantize_blocks(_twin(twin), walk, rounded, examples()))
    shared = () if graph is None else graph.inputs().values()
    grids = input_grids(twin, plan, statistics, shared, examples() if statistics else ())
    weights, biases = _corrected(twin, plan, rounded, grids, examples())
    if recipe.sensitive is not None and statistics:
        static = [name for name, grid in grids.items() if grid is not None]
        order = static if graph is None else list(graph.layers.values())
        sensitive = sensitive_ends(twin, plan, order, weights, grids, biases, examples())
        if sensitive:
            plan = _without(plan, sensitive, twin)
            weights, biases = _corrected(twin, plan, rounded, {name: grids[name] for name in plan.sites}, examples())
    twin = _swap(twin, plan, weights, grids)
    for name, bias in biases.items():
        twin.get_submodule(name)._parameters["bias"] = nn.Parameter(bias)
    _unshare(twin, model)
    setattr(twin, PLAN, plan)
    return twin


def plan_of(model: nn.Module) -> Plan:
    """The plan that a quantized model was made by; PlanError for a model that fewbit did not quantize."""
    plan = getattr(model, PLAN, None)
    if not isinstance(plan, Plan):
        raise PlanError(f"this {type(model).__name__} was not quantized by fewbit: it has no plan.")
    return plan


def float_twin(model: nn.Module, plan: Plan) -> nn.Module:
    """``model`` in eval mode with the plan's transforms applied: same function, and its layers are the plan's sites.

    Shares parameters with ``model``; PlanError if the plan does not fit the model.
    """
    twin = _twin(model)
    for name, places in plan.transforms.items():
        if name not in TRANSFORMS:
            raise PlanError(f"plan.transforms: unknown transform {name!r}.")
        try:
            twin = TRANSFORMS[name].apply(twin, places)
        except (AttributeError, TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise PlanError(f"plan.transforms.{name}: does not fit this {type(model).__name__}: {error}.") from error
    return twin


def skeleton(model: nn.Module, plan: Plan) -> nn.Module:
    """The quantized model of ``plan`` with the right buffers on meta, to be filled from a file.

    ``model`` is not changed and may be on meta. PlanError, naming the site, if the plan does not fit the model.
    """
    twin = float_twin(model, plan)
    modules = dict(twin.named_modules())
    for name, site in plan.sites.items():
        cls = float_class(modules[name]) if name in modules else None
        if cls is None or cls.__name__ != site.type:
            found = type(modules[name]).__name__ if name in modules else "no such layer"
            raise PlanError(f"plan.sites.{name}: needs a {site.type}, found {found} in this {type(model).__name__}.")
        shapes = {k: tuple(m.shape) for k, m in layer_class(modules[name]).matrices(modules[name]).items()}
        if not site.weights or any(shapes.get(key) != shape for key, shape in site.weights.items()):
            raise PlanError(f"plan.sites.{name}: needs weights {dict(site.weights)}, found {shapes}.")
    weights = {
        name: {key: empty(shape, site.scheme.weight) for key, shape in site.weights.items()}
        for name, site in plan.sites.items()
    }
    grids = {name: input_placeholder(site.scheme.input) for name, site in plan.sites.items()}
    twin = _swap(twin, plan, weights, grids)
    setattr(twin, PLAN, plan)
    return twin


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode that shares its parameters, so that the weights are not in memory twice."""
    if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
        raise UnsupportedError(f"{type(model).__name__} has lazy layers without weights: run it on one batch first.")
    # A table with max_norm is written to in forward.
    written = {id(p) for m in model.modules() if getattr(m, "max_norm", None) is not None for p in m.parameters()}
    shared = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in written}
    try:
        twin: nn.Module = copy.deepcopy(model, dict(shared))
    # deepcopy raises whatever the attributes of the user's modules raise.
    except Exception as error:
        raise UnsupportedError(f"{type(model).__name__} cannot be copied (copy.deepcopy): {error}.") from error
    return twin.eval()


def _unshare(twin: nn.Module, model: nn.Module) -> None:
    """Give the twin its own copy of each parameter that it still shares with the model. What is tied stays tied."""
    shared = {id(parameter) for parameter in model.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in shared:
                if id(parameter) not in copies:
                    clone = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    copies[id(parameter)] = clone
                module._parameters[name] = copies[id(parameter)]


def _find_transforms(
    twin: nn.Module, recipe: Recipe, first: Call | None
) -> tuple[nn.Module, dict[str, list[Any]], dict[str, str]]:
    """The transformed twin, where each transform applied, and the transforms that could not be looked for."""
    places: dict[str, list[Any]] = {}
    unread: dict[str, str] = {}
    for name in recipe.transforms:
        transform = TRANSFORMS[name]
        topology: Topology | str | None = None
        if transform.needs_graph:
            topology = (
                "it needs a calibration batch"
                if first is None
                else read_topology(_twin(twin), first.args, first.kwargs)
            )
        if isinstance(topology, str):
            unread[f"transform {name}"] = topology
            continue
        found = transform.find(twin, topology)
        if found:
            twin = transform.apply(twin, found)
            places[name] = found
    return twin, places, unread


def _find_graph(twin: nn.Module, plan: Plan, first: Call) -> tuple[Graph | None, dict[str, str]]:
    """The graph of the float twin if the recipe needs one, or why there is none."""
    if plan.recipe.results is None:
        return None, {}
    layers = {
        name for name, site in plan.sites.items() if site.scheme.input is not None and site.scheme.input.is_static
    }
    graph = read_graph(twin, first.args, first.kwargs, layers)
    if isinstance(graph, str):
        return None, {"values between layers": graph}
    return graph, {}


def _results(plan: Plan, statistics: Statistics, graph: Graph | None) -> dict[str, tuple[float, int]]:
    """The grids of the values that are no layer's input."""
    spec = plan.recipe.results
    grids: dict[str, tuple[float, int]] = {}
    for name in [] if graph is None or spec is None else graph.results().values():
        if "result" in statistics.get(name, {}):
            assert spec is not None
            scale, zero_point = grid_of(statistics[name]["result"], spec, f"the value {name!r}")
            grids[name] = (float(scale), 0 if zero_point is None else int(zero_point))
    return grids


def _without_unreached(plan: Plan, statistics: Statistics, twin: nn.Module) -> Plan:
    unreached = {
        name: "no calibration batch reached it"
        for name, site in plan.sites.items()
        if site.scheme.input is not None and site.scheme.input.is_static and name not in statistics
    }
    return _without(plan, unreached, twin) if unreached else plan


def _without(plan: Plan, reasons: dict[str, str], twin: nn.Module) -> Plan:
    """The plan with these sites left in float."""
    recipe = plan.recipe
    for name in reasons:
        recipe = recipe.override(name, None)
    again = make_plan(twin, recipe)
    skipped = {**again.skipped, **plan.skipped, **reasons}
    return replace(again, recipe=plan.recipe, transforms=plan.transforms, skipped=skipped, results=plan.results)


def _corrected(
    twin: nn.Module,
    plan: Plan,
    weights: Mapping[str, Mapping[str, QTensor]],
    grids: Mapping[str, Grid | None],
    batches: Iterable[Call],
) -> tuple[Mapping[str, Mapping[str, QTensor]], dict[str, Tensor]]:
    """Weights and new biases after the recipe's correction, if it has one and there is something to correct."""
    if plan.recipe.correction is None or all(grid is None for grid in grids.values()):
        return weights, {}
    return correct(twin, plan, weights, grids, batches, plan.recipe.correction)


def _quantized_weights(twin: nn.Module, plan: Plan, statistics: Statistics, known: Weights) -> Weights:
    """The weights of the plan's sites and those already ``known``."""
    result = dict(known)
    # A tied weight is quantized once, with what the first layer saw that tells something of it.
    done = {
        twin.get_submodule(name)._parameters[key]: w for name, weights in known.items() for key, w in weights.items()
    }
    informed = sorted(plan.sites, key=lambda name: "second_moment" not in statistics.get(name, {}))
    for name in progress(informed, "quantizing"):
        site = plan.sites[name]
        module = twin.get_submodule(name)
        layer = layer_class(module)
        method = METHODS[site.scheme.method]
        state = statistics.get(name, {}).get("second_moment")
        importance = None
        if state is not None and int(state["count"]):
            importance = layer.importance(module, SecondMoment().mean(state))
        result[name] = {}
        for key, matrix in layer.matrices(module).items():
            if key not in site.weights:
                continue
            parameter = module._parameters.get(key)  # None for a parametrized weight, which is computed
            if parameter is not None and parameter in done:
                result[name][key] = done[parameter]
                continue
            try:
                weight = method.quantize(matrix.detach(), site.scheme.weight, importance, layer.pairs(module))
            except ValueError as error:
                raise PlanError(f"{name or type(twin).__name__}.{key}: cannot be quantized: {error}") from None
            result[name][key] = weight
            if parameter is not None:
                done[parameter] = weight
    return result


def _swap(
    twin: nn.Module,
    plan: Plan,
    weights: Mapping[str, Mapping[str, QTensor]],
    grids: Mapping[str, Grid | None],
) -> nn.Module:
    """Replace the sites by quantized layers, in place; returns the model (the layer, if the model is one layer)."""
    replacements: dict[nn.Module, nn.Module] = {}
    for name, site in plan.sites.items():
        module = twin.get_submodule(name)
        replacements[module] = layer_class(module)(module, site.scheme, weights[name], grids[name])
    if twin in replacements:
        return replacements[twin]
    for parent in list(twin.modules()):
        for child, layer in parent._modules.items():
            if layer is not None and layer in replacements:
                parent._modules[child] = replacements[layer]
    return twin


def sites_of(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """The quantized layers of a model and their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLayer))
