"""Rows of a quantized table are the rows of the dequantized table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fewbit.ops import embedding
from fewbit.ops.linear import has_kernel
from fewbit.qtensor import dequantize, quantize, rows
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
    "int6-rows": QuantSpec("int6", per_channel(0)),
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


KERNEL_SPECS = {
    "int8-rows": SPECS["int8-rows"],
    "int8-asymmetric": QuantSpec("int8", PER_TOKEN, symmetric=False),
    "int4-rows": SPECS["int4-rows"],
    "int4-groups": QuantSpec("int4", per_group(32), symmetric=False, scale_dtype="bfloat16"),
}


@pytest.mark.parametrize("spec", KERNEL_SPECS.values(), ids=KERNEL_SPECS.keys())
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_the_operator_is_bit_equal_to_the_dequantized_table(spec: QuantSpec, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = quantize(torch.randn(10, 75) * torch.rand(10, 1), spec)
    assert has_kernel(table)
    for shape in ((), (7,), (2, 3), (0, 2)):
        indices = torch.randint(0, 10, shape, dtype=dtype)
        assert torch.equal(embedding(indices, table), dequantize(table)[indices])
    every_second = torch.arange(10, dtype=dtype)[::2]
    assert torch.equal(embedding(every_second, table), dequantize(table)[::2])


@pytest.mark.parametrize("spec", KERNEL_SPECS.values(), ids=KERNEL_SPECS.keys())
def test_the_operator_passes_opcheck(spec: QuantSpec) -> None:
    table = quantize(torch.randn(10, 75), spec)
    numbers = (75, spec.number.bits, spec.granularity.group_size)
    arguments = (torch.tensor([[3, 0], [9, 9]]), table.packed, table.scale, table.zero_point, *numbers)
    torch.library.opcheck(torch.ops.fewbit.embedding.default, arguments)


@pytest.mark.parametrize("spec", [*KERNEL_SPECS.values(), *SPECS.values()], ids=str)
@pytest.mark.parametrize("index", [10, -1, 2**40])
def test_indices_outside_the_table_are_refused(spec: QuantSpec, index: int) -> None:
    table = quantize(torch.randn(10, 75), spec)
    with pytest.raises(IndexError, match=rf"found index {index}: the table has 10 rows\."):
        embedding(torch.tensor([[3, index]]), table)


@pytest.mark.parametrize("spec", [KERNEL_SPECS["int8-rows"], SPECS["nf4-groups"]], ids=["operator", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_what_is_no_index_is_refused(spec: QuantSpec, dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match="dtype int32 or int64"):
        embedding(torch.ones(2, dtype=dtype), quantize(torch.randn(10, 75), spec))


def test_a_table_that_is_not_loaded_is_refused() -> None:
    table = quantize(torch.randn(10, 75), KERNEL_SPECS["int8-rows"])
    assert isinstance(table.scale, torch.Tensor)
    table = replace(table, packed=table.packed.to("meta"), scale=table.scale.to("meta"))
    assert embedding(torch.empty(2, 3, dtype=torch.int64, device="meta"), table).shape == (2, 3, 75)
    with pytest.raises(RuntimeError, match=r"x is on cpu, .* on meta\. Load the weights"):
        embedding(torch.tensor([1, 2]), table)


def test_an_exported_table_is_one_operator() -> None:
    table = quantize(torch.randn(10, 75), KERNEL_SPECS["int8-rows"])

    class Table(nn.Module):
        def forward(self, indices: torch.Tensor) -> torch.Tensor:
            return embedding(indices, table)

    indices = torch.tensor([1, 2])
    exported = torch.export.export(Table(), (indices,))
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert "fewbit.embedding.default" in called
    compiled = torch.compile(Table(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(indices), Table()(indices))
