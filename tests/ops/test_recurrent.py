"""LSTM and GRU as operators: agreement with plain torch for batches and sequences of any size, gradients, export."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.ops import native, recurrent
from fewbit.ops.recurrent import CELLS
from fewbit.qtensor import QTensor, dequantize, quantize
from fewbit.spec import PER_TOKEN, QuantSpec, per_channel, per_group

WEIGHTS = {
    "int8": QuantSpec("int8", per_channel(0)),
    "int8-asymmetric": QuantSpec("int8", per_channel(0), symmetric=False),
    "int8-groups": QuantSpec("int8", per_group(32)),
    "int4-rows": QuantSpec("int4", PER_TOKEN),
    "int4-groups": QuantSpec("int4", per_group(32), scale_dtype="bfloat16"),
    "int4-groups-asymmetric": QuantSpec("int4", per_group(32), symmetric=False),
}
INPUTS = {"token": QuantSpec("int8", PER_TOKEN), "groups": QuantSpec("int8", per_group(32))}
GATES = {"lstm": 4, "gru": 3}
EVERY_CELL = pytest.mark.parametrize("cell", CELLS)
EVERY_WEIGHT = pytest.mark.parametrize("weight_spec", WEIGHTS.values(), ids=WEIGHTS.keys())
# Few rows and many take different kernels, and many steps others than few.
SIZES = {
    "one": [1] * 6,
    "four": [4] * 6,
    "five": [5] * 2,
    "many": [17] * 6,
    "packed": [17, 9, 9, 5, 4, 1, 1],
    "pauses": [3, 0, 3, 1],
}
STEPPED = 1e-6  # sigmoid and tanh of the kernels and of torch are each within a few 1e-7 of the exact ones


def operands(
    cell: str, weight_spec: QuantSpec, hidden: int, sizes: list[int]
) -> tuple[Tensor, tuple[Tensor, ...], QTensor, Tensor]:
    """Gates, states, weight and bias."""
    torch.manual_seed(0)
    batch, rows = max(sizes), GATES[cell] * hidden
    gates, bias = torch.randn(sum(sizes), rows), torch.randn(rows)
    states = tuple(torch.randn(batch, hidden) for _ in range(2 if cell == "lstm" else 1))
    weight = quantize((torch.randn(rows, hidden) + 0.1) / hidden**0.5, weight_spec)
    return gates, states, weight, bias


def reference(cell: str, *arguments: Any) -> tuple[Tensor, ...]:
    """The operator in plain torch, whether or not there are kernels."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    return getattr(torch.ops.fewbit, cell).default.redispatch(keys, *arguments)


def arguments_of(
    gates: Tensor, states: tuple[Tensor, ...], weight: QTensor, bias: Tensor | None, sizes: list[int], reverse: bool
) -> tuple[Any, ...]:
    group = weight.spec.granularity.group_size
    parts = (weight.packed, weight.scale, weight.zero_point, bias)
    return (gates, *states, *parts, weight.spec.number.bits, group, 0, sizes, reverse)


