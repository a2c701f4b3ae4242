"""What every entry of METHODS must satisfy, for every format and granularity, with plain and two-level scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbit.methods import METHODS, Method
from fewbit.qtensor import QTensor, dequantize, empty, quantize
from fewbit.spec import PER_TENSOR, PER_TOKEN, QuantSpec, per_channel, per_group

KINDS = [("int8", True), ("int8", False), ("uint8", False), ("int4", True), ("int4", False), ("nf4", True)]
GRANULARITIES = [PER_TENSOR, PER_TOKEN, per_channel(0), per_channel(1), per_group(5), per_group(64)]
LEVELS = {
    "plain": None,
    "two-level": QuantSpec("int8", per_channel(0)),
    "two-level-asymmetric": QuantSpec("uint8", symmetric=False),
}
SPECS = [
    pytest.param(
        QuantSpec(name, granularity, symmetric, scale=level),
        id=f"{name}-{'symmetric' if symmetric else 'asymmetric'}-{granularity.to_json()}-{level_name}",
    )
    for name, symmetric in KINDS
    for granularity in GRANULARITIES
    for level_name, level in LEVELS.items()
]
PLAIN_SPECS = [spec for spec in SPECS if spec.id and spec.id.endswith("-plain")]
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS)
ROWS, COLUMNS = 6, 23


def weight_and_importance() -> tuple[Tensor, Tensor]:
    """Heavy-tailed weights, and importance ``[K]`` over several orders of magnitude."""
    torch.manual_seed(0)
    return torch.randn(ROWS, COLUMNS) ** 3 + 0.05, torch.empty(COLUMNS).exponential_(1.0) ** 3


def weighted_error(weight: Tensor, q: QTensor, importance: Tensor | None) -> float:
    importance = torch.ones(()) if importance is None else importance
    return float(((weight - dequantize(q)).double().square() * importance).sum())


def buffers(q: QTensor) -> list[Tensor]:
    scale = buffers(q.scale) if isinstance(q.scale, QTensor) else [q.scale]
    return [q.packed, *scale, *([] if q.zero_point is None else [q.zero_point])]


@EVERY
@EVERY_SPEC
def test_the_result_obeys_the_spec(method: Method, spec: QuantSpec) -> None:
    weight, importance = weight_and_importance()
    q = method.quantize(weight, spec, importance)
    expected = empty(tuple(weight.shape), spec)
    assert (q.spec, q.shape) == (spec, tuple(weight.shape))
    assert [(part.shape, part.dtype) for part in buffers(q)] == [(part.shape, part.dtype) for part in buffers(expected)]
    low, high = spec.number.bound(spec.symmetric)
    if spec.number.is_integer:
        assert low <= int(q.codes.min()) <= int(q.codes.max()) <= high
    assert bool(dequantize(q).isfinite().all())


@EVERY
@EVERY_SPEC
def test_arguments_are_left_alone_and_the_result_is_repeatable(method: Method, spec: QuantSpec) -> None:
    weight, importance = weight_and_importance()
    kept_weight, kept_importance = weight.clone(), importance.clone()
    first = method.quantize(weight, spec, importance)
    torch.manual_seed(1)
    second = method.quantize(weight, spec, importance)
    assert torch.equal(weight, kept_weight)
    assert torch.equal(importance, kept_importance)
    assert all(torch.equal(a, b) for a, b in zip(buffers(first), buffers(second), strict=True))


@EVERY
@pytest.mark.parametrize("spec", PLAIN_SPECS)
@pytest.mark.parametrize("kind", ["none", "columns", "elements"])
def test_never_worse_than_rtn_on_its_own_objective(method: Method, spec: QuantSpec, kind: str) -> None:
    weight, importance = weight_and_importance()
    of_elements = importance * torch.rand(ROWS, 1) + torch.rand(ROWS, COLUMNS)
    given = {"none": None, "columns": importance, "elements": of_elements}[kind]
    objective = given if method.uses_importance else None
    q = method.quantize(weight, spec, given)
    rounded = quantize(weight, spec)
    assert weighted_error(weight, q, objective) <= weighted_error(weight, rounded, objective) * (1 + 1e-6)


@EVERY
@EVERY_SPEC
def test_zeros_stay_exactly_zero(method: Method, spec: QuantSpec) -> None:
    weight, importance = weight_and_importance()
    weight[torch.rand_like(weight) < 0.3] = 0
    weight[2] = 0
    assert bool((dequantize(method.quantize(weight, spec, importance))[weight == 0] == 0).all())


@EVERY
@EVERY_SPEC
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_counted(method: Method, spec: QuantSpec, bad: float) -> None:
    weight, _ = weight_and_importance()
    weight[1, 2] = bad
    with pytest.raises(ValueError, match=f"found 1 NaN or infinite of {ROWS * COLUMNS} values"):
        method.quantize(weight, spec)


@EVERY
@pytest.mark.parametrize("spec", PLAIN_SPECS)
@pytest.mark.parametrize("largest", [3e38, 1e-40])
def test_weights_at_the_ends_of_float32(method: Method, spec: QuantSpec, largest: float) -> None:
    torch.manual_seed(0)
    weight = (torch.rand(ROWS, COLUMNS) * 2 - 1) * largest
    q = method.quantize(weight, spec)
    assert bool(dequantize(q).isfinite().all())
    assert bool(((dequantize(q) - weight).abs() <= largest).all())


@EVERY
@EVERY_SPEC
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes(method: Method, spec: QuantSpec, dtype: torch.dtype) -> None:
    weight, _ = weight_and_importance()
    rounded = weight.bfloat16().half()  # values that every dtype holds
    q = method.quantize(rounded.to(dtype), spec)
    expected = method.quantize(rounded.float(), spec)
    assert [part.dtype for part in buffers(q)] == [part.dtype for part in buffers(expected)]
    torch.testing.assert_close(
        dequantize(q), dequantize(expected), rtol=0, atol=1.01 * float(expected.scale_values.max())
    )


@EVERY
@pytest.mark.parametrize("spec", PLAIN_SPECS)
def test_zero_importance_is_no_reason_to_fail(method: Method, spec: QuantSpec) -> None:
    weight, importance = weight_and_importance()
    q = method.quantize(weight, spec, torch.zeros_like(importance))
    assert torch.equal(q.codes, quantize(weight, spec).codes)
