"""Eight-bit weights that no engine's int16 sums can saturate.

x86 CPUs without VNNI multiply unsigned activations with signed weights by vpmaddubsw, which adds two neighbouring products
and saturates at int16: 255 * 127 * 2 is twice too much. Here the codes of each pair of weights that engines add this way are
bounded: positive ones to 128 together, negative ones to -128 (255 * 128 = 32640 < 32768). The same model then gives the same
sums with and without VNNI, on ARM, in ONNX Runtime and in OpenVINO. It costs a few pairs a little, where 7-bit weights
("reduce_range") cost every weight a bit. Bounds on the accumulator as constraints: A2Q (https://arxiv.org/abs/2308.13504).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.methods.method import Method
from fewbit.methods.mse import MeanSquaredError
from fewbit.qtensor import LARGEST, QTensor, encode, pack, qparams, value_range
from fewbit.spec import QuantSpec, per_channel

LIMIT = 128  # of the sum of a pair's codes of one sign


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
        if (spec.format, spec.granularity, spec.symmetric, spec.scale) != ("int8", per_channel(0), True, None):
            return MeanSquaredError().quantize(weight, spec, importance)  # no engine adds such codes in int16
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


def bounded(codes: Tensor, pairs: tuple[Tensor, ...]) -> Tensor:
    """int8 ``codes`` ``[rows, columns]`` with what a pair has too much taken from its two codes, half each.

    ``pairs``: sets of disjoint pairs of columns, each ``[P, 2]``. Codes only get smaller, so that no set undoes another.
    """
    codes = codes.to(torch.int16)
    for columns in pairs:
        chosen = codes[:, columns]
        for sign in (1, -1):
            excess = ((chosen * sign).clamp(min=0).sum(2) - LIMIT).clamp(min=0).to(torch.int16)
            half = (excess + 1) // 2
            chosen = chosen - sign * torch.stack([half, excess - half], 2)
        codes[:, columns] = chosen
    return codes.to(torch.int8)


def saturates(codes: Tensor, pairs: tuple[Tensor, ...]) -> bool:
    """Whether some pair could leave int16 with activations from 0 to 255."""
    wide = codes.to(torch.int32)
    for columns in pairs:
        chosen = wide[:, columns]
        if bool((255 * chosen.clamp(min=0).sum(2) > 32767).any() or (255 * chosen.clamp(max=0).sum(2) < -32768).any()):
            return True
    return False
