"""The linear layer on quantized weights, and the two torch operators that have compiled kernels where there are some.

    fewbit::linear_dynamic      activations to int8 on the fly, integer products
    fewbit::linear_weight_only  activations stay float

All of it differentiates with respect to ``x`` and ``bias`` as if the rounding of ``x`` were the identity (straight-through).
The operators themselves have no gradients, which would cost time in every call: ``call`` gives them theirs where needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from fewbit.ops import native
from fewbit.ops.reference import (
    exactly,
    has_integer_product,
    integer_input,
    integer_linear,
    integer_values,
    largest_code,
)
from fewbit.qtensor import QTensor, dequantize, fake_quantize, one_level, straight_through
from fewbit.spec import PER_TOKEN, Granularity, QuantSpec, per_channel, per_group

BLOCK = 32  # the groups that kernels take are multiples of it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of x

_WEIGHT = "Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, int in_features, int bits"
LIBRARY = torch.library.Library("fewbit", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(f"linear_dynamic({_WEIGHT}, int weight_group, int input_group, int activation=0) -> Tensor", tags=TAGS)
LIBRARY.define(f"linear_weight_only({_WEIGHT}, int weight_group, int activation=0) -> Tensor", tags=TAGS)
LIBRARY.define("isa() -> str")
_dynamic = torch.ops.fewbit.linear_dynamic.default
_weight_only = torch.ops.fewbit.linear_weight_only.default

_aten = torch.ops.aten
# What may follow the layer, in the order of the kernels' numbers: the function, and the gradient of its argument from that
# of its result and the argument.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "none": (lambda x: x, lambda gradient, x: gradient),
    "relu": (relu, lambda gradient, x: cast(Tensor, _aten.threshold_backward(gradient, x, 0))),
    "gelu": (gelu, lambda gradient, x: cast(Tensor, _aten.gelu_backward(gradient, x))),
    "gelu_tanh": (
        partial(gelu, approximate="tanh"),
        lambda gradient, x: cast(Tensor, _aten.gelu_backward(gradient, x, approximate="tanh")),
    ),
    "silu": (silu, lambda gradient, x: cast(Tensor, _aten.silu_backward(gradient, x))),
}
_ACTIVATIONS = tuple(ACTIVATIONS.values())


class Numbers(NamedTuple):
    """What the operators are told beside tensors."""

    in_features: int
    bits: int
    weight_group: int  # 0: one scale a row
    input_group: int | None  # None: x stays float
    activation: int


def linear(
    x: Tensor,
    weight: QTensor,
    bias: Tensor | None,
    spec: QuantSpec | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``x`` ``[..., K]`` times ``weight`` ``[N, K]`` transposed plus ``bias`` ``[N]``, in x's dtype; then ``activation``.

    ``spec`` says how x is quantized (None: it stays float); ``scale`` and ``zero_point`` its static grid, if it has one.
    """
    numbers = numbers_of(weight, spec, activation)
    if numbers is not None and x.dtype in DTYPES:
        return call(x, weight.packed, cast(Tensor, weight.scale), weight.zero_point, bias, numbers)
    function, _ = ACTIVATIONS[activation]
    if spec is None or not has_integer_product(weight, spec):
        x = x if spec is None else fake_quantize(x, spec, scale, zero_point)
        return function(torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias))
    y = integer_products(x.detach(), weight, bias, spec, scale, zero_point)
    if torch.is_grad_enabled() and x.requires_grad:
        y = y + straight_through(torch.zeros_like(y), torch.nn.functional.linear(x, dequantize(weight, x.dtype)))
    return function(y)


def has_kernel(weight: QTensor) -> bool:
    """Whether the operators take this weight; they do so with compiled kernels and without."""
    granularity = weight.spec.granularity
    in_groups = granularity.kind == "group" and granularity.group_size % BLOCK == 0
    plain = isinstance(weight.scale, Tensor) and weight.scale.dtype in (torch.float32, torch.bfloat16)
    by_row = in_groups or granularity in (per_channel(0), PER_TOKEN)
    return weight.spec.format in ("int8", "int4") and plain and by_row and weight.shape[1] > 0


def as_kernels_read(weight: QTensor) -> QTensor:
    """The same numbers with scales of one level, and 6-bit codes as bytes."""
    weight = one_level(weight)
    if weight.spec.format != "int6":
        return weight
    return replace(weight, packed=weight.codes, spec=replace(weight.spec, format="int8"))


def is_dynamic_int8(spec: QuantSpec) -> bool:
    """Whether the operators quantize inputs as ``spec`` says."""
    by_row = spec.granularity.kind in ("token", "group") and spec.granularity.group_size % BLOCK == 0
    plain = spec.scale is None and spec.scale_dtype == "float32"
    return spec.format == "int8" and spec.symmetric and not spec.is_static and by_row and plain


