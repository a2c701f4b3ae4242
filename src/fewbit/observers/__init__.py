"""What calibration keeps: one file a statistic, one line an entry in OBSERVERS."""

from __future__ import annotations

from fewbit.observers.histogram import Histogram
from fewbit.observers.minmax import MinMax, MovingAverage
from fewbit.observers.observer import Observer, RangeObserver, State
from fewbit.observers.second_moment import SecondMoment

OBSERVERS: dict[str, RangeObserver] = {
    "minmax": MinMax(),
    "moving_average": MovingAverage(),
    "mse": Histogram("mse"),
    "entropy": Histogram("entropy"),
    "output": Histogram("output"),
    "percentile_99.9": Histogram("percentile", 99.9),
    "percentile_99.99": Histogram("percentile", 99.99),
    "percentile_99.999": Histogram("percentile", 99.999),
}

__all__ = ["OBSERVERS", "Histogram", "MinMax", "MovingAverage", "Observer", "RangeObserver", "SecondMoment", "State"]
