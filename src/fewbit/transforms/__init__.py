"""Rewrites of the float model that keep its function: one file each, one line an entry in TRANSFORMS.

A transform is two functions: ``find`` reads the model (and its topology) and returns JSON data that say where it applies;
``apply`` does it in place from these data alone, so that loading a saved model repeats it without deciding anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fewbit.graph import Topology
from fewbit.transforms.equalize import equalize, find_pairs
from fewbit.transforms.fold_batch_norm import find_batch_norms, fold_batch_norms
from fewbit.transforms.fuse_activation import find_activations, fuse_activations
from fewbit.transforms.split_attention import MultiheadAttention, find_attention, split_attention


@dataclass(frozen=True)
class Transform:
    """``find(model, topology)`` -> places; ``apply(model, places)`` -> the model. ``needs_graph``: topology is required."""

    find: Callable[[nn.Module, Topology | None], list[Any]]
    apply: Callable[[nn.Module, list[Any]], nn.Module]
    needs_graph: bool


def _fold(model: nn.Module, places: list[Any]) -> nn.Module:
    fold_batch_norms(model, [(layer, norm) for layer, norm in places])
    return model


def _find_norms(model: nn.Module, topology: Topology | None) -> list[Any]:
    return [] if topology is None else [list(pair) for pair in find_batch_norms(model, topology)]


def _fuse(model: nn.Module, places: list[Any]) -> nn.Module:
    fuse_activations(model, [(layer, activation, kind) for layer, activation, kind in places])
    return model


def _find_activations(model: nn.Module, topology: Topology | None) -> list[Any]:
    return [] if topology is None else [list(place) for place in find_activations(model, topology)]


def _find_pairs(model: nn.Module, topology: Topology | None) -> list[Any]:
    return [] if topology is None else [list(pair) for pair in find_pairs(model, topology)]


def _equalize(model: nn.Module, places: list[Any]) -> nn.Module:
    equalize(model, [(first, second) for first, second in places])
    return model


TRANSFORMS: dict[str, Transform] = {
    "split_attention": Transform(lambda model, _: find_attention(model), split_attention, needs_graph=False),
    "fold_batch_norm": Transform(_find_norms, _fold, needs_graph=True),
    "equalize": Transform(_find_pairs, _equalize, needs_graph=True),
    "fuse_activation": Transform(_find_activations, _fuse, needs_graph=True),
}

__all__ = ["TRANSFORMS", "MultiheadAttention", "Transform"]
