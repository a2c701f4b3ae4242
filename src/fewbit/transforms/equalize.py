"""Cross-layer equalization (Nagel et al., Data-Free Quantization, https://arxiv.org/abs/1906.04721, section 4.1).

A layer, perhaps a ReLU, and a layer that alone reads it: what the first multiplies in a channel the second can divide again,
relu(s x) = s relu(x) for s > 0. Channel by channel both get the geometric mean of their ranges:

    W1 /= s,   b1 /= s,   W2 *= s,   s = sqrt(r1 r2) / r2,   r1, r2 = max |W| of the channel

ReLU6 is not homogeneous: nothing passes through it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbit.graph import Topology
from fewbit.transforms.fold_batch_norm import is_watched

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
SWEEPS = 20  # of chains of more than two layers, at most
CHANGE = 1.05  # less is not worth a sweep


def find_pairs(model: nn.Module, topology: Topology) -> list[tuple[str, str]]:
    """(first layer, second layer) by module names, in the order of execution."""
    modules = dict(model.named_modules())
    counts: dict[int, int] = {}
    for module in modules.values():
        for parameter in module.parameters(recurse=False):
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    pairs = []
    for call in topology.calls:
        name = call.module
        if not _is_plain(name, modules, topology, counts):
            continue
        reader = _only(topology.readers(name))
        if reader is not None and type(modules.get(reader)) is nn.ReLU and topology.sources(reader) == {name}:
            reader = _only(topology.readers(reader))
        if reader is None or not _is_plain(reader, modules, topology, counts):
            continue
        first, second = modules[name], modules[reader]
        if isinstance(first, nn.Linear) == isinstance(second, nn.Linear) and _inputs(second) == _outputs(first):
            pairs.append((name, reader))
    return pairs


@torch.no_grad()
def equalize(model: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Do so in place, until no pair changes much. The layers get new parameters."""
    layers: list[tuple[Any, Any]] = [(model.get_submodule(a), model.get_submodule(b)) for a, b in pairs]
    if any(layer.weight.is_meta for pair in layers for layer in pair):
        return  # only the structure is wanted
    for layer in dict.fromkeys(layer for pair in layers for layer in pair):
        for name, parameter in list(layer._parameters.items()):
            if parameter is not None:
                layer._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    for _ in range(SWEEPS):
        largest = max((_equalize(first, second) for first, second in layers), default=1.0)
        if largest < CHANGE:
            break


def _equalize(first: Any, second: Any) -> float:
    """Returns the largest factor by which a channel changed."""
    before = first.weight.flatten(1).abs().amax(1)
    columns = _by_input(second)
    after = columns.flatten(1).abs().amax(1)
    usable = (before > 0) & (after > 0)
    factor = torch.where(usable, (before / after).sqrt(), 1.0)
    first.weight.div_(factor.reshape(-1, *[1] * (first.weight.ndim - 1)))
    if first.bias is not None:
        first.bias.div_(factor)
    columns.mul_(factor.reshape(-1, *[1] * (columns.ndim - 1)))
    return float(torch.maximum(factor, 1 / factor).max())


def _by_input(layer: Any) -> Tensor:
    """The weight as a view with its input channels first; they are its output channels in depthwise convolutions."""
    weight: Tensor = layer.weight
    return weight if getattr(layer, "groups", 1) > 1 else weight.transpose(0, 1)


def _is_plain(name: str, modules: dict[str, nn.Module], topology: Topology, counts: dict[int, int]) -> bool:
    """A layer that runs once, with parameters of its own, dense or depthwise, that nobody watches."""
    layer: Any = modules.get(name)
    if type(layer) not in LAYERS or is_watched(layer) or len(topology.calls_of(name)) != 1:
        return False
    if not topology.calls_of(name)[0].alone or any(counts[id(p)] > 1 for p in layer.parameters(recurse=False)):
        return False
    groups = getattr(layer, "groups", 1)
    return groups == 1 or (groups == layer.in_channels == layer.out_channels)


def _only(names: set[str]) -> str | None:
    return next(iter(names)) if len(names) == 1 else None


def _inputs(layer: Any) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def _outputs(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)
