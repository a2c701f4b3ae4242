"""More bits for the layers that need them, within a size.

What a layer's rounding errors d do to the outputs is, to second order, KL = d^T F d / 2 with the Fisher information F of the
float model. For labels drawn from the float model's own outputs F = E[g g^T], g the gradient of their log-likelihood, so that
E[(g . d)^2] / 2 of each layer comes out of the same backward passes: no diagonal, no pass for each layer. A greedy choice by
what a byte gains does what a Lagrangian does. Errors of layers are taken to add up, as in the HAWQ line of work (Dong et al.
2020, https://arxiv.org/abs/1911.03852).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.batches import Call, calls, chunks, peek, run
from fewbit.errors import PlanError
from fewbit.formats import get_format
from fewbit.hardware import byte_count
from fewbit.methods import METHODS
from fewbit.nn import layer_class
from fewbit.pipeline import find_transforms, twin_of
from fewbit.plan import Plan, Recipe, Site, load_recipe, make_plan
from fewbit.progress import progress
from fewbit.qtensor import dequantize
from fewbit.verify.outputs import main_output

FINER = ("int6", "int8")
SAMPLES = 32  # drawn labels of an example: the sensitivity of a layer is known to about 25 %


def mixed_precision(
    model: nn.Module,
    recipe: str | Path | Recipe,
    calibration: Any,
    *,
    bits: float | None = None,
    size: int | str | None = None,
    finer: Sequence[str] = FINER,
    seed: int = 0,
) -> Recipe:
    """``recipe`` with finer weights for the layers that change the outputs of ``model`` most. ``model`` is not changed.

    ``bits``: of a quantized weight on average, scales and zero points included; or ``size``: of the saved model, in bytes or as
    "3.5GB". Formats of ``finer`` keep the grouping and the scales of the recipe's. The result is a recipe like any other: for
    ``quantize``, or for ``quantize_folder`` with the folder of this model.

    Gradients of all weights that are quantized are in memory beside the model. Raises what ``make_plan`` raises, PlanError
    for a budget below what the recipe itself takes, and CalibrationError for data that do not fit.
    """
    if (bits is None) == (size is None):
        raise PlanError("mixed_precision: give bits or size, one of them.")
    for name in finer:
        get_format(name)
    recipe = load_recipe(recipe)
    first, batches = peek(calls(model, calibration))
    twin, _, _ = find_transforms(twin_of(model), recipe, first)
    plan = make_plan(twin, recipe)
    groups = _groups(plan)
    count = sum(plan.sites[names[0]].count for names in groups)
    start = sum(plan.sites[names[0]].nbytes for names in groups)
    if bits is not None:
        room = bits * count / 8 - start
        needs, given = f"{8 * start / count:.3f} bits a weight", f"bits = {bits:g}"
    else:
        assert size is not None
        room = byte_count(size) - plan.nbytes
        needs, given = f"{plan.nbytes / 1e6:.2f} MB", f"size = {size}"
    if room < 0:
        raise PlanError(f"mixed_precision: {recipe.name} takes {needs}, found {given}; take a recipe with fewer bits.")
    harm = sensitivities(twin, plan, batches, seed)
    for name, format in _chosen(plan, groups, harm, finer, room).items():
        scheme = plan.sites[name].scheme
        recipe = recipe.override(escape(name), replace(scheme, weight=replace(scheme.weight, format=format)))
    return replace(recipe, name=f"{recipe.name}-mixed")


def sensitivities(twin: nn.Module, plan: Plan, batches: Iterable[Call], seed: int = 0) -> dict[str, float]:
    """What rounding one site's weights to nearest does to the outputs: KL in nats for logits, else squared errors; by site.

    ``twin``: the plan's float twin, which keeps its parameters. Sites that share a weight have one sensitivity.
    """
    model = twin_of(twin)
    leaves: dict[nn.Parameter, nn.Parameter] = {}
    errors: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}
    for name, site in plan.sites.items():
        module = model.get_submodule(name)
        layer = layer_class(module)
        errors[name] = []
        for key, matrix in layer.matrices(module).items():
            parameter = module._parameters.get(key)
            if key not in site.weights or parameter is None:
                continue
            error = dequantize(METHODS["rtn"].quantize(matrix.detach().float(), site.scheme.weight)) - matrix.detach()
            if parameter not in leaves:
                leaves[parameter] = nn.Parameter(parameter.detach())
            # bfloat16: there are as many errors as weights.
            errors[name].append((leaves[parameter], layer.from_matrix(module, error).bfloat16()))
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                fixed = nn.Parameter(parameter.detach(), requires_grad=False)
                setattr(module, key, leaves.get(parameter, fixed))
    return _harm(model, list(leaves.values()), errors, list(chunks(batches, 1, SAMPLES)), seed)


def _harm(
    model: nn.Module,
    leaves: list[nn.Parameter],
    errors: Mapping[str, list[tuple[nn.Parameter, Tensor]]],
    examples: Sequence[Call],
    seed: int,
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    harm = dict.fromkeys(errors, 0.0)
    draws = math.ceil(SAMPLES / len(examples))
    for number, call in enumerate(progress(examples, "sensitivity of layers")):
        output, is_logits = main_output(run(model, call, f"calibration example {number}", gradients=True))
        for draw in range(draws):
            likelihood, positions = _likelihood(output, is_logits, generator)
            found = torch.autograd.grad(likelihood, leaves, retain_graph=draw + 1 < draws, allow_unused=True)
            gradients = dict(zip(leaves, found, strict=True))
            for name, own in errors.items():
                products = [(g * d).sum() for leaf, d in own if (g := gradients[leaf]) is not None]
                harm[name] += float(sum(products)) ** 2 / (2 * positions * draws * len(examples))
    return harm


def _likelihood(output: Tensor, is_logits: bool, generator: torch.Generator) -> tuple[Tensor, int]:
    """The log-likelihood of an output drawn from the model itself, and the number of distributions."""
    if not is_logits:
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        return (output.float() * noise).sum(), 1
    logs = output.float().log_softmax(-1).flatten(0, -2)
    drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(output.device)
    return logs.gather(1, drawn).sum(), len(logs)


def _groups(plan: Plan) -> list[list[str]]:
    """Sites by what can be chosen alone: those that share a weight go together."""
    groups: dict[str, list[str]] = {}
    owner = {member.rpartition(".")[0]: tie[0].rpartition(".")[0] for tie in plan.ties for member in tie}
    for name in plan.sites:
        groups.setdefault(owner.get(name, name), []).append(name)
    return list(groups.values())


@dataclass(frozen=True)
class _Step:
    """From one format of a group to another, with the harm that it saves."""

    gain: float
    nbytes: int
    format: str


def _chosen(
    plan: Plan, groups: list[list[str]], harm: Mapping[str, float], finer: Sequence[str], room: float
) -> dict[str, str]:
    """The new format of each site that gets one."""
    chosen: dict[int, str] = {}
    while True:
        steps = {
            number: step
            for number, names in enumerate(groups)
            if (step := _next_step(plan.sites[names[0]], harm[names[0]], chosen.get(number), finer, room))
        }
        if not steps:
            return {name: format for number, format in chosen.items() for name in groups[number]}
        best = max(steps, key=lambda number: steps[number].gain / steps[number].nbytes)
        chosen[best], room = steps[best].format, room - steps[best].nbytes


def _next_step(site: Site, harm: float, format: str | None, finer: Sequence[str], room: float) -> _Step | None:
    """The best step from ``format`` (None: the recipe's) that there is room for."""
    now = site.scheme.weight.format if format is None else format
    before, after = _with_format(site, now), [name for name in finer if _steps_of(name) > _steps_of(now)]
    best: _Step | None = None
    for name in after:
        nbytes = _with_format(site, name).nbytes - before.nbytes
        # Squares of errors, of which the recipe's own do this harm.
        left = [(_steps_of(site.scheme.weight.format) / _steps_of(one)) ** 2 for one in (now, name)]
        step = _Step(harm * (left[0] - left[1]), nbytes, name)
        if 0 < nbytes <= room and step.gain > 0 and (best is None or step.gain / nbytes > best.gain / best.nbytes):
            best = step
    return best


def _with_format(site: Site, format: str) -> Site:
    return replace(site, scheme=replace(site.scheme, weight=replace(site.scheme.weight, format=format)))


def _steps_of(format: str) -> int:
    return 2 ** get_format(format).bits
