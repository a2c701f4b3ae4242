"""The verbs: plan and quantize."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
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
from fewbit.nn import QuantizedLayer, Student, float_class, input_placeholder, kind_of, layer_class
from fewbit.observers import SecondMoment
from fewbit.plan import Plan, Recipe, load_recipe, make_plan
from fewbit.processes import count, gathered, sharing
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
    group: Any = None,
) -> nn.Module:
    """A quantized copy of ``model``, in eval mode. ``model`` itself is not changed.

    ``recipe``: a preset's name (see ``fewbit.presets()``: "int8-dynamic", ...), a TOML file or a Recipe.
    ``calibration``: an iterable of batches (see ``fewbit.batches.calls``); recipes with static ranges need it, others use
    it if it is given and the method can. ``exclude``: patterns of layers to leave in float (see ``Rule``).

    ``group``: processes of torch.distributed (``torch.distributed.group.WORLD``) that share the work. Each calls this with the
    same model and its own part of the calibration batches; each gets what one process gets of all of them, in the order of
    ranks.

    Raises PlanError (recipe or weights), CalibrationError (data), UnsupportedError (a model that cannot be copied).
    """
    with sharing(group):
        made = decide(model, recipe, calibration, exclude)
    layers = {
        name: layer_class(module := made.twin.get_submodule(name))(
            module, site.scheme, made.weights[name], made.grids[name]
        )
        for name, site in made.plan.sites.items()
    }
    return finished(swap(made.twin, layers), model, made.plan, made.biases)


@dataclass(frozen=True)
class Decision:
    """What is decided of a model before its layers are replaced.

    ``twin``: the float twin of the plan, which shares parameters with the model. ``rounded``: the weights as the methods
    chose them; ``weights``: the same after correction, ``biases`` what correction made of biases. ``shared``: sites that read
    one value. ``examples``: the calibration batches once more, those of an iterator as far as they were kept.
    """

    twin: nn.Module
    plan: Plan
    rounded: Weights
    weights: Weights
    grids: Mapping[str, Grid | None]
    biases: Mapping[str, Tensor]
    shared: tuple[tuple[str, ...], ...]
    examples: Callable[[], Iterable[Call]]


def decide(model: nn.Module, recipe: str | Path | Recipe, calibration: Any, exclude: Iterable[str]) -> Decision:
    """Everything that ``quantize`` decides; its arguments and errors."""
    recipe = load_recipe(recipe, exclude)
    if next(sites_of(model), None) is not None:
        raise PlanError(f"this {type(model).__name__} is quantized already: quantize the float model it came from.")
    if _is_student(model):
        raise PlanError(f"this {type(model).__name__} is a student: fewbit.convert makes the quantized model of it.")
    if recipe.needs_calibration and calibration is None:
        raise CalibrationError(f"recipe {recipe.name!r} fixes input ranges: it needs calibration batches.")
    batches = None if calibration is None else calls(model, calibration)
    twin = twin_of(model)
    own = next(batches) if batches is not None else None
    first = gathered(own)[0]
    twin, places, unread = find_transforms(twin, recipe, first)
    plan = make_plan(twin, recipe)
    plan = replace(plan, transforms=places, skipped={**plan.skipped, **unread})
    statistics: Statistics = {}
    graph: Graph | None = None
    again: list[Call] = []  # what an iterator gives only once
    walk = Walk({}, {}) if calibration is None else find_walk(twin, plan.sites)
    observed = beside(plan, walk)
    stream = iter(()) if batches is None or own is None else itertools.chain([own], batches)
    if isinstance(calibration, Iterator):
        again = list(itertools.islice(stream, None if walk.names else EXAMPLES))
        stream = itertools.chain(again, stream)
    if first is not None and any(observers_of(site, twin.get_submodule(name)) for name, site in observed.sites.items()):
        # On a twin of its own: modules may count their calls or keep what they saw.
        graph, unread = _find_graph(twin_of(twin), plan, first)
        statistics = calibrate(twin_of(twin), observed, stream, graph)
        plan = _with_ends(_without_unreached(plan, statistics, twin), statistics)
        plan = replace(plan, skipped={**plan.skipped, **unread}, results=result_grids(plan, statistics, graph))

    def own_examples() -> Iterable[Call]:
        return again or calls(model, calibration)

    def examples() -> Iterable[Call]:
        if count() == 1:
            return own_examples()
        return itertools.chain.from_iterable(gathered(list(itertools.islice(own_examples(), EXAMPLES))))

    rounded = _walked_weights(twin, plan, statistics, walk, own_examples)
    shared = [] if graph is None else list(graph.inputs().values())
    grids = input_grids(twin, plan, statistics, shared, examples() if statistics else ())
    weights, biases = _corrected(twin, plan, rounded, grids, examples)
    if recipe.sensitive is not None and statistics:
        static = [name for name, grid in grids.items() if grid is not None]
        order = static if graph is None else list(graph.layers.values())
        sensitive = sensitive_ends(twin, plan, order, weights, grids, biases, examples())
        if sensitive:
            plan = _without(plan, sensitive, twin)
            weights, biases = _corrected(twin, plan, rounded, {name: grids[name] for name in plan.sites}, examples)
    readers = tuple(tuple(names) for names in shared)
    return Decision(twin, plan, rounded, weights, grids, biases, readers, examples)


def finished(twin: nn.Module, model: nn.Module, plan: Plan, biases: Mapping[str, Tensor]) -> nn.Module:
    """The quantized ``twin`` with these biases, its plan, and nothing that it shares with ``model``."""
    for name, bias in biases.items():
        twin.get_submodule(name)._parameters["bias"] = nn.Parameter(bias)
    unshare(twin, model)
    setattr(twin, PLAN, plan)
    return twin


def plan_of(model: nn.Module) -> Plan:
    """The plan that a quantized model was made by; PlanError for a model that fewbit did not quantize."""
    plan = getattr(model, PLAN, None)
    if not isinstance(plan, Plan):
        hint = " It is a student: fewbit.convert makes the quantized model of it." if _is_student(model) else ""
        raise PlanError(f"this {type(model).__name__} was not quantized by fewbit: it has no plan.{hint}")
    return plan


def _is_student(model: nn.Module) -> bool:
    return any(isinstance(module, Student) for module in model.modules())


def float_twin(model: nn.Module, plan: Plan) -> nn.Module:
    """``model`` in eval mode with the plan's transforms applied: same function, and its layers are the plan's sites.

    Shares parameters with ``model``; PlanError if the plan does not fit the model.
    """
    twin = twin_of(model)
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
        if name not in modules or float_class(modules[name]) is None or kind_of(modules[name]) != site.type:
            found = type(modules[name]).__name__ if name in modules else "no such layer"
            raise PlanError(f"plan.sites.{name}: needs a {site.type}, found {found} in this {type(model).__name__}.")
        shapes = {k: tuple(m.shape) for k, m in layer_class(modules[name]).matrices(modules[name]).items()}
        if not site.weights or any(shapes.get(key) != shape for key, shape in site.weights.items()):
            raise PlanError(f"plan.sites.{name}: needs weights {dict(site.weights)}, found {shapes}.")
    layers = {}
    tied: dict[object, QTensor] = {}  # a tied weight is one here too
    for name, site in plan.sites.items():
        weights: dict[str, QTensor] = {}
        for key, shape in site.weights.items():
            parameter = modules[name]._parameters.get(key)  # None for a parametrized weight
            owner = (name, key) if parameter is None else parameter
            weights[key] = tied.setdefault(owner, empty(shape, site.scheme.weight))
        grid = input_placeholder(site.scheme.input)
        layers[name] = layer_class(modules[name])(modules[name], site.scheme, weights, grid)
    twin = swap(twin, layers)
    setattr(twin, PLAN, plan)
    return twin


def twin_of(model: nn.Module) -> nn.Module:
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


def unshare(twin: nn.Module, model: nn.Module) -> None:
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


def find_transforms(
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
                else read_topology(twin_of(twin), first.args, first.kwargs)
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


def result_grids(plan: Plan, statistics: Statistics, graph: Graph | None) -> dict[str, tuple[float, int]]:
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


def _with_ends(plan: Plan, statistics: Statistics) -> Plan:
    """The plan with the recipe's scheme for the first and the last layer with a static input. Tied layers keep their own."""
    scheme = plan.recipe.ends
    tied = {member.rpartition(".")[0] for tie in plan.ties for member in tie}
    # Statistics are in the order in which values were first seen.
    order = [name for name, kept in statistics.items() if "input" in kept and name in plan.sites]
    if scheme is None or not order:
        return plan
    ends = {name: replace(plan.sites[name], scheme=scheme) for name in (order[0], order[-1]) if name not in tied}
    return replace(plan, sites={**plan.sites, **ends})


