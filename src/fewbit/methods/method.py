"""What a method is: one weight and what was observed of its input, to codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from fewbit.qtensor import QTensor
from fewbit.spec import QuantSpec


@dataclass(frozen=True)
class Method(ABC):
    """Chooses the codes and scales of one weight matrix. Deterministic; leaves its arguments alone."""

    @property
    @abstractmethod
    def uses_importance(self) -> bool:
        """Whether calibration data, if there are any, should be folded into ``importance``."""

    @abstractmethod
    def quantize(
        self, weight: Tensor, spec: QuantSpec, importance: Tensor | None = None, pairs: tuple[Tensor, ...] = ()
    ) -> QTensor:
        """``weight`` ``[rows, columns]``, one row an output channel; ``importance`` E[x^2] of the input that each weight
        multiplies, broadcastable to it; ``pairs`` sets of disjoint pairs of columns ``[P, 2]`` whose products engines add
        in int16. ValueError if the weight has a NaN or an infinity, or the method has no codes of this spec."""
