"""Block after block: what each layer gets from the quantized layers before it, and codes that make the best of that.

Two streams of hidden states go through a model's blocks: X through the float ones, Z through the quantized ones. At a time
there are one block's statistics in memory, and the hidden states of all calibration data.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fewbit.batches import Call, run
from fewbit.errors import CalibrationError, FewbitError, PlanError
from fewbit.methods import METHODS, Gptq, Moments
from fewbit.nn import layer_class
from fewbit.plan import Site
from fewbit.processes import share, summed, united
from fewbit.qtensor import QTensor, dequantize

HELD_OUT = 8  # one of so many tokens judges what the others give
HEAVY = 64.0  # a token counts at most so many times as much as the median one

Weights = dict[str, dict[str, QTensor]]  # by site and parameter


@dataclass
class Streams:
    """Hidden states before a block, by calibration batch, and the other arguments of the block.

    ``x`` are those of the float model, ``z`` those of the quantized one; ``quantize_block`` moves both on by a block.
    """

    x: list[Tensor]
    z: list[Tensor]
    calls: list[Call]


def find_blocks(model: nn.Module) -> list[str]:
    """The names of the blocks: the list of modules of one type that holds the most weights; empty if there is no such list."""
    most, names = -1, list[str]()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1:
            count = sum(p.numel() for p in module.parameters())
            if count > most:
                most, names = count, [f"{name}.{number}" if name else str(number) for number in range(len(module))]
    return names


@dataclass(frozen=True)
class Walk:
    """The sites whose method wants the inputs of layers: by block, with names within it, and those ``outside`` of blocks."""

    blocks: Mapping[str, Mapping[str, Site]]
    outside: Mapping[str, Site]

    @property
    def names(self) -> set[str]:
        inside = {f"{block}.{name}" for block, sites in self.blocks.items() for name in sites}
        return inside.union(self.outside)

    def of(self, weights: Weights, block: str) -> Weights:
        """Those of the weights that are in a block, or for "" those outside of all."""
        if block:
            return {name: own for name, own in weights.items() if name.startswith(f"{block}.")}
        prefixes = tuple(f"{name}." for name in self.blocks)
        return {name: own for name, own in weights.items() if not name.startswith(prefixes)}


def find_walk(model: nn.Module, sites: Mapping[str, Site]) -> Walk:
    """What there is to walk through; nothing in a model without blocks."""
    prefixes = find_blocks(model)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    blocks: dict[str, dict[str, Site]] = {prefix: {} for prefix in prefixes}
    outside: dict[str, Site] = {}
    for name, site in sites.items():
        module = model.get_submodule(name)
        if not _takes_inputs(module, site):
            continue
        prefix = next((prefix for prefix in prefixes if name.startswith(f"{prefix}.")), None)
        if prefix is None:
            outside[name] = site
        elif all(owners[id(p)] == 1 for p in module.parameters(recurse=False)):  # else no two blocks would agree
            blocks[prefix][name.removeprefix(f"{prefix}.")] = site
    return Walk(blocks, outside) if any(blocks.values()) else Walk({}, {})


@torch.no_grad()
def quantize_outside(model: nn.Module, walk: Walk, calls: Iterable[Call]) -> Weights:
    """The weights of the sites outside of blocks, for what they get in the float ``model``: they may be tied to the table
    that the blocks' inputs come from."""
    calls = list(calls)
    result: Weights = {}
    for name, site in walk.outside.items():
        both = _Both(name)
        for number, call in enumerate(calls):
            try:
                X = _tokens(model, name, {}, call)
            # A model raises anything on inputs it was not made for.
            except Exception as error:
                raise CalibrationError(
                    f"calibration batch {number}: {type(model).__name__} raised {type(error).__name__}: {error}"
                ) from error
            both.add(X, X)
        result[name] = _quantized(model, name, site, both.moments())
    return result


def quantize_blocks(
    model: nn.Module,
    walk: Walk,
    calls: Iterable[Call],
    others: Callable[[str], Weights],
    known: Callable[[str], Weights] = lambda block: {},
    placed: Callable[[str], AbstractContextManager[None]] = lambda block: contextlib.nullcontext(),
) -> Iterator[Weights]:
    """The weights of the sites in each block of the float ``model``, block by block.

    ``others(block)``: the weights of the sites in a block that are not walked to, of those outside of blocks for "".
    ``known(block)``: the weights of a block that were found before; nothing if they were not. ``placed(block)``: a context in
    which the block has its float weights, for a model that is not in memory as a whole.
    """
    calls = list(calls)
    names = list(walk.blocks)
    with torch.no_grad():
        hidden, arguments = _arguments(model, [model.get_submodule(name) for name in names], calls)
        before = _once(model, others(""))
        streams = Streams(hidden, [_split(_call_of(model, names[0], before, call))[0] for call in calls], [])
        del before
    for number, (name, inside) in enumerate(walk.blocks.items()):
        streams.calls = arguments[min(number, len(arguments) - 1)]
        beside, found = (_within(name, weights) for weights in (others(name), known(name)))
        try:
            with placed(name):
                found = quantize_block(model.get_submodule(name), inside, streams, beside, found)
        except FewbitError as error:
            raise type(error)(f"{name}.{error}") from None
        yield {f"{name}.{site}": weights for site, weights in found.items()}


