"""The recurrent part of LSTM and GRU on quantized weights, and the two torch operators that have compiled kernels.

    fewbit::lstm, fewbit::gru   all steps of one layer in one direction; h to int8 at each step, integer products

Gates, cell state and nonlinearities stay float. As in ``linear``, gradients are those of the products with rounded operands,
and the operators themselves have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewbit.ops import native
from fewbit.ops.linear import (
    LIBRARY,
    TAGS,
    Numbers,
    assembled,
    call,
    granularity_of,
    integer_products,
    linear,
    numbers_of,
    register,
    same_device,
)
from fewbit.qtensor import QTensor
from fewbit.spec import PER_TOKEN, QuantSpec

States = tuple[Tensor, ...]  # h, and for an LSTM c: [rows, size]
Product = Callable[[Tensor], Tensor]  # of h and the recurrent weight, plus bias
Step = Callable[[Tensor, States], States]

_WEIGHT = "Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, int bits, int weight_group, int input_group"
_STEPS = "SymInt[] sizes, bool reverse"
LIBRARY.define(f"lstm(Tensor gates, Tensor h, Tensor c, {_WEIGHT}, {_STEPS}) -> (Tensor, Tensor, Tensor)", tags=TAGS)
LIBRARY.define(f"gru(Tensor gates, Tensor h, {_WEIGHT}, {_STEPS}) -> (Tensor, Tensor)", tags=TAGS)


def recurrent(
    cell: str,
    gates: Tensor,
    states: States,
    weight: QTensor | Tensor,
    bias: Tensor | None,
    spec: QuantSpec | None,
    sizes: Sequence[int],
    reverse: bool,
    projection: QTensor | Tensor | None = None,
) -> tuple[Tensor, States]:
    """Outputs ``[sum(sizes), size]`` and the last states of each sequence.

    ``cell``: "lstm" or "gru". ``gates``: the input's share, bias included, of all steps: ``sizes[0]`` rows of step 0, then
    those of step 1, ... Sequences that have ended, or backwards (``reverse``) not begun, keep their state. ``spec`` says how
    h is quantized; weights that are tensors stay float.
    """
    numbers = None if isinstance(weight, Tensor) or spec is None else numbers_of(weight, spec)
    if numbers is not None and projection is None and is_operator_call(gates, states, bias):
        assert isinstance(weight, QTensor)
        buffers = (weight.packed, cast(Tensor, weight.scale), weight.zero_point, bias)
        return call_recurrent(cell, gates, states, buffers, numbers, sizes, reverse)

    def step(gates: Tensor, states: States) -> States:
        h, *others = CELLS[cell](gates, states, lambda h: product(h, weight, bias, spec))
        return (h if projection is None else product(h, projection, None, spec), *others)

    return scan(step, gates, states, sizes, reverse)


def is_operator_call(gates: Tensor, states: States, bias: Tensor | None) -> bool:
    """Whether the operators take these: float32, and no gradients wanted under torch.compile, which cannot trace them."""
    if gates.dtype != torch.float32 or any(state.dtype != torch.float32 for state in states):
        return False
    return not (torch.compiler.is_dynamo_compiling() and _wants_gradients(gates, states, bias))


def call_recurrent(
    cell: str,
    gates: Tensor,
    states: States,
    weight: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    numbers: Numbers,
    sizes: Sequence[int],
    reverse: bool,
) -> tuple[Tensor, States]:
    """``recurrent`` by the operator; ``weight``: packed, scale, zero point and bias."""
    packed, scale, zero_point, bias = weight
    run: Any = _Differentiable.apply if _wants_gradients(gates, states, bias) else _operator
    y, *last = run(cell, numbers, sizes, reverse, packed, scale, zero_point, bias, gates, *states)
    return y, tuple(last)


def _wants_gradients(gates: Tensor, states: States, bias: Tensor | None) -> bool:
    tensors = (bias, gates, *states)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return wanted and not torch.compiler.is_exporting()  # an exported model computes, and its graph stays one operator


def product(x: Tensor, weight: QTensor | Tensor, bias: Tensor | None, spec: QuantSpec | None) -> Tensor:
    """``linear`` with weights that may be float."""
    if isinstance(weight, Tensor):
        return torch.nn.functional.linear(x, weight, bias)
    return linear(x, weight, bias, spec)


def lstm_step(gates: Tensor, states: States, product: Product) -> States:
    """The next states, from the input's share of the gates ``[rows, 4 * hidden]``."""
    h, c = states
    i, f, g, o = (gates + product(h)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(gates: Tensor, states: States, product: Product) -> States:
    """The next state, from the input's share of the gates ``[rows, 3 * hidden]``."""
    [h] = states
    r, z, n = gates.chunk(3, 1)
    r_h, z_h, n_h = product(h).chunk(3, 1)
    r, z = torch.sigmoid(r + r_h), torch.sigmoid(z + z_h)
    n = torch.tanh(n + r * n_h)
    return (n + z * (h - n),)


CELLS: dict[str, Callable[[Tensor, States, Product], States]] = {"lstm": lstm_step, "gru": gru_step}


def scan(step: Step, gates: Tensor, states: States, sizes: Sequence[int], reverse: bool) -> tuple[Tensor, States]:
    """All steps of one layer in one direction; arguments and results as of ``recurrent``."""
    outputs: list[Tensor] = []
    steps = list(zip(gates.split(list(sizes)), sizes, strict=True))
    for part, rows in reversed(steps) if reverse else steps:
        new = step(part, tuple(state[:rows] for state in states))
        outputs.append(new[0])
        if rows < len(states[0]):
            new = tuple(torch.cat([n, s[rows:]]) for n, s in zip(new, states, strict=True))
        states = new
    return torch.cat(outputs[::-1] if reverse else outputs), states


def _operator(
    cell: str,
    numbers: Numbers,
    sizes: Sequence[int],
    reverse: bool,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    *floats: Tensor,
) -> tuple[Tensor, ...]:
    _, bits, group, input_group, _ = numbers
    return _OPERATORS[cell](*floats, packed, scale, zero_point, bias, bits, group, input_group, sizes, reverse)


class _Differentiable(torch.autograd.Function):
    """Backward goes through the steps once more, one product after the other."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _operator(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.cell, ctx.numbers, ctx.sizes, ctx.reverse, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        packed, scale, zero_point, *floats = ctx.saved_tensors
        needed = ctx.needs_input_grad[-len(floats) :]
        leaves: list[Any] = [x if x is None else x.detach() for x in floats]
        wanted = [leaf.requires_grad_() for leaf, need in zip(leaves, needed, strict=True) if need]
        bias, gates, *states = leaves

        def step(gates: Tensor, states: States) -> States:
            return CELLS[ctx.cell](gates, states, lambda h: call(h, packed, scale, zero_point, bias, ctx.numbers))

        with torch.enable_grad():
            y, last = scan(step, gates, tuple(states), ctx.sizes, ctx.reverse)
        found = iter(torch.autograd.grad((y, *last), wanted, slopes))
        return (*[None] * 7, *(next(found) if need else None for need in needed))


def _reference(cell: str, gates: Tensor, states: States, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    packed, scale, zero_point, bias, bits, weight_group, input_group, sizes, reverse = arguments
    native.remind(gates)
    weight = assembled(packed, scale, zero_point, states[0].shape[1], bits, weight_group)
    spec = QuantSpec("int8", granularity_of(input_group, PER_TOKEN))

    def step(gates: Tensor, states: States) -> States:
        return CELLS[cell](gates, states, lambda h: integer_products(h, weight, bias, spec))

    y, last = scan(step, gates, states, sizes, reverse)
    return (y, *last)


def _fake(gates: Tensor, states: States, *weight: Tensor | None) -> tuple[Tensor, ...]:
    same_device(gates, *states, *weight)
    return (gates.new_empty((gates.shape[0], states[0].shape[1])), *(state.new_empty(state.shape) for state in states))


register(
    "lstm",
    lambda gates, h, c, *arguments: _reference("lstm", gates, (h, c), arguments),
    lambda gates, h, c, *rest: _fake(gates, (h, c), *rest[:4]),
)
register(
    "gru",
    lambda gates, h, *arguments: _reference("gru", gates, (h,), arguments),
    lambda gates, h, *rest: _fake(gates, (h,), *rest[:4]),
)
_OPERATORS: dict[str, Any] = {"lstm": torch.ops.fewbit.lstm.default, "gru": torch.ops.fewbit.gru.default}
