"""Round to nearest on the grid of each block's own range."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewbit.methods.method import Method
from fewbit.qtensor import QTensor, quantize
from fewbit.spec import QuantSpec


@dataclass(frozen=True)
class RoundToNearest(Method):
    """The full range, no search."""

    @property
    def uses_importance(self) -> bool:
        return False

    def quantize(
        self, weight: Tensor, spec: QuantSpec, importance: Tensor | None = None, pairs: tuple[Tensor, ...] = ()
    ) -> QTensor:
        return quantize(weight, spec)
