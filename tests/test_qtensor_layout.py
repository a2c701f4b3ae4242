"""Packed codes, shapes of scales, rows of quantized matrices."""

from __future__ import annotations

import pytest
import torch

from fewbit.errors import PlanError
from fewbit.formats import FORMATS
from fewbit.qtensor import (
    dequantize,
    joined,
    pack,
    packed_dtype,
    packed_shape,
    quantize,
    rows,
    scale_shape,
    unpack,
)
from fewbit.spec import PER_TENSOR, PER_TOKEN, Granularity, QuantSpec, per_channel, per_group


@pytest.mark.parametrize(("name", "per_word"), [("int4", 8), ("nf4", 8), ("int6", 5)])
@pytest.mark.parametrize("length", range(1, 18))
def test_unpack_is_the_inverse_of_pack(name: str, per_word: int, length: int) -> None:
    torch.manual_seed(length)
    number = FORMATS[name]
    codes = torch.randint(number.code_min, number.code_min + 2**number.bits, (3, 2, length)).to(number.dtype)
    packed = pack(codes, number)
    assert (packed.shape, packed.dtype) == (packed_shape((3, 2, length), number), packed_dtype(number))
    assert packed.shape == (3, 2, -(-length // per_word))
    assert torch.equal(unpack(packed, number, (3, 2, length)), codes)


def test_six_bits_go_five_to_a_word() -> None:
    packed = pack(torch.tensor([[-32, -31, 0, 1, 31, 2]], dtype=torch.int8), FORMATS["int6"])
    assert packed.tolist() == [[0 | 1 << 6 | 32 << 12 | 33 << 18 | 63 << 24, 34]]


@pytest.mark.parametrize(
    ("codes", "word"),
    [
        ([-8, -7, -6, -5, -4, -3, -2, -1], 0x76543210),
        ([0, 1, 2, 3, 4, 5, 6, 7], 0xFEDCBA98 - 2**32),
        ([7] * 8, -1),
        ([-8] * 7 + [0], -(2**31)),
        ([0, 1], 0x98),
    ],
    ids=["low-nibble-first", "high-bit", "all-ones", "sign-bit", "last-word-filled-with-zero-bits"],
)
def test_the_packed_layout_is_that_of_compressed_tensors(codes: list[int], word: int) -> None:
    packed = pack(torch.tensor([codes], dtype=torch.int8), FORMATS["int4"])
    assert packed.dtype == torch.int32
    assert packed.tolist() == [[word]]


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        (PER_TENSOR, (1, 1, 1)),
        (PER_TOKEN, (2, 3, 1)),
        (per_channel(0), (2, 1, 1)),
        (per_channel(1), (1, 3, 1)),
        (per_channel(-1), (1, 1, 10)),
        (per_group(4), (2, 3, 3)),
        (per_group(16), (2, 3, 1)),
    ],
    ids=str,
)
def test_scale_shape(granularity: Granularity, shape: tuple[int, ...]) -> None:
    assert scale_shape((2, 3, 10), granularity) == shape


@pytest.mark.parametrize("axis", [2, -3])
def test_a_channel_axis_outside_the_tensor_is_refused(axis: int) -> None:
    with pytest.raises(PlanError, match=f"channel axis {axis} is outside a tensor of 2 axes"):
        quantize(torch.ones(2, 2), QuantSpec("int8", per_channel(axis)))


def test_nbytes_counts_codes_scales_and_zero_points() -> None:
    x = torch.ones(4, 16)
    assert quantize(x, QuantSpec("int8", per_channel(0))).nbytes == 64 + 4 * 4
    assert quantize(x, QuantSpec("int4", per_group(8), symmetric=False)).nbytes == 32 + 8 * 4 + 8
    two_levels = QuantSpec("int4", per_group(8), scale=QuantSpec("int8", per_channel(0)))
    assert quantize(x, two_levels).nbytes == 32 + 8 + 4 * 4


@pytest.mark.parametrize("spec", [QuantSpec("int8", per_channel(0)), QuantSpec("int4", per_group(5), symmetric=False)])
def test_a_large_matrix_is_rounded_in_pieces_with_the_same_result(
    spec: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(37, 13)
    whole = quantize(x, spec)
    monkeypatch.setattr("fewbit.qtensor.PIECE", 40)
    pieces = quantize(x, spec)
    assert torch.equal(whole.packed, pieces.packed) and torch.equal(whole.codes, pieces.codes)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int4", per_group(5), symmetric=False),
        QuantSpec("int6", per_channel(0)),
        QuantSpec("int4", per_group(4), scale=QuantSpec("uint8", per_channel(0), symmetric=False)),
    ],
    ids=["groups", "rows", "two-levels"],
)
def test_rows_are_cut_and_joined(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    whole = quantize(torch.randn(9, 13), spec)
    pieces = [rows(whole, slice(begin, begin + 4)) for begin in (0, 4, 8)]
    assert [piece.shape for piece in pieces] == [(4, 13), (4, 13), (1, 13)]
    for begin, piece in zip((0, 4, 8), pieces, strict=True):
        assert torch.equal(dequantize(piece), dequantize(whole)[begin : begin + 4])
    again = joined(pieces)
    assert again.shape == whole.shape and torch.equal(again.packed, whole.packed)
    assert torch.equal(again.scale_values, whole.scale_values) and torch.equal(dequantize(again), dequantize(whole))


def test_rows_of_a_matrix_with_one_scale_share_it() -> None:
    whole = quantize(torch.randn(9, 13), QuantSpec("int8"))
    piece = rows(whole, slice(2, 5))
    assert piece.scale is whole.scale and torch.equal(dequantize(piece), dequantize(whole)[2:5])