def results(y: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (y, *states)


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@EVERY_CELL
@EVERY_WEIGHT
@pytest.mark.parametrize("hidden", [37, 64, 100])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 17])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_one_step_equals_plain_torch(
    cell: str, weight_spec: QuantSpec, hidden: int, rows: int, with_bias: bool
) -> None:
    gates, states, weight, bias = operands(cell, weight_spec, hidden, [rows])
    arguments = arguments_of(gates, states, weight, bias if with_bias else None, [rows], False)
    before = [tensor.clone() for tensor in (gates, *states)]
    found = getattr(torch.ops.fewbit, cell)(*arguments)
    for a, b in zip(found, reference(cell, *arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=STEPPED, atol=STEPPED)
    assert torch.equal(found[0], found[1])
    assert all(torch.equal(a, b) for a, b in zip(before, (gates, *states), strict=True))


@EVERY_CELL
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 17])
def test_integer_sums_are_exact(cell: str, bits: int, rows: int) -> None:
    """The input's share of the gates takes the sums away: what is left is what they are wrong by."""
    hidden, most = 257, 2 ** (bits - 1) - 1
    torch.manual_seed(0)
    h = torch.randint(-127, 128, (rows, hidden)).float()
    h[:, 0] = 127
    codes = torch.randint(-most, most + 1, (GATES[cell] * hidden, hidden)).float()
    codes[:, 1] = most  # so that the scales are 1
    weight = quantize(codes, QuantSpec(f"int{bits}", per_channel(0)))
    assert torch.equal(dequantize(weight), codes)
    sums = (h.double() @ codes.double().T).float()  # below 2^24: exact
    states = (h, torch.zeros(rows, hidden)) if cell == "lstm" else (h,)
    arguments = arguments_of(-sums, states, weight, None, [rows], False)
    found = getattr(torch.ops.fewbit, cell)(*arguments)
    if cell == "lstm":
        assert float(found[2].abs().max()) == 0.0  # sigmoid(0) * tanh(0)
    else:  # r = z = 1/2: n = tanh(-s + s / 2)
        n = torch.tanh(-0.5 * sums[:, 2 * hidden :])
        torch.testing.assert_close(found[0], n + 0.5 * (h - n), rtol=STEPPED, atol=STEPPED)


@EVERY_CELL
@EVERY_WEIGHT
@pytest.mark.parametrize("hidden", [37, 64])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_many_steps_equal_plain_torch(
    cell: str, weight_spec: QuantSpec, hidden: int, sizes: list[int], reverse: bool
) -> None:
    """A code of h next to a rounding boundary may fall to either side after the first step. That changes a gate by one code
    times one weight, at most 1/127 of 0.5 here, and what follows from it fades; most elements must agree much better."""
    arguments = arguments_of(*operands(cell, weight_spec, hidden, sizes), sizes, reverse)
    for a, b in zip(getattr(torch.ops.fewbit, cell)(*arguments), reference(cell, *arguments), strict=True):
        error = (a - b).abs()
        assert a.shape == b.shape and float(error.max()) < 0.5 / 127 and float(error.median()) < 1e-5


@EVERY_CELL
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", ["int8", "int4-groups"])
def test_a_sequence_is_the_same_alone_and_among_others(cell: str, name: str, reverse: bool) -> None:
    """The first sequences of a packed batch, run alone to their ends; states of ended ones are kept."""
    sizes = [4, 3, 3, 1]
    gates, states, weight, bias = operands(cell, WEIGHTS[name], 64, sizes)
    y, *last = reference(cell, *arguments_of(gates, states, weight, bias, sizes, reverse))
    starts = [0, *itertools.accumulate(sizes)]
    for sequence, length in enumerate((4, 3, 3, 1)):
        rows = torch.tensor([starts[step] + sequence for step in range(length)])
        own = tuple(state[sequence : sequence + 1] for state in states)
        found = recurrent(cell, gates[rows], own, weight, bias, INPUTS["token"], [1] * length, reverse)
        torch.testing.assert_close(found[0], y[rows], rtol=1e-3, atol=1e-3)
        for a, b in zip(found[1], last, strict=True):
            torch.testing.assert_close(a[0], b[sequence], rtol=1e-3, atol=1e-3)


