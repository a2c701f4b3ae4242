"""What an observer is: a fold of a stream of tensors into a small state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from fewbit.spec import QuantSpec

State = dict[str, Tensor]


@dataclass(frozen=True)
class Observer(ABC):
    """Folds tensors into a state of bounded size.

    ``update`` and ``merge`` return new states and leave their arguments alone. For data seen as A then B,
    ``merge(state(A), state(B))`` is ``state(A + B)``, so that processes can calibrate parts of the data.
    """

    @abstractmethod
    def init(self) -> State:
        """The state before any data."""

    @abstractmethod
    def update(self, state: State, x: Tensor) -> State:
        """The state after ``x``, whose values are finite."""

    @abstractmethod
    def merge(self, first: State, second: State) -> State:
        """The state of both streams, ``first`` having come before ``second``."""


@dataclass(frozen=True)
class RangeObserver(Observer):
    """An observer of a whole tensor from whose state a range to quantize can be chosen."""

    @abstractmethod
    def choose_range(self, state: State, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """Smallest and largest value (0-dimensional) for a static range of ``spec``. The state has seen data."""

    def candidates(self, state: State, spec: QuantSpec) -> list[tuple[Tensor, Tensor]]:
        """The ranges among which the error of a layer's output is to decide; the first wins where nothing can be measured."""
        return [self.choose_range(state, spec)]
