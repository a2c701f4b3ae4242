"""Arithmetic on activations that stay uint8 codes, in channels-last order: what a static int8 model runs on once lowered.

    quantize_uint8, dequantize_uint8    float32 to codes and back
    pack_uint8                          int8 weights to what the kernels of this machine read; not to be saved
    conv_uint8, linear_uint8            products of codes; the epilogue rescales, adds codes of the result's shape, clamps
    add_uint8, average_uint8            sums of two tensors, means over windows
    max_pool_uint8                      the largest code of each window
    lookup_uint8                        any function of a code

Sums are exact in int32, and each step from them to a code is one float32 operation: results are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, max_pool2d, pad

from fewbit.ops import native
from fewbit.ops.linear import LIBRARY, TAGS, register, same_device

_RESCALE = "float low, float high, int? zero_point"
_OTHER = "Tensor? other=None, float other_multiplier=0.0, int other_zero_point=0"  # as add_uint8 has it
_WEIGHT = "Tensor x, Tensor packed, int[] weight_shape, Tensor multiplier, Tensor offset"
for _schema in (
    "quantize_uint8(Tensor x, float scale, int zero_point) -> Tensor",
    "dequantize_uint8(Tensor codes, float scale, int zero_point) -> Tensor",
    "pack_uint8(Tensor weight, int groups) -> Tensor",
    f"conv_uint8({_WEIGHT}, int[] stride, int[] padding, int[] dilation, int groups, int input_zero_point, {_RESCALE},"
    f" {_OTHER}) -> Tensor",
    f"linear_uint8({_WEIGHT}, {_RESCALE}, {_OTHER}) -> Tensor",
    "add_uint8(Tensor a, Tensor b, float a_multiplier, int a_zero_point, float b_multiplier, int b_zero_point, float low,"
    " float high, int zero_point) -> Tensor",
    "average_uint8(Tensor x, int[] kernel, int[] stride, int[] padding, bool count_include_pad, float multiplier,"
    " int input_zero_point, int zero_point) -> Tensor",
    "max_pool_uint8(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor",
    "lookup_uint8(Tensor x, Tensor table) -> Tensor",
):
    LIBRARY.define(_schema, tags=TAGS)

HEADER = 64  # bytes before packed weights; zeros without kernels
LARGEST = 2**31 - 1


def rescale(t: Tensor, low: float, high: float, zero_point: int | None) -> Tensor:
    """Codes, or float32 without a zero point, of float32 ``t``."""
    if zero_point is None:
        return t.clamp(low, high)
    return (t.round() + zero_point).clamp(low, high).to(torch.uint8)


def packed_bytes(shape: Sequence[int], groups: int) -> int:
    """Of the packed weight, on any machine: rows of channels and columns of products are filled up."""
    outputs, channels, height, width = shape
    if channels == 1 and outputs == groups and groups > 1:
        return HEADER + _up(outputs, 16) * width * _up(height, 4)
    return HEADER + groups * _up(outputs // groups, 16) * _up(channels * height * width, 4)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"fewbit: {message}.")


def _check_dtype(x: Tensor, dtype: torch.dtype, what: str) -> None:
    _check(x.dtype == dtype, f"{what} must be {str(dtype).removeprefix('torch.')}, found {x.dtype}")


def _check_filter(shape: Sequence[int], groups: int) -> None:
    _check(
        len(shape) == 4 and min(shape) >= 1, f"a weight must be [outputs, channels, height, width], found {list(shape)}"
    )
    _check(groups >= 1 and shape[0] % groups == 0, f"groups must divide the outputs {shape[0]}, found {groups}")
    products = prod(shape[1:])
    _check(products * 255 * 128 <= LARGEST, f"sums of {products} products may exceed int32")


def _windows(shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """How many windows ``[height, width]`` an image ``[batch, height, width, channels]`` has."""
    _check(len(stride) == 2 and min(stride) >= 1, f"stride must be two numbers of at least 1, found {list(stride)}")
    _check(len(padding) == 2 and min(padding) >= 0, f"padding must be two numbers of at least 0, found {list(padding)}")
    room = [shape[1 + i] + 2 * padding[i] - kernel[i] for i in (0, 1)]
    _check(min(room) >= 0, f"the window {list(kernel)} is larger than the image {list(shape[1:3])} with its padding")
    return [room[i] // stride[i] + 1 for i in (0, 1)]


def _conv_shape(
    x: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    _check_dtype(x, torch.uint8, "x")
    _check_filter(weight_shape, groups)
    channels = weight_shape[1] * groups
    _check(x.ndim == 4 and x.shape[3] == channels, f"x must have {channels} channels, found {list(x.shape)}")
    _check(len(dilation) == 2 and min(dilation) >= 1, f"dilation must be two numbers of at least 1, found {dilation}")
    kernel = [(weight_shape[2 + i] - 1) * dilation[i] + 1 for i in (0, 1)]
    return (x.shape[0], *_windows(x.shape, kernel, stride, padding), weight_shape[0])


def _linear_shape(x: Tensor, weight_shape: Sequence[int]) -> tuple[int, ...]:
    _check_dtype(x, torch.uint8, "x")
    _check_filter(weight_shape, 1)
    _check(list(weight_shape[2:]) == [1, 1], f"the weight must be [outputs, inputs, 1, 1], found {list(weight_shape)}")
    _check(x.shape[-1:] == (weight_shape[1],), f"x must be [..., {weight_shape[1]}], found {list(x.shape)}")
    return (*x.shape[:-1], weight_shape[0])


def _check_other(other: Tensor | None, shape: Sequence[int], zero_point: int | None) -> None:
    if other is None:
        return
    _check_dtype(other, torch.uint8, "other")
    _check(zero_point is not None, "where other codes are added the result must be codes too: zero_point is missing")
    _check(
        tuple(other.shape) == tuple(shape),
        f"other must be of the result's shape {list(shape)}, found {list(other.shape)}",
    )


def _average_shape(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> tuple[int, ...]:
    _check_dtype(x, torch.uint8, "x")
    _check(x.ndim == 4, f"x must be [batch, height, width, channels], found {list(x.shape)}")
    _check(len(kernel) == 2 and min(kernel) >= 1, f"kernel must be two numbers of at least 1, found {list(kernel)}")
    windows = _windows(x.shape, kernel, stride, padding)
    inside = padding[0] < kernel[0] and padding[1] < kernel[1]
    _check(inside, f"padding must be less than the kernel {list(kernel)}, found {list(padding)}")
    _check(prod(kernel) * 255 <= LARGEST, f"sums over windows {list(kernel)} may exceed int32")
    return (x.shape[0], *windows, x.shape[3])


def _unpacked(packed: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    fits = packed.dtype == torch.uint8 and packed.shape == (packed_bytes(shape, groups),)
    _check(
        fits and not packed[:HEADER].any(), f"packed must be what pack_uint8 returns here for a weight {list(shape)}"
    )
    return packed[HEADER : HEADER + prod(shape)].view(torch.int8).reshape(*shape)


def _quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    native.remind(x)
    _check_dtype(x, torch.float32, "x")
    codes = (
        x / torch.full((1,), scale, device=x.device)
    ).round() + zero_point  # a scalar may be multiplied by its inverse
    return codes.clamp(0, 255).to(torch.uint8).contiguous()


def _dequantize(codes: Tensor, scale: float, zero_point: int) -> Tensor:
    native.remind(codes)
    _check_dtype(codes, torch.uint8, "codes")
    return _scaled(codes, scale, zero_point).contiguous()


def _scaled(codes: Tensor, scale: float, zero_point: int) -> Tensor:
    return (codes.to(torch.int32) - zero_point).to(torch.float32) * scale


def _pack(weight: Tensor, groups: int) -> Tensor:
    native.remind(weight)
    _check_dtype(weight, torch.int8, "weight")
    _check_filter(weight.shape, groups)
    after = packed_bytes(weight.shape, groups) - HEADER - weight.numel()
    return pad(weight.reshape(-1).view(torch.uint8), (HEADER, after))


def _conv(
    x: Tensor,
    packed: Tensor,
    weight_shape: Sequence[int],
    multiplier: Tensor,
    offset: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_zero_point: int,
    low: float,
    high: float,
    zero_point: int | None,
    other: Tensor | None = None,
    other_multiplier: float = 0.0,
    other_zero_point: int = 0,
) -> Tensor:
    native.remind(x)
    _check_other(other, _conv_shape(x, weight_shape, stride, padding, dilation, groups), zero_point)
    weight = _unpacked(packed, weight_shape, groups)
    around = (padding[1], padding[1], padding[0], padding[0])
    image = pad(x.permute(0, 3, 1, 2), around, value=input_zero_point)
    # float64 has every sum exactly.
    sums = conv2d(image.double(), weight.double(), None, tuple(stride), 0, tuple(dilation), groups)
    t = (sums.to(torch.int32).permute(0, 2, 3, 1) + offset).to(torch.float32) * multiplier
    if other is not None:
        t = t + _scaled(other, other_multiplier, other_zero_point)
    return rescale(t, low, high, zero_point).contiguous()


def _linear(
    x: Tensor,
    packed: Tensor,
    weight_shape: Sequence[int],
    multiplier: Tensor,
    offset: Tensor,
    low: float,
    high: float,
    zero_point: int | None,
    other: Tensor | None = None,
    other_multiplier: float = 0.0,
    other_zero_point: int = 0,
) -> Tensor:
    native.remind(x)
    _check_other(other, _linear_shape(x, weight_shape), zero_point)
    weight = _unpacked(packed, weight_shape, 1).flatten(1)
    sums = torch.nn.functional.linear(x.double(), weight.double()).to(torch.int32)
    t = (sums + offset).to(torch.float32) * multiplier
    if other is not None:
        t = t + _scaled(other, other_multiplier, other_zero_point)
    return rescale(t, low, high, zero_point).contiguous()


def _add(
    a: Tensor,
    b: Tensor,
    a_multiplier: float,
    a_zero_point: int,
    b_multiplier: float,
    b_zero_point: int,
    low: float,
    high: float,
    zero_point: int,
) -> Tensor:
    native.remind(a)
    _check_dtype(a, torch.uint8, "a")
    _check_dtype(b, torch.uint8, "b")
    _check(a.shape == b.shape, f"a and b must be of the same shape, found {list(a.shape)} and {list(b.shape)}")
    t = _scaled(a, a_multiplier, a_zero_point) + _scaled(b, b_multiplier, b_zero_point)
    return rescale(t, low, high, zero_point).contiguous()


def _average(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    multiplier: float,
    input_zero_point: int,
    zero_point: int,
) -> Tensor:
    native.remind(x)
    _average_shape(x, kernel, stride, padding)
    around = (padding[1], padding[1], padding[0], padding[0])

    def sums(image: Tensor) -> Tensor:  # float64 has them exactly
        total = avg_pool2d(pad(image.double(), around), tuple(kernel), tuple(stride), divisor_override=1)
        return total.to(torch.float32).permute(0, 2, 3, 1)

    image = x.permute(0, 3, 1, 2).to(torch.int32) - input_zero_point
    count = prod(kernel) if count_include_pad else sums(torch.ones_like(image[:1, :1]))
    t = sums(image) * multiplier / torch.as_tensor(count, dtype=torch.float32, device=x.device)
    return rescale(t, 0, 255, zero_point).contiguous()


def _max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    _check_dtype(x, torch.uint8, "x")
    _check(x.ndim == 4, f"x must be [batch, height, width, channels], found {list(x.shape)}")
    # Of uint8 torch takes small images only.
    image = x.permute(0, 3, 1, 2).float()
    y = max_pool2d(image, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), ceil_mode)
    return y.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _lookup(x: Tensor, table: Tensor) -> Tensor:
    native.remind(x)
    _check_dtype(x, torch.uint8, "x")
    _check(
        table.dtype == torch.uint8 and table.shape == (256,), f"table must be uint8 [256], found {list(table.shape)}"
    )
    return table[x.to(torch.int64)].contiguous()


def _dtype_of(zero_point: int | None) -> torch.dtype:
    return torch.float32 if zero_point is None else torch.uint8


def _new(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def _fake_conv(
    x: Tensor,
    packed: Tensor,
    weight_shape: Sequence[int],
    multiplier: Tensor,
    offset: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_zero_point: int,
    low: float,
    high: float,
    zero_point: int | None,
    other: Tensor | None = None,
    other_multiplier: float = 0.0,
    other_zero_point: int = 0,
) -> Tensor:
    same_device(x, packed, multiplier, offset, other)
    shape = _conv_shape(x, weight_shape, stride, padding, dilation, groups)
    _check_other(other, shape, zero_point)
    return _new(x, shape, _dtype_of(zero_point))


def _fake_linear(
    x: Tensor,
    packed: Tensor,
    weight_shape: Sequence[int],
    multiplier: Tensor,
    offset: Tensor,
    low: float,
    high: float,
    zero_point: int | None,
    other: Tensor | None = None,
    other_multiplier: float = 0.0,
    other_zero_point: int = 0,
) -> Tensor:
    same_device(x, packed, multiplier, offset, other)
    shape = _linear_shape(x, weight_shape)
    _check_other(other, shape, zero_point)
    return _new(x, shape, _dtype_of(zero_point))


register("quantize_uint8", _quantize, lambda x, *_: _new(x, x.shape, torch.uint8))
register("dequantize_uint8", _dequantize, lambda codes, *_: _new(codes, codes.shape, torch.float32))
register("pack_uint8", _pack, lambda weight, groups: _new(weight, (packed_bytes(weight.shape, groups),), torch.uint8))
register("conv_uint8", _conv, _fake_conv)
register("linear_uint8", _linear, _fake_linear)
register("add_uint8", _add, lambda a, *_: _new(a, a.shape, torch.uint8))
register(
    "average_uint8",
    _average,
    lambda x, kernel, stride, padding, *_: _new(x, _average_shape(x, kernel, stride, padding), torch.uint8),
)
register("max_pool_uint8", _max_pool, _max_pool)
register("lookup_uint8", _lookup, lambda x, *_: _new(x, x.shape, torch.uint8))
