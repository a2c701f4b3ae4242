"""Convolution on quantized weights: exact in its integers if the input is quantized too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewbit.ops.reference import EXACT, LARGEST_SUM, exactly, integer_input, integer_values, largest_code
from fewbit.qtensor import QTensor, dequantize, fake_quantize, straight_through
from fewbit.spec import QuantSpec, per_channel

_FUNCTIONS: dict[tuple[int, bool], Any] = {
    (1, False): torch.nn.functional.conv1d,
    (2, False): torch.nn.functional.conv2d,
    (3, False): torch.nn.functional.conv3d,
    (1, True): torch.nn.functional.conv_transpose1d,
    (2, True): torch.nn.functional.conv_transpose2d,
    (3, True): torch.nn.functional.conv_transpose3d,
}


@dataclass(frozen=True)
class Geometry:
    """The shape of a convolution: everything but its numbers. Padding is with zeros."""

    weight_shape: tuple[int, ...]  # as in torch: [O, I / groups, ...], transposed [I, O / groups, ...]
    transposed: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        return len(self.weight_shape) - 2

    @property
    def terms(self) -> int:
        """The most products in one output: input channels of a group times kernel positions."""
        channels = self.weight_shape[0] // self.groups if self.transposed else self.weight_shape[1]
        return channels * math.prod(self.weight_shape[2:])

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as ``[O, terms]``: one row an output channel."""
        if not self.transposed:
            return weight.reshape(weight.shape[0], -1)
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:]).transpose(1, 2)
        return grouped.reshape(-1, self.terms)

    def weight(self, matrix: Tensor) -> Tensor:
        """The inverse of ``matrix``."""
        if not self.transposed:
            return matrix.reshape(self.weight_shape)
        channels, outputs = self.weight_shape[0] // self.groups, self.weight_shape[1]
        grouped = matrix.reshape(self.groups, outputs, channels, *self.weight_shape[2:]).transpose(1, 2)
        return grouped.reshape(self.weight_shape)

    def with_output_size(self, input_size: tuple[int, ...], output_size: Sequence[int]) -> Geometry:
        """The transposed convolution whose output has the spatial sizes ``output_size``; ValueError if it has none."""
        if len(output_size) not in (self.dims, len(input_size)):
            raise ValueError(
                f"output_size {list(output_size)} needs {self.dims} sizes, or {len(input_size)} with all axes."
            )
        padding = [
            wanted - ((size - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1)
            for wanted, size, stride, pad, dilation, kernel in zip(
                output_size[-self.dims :],
                input_size[-self.dims :],
                self.stride,
                self.padding,
                self.dilation,
                self.weight_shape[2:],
                strict=True,
            )
            if isinstance(pad, int)
        ]
        if any(not 0 <= extra < stride for extra, stride in zip(padding, self.stride, strict=True)):
            raise ValueError(f"output_size {list(output_size)} cannot come from an input of {list(input_size)}.")
        return replace(self, output_padding=tuple(padding))

    def padded(self, x: Tensor) -> tuple[Tensor, Geometry]:
        """``x`` with what the paddings "same" and "valid" add, and the convolution of that: amounts are numbers there."""
        if not isinstance(self.padding, str):
            return x, self
        amounts: list[int] = []
        for kernel, dilation in zip(self.weight_shape[:1:-1], reversed(self.dilation), strict=True):
            total = dilation * (kernel - 1) if self.padding == "same" else 0
            amounts += [total // 2, total - total // 2]
        x = torch.nn.functional.pad(x, amounts) if any(amounts) else x
        return x, replace(self, padding=(0,) * self.dims)

    def backward(
        self, gradient: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of x, of the weight and of a bias from that of the result, those that are ``wanted``."""
        assert not isinstance(self.padding, str)
        batched = x.dim() > self.dims + 1
        gradient, x = (t if batched else t[None] for t in (gradient, x))
        channels = self.weight_shape[1] * self.groups if self.transposed else self.weight_shape[0]
        shape = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        for_x, for_weight, for_bias = torch.ops.aten.convolution_backward.default(
            gradient, x, weight, [channels], *shape, wanted
        )
        return for_x if batched or for_x is None else for_x[0], for_weight, for_bias

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution of float tensors."""
        function = _FUNCTIONS[self.dims, self.transposed]
        if self.transposed:
            result = function(
                x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        else:
            result = function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        assert isinstance(result, Tensor)
        return result


def conv(
    x: Tensor,
    weight: QTensor,
    bias: Tensor | None,
    geometry: Geometry,
    spec: QuantSpec | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """The convolution of ``x`` ``[batch, channels, ...]`` with ``weight``, a matrix of ``geometry``, in x's dtype.

    ``spec`` says how x is quantized (None: it stays float); ``scale`` and ``zero_point`` its static grid, if it has one.
    """
    if spec is None or not has_integer_conv(weight.spec, spec, geometry):
        x = x if spec is None else fake_quantize(x, spec, scale, zero_point)
        return geometry(x, geometry.weight(dequantize(weight, x.dtype)), bias)
    values, scale = integer_input(x.detach(), spec, scale, zero_point)
    weights = geometry.weight(integer_values(weight.codes, weight.zero_point, 0))
    bound = largest_code(spec) * largest_code(weight.spec)
    with exactly(x):
        y = rescaled_conv(values, weights, bound, geometry, scale * weight.scale_values, bias).to(x.dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        y = y + straight_through(torch.zeros_like(y), geometry(x, geometry.weight(dequantize(weight, x.dtype))))
    return y


def has_integer_conv(weight: QuantSpec, spec: QuantSpec, geometry: Geometry) -> bool:
    """Whether sums are those of integers, with one scale an output channel, and fit int32."""
    granularity = weight.granularity
    per_row = granularity.kind in ("tensor", "token") or granularity == per_channel(0)
    if not (weight.number.is_integer and spec.number.is_integer and per_row and spec.granularity.kind == "tensor"):
        return False
    return geometry.terms * largest_code(spec) * largest_code(weight) <= LARGEST_SUM


def rescaled_conv(
    x: Tensor, weight: Tensor, bound: int, geometry: Geometry, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """``integer_conv`` times ``scale``, of one element an output channel or one for all, plus ``bias``: float32."""
    channels = (-1,) + (1,) * geometry.dims
    y = integer_conv(x, weight, bound, geometry).to(torch.float32).mul_(scale.reshape(channels))
    return y if bias is None else y.add_(bias.reshape(channels))


def integer_conv(x: Tensor, weight: Tensor, bound: int, geometry: Geometry) -> Tensor:
    """The convolution of integers held in float32: int32, or float32 where that holds them. ``|x_i * weight_j| <= bound``."""
    if geometry.terms * bound <= EXACT:
        return geometry(x, weight)
    axis = -1 - geometry.dims
    channels = x.shape[axis]
    piece = EXACT // (bound * math.prod(geometry.weight_shape[2:]))
    if geometry.groups > 1 or piece == 0:  # no contiguous pieces of channels: float64 is exact up to 2^53
        return geometry(x.double(), weight.double()).to(torch.int32)
    total: Tensor | None = None
    for begin in range(0, channels, piece):
        part = slice(begin, begin + piece)
        some = weight[part] if geometry.transposed else weight[:, part]
        sums = geometry(x.narrow(axis, begin, min(piece, channels - begin)), some).to(torch.int32)
        total = sums if total is None else total + sums
    assert total is not None
    return total
