"""Rows of a quantized table, without unpacking the rest of it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fewbit.qtensor import QTensor, dequantize


def rows(table: QTensor, indices: Tensor) -> QTensor:
    """The rows ``indices`` ``[n]`` of a table ``[rows, columns]``. Scales that all rows share stay shared."""
    scale = rows(table.scale, indices) if isinstance(table.scale, QTensor) else _rows(table.scale, indices)
    zero_point = None if table.zero_point is None else _rows(table.zero_point, indices)
    shape = (len(indices), *table.shape[1:])
    return replace(table, packed=table.packed[indices], scale=scale, zero_point=zero_point, shape=shape)


def embedding(indices: Tensor, table: QTensor) -> Tensor:
    """float32 ``[*indices.shape, columns]``."""
    values = dequantize(rows(table, indices.reshape(-1)))
    return values.reshape(*indices.shape, table.shape[1])


def _rows(scale: Tensor, indices: Tensor) -> Tensor:
    return scale if scale.shape[0] == 1 else scale[indices]
