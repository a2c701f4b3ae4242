"""Search of each block's range for the least squared error, as in OMSE (https://arxiv.org/abs/1902.06822)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.methods.method import Method
from fewbit.qtensor import (
    QTensor,
    by_rows,
    decode,
    dequantize,
    encode,
    qparams,
    quantize,
    quantize_with,
    reduce_blocks,
    value_range,
)
from fewbit.spec import QuantSpec

PIECE = 2**18  # weights searched at once: they stay in the cache, and memory stays bounded


@dataclass(frozen=True)
class MeanSquaredError(Method):
    """For each block, the share of its range that minimizes ``sum importance * (w - quantized w)^2``.

    ``shares`` are tried in order and the first of equals wins, so that the full range is kept where nothing is gained.
    """

    shares: tuple[float, ...] = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.81, 0.78, 0.75, 0.7, 0.65, 0.6)

    @property
    def uses_importance(self) -> bool:
        return True

    def quantize(
        self, weight: Tensor, spec: QuantSpec, importance: Tensor | None = None, pairs: tuple[Tensor, ...] = ()
    ) -> QTensor:
        low, high = value_range(weight, spec)
        importance = weight.new_ones(1, 1) if importance is None else torch.atleast_2d(importance)
        rows = len(weight)
        if len(low) == rows:  # no scale spans two rows: search piece by piece
            rows = max(1, PIECE // max(1, weight.shape[1]))
        best = [
            self._best_shares(
                weight[begin : begin + rows],
                spec,
                low[begin : begin + rows],
                high[begin : begin + rows],
                importance[begin : begin + rows] if len(importance) > 1 else importance,
            )
            for begin in range(0, len(weight), max(1, rows))
        ]
        share = torch.cat(best) if best else torch.ones_like(low)
        found = quantize_with(weight, spec, *qparams(low * share, high * share, spec))
        if spec.scale is None:
            return found
        # Rounding the scales may undo what the search gained.
        plain = quantize(weight, spec)
        if not by_rows(spec):
            errors = [((dequantize(q) - weight).square() * importance).sum() for q in (found, plain)]
            return found if bool(errors[0] <= errors[1]) else plain
        errors = [((dequantize(q) - weight).square() * importance).sum(1, keepdim=True) for q in (found, plain)]
        share = torch.where(errors[0] <= errors[1], share, 1.0)
        return quantize_with(weight, spec, *qparams(low * share, high * share, spec))

    def _best_shares(self, weight: Tensor, spec: QuantSpec, low: Tensor, high: Tensor, importance: Tensor) -> Tensor:
        # The search is on exact scales: those of two levels are known only when all blocks are chosen.
        spec = replace(spec, scale=None)
        best_error = torch.full_like(low, torch.inf)
        best_share = torch.ones_like(low)
        for share in self.shares:
            scale, zero_point = qparams(low * share, high * share, spec)
            assert isinstance(scale, Tensor)
            rounded = decode(encode(weight, spec, scale, zero_point), spec, scale, zero_point)
            error = reduce_blocks((rounded - weight).square() * importance, spec.granularity)
            better = error < best_error
            best_error = torch.where(better, error.to(best_error.dtype), best_error)
            best_share = torch.where(better, share, best_share)
        return best_share
