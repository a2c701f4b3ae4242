"""Batch norm folded into the convolution or linear layer before it (Krishnamoorthi, https://arxiv.org/abs/1806.08342, 3.2.2).

gamma (W x + b - mean) / sqrt(var + eps) + beta = (s W) x + (b - mean) s + beta,   s = gamma / sqrt(var + eps)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbit.graph import Topology

FOLDABLE: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def find_batch_norms(model: nn.Module, topology: Topology) -> list[tuple[str, str]]:
    """(layer, batch norm) pairs of module names: each runs once, and nothing else reads the layer's result."""
    modules = dict(model.named_modules(remove_duplicate=False))
    pairs = []
    for call in topology.calls:
        following = call.feeds[0] if len(call.feeds) == 1 else None
        if following is None or following.operator != "batch_norm":
            continue
        alone = call.alone and following.alone
        once = alone and len(topology.calls_of(call.module)) == 1 and len(topology.calls_of(following.module)) == 1
        layer: Any = modules.get(call.module)
        norm: Any = modules.get(following.module)
        if not once or type(layer) not in FOLDABLE or type(norm) not in BATCH_NORM or norm.running_mean is None:
            continue
        if any(is_watched(module) for module in (layer, norm)):
            continue
        # nn.Linear on [N, C, L] has its channels last, BatchNorm1d in the middle: then they are not each other's.
        if _channels(layer) == norm.num_features and not _is_shared(model, layer):
            pairs.append((call.module, following.module))
    return pairs


def fold_batch_norms(model: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Fold each pair in place: the layer gets new parameters, the batch norm becomes Identity."""
    for layer_name, norm_name in pairs:
        layer: Any = model.get_submodule(layer_name)
        norm: Any = model.get_submodule(norm_name)
        weight, bias = _folded(layer, norm)
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        identity = nn.Identity().train(norm.training)
        # One norm under two names is one norm.
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is norm:
                    parent._modules[name] = identity


@torch.no_grad()
def _folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    weight: Tensor = layer.weight
    # float64: the product is rounded once.
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double() * scale
    if layer.bias is not None:
        bias = bias + layer.bias.double() * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    if getattr(layer, "transposed", False):  # [I, O / groups, ...]: a row belongs to one group
        per_group = scale.reshape(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
        factor = per_group.reshape(weight.shape[0], -1, *(1,) * (weight.ndim - 2))
    else:
        factor = scale.reshape(-1, *(1,) * (weight.ndim - 1))
    return (weight.double() * factor).to(weight.dtype), bias.to(weight.dtype)


def is_watched(module: Any) -> bool:
    """Whether someone changed or hooked this module's forward, which a rewrite would lose."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _channels(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _is_shared(model: nn.Module, layer: Any) -> bool:
    """Whether another module holds the same weight or bias, which folding would have to change too."""
    own = {id(parameter) for parameter in layer.parameters(recurse=False)}
    others = (p for module in model.modules() if module is not layer for p in module.parameters(recurse=False))
    return any(id(parameter) in own for parameter in others)
