"""Layers with rounded inputs in training: the values of the quantized layer, with the gradients of the float product.

The float product of rounded values would be the same but for float rounding; that moves a value over the middle between two
codes now and then, and after some layers an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewbit.ops.conv import Geometry, has_integer_conv, rescaled_conv
from fewbit.ops.linear import ACTIVATIONS, as_kernels_read, linear
from fewbit.ops.reference import largest_code
from fewbit.qtensor import QTensor
from fewbit.spec import QuantSpec


def simulated_linear(
    x: Tensor,
    rounded: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codes: QTensor,
    spec: QuantSpec,
    grid: tuple[Tensor | None, Tensor | None],
    activation: str,
) -> Tensor:
    """``fewbit.ops.linear`` of x with the weight ``codes``. ``rounded`` and ``weight`` are what both are rounded to: the
    gradients are theirs."""
    codes = as_kernels_read(codes)

    def product(x: Tensor, activation: str) -> Tensor:
        return linear(x.detach(), codes, bias, spec, *grid, activation=activation)

    return cast(Tensor, _Linear.apply(rounded, weight, bias, x, product, activation))


def simulated_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    specs: tuple[QuantSpec, QuantSpec],
    scales: tuple[Tensor, Tensor],
) -> Tensor:
    """``fewbit.ops.conv`` of x and a weight that are rounded already, to grids of these specs and scales, x's first; the float
    product where sums are not those of integers, or values of 16 bits do not tell the codes."""
    if x.dtype != torch.float32 or not has_integer_conv(specs[1], specs[0], geometry):
        return geometry(x, weight, bias)
    x, geometry = geometry.padded(x)
    bound = largest_code(specs[0]) * largest_code(specs[1])
    return cast(Tensor, _Conv.apply(x, weight, bias, geometry, scales, bound))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        rounded: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        product: Callable[[Tensor, str], Tensor],
        activation: str,
    ) -> Tensor:
        return product(x, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rounded, weight, _, _, product, ctx.activation = inputs
        ctx.product = None if ctx.activation == "none" else product
        ctx.save_for_backward(rounded if ctx.product or ctx.needs_input_grad[1] else None, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rounded, weight = ctx.saved_tensors
        if ctx.product:
            gradient = ACTIVATIONS[ctx.activation][1](gradient, ctx.product(rounded, "none"))
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        return (
            gradient @ weight if for_x else None,
            rows.T @ rounded.reshape(-1, rounded.shape[-1]) if for_weight else None,
            rows.sum(0) if for_bias else None,
            *(None, None, None),
        )


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        scales: tuple[Tensor, Tensor],
        bound: int,
    ) -> Tensor:
        of_x, of_weight = scales
        codes = _codes(x, of_x.reshape(())), _codes(geometry.matrix(weight), of_weight.reshape(-1, 1))
        return rescaled_conv(codes[0], geometry.weight(codes[1]), bound, geometry, of_x * of_weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.geometry, _, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (*ctx.geometry.backward(gradient, x, weight, ctx.needs_input_grad[:3]), None, None, None)


def _codes(rounded: Tensor, scale: Tensor) -> Tensor:
    """What rounded values are times the scale; nothing is times a scale of 0."""
    return (rounded / torch.where(scale > 0, scale, torch.inf)).round_()
