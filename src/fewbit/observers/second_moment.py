"""Mean of x^2 for each input channel: how much an error in a weight matters to the layer's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.observers.observer import Observer, State


@dataclass(frozen=True)
class SecondMoment(Observer):
    """Sums of squares over all axes but the first. ``update`` takes ``[channels, ...]``."""

    def init(self) -> State:
        return {"squares": torch.zeros((), dtype=torch.float64), "count": torch.zeros((), dtype=torch.int64)}

    def update(self, state: State, x: Tensor) -> State:
        values = x.detach().float()
        rest = list(range(1, values.dim()))
        squares = torch.linalg.vector_norm(values, dim=rest).double().square() if rest else values.double().square()
        return self.merge(state, {"squares": squares.cpu(), "count": torch.tensor(x.numel() // len(x))})

    def merge(self, first: State, second: State) -> State:
        return {name: first[name] + second[name] for name in ("squares", "count")}

    def mean(self, state: State) -> Tensor:
        """E[x^2], ``[channels]`` float32."""
        return (state["squares"] / state["count"]).to(torch.float32)
