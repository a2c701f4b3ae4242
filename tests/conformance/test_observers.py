"""What every entry of OBSERVERS must satisfy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.observers import OBSERVERS, MovingAverage, RangeObserver, State
from fewbit.qtensor import qparams
from fewbit.spec import QuantSpec

EVERY = pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS.keys())
SPECS = {
    "int8": QuantSpec("int8"),
    "uint8": QuantSpec("uint8", symmetric=False),
    "int4": QuantSpec("int4"),
    "nf4": QuantSpec("nf4"),
}
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


@st.composite
def streams(draw: st.DrawFn) -> list[Tensor]:
    """Batches of one kind of data; two streams may differ by sixteen orders of magnitude."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    size, centre = 10.0 ** draw(st.integers(-8, 8)), draw(st.sampled_from([0.0, 2.0, -2.0]))
    lengths = draw(st.lists(st.integers(2, 40), min_size=0, max_size=4))
    return [(torch.randn(length) + centre) * size for length in lengths]


def observed(observer: RangeObserver, batches: list[Tensor], state: State | None = None) -> State:
    state = observer.init() if state is None else state
    for batch in batches:
        state = observer.update(state, batch)
    return state


def assert_equal(observer: RangeObserver, first: State, second: State) -> None:
    """Bit-equal, or close for averages."""
    assert first.keys() == second.keys()
    for name in first:
        if isinstance(observer, MovingAverage):
            torch.testing.assert_close(first[name], second[name], rtol=1e-12, atol=0)
        else:
            assert torch.equal(first[name], second[name]), name
            assert first[name].dtype == second[name].dtype, name


def copied(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}


@EVERY
@settings(max_examples=40)
@given(first=streams(), second=streams())
def test_merging_two_parts_is_observing_one_after_the_other(
    observer: RangeObserver, first: list[Tensor], second: list[Tensor]
) -> None:
    merged = observer.merge(observed(observer, first), observed(observer, second))
    assert_equal(observer, merged, observed(observer, first + second))


@EVERY
@settings(max_examples=20)
@given(parts=st.lists(streams(), min_size=3, max_size=3))
def test_merging_is_associative(observer: RangeObserver, parts: list[list[Tensor]]) -> None:
    first, second, third = (observed(observer, part) for part in parts)
    left = observer.merge(observer.merge(first, second), third)
    assert_equal(observer, left, observer.merge(first, observer.merge(second, third)))


@EVERY
def test_the_state_before_any_data_changes_nothing(observer: RangeObserver) -> None:
    torch.manual_seed(0)
    state = observed(observer, [torch.randn(9), torch.randn(30)])
    assert_equal(observer, observer.merge(observer.init(), state), state)
    assert_equal(observer, observer.merge(state, observer.init()), state)


@EVERY
def test_update_and_merge_leave_their_arguments_alone(observer: RangeObserver) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 50)
    state = observed(observer, [x])
    other = observed(observer, [100 * x - 1])
    kept, kept_other, kept_x = copied(state), copied(other), x.clone()
    observer.update(state, x * 1000)
    observer.merge(state, other)
    observer.choose_range(state, QuantSpec("int8"))
    assert torch.equal(x, kept_x)
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert all(torch.equal(other[name], kept_other[name]) for name in kept_other)


@EVERY
def test_the_state_is_bounded(observer: RangeObserver) -> None:
    torch.manual_seed(0)
    state = observed(observer, [torch.randn(200) * 10.0**power for power in range(-12, 13)])
    state = observed(observer, [torch.randn(20_000) * 1e-3, torch.randn(20_000) * 1e14], state)
    assert sum(value.numel() for value in state.values()) <= 4096 + 16


@EVERY
@EVERY_SPEC
@settings(max_examples=15)
@given(batches=streams().filter(bool))
def test_the_range_is_within_the_data_and_zero(observer: RangeObserver, spec: QuantSpec, batches: list[Tensor]) -> None:
    low, high = observer.choose_range(observed(observer, batches), spec)
    data = torch.cat(batches).double()
    slack = float(data.max() - data.min()) / 1024  # a histogram's bin
    assert (low.ndim, high.ndim) == (0, 0)
    assert min(float(data.min()), 0.0) - slack <= float(low) <= float(high) <= max(float(data.max()), 0.0) + slack


@EVERY
@EVERY_SPEC
def test_all_zeros(observer: RangeObserver, spec: QuantSpec) -> None:
    low, high = observer.choose_range(observed(observer, [torch.zeros(7), torch.zeros(2, 2)]), spec)
    assert (float(low.clamp(max=0)), float(high.clamp(min=0))) == (0, 0)


@EVERY
@EVERY_SPEC
@pytest.mark.parametrize("largest", [3e38, 1e30, 1e-20, 1e-30, 1e-37])
def test_values_at_the_ends_of_float32(observer: RangeObserver, spec: QuantSpec, largest: float) -> None:
    torch.manual_seed(0)
    x = (torch.rand(500) * 2 - 1) * largest
    low, high = observer.choose_range(observed(observer, [x]), spec)
    scale, _ = qparams(low, high, spec)
    assert isinstance(scale, Tensor)
    assert bool(scale.isfinite())
    assert -largest <= float(low) <= 0 <= float(high) <= largest
    if largest >= 1e-20:  # below, few bins remain
        assert float(low) < -largest / 3
        assert float(high) > largest / 3


@EVERY
@pytest.mark.parametrize("value", [1.0, -7.25, 3e38, 1e-20])
@pytest.mark.parametrize("length", [1, 5])
def test_the_range_of_a_constant_ends_there(observer: RangeObserver, value: float, length: int) -> None:
    x = torch.full((length,), value)
    low, high = observer.choose_range(observed(observer, [x]), QuantSpec("int8"))
    assert max(-float(low), float(high)) == pytest.approx(abs(float(x[0])), rel=1e-3)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_observed_as_their_float32_values(observer: RangeObserver, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 33).half().bfloat16().to(dtype) for _ in range(3)]
    state = observed(observer, batches)
    expected = observed(observer, [batch.float() for batch in batches])
    assert_equal(observer, state, expected)


@EVERY
def test_the_shape_of_the_data_does_not_matter(observer: RangeObserver) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 10)
    assert_equal(observer, observed(observer, [x]), observed(observer, [x.reshape(-1)]))
    assert_equal(observer, observed(observer, [x.transpose(0, 2)]), observed(observer, [x.reshape(-1)]))


@EVERY
@pytest.mark.parametrize("name", ["int8", "uint8", "int4"])
def test_the_range_of_normal_values_keeps_their_bulk(observer: RangeObserver, name: str) -> None:
    torch.manual_seed(0)
    low, high = observer.choose_range(observed(observer, [torch.randn(2000) for _ in range(20)]), SPECS[name])
    # Four bits are worth clipping at 2.5 sigma, eight at 4; no one gains by less.
    assert -6 < float(low) < -1.8
    assert 1.8 < float(high) < 6
