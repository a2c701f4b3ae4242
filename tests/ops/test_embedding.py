"""Rows of a quantized table are the rows of the dequantized table."""

from __future__ import annotations

import pytest
import torch

from fewbit.ops import embedding
from fewbit.ops.embedding import rows
from fewbit.qtensor import dequantize, quantize
from fewbit.spec import PER_TENSOR, PER_TOKEN, QuantSpec, per_channel, per_group

SPECS = {
    "int8-rows": QuantSpec("int8", per_channel(0)),
    "int8-tensor": QuantSpec("int8", PER_TENSOR),
    "int8-columns": QuantSpec("int8", per_channel(1)),
    "uint8-rows": QuantSpec("uint8", PER_TOKEN, symmetric=False),
    "uint8-tensor": QuantSpec("uint8", PER_TENSOR, symmetric=False),
    "int4-rows": QuantSpec("int4", per_channel(0)),
    "int4-groups": QuantSpec("int4", per_group(4), symmetric=False),
    "nf4-groups": QuantSpec("nf4", per_group(5), scale_dtype="bfloat16"),
    "two-level-rows": QuantSpec("int8", per_channel(0), scale=QuantSpec("int8")),
    "two-level-tensor": QuantSpec("int8", PER_TENSOR, scale=QuantSpec("int8")),
    "two-level-columns": QuantSpec("int8", per_channel(1), scale=QuantSpec("int8")),
    "two-level-groups": QuantSpec("int4", per_group(2), scale=QuantSpec("uint8", per_channel(0), symmetric=False)),
    "two-level-packed-scales": QuantSpec("int4", per_group(2), symmetric=False, scale=QuantSpec("int4", per_group(3))),
    "three-level": QuantSpec("nf4", per_group(2), scale=QuantSpec("int8", per_channel(0), scale=QuantSpec("int8"))),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("indices", [[3], [0, 9, 3, 3], [[1, 2, 3], [9, 9, 0]], [[[5]]], [], [[], []]], ids=str)
def test_rows_are_those_of_the_dequantized_table(spec: QuantSpec, indices: list[object]) -> None:
    torch.manual_seed(0)
    table = quantize(torch.randn(10, 11) * torch.rand(10, 1), spec)
    wanted = torch.tensor(indices, dtype=torch.int64)
    values = embedding(wanted, table)
    assert values.dtype == torch.float32
    assert torch.equal(values, dequantize(table)[wanted])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_table_of_one_row(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    table = quantize(torch.randn(1, 11), spec)
    wanted = torch.tensor([0, 0, 0])
    assert torch.equal(embedding(wanted, table), dequantize(table)[wanted])


def test_only_the_rows_asked_for_are_unpacked() -> None:
    table = quantize(torch.ones(100, 16), QuantSpec("int4", per_group(8)))
    few = rows(table, torch.tensor([7, 8]))
    assert few.shape == (2, 16)
    assert few.packed.shape == (2, 2)
    assert few.nbytes == table.nbytes // 50
