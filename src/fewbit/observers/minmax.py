"""Smallest and largest value, over all data or averaged over batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.observers.observer import RangeObserver, State
from fewbit.spec import QuantSpec


@dataclass(frozen=True)
class MinMax(RangeObserver):
    """The smallest and the largest value seen."""

    def init(self) -> State:
        return {
            "low": torch.tensor(torch.inf, dtype=torch.float64),
            "high": torch.tensor(-torch.inf, dtype=torch.float64),
        }

    def update(self, state: State, x: Tensor) -> State:
        low, high = (end.to("cpu", torch.float64) for end in x.detach().aminmax())
        return self.merge(state, {"low": low, "high": high})

    def merge(self, first: State, second: State) -> State:
        return {
            "low": torch.minimum(first["low"], second["low"]),
            "high": torch.maximum(first["high"], second["high"]),
        }

    def choose_range(self, state: State, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return state["low"], state["high"]


@dataclass(frozen=True)
class MovingAverage(RangeObserver):
    """Exponential moving average of each batch's smallest and largest value, corrected for its start at zero.

    The state keeps the weighted sums and the weight, which makes two streams mergeable: the first one's weight decays by
    the number of batches in the second.
    """

    momentum: float = 0.05

    def init(self) -> State:
        return {name: torch.zeros((), dtype=torch.float64) for name in ("low", "high", "weight", "batches")}

    def update(self, state: State, x: Tensor) -> State:
        low, high = (end.to("cpu", torch.float64) for end in x.detach().aminmax())
        batch = {
            "low": self.momentum * low,
            "high": self.momentum * high,
            "weight": torch.tensor(self.momentum, dtype=torch.float64),
            "batches": torch.ones((), dtype=torch.float64),
        }
        return self.merge(state, batch)

    def merge(self, first: State, second: State) -> State:
        decay = (1 - self.momentum) ** second["batches"]
        merged = {name: first[name] * decay + second[name] for name in ("low", "high", "weight")}
        return {**merged, "batches": first["batches"] + second["batches"]}

    def choose_range(self, state: State, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return state["low"] / state["weight"], state["high"] / state["weight"]
