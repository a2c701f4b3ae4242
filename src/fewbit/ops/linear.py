"""The linear layer on quantized weights, and the two torch operators that have compiled kernels where there are some.

    fewbit::linear_dynamic      activations to int8 on the fly, integer products
    fewbit::linear_weight_only  activations stay float

All of it differentiates with respect to ``x`` and ``bias`` as if the rounding of ``x`` were the identity (straight-through).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbit.ops import native
from fewbit.ops.reference import (
    exactly,
    has_integer_product,
    integer_input,
    integer_linear,
    integer_values,
    largest_code,
)
from fewbit.qtensor import QTensor, dequantize, fake_quantize, straight_through
from fewbit.spec import PER_TOKEN, Granularity, QuantSpec, per_channel, per_group

_WEIGHT = "Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, int in_features, int bits"
LIBRARY = torch.library.Library("fewbit", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    f"linear_dynamic({_WEIGHT}, int weight_group, int input_group, int activation=0) -> Tensor", tags=_TAGS
)
LIBRARY.define(f"linear_weight_only({_WEIGHT}, int weight_group, int activation=0) -> Tensor", tags=_TAGS)
LIBRARY.define(
    "embedding(Tensor indices, Tensor packed, Tensor scale, Tensor? zero_point, int columns, int bits, int group) -> Tensor",
    tags=_TAGS,
)
LIBRARY.define("isa() -> str")


def linear(
    x: Tensor,
    weight: QTensor,
    bias: Tensor | None,
    spec: QuantSpec | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """``x`` ``[..., K]`` times ``weight`` ``[N, K]`` transposed plus ``bias`` ``[N]``, in x's dtype.

    ``spec`` says how x is quantized (None: it stays float); ``scale`` and ``zero_point`` its static grid, if it has one.
    """
    if _has_kernel(weight):
        group = weight.spec.granularity.group_size
        arguments = (weight.scale, weight.zero_point, bias, weight.shape[1], weight.spec.number.bits, group)
        if spec is None:
            return torch.ops.fewbit.linear_weight_only(x, weight.packed, *arguments)
        if _is_dynamic_int8(spec) and has_integer_product(weight, spec):
            size = spec.granularity.group_size
            return torch.ops.fewbit.linear_dynamic(x, weight.packed, *arguments, size)
    if spec is None or not has_integer_product(weight, spec):
        x = x if spec is None else fake_quantize(x, spec, scale, zero_point)
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    y = integer_products(x.detach(), weight, bias, spec, scale, zero_point)
    if torch.is_grad_enabled() and x.requires_grad:
        y = y + straight_through(torch.zeros_like(y), torch.nn.functional.linear(x, dequantize(weight, x.dtype)))
    return y


def integer_products(
    x: Tensor,
    weight: QTensor,
    bias: Tensor | None,
    spec: QuantSpec,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """``linear`` with integer products; needs ``has_integer_product(weight, spec)``."""
    rows = x.reshape(-1, x.shape[-1])
    if scale is not None:  # a static grid is per tensor, its shape [1]
        scale, zero_point = scale.reshape(1, 1), None if zero_point is None else zero_point.reshape(1, 1)
    group = max(spec.granularity.group_size, weight.spec.granularity.group_size)
    values, scale = integer_input(rows, spec, scale, zero_point)
    weights = integer_values(weight.codes, weight.zero_point, weight.spec.granularity.group_size)
    bound = largest_code(spec) * largest_code(weight.spec)
    with exactly(x):
        y = integer_linear(values, scale, weights, weight.scale_values, group, bound)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], len(weight.packed))


def _has_kernel(weight: QTensor) -> bool:
    by_row = weight.spec.granularity in (per_channel(0), PER_TOKEN) or weight.spec.granularity.kind == "group"
    return weight.spec.format in ("int8", "int4") and by_row and isinstance(weight.scale, Tensor)


def _is_dynamic_int8(spec: QuantSpec) -> bool:
    by_row = spec.granularity.kind in ("token", "group")
    return spec.format == "int8" and spec.symmetric and not spec.is_static and by_row and spec.scale is None


def _granularity(group: int, otherwise: Granularity) -> Granularity:
    return per_group(group) if group else otherwise


def _weight(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, in_features: int, bits: int, group: int
) -> QTensor:
    granularity = _granularity(group, per_channel(0))
    dtype = str(scale.dtype).removeprefix("torch.")
    spec = QuantSpec(f"int{bits}", granularity, symmetric=zero_point is None, scale_dtype=dtype)
    return QTensor(packed, scale, zero_point, spec, (len(packed), in_features))


def _linear_dynamic(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    bits: int,
    weight_group: int,
    input_group: int,
    activation: int = 0,
) -> Tensor:
    native.remind(x)
    weight = _weight(packed, scale, zero_point, in_features, bits, weight_group)
    return integer_products(x, weight, bias, QuantSpec("int8", _granularity(input_group, PER_TOKEN)))


def _linear_weight_only(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    bits: int,
    weight_group: int,
    activation: int = 0,
) -> Tensor:
    native.remind(x)
    weight = _weight(packed, scale, zero_point, in_features, bits, weight_group)
    return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)


def _fake(x: Tensor, packed: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, zero_point, _, *numbers = inputs
    ctx.save_for_backward(packed, scale, zero_point)
    ctx.numbers = numbers


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    packed, scale, zero_point = ctx.saved_tensors
    for_x = for_bias = None
    if ctx.needs_input_grad[0]:
        for_x = gradient @ dequantize(_weight(packed, scale, zero_point, *ctx.numbers[:3]), gradient.dtype)
    if ctx.needs_input_grad[4]:
        for_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return (for_x, None, None, None, for_bias, *(None for _ in ctx.numbers))


for _name, _reference in (("linear_dynamic", _linear_dynamic), ("linear_weight_only", _linear_weight_only)):
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fewbit::{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(f"fewbit::{_name}", _backward, setup_context=_setup, lib=LIBRARY)
