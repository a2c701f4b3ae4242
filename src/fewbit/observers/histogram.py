"""A histogram whose state depends on the data alone, not on their order, and the ranges chosen from it.

Bins are [i w, (i + 1) w) for integers i, with w the smallest power of two for which the values seen span at most BINS
bins. Coarsening merges pairs of bins exactly, so that observing in parts and merging is bit-equal to observing at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbit.observers.observer import RangeObserver, State
from fewbit.spec import QuantSpec

BINS = 4096
PIECE = 2**19  # values that are sorted into bins at once: they stay in the cache, and memory stays bounded
SMALLEST_EXPONENT = -100  # bins below 2^-100 tell nothing about a float32 range
# The shares of a range that each step of a search tries: fine near 1, and down to where one far outlier leaves the rest.
SHARES = torch.cat(
    [
        torch.linspace(1.0, 0.2, 49, dtype=torch.float64),
        torch.logspace(math.log10(0.19), -3, 24, dtype=torch.float64),
    ]
)


@dataclass(frozen=True)
class Histogram(RangeObserver):
    """Counts in at most 4,096 bins, and the exact smallest and largest value.

    ``choice``: "mse" takes the range with the least expected squared rounding and clipping error; "percentile" the
    central ``percentile`` percent of the values; "entropy" the range whose quantized distribution has the least
    Kullback-Leibler divergence from the observed one (Migacz, 8-bit inference with TensorRT, GTC 2017); "output" leaves it to
    the error of the layer's output which of the first, the whole range and two percentiles it is.
    """

    choice: Literal["mse", "percentile", "entropy", "output"]
    percentile: float = 100.0

    def init(self) -> State:
        return {
            "counts": torch.zeros(0, dtype=torch.int64),
            "first": torch.zeros((), dtype=torch.int64),
            "exponent": torch.tensor(SMALLEST_EXPONENT),
            "low": torch.tensor(torch.inf, dtype=torch.float64),
            "high": torch.tensor(-torch.inf, dtype=torch.float64),
        }

    def update(self, state: State, x: Tensor) -> State:
        values = x.detach().cpu()
        low, high = (end.to(torch.float64) for end in values.aminmax())
        exponent = _exponent(torch.minimum(low, state["low"]), torch.maximum(high, state["high"]))
        scale = 2.0 ** -int(exponent)
        first = torch.floor(low * scale).to(torch.int64)
        # Scaling by a power of two is exact, but for what is small enough to underflow.
        exact = torch.float64 if int(exponent) > 0 or values.dtype == torch.float64 else torch.float32
        size = int(torch.floor(high * scale)) - int(first) + 1
        counts = torch.zeros(size, dtype=torch.int64)
        if values.dim() > 1 and not values.is_contiguous():  # an image in channels-last order is read as it lies
            strides = values.stride()
            values = values.permute(sorted(range(values.dim()), key=lambda axis: -strides[axis]))
        for piece in values.reshape(-1).split(PIECE):
            bins = (piece.to(exact) * scale).floor_().sub_(int(first)).to(torch.int32)
            counts += torch.bincount(bins, minlength=size)
        batch = {"counts": counts, "first": first, "exponent": exponent, "low": low, "high": high}
        return self.merge(state, batch)

    def merge(self, first: State, second: State) -> State:
        if not len(first["counts"]) or not len(second["counts"]):
            return dict(second if len(second["counts"]) else first)
        low, high = torch.minimum(first["low"], second["low"]), torch.maximum(first["high"], second["high"])
        exponent = torch.maximum(_exponent(low, high), torch.maximum(first["exponent"], second["exponent"]))
        parts = [_coarsened(state, exponent) for state in (first, second)]
        start = min(int(begin) for _, begin in parts)
        end = max(int(begin) + len(counts) for counts, begin in parts)
        counts = torch.zeros(end - start, dtype=torch.int64)
        for part, begin in parts:
            counts[int(begin) - start :][: len(part)] += part
        return {"counts": counts, "first": torch.tensor(start), "exponent": exponent, "low": low, "high": high}

    def choose_range(self, state: State, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        if self.choice == "percentile":
            return self._percentile_range(state, self.percentile)
        counts = state["counts"].to(torch.float64)
        width = 2.0 ** int(state["exponent"])
        bins = torch.arange(len(counts), dtype=torch.float64) + int(state["first"])
        centres = ((bins + 0.5) * width).clamp(float(state["low"]), float(state["high"]))
        if self.choice == "entropy":  # 0 is exact on every grid, and often a spike that would outweigh all else
            counts = torch.where(bins == 0, 0.0, counts)
        low, high = state["low"].clamp(max=0), state["high"].clamp(min=0)
        if float(high - low) == 0 or float(counts.sum()) == 0:
            return low, high
        cost = _divergence if self.choice == "entropy" else _squared_error
        best = torch.ones(2, dtype=torch.float64)  # the shares of low and high that are kept
        # Both ends together; where the grid can follow, then each alone, twice: the tails of a distribution differ.
        for ends in ([0, 1],) if spec.symmetric else ([0, 1], [0], [1], [0], [1]):
            shares = best.repeat(len(SHARES), 1)
            shares[:, ends] = SHARES[:, None]
            errors = cost(centres, counts, low * shares[:, 0], high * shares[:, 1], spec)
            best = shares[errors.argmin()]
        return low * best[0], high * best[1]

    def candidates(self, state: State, spec: QuantSpec) -> list[tuple[Tensor, Tensor]]:
        best = self.choose_range(state, spec)
        if self.choice != "output":
            return [best]
        return [best, (state["low"], state["high"]), *(self._percentile_range(state, p) for p in (99.999, 99.99))]

    def _percentile_range(self, state: State, percentile: float) -> tuple[Tensor, Tensor]:
        cumulative = state["counts"].cumsum(0).to(torch.float64)
        width = 2.0 ** int(state["exponent"])
        outside = (1 - percentile / 100) / 2 * cumulative[-1]
        ends = []
        for target in (outside, cumulative[-1] - outside):
            index = int(torch.searchsorted(cumulative, target).clamp(max=len(cumulative) - 1))
            before = cumulative[index] - state["counts"][index]
            share = (target - before) / state["counts"][index].clamp(min=1)
            ends.append((int(state["first"]) + index + share) * width)
        return torch.maximum(ends[0], state["low"]), torch.minimum(ends[1], state["high"])


def _exponent(low: Tensor, high: Tensor) -> Tensor:
    """The smallest e for which [low, high] spans at most BINS bins of width 2^e, whose indices are below 2^52."""
    low_value, high_value = float(low), float(high)
    spread = max(high_value - low_value, 2.0**SMALLEST_EXPONENT)
    largest = math.frexp(max(-low_value, high_value))[1]
    exponent = max(SMALLEST_EXPONENT, largest - 52, math.ceil(math.log2(spread / BINS)) - 1)
    while math.floor(math.ldexp(high_value, -exponent)) - math.floor(math.ldexp(low_value, -exponent)) >= BINS:
        exponent += 1
    return torch.tensor(exponent)


def _coarsened(state: State, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """The counts and the first bin of ``state`` in bins of width 2^exponent."""
    shift = int(exponent - state["exponent"])
    bins = (torch.arange(len(state["counts"])) + state["first"]) >> min(shift, 62)
    counts = torch.zeros(int(bins[-1] - bins[0]) + 1, dtype=torch.int64)
    return counts.index_add_(0, bins - bins[0], state["counts"]), bins[0]


def _grid(centres: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """For each candidate range, the quantized bin centres ``[candidates, bins]`` and the steps ``[candidates, 1]``.

    The ideal real-valued step stands in for qparams' rounded one: the search needs the error's shape, not its bits.
    """
    code_low, code_high = spec.number.bound(spec.symmetric)
    if not spec.symmetric:
        step = (high - low)[:, None] / (code_high - code_low)
        zero_point = torch.round(code_low - low[:, None] / step)
        codes = (torch.round(centres / step) + zero_point).clamp(code_low, code_high)
        return (codes - zero_point) * step, step
    step = torch.maximum(-low, high)[:, None] / min(-code_low, code_high)
    codes = spec.number.encode((centres / step).clamp(code_low, code_high))
    return spec.number.decode(codes) * step, step


def _squared_error(centres: Tensor, counts: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    quantized, _ = _grid(centres, low, high, spec)
    return ((quantized - centres) ** 2) @ counts


def _divergence(centres: Tensor, counts: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """KL(observed, clipped | observed, quantized and spread evenly over the occupied bins of each value).

    What would look free is left out: a range of fewer bins than codes, where every bin has a code of its own, and one that
    leaves out more than a tenth of the values, where the ends are all that is left to compare.
    """
    quantized, step = _grid(centres, low, high, spec)
    results = []
    for row, width in zip(quantized, step, strict=True):
        covered = (centres >= row.min() - width / 2) & (centres <= row.max() + width / 2)
        inside = covered & (counts > 0)
        if int(covered.sum()) < 2**spec.number.bits or float(counts[covered].sum()) < 0.9 * float(counts.sum()):
            results.append(torch.tensor(torch.inf, dtype=torch.float64))
            continue
        first, last = int(inside.int().argmax()), len(inside) - 1 - int(inside.flip(0).int().argmax())
        clipped = torch.where(inside, counts, 0.0)
        # The observed distribution has the clipped mass at its ends, the quantized one is made without it: it costs.
        observed = clipped.clone()
        observed[first] += counts[:first].sum()
        observed[last] += counts[last + 1 :].sum()
        values, levels = torch.unique(row, return_inverse=True)
        occupied = (clipped > 0).to(torch.float64)
        mass = torch.zeros(len(values), dtype=torch.float64).index_add_(0, levels, clipped)
        bins = torch.zeros_like(mass).index_add_(0, levels, occupied)
        spread = (mass / bins.clamp(min=1))[levels] * occupied
        p, q = observed / observed.sum(), spread / spread.sum()
        results.append(torch.where(p > 0, p * torch.log(p / q.clamp(min=1e-300)), 0.0).sum())
    return torch.stack(results)
