"""Rows of a quantized table, without unpacking the rest of it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fewbit.qtensor import QTensor, dequantize


def rows(table: QTensor, indices: Tensor) -> QTensor:
    """The rows ``indices`` ``[n]`` of a table ``[rows, columns]``. Scales that all rows share stay shared."""
    scale = table.scale
    if scale.shape[0] > 1:
        scale = rows(scale, indices) if isinstance(scale, QTensor) else scale[indices]
    zero_point = table.zero_point
    if zero_point is not None and zero_point.shape[0] > 1:
        zero_point = zero_point[indices]
    shape = (indices.shape[0], *table.shape[1:])
    return replace(table, packed=table.packed[indices], scale=scale, zero_point=zero_point, shape=shape)


def embedding(indices: Tensor, table: QTensor) -> Tensor:
    """float32 ``[*indices.shape, columns]``."""
    values = dequantize(rows(table, indices.reshape(-1)))
    return values.reshape(*indices.shape, table.shape[1])
