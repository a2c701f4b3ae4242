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

from fewbit.formats import FORMATS
from fewbit.ops import native
from fewbit.ops.linear import LIBRARY, TAGS, register
from fewbit.ops.pairs import bounded
from fewbit.ops.reference import largest_code
from fewbit.qtensor import decode, dynamic_qparams, encode, reduce_blocks, within
from fewbit.spec import QuantSpec, per_channel

_GRID = "Tensor scale, Tensor? zero_point, float low, float high"
# x in blocks of one size, one scale each; zero points are float32, low and high the ends of the codes.
LIBRARY.define(f"fake_quantize(Tensor x, {_GRID}) -> Tensor", tags=TAGS)
LIBRARY.define(
    f"fake_quantize_backward(Tensor gradient, Tensor x, Tensor? y, {_GRID}) -> (Tensor, Tensor, Tensor)", tags=TAGS
)


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
    gradient: Tensor, x: Tensor, y: Tensor | None, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of x, of the logarithm of the scale and of the zero point, from that of ``y``, which is ``x`` rounded."""
    if not _has_operator(x, spec):
        y = _rounded(x, spec, scale, zero_point, ()) if y is None else y
        inside = within(x, spec, scale, zero_point)
        wide = gradient.to(torch.float32)
        for_x = torch.where(inside, gradient, 0)
        for_scale = reduce_blocks(wide * (y - torch.where(inside, x, 0)), spec.granularity)
        beyond = reduce_blocks(torch.where(inside, 0, wide), spec.granularity)
        return for_x, for_scale.reshape(scale.shape), -beyond.reshape(scale.shape) * scale
    order = _order(x)
    tensors = [None if t is None else _ordered(t, order) for t in (gradient, x, y)]
    found = _backward(*tensors, *_grid(spec, scale, zero_point))
    for_x, for_scale, beyond = found
    return _restored(for_x, order).to(x.dtype), for_scale.reshape(scale.shape), -beyond.reshape(scale.shape) * scale


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
    if pairs or not _has_operator(x, spec):
        codes = encode(x, spec, scale, zero_point)
        return decode(bounded(codes, pairs) if pairs else codes, spec, scale, zero_point).to(x.dtype)
    order = _order(x)
    return _restored(_forward(_ordered(x, order), *_grid(spec, scale, zero_point)), order).to(x.dtype)


def _has_operator(x: Tensor, spec: QuantSpec) -> bool:
    """Whether scales belong to blocks of x that lie one after the other and are of one size."""
    granularity = spec.granularity
    whole = granularity.kind != "group" or x.shape[-1] % granularity.group_size == 0
    in_turn = granularity.kind != "channel" or (granularity.axis == 0)
    return spec.number.is_integer and whole and in_turn and x.numel() > 0 and x.dtype != torch.float64


def _order(x: Tensor) -> tuple[int, ...] | None:
    """The axes as they lie in memory if that is channels last."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return (0, 2, 3, 1) if last else None


def _ordered(x: Tensor, order: tuple[int, ...] | None) -> Tensor:
    return (x if order is None else x.permute(order)).to(torch.float32).contiguous()


def _restored(x: Tensor, order: tuple[int, ...] | None) -> Tensor:
    return x if order is None else x.permute(0, 3, 1, 2)


def _grid(spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None, float, float]:
    zero = None if zero_point is None else zero_point.to(torch.float32).reshape(-1)
    return scale.to(torch.float32).reshape(-1).contiguous(), zero, *spec.number.bound(spec.symmetric)


def _rows(x: Tensor, scale: Tensor, zero_point: Tensor | None, low: float, high: float) -> tuple[Any, ...]:
    """What the operators are given, as ``qtensor`` takes it."""
    native.remind(x)
    symmetric = zero_point is None
    names = (name for name, number in FORMATS.items() if number.is_integer and number.bound(symmetric) == (low, high))
    spec = QuantSpec(next(names), per_channel(0), symmetric)
    zero = None if zero_point is None else zero_point.reshape(-1, 1)
    return x.reshape(len(scale), -1), spec, scale.reshape(-1, 1), zero


def _fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, low: float, high: float) -> Tensor:
    rows, spec, *grid = _rows(x, scale, zero_point, low, high)
    return decode(encode(rows, spec, *grid), spec, *grid).reshape(x.shape)


def _fake_quantize_backward(
    gradient: Tensor, x: Tensor, y: Tensor | None, scale: Tensor, zero_point: Tensor | None, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = _fake_quantize(x, scale, zero_point, low, high) if y is None else y
    rows, spec, *grid = _rows(x, scale, zero_point, low, high)
    inside = within(rows, spec, *grid)
    wide = gradient.reshape(rows.shape)
    for_scale = (wide * (y.reshape(rows.shape) - torch.where(inside, rows, 0))).sum(1)
    return torch.where(inside, wide, 0).reshape(x.shape), for_scale, torch.where(inside, 0, wide).sum(1)


register("fake_quantize", _fake_quantize, lambda x, *_: torch.empty_like(x))
register(
    "fake_quantize_backward",
    _fake_quantize_backward,
    lambda gradient, x, y, scale, *_: (torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)),
)
_forward = torch.ops.fewbit.fake_quantize.default
_backward = torch.ops.fewbit.fake_quantize_backward.default