def _once(model: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """What the weights are worth, by the names of the model's parameters; tied ones under one of them."""
    values: dict[int, tuple[str, Tensor]] = {}
    for name, own in weights.items():
        for full, value in _float_weights(model, name, own).items():
            values.setdefault(id(model.get_parameter(full)), (full, value))
    return dict(values.values())


def _within(block: str, weights: Weights) -> Weights:
    """The weights by names within the block."""
    return {name.removeprefix(f"{block}."): own for name, own in weights.items()}


@torch.no_grad()
def quantize_block(
    block: nn.Module,
    sites: Mapping[str, Site],
    streams: Streams,
    others: Weights | None = None,
    known: Weights | None = None,
) -> Weights:
    """The weights of ``sites`` of one float block, by name within it. Moves both streams behind the block.

    ``others``: weights of the block beside these sites; ``known``: those of the sites, if they are there already. The block
    itself is left as it is.
    """
    replaced: dict[str, Tensor] = {}
    result: Weights = dict(known or {})
    for name, weights in [*(others or {}).items(), *result.items()]:
        replaced.update(_float_weights(block, name, weights))
    stages = [] if result else _stages(block, sites, streams)
    for name in set(sites).difference(result, *stages):  # nothing reaches them
        module = block.get_submodule(name)
        [(key, matrix)] = layer_class(module).matrices(module).items()
        result[name] = {key: METHODS[sites[name].scheme.method].quantize(matrix.detach(), sites[name].scheme.weight)}
    for stage in stages:
        both = _Both(stage[0])
        for x, z, call in zip(streams.x, streams.z, streams.calls, strict=True):
            both.add(*(_tokens(block, stage[0], by, _joined(h, call)) for by, h in (({}, x), (replaced, z))))
        moments = both.moments()
        found = united({name: _quantized(block, name, sites[name], moments) for name in share(stage)})
        for name in stage:
            result[name] = found[name]
            replaced.update(_float_weights(block, name, found[name]))
    for i, call in enumerate(streams.calls):
        streams.x[i] = _hidden(_joined(streams.x[i], call).run(block))
        joined = _joined(streams.z[i], call)
        streams.z[i] = _hidden(functional_call(block, replaced, joined.args, joined.kwargs))
    return result


def _takes_inputs(module: nn.Module, site: Site) -> bool:
    """Whether the method wants the inputs of this layer, and the layer has one matrix that they meet."""
    keys = list(layer_class(module).matrices(module))
    return (
        isinstance(METHODS[site.scheme.method], Gptq)
        and len(keys) == 1
        and layer_class(module).channel_axis(module) == -1
        and module._parameters.get(keys[0]) is not None
    )


def _quantized(model: nn.Module, name: str, site: Site, moments: tuple[Moments, Moments]) -> dict[str, QTensor]:
    module = model.get_submodule(name)
    [(key, matrix)] = layer_class(module).matrices(module).items()
    method = METHODS[site.scheme.method]
    assert isinstance(method, Gptq)
    try:
        return {key: method.quantize_for(matrix.detach(), site.scheme.weight, *moments)}
    except ValueError as error:
        raise PlanError(f"{name}.{key}: cannot be quantized: {error}") from None


def _float_weights(block: nn.Module, name: str, weights: Mapping[str, QTensor]) -> dict[str, Tensor]:
    """What the quantized weights of a layer are worth, by the names of the block's parameters."""
    module = block.get_submodule(name)
    layer = layer_class(module)
    return {
        f"{name}.{key}": layer.from_matrix(module, dequantize(weight, module.get_parameter(key).dtype))
        for key, weight in weights.items()
    }


class _Found(BaseException):
    """Ends a forward pass at the module whose input was wanted. No Exception: models may catch those."""


def _call_of(model: nn.Module, name: str, replaced: Mapping[str, Tensor], call: Call) -> Call:
    """What the module of this name is called with when the model is; nothing after it is computed."""
    seen: list[Call] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Call(args, kwargs))
        raise _Found

    handle = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with contextlib.suppress(_Found):
            functional_call(model, dict(replaced), call.args, call.kwargs)
    finally:
        handle.remove()
    return seen[0]


