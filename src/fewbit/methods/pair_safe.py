"""Eight-bit weights that no engine's int16 sums can saturate: see ``fewbit.ops.pairs``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.methods.method import Method
from fewbit.methods.mse import MeanSquaredError
from fewbit.ops.pairs import bounded, has_pairs
from fewbit.qtensor import LARGEST, QTensor, encode, pack, qparams, value_range
from fewbit.spec import QuantSpec


@dataclass(frozen=True)
class PairSafe(Method):
    """For each row, the scale with the least ``sum importance * (w - quantized w)^2`` after the pairs were bounded.

    ``shares`` of the row's range: beyond 1 pairs need less bounding, below it large weights are clipped.
    """

    shares: tuple[float, ...] = (
        *(1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.81, 0.78, 0.75, 0.7, 0.65, 0.6),
        *(1.02, 1.04, 1.07, 1.1, 1.13, 1.17, 1.22, 1.28, 1.35, 1.42, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0),
    )

    @property
    def uses_importance(self) -> bool:
        return True

    def quantize(
        self, weight: Tensor, spec: QuantSpec, importance: Tensor | None = None, pairs: tuple[Tensor, ...] = ()
    ) -> QTensor:
        if not has_pairs(spec):
            return MeanSquaredError().quantize(weight, spec, importance)
        low, high = value_range(weight, spec)
        importance = weight.new_ones(1, 1) if importance is None else torch.atleast_2d(importance)
        best_error = torch.full_like(low, torch.inf)
        best_scale = torch.ones(low.shape)
        best_codes = torch.zeros(weight.shape, dtype=torch.int8)
        largest = float(torch.maximum(-low, high).max()) if low.numel() else 0.0
        for share in self.shares:
            if share > 1 and share * largest > LARGEST:
                continue
            scale, _ = qparams(low * share, high * share, spec)
            assert isinstance(scale, Tensor)
            codes = bounded(encode(weight, spec, scale, None), pairs)
            error = ((codes * scale - weight).square() * importance).sum(1, keepdim=True).to(best_error.dtype)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_codes = torch.where(better, codes, best_codes)
        return QTensor(pack(best_codes, spec.number), best_scale, None, spec, tuple(weight.shape))
