"""Search of each block's grid for the least squared error, as in OMSE (https://arxiv.org/abs/1902.06822)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.methods.blocks import Blocks, as_blocks, best_grid, best_option, total
from fewbit.methods.method import Method
from fewbit.qtensor import QTensor, by_rows, dequantize, pack, quantize, quantize_with, scale_values, stored_scale
from fewbit.spec import QuantSpec

PIECE = 2**17  # weights searched at once: they stay in the cache, and memory stays bounded
STEPS = (0, -1, 1)  # by which the codes of scales are moved


@dataclass(frozen=True)
class MeanSquaredError(Method):
    """For each block, the scale and zero point that minimize ``sum importance * (w - quantized w)^2``.

    Scales of two levels are rounded when all of them are known, and then moved, with the zero points, by single steps. No
    block is worse than on the grid of its range; with scales of two levels, no row, or no matrix if scales span rows.
    """

    @property
    def uses_importance(self) -> bool:
        return True

    def quantize(
        self, weight: Tensor, spec: QuantSpec, importance: Tensor | None = None, pairs: tuple[Tensor, ...] = ()
    ) -> QTensor:
        plain = quantize(weight, spec)
        if weight.numel() == 0:
            return plain
        h = None if importance is None else torch.atleast_2d(importance)
        shape = plain.scale_values.shape
        grids = [best_grid(blocks, spec) for blocks in _pieces(weight, h, spec)]
        scale, zero = (torch.cat(parts).reshape(shape) for parts in zip(*grids, strict=True))
        kept = stored_scale(scale, spec)
        if isinstance(kept, QTensor):
            index, zero = _choose(weight, h, spec, [(moved(kept, step), zero) for step in STEPS])
            kept = moved(kept, torch.tensor(STEPS)[index])
        else:
            assert isinstance(plain.scale, Tensor)
            ranged = torch.zeros_like(zero) if plain.zero_point is None else plain.zero_point.to(zero.dtype)
            index, zero = _choose(weight, h, spec, [(plain.scale, ranged), (kept, zero)])
            kept = torch.where(index == 0, plain.scale, kept)
        found = quantize_with(weight, spec, kept, None if spec.symmetric else zero.to(spec.number.dtype))
        if spec.scale is None:
            return found
        errors = [_errors(q, weight, h) for q in (found, plain)]
        if by_rows(spec):
            return _rows_of(errors[0] <= errors[1], found, plain)
        return found if float(errors[0].sum()) <= float(errors[1].sum()) else plain


def _choose(
    weight: Tensor, h: Tensor | None, spec: QuantSpec, options: list[tuple[Tensor | QTensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """For each block which option is best, and its zero point moved to the best one nearby."""
    flat = [(scale_values(scale, spec).reshape(-1), zero.reshape(-1)) for scale, zero in options]
    chosen, begin = [], 0
    for blocks in _pieces(weight, h, spec):
        end = begin + blocks.w.shape[1]
        chosen.append(best_option(blocks, spec, [(scale[begin:end], zero[begin:end]) for scale, zero in flat]))
        begin = end
    index, zero = (torch.cat(parts).reshape(options[0][1].shape) for parts in zip(*chosen, strict=True))
    return index, zero


def moved(scale: QTensor, step: int | Tensor) -> QTensor:
    """Quantized scales whose codes are moved, none of them out of its range or to a scale of zero."""
    number = scale.spec.number
    if not number.is_integer:
        return scale
    low, high = number.bound(scale.spec.symmetric)
    codes = (scale.codes.to(torch.int32) + step).clamp(int(low), int(high)).to(number.dtype)
    return replace(scale, packed=pack(codes, number))


def _pieces(weight: Tensor, h: Tensor | None, spec: QuantSpec) -> Iterator[Blocks]:
    """All blocks, a bounded number of weights at a time if no block spans two rows."""
    granularity = spec.granularity
    by_row = granularity.kind in ("token", "group") or (granularity.kind == "channel" and granularity.axis % 2 == 0)
    rows = max(1, PIECE // weight.shape[1]) if by_row else len(weight)
    for begin in range(0, len(weight), rows):
        part = weight[begin : begin + rows]
        of_part = h if h is None or len(h) == 1 else h[begin : begin + rows]
        yield Blocks(
            as_blocks(part, granularity),
            None if of_part is None else as_blocks(of_part.expand(part.shape), granularity),
        )


def _errors(q: QTensor, weight: Tensor, h: Tensor | None) -> Tensor:
    """``sum h (w - quantized w)^2`` of each row."""
    e = (dequantize(q) - weight).square().T
    return total(e if h is None else e * h.T)


def _rows_of(first: Tensor, q: QTensor, other: QTensor) -> QTensor:
    """The rows of ``q`` where ``first``, of ``other`` elsewhere."""

    def rows(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(first[:, None], a, b)

    scale: Tensor | QTensor
    if isinstance(q.scale, QTensor):
        assert isinstance(other.scale, QTensor)
        scale = _rows_of(first, q.scale, other.scale)
    else:
        assert isinstance(other.scale, Tensor)
        scale = rows(q.scale, other.scale)
    zero_point = q.zero_point
    if zero_point is not None and other.zero_point is not None:
        zero_point = rows(zero_point, other.zero_point)
    return replace(q, packed=rows(q.packed, other.packed), scale=scale, zero_point=zero_point)
