"""From a recipe and a model to a plan."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from torch import nn

from fewbit.errors import PlanError, unknown
from fewbit.nn import QuantizedLayer, float_class, kind_of, layer_class
from fewbit.plan.plan import Plan, Site, header_bytes
from fewbit.plan.recipe import Recipe, Rule, load_recipe
from fewbit.spec import PER_TOKEN, Scheme

# A smaller share of a layer's weights stays float. There is nothing to gain by it, and in recurrent layers it is the matrix
# that reads raw features, whose range may be beyond 8 bits while that of inner states is [-1, 1].
SMALL_SHARE = 0.05


def make_plan(model: nn.Module, recipe: str | Path | Recipe) -> Plan:
    """Decide for every layer of ``model`` (its transforms applied). Needs no data and works on meta.

    PlanError if a rule matches nothing, asks a layer for what it cannot do, or nothing at all can be quantized.
    """
    recipe = load_recipe(recipe)
    candidates = _candidates(model)
    kinds = {name: kind_of(module) for name, module in candidates.items()}
    _check_rules(recipe, kinds)
    sites: dict[str, Site] = {}
    skipped: dict[str, str] = {}
    listed = _in_plain_containers(model)
    for name, module in candidates.items():
        decision = _decide(name, module, kinds[name], recipe, listed)
        if isinstance(decision, Site):
            sites[name] = decision
            for key in layer_class(module).matrices(module):
                if key not in decision.weights:
                    reason = f"too small to gain: less than {100 * SMALL_SHARE:g} % of its layer's weights"
                    skipped[f"{name}.{key}" if name else key] = reason
        else:
            skipped[name] = decision
    ties = _ties(candidates)
    _agree_on_ties(sites, skipped, ties)
    if not sites:
        reasons = "; ".join(dict.fromkeys(skipped.values())) or "it has no layer with a weight matrix"
        raise PlanError(f"recipe {recipe.name!r} quantizes nothing in this {type(model).__name__}: {reasons}.")
    quantized = {id(parameter) for name, site in sites.items() for parameter in _replaced(candidates[name], site)}
    rest = {name: p for name, p in model.named_parameters() if id(p) not in quantized}
    kept = {**rest, **dict(model.named_buffers())}
    return Plan(
        recipe=recipe,
        sites=sites,
        skipped=skipped,
        ties=tuple(tie for tie in ties if tie[0].rpartition(".")[0] in sites),
        float_weights=sum(p.numel() for p in rest.values()),
        float_bytes=sum(tensor.nbytes + header_bytes(name) for name, tensor in kept.items()),
    )


def _decide(name: str, module: nn.Module, kind: str, recipe: Recipe, listed: set[nn.Module]) -> Site | str:
    """The site, or why there is none."""
    cls = float_class(module)
    if cls is None:
        return f"unsupported type {kind}"
    layer = layer_class(module)
    own = type(module)
    if own.forward is not cls.forward or getattr(own, "_conv_forward", None) is not getattr(cls, "_conv_forward", None):
        return f"unsupported type {own.__name__}: it overrides {kind}.forward"
    if "forward" in vars(module):
        return "its forward was replaced, which a quantized layer would lose"
    if module in listed:
        return "it is kept in a plain list or dict too, which would go on using the float layer"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which a quantized layer would lose"
    refusal = layer.refuse(module)
    if refusal is not None:
        return refusal
    rule = next((rule for rule in recipe.rules if rule.matches(name, kind)), None)
    if rule is None:
        return f"no rule for {kind}"
    if rule.scheme is None:
        return f"excluded by {rule.pattern!r}"
    shapes = {key: tuple(matrix.shape) for key, matrix in layer.matrices(module).items()}
    types = {matrix.dtype for matrix in layer.matrices(module).values()}
    if not all(dtype.is_floating_point for dtype in types):
        return f"its weights are {', '.join(map(str, types))}, not floating point"
    count = sum(math.prod(shape) for shape in shapes.values())
    if count < max(1, rule.min_weights):
        return f"too small to gain: fewer than {max(1, rule.min_weights)} weights"
    if max(shape[0] for shape in shapes.values()) < rule.min_channels:
        return f"too narrow to gain: fewer than {rule.min_channels} output channels"
    kept = {key: shape for key, shape in shapes.items() if math.prod(shape) >= SMALL_SHARE * count}
    return Site(kind, kept, _fitted(name, kind, layer, rule))


def _fitted(name: str, kind: str, layer: type[QuantizedLayer], rule: Rule) -> Scheme:
    scheme = rule.scheme
    assert scheme is not None
    if scheme.input is None:
        return scheme
    if not layer.accepts_input_spec:  # indices have nothing to quantize
        return replace(scheme, input=None)
    if scheme.input.is_static and not layer.accepts_static_input:
        raise PlanError(
            f"{name}: rule {rule.pattern!r} gives a static input range to {kind}, whose inner states are not seen by "
            'calibration. Give it input = { format = "int8", granularity = "token" } or none.'
        )
    return scheme


def _check_rules(recipe: Recipe, kinds: dict[str, str]) -> None:
    for rule in recipe.rules:
        if not rule.optional and not any(rule.matches(name, kind) for name, kind in kinds.items()):
            allowed = {*kinds, *(f"type:{kind}" for kind in kinds.values())}
            inside = any(name.startswith(f"{rule.pattern}.") for name in kinds)
            hint = f" For all layers inside write {rule.pattern + '.*'!r}." if inside else ""
            raise PlanError(f"a rule matches nothing: {unknown('pattern', rule.pattern, allowed)}{hint}")


def _replaced(module: nn.Module, site: Site) -> list[nn.Parameter]:
    """The parameters that quantized weights take the place of, those of parametrizations among them."""
    own = dict(module.named_parameters(recurse=False))
    inner = [p for child in module.children() for p in child.parameters() if p.ndim > 1]
    return inner + [own[key] for key in site.weights if key in own]


def _in_plain_containers(model: nn.Module) -> set[nn.Module]:
    """Layers that some module holds in a list, tuple or dict of its own: nobody can replace them there."""
    found: set[nn.Module] = set()
    for module in model.modules():
        for name, value in vars(module).items():
            if name != "_modules" and isinstance(value, (list, tuple, dict)):
                items = value.values() if isinstance(value, dict) else value
                found.update(item for item in items if isinstance(item, nn.Module))
    return found


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that owns a weight matrix, but for those inside a known layer (parametrizations)."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        known = float_class(module) is not None
        own = (p for p in module.parameters(recurse=False) if p.ndim > 1 and p.is_floating_point())
        if known or isinstance(module, nn.MultiheadAttention):
            inside.update(child for child in module.modules() if child is not module)
        if module not in inside and (known or next(own, None) is not None):
            found[name] = module
    return found


def _ties(candidates: dict[str, nn.Module]) -> list[tuple[str, ...]]:
    owners: dict[int, list[str]] = {}
    for name, module in candidates.items():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                owners.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    return [tuple(names) for names in owners.values() if len(names) > 1]


def _agree_on_ties(sites: dict[str, Site], skipped: dict[str, str], ties: list[tuple[str, ...]]) -> None:
    """A tensor that two layers share is quantized for both alike, with the most bits that one of them wants; or for neither."""
    for tie in ties:
        members = [name.rpartition(".")[0] for name in tie]
        shapes = {tuple(sites[name].weights.values()) for name in members if name in sites}
        if all(name in sites for name in members) and len(shapes) == 1:
            schemes = [sites[name].scheme for name in members]
            finest = max(schemes, key=lambda scheme: scheme.weight.number.bits)
            for name, scheme in zip(members, schemes, strict=True):
                if scheme.weight != finest.weight:
                    sites[name] = replace(sites[name], scheme=_with_weight(scheme, finest))
            continue
        for name in members:
            if sites.pop(name, None) is not None:
                others = ", ".join(other for other in members if other != name)
                skipped[name] = f"tied to {others}, which is not quantized in the same way"


def _with_weight(scheme: Scheme, other: Scheme) -> Scheme:
    """``scheme`` with the other's weights; an input in groups of its own weights is then quantized by the row."""
    spec = scheme.input
    if spec is not None and spec.granularity.kind == "group":
        spec = replace(spec, granularity=PER_TOKEN)
    return Scheme(other.weight, spec, other.method)
