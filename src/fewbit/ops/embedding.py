"""Rows of a quantized table, without unpacking the rest of it; ``fewbit::embedding`` where a compiled kernel can do it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fewbit.ops import native
from fewbit.ops.linear import LIBRARY, TAGS, assembled, has_kernel, register, same_device
from fewbit.qtensor import QTensor, dequantize, rows

LIBRARY.define(
    "embedding(Tensor indices, Tensor packed, Tensor scale, Tensor? zero_point, int columns, int bits, int group) -> Tensor",
    tags=TAGS,
)


def embedding(indices: Tensor, table: QTensor) -> Tensor:
    """float32 ``[*indices.shape, columns]``; IndexError for an index that is not a row."""
    try:
        if has_kernel(table) and indices.dtype in (torch.int64, torch.int32):
            parts = (table.packed, table.scale, table.zero_point, table.shape[1])
            numbers = (table.spec.number.bits, table.spec.granularity.group_size)
            return cast(Tensor, torch.ops.fewbit.embedding.default(indices, *parts, *numbers))
        return _values(indices, table)
    except (IndexError, RuntimeError) as error:
        outside = indices[(indices < 0) | (indices >= table.shape[0])]
        if outside.numel():
            raise IndexError(f"found index {outside[0].item()}: the table has {table.shape[0]} rows.") from error
        raise


def _values(indices: Tensor, table: QTensor) -> Tensor:
    values = dequantize(rows(table, indices.reshape(-1)))
    return values.reshape(*indices.shape, table.shape[1])


def _embedding(
    indices: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, bits: int, group: int
) -> Tensor:
    native.remind(indices)
    return _values(indices, assembled(packed, scale, zero_point, columns, bits, group)).contiguous()


def _fake(
    indices: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, bits: int, group: int
) -> Tensor:
    same_device(indices, packed, scale, zero_point)
    return indices.new_empty((*indices.shape, columns), dtype=torch.float32)


register("embedding", _embedding, _fake)