def _tokens(model: nn.Module, name: str, replaced: Mapping[str, Tensor], call: Call) -> Tensor:
    """The input of the layer of this name, ``[tokens, columns]``."""
    x, _ = _split(_call_of(model, name, replaced, call))
    return x.reshape(-1, x.shape[-1]).to(torch.float32)


class _Both:
    """Moments of one layer's inputs, and those of the tokens held out: the last of each batch."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._moments: tuple[Moments, Moments] | None = None

    def add(self, X: Tensor, Z: Tensor) -> None:
        X, Z = _without_heavy_tokens(X, Z)
        if self._moments is None:
            self._moments = Moments.zeros(X.shape[1]), Moments.zeros(X.shape[1])
        kept = len(X) - len(X) // HELD_OUT
        self._moments[0].add(X[:kept], Z[:kept])
        self._moments[1].add(X[kept:], Z[kept:])

    def moments(self) -> tuple[Moments, Moments]:
        """Of the tokens of all processes."""
        assert self._moments is not None
        for both in self._moments:
            summed(both.H)
            summed(both.D)
        if not all(bool(part.isfinite().all()) for both in self._moments for part in (both.H, both.D)):
            raise CalibrationError(f"{self._name}: its input has a NaN or an infinity.")
        return self._moments


def _without_heavy_tokens(X: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the largest tokens made smaller.

    Large language models park attention on the first token, and to do so give it activations a thousand times as large as
    all others. In a sum of squares that one token is all there is, and the normalization behind it does not care.
    """
    squares = X.square().sum(1, keepdim=True)
    weight = (HEAVY * squares.median() / squares).clamp(max=1).nan_to_num(nan=1.0).sqrt()
    return X * weight, Z * weight


def _stages(block: nn.Module, sites: Mapping[str, Site], streams: Streams) -> list[list[str]]:
    """The sites in the order of their calls; those that get the same tensor together."""
    order: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Any:
        return lambda module, args, kwargs: order.append((name, _split(Call(args, kwargs))[0]))

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in sites]
    try:
        _joined(streams.x[0], streams.calls[0]).run(block)
    finally:
        for handle in handles:
            handle.remove()
    stages: list[tuple[Tensor, list[str]]] = []
    for name, x in order:
        if not any(name in names for _, names in stages):
            same = next((names for tensor, names in stages if tensor is x), None)
            if same is None:
                stages.append((x, [name]))
            else:
                same.append(name)
    return [names for _, names in stages]


def _arguments(
    model: nn.Module, blocks: list[nn.Module], calls: Iterable[Call]
) -> tuple[list[Tensor], list[list[Call]]]:
    """Hidden states before the first block, and what each block gets beside them; one entry if that is the same for all."""
    hidden: list[Tensor] = []
    seen: list[list[Call]] = [[] for _ in blocks]
    last = len(blocks) - 1

    def hook(number: int) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, rest = _split(Call(args, kwargs))
            seen[number].append(rest)
            if number == 0:
                hidden.append(x)
            if number == last:
                raise _Found

        return see

    handles = [block.register_forward_pre_hook(hook(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        for number, call in enumerate(calls):
            with contextlib.suppress(_Found):
                run(model, call, f"calibration batch {number}")
            if number == 0 and all(_same(seen[0][0], others[0]) for others in seen[1:] if others):
                last = 0  # the blocks after the first tell nothing new
                del seen[1:]
    finally:
        for handle in handles:
            handle.remove()
    return hidden, seen


def _split(call: Call) -> tuple[Tensor, Call]:
    """The first argument and the others."""
    if call.args:
        return call.args[0], Call(call.args[1:], call.kwargs)
    first, *_ = call.kwargs
    return call.kwargs[first], Call((), {key: value for key, value in call.kwargs.items() if key != first})


def _joined(hidden: Tensor, call: Call) -> Call:
    return Call((hidden, *call.args), call.kwargs)


def _hidden(output: Any) -> Tensor:
    """A block's hidden state: what it returns, or the first of several things."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, Tensor):
        raise CalibrationError(
            f"a block returned a {type(hidden).__name__}, needs a tensor or a tuple that begins with one."
        )
    return hidden


def _same(first: Call, second: Call) -> bool:
    """Whether two calls have the same objects as arguments, or equal plain values."""
    leaves = [pytree.tree_leaves((call.args, call.kwargs)) for call in (first, second)]
    return len(leaves[0]) == len(leaves[1]) and all(
        a is b or (not isinstance(a, Tensor) and type(a) is type(b) and a == b) for a, b in zip(*leaves, strict=True)
    )