@EVERY_CELL
@pytest.mark.parametrize("name", ["int8", "int4-groups-asymmetric"])
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_threads_do_not_change_a_bit(cell: str, name: str, rows: int, threads: Callable[[int], None]) -> None:
    sizes = [rows] * 5
    gates, states, weight, bias = operands(cell, WEIGHTS[name], 700, sizes)
    found = []
    for count in (1, 2):
        threads(count)
        found.append(results(*recurrent(cell, gates, states, weight, bias, INPUTS["token"], sizes, False)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@EVERY_CELL
@pytest.mark.parametrize("name", ["int8", "int4-groups"])
def test_a_state_that_is_not_finite_stays_in_its_row(cell: str, name: str) -> None:
    sizes = [5] * 3
    gates, states, weight, bias = operands(cell, WEIGHTS[name], 64, sizes)
    expected, _ = recurrent(cell, gates, states, weight, bias, INPUTS["token"], sizes, False)
    states[0][2, 3] = float("nan")
    found, _ = recurrent(cell, gates, states, weight, bias, INPUTS["token"], sizes, False)
    bad = torch.arange(15) % 5 == 2
    assert torch.equal(found[~bad], expected[~bad]) and not bool(found[bad].isfinite().any())


@EVERY_CELL
def test_saturated_gates(cell: str) -> None:
    gates, states, weight, bias = operands(cell, WEIGHTS["int8"], 64, [2] * 3)
    arguments = arguments_of(gates * 1e4, states, weight, bias, [2] * 3, False)
    for a, b in zip(getattr(torch.ops.fewbit, cell)(*arguments), reference(cell, *arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@EVERY_CELL
def test_views_are_like_copies(cell: str) -> None:
    gates, states, weight, bias = operands(cell, WEIGHTS["int8"], 40, [3])
    expected = results(*recurrent(cell, gates, states, weight, bias, INPUTS["token"], [3], False))
    views = tuple(state.T.contiguous().T for state in states)
    found = results(*recurrent(cell, gates.T.contiguous().T, views, weight, bias, INPUTS["token"], [3], False))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=STEPPED, atol=STEPPED)


@EVERY_CELL
@pytest.mark.parametrize("wrong", ["gates", "states", "packed", "bias", "sizes"])
def test_operands_of_the_wrong_size_are_refused(cell: str, wrong: str) -> None:
    if not native.LOADED:
        pytest.skip("the reference trusts its callers")
    sizes = [2, 2]
    gates, states, weight, bias = operands(cell, WEIGHTS["int8"], 40, sizes)
    if wrong == "gates":
        gates = gates[:-1]
    elif wrong == "states":
        states = (*states[:-1], states[-1][:, :-1])
    elif wrong == "packed":
        weight = QTensor(weight.packed[:-1], weight.scale, None, weight.spec, weight.shape)
    elif wrong == "bias":
        bias = bias[:-1]
    else:
        sizes = [3, 1]
    with pytest.raises(RuntimeError, match="fewbit: "):
        getattr(torch.ops.fewbit, cell)(*arguments_of(gates, states, weight, bias, sizes, False))


@EVERY_CELL
@EVERY_WEIGHT
def test_the_operators_pass_opcheck(cell: str, weight_spec: QuantSpec) -> None:
    sizes = [3, 2]
    arguments = arguments_of(*operands(cell, weight_spec, 64, sizes), sizes, True)
    torch.library.opcheck(getattr(torch.ops.fewbit, cell).default, arguments)


@EVERY_CELL
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_gradients_are_those_of_the_steps(cell: str, with_bias: bool, reverse: bool) -> None:
    sizes = [5, 4, 1]
    gates, states, weight, b = operands(cell, WEIGHTS["int8"], 40, sizes)
    bias = b if with_bias else None
    leaves = [tensor.requires_grad_() for tensor in (gates, *states, bias) if tensor is not None]
    spec = INPUTS["token"]
    found = results(*recurrent(cell, gates, states, weight, bias, spec, sizes, reverse))
    with torch.no_grad():
        for a, b in zip(
            found, results(*recurrent(cell, gates, states, weight, bias, spec, sizes, reverse)), strict=True
        ):
            assert torch.equal(a, b) and not b.requires_grad
    # The same through float weights: h is near enough to its codes.
    expected = results(*recurrent(cell, gates, states, dequantize(weight), bias, None, sizes, reverse))
    slopes = [torch.randn_like(a) for a in found]
    for a, b in zip(
        torch.autograd.grad(found, leaves, slopes), torch.autograd.grad(expected, leaves, slopes), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    # Only what is asked for, from one of the results.
    [of_gates] = torch.autograd.grad(
        recurrent(cell, gates, tuple(s.detach() for s in states), weight, None, spec, sizes, reverse)[0].sum(), gates
    )
    assert of_gates.shape == gates.shape
    y, _ = recurrent(cell, gates, states, weight, bias, spec, sizes, reverse)
    [slope] = torch.autograd.grad(y.square().sum(), gates, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@EVERY_CELL
def test_weights_that_are_not_loaded_are_refused(cell: str) -> None:
    gates, states, weight, bias = operands(cell, WEIGHTS["int8"], 64, [2, 2])
    assert isinstance(weight.scale, Tensor)
    weight = replace(weight, packed=weight.packed.to("meta"), scale=weight.scale.to("meta"))
    with pytest.raises(RuntimeError, match=r"x is on cpu, .* on meta\. Load the weights"):
        recurrent(cell, gates, states, weight, bias, INPUTS["token"], [2, 2], False)
    on_meta = tuple(state.to("meta") for state in states)
    y, last = recurrent(cell, gates.to("meta"), on_meta, weight, bias.to("meta"), INPUTS["token"], [2, 2], False)
    assert y.shape == (4, 64) and all(state.is_meta and state.shape == (2, 64) for state in last)


@EVERY_CELL
@pytest.mark.parametrize(
    ("weight", "spec", "dtype"),
    [
        (QuantSpec("int8", per_channel(0)), None, torch.float32),
        (QuantSpec("int8", per_channel(0)), QuantSpec("int8", PER_TOKEN), torch.bfloat16),
        (QuantSpec("int8", per_channel(0)), QuantSpec("int8", PER_TOKEN), torch.float64),
        (QuantSpec("int4", per_group(16)), QuantSpec("int8", PER_TOKEN), torch.float32),
        (QuantSpec("nf4", per_group(32)), QuantSpec("int8", PER_TOKEN), torch.float32),
        (QuantSpec("int8", per_channel(0)), QuantSpec("uint8", PER_TOKEN, symmetric=False), torch.float32),
        (None, None, torch.float32),
    ],
    ids=["weight-only", "bfloat16", "float64", "groups-of-16", "nf4", "asymmetric", "float"],
)
def test_what_is_no_operator_goes_step_by_step(
    cell: str, weight: QuantSpec | None, spec: QuantSpec | None, dtype: torch.dtype
) -> None:
    sizes = [3, 2]
    gates, states, quantized, bias = operands(cell, weight or WEIGHTS["int8"], 64, sizes)
    w: QTensor | Tensor = dequantize(quantized) if weight is None else quantized
    floats = (gates.to(dtype), tuple(state.to(dtype) for state in states), w, bias.to(dtype))
    y, last = recurrent(cell, *floats, spec, sizes, False)
    expected, _ = recurrent(cell, gates, states, dequantize(quantized), bias, None, sizes, False)
    assert y.dtype == dtype and all(state.dtype == dtype for state in last)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


@EVERY_CELL
@pytest.mark.parametrize("spec", INPUTS.values(), ids=INPUTS.keys())
def test_an_exported_scan_is_one_operator_and_gives_equal_results(cell: str, spec: QuantSpec) -> None:
    length = 4
    weight, bias = operands(cell, WEIGHTS["int4-groups"], 64, [1])[2:]

    class Scan(torch.nn.Module):
        def forward(self, gates: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            sizes = [states[0].shape[0]] * length
            return results(*recurrent(cell, gates.flatten(0, 1), states, weight, bias, spec, sizes, False))

    def inputs(batch: int) -> tuple[Tensor, ...]:
        gates, states, _, _ = operands(cell, WEIGHTS["int4-groups"], 64, [batch] * length)
        return (gates.reshape(length, batch, -1), *states)

    batch = torch.export.Dim("batch", min=2, max=64)
    states = tuple({0: batch} for _ in inputs(2)[1:])
    exported = torch.export.export(Scan(), inputs(3), dynamic_shapes=({1: batch}, states))
    called = [str(node.target) for node in exported.graph.nodes if "fewbit" in str(node.target)]
    assert called == [f"fewbit.{cell}.default"]
    for rows in (3, 9):
        for a, b in zip(exported.module()(*inputs(rows)), Scan()(*inputs(rows)), strict=True):
            assert torch.equal(a, b)
