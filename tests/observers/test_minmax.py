"""Smallest and largest value, and their moving average."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbit.observers import MinMax, MovingAverage, RangeObserver
from fewbit.spec import QuantSpec

SPEC = QuantSpec("int8")


def range_of(observer: RangeObserver, batches: list[Tensor]) -> tuple[float, float]:
    state = observer.init()
    for batch in batches:
        state = observer.update(state, batch)
    low, high = observer.choose_range(state, SPEC)
    return float(low), float(high)


def test_minmax_is_over_all_batches() -> None:
    assert range_of(MinMax(), [torch.tensor([1.0, 2.0]), torch.tensor([[-3.0], [0.5]])]) == (-3.0, 2.0)


@pytest.mark.parametrize("value", [0.0, 1.0, -7.25, 3e38, 1e-40])
@pytest.mark.parametrize("observer", [MinMax(), MovingAverage()], ids=["minmax", "moving_average"])
def test_a_constant_is_both_ends(observer: RangeObserver, value: float) -> None:
    constant = torch.full((5,), value)
    expected = float(constant[0])
    assert range_of(observer, [constant, constant]) == pytest.approx((expected, expected), rel=1e-12, abs=0)


def test_the_average_of_one_batch_is_its_range() -> None:
    batch = torch.tensor([-2.0, 8.0])
    assert range_of(MovingAverage(), [batch]) == pytest.approx((-2.0, 8.0))


def test_the_average_weighs_later_batches_more() -> None:
    batches = [torch.tensor([-1.0, 1.0]), torch.tensor([-3.0, 5.0])]
    # Weights 0.5 * 0.5 and 0.5, normalized: 1/3 and 2/3.
    assert range_of(MovingAverage(momentum=0.5), batches) == pytest.approx((-7 / 3, 11 / 3))


def test_the_average_forgets_an_early_outlier() -> None:
    batches = [torch.tensor([-1.0, 1000.0])] + [torch.tensor([-1.0, 1.0])] * 400
    low, high = range_of(MovingAverage(), batches)
    assert low == pytest.approx(-1.0)
    assert high == pytest.approx(1.0, abs=1e-3)


def test_float64_is_kept_as_it_is() -> None:
    assert range_of(MinMax(), [torch.tensor([-1e300, 1e300], dtype=torch.float64)]) == (-1e300, 1e300)