def numbers_of(weight: QTensor, spec: QuantSpec | None, activation: str = "none") -> Numbers | None:
    """How an operator is called for this weight and inputs of this spec; None if there is none for them."""
    if not has_kernel(weight) or not (spec is None or (is_dynamic_int8(spec) and has_integer_product(weight, spec))):
        return None
    groups = (weight.spec.granularity.group_size, None if spec is None else spec.granularity.group_size)
    return Numbers(weight.shape[1], weight.spec.number.bits, *groups, list(ACTIVATIONS).index(activation))


def call(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, numbers: Numbers
) -> Tensor:
    """The operator for these numbers, with gradients where some are wanted."""
    wanted = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if wanted and not torch.compiler.is_exporting():  # an exported model computes, and its graph stays one operator
        return cast(Tensor, _Differentiable.apply(x, packed, scale, zero_point, bias, numbers))
    return _operator(x, packed, scale, zero_point, bias, numbers)


def _operator(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, numbers: Numbers
) -> Tensor:
    columns, bits, group, input_group, activation = numbers
    if input_group is None:
        return _weight_only(x, packed, scale, zero_point, bias, columns, bits, group, activation)
    return _dynamic(x, packed, scale, zero_point, bias, columns, bits, group, input_group, activation)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, numbers: Numbers
    ) -> Tensor:
        return _operator(x, packed, scale, zero_point, bias, numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, packed, scale, zero_point, bias, ctx.numbers = inputs
        x, bias = (x, bias) if ctx.numbers.activation else (None, None)
        ctx.save_for_backward(x, packed, scale, zero_point, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, packed, scale, zero_point, bias = ctx.saved_tensors
        columns, bits, group, input_group, activation = ctx.numbers
        if activation:
            before = call(x, packed, scale, zero_point, bias, Numbers(columns, bits, group, input_group, 0))
            gradient = _ACTIVATIONS[activation][1](gradient, before)
        for_x = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = gradient @ dequantize(assembled(packed, scale, zero_point, columns, bits, group), gradient.dtype)
        if ctx.needs_input_grad[4]:
            for_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return for_x, None, None, None, for_bias, None


def integer_products(
    x: Tensor,
    weight: QTensor,
    bias: Tensor | None,
    spec: QuantSpec,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    """``linear`` with integer products; needs ``has_integer_product(weight, spec)``."""
    _check(x, weight.shape[1])
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
    y = _ACTIVATIONS[activation][0](y)
    return y.to(x.dtype).reshape(*x.shape[:-1], len(weight.packed))


def assembled(packed: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, bits: int, group: int) -> QTensor:
    """The QTensor that an operator was given in parts."""
    dtype = str(scale.dtype).removeprefix("torch.")
    spec = QuantSpec(f"int{bits}", granularity_of(group, per_channel(0)), zero_point is None, scale_dtype=dtype)
    return QTensor(packed, scale, zero_point, spec, (len(packed), columns))


def register(name: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An operator of LIBRARY, without gradients: what computes where there is no kernel, and the shape of the result."""
    LIBRARY.impl(name, torch.no_grad()(reference), "CompositeExplicitAutograd")
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"fewbit::{name}", fake, lib=LIBRARY)


def granularity_of(group: int, otherwise: Granularity) -> Granularity:
    """What an operator's group size stands for; 0 is ``otherwise``."""
    return per_group(group) if group else otherwise


def _check(x: Tensor, columns: int) -> None:
    if x.shape[-1:] != (columns,):
        raise RuntimeError(f"fewbit: x must be [..., {columns}], found {list(x.shape)}.")


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
    weight = assembled(packed, scale, zero_point, in_features, bits, weight_group)
    spec = QuantSpec("int8", granularity_of(input_group, PER_TOKEN))
    return integer_products(x, weight, bias, spec, activation=activation)


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
    _check(x, in_features)
    weight = dequantize(assembled(packed, scale, zero_point, in_features, bits, weight_group), x.dtype)
    with exactly(x):
        y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return _ACTIVATIONS[activation][0](y)


def same_device(x: Tensor, *others: Tensor | None) -> None:
    """For the fakes: torch calls them as soon as one of the tensors is on meta."""
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(
                f"fewbit: x is on {x.device}, a weight on {other.device}. Load the weights, or move them."
            )


def _fake(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Any, bias: Any, in_features: int, *_: Any) -> Tensor:
    _check(x, in_features)
    same_device(x, packed, scale, zero_point, bias)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


register("linear_dynamic", _linear_dynamic, _fake)
register("linear_weight_only", _linear_weight_only, _fake)


def _without_autocast(*arguments: Any) -> Tensor:
    """The kernel calls torch's product of float matrices, which autocast would round."""
    with torch.autocast("cpu", enabled=False):
        return cast(Tensor, _weight_only(*arguments))


LIBRARY.impl("linear_weight_only", _without_autocast, "AutocastCPU")
