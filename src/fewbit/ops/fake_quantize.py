"""Rounding to a grid whose step is learned: LSQ (Esser et al., https://arxiv.org/abs/1902.08153) with codes as in ``qtensor``.

    y = (clamp(round(x / s) + z) - z) * s

The gradient passes where x is within the ends of the grid and not beyond them. That of the logarithm of s is, over a block of
elements that share it, ``sum g * (y - x)`` within the ends and ``sum g * y`` beyond; that of z, beyond the ends,
``-sum g * s`` (LSQ+, https://arxiv.org/abs/2004.09576). Both are multiplied by ``1 / sqrt(N Q)``: N elements an example
that share the step, Q its largest code. Backward keeps nothing but x, which the layers before keep in most cases anyway.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewbit.ops.pairs import bounded
from fewbit.ops.reference import largest_code
from fewbit.qtensor import decode, dynamic_qparams, encode, reduce_blocks, within
from fewbit.spec import QuantSpec


def learned(
    x: Tensor,
    spec: QuantSpec,
    scale: Tensor,
    zero_point: Tensor | None,
    log_scale: Tensor | None = None,
    shift: Tensor | None = None,
    pairs: tuple[Tensor, ...] = (),
) -> Tensor:
    """``x`` rounded to the grid of ``scale`` and ``zero_point``, in x's dtype; static grids are per tensor.

    Gradients go to x, to ``log_scale``, the logarithm of the scale up to a constant, and to ``shift``, what the zero point has
    in shares of the codes' range. ``pairs``: of columns whose codes are bounded, see ``fewbit.ops.pairs``.
    """
    return cast(Tensor, _Learned.apply(x, spec, scale, zero_point, log_scale, shift, pairs))


def dynamic(x: Tensor, spec: QuantSpec) -> Tensor:
    """``x`` rounded to the grid of its own range, in x's dtype; the gradient passes."""
    return cast(Tensor, _Dynamic.apply(x, spec))


def gradients(
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    spec: QuantSpec,
    scale: Tensor,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of x, of the logarithm of the scale and of the zero point, from that of ``y``, which is ``x`` rounded."""
    inside = within(x, spec, scale, zero_point)
    wide = gradient.to(torch.float32)
    for_x = torch.where(inside, gradient, 0)
    for_scale = reduce_blocks(wide * (y - torch.where(inside, x, 0)), spec.granularity)
    beyond = reduce_blocks(torch.where(inside, 0, wide), spec.granularity)
    return for_x, for_scale.reshape(scale.shape), -beyond.reshape(scale.shape) * scale


def _step_factor(x: Tensor, spec: QuantSpec, scale: Tensor) -> float:
    # The batch does not count: the loss is a mean over it, whatever its size.
    examples = len(x) if spec.is_static and x.dim() else 1
    elements = x.numel() / max(1, scale.numel() * examples)
    largest = largest_code(spec) if spec.number.is_integer else 2 ** (spec.number.bits - 1)
    return 1 / math.sqrt(max(1.0, elements) * largest)


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        spec: QuantSpec,
        scale: Tensor,
        zero_point: Tensor | None,
        log_scale: Tensor | None,
        shift: Tensor | None,
        pairs: tuple[Tensor, ...],
    ) -> Tensor:
        return _rounded(x, spec, scale, zero_point, pairs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.spec, scale, zero_point, _, _, pairs = inputs
        # A weight's rounded values are kept by the product that they go into.
        ctx.save_for_backward(x, scale, zero_point, output if pairs else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, y = ctx.saved_tensors
        spec = ctx.spec
        y = _rounded(x, spec, scale, zero_point, ()) if y is None else y
        for_x, for_scale, for_zero = gradients(gradient, x, y, spec, scale, zero_point)
        factor = _step_factor(x, spec, scale)
        low, high = spec.number.bound(spec.symmetric)
        needed = ctx.needs_input_grad
        log_scale = for_scale * factor if needed[4] else None
        shift = for_zero * (factor * (high - low)) if needed[5] else None
        return for_x if needed[0] else None, None, None, None, log_scale, shift, None


class _Dynamic(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, spec: QuantSpec) -> Tensor:
        return _rounded(x, spec, *dynamic_qparams(x, spec), ())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _rounded(x: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None, pairs: tuple[Tensor, ...]) -> Tensor:
    codes = encode(x, spec, scale, zero_point)
    return decode(bounded(codes, pairs) if pairs else codes, spec, scale, zero_point).to(x.dtype)