def _without(plan: Plan, reasons: dict[str, str], twin: nn.Module) -> Plan:
    """The plan with these sites left in float."""
    recipe = plan.recipe
    for name in reasons:
        recipe = recipe.override(name, None)
    again = make_plan(twin, recipe)
    again = replace(
        again, sites={name: plan.sites[name] for name in again.sites}
    )  # their schemes may be decided already
    skipped = {**again.skipped, **plan.skipped, **reasons}
    return replace(again, recipe=plan.recipe, transforms=plan.transforms, skipped=skipped, results=plan.results)


def _corrected(
    twin: nn.Module,
    plan: Plan,
    weights: Weights,
    grids: Mapping[str, Grid | None],
    batches: Callable[[], Iterable[Call]],
) -> tuple[Weights, dict[str, Tensor]]:
    """Weights and new biases after the recipe's correction, if it has one and there is something to correct."""
    if plan.recipe.correction is None or all(grid is None for grid in grids.values()):
        return weights, {}
    return correct(twin, plan, weights, grids, batches(), plan.recipe.correction)


def beside(plan: Plan, walk: Walk) -> Plan:
    """The plan with the sites alone that are not walked to."""
    return replace(plan, sites={name: site for name, site in plan.sites.items() if name not in walk.names})


def _walked_weights(
    twin: nn.Module, plan: Plan, statistics: Statistics, walk: Walk, batches: Callable[[], Iterable[Call]]
) -> Weights:
    """All weights: those outside of blocks for the float layer's inputs, those in blocks for what the others make of them."""
    known = quantize_outside(twin_of(twin), walk, batches()) if walk.outside else {}
    weights = _quantized_weights(twin, beside(plan, walk), statistics, known)
    if walk.blocks:
        found = quantize_blocks(twin_of(twin), walk, batches(), partial(walk.of, weights))
        for block in progress(found, "quantizing blocks", total=len(walk.blocks)):
            weights.update(block)
    return weights


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
                own = None if importance is None else importance.to(matrix.device)
                weight = method.quantize(matrix.detach(), site.scheme.weight, own, layer.pairs(module))
            except ValueError as error:
                raise PlanError(f"{name or type(twin).__name__}.{key}: cannot be quantized: {error}") from None
            result[name][key] = weight
            if parameter is not None:
                done[parameter] = weight
    return result


def swap(twin: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Replace modules by name, in place; returns the model (the layer, if the model is one layer)."""
    replacements = {twin.get_submodule(name): layer for name, layer in layers.items()}
    for parent in list(twin.modules()):
        for child, layer in parent._modules.items():
            if layer is not None and layer in replacements:
                parent._modules[child] = replacements[layer]
    return replacements.get(twin, twin)


def sites_of(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """The quantized layers of a model and their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLayer))
